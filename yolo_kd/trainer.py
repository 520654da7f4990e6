"""`DistillationTrainer`: Ultralytics' detection trainer with a teacher beside the student. Overrides, nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import distributed as dist
from torch import nn
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG, LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.audit import AuditRow, table
from yolo_kd.checkpoints import LoadedDetector, load_checkpoint_file, load_detector, restricted_loading
from yolo_kd.criterion import TEACHER_VIEW, DistillationCriterion
from yolo_kd.distiller import Distiller
from yolo_kd.environment import check_cpu_bf16, check_torchvision
from yolo_kd.errors import AuditError, ConfigError
from yolo_kd.inherit import inherit
from yolo_kd.losses.base import find
from yolo_kd.plan import Plan, check_models, check_resumable, check_teacher_file, make_plan
from yolo_kd.taps import (
    LayerTap,
    OptimizerScope,
    find_layers,
    head_split_points,
    head_tails,
    pair_of,
)
from yolo_kd.teacher import Teacher

ADAPTER_STATE = "yolo_kd"  # key of the adapters' state inside the optimiser's state dict
OWN_KEYS = ("teacher", "kd", "inherit", "trust_checkpoints", "random_teacher")


class DistillationTrainer(DetectionTrainer):
    """Trains a student detector under a frozen teacher.

    Use it as any Ultralytics trainer, with four keys more::

        YOLO("yolov8n.pt").train(trainer=DistillationTrainer, teacher="yolov8s.pt", kd="objectness", data="coco8.yaml")

    The student stays a plain `DetectionModel`; distillation is a criterion object that hangs on it, and the teacher
    runs beside it. With `kd="none"` and no teacher it is Ultralytics' own trainer, which makes it the baseline.

    Args:
        cfg: Ultralytics' defaults.
        overrides: Ultralytics' training keys and ours: `teacher` (checkpoint, or with `random_teacher` a model YAML),
            `kd` (recipe name, YAML file or mapping), `kd.<loss>.<key>` (changes to it), `trust_checkpoints`.
        _callbacks: Ultralytics' callbacks.

    Raises:
        YoloKDError: For everything that can be known before the first batch, before any folder is made.
    """

    def __init__(self, cfg: Any = DEFAULT_CFG, overrides: dict | None = None, _callbacks: dict | None = None):
        overrides = dict(overrides or {})
        self.args: Any
        own = {key: overrides.pop(key) for key in OWN_KEYS if key in overrides}
        changes = {k.removeprefix("kd."): overrides.pop(k) for k in [*overrides] if k.startswith("kd.")}
        if overrides.get("distill_model"):
            raise ConfigError(
                "distill_model= is Ultralytics' own distillation; write teacher= with kd=ultralytics instead."
            )
        check_torchvision()
        self.teacher: Teacher | None = None
        self.distiller: Distiller | None = None
        self.audit_rows: list[AuditRow] = []
        self._student_taps: dict[str, nn.Module] = {}
        self._detector: LoadedDetector | None = None
        self._batch_in_epoch = (-1, 0)  # epoch, batches seen in it
        self._own = own
        self.trust_checkpoints = bool(own.get("trust_checkpoints", False))
        self.plan: Plan | None = None
        if not overrides.get("resume"):
            self.plan, detector = make_plan(own, changes)
            self._detector = check_models(self.plan, detector, overrides, self.trust_checkpoints)
        if _is_cpu_bf16(overrides):
            check_cpu_bf16()
        with restricted_loading(self.trust_checkpoints):
            super().__init__(cfg, overrides, _callbacks)
        if self.plan is not None:
            self.args.kd = self.plan.to_dict()

    # ---------------------------------------------------------------------------------------------- resume

    def check_resume(self, overrides: dict) -> None:
        """Restore recipe and teacher from the checkpoint, and refuse a teacher that is not the same file."""
        resume = overrides.get("resume")
        if isinstance(resume, (str, Path)) and Path(resume).suffix == ".pt":
            checkpoint, _ = load_checkpoint_file(resume, role="resume", trust=self.trust_checkpoints)
            check_resumable(checkpoint, resume, alone=self._own.get("kd") == "none")
        super().check_resume(overrides)
        if not self.resume:
            return
        state = getattr(self.args, "kd", None)
        if state is None:
            return
        plan = Plan.from_dict(state)
        if self._own.get("teacher") is not None:
            plan = replace(plan, teacher=str(self._own["teacher"]))
        # what the file says of trust does not count: whoever made it must not decide what may run here
        self.plan = replace(plan, trust_checkpoints=self.trust_checkpoints)
        check_teacher_file(self.plan)

    # ---------------------------------------------------------------------------------------------- set-up

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
        """Hang the criterion on the student, as soon as the student is on its device."""
        super().set_model_attributes()
        if self.plan is None:
            return
        detector = self._detector or load_detector(
            self.plan.teacher,
            role="teacher",
            trust=self.trust_checkpoints,
            nc=self.data["nc"],
            channels=self.data["channels"],
        )
        self._detector = None
        student = unwrap_model(self.model)
        if self.plan.inherit and not self.resume:
            report = inherit(student, detector.model).report()
            if RANK in {-1, 0}:
                LOGGER.info(report)
        terms = self.plan.recipe.terms
        split = any(find(term.name).head_split for term in terms)
        layers = _names(term.teacher_layers for term in terms)
        self.teacher = Teacher(detector, self.device, self._teacher_dtype(), layers, split)
        self._student_taps = find_layers(student, _names(term.student_layers for term in terms), "student")
        teacher_taps = find_layers(detector.model, layers, "teacher")
        if split:
            self._student_taps |= head_split_points(student)
            teacher_taps |= head_split_points(detector.model)
        if self._student_taps and self.args.compile:
            raise ConfigError(
                "compile= cannot be combined with a recipe that reads layers inside the student "
                f"({', '.join([*self._student_taps][:3])}, ...). Add compile=False."
            )
        pair = pair_of(student, detector.model, self._student_taps, teacher_taps)
        self.distiller = Distiller(self.plan.recipe, pair).to(self.device).train()
        if split:
            self.distiller.attach_teacher_head(head_tails(self.teacher.model))
        if dist.is_initialized():
            for tensor in self.distiller.state_dict().values():  # ranks draw different random numbers
                if isinstance(tensor, torch.Tensor):
                    dist.broadcast(tensor, 0)
        student.criterion = DistillationCriterion(student, self.distiller, on_audit=self._log_audit)
        if RANK in {-1, 0}:
            origin = "random weights" if detector.random else f"sha256 {detector.sha256[:12]}"
            LOGGER.info(
                f"Distilling {', '.join(self.distiller.terms)} from {detector.path} ({origin}, frozen, "
                f"{str(self.teacher.dtype).removeprefix('torch.')})"
            )

    def _teacher_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.args.amp == "bf16" else torch.float32

    def _log_audit(self, rows: list[AuditRow]) -> None:
        self.audit_rows = rows
        if RANK in {-1, 0}:
            LOGGER.info(table(rows))

    def build_optimizer(self, model: nn.Module, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Put the adapters into the student's optimiser, and their state into its state dict.

        There they ride in every checkpoint that can be resumed, are restored by resume and by the recovery from NaN
        alike, and vanish when Ultralytics strips the optimiser from the finished file.
        """
        if self.distiller is None:
            return super().build_optimizer(model, *args, **kwargs)
        optimizer = super().build_optimizer(OptimizerScope(unwrap_model(model), self.distiller), *args, **kwargs)
        trained = {id(p) for p in self.distiller.trained_parameters()}
        elsewhere = {id(p) for p in self.distiller.parameters()} - trained
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if missing := [n for n, p in self.distiller.named_parameters() if id(p) in trained - held]:
            raise AuditError(
                f"adapter parameters {', '.join(missing[:3])} are not in the optimiser and would never be trained."
            )
        distiller = self.distiller

        def save(_optimizer: Any, state: dict) -> dict:
            return {**state, ADAPTER_STATE: _to_cpu(distiller.state_dict())}

        def load(_optimizer: Any, state: dict) -> dict:
            state = dict(state)
            if (adapters := state.pop(ADAPTER_STATE, None)) is not None:
                distiller.load_state_dict(adapters)
            return state

        optimizer.register_state_dict_post_hook(save)
        optimizer.register_load_state_dict_pre_hook(load)
        return optimizer

    def _setup_train(self) -> None:
        """Hang up the student's taps and write the resolved recipe, once everything else is set up."""
        super()._setup_train()
        self._tap_student()
        if self.plan is not None and RANK in {-1, 0}:
            (self.save_dir / "kd.yaml").write_text(
                yaml.safe_dump(self.plan.to_dict(), sort_keys=False), encoding="utf-8"
            )

    def resume_training(self, ckpt: dict | None) -> None:
        """Put the criterion back where Ultralytics replaced it (it does for end-to-end heads)."""
        super().resume_training(ckpt)
        if self.distiller is None:
            return
        student = unwrap_model(self.model)
        if not isinstance(student.criterion, DistillationCriterion):
            student.criterion = DistillationCriterion(
                student, self.distiller, native=student.criterion, on_audit=self._log_audit
            )

    def _tap_student(self) -> None:
        """Hang hooks on the student where the recipe reads more than its neck; never while it is copied or saved."""
        if self._student_taps:
            criterion = unwrap_model(self.model).criterion
            criterion.close()
            criterion.layers = LayerTap(self._student_taps)

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
        """Train, with every checkpoint load restricted."""
        with restricted_loading(self.trust_checkpoints):
            return super().train()

    def _do_train(self) -> None:
        """Train with bfloat16 autocast on the CPU where asked, which Ultralytics refuses, and clean up after."""
        try:
            with cpu_bf16_autocast() if _is_cpu_bf16(vars(self.args), self.device.type) else nullcontext():
                super()._do_train()
            if self.teacher is not None:
                self.teacher.verify_untouched()
        finally:
            self._detach()

    def _detach(self) -> None:
        """Leave a plain student and a teacher without hooks."""
        if self.teacher is not None:
            self.teacher.close()
        student = unwrap_model(self.model) if isinstance(self.model, nn.Module) else None
        if isinstance(getattr(student, "criterion", None), DistillationCriterion):
            student.criterion.close()  # type: ignore[union-attr]
            student.criterion = None  # type: ignore[union-attr]

    def preprocess_batch(self, batch: dict) -> dict:
        """Let the teacher see the batch as the student will: on the device, after multi-scale."""
        batch = super().preprocess_batch(batch)
        if self.teacher is None or self.optimizer is None:  # without an optimiser this is a calibration pass
            return batch
        batch[TEACHER_VIEW] = self.teacher(batch["img"])
        epoch, seen = self._batch_in_epoch
        seen = seen + 1 if epoch == self.epoch else 0
        self._batch_in_epoch = (self.epoch, seen)
        criterion = unwrap_model(self.model).criterion
        criterion.progress = min((self.epoch + seen / max(len(self.train_loader), 1)) / max(self.epochs, 1), 1.0)
        criterion.close_mosaic = 1 - self.args.close_mosaic / max(self.epochs, 1) if self.args.close_mosaic else 1.0
        return batch

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
        nn.utils.clip_grad_norm_([*self.model.parameters(), *adapters], max_norm=10.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.model)
        self.distiller.after_step()
        return None

    # ---------------------------------------------------------------------------------------------- what is left

    def label_loss_items(self, loss_items: Any = None, prefix: str = "train") -> Any:
        """Leave the terms out of validation columns, where nothing is distilled and they could only be zero."""
        labelled = super().label_loss_items(loss_items, prefix)
        if prefix != "val" or self.distiller is None:
            return labelled
        columns = (*self.distiller.columns, *self.distiller.weight_columns.values())
        own = {f"{prefix}/{column}" for column in columns}
        return (
            [k for k in labelled if k not in own]
            if isinstance(labelled, list)
            else {k: v for k, v in labelled.items() if k not in own}
        )

    def final_eval(self) -> None:
        """Evaluate as Ultralytics does, then note in the finished files how they were made."""
        super().final_eval()
        if self.plan is None or RANK not in {-1, 0}:
            return
        provenance = {**self.plan.to_dict(), "audit": [vars(row) for row in self.audit_rows]}
        for file in (self.last, self.best):
            if file.exists():
                checkpoint = torch.load(file, map_location="cpu", weights_only=False)  # written by this very process
                torch.save({**checkpoint, "yolo_kd": provenance}, file)


