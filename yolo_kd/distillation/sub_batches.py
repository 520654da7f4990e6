"""The contributions of labeled and of unlabeled images to the loss."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.structures import DetectorOutputs, LossInputs
from yolo_kd.unlabeled.pseudo_labels import Detections, detect, labels_of, pseudo_labels
from yolo_kd.upstream.task_loss import loss_names_of, weighted_by, without_classes

CONFIDENCE, EMPTY = "pool_obj", "pool_none"
"""Columns: mean of the largest class probability on unlabeled images, and share of images without a detection."""
NEEDS_BOXES = frozenset({"targets", "assignment"})


class Shield(Protocol):
    """Hides classes that the labels may lack from the task loss."""

    def shield(self, predictions: Any, teacher_logits: Tensor) -> Any:
        """Return the predictions for the task loss."""


@dataclass
class SubBatch:
    """The contribution of the labeled or the unlabeled images of a batch.

    Attributes:
        images: Number of images, above 0.
        task_loss: The task loss times that number, a vector; None if these images have none.
        items: The logged items of the task loss, per image.
        inputs: The inputs of each term by name, empty if the terms do not act on these images.
        columns: The weighted terms per image, by column; empty before they are computed.
        unlabeled: Whether the images have no labels.
    """

    images: int
    task_loss: Tensor | None = None
    items: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, LossInputs] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    unlabeled: bool = False


def teacher_reads(options: UnlabeledOptions | None, reads: Collection[str]) -> frozenset[str]:
    """Return the outputs that the teacher's head must compute if the terms read `reads`."""
    detects = options is not None and needs_detections(options, reads)
    return frozenset(reads) | ({"scores", "boxes"} if detects else set())


def needs_detections(options: UnlabeledOptions, reads: Collection[str]) -> bool:
    """Return whether the task loss or a term uses the teacher's detections on unlabeled images."""
    return options.labels or bool(NEEDS_BOXES & {*reads})


def as_student(found: Detections, classes: ClassMap | None, chosen: Collection[int] | None) -> Detections:
    """Return detections of matched classes with the student's class indices.

    Args:
        found: Detections with indices of matched classes.
        classes: The class map, None if all classes are the same.
        chosen: The classes in `classes=`, None for all.
    """
    if classes is not None:
        found = replace(found, labels=classes.student_labels(found.labels))
    if chosen is None:
        return found
    return found.where(torch.isin(found.labels, torch.as_tensor(chosen, device=found.labels.device)))


def pseudo_labeled(
    task_loss: Any, predictions: Any, found: Detections, ignored: Tensor, images: Tensor
) -> tuple[Tensor, dict[str, Tensor], dict[str, Any]]:
    """Compute the task loss on the teacher's detections, each weighted by its confidence.

    Args:
        task_loss: The student's task loss.
        predictions: The student's raw outputs on the unlabeled images.
        found: The teacher's confident detections, with the student's class indices.
        ignored: True for scores that are neither object nor background, (B, nc, A).
        images: The unlabeled images, (B, C, H, W).

    Returns:
        The loss vector times B, its logged items, and the batch with the detections as labels.
    """
    labels: dict[str, Any] = {"img": images, **labels_of(found, images.shape[-2:])}
    with weighted_by(task_loss, found.padded_confidence(len(images))):
        loss, items = task_loss(without_classes(predictions, ignored), labels)
    return loss, items, labels


class UnlabeledReader:
    """Turns the teacher's outputs on unlabeled images into labels and a task loss.

    Args:
        options: How unlabeled images are used.
        classes: The class map, None if all classes are the same.
        reads: The outputs that the terms read.
    """

    def __init__(self, options: UnlabeledOptions, classes: ClassMap | None, reads: Collection[str]):
        self.options = options
        self.classes = classes
        self.reads = frozenset(reads)

    def matched(self, teacher: DetectorOutputs) -> DetectorOutputs:
        """Return the teacher's outputs for the matched classes."""
        return teacher if self.classes is None else self.classes.teacher_outputs(teacher)

    def read(
        self, task_loss: Any, predictions: Any, images: Tensor, teacher: DetectorOutputs, chosen: Collection[int] | None
    ) -> tuple[SubBatch, dict[str, Any] | None]:
        """Return the contribution of unlabeled images without the inputs of terms, and labels for these inputs.

        Args:
            task_loss: The student's task loss.
            predictions: The student's raw outputs on these images.
            images: (B, C, H, W).
            teacher: The result of `matched`.
            chosen: The classes in `classes=`, None for all.

        Returns:
            The sub-batch, and its images with the teacher's detections as labels, None if no term reads boxes.
        """
        options = self.options
        sub_batch = SubBatch(len(images), unlabeled=True)
        labels: dict[str, Any] | None = None
        if options.labels:
            pseudo = pseudo_labels(teacher, options.low, options.conf, options.iou)
            # the teacher cannot decide about a class that it does not have
            ignored = pseudo.ignored if self.classes is None else self.classes.student_mask(pseudo.ignored)
            found = as_student(pseudo.certain, self.classes, chosen)
            sub_batch.task_loss, sub_batch.items, labels = pseudo_labeled(
                task_loss, predictions, found, ignored, images
            )
        elif options.distils and self.reads & NEEDS_BOXES:
            found = as_student(detect(teacher, options.conf, options.iou), self.classes, chosen)
            labels = {"img": images, **labels_of(found, images.shape[-2:])}
            if "assignment" in self.reads:
                with torch.no_grad():
                    task_loss(predictions, labels)  # for the recorder of the label assignment
        return sub_batch, labels if self.reads & NEEDS_BOXES else None

    def columns(self, items: Mapping[str, Tensor], teacher: DetectorOutputs, task_loss: Any) -> dict[str, Tensor]:
        """Return the logged items about unlabeled images, which are finite and the same columns in every step.

        Args:
            items: Items of the task loss and the terms on unlabeled images, zero for a batch without any.
            teacher: The result of `matched`.
            task_loss: The student's task loss.
        """
        names, options = loss_names_of(task_loss), self.options
        logged = [name for name in items if (options.labels if name in names else options.distils)]
        columns = {f"{name.removesuffix('_loss')}_pool": items[name] for name in logged}
        if "scores" in teacher_reads(self.options, self.reads):
            scores = teacher.scores
            largest = teacher.objectness.amax(-1) if scores.numel() else scores.new_zeros(1)
            columns[CONFIDENCE] = largest.mean()
            columns[EMPTY] = (largest <= self.options.conf).float().mean()
        # a batch that the finite guard skips must not change the mean of the epoch
        return {name: value.detach().nan_to_num(0.0, 0.0, 0.0) for name, value in columns.items()}


def is_unlabeled_column(name: str) -> bool:
    """Return whether a logged item is about unlabeled images."""
    return name.endswith("_pool") or name in (CONFIDENCE, EMPTY)
