"""Sums over large tensors, worked out part by part together with their gradient.

On a CPU, elementwise arithmetic on the outputs of a detector costs its number of passes through memory: a formula of
ten operations reads and writes every value ten times, keeps most results for the backward pass, and then does the same
again. A part of a few images stays in the processor's cache, where passes cost next to nothing, and only the gradient
is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from yolo_kd.losses.kernels.channel_stats import Rescaling
from yolo_kd.losses.kernels.ops import same_shape

PART = 2**19  # values of the student's tensor that are worked on at once
MOST_BITS = 64.0  # powers of 2 up to here, either way, can be summed up and divided by in float32

Answer = Tensor | tuple[Tensor, ...]
Part = Callable[..., Answer]
Parts = Callable[..., Sequence[tuple[Tensor, ...]]]


def part_length(tensor: Tensor, dim: int = 0, times: int = 1) -> int:
    """Return how much of a dimension to work on at once: a part on a CPU, all where launches cost and passes do not.

    Args:
        tensor: The student's tensor.
        dim: Where it is cut.
        times: How many times the usual size a part may have.
    """
    length = tensor.shape[dim]
    return max(1, times * PART * length // max(tensor.numel(), 1)) if tensor.device.type == "cpu" else length


class _InParts(torch.autograd.Function):
    """Find sums and gradients, part by part, in the forward pass; the backward pass scales and adds the latter."""

    @staticmethod
    def forward(ctx: Any, function: Parts, dim: int, times: int, raw: bool, shared: int, *tensors: Tensor) -> Tensor:
        """Return all sums over the parts as a vector; the last `shared` tensors are not cut."""
        (student, *others), whole = tensors[: len(tensors) - shared], tensors[len(tensors) - shared :]
        step = part_length(student, dim, times)
        # a loss scaler lifts gradients that float16 cannot hold, but only once they are multiplied
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        values: list[Tensor] = []
        slopes: list[Tensor] = []  # for each part of each sum
        totals: list[Tensor] = []  # for each shared tensor of each sum
        for part, *rest in zip(*(t.split(step, dim) for t in (student, *others)), strict=True):
            leaves = [(t.detach() if raw else computable(t)).requires_grad_() for t in (part, *whole)]
            with torch.autocast(student.device.type, enabled=False), torch.enable_grad():
                beside_it = (r.detach() if raw else beside(r, leaves[0]) for r in rest)
                answers = function(leaves[0], *beside_it, *leaves[1:])
            values.append(torch.stack([answer[0].detach() for answer in answers]))
            slopes += [answer[1].detach().to(kept) for answer in answers]
            own = [slope.detach() for answer in answers for slope in answer[2:]]
            totals = [a + b for a, b in zip(totals, own, strict=True)] if totals else own
        ctx.save_for_backward(*slopes, *totals)
        ctx.dim, ctx.step, ctx.shared = dim, step, shared
        ctx.like = torch.empty_like(student, device="meta")
        return torch.stack(values).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the student's tensor and of the shared ones."""
        sums = len(scales)
        gradient = torch.empty_like(ctx.like, device=scales.device)
        slots = gradient.split(ctx.step, ctx.dim)
        slopes, totals = ctx.saved_tensors[: sums * len(slots)], ctx.saved_tensors[sums * len(slots) :]
        for k, slot in enumerate(slots):
            first, *more = slopes[sums * k : sums * (k + 1)]
            total = slot if slot.dtype == first.dtype else torch.empty_like(first)
            torch.mul(first, scales[0].to(first.dtype), out=total)
            for scale, slope in zip(scales[1:], more, strict=True):
                total.addcmul_(slope, scale.to(slope.dtype))
            if total is not slot:
                slot.copy_(total)
        whole = [
            torch.stack([t * s.to(t.dtype) for t, s in zip(totals[i :: ctx.shared], scales, strict=True)]).sum(0)
            for i in range(ctx.shared)
        ]
        others = len(ctx.needs_input_grad) - 6 - ctx.shared
        return (None, None, None, None, None, gradient, *[None] * others, *whole)


def computable(part: Tensor) -> Tensor:
    """Return a part, detached, in no less than float32: converted part by part, that costs no pass through memory."""
    part = part.detach()
    return part.float() if comes_as_copies(part) else part


def comes_as_copies(*tensors: Tensor) -> bool:
    """Return whether parts of all tensors reach a function as copies that nobody else reads, so may be overwritten."""
    return all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)


