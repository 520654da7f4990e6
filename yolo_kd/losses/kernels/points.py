"""Sums over the points of a detector's raw outputs, chunk by chunk, without the points that weigh nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_kd.losses.kernels.chunked import sum_in_chunks
from yolo_kd.losses.kernels.ops import same_shape


class _ChosenRows(torch.autograd.Function):
    """Select K rows of a (B, A, C) tensor as (K, C).

    The gradient lies in memory row by row, whatever the memory format of the input. The gradient of the task loss, to
    which it is added, lies the same way, and a sum of two memory formats takes six times as long. The channels-last
    maps that receive the gradient lie that way too.
    """

    @staticmethod
    def forward(ctx: Any, points: Tensor, image: Tensor, point: Tensor) -> Tensor:
        """Return the chosen rows."""
        ctx.save_for_backward(image * points.shape[1] + point)
        ctx.shape = points.shape
        return points[image, point]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, zero in all other rows."""
        (rows,) = ctx.saved_tensors
        gradient = slope.new_zeros(ctx.shape)
        gradient.view(-1, ctx.shape[2]).index_copy_(0, rows, slope)
        return gradient, None, None


def _few_count(weights: Tensor) -> bool:
    """Return whether leaving out the points without weight saves time."""
    return weights.device.type == "cpu" and 2 * int(weights.count_nonzero()) <= weights.numel()


def points_that_count(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out the points whose weight is zero if that saves time.

    A trained teacher's objectness survives feature-map suppression at about a tenth of all points, and few points are
    near an object. On a GPU all points stay, because the host would have to wait for their number.

    Args:
        student: (B, A, C), with gradient.
        teacher: (B, A, C).
        weights: (B, A).

    Returns:
        The same tensors, or (1, K, C), (1, K, C) and (1, K) of the K points that count.
    """
    if not _few_count(weights):
        return student, teacher, weights
    image, point = weights.nonzero(as_tuple=True)
    return _ChosenRows.apply(student, image, point)[None], teacher[image, point][None], weights[image, point][None]


def weighted_binary_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i Σ_c KL(σ(t_ic) ‖ σ(s_ic)) in nats: the weighted sum of `ops.binary_kl`.

    Args:
        student: (B, A, nc) raw class logits of any precision, with gradient.
        teacher: (B, A, nc) raw class logits.
        weights: (B, A), at least 0.

    Returns:
        float32 scalar, at least 0 except for rounding.
    """

    def chunk_sum(s: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s, t, w = s.detach().transpose(1, 2).float(), t.transpose(1, 2).float(), w.float()[:, None]
        p, q = t.sigmoid(), s.sigmoid()
        # p (t - s) + softplus(s) - softplus(t) with softplus(x) = max(x, 0) + log(1 + e^-|x|)
        kl = (t - s).mul_(p).add_(s.relu()).sub_(t.relu())
        kl.add_(s.abs().neg_().exp_().log1p_()).sub_(t.abs().neg_().exp_().log1p_())
        return (kl.sum(1, keepdim=True) * w).sum(), q.sub_(p).mul_(w).transpose(1, 2)

    return sum_in_chunks(chunk_sum, *points_that_count(student, teacher, weights))


def weighted_bins_kl(
    student: Tensor, teacher: Tensor, weights: Tensor, reg_max: int, temperature: float = 1.0
) -> Tensor:
    """Return Σ_i w_i mean_sides T² KL(softmax(t / T) ‖ softmax(s / T)): the weighted sum of `ops.categorical_kl`.

    Args:
        student: (B, A, 4 * reg_max) raw box outputs of any precision, with gradient.
        teacher: (B, A, 4 * reg_max) raw box outputs.
        weights: (B, A), at least 0.
        reg_max: Bins per side, more than 1.
        temperature: T, above zero.

    Returns:
        float32 scalar, at least 0 except for rounding.
    """

    def chunk_sum(s: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        # Raw outputs lie in memory as (B, 4 * reg_max, A). The softmax is several times faster that way round.
        s, t = (x.detach().transpose(1, 2).unflatten(1, (4, reg_max)).float() / temperature for x in (s, t))
        w = w.float()[:, None, None]
        log_p, log_q = t.log_softmax(2), s.log_softmax(2)
        p = log_p.exp()
        kl = ((log_p.sub_(log_q)).mul_(p).sum(2, keepdim=True) * w).sum() * (temperature**2 / 4)
        slope = log_q.exp_().sub_(p).mul_(w * (temperature / 4))
        return kl, slope.flatten(1, 2).transpose(1, 2)

    return sum_in_chunks(chunk_sum, *points_that_count(student, teacher, weights))


def gap_cross_entropy_sum(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return Σ_i Σ_c |σ(t_ic) - σ(s_ic)|^β · BCE(σ(s_ic), σ(t_ic)): the sum of `ops.gap_cross_entropy`.

    Args:
        student: (B, A, nc) or (A, nc) raw class logits of any precision, with gradient.
        teacher: The same shape.
        beta: Exponent of the scale, at least 1.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    if student.ndim == 2:
        student, teacher = student[None], teacher[None]

    def chunk_sum(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s, t = s.detach().transpose(1, 2).float(), t.transpose(1, 2).float()
        p, q = t.sigmoid(), s.sigmoid()
        entropy = s.relu().sub_(p * s).add_(s.abs().neg_().exp_().log1p_())  # softplus(s) - p s
        gap = q - p
        size = gap.abs()
        scale = size if beta == 1 else size.pow(beta)
        total = (entropy * scale).sum()
        # The scale has a gradient too: d|q - p|^β = β |q - p|^(β-1) sign(q - p) q (1 - q)
        slope = gap.sign().mul_(entropy).mul_(q).mul_(1 - q)
        slope = slope if beta == 1 else slope.mul_(size.pow(beta - 1)).mul_(beta)
        return total, slope.addcmul_(scale, gap).transpose(1, 2)

    return sum_in_chunks(chunk_sum, student, teacher)
