"""Pearson-correlation distillation: channels that rise and fall together (Cao et al., NeurIPS 2022)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from yolo_kd.losses.base import FeatureLoss
from yolo_kd.losses.kernels.channel_stats import rescaling
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs

EPS = 1e-6  # the published one, added to the standard deviation


def pkd(student: Tensor, teacher: Tensor, *, unbiased: bool = True, resize_student: bool | None = None) -> Tensor:
    """Half the mean squared error of maps whose channels are standardised over batch and cells.

    L = ½ mean((s̃ - t̃)²), x̃ = (x - mean_c) / (std_c + 1e-6)

    With n = B H W cells per channel it equals 1 - r averaged over channels, where r is the Pearson correlation, times
    (n - 1) / n if `unbiased`. A channel that is constant in one of the two maps counts ½. Statistics span the batch of
    one process.

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W); detached here.
        unbiased: Divide variances by n - 1, as published; the result is nan for n = 1.
        resize_student: How to treat maps of different height or width: resize the student's map (True, the published
            default) or the teacher's map (False) bilinearly, or refuse them (None). The published code compares heights
            only.

    Returns:
        Scalar in [0, 2].

    Raises:
        ValueError: If shapes differ and resizing does not help.
    """
    if resize_student is not None and student.shape[-2:] != teacher.shape[-2:]:
        if resize_student:
            student = F.interpolate(student, teacher.shape[-2:], mode="bilinear", align_corners=False)
        else:
            teacher = F.interpolate(teacher, student.shape[-2:], mode="bilinear", align_corners=False)
    same_shape(student=student, teacher=teacher)
    divisor = student[:, 0].numel() - int(unbiased)
    scales = rescaling(student, eps=EPS, divisor=divisor), rescaling(teacher, eps=EPS, divisor=divisor)
    return squared_error_sum(student, teacher, scales=scales) / (2 * student.numel())


class PKD(FeatureLoss):
    """Distillation by the Pearson correlation of each channel, summed over levels.

    Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient", NeurIPS
    2022, arXiv 2207.02039, the section on distillation with the Pearson correlation. It ignores the scale and offset of
    channels, which differ between architectures. Departures:

    - Variances are divided by n instead of n - 1, so that the term is 1 - r at any batch and image size, and defined
      for a single cell.
    - An adapter comes first, because the published code demands equal widths.

    The term is a mean over channels, which does not grow with batch size, width or image size. The published weights of
    the plain term, before `strength`, are 6 (two-stage heads) and 10 (dense heads).

    Args:
        levels: Levels to use, all by default.
    """

    name = "pkd"
    columns = ("pkd_loss",)
    reads = frozenset({"features"})
    adapter = "conv1x1"
    paper = "Cao et al. 2022, arXiv 2207.02039"
    strength = 2.0

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return one minus the correlation, averaged over the channels of one level."""
        return pkd(*self.maps(inputs, level), unbiased=False)
