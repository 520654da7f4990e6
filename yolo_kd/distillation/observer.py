"""Observes one batch: the task loss, the outputs of both models, and the inputs of each term."""

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
    """The results of both models on one batch, which the loss, the audit and `yolo-kd check` read.

    Attributes:
        images: Number of images, B.
        student: The student's outputs, with gradient, all classes.
        teacher: The teacher's outputs, without gradient, all classes.
        task_loss: The task loss vector times B: its mean over the images that have a task loss.
        sub_batches: The labeled images, the unlabeled images, or both.
        tensors: The tensors through which gradients reach the student.
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
        """Return the task loss of a sub-batch per image, a scalar; zero if it has none."""
        if sub_batch.task_loss is None:
            return self.task_loss.new_zeros(())
        return sub_batch.task_loss.sum() / sub_batch.images


class Observer:
    """Reads a batch after the student's forward pass.

    It owns the hooks on the student and on its task loss. These exist from `hook` to `detach`, so that the student has
    none when it is copied or saved.

    Args:
        student: The student.
        distiller: Terms and adapters.
        unlabeled: How unlabeled images are used, None without.

    Attributes:
        shield: Hides classes that the labels may lack from the task loss, None without.
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
        """Record the student's layers that the recipe reads, except the neck, whose features the head returns."""
        distiller = self._distiller
        if self._layers is None and (distiller.student_layers or distiller.head_split):
            layers = find_layers(self._student, distiller.student_layers, "student", distiller.head_split)
            self._layers = LayerRecorder(layers)

    def forget(self) -> None:
        """Discard the records of an interrupted step."""
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
        """Compute the task loss and the inputs of each term.

        The student runs on the whole batch, and its outputs are split into labeled and unlabeled images. The task
        loss is computed for each separately, so that neither changes a normaliser of the other.

        Args:
            predictions: The student's raw outputs.
            batch: The batch, with the teacher's outputs.
        """
        images = len(batch["img"])
        labeled = images - unlabeled_count(batch.get(UNLABELED_MARK, ()))
        layers = self._layers.take() if self._layers else {}
        mixed = labeled < images
        # one cut has one backward pass; slices would each fill a whole batch with zeros
        raw = cut(predictions, labeled) if mixed else (predictions, None)
        cut_layers = cut(layers, labeled) if mixed else (layers, {})
        # a batch has labels for its labeled images only
        labels = {**batch, "img": batch["img"][:labeled]} if mixed else batch
        sub_batches, assignment = [], None
        if labeled:
            loss, items = self.task_loss(self._shielded(predictions, raw[0], batch, labeled), labels)
            assignment = self._taken_assignment()
            sub_batches.append(SubBatch(labeled, loss, items))
        teacher = taken(batch[TEACHER_OUTPUTS])  # after the task loss, because the teacher may still be running
        student = outputs_of(predictions, self._student, layers)
        if labeled:
            first = outputs_of(raw[0], self._student, cut_layers[0]) if mixed else student
            targets = targets_of(labels, assignment) if self._distiller.reads & NEEDS_BOXES else None
            guide = teacher.part(slice(0, labeled)) if mixed else teacher
            sub_batches[0].inputs = self._distiller.inputs(first, guide, targets)
        rest = teacher.part(slice(labeled, images))
        matched = self.unlabeled.matched(rest) if self.unlabeled else None
        if mixed:
            last = outputs_of(raw[1], self._student, cut_layers[1])
            sub_batches.append(self._observe_unlabeled(raw[1], batch["img"][labeled:], last, rest, labeled > 0))
        task_loss = self._combined(sub_batches, student, images)
        tensors = [*tensors_of([predictions, layers])]
        return Observation(images, student, teacher, task_loss, sub_batches, tensors, matched)

    def _observe_unlabeled(
        self, raw: Any, images: Tensor, student: DetectorOutputs, teacher: DetectorOutputs, continues: bool
    ) -> SubBatch:
        """Return the contribution of the unlabeled images, the last of a batch."""
        assert self.unlabeled is not None
        chosen: Collection[int] | None = getattr(self._student.args, "classes", None)
        matched = self.unlabeled.matched(teacher)
        sub_batch, labels = self.unlabeled.read(self.task_loss, raw, images, matched, chosen)
        assignment = self._taken_assignment()
        if self.unlabeled.options.distils:
            targets = None if labels is None else targets_of(labels, assignment)
            sub_batch.inputs = self._distiller.inputs(student, teacher, targets, continues)
        return sub_batch

    def _taken_assignment(self) -> Assignment | None:
        return self._assignment.take() if self._assignment else None

    def _shielded(self, predictions: Any, labeled: Any, batch: Mapping[str, Any], count: int) -> Any:
        """Return the raw outputs on labeled images for the task loss."""
        if self.shield is None:
            return labeled
        shielded = self.shield.shield(predictions, taken(batch[TEACHER_OUTPUTS]).scores)
        return shielded if labeled is predictions else part_of(shielded, slice(0, count))

    def _combined(self, sub_batches: list[SubBatch], student: DetectorOutputs, images: int) -> Tensor:
        """Return the task loss times the batch size: its mean over the images that have one."""
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
