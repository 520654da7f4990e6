"""The object that replaces the student's loss during a training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from yolo_kd.distillation.distillation import Distillation


class DistillationCriterion:
    """Task loss and terms of a `Distillation`, called as Ultralytics calls a criterion.

    It is no `nn.Module`, and it is deep-copied and pickled as None. So the EMA copy of the student builds a task loss
    itself, and every checkpoint contains a plain student.

    Args:
        distillation: The step.

    Attributes:
        progress: Fraction of the training that has passed, in [0, 1].
    """

    def __init__(self, distillation: Distillation):
        self.distillation = distillation
        self.progress = 0.0

    def __deepcopy__(self, memo: dict) -> None:
        return None

    def __reduce__(self) -> tuple:
        return type(None), ()

    def update(self) -> None:
        """Forward Ultralytics' end-of-epoch call, which shifts end-to-end heads from one branch to the other."""
        task_loss = self.distillation.task_loss
        if hasattr(task_loss, "update"):
            task_loss.update()

    def __call__(self, predictions: Any, batch: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss vector, times the batch size as Ultralytics expects it, and the logged items per image."""
        losses = self.distillation.loss(self.distillation.observe(predictions, batch), self.progress)
        return losses.vector, losses.items
