"""The object that hangs on the student in place of its loss: native loss plus distillation."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from yolo_kd.distillation.audit import AuditRow, audit, balance
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.structures import DetectorOutputs, LossInputs, tensors_of
from yolo_kd.upstream.recorders import AssignmentRecorder, LayerRecorder, outputs_of
from yolo_kd.upstream.task_loss import targets_of

TEACHER_OUTPUTS = "teacher_view"  # key under which the teacher's view rides in the batch


class Shield(Protocol):
    """What hides old classes from the native loss where the labels must not deny them."""

    def shield(self, predictions: Any, teacher_logits: Tensor) -> Any:
        """Return the predictions as the native loss is to see them."""


class DistillationCriterion:
    """Native detection loss, followed by the recipe's terms.

    It is no `nn.Module`, it deep-copies to None and pickles to None. So the EMA copy of the student builds its own
    native loss, and a checkpoint written at any moment holds a plain student and nothing of this.

    Args:
        student: The detector that it hangs on.
        distiller: Terms and adapters.
        native: The student's own loss; built on first use when None, since class weights are set late.
        on_audit: Called once, with the rows of the audit of the first batch that has what the terms read.
        guard: Keeps batches with NaN or infinity out of the weights; without one they are let in.
    """

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller,
        native: Any = None,
        on_audit: Callable[[list[AuditRow]], None] | None = None,
        guard: FiniteGuard | None = None,
    ):
        self._student = student
        self._distiller = distiller
        self._native = native
        self._tap: AssignmentRecorder | None = None
        self._on_audit = on_audit
        self._guard = guard
        self.layers: LayerRecorder | None = None  # student layers besides the neck; hung up while training only
        self.kept: Shield | None = None  # old classes that the labels must not deny
        self.whole_graph = False  # every output is to take part in the loss, also where a batch has no objects
        self.progress = 0.0
        self.close_mosaic = 1.0

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    @property
    def native(self) -> Any:
        """The student's own loss."""
        if self._native is None:
            self._native = self._student.init_criterion()  # type: ignore[operator]
        if self._tap is None and "assignment" in self._distiller.reads:
            self._tap = AssignmentRecorder(self._native)
        return self._native

    def update(self) -> None:
        """Forward Ultralytics' end-of-epoch call, which moves end-to-end heads from one branch to the other."""
        if hasattr(self.native, "update"):
            self.native.update()

    def __call__(self, predictions: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss vector, times the batch size as Ultralytics wants it, and the logged items, per image."""
        loss, items = self.native(self.shielded(predictions, batch), batch)
        if self.whole_graph:
            loss = touch(loss, predictions)
        teacher = batch[TEACHER_OUTPUTS]
        teacher = teacher if isinstance(teacher, DetectorOutputs) else teacher.take()  # it may have a stream of its own
        layers = self.layers.take() if self.layers else {}
        student = outputs_of(predictions, self._student, layers)
        reads = self._distiller.reads
        targets = None
        if reads & {"targets", "assignment"}:
            targets = targets_of(batch, self._tap.take() if self._tap else None)
        steps = self._distiller.steps(student, teacher, targets, self.progress)
        batch_size = student.scores.shape[0]
        self._look(loss.sum() / batch_size, student, steps)
        terms = self._distiller(steps, self.close_mosaic)
        # native terms come multiplied by the batch size, logged items do not: this is the one place of that factor
        vector = torch.cat([loss, torch.stack(list(terms.values())).to(loss.dtype) * batch_size])
        items = {**items, **{name: value.detach() for name, value in terms.items()}}
        if self._guard is not None and vector.requires_grad:
            vector, items = self._guard.screen(vector, items, tensors_of([predictions, layers]), teacher)
        return vector, {**items, **self._distiller.weights()}

    def shielded(self, predictions: Any, batch: Mapping[str, Any]) -> Any:
        """Return the predictions as the native loss is to see them: without old classes that the teacher sees."""
        if self.kept is None:
            return predictions
        teacher = batch[TEACHER_OUTPUTS]
        teacher = teacher if isinstance(teacher, DetectorOutputs) else teacher.take()
        return self.kept.shield(predictions, teacher.scores)

    def _look(self, task_loss: Tensor, student: DetectorOutputs, steps: Mapping[str, LossInputs]) -> None:
        """Let weights that set themselves follow, and audit the first batch that can be audited."""
        distiller = self._distiller
        if distiller.auto is not None and torch.is_grad_enabled() and distiller.auto.tick():
            balance(task_loss, student, distiller, steps, self.close_mosaic)
        # a term that acts near objects has nothing to show on a batch without any: then the next batch is audited
        objects = next(iter(steps.values())).targets  # of the classes that both models have
        silent = objects is not None and not len(objects.boxes)
        if self._on_audit is not None and torch.is_grad_enabled() and not silent and task_loss.isfinite():
            self._on_audit(audit(task_loss, student, distiller, steps))
            self._on_audit = None

    def forget(self) -> None:
        """Let go of what an interrupted step left in the taps."""
        if self.layers is not None:
            self.layers.take()
        if self._tap is not None:
            self._tap.take()

    def close(self) -> None:
        """Take all taps off."""
        if self.layers is not None:
            self.layers.remove()
            self.layers = None
        if self._tap is not None:
            self._tap.remove()
            self._tap = None


def touch(loss: Tensor, predictions: Any) -> Tensor:
    """Return the loss with every output in its graph, which it is not where a batch without objects has no box loss.

    Args:
        loss: Any shape.
        predictions: Nested outputs of the student; they add zero.
    """
    return loss + torch.stack([t.sum() * 0 for t in tensors_of(predictions) if t.requires_grad]).sum().to(loss.dtype)
