"""Ground-truth boxes painted onto the cells of a level, for the losses that tell objects from background.

Everything here is vectorised over boxes and images; memory stays bounded however many boxes a mosaic brings.
"""

from __future__ import annotations

import torch
from torch import Tensor

BUDGET = 2**24  # boxes * cells that are held at once; a usual batch at 640 px is a quarter of it


def box_cells(boxes: Tensor, image_size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Map boxes to the cells they touch: from the floor of the left and top to the ceiling of the right and bottom.

    That is FGD's mapping: the last cell counts in, so that a box of 16 px at stride 8 spans three cells each way when
    it is aligned with them, and a box that ends at the right or bottom border spans one cell that does not exist
    (`paint` leaves it out, `cell_weights` counts it). Where we depart: boxes are clipped to the image first, while
    negative coordinates would address the far side of the map in the published code; a box that lies outside the
    image covers nothing.

    Args:
        boxes: (M, 4) in pixels, xyxy.
        image_size: Height and width of the images in pixels.
        shape: Height and width of the level in cells.

    Returns:
        (M, 4) int64: first column, first row, last column, last row, inclusive. First cells lie in [0, W] and [0, H],
        last cells likewise.
    """
    boxes = boxes.float()
    size = boxes.new_tensor([*image_size[::-1], *image_size[::-1]])
    cells = boxes.new_tensor([*shape[::-1], *shape[::-1]])
    scaled = (boxes / size * cells).clamp(min=0).minimum(cells)
    outside = (boxes[:, 2:] < 0).any(1, keepdim=True)  # beyond the other border the first cell is outside by itself
    first = torch.where(outside, cells[:2], scaled[:, :2].floor())
    return torch.cat((first, scaled[:, 2:].ceil()), 1).long()


def cell_weights(cells: Tensor) -> Tensor:
    """Return one over the number of cells that each box spans, (M,) in (0, 1], to the last bit as published.

    Args:
        cells: (M, 4) of `box_cells`.
    """
    width, height = (cells[:, 2:] + 1 - cells[:, :2]).clamp(min=1).float().unbind(1)
    return 1 / height / width


def paint(values: Tensor, cells: Tensor, group: Tensor, groups: int, shape: tuple[int, int]) -> Tensor:
    """Paint a value over the cells of each box; where boxes of one group overlap, the largest value stays.

    Args:
        values: (M,) at least 0.
        cells: (M, 4) of `box_cells`.
        group: (M,) int64 in [0, groups): the canvas of each box, usually its image.
        groups: Number of canvases.
        shape: Height and width of the level in cells.

    Returns:
        (groups, H, W) in the dtype of `values`, 0 where no box is.
    """
    canvas = values.new_zeros(groups, shape[0] * shape[1])
    y, x = (torch.arange(n, device=cells.device) for n in shape)
    part = max(1, BUDGET // canvas.shape[1])
    for v, c, g in zip(values.split(part), cells.split(part), group.split(part), strict=True):
        x1, y1, x2, y2 = c[..., None].unbind(1)  # (M, 1) each
        rows = ((y >= y1) & (y <= y2)) * v[:, None]
        columns = ((x >= x1) & (x <= x2)).to(v)
        painted = (rows[:, :, None] * columns[:, None, :]).flatten(1)  # (M, H*W)
        canvas.scatter_reduce_(0, g[:, None].expand_as(painted), painted, "amax")
    return canvas.view(groups, *shape)
