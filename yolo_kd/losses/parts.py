"""Sums over large tensors, worked out part by part together with their gradient.

On a CPU, elementwise arithmetic on the outputs of a detector costs its number of passes through memory: a formula of
ten operations reads and writes every value ten times, keeps most results for the backward pass, and then does the same
again. A part of a few images stays in the processor's cache, where passes cost next to nothing, and only the gradient
is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_kd.losses.ops import same_shape

PART = 2**18  # values of the student's tensor that are worked on at once


Part = Callable[..., Tensor | tuple[Tensor, ...]]


class _InParts(torch.autograd.Function):
    """Find the sum and its gradients, part by part, in the forward pass; the backward pass scales the latter."""

    @staticmethod
    def forward(ctx: Any, function: Part, dim: int, shared: int, *tensors: Tensor) -> Tensor:
        """Return the sum over the parts; the last `shared` tensors are not cut."""
        (student, *others), whole = tensors[: len(tensors) - shared], tensors[len(tensors) - shared :]
        at_once = student.device.type != "cpu"  # elsewhere passes are cheap and launches are not
        step = student.shape[dim] if at_once else max(1, PART * student.shape[dim] // student.numel())
        gradients = [torch.empty_like(student), *(torch.zeros_like(t) for t in whole)]
        totals = []
        for part, slot, *rest in zip(*(t.split(step, dim) for t in (student, gradients[0], *others)), strict=True):
            leaves = [t.detach().requires_grad_() for t in (part, *whole)]
            with torch.autocast(student.device.type, enabled=False), torch.enable_grad():
                answer = function(leaves[0], *rest, *leaves[1:])
                value, *slopes = answer if isinstance(answer, tuple) else (answer, *torch.autograd.grad(answer, leaves))
            slot.copy_(slopes[0].detach())
            for total, slope in zip(gradients[1:], slopes[1:], strict=True):
                total.add_(slope.detach())
            totals.append(value.detach())
        ctx.save_for_backward(*gradients)
        return torch.stack(totals).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the student's tensor and of the shared ones."""
        student, *whole = (g * scale.to(g.dtype) for g in ctx.saved_tensors)
        others = len(ctx.needs_input_grad) - 4 - len(whole)
        return (None, None, None, student, *[None] * others, *whole)


def sum_in_parts(
    function: Part, student: Tensor, *others: Tensor, dim: int = 0, shared: tuple[Tensor, ...] = ()
) -> Tensor:
    """Return `function(student, *others, *shared)`, a sum over `dim`: the sum of its values for parts.

    Args:
        function: Of equally long parts of all tensors, and the shared ones. It returns a scalar, or a scalar and its
            gradients with respect to its first and its shared arguments, which saves the passes of finding them out.
            It runs outside autocast.
        student: Gets the gradient.
        others: As long as `student` along `dim`; they get no gradient.
        dim: Where the tensors are cut.
        shared: Tensors that every part needs as a whole; they get a gradient too.

    Raises:
        ValueError: If the tensors differ in length along `dim`.
    """
    others = tuple(t.detach() for t in others)
    if len({t.shape[dim] for t in (student, *others)}) > 1:
        lengths = [t.shape[dim] for t in (student, *others)]
        raise ValueError(f"all tensors must be equally long along dimension {dim}, received {lengths}")
    return _InParts.apply(function, dim, len(shared), student, *others, *shared)


