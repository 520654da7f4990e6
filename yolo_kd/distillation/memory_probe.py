"""The whole distillation step as one module, for Ultralytics' automatic batch size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.distillation.distillation import Distillation


class MemoryProbe(nn.Module):
    """A student with teacher, adapters and terms as one module, for measuring memory.

    A forward pass is a whole step on images of noise with one box each; Ultralytics adds what more boxes cost. Copies
    share the frozen teacher only, so the student and the adapters of the training do not change.

    Args:
        distillation: The step to measure, usually `Distillation.rehearsal()`.
    """

    def __init__(self, distillation: Distillation):
        super().__init__()
        self.student = distillation.student
        self.distiller = distillation.distiller
        self._distillation = distillation
        self.stride: Any = self.student.stride
        self.names: Any = self.student.names
        self.yaml: Any = self.student.yaml

    def __deepcopy__(self, memo: dict) -> MemoryProbe:
        return MemoryProbe(self._distillation.rehearsal())

    def forward(self, images: Tensor) -> Tensor:
        """Return the loss of one step on (B, C, H, W) images; their content is ignored."""
        images = torch.rand_like(images)
        count = len(images)
        middle = images.new_tensor([[0.5, 0.5, 0.25, 0.25]])
        batch: dict[str, Any] = {
            "img": images,
            "bboxes": middle.expand(count, 4),
            "cls": images.new_zeros(count, 1),
            "batch_idx": torch.arange(count, device=images.device, dtype=images.dtype),
        }
        self._distillation.begin(batch)
        try:
            observation = self._distillation.observe(self.student(images), batch)
            return self._distillation.loss(observation).total
        finally:
            self._distillation.detach()
