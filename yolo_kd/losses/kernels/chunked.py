"""Sums over large tensors, computed chunk by chunk together with their gradients.

On a CPU, elementwise arithmetic on a detector's outputs costs as much as its passes through memory. A formula of ten
operations reads and writes every number ten times, keeps most intermediate results for the backward pass, and repeats
the passes there. A chunk of a few images fits into the processor's cache, where a pass costs almost nothing, and only
the gradient is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 2**19  # numbers of the student's tensor in one chunk

Answer = Tensor | tuple[Tensor, ...]
ChunkSum = Callable[..., Answer]
ChunkSums = Callable[..., Sequence[tuple[Tensor, ...]]]


def chunk_length(tensor: Tensor, dim: int = 0, times: int = 1) -> int:
    """Return the length of a chunk along a dimension.

    On a CPU a chunk is small enough for the cache. Other devices get everything at once, because there launches are
    expensive and passes are cheap.

    Args:
        tensor: The student's tensor.
        dim: The dimension that is split.
        times: Multiple of the usual chunk size.
    """
    length = tensor.shape[dim]
    return max(1, times * CHUNK * length // max(tensor.numel(), 1)) if tensor.device.type == "cpu" else length


class _SumsInChunks(torch.autograd.Function):
    """Sums and gradients, computed chunk by chunk in the forward pass and scaled and added in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, function: ChunkSums, dim: int, times: int, raw: bool, shared: int, *tensors: Tensor
    ) -> Tensor:
        """Return the sums over all chunks as a vector. The last `shared` tensors are passed whole to every chunk."""
        (student, *others), whole = tensors[: len(tensors) - shared], tensors[len(tensors) - shared :]
        length = chunk_length(student, dim, times)
        # A loss scaler makes gradients large enough for float16, but only when the backward pass multiplies them.
        kept = torch.float32 if student.dtype == torch.float16 else student.dtype
        sums: list[Tensor] = []
        slopes: list[Tensor] = []  # for each chunk, one per sum
        totals: list[Tensor] = []  # for each sum, one per shared tensor
        for chunk, *rest in zip(*(t.split(length, dim) for t in (student, *others)), strict=True):
            leaves = [(t.detach() if raw else computable(t)).requires_grad_() for t in (chunk, *whole)]
            with torch.autocast(student.device.type, enabled=False), torch.enable_grad():
                matching = (r.detach() if raw else laid_out_like(r, leaves[0]) for r in rest)
                answers = function(leaves[0], *matching, *leaves[1:])
            sums.append(torch.stack([answer[0].detach() for answer in answers]))
            slopes += [answer[1].detach().to(kept) for answer in answers]
            shares = [slope.detach() for answer in answers for slope in answer[2:]]
            totals = [a + b for a, b in zip(totals, shares, strict=True)] if totals else shares
        ctx.save_for_backward(*slopes, *totals)
        ctx.dim, ctx.length, ctx.shared = dim, length, shared
        ctx.like = torch.empty_like(student, device="meta")
        return torch.stack(sums).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scales: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of the student's tensor and of the shared tensors."""
        sums = len(scales)
        gradient = torch.empty_like(ctx.like, device=scales.device)
        slots = gradient.split(ctx.length, ctx.dim)
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


def computable(chunk: Tensor) -> Tensor:
    """Return a chunk, detached, in float32 or better. The conversion costs no pass through memory, only the cache."""
    chunk = chunk.detach()
    return chunk.float() if converted(chunk) else chunk


def converted(*tensors: Tensor) -> bool:
    """Return whether `computable` converts chunks of all tensors.

    Converted chunks are copies that nobody else reads, so a function may overwrite them.
    """
    return all(tensor.dtype in (torch.float16, torch.bfloat16) for tensor in tensors)


def laid_out_like(chunk: Tensor, other: Tensor) -> Tensor:
    """Return a chunk as `computable` does, in the memory format of `other` if both have the same shape.

    Arithmetic that mixes two memory formats is several times slower. Whole maps in a new format would stay in memory.
    """
    if chunk.shape != other.shape or chunk.stride() == other.stride():
        return computable(chunk)
    return torch.empty_like(other).copy_(chunk.detach())


def sums_in_chunks(
    function: ChunkSums,
    student: Tensor,
    *others: Tensor,
    dim: int = 0,
    shared: tuple[Tensor, ...] = (),
    times: int = 1,
    raw: bool = False,
) -> tuple[Tensor, ...]:
    """Return several sums of the same tensors, like `sum_in_chunks`, with fewer passes than one call for each sum.

    Args:
        function: As in `sum_in_chunks`, but it returns one tuple for each sum: a scalar and its gradients.
        student: As in `sum_in_chunks`.
        others: As in `sum_in_chunks`.
        dim: As in `sum_in_chunks`.
        shared: As in `sum_in_chunks`.
        times: Multiple of the usual chunk size. Matrix products are faster on long chunks.
        raw: Pass chunks in their original precision and memory format, for products in half precision. The function
            then calls `computable` and `laid_out_like` where it needs them.

    Raises:
        ValueError: If the lengths of the tensors along `dim` differ.
    """
    others = tuple(t.detach() for t in others)
    lengths = [t.shape[dim] for t in (student, *others)]
    if len(set(lengths)) > 1:
        raise ValueError(f"all tensors must be equally long along dimension {dim}, received {lengths}")
    return _SumsInChunks.apply(function, dim, times, raw, len(shared), student, *others, *shared).unbind()


def sum_in_chunks(
    function: ChunkSum, student: Tensor, *others: Tensor, dim: int = 0, shared: tuple[Tensor, ...] = ()
) -> Tensor:
    """Return `function(student, *others, *shared)`, which must be a sum over `dim`, added up over chunks.

    Args:
        function: Takes equally long chunks of all tensors and the whole shared tensors. It returns a scalar, or a
            scalar and its gradients with respect to the first and the shared arguments, which saves the passes of
            automatic differentiation. It runs outside autocast and receives half precision as float32.
        student: The tensor that receives the gradient.
        others: Tensors as long as `student` along `dim`. They receive no gradient.
        dim: The dimension that is split.
        shared: Tensors that every chunk needs whole. They receive a gradient too.

    Raises:
        ValueError: If the lengths of the tensors along `dim` differ.
    """

    def one(chunk: Tensor, *rest: Tensor) -> list[tuple[Tensor, ...]]:
        answer = function(chunk, *rest)
        if isinstance(answer, tuple):
            return [answer]
        return [(answer, *torch.autograd.grad(answer, (chunk, *rest[len(others) :])))]

    return sums_in_chunks(one, student, *others, dim=dim, shared=shared)[0]