def beside(part: Tensor, other: Tensor) -> Tensor:
    """Return a part as `computable` does, and if it has the shape of `other`, laid out in memory as that is.

    Arithmetic on two memory formats at once is several times slower, and whole maps laid out anew would stay in memory.
    """
    if part.shape != other.shape or part.stride() == other.stride():
        return computable(part)
    return torch.empty_like(other).copy_(part.detach())


def sums_in_parts(
    function: Parts,
    student: Tensor,
    *others: Tensor,
    dim: int = 0,
    shared: tuple[Tensor, ...] = (),
    times: int = 1,
    raw: bool = False,
) -> tuple[Tensor, ...]:
    """Return several sums of the same tensors: what `sum_in_parts` does, with fewer passes than once for each.

    Args:
        function: As for `sum_in_parts`; it returns for each sum a tuple of a scalar and its gradients.
        student: As for `sum_in_parts`, and so are the others.
        others: As long as `student` along `dim`; they get no gradient.
        dim: Where the tensors are cut.
        shared: Tensors that every part needs as a whole; they get a gradient too.
        times: How many times the usual size a part may have: products of matrices want long ones.
        raw: Parts reach the function in the precision and layout in which they come, for products in half precision;
            it takes `computable` and `beside` of them itself.

    Raises:
        ValueError: If the tensors differ in length along `dim`.
    """
    others = tuple(t.detach() for t in others)
    if len({t.shape[dim] for t in (student, *others)}) > 1:
        lengths = [t.shape[dim] for t in (student, *others)]
        raise ValueError(f"all tensors must be equally long along dimension {dim}, received {lengths}")
    return _InParts.apply(function, dim, times, raw, len(shared), student, *others, *shared).unbind()


def sum_in_parts(
    function: Part, student: Tensor, *others: Tensor, dim: int = 0, shared: tuple[Tensor, ...] = ()
) -> Tensor:
    """Return `function(student, *others, *shared)`, a sum over `dim`: the sum of its values for parts.

    Args:
        function: Of equally long parts of all tensors, and the shared ones. It returns a scalar, or a scalar and its
            gradients with respect to its first and its shared arguments, which saves the passes of finding them out.
            It runs outside autocast, and what comes in half precision reaches it as float32.
        student: Gets the gradient.
        others: As long as `student` along `dim`; they get no gradient.
        dim: Where the tensors are cut.
        shared: Tensors that every part needs as a whole; they get a gradient too.

    Raises:
        ValueError: If the tensors differ in length along `dim`.
    """

    def one(part: Tensor, *rest: Tensor) -> list[tuple[Tensor, ...]]:
        answer = function(part, *rest)
        if isinstance(answer, tuple):
            return [answer]
        return [(answer, *torch.autograd.grad(answer, (part, *rest[len(others) :])))]

    return sums_in_parts(one, student, *others, dim=dim, shared=shared)[0]


class _Chosen(torch.autograd.Function):
    """Rows of (B, A, C) values, (K, C).

    The gradient lies in memory row by row, whatever the values do: so does that of Ultralytics' own loss, to which it
    is added, and a sum of two memory formats takes six times as long. So do the maps that it goes on to, channels-last.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, image: Tensor, point: Tensor) -> Tensor:
        """Return the chosen rows."""
        ctx.save_for_backward(image * values.shape[1] + point)
        ctx.shape = values.shape
        return values[image, point]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient, zero in all other rows."""
        (rows,) = ctx.saved_tensors
        gradient = slope.new_zeros(ctx.shape)
        gradient.view(-1, ctx.shape[2]).index_copy_(0, rows, slope)
        return gradient, None, None


def _few_count(weights: Tensor) -> bool:
    """Return whether it pays to leave out what weighs nothing."""
    return weights.device.type == "cpu" and 2 * int(weights.count_nonzero()) <= weights.numel()


