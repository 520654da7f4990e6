"""Ground-truth boxes painted onto the cells of a level, for losses that separate objects from background.

All functions are vectorised over boxes and images. Memory stays bounded for any number of boxes in a mosaic.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUDGET = 2**24  # boxes · cells in memory at once; a usual batch at 640 px needs a quarter of it


def box_cells(boxes: Tensor, image_size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Map boxes to the cells they touch: from the floor of the left and top to the ceiling of the right and bottom.

    This is FGD's mapping. The last cell is included: a box of 16 px at stride 8 that is aligned with the cells spans
    three cells each way. A box that ends at the right or bottom border spans one cell that does not exist; `paint`
    leaves it out, and `cell_weights` counts it. One departure: boxes are clipped to the image first, because negative
    coordinates address the far side of the map in the published code. A box outside the image covers nothing.

    Args:
        boxes: (M, 4) in pixels, xyxy.
        image_size: Height and width of the images in pixels.
        shape: Height and width of the level in cells.

    Returns:
        (M, 4) int64: first column, first row, last column, last row, inclusive. Columns lie in [0, W], rows in [0, H].
    """
    boxes = boxes.float()
    size = boxes.new_tensor([*image_size[::-1], *image_size[::-1]])
    cells = boxes.new_tensor([*shape[::-1], *shape[::-1]])
    scaled = (boxes / size * cells).clamp(min=0).minimum(cells)
    outside = (boxes[:, 2:] < 0).any(1, keepdim=True)  # past the other borders the first cell is outside anyway
    first = torch.where(outside, cells[:2], scaled[:, :2].floor())
    return torch.cat((first, scaled[:, 2:].ceil()), 1).long()


def cell_weights(cells: Tensor) -> Tensor:
    """Return one over the number of cells that each box spans, (M,) in (0, 1], bit-identical to the published code.

    Args:
        cells: (M, 4) from `box_cells`.
    """
    width, height = (cells[:, 2:] + 1 - cells[:, :2]).clamp(min=1).float().unbind(1)
    return 1 / height / width


def paint(weights: Tensor, cells: Tensor, group: Tensor, groups: int, shape: tuple[int, int]) -> Tensor:
    """Paint the weight of each box over its cells. Where boxes of one group overlap, the largest weight stays.

    Args:
        weights: (M,), at least 0.
        cells: (M, 4) from `box_cells`.
        group: (M,) int64 in [0, groups): the canvas of each box, usually its image.
        groups: Number of canvases.
        shape: Height and width of the level in cells.

    Returns:
        (groups, H, W) in the dtype of `weights`, 0 outside boxes.
    """
    canvas = weights.new_zeros(groups, shape[0] * shape[1])
    y, x = (torch.arange(n, device=cells.device) for n in shape)
    chunk = max(1, BUDGET // canvas.shape[1])
    for w, c, g in zip(weights.split(chunk), cells.split(chunk), group.split(chunk), strict=True):
        x1, y1, x2, y2 = c[..., None].unbind(1)  # (M, 1) each
        rows = ((y >= y1) & (y <= y2)) * w[:, None]
        columns = ((x >= x1) & (x <= x2)).to(w)
        painted = (rows[:, :, None] * columns[:, None, :]).flatten(1)  # (M, H*W)
        canvas.scatter_reduce_(0, g[:, None].expand_as(painted), painted, "amax")
    return canvas.view(groups, *shape)
