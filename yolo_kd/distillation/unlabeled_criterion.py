"""The criterion of a training with an unlabelled pool: a batch in two parts, labelled images first."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.distillation.criterion import TEACHER_OUTPUTS, DistillationCriterion, touch
from yolo_kd.structures import DetectorOutputs, LossInputs, tensors_of
from yolo_kd.unlabeled.dataset import UNLABELED_MARK, unlabeled_count
from yolo_kd.unlabeled.pseudo_labels import Detections, detect, labels_of, pseudo_labels
from yolo_kd.upstream.recorders import outputs_of
from yolo_kd.upstream.task_loss import cut, loss_names_of, part_of, targets_of, weighted_by, without_classes

SEEN, UNSEEN = "pool_obj", "pool_none"
NEEDS_BOXES = frozenset({"targets", "assignment"})


def teacher_reads(pool: UnlabeledOptions | None, reads: Collection[str]) -> frozenset[str]:
    """Return what must be computed of the teacher's head when the terms read `reads`."""
    return frozenset(reads) | ({"scores", "boxes"} if pool is not None and detects(pool, reads) else set())


def detects(pool: UnlabeledOptions, reads: Collection[str]) -> bool:
    """Return whether the teacher's detections on pool images are used, for the task loss or for terms."""
    return pool.labels or bool(NEEDS_BOXES & {*reads})


def as_student(found: Detections, classes: ClassMap | None, chosen: Collection[int] | None) -> Detections:
    """Return detections of matched classes in the student's numbers.

    Args:
        found: Detections in the numbers of matched classes.
        classes: Which class is which, None where all are the same.
        chosen: What `classes=` leaves, None for all.
    """
    if classes is not None:
        found = replace(found, labels=classes.student_labels(found.labels))
    if chosen is None:
        return found
    return found.where(torch.isin(found.labels, torch.as_tensor(chosen, device=found.labels.device)))


def is_pool_column(name: str) -> bool:
    """Return whether a logged item is about the pool."""
    return name.endswith("_pool") or name in (SEEN, UNSEEN)


@dataclass
class Part:
    """What one part of a batch contributes.

    Attributes:
        images: Number of images.
        loss: The native loss times that number, None where these images have no task loss.
        items: The native loss's items.
        steps: What the terms see, by term; empty where they do not act on these images.
    """

    images: int
    loss: Tensor | None
    items: Mapping[str, Tensor]
    steps: dict[str, LossInputs]


