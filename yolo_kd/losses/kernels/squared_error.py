"""Weighted squared error of two maps, chunk by chunk."""

from __future__ import annotations

from torch import Tensor

from yolo_kd.losses.kernels.channel_stats import Rescaling
from yolo_kd.losses.kernels.chunked import sum_in_chunks


def squared_error_sum(
    student: Tensor,
    teacher: Tensor,
    weights: Tensor | None = None,
    scales: tuple[Rescaling, Rescaling] | None = None,
) -> Tensor:
    """Return Σ_bhw w Σ_c (s - t)².

    Args:
        student: (B, C, H, W), with gradient.
        teacher: (B, C, H, W).
        weights: (B, H, W) of any dtype; one for each cell by default.
        scales: Rescaling of the student's and of the teacher's channels that is applied first.
    """
    if scales is not None:
        student = scales[0].through(student)

    def chunk_sum(s: Tensor, t: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        if scales is not None:
            s, t = scales[0].of(s), scales[1].of(t)
        error = s.detach() - t
        if not weight:
            return error.square().sum(), error.mul_(2)
        w = weight[0].to(error.dtype)[:, None]
        slope = error * w
        return error.mul_(slope).sum(), slope.mul_(2)

    return sum_in_chunks(chunk_sum, student, teacher, *(() if weights is None else (weights,)))
