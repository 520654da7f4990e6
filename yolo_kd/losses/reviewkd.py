"""Knowledge review: fine levels of the student learn with the help of deeper levels (Chen et al., CVPR 2021)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from yolo_kd.errors import PairError
from yolo_kd.losses.base import FeatureLoss
from yolo_kd.losses.kernels.chunked import sum_in_chunks
from yolo_kd.losses.kernels.layout import add_products
from yolo_kd.losses.kernels.ops import averaging, same_shape
from yolo_kd.structures import LossInputs, PairSpec

POOLS = (4, 2, 1)  # sides of the pooled maps in cells


def hcl(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss: squared error of the maps and of their averages over ever larger regions.

    L = [mse(s, t) + Σ_k 2^-k mse(pool_k(s), pool_k(t))] / [1 + Σ_k 2^-k], pools to 4x4, 2x2 and 1x1 cells

    As published, pools that are at least as high as the map are left out.

    Args:
        student: (B, C, H, W), already fused and at the teacher's width.
        teacher: (B, C, H, W); detached here.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    height, width = student.shape[-2:]
    sides = [side for side in POOLS if side < height]
    exact = torch.promote_types(student.dtype, torch.float32)
    like = student.new_empty(0, dtype=exact)
    # All averages of a map are one matrix product, and so is their gradient.
    averages = torch.cat(
        [torch.kron(averaging(height, side, like), averaging(width, side, like)) for side in sides]
        or [like.new_zeros(0, height * width)]
    )
    weights = torch.cat([like.new_full((side**2,), 0.5**k / side**2) for k, side in enumerate(sides, 1)] or [like])
    scale = sum(0.5**k for k in range(len(sides) + 1)) * student[:, :, 0, 0].numel()

    def chunk_sum(s: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        error = (s.detach() - t).flatten(2)  # the error of the averages is the average of the error
        matrix = averages.expand(len(error), -1, -1)
        pooled = error.bmm(matrix.mT)  # (B, C, all averages)
        weighted = pooled * weights
        total = error.square().sum() / error.shape[2] + (weighted * pooled).sum()
        slope = error.mul_(2 / error.shape[2] / scale)
        add_products(slope, weighted.mul_(2 / scale), matrix)
        return total / scale, slope.view_as(s)

    return sum_in_chunks(chunk_sum, student, teacher)


class Fusion(nn.Module):
    """Attention-based fusion of one student level with the fused map of the next deeper level.

    Batch normalisation always uses the statistics of the batch and keeps no running statistics, because these modules
    run in training only.

    Args:
        student: Channels of the student's level.
        mid: Channels of the fused maps.
        teacher: Channels of the teacher's level.
        deeper: False for the deepest level, which has no deeper level to be fused with.
    """

    def __init__(self, student: int, mid: int, teacher: int, *, deeper: bool):
        super().__init__()
        self.reduce = nn.Conv2d(student, mid, 1, bias=False)
        self.reduce_norm = nn.BatchNorm2d(mid, track_running_stats=False)
        self.gate = nn.Conv2d(2 * mid, 2, 1) if deeper else None
        self.expand = nn.Conv2d(mid, teacher, 3, padding=1, bias=False)
        self.expand_norm = nn.BatchNorm2d(teacher, track_running_stats=False)
        for conv in (self.reduce, self.expand):
            nn.init.kaiming_uniform_(conv.weight, a=1)

    def forward(self, feature: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fuse the levels.

        Args:
            feature: The student's map, (B, C_student, H, W).
            residual: The fused map of the next deeper level, (B, mid, H', W'), None for the deepest level.

        Returns:
            The map at the teacher's width, (B, C_teacher, H, W), and the fused map for the next level, (B, mid, H, W).
        """
        fused = self.reduce_norm(self.reduce(feature))
        if self.gate is not None and residual is not None:
            residual = F.interpolate(residual, fused.shape[-2:], mode="nearest")
            here, deeper = self.gate(torch.cat((fused, residual), 1)).sigmoid().split(1, dim=1)
            fused = fused * here + residual * deeper
        return self.expand_norm(self.expand(fused)), fused


def review(fusions: Sequence[Fusion] | nn.ModuleList, features: Sequence[Tensor]) -> list[Tensor]:
    """Return the fused student maps in stride order.

    Args:
        fusions: One module per level, deepest first.
        features: The student's maps in stride order.
    """
    outputs: list[Tensor] = []
    residual = None
    for fusion, feature in zip(fusions, reversed(features), strict=True):
        output, residual = fusion(feature, residual)
        outputs.append(output)
    return outputs[::-1]


class ReviewKD(FeatureLoss):
    """Knowledge review between the heads' input features, summed over levels.

    Chen, Liu, Zhao and Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021, arXiv 2104.09044, its ABF
    (attention-based fusion) and HCL (hierarchical context loss). From the deepest level upwards, each level of the
    student is fused with the deeper levels before it is compared with the teacher's. The fusion also matches the
    widths, so that there is no adapter. It is trained and ends in a normalisation, hence the loss is not zero for a
    student that equals its teacher. Fusions run in the precision of the student's layers. One departure: the default of
    `mid_channels` is 128 instead of 256, because at stride 8 the fusion would otherwise cost as much as a small
    student.

    The term is a mean over images, channels and cells, which does not grow with batch size, width or image size. The
    published detectors weigh the plain term, before `strength`, with 0.8 to 2.

    Args:
        mid_channels: Channels of the fused maps, at least 1.
        levels: Levels to use, all by default.
    """

    name = "reviewkd"
    columns = ("rev_loss",)
    reads = frozenset({"features"})
    paper = "Chen et al. 2021, arXiv 2104.09044"
    strength = 3.0

    mid_channels: Annotated[int, Field(ge=1)] = 128

    def build(self, pair: PairSpec) -> None:
        """Make one fusion per level, deepest first."""
        super().build(pair)
        deepest = self.level_indices[-1]
        self.fusions = nn.ModuleList(
            Fusion(pair.student_channels[i], self.mid_channels, pair.teacher_channels[i], deeper=i != deepest)
            for i in reversed(self.level_indices)
        )

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term.

        Raises:
            PairError: If a level has a single cell in the whole batch, so that it cannot be normalised.
        """
        features = [inputs.student.features[i] for i in self.level_indices]
        if any(feature[:, 0].numel() < 2 for feature in features):
            raise PairError(
                "reviewkd normalises each level over its cells, but a level of this batch has only one. Raise imgsz "
                "or batch, or leave out the coarsest level with levels=."
            )
        fused = inputs.layers(lambda *maps: review(self.fusions, maps), *features, as_is=True)
        return self.total(
            [hcl(f, inputs.teacher_feature(i, as_is=True)) for f, i in zip(fused, self.level_indices, strict=True)]
        )
