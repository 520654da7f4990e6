"""Divergence of two softmax distributions and its gradient, for functions of chunks."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MOST_BITS = 64.0  # float32 can add up powers of 2 with exponents of up to this magnitude and divide by the sum


def kl_of_powers(
    student: Tensor,
    teacher: Tensor,
    dim: int | tuple[int, ...],
    into: Tensor | None = None,
    scale: Tensor | float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return Σ KL(p ‖ q) in bits and its gradient scale · (q − p); p and q are normalised powers 2^teacher, 2^student.

    All sums over `dim` run along the tensors as they lie in memory, while torch's softmax copies some memory formats.
    It takes powers of 2, because powers of e take three times as long on some processors. It divides sums, which are
    few, instead of elements.

    Args:
        student: Logits to base 2. Their powers and the sum of the powers must be finite and not all zero.
        teacher: Logits of the same shape. **Overwritten**, because memory that was just used is still in the cache.
        dim: The dimension, or dimensions, of the distributions.
        into: Where to write the gradient; may be `student`.
        scale: Factor of the gradient, applied without a pass of its own. One number for each distribution, or one for
            all.
    """
    gap = teacher - student
    p, q = teacher.exp2_(), torch.exp2(student, out=into)
    p_sum, q_sum = p.sum(dim, keepdim=True), q.sum(dim, keepdim=True)
    kl = gap.mul_(p).sum(dim, keepdim=True).div_(p_sum).sub_((p_sum / q_sum).log2_()).sum()
    return kl, q.mul_(scale / q_sum).addcmul_(p, scale / p_sum, value=-1)


def softmax_kl(
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    dim: int | tuple[int, ...],
    overwrite: bool = False,
    factors: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return T² Σ KL(softmax(teacher / T) ‖ softmax(student / T)) in nats, and its gradient.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        temperature: T, above zero.
        dim: The dimension, or dimensions, of the distributions.
        overwrite: Overwrite both tensors, which saves fresh memory.
        factors: Positive factors of the student's and the teacher's logits, applied first. The gradient is with respect
            to the products. One number for each distribution: the shape broadcasts and has size 1 along `dim`.
    """
    to_bits = 1 / (temperature * math.log(2))

    def bits(logits: Tensor, factor: Tensor | None) -> Tensor:
        """Return logits to base 2, shifted so that the largest of each distribution is 0."""
        peak, out = logits.amax(dim, keepdim=True), logits if overwrite else None
        if factor is None:
            return torch.add(peak.mul_(-to_bits), logits, alpha=to_bits, out=out)
        factor = factor * to_bits
        return torch.addcmul(peak.mul_(factor).neg_(), logits, factor, out=out)

    s_factor, t_factor = factors or (None, None)
    s, t = bits(student.detach(), s_factor), bits(teacher, t_factor)
    kl, slope = kl_of_powers(s, t, dim, into=s, scale=temperature)
    return kl * (temperature**2 * math.log(2)), slope
