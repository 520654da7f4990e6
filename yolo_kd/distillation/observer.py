"""One batch as both models see it: the task loss, the outputs, and what each term reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.sub_batches import NEEDS_BOXES, Shield, SubBatch, UnlabeledReader
from yolo_kd.distillation.teacher_runner import Pending
from yolo_kd.structures import Assignment, DetectorOutputs, tensors_of
from yolo_kd.unlabeled.dataset import UNLABELED_MARK, unlabeled_count
from yolo_kd.upstream.heads import find_layers
from yolo_kd.upstream.recorders import AssignmentRecorder, LayerRecorder, outputs_of
from yolo_kd.upstream.task_loss import cut, loss_names_of, part_of, targets_of

TEACHER_OUTPUTS = "teacher_outputs"
"""Key of a batch under which the teacher's outputs travel."""


@dataclass
class Observation:
    """One batch as both models see it; computed once, and read by the loss, the audit and `yolo-kd check`.

    Attributes:
        images: Number of images, B.
        student: The student's outputs, with gradient, all classes.
        teacher: The teacher's outputs, without gradient, all classes.
        task_loss: The task loss vector times B, as the mean over the images that have one.
        sub_batches: The labeled images, the unlabeled images, or both.
        tensors: The tensors through which a loss reaches the student.
        unlabeled: The teacher's outputs on unlabeled images for the matched classes; None without `unlabeled=`.
    """

    images: int
    student: DetectorOutputs
    teacher: DetectorOutputs
    task_loss: Tensor
    sub_batches: list[SubBatch]
    tensors: list[Tensor]
    unlabeled: DetectorOutputs | None = None

    @property
    def acting(self) -> list[SubBatch]:
        """The sub-batches on which the terms act, labeled images first."""
        return [s for s in self.sub_batches if s.inputs]

    def task_loss_per_image(self, sub_batch: SubBatch) -> Tensor:
        """Return the task loss of a sub-batch per image, a scalar; zero where it has none."""
        if sub_batch.task_loss is None:
            return self.task_loss.new_zeros(())
        return sub_batch.task_loss.sum() / sub_batch.images