@contextmanager
def cpu_bf16_autocast() -> Iterator[None]:
    """Replace the trainer module's autocast by one that allows bfloat16 on a CPU, for the duration.

    Ultralytics' own raises there, although processors with AMX or AVX512-BF16 train two to three times faster with it.
    """
    original = engine.autocast

    def autocast(enabled: Any, device: str = "cuda") -> Any:
        if enabled is torch.bfloat16 and device == "cpu":
            return torch.autocast("cpu", dtype=torch.bfloat16)
        return original(enabled, device=device)

    engine.autocast = autocast
    try:
        yield
    finally:
        engine.autocast = original


def _is_cpu_bf16(args: Mapping[str, Any], device: str | None = None) -> bool:
    """Return whether bfloat16 training on the CPU was asked for."""
    if str(args.get("amp", "")).lower() != "bf16":
        return False
    on_cpu = str(args.get("device") or "").strip().lower() == "cpu" or not torch.cuda.is_available()
    return device == "cpu" if device is not None else on_cpu


def _names(groups: Iterable[Sequence[str]]) -> list[str]:
    """Return all names once, in order."""
    return list(dict.fromkeys(name for group in groups for name in group))


def _to_cpu(state: Any) -> Any:
    """Copy a state dict to the CPU, so that it outlives the modules it came from."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {k: _to_cpu(v) for k, v in state.items()}
    return state
