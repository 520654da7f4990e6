"""The two cell-wise terms of `sea` with a gradient written by hand, chunk by chunk.

`cell_alignment_reference` is the same computation in plain torch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from yolo_kd.losses.kernels.chunked import computable, converted, laid_out_like, sums_in_chunks
from yolo_kd.losses.kernels.layout import channel_norms, channels_innermost, matrix_times_maps
from yolo_kd.losses.kernels.ops import categorical_kl, same_shape
from yolo_kd.losses.kernels.softmax_kl import MOST_BITS, kl_of_powers, softmax_kl

COSINE_EPS = 1e-4  # smallest norm of a feature in a cosine: bounds the gradient of cells that are all zero
ABSENT = -1e4  # similarity to a category without cells


def cell_alignment(
    student: Tensor,
    teacher: Tensor,
    anchors: tuple[Tensor, Tensor],
    present: Tensor,
    tau1: float,
    tau2: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Topological distance distillation (TDD) and localisation distribution alignment (LDA).

    TDD is the mean over cells of τ₁² · KL over categories. The logits of a cell i are its similarities cos(f_i, a_p) to
    the anchors of its own network; absent categories take no part. LDA is the mean over channels of τ₂² · KL over
    space.

    Args:
        student: (B, C, H, W).
        teacher: (B, C, H, W); detached here.
        anchors: The student's and the teacher's category anchors, (P, C) each; the teacher's are detached here.
        present: (P,) bool, True for categories with a cell.
        tau1: τ₁, above 0.
        tau2: τ₂, above 0.
        dtype: Precision of the matrix products in TDD; by default that of the anchors.

    Returns:
        Both scalars, at least 0 except for rounding. TDD is zero if there is only one category.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    same_shape(student=anchors[0], teacher=anchors[1])
    to_bits = 1 / (tau1 * math.log(2))
    axes, teacher_axes = (F.normalize(a, dim=1, eps=COSINE_EPS) * to_bits for a in anchors)
    teacher_axes = teacher_axes.detach()
    absent = torch.where(present, 0.0, ABSENT * to_bits).to(axes.dtype)[:, None]
    # Some category always has cells, and a cosine is at most 1, so that the maximum is needed only for a small τ₁.
    safe = to_bits < MOST_BITS
    dtype = dtype or axes.dtype
    overwrite = converted(student, teacher)

    def logits(feature: Tensor, low: Tensor, axes: Tensor) -> tuple[Tensor, Tensor]:
        # It divides products by the norms of cells, because products are far fewer than features.
        norms = channel_norms(feature).clamp_(min=COSINE_EPS)
        products = matrix_times_maps(axes.to(dtype), low).to(feature.dtype)
        torch.addcmul(absent, products, norms.reciprocal(), out=products)
        return products if safe else products.sub_(products.amax(1, keepdim=True)), norms

    def chunk_sums(raw_s: Tensor, raw_t: Tensor, axes: Tensor) -> list[tuple[Tensor, ...]]:
        s, axes = computable(raw_s), axes.detach()
        t = laid_out_like(raw_t, s)
        low_s = raw_s.detach().to(dtype)
        low_t = (raw_t if raw_t.stride() == raw_s.stride() else t).to(dtype)  # in the student's memory format
        z, norms = logits(s, low_s, axes)
        inverse = norms.reciprocal()
        tdd, slope = kl_of_powers(z, logits(t, low_t, teacher_axes)[0], 1, scale=inverse)  # gradient of the products
        # The gradient through the norm; a norm below the smallest one is a constant. The slopes of a cell add up to
        # zero, so that a shift of its logits makes no difference.
        through = z.mul_(slope).sum(1, keepdim=True).mul_(inverse).mul_(norms > COSINE_EPS)
        slope = slope.to(dtype)
        slope_s = matrix_times_maps(axes.to(dtype).T, slope).addcmul_(low_s, through.to(dtype), value=-1)
        if channels_innermost(s):
            slope_axes = slope.mT.flatten(0, 1).T @ low_s.mT.flatten(0, 1)
        else:
            slope_axes = slope.bmm(low_s.mT).to(s.dtype).sum(0)
        lda = softmax_kl(s, t, tau2, 2, overwrite)
        return [(tdd, slope_s, slope_axes.to(s.dtype)), (*lda, torch.zeros_like(axes))]

    tdd, lda = sums_in_chunks(chunk_sums, student.flatten(2), teacher.flatten(2), shared=(axes,), times=4, raw=True)
    return tdd * (tau1**2 * math.log(2) / student[:, 0].numel()), lda / student[:, :, 0, 0].numel()


def cell_alignment_reference(
    student: Tensor, teacher: Tensor, anchors: tuple[Tensor, Tensor], present: Tensor, tau1: float, tau2: float
) -> tuple[Tensor, Tensor]:
    """Return what `cell_alignment` returns, in plain torch with automatic differentiation."""

    def similarities(maps: Tensor, anchors: Tensor) -> Tensor:
        cells, axes = F.normalize(maps.flatten(2), dim=1, eps=COSINE_EPS), F.normalize(anchors, dim=1, eps=COSINE_EPS)
        return (axes @ cells).masked_fill(~present[:, None], ABSENT)

    tdd = categorical_kl(similarities(student, anchors[0]), similarities(teacher, anchors[1]), tau1, dim=1)
    lda = categorical_kl(student.flatten(2), teacher.flatten(2), tau2, dim=2)
    return tdd.mean(), lda.mean()