class PoolCriterion(DistillationCriterion):
    """Native loss and terms on a batch of labelled images, followed by images of the pool.

    The student sees the batch at once. With n labelled and m pool images in a batch of B = n + m:

    - The native loss L is computed for either part by itself, so that the one is in no normaliser of the other. In mode
      `distill` the labelled part alone has one; otherwise the pool has one on the teacher's certain detections, see
      `pseudo_labels` and `weighted_by`. The task's share of the vector is B times the mean of L over the images that
      have one: B * L_labelled, or n * L_labelled + m * L_pool.
    - Terms likewise: B times their mean over the images on which they act: all, or in mode `pseudo` the labelled ones.
      Where a term reads boxes, those of pool images are the teacher's certain detections.

    So a step weighs the same whatever the share of the pool. Items `x_loss` are of the labelled part, `x_pool` of the
    other.

    Args:
        *args: As for `DistillationCriterion`.
        pool: What to do with pool images.
        **keys: As for `DistillationCriterion`.
    """

    def __init__(self, *args: Any, pool: UnlabeledOptions, **keys: Any):
        super().__init__(*args, **keys)
        self._pool = pool

    def __call__(self, predictions: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss vector, times the batch size as Ultralytics wants it, and the logged items, per image."""
        images = len(batch["img"])
        unlabelled = unlabeled_count(batch[UNLABELED_MARK])
        own, others = slice(0, images - unlabelled), slice(images - unlabelled, images)
        # pool images have no labels, so all labels of the batch are those of the labelled images
        labelled = {**batch, "img": batch["img"][own]}
        first, second = cut(predictions, own.stop)
        shielded = self.shielded(predictions, batch)
        shielded = first if shielded is predictions else part_of(shielded, own)
        native = self.native(shielded, labelled) if unlabelled < images else None
        assignment = self._tap.take() if self._tap else None
        teacher = batch[TEACHER_OUTPUTS]
        teacher = (
            teacher if isinstance(teacher, DetectorOutputs) else teacher.take()
        )  # after the native loss: it may still run
        layers = self.layers.take() if self.layers else {}
        first_layers, second_layers = cut(layers, own.stop)
        student = outputs_of(predictions, self._student, layers)
        parts = []
        if native is not None:
            targets = targets_of(labelled, assignment) if self._reads_boxes else None
            view = outputs_of(first, self._student, first_layers)
            steps = self._distiller.steps(view, teacher.part(own), targets, self.progress)
            parts.append(Part(images - unlabelled, native[0], native[1], steps))
        seen = teacher.part(others)
        known = seen if self._classes is None else self._classes.teacher_view(seen)  # what both models have
        if unlabelled:
            view = outputs_of(second, self._student, second_layers)
            parts.append(self._unlabelled(second, batch, view, seen, known, others))
        task = self._task(parts, student, images)
        if self.whole_graph:
            task = touch(task, predictions)
        acting = [part for part in parts if part.steps]
        if acting:
            looked = acting[0]
            loss = task.new_zeros(()) if looked.loss is None else looked.loss.sum() / looked.images
            # the whole student's view, which is where both losses of the part meet
            self._look(loss, student, looked.steps)
        values = {id(part): self._distiller(part.steps, self.close_mosaic) for part in acting}
        total = sum(part.images for part in acting)
        terms = {
            column: sum(values[id(part)][column] * (part.images / total) for part in acting)
            for column in self._distiller.columns
        }
        vector = torch.cat([task, torch.stack(list(terms.values())).to(task.dtype) * images])
        zero = vector.new_zeros(())

        def items_of(part: Part | None) -> dict[str, Tensor]:
            task_items = dict.fromkeys(loss_names_of(self.native), zero) | dict(part.items if part else {})
            acted = values.get(id(part), {})
            return task_items | {c: acted[c].detach() if acted else zero for c in self._distiller.columns}

        items = items_of(parts[0] if native is not None else None)
        if self._guard is not None and vector.requires_grad:
            vector, items = self._guard.screen(vector, items, tensors_of([predictions, layers]), teacher)
        about_pool = self._about_pool(items_of(parts[-1] if unlabelled else None), known)
        return vector, {**items, **self._distiller.weights(), **about_pool}

    def _unlabelled(
        self,
        raw: Any,
        batch: Mapping[str, Any],
        student: DetectorOutputs,
        seen: DetectorOutputs,
        known: DetectorOutputs,
        chosen: slice,
    ) -> Part:
        """Return what the pool images contribute; `known` is what the teacher has `seen` of classes that both have."""
        pool = self._pool
        images = batch["img"][chosen]
        reads = self._distiller.reads if pool.distils else frozenset()
        labels: dict[str, Any] = {"img": images}
        found: Detections | None = None
        loss, items = None, {}
        if pool.labels:
            pseudo = pseudo_labels(known, pool.low, pool.conf, pool.iou)
            found, ignored = self._as_student(pseudo.certain), pseudo.ignored
            if self._classes is not None:  # the teacher says nothing of classes that it does not know
                ignored = self._classes.student_mask(ignored)
            labels |= labels_of(found, images.shape[-2:])
            with weighted_by(self.native, found.padded_confidence(len(images))):
                loss, items = self.native(without_classes(raw, ignored), labels)
        elif reads & NEEDS_BOXES:
            found = self._as_student(detect(known, pool.conf, pool.iou))
            labels |= labels_of(found, images.shape[-2:])
            if "assignment" in reads:
                with torch.no_grad():
                    self.native(raw, labels)
        assignment = self._tap.take() if self._tap else None
        steps = {}
        if pool.distils:
            targets = targets_of(labels, assignment) if found is not None and self._reads_boxes else None
            steps = self._distiller.steps(student, seen, targets, self.progress, continues=chosen.start > 0)
        return Part(len(images), loss, items, steps)

    @property
    def _classes(self) -> ClassMap | None:
        return self._distiller.classes

    def _as_student(self, found: Detections) -> Detections:
        """Return detections of matched classes in the student's numbers, without what `classes=` leaves out."""
        return as_student(found, self._classes, getattr(self._student.args, "classes", None))

    @property
    def _reads_boxes(self) -> bool:
        return bool(self._distiller.reads & NEEDS_BOXES)

    def _task(self, parts: list[Part], student: DetectorOutputs, images: int) -> Tensor:
        """Return the native loss, times the batch size: the mean over the images that have one."""
        losses = [(part.images, part.loss) for part in parts if part.loss is not None]
        if not losses:
            return student.scores.new_zeros(len(loss_names_of(self.native)), dtype=torch.float32)
        total = torch.stack([loss for _, loss in losses]).sum(0)
        return total * (images / sum(n for n, _ in losses))

    def _about_pool(self, items: Mapping[str, Tensor], known: DetectorOutputs) -> dict[str, Tensor]:
        """Return what is logged of the pool: always the same columns, and finite numbers only."""
        native = set(loss_names_of(self.native)) if not self._pool.labels else set()
        terms = set(self._distiller.columns) if not self._pool.distils else set()
        columns = {
            f"{name.removesuffix('_loss')}_pool": value for name, value in items.items() if name not in native | terms
        }
        if "scores" in teacher_reads(self._pool, self._distiller.reads):
            largest = known.objectness.amax(-1) if known.scores.numel() else known.scores.new_zeros(1)
            columns[SEEN] = largest.mean()
            columns[UNSEEN] = (largest <= self._pool.conf).float().mean()
        # a batch that the guard has left out must not spoil the mean of the epoch
        return {name: value.detach().nan_to_num(0.0, 0.0, 0.0) for name, value in columns.items()}
