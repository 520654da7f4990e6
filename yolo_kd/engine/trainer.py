"""`DistillationTrainer`: Ultralytics' detection trainer with a teacher beside the student. Overrides, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import yaml
from torch import distributed as dist
from torch import nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.class_options import CLASS_KEYS, ClassOptions
from yolo_kd.config.recipe import THINNED
from yolo_kd.config.speed import AUTO, SPEED_KEYS, Speed, thread_count
from yolo_kd.config.unlabeled import UNLABELED_KEYS, UnlabeledOptions
from yolo_kd.distillation.adapter_state import hold_adapters
from yolo_kd.distillation.audit import AuditRow, table
from yolo_kd.distillation.criterion import TEACHER_OUTPUTS, DistillationCriterion
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.distillation.memory_probe import MemoryProbe
from yolo_kd.distillation.student_init import Inheritance, inherit, thin
from yolo_kd.distillation.teacher import Pending, Teacher
from yolo_kd.distillation.teacher_cache import ViewCache
from yolo_kd.distillation.unlabeled_criterion import PoolCriterion, is_pool_column, teacher_reads
from yolo_kd.engine.checks_before import check_models, check_unlabeled_images
from yolo_kd.engine.class_resolution import check_same_classes, kept_classes, match_classes
from yolo_kd.engine.components.keep_classes import KeepTrainer
from yolo_kd.engine.components.kept_head import KeptClasses
from yolo_kd.engine.plan import Plan, is_resolved, make_plan
from yolo_kd.engine.resume import open_run, resumed_images, resumed_plan
from yolo_kd.engine.run_files import write_atomically
from yolo_kd.environment import check_cpu_bf16, check_torchvision, reused_memory
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector
from yolo_kd.safe_loading.restricted import restricted_loading
from yolo_kd.structures import DetectorOutputs
from yolo_kd.upstream.cpu_bf16 import cpu_bf16_autocast, is_cpu_bf16
from yolo_kd.upstream.ddp import reaches_every_parameter, without_search
from yolo_kd.upstream.heads import OptimizerScope, find_layers, head_tails
from yolo_kd.upstream.pairing import pair_spec
from yolo_kd.upstream.recorders import LayerRecorder
from yolo_kd.upstream.run_folders import exclusive_run_folder, shared_data

_BASIC = ("teacher", "kd", "plugins", "inherit", "trust_checkpoints", "random_teacher")
OWN_KEYS = (*_BASIC, *SPEED_KEYS, *CLASS_KEYS, *UNLABELED_KEYS)


class DistillationTrainer(KeepTrainer):
    """Trains a student detector under a frozen teacher.

    Use it as any Ultralytics trainer, with four keys more::

        YOLO("yolov8n.pt").train(trainer=DistillationTrainer, teacher="yolov8s.pt", kd="objectness", data="coco8.yaml")

    The student stays a plain `DetectionModel`; distillation is a criterion object that hangs on it, and the teacher
    runs beside it. With `kd="none"` and no teacher it is Ultralytics' own trainer, which makes it the baseline.

    Args:
        cfg: Ultralytics' defaults.
        overrides: Ultralytics' training keys and ours: `teacher` (checkpoint, or with `random_teacher` a model YAML),
            `kd` (recipe name, YAML file or mapping), `kd.<loss>.<key>` (changes to it), `trust_checkpoints`, and those
            of `yolo_kd.config.speed`, `yolo_kd.classes.mapping` and `yolo_kd.config.unlabeled`.
        _callbacks: Ultralytics' callbacks.

    Raises:
        YoloKDError: For everything that can be known before the first batch, before any folder is made.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None):
        overrides = dict(overrides or {})
        self.args: Any
        self.data: dict[str, Any]
        self.model: Any
        self.loss: Any
        own = {key: overrides.pop(key) for key in OWN_KEYS if key in overrides}
        changes = {k.removeprefix("kd."): overrides.pop(k) for k in [*overrides] if k.startswith("kd.")}
        if overrides.get("distill_model"):
            raise ConfigError(
                "distill_model= is Ultralytics' own distillation; write teacher= with kd=ultralytics instead."
            )
        check_torchvision()
        self.teacher: Teacher | None = None
        self.distiller: Distiller | None = None
        self.guard = FiniteGuard()
        self.audit_rows: list[AuditRow] = []
        self._student_taps: dict[str, nn.Module] = {}
        self._views: ViewCache | None = None
        self._detector: LoadedDetector | None = None
        self._weightless = False
        self.inheritance: Inheritance | None = None
        self._batch_in_epoch = (-1, 0)  # epoch, batches seen in it
        self._own = own
        told = own["kd"] if is_resolved(own.get("kd")) else own
        self.trust_checkpoints = bool(told.get("trust_checkpoints", False))
        self.plan: Plan | None = None
        self.speed = Speed.of(own)
        if not overrides.get("resume"):
            self.plan, detector = make_plan(own, changes)
            self._detector = check_models(self.plan, detector, overrides, self.trust_checkpoints)
            self.speed = self.plan.speed if self.plan else self.speed
            if self.plan is not None and self.plan.pool is not None:
                self._pool, self._labelled = check_unlabeled_images(self.plan, vars(get_cfg(cfg, overrides)))
        if is_cpu_bf16(overrides):
            check_cpu_bf16()
        with restricted_loading(self.trust_checkpoints), exclusive_run_folder():
            super().__init__(cfg, overrides, _callbacks)
        if self.plan is not None:
            self.args.kd = self.plan.to_dict()

    @property
    def alone(self) -> bool:
        """Whether the student is trained without a teacher."""
        return self.plan is None

    # ---------------------------------------------------------------------------------------------- resume

    def check_resume(self, overrides: dict) -> None:
        """Restore recipe and teacher from the checkpoint, and refuse a teacher that is not the same file."""
        data: dict[str, Any] = {}
        if overrides.get("resume"):
            data = open_run(overrides, self._own, self.trust_checkpoints)
        super().check_resume(overrides)
        state = getattr(self.args, "kd", None) if self.resume else None
        if state is None:
            return
        self.plan = resumed_plan(state, self._own, self.trust_checkpoints)
        self.speed = self.plan.speed
        if self.plan.pool is not None:
            self._pool, self._labelled = resumed_images(self.plan, vars(self.args))
        self._detector = self._load_teacher(data)
        if self.plan.classes is not None:
            found_now, _ = match_classes(self.plan.choice, self.plan.recipe, self._detector, data, vars(self.args))
            check_same_classes(self.plan.classes, found_now)

    # ---------------------------------------------------------------------------------------------- set-up

    @property
    def pool(self) -> UnlabeledOptions | None:
        """What the user said about a pool of unlabelled images."""
        return None if self.plan is None else self.plan.pool

    @property
    def choice(self) -> ClassOptions:
        """What the user said about classes."""
        return ClassOptions() if self.plan is None else self.plan.choice

    def kept_classes(self, data: dict[str, Any]) -> KeptClasses:
        """Return the classes of a run that keeps its teacher's."""
        assert self._detector is not None
        return kept_classes(self.choice, self._detector, data, vars(self.args))

    def _make_criterion(self, student: Any, native: Any = None) -> DistillationCriterion:
        assert self.plan is not None
        assert self.distiller is not None
        keys = {"native": native, "on_audit": self._log_audit, "guard": self.guard}
        pool = self.plan.pool
        make = DistillationCriterion if pool is None else partial(PoolCriterion, pool=pool)
        criterion = make(student, self.distiller, **keys)
        criterion.kept = self._kept
        return criterion

    def get_validator(self) -> Any:
        """Give the validator Ultralytics' own arguments only; it checks every key."""
        args = self.args
        self.args = copy(args)
        if hasattr(self.args, "kd"):
            delattr(self.args, "kd")
        try:
            return super().get_validator()
        finally:
            self.args = args

    def set_model_attributes(self) -> None:
        """Lay the student out and hang the criterion on it, as soon as it is on its device."""
        super().set_model_attributes()
        if is_cpu_bf16(vars(self.args), self.device.type) and self.args.channels_last is None:
            # a fifth faster there; Ultralytics does it on a GPU only
            self.model = self.model.to(memory_format=torch.channels_last)
        if self.plan is None:
            return
        data = self._data_of_labels or self.data
        detector = self._detector or self._load_teacher(data)
        self._detector = None
        classes, _ = match_classes(self.plan.choice, self.plan.recipe, detector, data, vars(self.args))
        self.plan = replace(self.plan, classes=classes)
        self.args.kd = {**self.args.kd, "classes": classes.to_dict()}
        student = unwrap_model(self.model)
        self._inherit(student, detector, classes.is_identity)
        self.teacher = self._make_teacher(detector)
        self.distiller = self._make_distiller(student, detector.model, classes)
        self.guard = FiniteGuard(self.distiller.trained_parameters())
        student.criterion = self._make_criterion(student)
        if RANK in {-1, 0}:
            LOGGER.info(classes.table())
            origin = "random weights" if detector.random else f"sha256 {detector.sha256[:12]}"
            LOGGER.info(f"Distilling {', '.join(self.distiller.terms)} from {detector.path} ({origin}, frozen)")

    def _make_teacher(self, detector: LoadedDetector) -> Teacher:
        assert self.plan is not None
        recipe, speed = self.plan.recipe, self.speed
        if speed.teacher_compile == AUTO:
            speed = replace(speed, teacher_compile=bool(self.args.compile) and self.device.type == "cuda")
        reads = teacher_reads(self.plan.pool, recipe.reads | ({"scores"} if self._kept else set()))
        layers, split = recipe.teacher_layers, recipe.head_split
        return Teacher(detector, self.device, speed, layers, split, reads, self._teacher_settled)

    def _make_distiller(self, student: nn.Module, teacher: nn.Module, classes: ClassMap) -> Distiller:
        """Return what the recipe adds to the student's loss, and find the student's layers that it reads."""
        assert self.plan is not None
        recipe = self.plan.recipe
        self._student_taps = find_layers(student, recipe.student_layers, "student", recipe.head_split)
        if self._student_taps and self.args.compile:
            raise ConfigError(
                "compile= cannot be combined with a recipe that reads layers inside the student "
                f"({', '.join([*self._student_taps][:3])}, ...). Add compile=False."
            )
        teacher_taps = find_layers(teacher, recipe.teacher_layers, "teacher", recipe.head_split)
        pair = pair_spec(student, teacher, self._student_taps, teacher_taps, len(classes.matched))
        distiller = Distiller(recipe, pair, classes).to(self.device).train()
        if dist.is_initialized():
            for tensor in distiller.state_dict().values():  # ranks draw different random numbers
                if isinstance(tensor, torch.Tensor):
                    dist.broadcast(tensor, 0)
        return distiller

    def _inherit(self, student: nn.Module, teacher: LoadedDetector, same_classes: bool) -> None:
        """Let the student start from the teacher, if the user says so, or the recipe of one that has no weights."""
        assert self.plan is not None
        how, asked = self.plan.inherit, self.plan.inherit is not None
        if not asked:
            how = self._weightless and not teacher.random and not self.choice.keep_classes and self.plan.recipe.inherit
        if not how or self.resume:
            return
        if how == THINNED:
            self.inheritance = thin(student, teacher.model, same_classes, least=0.0 if asked else 0.5)
        else:
            self.inheritance = inherit(student, teacher.model, same_classes)
        if RANK in {-1, 0}:
            why = f"\n  kd={self.plan.recipe.name} starts students without weights so; inherit=false leaves them random"
            LOGGER.info(f"{self.inheritance.report()}{'' if asked else why}")

    def get_model(self, cfg: Any = None, weights: Any = None, verbose: bool = True) -> Any:
        """Note whether the student has weights of its own."""
        self._weightless = weights is None
        return super().get_model(cfg, weights, verbose)

    def _load_teacher(self, data: Mapping[str, Any]) -> LoadedDetector:
        assert self.plan is not None
        nc = 1 if self.args.single_cls else data["nc"]
        return load_detector(
            self.plan.teacher, role="teacher", trust=self.trust_checkpoints, nc=nc, channels=data["channels"]
        )

    def _teacher_settled(self, sentence: str) -> None:
        """Log how the teacher runs, and hand the end of its head to the losses that ask for it."""
        if RANK in {-1, 0}:
            LOGGER.info(sentence)
        if self.teacher is not None and self.distiller is not None:
            way = self.teacher.runner.way
            settled = replace(
                self.speed,
                teacher_precision=way.precision,  # type: ignore[arg-type]
                teacher_channels_last=way.channels_last,
            )
            self.args.kd = {**self.args.kd, "speed": settled.to_keys()}  # a resumed run goes on the same way
            self.distiller.attach_teacher_head(head_tails(self.teacher.runner.model))

    def _log_audit(self, rows: list[AuditRow]) -> None:
        self.audit_rows = rows
        if RANK in {-1, 0}:
            LOGGER.info(table(rows))

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Put the adapters into the student's optimiser, and their state into its state dict."""
        if self.distiller is None:
            return super().build_optimizer(model, *args, **kwargs)
        optimizer = super().build_optimizer(OptimizerScope(unwrap_model(model), self.distiller), *args, **kwargs)
        hold_adapters(optimizer, self.distiller)
        return optimizer

    def _setup_train(self) -> None:
        """Hang up the student's taps and write the resolved recipe, once everything else is set up."""
        with self._parallel():
            super()._setup_train()
        self._tap_student()
        if self.plan is not None and RANK in {-1, 0}:
            write_atomically(self.save_dir / "kd.yaml", yaml.safe_dump(self.plan.to_dict(), sort_keys=False).encode())

    @contextmanager
    def _parallel(self) -> Iterator[None]:
        """Spare several processes the search for unused parameters where the student has none."""
        if self.plan is None or self.world_size < 2:
            yield
            return
        with without_search(lambda student: self._whole_graph(unwrap_model(student))):
            yield

    def _whole_graph(self, student: Any) -> bool:
        images = torch.zeros(2, self.data["channels"], *[2 * self.stride] * 2, device=self.device)
        whole = reaches_every_parameter(student, images, self.freeze_layer_names)
        student.criterion.whole_graph = whole
        return whole

    def resume_training(self, ckpt: dict | None) -> None:
        """Put the criterion back where Ultralytics replaced it (it does for end-to-end heads)."""
        super().resume_training(ckpt)
        if self.distiller is None:
            return
        student = unwrap_model(self.model)
        if not isinstance(student.criterion, DistillationCriterion):
            student.criterion = self._make_criterion(student, native=student.criterion)
            student.criterion.whole_graph = getattr(self.model, "find_unused_parameters", True) is False

    def auto_batch(self) -> int:
        """Let Ultralytics find the batch size for the whole step: student, teacher, adapters and terms."""
        if self.plan is None or self.teacher is None or self.distiller is None:
            return super().auto_batch()
        recipe = self.plan.recipe

        def tap(student: nn.Module) -> LayerRecorder:
            return LayerRecorder(find_layers(student, recipe.student_layers, "student", recipe.head_split))

        model = self.model
        student = unwrap_model(model)
        self.model = MemoryProbe(student, self.distiller, self.teacher.rehearsal(), tap if self._student_taps else None)
        try:
            return super().auto_batch()
        finally:
            self.model = model

    def _tap_student(self) -> None:
        """Hang hooks on the student where the recipe reads more than its neck; never while it is copied or saved."""
        if self._student_taps:
            criterion = unwrap_model(self.model).criterion
            criterion.close()
            criterion.layers = LayerRecorder(self._student_taps)

    def _load_checkpoint_state(self, ckpt: dict) -> None:
        """Restore from a checkpoint (resume, recovery from NaN) without hooks, since it copies the student."""
        criterion: Any = getattr(unwrap_model(self.model), "criterion", None)
        tapped = getattr(criterion, "layers", None) is not None
        if tapped:
            criterion.close()
        super()._load_checkpoint_state(ckpt)
        if tapped:
            self._tap_student()

    # ---------------------------------------------------------------------------------------------- the step

    def train(self) -> Any:
        """Train, with every checkpoint load restricted and nothing half-written that another training may read."""
        with restricted_loading(self.trust_checkpoints), shared_data():
            return super().train()

    def _do_train(self) -> None:
        """On a CPU train on all cores and with bfloat16 autocast where asked, which Ultralytics does not; clean up."""
        threads = torch.get_num_threads()
        if self.device.type == "cpu":
            torch.set_num_threads(thread_count(self.speed.threads))
        try:
            with (
                reused_memory() if self.device.type == "cpu" else nullcontext(),
                cpu_bf16_autocast() if is_cpu_bf16(vars(self.args), self.device.type) else nullcontext(),
            ):
                super()._do_train()
            if self.teacher is not None:
                self.teacher.verify_untouched()
            if summary := self.guard.summary():
                LOGGER.warning(summary)
        finally:
            torch.set_num_threads(threads)
            self._detach()

    def _detach(self) -> None:
        """Leave a plain student and a teacher without hooks."""
        self.guard.close()
        if self.teacher is not None:
            self.teacher.close()
        if self._views is not None:
            self._views.close()
        student: Any = unwrap_model(self.model) if isinstance(self.model, nn.Module) else None
        if isinstance(getattr(student, "criterion", None), DistillationCriterion):
            student.criterion.close()
            student.criterion = None

    def preprocess_batch(self, batch: dict) -> dict:
        """Let the teacher see the batch as the student will: on the device, after multi-scale."""
        batch = super().preprocess_batch(batch)
        if self.teacher is None or self.optimizer is None:  # without an optimiser this is a calibration pass
            return batch
        self.guard.check(self._weights, self._recoverable)
        batch[TEACHER_OUTPUTS] = view = self._teacher_view(batch)
        if not self.guard.admitted:
            self.guard.admit(view if isinstance(view, DetectorOutputs) else view.take(), str(self.teacher.path))
        epoch, seen = self._batch_in_epoch
        seen = seen + 1 if epoch == self.epoch else self._skipped
        self._batch_in_epoch = (self.epoch, seen)
        criterion = unwrap_model(self.model).criterion
        criterion.progress = min((self.epoch + seen / max(len(self.train_loader), 1)) / max(self.epochs, 1), 1.0)
        criterion.close_mosaic = 1 - self.args.close_mosaic / max(self.epochs, 1) if self.args.close_mosaic else 1.0
        return batch

    def _teacher_view(self, batch: dict) -> DetectorOutputs | Pending:
        """Return what the teacher sees on a batch, from the cache where there is one."""
        assert self.teacher is not None
        if self._views is None:
            return self.teacher.begin(batch["img"])
        kept = self._views.get(batch["im_file"], batch["img"])
        if kept is None:
            kept = self.teacher(batch["img"])
            self._views.put(batch["im_file"], batch["img"], kept)
        return kept

    def optimizer_step(self) -> None:
        """Step student and adapters under one gradient-norm limit, as upstream does with its projector."""
        if self.distiller is None:
            return super().optimizer_step()
        adapters = self.distiller.trained_parameters()
        if RANK != -1 and self.world_size > 1:
            for p in adapters:  # the distributed wrapper holds the student only
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad /= self.world_size
        self.scaler.unscale_(self.optimizer)
        stepped = [*self.model.parameters(), *adapters]
        norm = nn.utils.clip_grad_norm_(stepped, max_norm=10.0)
        if not self.guard.allows_step(norm, stepped, self.scaler.is_enabled()):
            return self.optimizer.zero_grad()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        self.distiller.after_step()
        return None

    def _build_train_pipeline(self) -> None:
        """Start the epoch's progress over where Ultralytics halves the batch after running out of memory."""
        super()._build_train_pipeline()
        self._batch_in_epoch = (-1, 0)
        criterion = getattr(unwrap_model(self.model), "criterion", None)
        if isinstance(criterion, DistillationCriterion):
            criterion.forget()

    def _handle_nan_recovery(self, epoch: int) -> bool:
        """Say what was skipped in the epoch, and let Ultralytics go back to `last.pt` where weights broke.

        It looks at the loss of the last batch, from which the guard has taken what was not finite.
        """
        said, broken = self.guard.end_epoch(epoch, self._weights, self._recoverable)
        if said:
            LOGGER.warning(said)
        if broken:
            self.loss = torch.full_like(self.loss, float("nan"))
        self._batch_in_epoch = (-1, 0)  # the epoch may be done again
        return super()._handle_nan_recovery(epoch)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the state of student and adapters."""
        adapters = {} if self.distiller is None else self.distiller.state_dict()
        return {**unwrap_model(self.model).state_dict(), **adapters}

    @property
    def _recoverable(self) -> bool:
        """Whether Ultralytics can go back to `last.pt`: after the first epoch, where there is one."""
        return self.epoch > self.start_epoch and self.last.exists()

    # ---------------------------------------------------------------------------------------------- what is left

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Leave the terms out of validation columns, where nothing is distilled and they could only be zero."""
        labelled = super().label_loss_items(loss_items, prefix)
        if prefix != "val" or self.distiller is None:
            return labelled
        columns = (*self.distiller.columns, *self.distiller.weight_columns.values())
        own = {f"{prefix}/{column}" for column in columns}
        own |= {k for k in labelled if is_pool_column(k.removeprefix(f"{prefix}/"))}
        return (
            [k for k in labelled if k not in own]
            if isinstance(labelled, list)
            else {k: v for k, v in labelled.items() if k not in own}
        )

    def provenance(self) -> dict[str, Any]:
        """Note in the finished files how they were made."""
        if self.plan is None:
            return {}
        audit = [vars(row) for row in self.audit_rows]
        return {"yolo_kd": {**self.plan.to_dict(), "audit": audit, "skipped_batches": self.guard.skipped}}