class Observer:
    """Reads a batch after the student's forward pass.

    It owns the hooks on the student and on its task loss. They exist from `hook` to `detach`, so that the student is
    plain whenever it is copied or saved.

    Args:
        student: The student.
        distiller: Terms and adapters.
        unlabeled: How unlabeled images are used, None without.

    Attributes:
        shield: Hides classes from the task loss where the labels must not deny them, None without.
        unlabeled: The reader of unlabeled images, None without.
    """

    def __init__(self, student: Any, distiller: Distiller, unlabeled: UnlabeledOptions | None):
        self.shield: Shield | None = None
        self.unlabeled: UnlabeledReader | None = None
        if unlabeled is not None:
            self.unlabeled = UnlabeledReader(unlabeled, distiller.classes, distiller.reads)
        self._student = student
        self._distiller = distiller
        self._task_loss: Any = None
        self._assignment: AssignmentRecorder | None = None
        self._layers: LayerRecorder | None = None

    @property
    def task_loss(self) -> Any:
        """The student's task loss; built on first use, since Ultralytics sets class weights late."""
        if self._task_loss is None:
            self._task_loss = self._student.init_criterion()
        if self._assignment is None and "assignment" in self._distiller.reads:
            self._assignment = AssignmentRecorder(self._task_loss)
        return self._task_loss

    @task_loss.setter
    def task_loss(self, task_loss: Any) -> None:
        self.detach()
        self._task_loss = task_loss

    def hook(self) -> None:
        """Record the student's layers that the recipe reads besides its neck, whose features the head returns."""
        distiller = self._distiller
        if self._layers is None and (distiller.student_layers or distiller.head_split):
            layers = find_layers(self._student, distiller.student_layers, "student", distiller.head_split)
            self._layers = LayerRecorder(layers)

    def forget(self) -> None:
        """Drop what an interrupted step left in the recorders."""
        for recorder in (self._layers, self._assignment):
            if recorder is not None:
                recorder.take()

    def detach(self) -> None:
        """Remove the hooks from the student and its task loss."""
        for recorder in (self._layers, self._assignment):
            if recorder is not None:
                recorder.remove()
        self._layers = self._assignment = None

    def observe(self, predictions: Any, batch: Mapping[str, Any]) -> Observation:
        """Compute the task loss and what each term reads.

        The student sees a batch at once, and its outputs are cut into labeled and unlabeled images. The task loss is
        computed for each of them alone, so that neither is in a normaliser of the other.

        Args:
            predictions: The student's raw outputs.
            batch: The batch, with the teacher's outputs.
        """
        images = len(batch["img"])
        labeled = images - unlabeled_count(batch.get(UNLABELED_MARK, ()))
        layers = self._layers.take() if self._layers else {}
        mixed = labeled < images
        # going back through one cut is one pass; slices would each fill a whole batch with zeros
        raw = cut(predictions, labeled) if mixed else (predictions, None)
        cut_layers = cut(layers, labeled) if mixed else (layers, {})
        # the labels of a batch are those of its labeled images
        own = {**batch, "img": batch["img"][:labeled]} if mixed else batch
        sub_batches, assignment = [], None
        if labeled:
            loss, items = self.task_loss(self._shielded(predictions, raw[0], batch, labeled), own)
            assignment = self._taken_assignment()
            sub_batches.append(SubBatch(labeled, loss, items))
        teacher = taken(batch[TEACHER_OUTPUTS])  # after the task loss: until here the teacher may still run
        student = outputs_of(predictions, self._student, layers)
        if labeled:
            shown = outputs_of(raw[0], self._student, cut_layers[0]) if mixed else student
            targets = targets_of(own, assignment) if self._reads_boxes else None
            guide = teacher.part(slice(0, labeled)) if mixed else teacher
            sub_batches[0].inputs = self._distiller.inputs(shown, guide, targets)
        others = self.unlabeled.matched(teacher.part(slice(labeled, images))) if self.unlabeled else None
        if mixed:
            shown = outputs_of(raw[1], self._student, cut_layers[1])
            guide = teacher.part(slice(labeled, images))
            sub_batches.append(self._observe_unlabeled(raw[1], batch["img"][labeled:], shown, guide, labeled > 0))
        task_loss = self._combined(sub_batches, student, images)
        return Observation(
            images, student, teacher, task_loss, sub_batches, [*tensors_of([predictions, layers])], others
        )

    def _observe_unlabeled(
        self, raw: Any, images: Tensor, student: DetectorOutputs, teacher: DetectorOutputs, continues: bool
    ) -> SubBatch:
        """Return the contribution of the last images of a batch, which have no labels."""
        assert self.unlabeled is not None
        chosen: Collection[int] | None = getattr(self._student.args, "classes", None)
        matched = self.unlabeled.matched(teacher)
        sub_batch, labels = self.unlabeled.read(self.task_loss, raw, images, matched, chosen)
        assignment = self._taken_assignment()
        if self.unlabeled.options.distils:
            targets = None if labels is None else targets_of(labels, assignment)
            sub_batch.inputs = self._distiller.inputs(student, teacher, targets, continues)
        return sub_batch

    @property
    def _reads_boxes(self) -> bool:
        return bool(self._distiller.reads & NEEDS_BOXES)

    def _taken_assignment(self) -> Assignment | None:
        return self._assignment.take() if self._assignment else None

    def _shielded(self, predictions: Any, labeled: Any, batch: Mapping[str, Any], count: int) -> Any:
        """Return the labeled images' raw outputs as the task loss is to read them."""
        if self.shield is None:
            return labeled
        shielded = self.shield.shield(predictions, taken(batch[TEACHER_OUTPUTS]).scores)
        return shielded if labeled is predictions else part_of(shielded, slice(0, count))

    def _combined(self, sub_batches: list[SubBatch], student: DetectorOutputs, images: int) -> Tensor:
        """Return the task loss times the batch size, as the mean over the images that have one."""
        losses = [(s.images, s.task_loss) for s in sub_batches if s.task_loss is not None]
        if not losses:
            return student.scores.new_zeros(len(loss_names_of(self.task_loss)), dtype=torch.float32)
        if len(losses) == 1 and losses[0][0] == images:
            return losses[0][1]
        total = torch.stack([loss for _, loss in losses]).sum(0)
        return total * (images / sum(n for n, _ in losses))


def taken(outputs: DetectorOutputs | Pending) -> DetectorOutputs:
    """Return the teacher's outputs, ready for use on the current stream."""
    return outputs if isinstance(outputs, DetectorOutputs) else outputs.take()