def points_that_count(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Leave out the points whose weight is zero where that saves time.

    A trained teacher's objectness survives feature-map suppression at about a tenth of all points, and few points are
    near an object. On a GPU everything is kept: the host would have to wait for the number of points.

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
    return _Chosen.apply(student, image, point)[None], teacher[image, point][None], weights[image, point][None]


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
        weights: (B, H, W) of any dtype, one for each cell by default.
        scales: What the student's and the teacher's channels are brought to first.
    """
    if scales is not None:
        student = scales[0].through(student)

    def part(s: Tensor, t: Tensor, *weight: Tensor) -> tuple[Tensor, Tensor]:
        if scales is not None:
            s, t = scales[0].of(s), scales[1].of(t)
        error = s.detach() - t
        if not weight:
            return error.square().sum(), error.mul_(2)
        w = weight[0].to(error.dtype)[:, None]
        slope = error * w
        return error.mul_(slope).sum(), slope.mul_(2)

    return sum_in_parts(part, student, teacher, *(() if weights is None else (weights,)))


def channels_innermost(maps: Tensor) -> bool:
    """Return whether neighbours in memory are channels of a cell, for (B, C, ...) maps."""
    return maps.stride(1) == 1


def matrix_times_maps(matrix: Tensor, maps: Tensor) -> Tensor:
    """Return (P, C) @ (B, C, N), (B, P, N), which lies in memory as the maps do: neither is laid out anew."""
    if channels_innermost(maps):
        return (maps.mT @ matrix.mT).mT
    return matrix.expand(len(maps), -1, -1).bmm(maps)


def sum_cells(maps: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_n w_bn maps_bcn, (B, C), of (B, C, N) maps and (B, N) weights, whichever way the maps lie in memory.

    As a row times a matrix: a matrix times a column is ten times slower on a CPU.
    """
    return (weights[:, None] @ maps.mT).squeeze(1)


def add_products(maps: Tensor, left: Tensor, right: Tensor, beta: float = 1.0) -> None:
    """Make maps, (B, C, N), beta times themselves plus (B, C, k) @ (B, k, N), whichever way they lie in memory."""
    if channels_innermost(maps):
        maps.mT.baddbmm_(right.mT, left.mT, beta=beta)
    else:
        maps.baddbmm_(left, right, beta=beta)


def channel_norms(maps: Tensor) -> Tensor:
    """Return the norm of each cell's channels, (B, 1, N), of (B, C, N) maps, whichever way they lie in memory."""
    if channels_innermost(maps):
        return torch.linalg.vector_norm(maps, dim=1, keepdim=True)  # ten times slower the other way round
    return maps.square().sum(1, keepdim=True).sqrt_()


def kl_of_powers(
    student: Tensor,
    teacher: Tensor,
    dim: int | tuple[int, ...],
    into: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return Σ KL(p ‖ q) in bits, p and q the shares of 2^teacher and 2^student, and its gradient, scale · (q − p).

    Made of sums over `dim`, which run along the tensors as they lie in memory; a softmax lays others out anew. Powers
    are of 2, as those of e take three times as long on some processors. Sums are divided by where they are few numbers.

    Args:
        student: Logits to base 2, whose powers, and the sum of them, are neither infinite nor all zero.
        teacher: Logits of the same shape. **Overwritten**: memory that was just used is still in the cache.
        dim: The dimension of the distributions, or several.
        into: Where to put the gradient; may be `student`.
        scale: Of the gradient, which takes no pass of its own; one number for each distribution, or one for all.
    """
    gap = teacher - student
    p, q = teacher.exp2_(), torch.exp2(student, out=into)
    p_sum, q_sum = p.sum(dim, keepdim=True), q.sum(dim, keepdim=True)
    value = gap.mul_(p).sum(dim, keepdim=True).div_(p_sum).sub_((p_sum / q_sum).log2_()).sum()
    return value, q.mul_(scale / q_sum).addcmul_(p, scale / p_sum, value=-1)


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    dim: int | tuple[int, ...],
    overwrite: bool = False,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)) and its gradient, for functions of parts.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        temperature: T, above zero.
        dim: The dimension of the distributions, or several.
        overwrite: Both tensors may be overwritten, which spares fresh memory.
        factors: What the student's and the teacher's logits are multiplied by first, above 0; the gradient is that of
            the products. One number for each distribution: sizes that broadcast, 1 along `dim`.
    """
    to_bits = 1 / (temperature * math.log(2))

    def bits(x: Tensor, factor: Tensor | None) -> Tensor:
        """Return logits to base 2, of each distribution the largest 0."""
        peak, out = x.amax(dim, keepdim=True), x if overwrite else None
        if factor is None:
            return torch.add(peak.mul_(-to_bits), x, alpha=to_bits, out=out)
        factor = factor * to_bits
        return torch.addcmul(peak.mul_(factor).neg_(), x, factor, out=out)

    own, other = factors or (None, None)
    s, t = bits(student.detach(), own), bits(teacher, other)
    value, slope = kl_of_powers(s, t, dim, into=s, scale=temperature)
    return value * (temperature**2 * math.log(2)), slope


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

    return sum_in_parts(part, *points_that_count(student, teacher, weights))


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

    return sum_in_parts(part, *points_that_count(student, teacher, weights))


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
