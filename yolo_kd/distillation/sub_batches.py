"""The labeled and the unlabeled images of a batch: what each contributes to the loss."""

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
"""Columns: mean largest class probability on unlabeled images, and share of them without a detection."""
NEEDS_BOXES = frozenset({"targets", "assignment"})


class Shield(Protocol):
    """Hides classes from the task loss where the labels must not deny them."""

    def shield(self, predictions: Any, teacher_logits: Tensor) -> Any:
        """Return the predictions as the task loss is to read them."""


@dataclass
class SubBatch:
    """What the labeled or the unlabeled images of a batch contribute.

    Attributes:
        images: Number of images, above 0.
        task_loss: The task loss times that number, a vector; None where these images have none.
        items: The logged items of the task loss, per image.
        inputs: What each term reads, by its name; empty where the terms do not act on these images.
        columns: The weighted terms per image, by column, once they are computed.
        unlabeled: Whether the images have no labels.
    """

    images: int
    task_loss: Tensor | None = None
    items: Mapping[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, LossInputs] = field(default_factory=dict)
    columns: dict[str, Tensor] = field(default_factory=dict)
    unlabeled: bool = False


def teacher_reads(options: UnlabeledOptions | None, reads: Collection[str]) -> frozenset[str]:
    """Return what the teacher's head must compute when the terms read `reads`."""
    detecting = options is not None and needs_detections(options, reads)
    return frozenset(reads) | ({"scores", "boxes"} if detecting else set())


def needs_detections(options: UnlabeledOptions, reads: Collection[str]) -> bool:
    """Return whether the task loss or a term uses the teacher's detections on unlabeled images."""
    return options.labels or bool(NEEDS_BOXES & {*reads})


def as_student(found: Detections, classes: ClassMap | None, chosen: Collection[int] | None) -> Detections:
    """Return detections of matched classes with the student's class indices.

    Args:
        found: Detections with indices of matched classes.
        classes: The class map, None where all classes agree.
        chosen: The classes that `classes=` keeps, None for all.
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
        found: The teacher's certain detections, with the student's class indices.
        ignored: True where a score is neither object nor background, (B, nc, A).
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
        classes: The class map, None where all classes agree.
        reads: What the terms read.
    """

    def __init__(self, options: UnlabeledOptions, classes: ClassMap | None, reads: Collection[str]):
        self.options = options
        self.classes = classes
        self.reads = frozenset(reads)

    def matched(self, teacher: DetectorOutputs) -> DetectorOutputs:
        """Return the teacher's outputs for the classes that both models have."""
        return teacher if self.classes is None else self.classes.teacher_outputs(teacher)

    def read(
        self, task_loss: Any, predictions: Any, images: Tensor, teacher: DetectorOutputs, chosen: Collection[int] | None
    ) -> tuple[SubBatch, dict[str, Any] | None]:
        """Return the contribution of unlabeled images without inputs of terms, and a batch of labels for these.

        Args:
            task_loss: The student's task loss.
            predictions: The student's raw outputs on these images.
            images: (B, C, H, W).
            teacher: What `matched` returned.
            chosen: The classes that `classes=` keeps, None for all.

        Returns:
            The sub-batch, and its images with the teacher's detections as labels where a term reads boxes.
        """
        options = self.options
        sub_batch = SubBatch(len(images), unlabeled=True)
        labels: dict[str, Any] | None = None
        if options.labels:
            pseudo = pseudo_labels(teacher, options.low, options.conf, options.iou)
            # the teacher says nothing about a class that it does not have
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
        """Return the logged items about unlabeled images: the same columns in every step, finite numbers only.

        Args:
            items: Items of the task loss and the terms on unlabeled images, zeros on a batch without any.
            teacher: What `matched` returned.
            task_loss: The student's task loss.
        """
        absent = set() if self.options.labels else set(loss_names_of(task_loss))
        terms = {name for name in items if name not in loss_names_of(task_loss)}
        absent |= set() if self.options.distils else terms
        columns = {f"{name.removesuffix('_loss')}_pool": value for name, value in items.items() if name not in absent}
        if "scores" in teacher_reads(self.options, self.reads):
            scores = teacher.scores
            largest = teacher.objectness.amax(-1) if scores.numel() else scores.new_zeros(1)
            columns[CONFIDENCE] = largest.mean()
            columns[EMPTY] = (largest <= self.options.conf).float().mean()
        # a batch that the finite guard leaves out must not spoil the mean of the epoch
        return {name: value.detach().nan_to_num(0.0, 0.0, 0.0) for name, value in columns.items()}


def is_unlabeled_column(name: str) -> bool:
    """Return whether a logged item is about unlabeled images."""
    return name.endswith("_pool") or name in (CONFIDENCE, EMPTY)
