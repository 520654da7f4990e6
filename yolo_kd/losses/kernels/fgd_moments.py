"""Sums over a pair of feature maps from which `fgd` computes all its terms, with a gradient written by hand.

These maps are the largest tensors of a training step. Elementwise arithmetic on them costs as much as its passes
through memory and its fresh buffers, so that this code works on chunks of a few images, which stay in the processor's
cache. `pair_moments_reference` is the same computation in plain torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_kd.losses.kernels.chunked import chunk_length, computable, laid_out_like
from yolo_kd.losses.kernels.layout import add_products, sum_cells
from yolo_kd.losses.kernels.ops import attention

MaskConvolution = tuple[Tensor, Tensor]
"""Weight (C,) and bias (1,) of a 1x1 convolution to one channel."""


class Moments(NamedTuple):
    """Sums over a pair of (B, C, HW) maps S and T, with d = S - T and A_C the teacher's channel attention.

    Attributes:
        attended: Σ_c A_C d², (B, HW).
        squares: Σ_hw d², (B, C).
        differences: Σ_hw d, (B, C).
        s_spatial: Mean of |S| over channels, (B, HW).
        s_channel: Mean of |S| over cells, (B, C).
        s_context: Σ_hw p S with the context weights p of S, (B, C).
        t_spatial: Mean of |T| over channels, (B, HW), without gradient.
        t_channel: Mean of |T| over cells, (B, C), without gradient.
        t_context: Σ_hw p T with the context weights p of T, (B, C).
    """

    attended: Tensor
    squares: Tensor
    differences: Tensor
    s_spatial: Tensor
    s_channel: Tensor
    s_context: Tensor
    t_spatial: Tensor
    t_channel: Tensor
    t_context: Tensor


def context_weights(flat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return p = softmax over the cells of a 1x1 convolution to one channel, (B, HW), for a (B, C, HW) map.

    A matrix product is several times faster here than a convolution. `weight @ flat` would copy the whole map into
    another memory format.
    """
    return (weight.expand(len(flat), 1, -1).bmm(flat).squeeze(1) + bias).softmax(-1)


def pair_moments(
    student: Tensor, teacher: Tensor, temperature: float, student_mask: MaskConvolution, teacher_mask: MaskConvolution
) -> Moments:
    """Return the moments of a pair of maps. Gradient flows to the student's map and to both convolutions.

    Args:
        student: S, (B, C, HW). Half precision is converted to float32.
        teacher: T, (B, C, HW); receives no gradient.
        temperature: Temperature of the teacher's channel attention, above zero.
        student_mask: Mask convolution of the student's context block.
        teacher_mask: Mask convolution of the teacher's context block.
    """
    return Moments(*_PairMoments.apply(student, teacher, temperature, *student_mask, *teacher_mask))


def pair_moments_reference(
    student: Tensor, teacher: Tensor, temperature: float, student_mask: MaskConvolution, teacher_mask: MaskConvolution
) -> Moments:
    """Return what `pair_moments` returns, in plain torch with automatic differentiation."""

    def of_one(maps: Tensor, mask: MaskConvolution) -> tuple[Tensor, Tensor, Tensor]:
        logits = (mask[0][:, None] * maps).sum(1) + mask[1]
        return maps.abs().mean(1), maps.abs().mean(2), (logits.softmax(-1)[:, None] * maps).sum(2)

    d = student - teacher
    a = attention(teacher.abs().mean(2), temperature)[..., None]
    sums = (a * d.square()).sum(1), d.square().sum(2), d.sum(2)
    return Moments(*sums, *of_one(student, student_mask), *of_one(teacher, teacher_mask))


class _PairMoments(torch.autograd.Function):
    """The moments and their gradient, chunk by chunk. The chunk size does not change the results."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float, *masks: Tensor) -> tuple[Tensor, ...]:
        """Return the nine sums, float32 or better."""
        length = chunk_length(student)
        chunks, kept = [], []
        for s, t in zip(student.split(length), teacher.split(length), strict=True):
            s = computable(s)
            t = laid_out_like(t, s)
            buffer = t.abs()
            t_spatial, t_channel = buffer.mean(1), buffer.mean(2)
            a = attention(t_channel, temperature)
            p, t_p = context_weights(s, *masks[:2]), context_weights(t, *masks[2:])
            kept.append((a, p, t_p))
            d = s - t
            torch.mul(d, d, out=buffer)
            differences = (a[:, None] @ buffer).squeeze(1), buffer.sum(2), d.sum(2)
            torch.abs(s, out=buffer)
            of_student = buffer.mean(1), buffer.mean(2), sum_cells(s, p)
            chunks.append((*differences, *of_student, t_spatial, t_channel, sum_cells(t, t_p)))
        ctx.save_for_backward(student, teacher, masks[0], *(torch.cat(column) for column in zip(*kept, strict=True)))
        results = tuple(torch.cat(column) for column in zip(*chunks, strict=True))
        ctx.mark_non_differentiable(*results[6:8])
        return results

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the student's map and of both convolutions."""
        # A caller that asks for gradients inside autocast would get matrix products in half precision.
        with torch.autocast(ctx.saved_tensors[0].device.type, enabled=False):
            return _PairMoments._gradient(ctx, *gradients)

    @staticmethod
    def _gradient(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return 2 d (a g_e + g_sq) + g_d + sign(S) (g_s / C + g_c / HW) + g_x p + w g_m for the student's map.

        g_e, g_sq, g_d, g_s, g_c and g_x are the gradients of `attended`, `squares`, `differences`, `s_spatial`,
        `s_channel` and `s_context`; g_m is the gradient of the logits of p, and w the convolution's weight.
        """
        student, teacher, weight, *kept = ctx.saved_tensors
        length = chunk_length(student)
        result = torch.empty_like(student)
        masks = [weight.new_zeros(n) for n in (len(weight), 1, len(weight), 1)]
        columns = (student, teacher, *kept, *gradients[:6], gradients[8], result)
        for s, t, a, p, t_p, g_e, g_sq, g_d, g_s, g_c, g_x, g_tx, slot in zip(
            *(x.split(length) for x in columns), strict=True
        ):
            s = computable(s)
            t = laid_out_like(t, s)
            ones, cells = torch.ones_like(a), torch.ones_like(p)
            out = s - t
            factor = torch.empty_like(out)
            add_products(factor, torch.stack([2 * a, 2 * g_sq], 2), torch.stack([g_e, cells], 1), beta=0)
            out.mul_(factor)
            left = torch.stack([ones / s.shape[1], g_c / s.shape[2]], 2)
            add_products(factor, left, torch.stack([g_s, cells], 1), beta=0)
            out.addcmul_(factor, s.sign())
            g_m = _through_context(s, p, g_x, masks[:2])
            _through_context(t, t_p, g_tx, masks[2:])
            left = torch.stack([g_d, g_x, weight.expand_as(a)], 2)
            add_products(out, left, torch.stack([cells, p, g_m], 1))
            slot.copy_(out)
        return result, None, None, *masks


def _through_context(flat: Tensor, p: Tensor, slope: Tensor, mask: Sequence[Tensor]) -> Tensor:
    """Return the gradient of the logits of p for the gradient `slope` of a context.

    It adds the gradients of the convolution's weight and bias to `mask`.
    """
    through = (slope[:, None] @ flat).squeeze(1)
    logits = p * (through - (p * through).sum(-1, keepdim=True))
    mask[0].add_(sum_cells(flat, logits).sum(0))
    mask[1].add_(logits.sum())
    return logits
