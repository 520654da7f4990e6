"""Operations on maps that run along the memory format in which the maps lie, channels-last or not."""

from __future__ import annotations

import torch
from torch import Tensor


def channels_innermost(maps: Tensor) -> bool:
    """Return whether neighbours in memory are channels of one cell, for (B, C, ...) maps."""
    return maps.stride(1) == 1


def matrix_times_maps(matrix: Tensor, maps: Tensor) -> Tensor:
    """Return (P, C) @ (B, C, N) as (B, P, N) in the memory format of the maps, without a copy of either."""
    if channels_innermost(maps):
        return (maps.mT @ matrix.mT).mT
    return matrix.expand(len(maps), -1, -1).bmm(maps)


def sum_cells(maps: Tensor, weights: Tensor) -> Tensor:
    """Return Σ_n w_bn maps_bcn as (B, C), for (B, C, N) maps in any memory format and (B, N) weights.

    It multiplies a row by a matrix. On a CPU a matrix times a column is ten times slower.
    """
    return (weights[:, None] @ maps.mT).squeeze(1)


def add_products(maps: Tensor, left: Tensor, right: Tensor, beta: float = 1.0) -> None:
    """Set (B, C, N) maps of any memory format to beta · maps + left @ right, with (B, C, k) @ (B, k, N)."""
    if channels_innermost(maps):
        maps.mT.baddbmm_(right.mT, left.mT, beta=beta)
    else:
        maps.baddbmm_(left, right, beta=beta)


def channel_norms(maps: Tensor) -> Tensor:
    """Return the norm over the channels of each cell as (B, 1, N), for (B, C, N) maps of any memory format."""
    if channels_innermost(maps):
        return torch.linalg.vector_norm(maps, dim=1, keepdim=True)  # ten times slower for the other memory format
    return maps.square().sum(1, keepdim=True).sqrt_()