def squared_error_sum(student: Tensor, teacher: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return Σ_bhw w Σ_c (s - t)².

    Args:
        student: (B, C, H, W), with gradient.
        teacher: (B, C, H, W).
        weights: (B, H, W) of any dtype, one for each cell by default.
    """

    def part(s: Tensor, t: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        error = s.detach() - t
        if not weight:
            return error.square().sum(), error.mul_(2)
        w = weight[0].to(error.dtype)[:, None]
        slope = error * w
        return error.mul_(slope).sum(), slope.mul_(2)

    return sum_in_parts(part, student, teacher, *(() if weights is None else (weights,)))


def softmax_kl_sum(student: Tensor, teacher: Tensor, temperature: float = 1.0, dim: int = -1) -> Tensor:
    """Return T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)): `ops.categorical_kl`, summed.

    Args:
        student: (B, ...) logits of any precision, with gradient.
        teacher: Logits of the same shape.
        temperature: T, above zero.
        dim: The dimension of the distributions, not the first.

    Returns:
        float32 scalar, at least 0 but for rounding.
    """

    def part(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s, t = (x.detach().float() for x in (s, t))
        log_q, log_p = ((x if temperature == 1 else x / temperature).log_softmax(dim) for x in (s, t))
        p = log_p.exp()
        value = log_p.sub_(log_q).mul_(p).sum() * temperature**2
        return value, log_q.exp_().sub_(p).mul_(temperature)

    return sum_in_parts(part, student, teacher)


def weighted_binary_kl(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_i w_i Σ_c KL(σ(t_ic) ‖ σ(s_ic)), in nats: `ops.binary_kl`, summed.

    Args:
        student: (B, A, nc) raw class logits of any precision, with gradient.
        teacher: (B, A, nc) raw class logits.
        weights: (B, A), at least 0.

    Returns:
        float32 scalar, at least 0 but for rounding.
    """

    def part(s: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        s, t, w = s.detach().transpose(1, 2).float(), t.transpose(1, 2).float(), w.float()[:, None]
        p, q = t.sigmoid(), s.sigmoid()
        # p (t - s) + softplus(s) - softplus(t) with softplus(x) = max(x, 0) + log(1 + e^-|x|)
        kl = (t - s).mul_(p).add_(s.relu()).sub_(t.relu())
        kl.add_(s.abs().neg_().exp_().log1p_()).sub_(t.abs().neg_().exp_().log1p_())
        return (kl.sum(1, keepdim=True) * w).sum(), q.sub_(p).mul_(w).transpose(1, 2)

    return sum_in_parts(part, student, teacher, weights)


def weighted_bins_kl(
    student: Tensor, teacher: Tensor, weights: Tensor, reg_max: int, temperature: float = 1.0
) -> Tensor:
    """Return Σ_i w_i mean_sides T² KL(softmax(t / T) ‖ softmax(s / T)): `ops.categorical_kl` over the bins, summed.

    Args:
        student: (B, A, 4 * reg_max) raw box outputs of any precision, with gradient.
        teacher: (B, A, 4 * reg_max) raw box outputs.
        weights: (B, A), at least 0.
        reg_max: Bins per side, more than 1.
        temperature: T, above zero.

    Returns:
        float32 scalar, at least 0 but for rounding.
    """

    def part(s: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        # raw outputs lie in memory as (B, 4 * reg_max, A), along which the softmax is several times faster
        s, t = (x.detach().transpose(1, 2).unflatten(1, (4, reg_max)).float() / temperature for x in (s, t))
        w = w.float()[:, None, None]
        log_p, log_q = t.log_softmax(2), s.log_softmax(2)
        p = log_p.exp()
        value = ((log_p.sub_(log_q)).mul_(p).sum(2, keepdim=True) * w).sum() * (temperature**2 / 4)
        slope = log_q.exp_().sub_(p).mul_(w * (temperature / 4))
        return value, slope.flatten(1, 2).transpose(1, 2)

    return sum_in_parts(part, student, teacher, weights)


def gap_cross_entropy_sum(student: Tensor, teacher: Tensor, beta: float = 1.0) -> Tensor:
    """Return Σ_i Σ_c |σ(t_ic) - σ(s_ic)|^β · BCE(σ(s_ic), σ(t_ic)): `ops.gap_cross_entropy`, summed.

    Args:
        student: (B, A, nc) or (A, nc) raw class logits of any precision, with gradient.
        teacher: Of the same shape.
        beta: Exponent of the scale, at least 1.

    Returns:
        float32 scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    if student.ndim == 2:
        student, teacher = student[None], teacher[None]

    def part(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        s, t = s.detach().transpose(1, 2).float(), t.transpose(1, 2).float()
        p, q = t.sigmoid(), s.sigmoid()
        entropy = s.relu().sub_(p * s).add_(s.abs().neg_().exp_().log1p_())  # softplus(s) - p s
        gap = q - p
        size = gap.abs()
        scale = size if beta == 1 else size.pow(beta)
        value = (entropy * scale).sum()
        # the scale takes part in the gradient: d|q - p|^β = β |q - p|^(β-1) sign(q - p) q (1 - q)
        slope = gap.sign().mul_(entropy).mul_(q).mul_(1 - q)
        slope = slope if beta == 1 else slope.mul_(size.pow(beta - 1)).mul_(beta)
        return value, slope.addcmul_(scale, gap).transpose(1, 2)

    return sum_in_parts(part, student, teacher)
