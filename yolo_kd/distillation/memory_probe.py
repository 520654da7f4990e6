"""What Ultralytics' automatic batch size measures in place of the student: the whole distillation step."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.distillation.criterion import TEACHER_OUTPUTS, DistillationCriterion
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.teacher_runner import Runner
from yolo_kd.upstream.heads import head_tails
from yolo_kd.upstream.recorders import LayerRecorder


class MemoryProbe(nn.Module):
    """A student with teacher, adapters and terms as one module, for measuring memory.

    A forward pass is a whole step on images of noise with one box each; Ultralytics adds what more boxes cost. Copies
    share the teacher, which is frozen, and nothing else: the student and the adapters that will be trained stay as
    they are.

    Args:
        student: The student.
        distiller: Terms and adapters.
        teacher: A running copy of the teacher.
        tap: Makes the hooks on the student that the recipe needs, None if it needs none.
    """

    def __init__(
        self,
        student: nn.Module,
        distiller: Distiller,
        teacher: Runner,
        tap: Callable[[nn.Module], LayerRecorder] | None,
    ):
        super().__init__()
        self.student = student
        self.distiller = distiller
        self._teacher = teacher
        self._tap = tap
        self.stride: Any = student.stride
        self.names: Any = student.names
        self.yaml: Any = student.yaml

    def __deepcopy__(self, memo: dict) -> MemoryProbe:
        return MemoryProbe(deepcopy(self.student, memo), deepcopy(self.distiller, memo), self._teacher, self._tap)

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of one step on (B, C, H, W) images, whose values do not matter."""
        images = torch.rand_like(images)
        count = len(images)
        middle = images.new_tensor([[0.5, 0.5, 0.25, 0.25]])
        batch: dict[str, Any] = {
            "img": images,
            "bboxes": middle.expand(count, 4),
            "cls": images.new_zeros(count, 1),
            "batch_idx": torch.arange(count, device=images.device, dtype=images.dtype),
        }
        self.distiller.attach_teacher_head(head_tails(self._teacher.model))
        batch[TEACHER_OUTPUTS] = self._teacher(images)
        criterion = DistillationCriterion(self.student, self.distiller)
        criterion.layers = self._tap(self.student) if self._tap else None
        try:
            loss, _ = criterion(self.student(images), batch)
        finally:
            criterion.close()
        return loss.sum()
