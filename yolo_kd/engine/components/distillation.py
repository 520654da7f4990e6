"""Distillation in a trainer: attaches the criterion, begins each step, and verifies the teacher at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
import yaml
from torch import distributed, nn
from ultralytics.utils import LOGGER, RANK
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.config.recipe import THINNED
from yolo_kd.config.speed import AUTO, Speed
from yolo_kd.distillation.adapter_state import check_trained, to_cpu
from yolo_kd.distillation.criterion import DistillationCriterion
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.distillation.memory_probe import MemoryProbe
from yolo_kd.distillation.student_init import Inheritance, inherit, thin
from yolo_kd.distillation.sub_batches import is_unlabeled_column
from yolo_kd.engine.class_resolution import match_classes
from yolo_kd.engine.component import Component
from yolo_kd.engine.plan import Plan
from yolo_kd.engine.run_files import write_atomically
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.checkpoint import LoadedDetector


class DistillationComponent(Component):
    """Attaches a `Distillation` to the student for the duration of a training.

    Args:
        trainer: The host.
        plan: The plan of the distillation.
        teacher: The loaded teacher.

    Attributes:
        plan: The plan; it gets the class map when the student exists.
        distillation: The step, None before the student is on its device.
        inheritance: The student initialisation, None if there was none.
    """

    state_key = "yolo_kd"

    def __init__(self, trainer: Any, plan: Plan, teacher: LoadedDetector):
        super().__init__(trainer)
        self.plan = plan
        self.distillation: Distillation | None = None
        self.inheritance: Inheritance | None = None
        self._teacher: LoadedDetector | None = teacher  # until the distillation has a copy
        self._data: Mapping[str, Any] = {}
        self._student_has_weights = False
        self._batches = (-1, 0)  # epoch, and number of its batches so far
        self._speed_recorded = False

    # ------------------------------------------------------------------------------------------------ set-up

    def get_dataset(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Keep the data set with the classes of its label files."""
        self._data = data = proceed()
        return data

    def get_model(self, proceed: Callable[..., nn.Module], cfg: Any, weights: Any, verbose: bool) -> nn.Module:
        """Record whether the student has trained weights."""
        self._student_has_weights = weights is not None
        return proceed(cfg, weights, verbose)

    def set_model_attributes(self, proceed: Callable[[], None]) -> None:
        """Attach the criterion to the student as soon as it is on its device."""
        proceed()
        trainer, plan, teacher = self.trainer, self.plan, self._teacher
        assert teacher is not None
        classes, _ = match_classes(plan.choice, plan.recipe, teacher, self._data, vars(trainer.args))
        self.plan = plan = replace(plan, classes=classes)
        trainer.args.kd = {**trainer.args.kd, "classes": classes.to_dict()}
        student = unwrap_model(trainer.model)
        self._initialise(student, teacher, classes.is_identity)
        self._check_compile()
        speed = self._speed()
        keys = {"classes": classes, "device": trainer.device, "speed": speed, "unlabeled": plan.unlabeled}
        self.distillation = distillation = Distillation.build(student, teacher, plan.recipe, **keys)
        self._teacher = None
        distillation.log = _log
        distillation.guard = FiniteGuard(distillation.parameters())
        student.criterion = DistillationCriterion(distillation)
        _log(classes.table())
        origin = "random weights" if teacher.random else f"sha256 {teacher.sha256[:12]}"
        _log(f"Distilling {', '.join(distillation.distiller.terms)} from {teacher.path} ({origin}, frozen)")

    def _speed(self) -> Speed:
        """Return how the teacher runs; with automatic compilation, it is compiled if the student is."""
        speed, trainer = self.plan.speed, self.trainer
        if speed.teacher_compile != AUTO:
            return speed
        return replace(speed, teacher_compile=bool(trainer.args.compile) and trainer.device.type == "cuda")

    def _check_compile(self) -> None:
        recipe = self.plan.recipe
        if self.trainer.args.compile and (recipe.student_layers or recipe.head_split):
            names = ", ".join([*recipe.student_layers, *["layers of the head"] * recipe.head_split][:3])
            text = f"compile= is not compatible with a recipe that reads layers inside the student ({names})."
            raise ConfigError(f"{text} Add compile=False.")

    def _initialise(self, student: nn.Module, teacher: LoadedDetector, same_classes: bool) -> None:
        """Initialise the student if the user requests it, or if the recipe does and the student has no weights."""
        plan = self.plan
        how, asked = plan.inherit, plan.inherit is not None
        if not asked:
            free = not self._student_has_weights and not teacher.random and not plan.choice.keep_classes
            how = free and plan.recipe.inherit
        if not how or self.trainer.resume:
            return
        if how == THINNED:
            self.inheritance = thin(student, teacher.model, same_classes, least=0.0 if asked else 0.5)
        else:
            self.inheritance = inherit(student, teacher.model, same_classes)
        why = (
            f"\n  kd={plan.recipe.name} initialises students without weights this way; inherit=false leaves them random"
        )
        _log(f"{self.inheritance.report()}{'' if asked else why}")

    def trained_module(self) -> nn.Module | None:
        """Return the adapters and the modules of the losses."""
        return None if self.distillation is None else self.distillation.distiller

    def build_optimizer(self, proceed: Callable[[], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        """Check that the optimiser trains every adapter, and remove what a loss trains itself."""
        optimizer = proceed()
        if self.distillation is not None:
            check_trained(optimizer, self.distillation.distiller)
        return optimizer

    def setup_train(self, proceed: Callable[[], None]) -> None:
        """Write the plan into the run's folder."""
        proceed()
        if RANK in {-1, 0}:
            record = yaml.safe_dump(self.plan.to_dict(), sort_keys=False)
            write_atomically(self.trainer.save_dir / "kd.yaml", record.encode())

    def resume_training(self, proceed: Callable[[dict | None], None], checkpoint: dict | None) -> None:
        """Attach the criterion again if Ultralytics replaced it, as it does for end-to-end heads."""
        proceed(checkpoint)
        student: Any = unwrap_model(self.trainer.model)
        if self.distillation is not None and not isinstance(student.criterion, DistillationCriterion):
            self.distillation.task_loss = student.criterion
            student.criterion = DistillationCriterion(self.distillation)

    def load_checkpoint_state(self, proceed: Callable[[dict], None], checkpoint: dict) -> None:
        """Remove the hooks first, since restoring copies the student; the next step adds them again."""
        if self.distillation is not None:
            self.distillation.detach()
        proceed(checkpoint)

    def auto_batch(self, proceed: Callable[[], int]) -> int:
        """Measure the whole step: student, teacher, adapters and terms."""
        if self.distillation is None:
            return proceed()
        trainer = self.trainer
        student, trainer.model = trainer.model, MemoryProbe(self.distillation.rehearsal())
        try:
            return proceed()
        finally:
            trainer.model = student

    def build_train_pipeline(self, proceed: Callable[[], None]) -> None:
        """Restart the epoch's progress when Ultralytics halves the batch after running out of memory."""
        proceed()
        self._batches = (-1, 0)
        if self.distillation is not None:
            self.distillation.forget()

    def get_validator(self, proceed: Callable[[], Any]) -> Any:
        """Pass only Ultralytics' keys to the validator, which checks every key."""
        record = self.trainer.args.kd
        del self.trainer.args.kd
        try:
            return proceed()
        finally:
            self.trainer.args.kd = record

    # ------------------------------------------------------------------------------------------------ the step

    def preprocess_batch(self, proceed: Callable[[dict], dict], batch: dict) -> dict:
        """Start the teacher on the batch of the student."""
        batch = proceed(batch)
        trainer, distillation = self.trainer, self.distillation
        if distillation is None or trainer.optimizer is None:  # without an optimiser this is a calibration pass
            return batch
        assert distillation.guard is not None
        distillation.guard.check(self._weights, self._recoverable)
        distillation.begin(batch)
        if not self._speed_recorded:
            self._record_speed(distillation)
        epoch, count = self._batches
        count = count + 1 if epoch == trainer.epoch else trainer.skipped
        self._batches = (trainer.epoch, count)
        epochs = max(trainer.epochs, 1)
        progress = min((trainer.epoch + count / max(len(trainer.train_loader), 1)) / epochs, 1.0)
        unwrap_model(trainer.model).criterion.progress = progress
        distillation.close_mosaic = 1 - trainer.args.close_mosaic / epochs if trainer.args.close_mosaic else 1.0
        return batch

    def _record_speed(self, distillation: Distillation) -> None:
        """Record how the teacher runs, so that a resumed run continues the same way."""
        way = distillation.teacher.runner.way
        speed = replace(self.plan.speed, teacher_precision=way.precision, teacher_channels_last=way.channels_last)
        self.trainer.args.kd = {**self.trainer.args.kd, "speed": speed.to_keys()}
        self._speed_recorded = True

    def optimizer_step(self, proceed: Callable[[], None]) -> None:
        """Step student and adapters with one limit for their gradient norm, as Ultralytics does with its projector."""
        trainer, distillation = self.trainer, self.distillation
        if distillation is None:
            return proceed()
        adapters = distillation.parameters()
        if RANK != -1 and trainer.world_size > 1:
            for p in adapters:  # the distributed wrapper holds the student only
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                distributed.all_reduce(p.grad)
                p.grad /= trainer.world_size
        trainer.scaler.unscale_(trainer.optimizer)
        stepped = [*trainer.model.parameters(), *adapters]
        norm = nn.utils.clip_grad_norm_(stepped, max_norm=10.0)
        assert distillation.guard is not None
        if not distillation.guard.allows_step(norm, stepped, trainer.scaler.is_enabled()):
            return trainer.optimizer.zero_grad()
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.optimizer.zero_grad()
        if trainer.ema:
            trainer.ema.update(trainer.model)
        distillation.after_step()
        return None

    def handle_nan_recovery(self, proceed: Callable[[int], bool], epoch: int) -> bool:
        """Report the skipped batches, and let Ultralytics return to `last.pt` if weights are not finite.

        Ultralytics checks the loss of the last batch, which the guard has made finite.
        """
        trainer, distillation = self.trainer, self.distillation
        if distillation is not None and distillation.guard is not None:
            report, broken = distillation.guard.end_epoch(epoch, self._weights, self._recoverable)
            if report:
                LOGGER.warning(report)
            if broken:
                trainer.loss = torch.full_like(trainer.loss, float("nan"))
        self._batches = (-1, 0)  # the epoch may be repeated
        return proceed(epoch)

    def _weights(self) -> dict[str, torch.Tensor]:
        """Return the state of student and adapters."""
        adapters = {} if self.distillation is None else self.distillation.state_dict()
        return {**unwrap_model(self.trainer.model).state_dict(), **adapters}

    @property
    def _recoverable(self) -> bool:
        """Whether Ultralytics can return to `last.pt`, which it can after the first epoch."""
        return self.trainer.epoch > self.trainer.start_epoch and self.trainer.last.exists()

    # ------------------------------------------------------------------------------------------------ the end

    def do_train(self, proceed: Callable[[], None]) -> None:
        """Verify the teacher at the end, and leave a plain student in any case."""
        try:
            proceed()
            if self.distillation is not None:
                self.distillation.teacher.verify_untouched()
                if self.distillation.guard is not None and (summary := self.distillation.guard.summary()):
                    LOGGER.warning(summary)
        finally:
            self.close()

    def close(self) -> None:
        """Leave a plain student and a teacher without hooks."""
        if self.distillation is not None:
            self.distillation.close()
        model = self.trainer.model
        student: Any = unwrap_model(model) if isinstance(model, nn.Module) else None
        if isinstance(getattr(student, "criterion", None), DistillationCriterion):
            student.criterion = None

    def label_loss_items(self, proceed: Callable[..., Any], loss_items: Any, prefix: str) -> Any:
        """Remove terms from validation columns, where they are always zero."""
        items = proceed(loss_items, prefix)
        if prefix != "val" or self.distillation is None:
            return items
        distiller = self.distillation.distiller
        columns = {f"{prefix}/{c}" for c in (*distiller.columns, *distiller.weight_columns.values())}
        kept = [key for key in items if key not in columns and not is_unlabeled_column(key.removeprefix(f"{prefix}/"))]
        return kept if isinstance(items, list) else {key: items[key] for key in kept}

    def provenance(self, proceed: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Record the plan and the audit in the finished files."""
        entries = proceed()
        distillation = self.distillation
        audit = [vars(row) for row in distillation.audit_rows] if distillation else []
        skipped = distillation.guard.skipped if distillation and distillation.guard else 0
        return {**entries, "yolo_kd": {**self.plan.to_dict(), "audit": audit, "skipped_batches": skipped}}

    # ------------------------------------------------------------------------------------------------ state

    def state_dict(self) -> Any:
        """Return the state of adapters, losses and automatic weights."""
        assert self.distillation is not None
        return to_cpu(self.distillation.state_dict())

    def load_state_dict(self, state: Any) -> None:
        """Restore adapters, losses and automatic weights."""
        assert self.distillation is not None
        self.distillation.load_state_dict(state)


def _log(text: str) -> None:
    """Log in one process only."""
    if RANK in {-1, 0}:
        LOGGER.info(text)
