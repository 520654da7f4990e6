"""Fine-grained feature imitation near objects (Wang et al., 2019)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from yolo_kd.losses.base import AboveZero, FeatureLoss
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs, PairSpec, Targets

INIT_STD = 0.01
CHUNK = 2**24  # overlaps in memory at once, 64 MiB of float32


class Anchors(NamedTuple):
    """K boxes around each cell of an (H, W) map, in pixels. The grid is regular, so that rows and columns define it.

    Attributes:
        x: Left and right edges per column, (W, K, 2).
        y: Top and bottom edges per row, (H, K, 2).
    """

    x: Tensor
    y: Tensor


def grid_anchors(
    shape: tuple[int, int], stride: int, scale: float, ratios: Sequence[float], device: torch.device | None = None
) -> Anchors:
    """Return anchors with area (scale * stride)² and the given ratios of height to width, centred on the cells.

    Args:
        shape: Height and width of the map, in cells.
        stride: Pixels per cell.
        scale: Side of the square anchor in cells.
        ratios: Height over width, each above zero.
        device: Device of the result.
    """
    root = torch.tensor([math.sqrt(r) for r in ratios], device=device)
    half = scale * stride / 2

    def spans(cells: int, sides: Tensor) -> Tensor:
        centres = (torch.arange(cells, device=device) + 0.5) * stride
        return torch.stack([centres[:, None] - sides, centres[:, None] + sides], dim=-1)

    return Anchors(spans(shape[1], half / root), spans(shape[0], half * root))


def anchor_overlaps(anchors: Anchors, boxes: Tensor, legacy: bool = False) -> Tensor:
    """Intersection over union of every anchor with every box.

    Args:
        anchors: K per cell of an (H, W) map.
        boxes: (M, 4) xyxy pixels.
        legacy: Include the border pixel, so that a side is x2 - x1 + 1, as in the published code.

    Returns:
        (M, H, W, K) in [0, 1], zero for boxes without area.
    """
    one = float(legacy)
    (left, right), (top, bottom) = anchors.x.unbind(-1), anchors.y.unbind(-1)
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    width = (torch.minimum(right, x2) - torch.maximum(left, x1) + one).clamp(min=0)  # (M, W, K)
    height = (torch.minimum(bottom, y2) - torch.maximum(top, y1) + one).clamp(min=0)  # (M, H, K)
    overlap = height[:, :, None] * width[:, None]
    area = (bottom - top + one)[:, None] * (right - left + one)
    box_area = (x2 - x1 + one).clamp(min=0) * (y2 - y1 + one).clamp(min=0)
    return overlap / (area + box_area[..., None] - overlap)


def imitation_hits(
    grids: Sequence[Anchors],
    boxes: Tensor,
    image_index: Tensor,
    batch_size: int,
    psi: float = 0.5,
    legacy: bool = False,
    chunk: int = CHUNK,
) -> tuple[Tensor, ...]:
    """Count in each cell the pairs of anchor and box that fit nearly as well as the box's best anchor.

    An anchor counts for a box if IoU > ψ · max IoU of that box (section 3.2). The maximum covers all the given grids.
    With one grid it is the paper's; with the levels of a pyramid it keeps each box on the levels of its scale. Every
    cell with a count is imitated, so that the masks of all boxes are united.

    Args:
        grids: Anchors of one or more maps.
        boxes: (M, 4) xyxy pixels.
        image_index: (M,) image of each box.
        batch_size: Number of images, B.
        psi: ψ in [0, 1).
        legacy: See `anchor_overlaps`.
        chunk: Overlaps in memory at once; it does not change the results.

    Returns:
        (B, H, W) int32 per grid.
    """
    shapes = [(len(g.y), len(g.x)) for g in grids]
    counts = tuple(boxes.new_zeros((batch_size, *shape), dtype=torch.int32) for shape in shapes)
    anchors = sum(h * w * g.x.shape[1] for (h, w), g in zip(shapes, grids, strict=True))
    for rows in torch.arange(len(boxes), device=boxes.device).split(max(chunk // anchors, 1)):
        overlaps = [anchor_overlaps(grid, boxes[rows], legacy) for grid in grids]
        best = torch.stack([o.flatten(1).amax(1) for o in overlaps]).amax(0)
        for count, overlap in zip(counts, overlaps, strict=True):
            hits = overlap > (psi * best)[:, None, None, None]
            count.index_add_(0, image_index[rows], hits.sum(-1, dtype=torch.int32))
    return counts


def masked_error(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error, summed over channels and the cells of a mask.

    Args:
        student: (B, C, H, W), already adapted.
        teacher: (B, C, H, W); detached here.
        mask: (B, H, W) bool, or the number of times that each cell counts.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    same_shape(mask=mask, cells=teacher[:, 0])
    return squared_error_sum(student, teacher, mask)


def imitation_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Squared error near objects as published, for one map (equation 1, without λ).

    L = Σ_mask Σ_c (t − s)² / (2 N_p), with N_p the cells of the mask over the batch

    It equals the authors' code, except that it is 0 for an empty mask, where theirs is nan.

    Args:
        student: (B, C, H, W), already adapted.
        teacher: (B, C, H, W).
        mask: (B, H, W) bool.

    Returns:
        Scalar, at least 0; it grows with C.

    Raises:
        ValueError: If shapes differ.
    """
    return masked_error(student, teacher, mask) / (2 * mask.sum().clamp(min=1))


class FGFI(FeatureLoss):
    """Fine-grained feature imitation: the student's features follow the teacher's where anchors fit objects.

    Wang et al., "Distilling Object Detectors with Fine-grained Feature Imitation", CVPR 2019, arXiv 1906.03609,
    section 3. L = Σ_l Σ_mask Σ_c (T_l − adapter(S_l))² / C_l / (2 Σ_l N_l), where N_l is the number of mask cells of
    level l over the batch; 0 if the batch has no object. Departures:

    - Heads since YOLOv8 have no anchors. Squares of `anchor_scale` cells and rectangles of the same area replace them.
    - The paper has one map. Here the best overlap of a box is its best on all levels of the pyramid, so that a box is
      imitated on the levels that detect its scale, and one N_p serves all levels.
    - The loss is divided by the channels: on one level the published λ of 0.01 is a weight of 0.01 · C / `strength`.
    - The adapter (3x3 convolution, ReLU) starts with a standard deviation of 0.01 instead of 1e-4, with which no
      gradient would reach the student at first, and runs in the precision of the student's layers. The published 400
      steps without imitation are a `warmup` in the schedule.
    - IoU without the legacy pixel; boxes are clipped to the image.

    Args:
        psi: ψ, share of the best overlap above which an anchor counts, in [0, 1). Smaller means a wider region.
        anchor_scale: Side of the square anchor in cells of its level, above 0.
        anchor_ratios: Heights over widths of the anchors, each above 0.
        levels: Levels to imitate, all by default. Masks do not depend on it.
    """

    name = "fgfi"
    columns = ("fgfi_loss",)
    reads = frozenset({"features", "targets"})
    paper = "Wang et al. 2019, arXiv 1906.03609"
    strength = 50.0

    psi: Annotated[float, Field(ge=0, lt=1)] = 0.5
    anchor_scale: AboveZero = 4.0
    anchor_ratios: Annotated[Sequence[AboveZero], Field(min_length=1)] = (0.5, 1.0, 2.0)

    def build(self, pair: PairSpec) -> None:
        """Make one adapter for each level."""
        super().build(pair)
        self.adapters = nn.ModuleList()
        for i in self.level_indices:
            conv = nn.Conv2d(pair.student_channels[i], pair.teacher_channels[i], 3, padding=1)
            nn.init.normal_(conv.weight, std=INIT_STD)
            self.adapters.append(nn.Sequential(conv, nn.ReLU()))

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the only term, over all levels."""
        key = ("imitation", self.psi, self.anchor_scale, *self.anchor_ratios)
        masks = inputs.once(key, lambda: self._masks(inputs))
        errors = []
        for adapter, i in zip(self.adapters, self.level_indices, strict=True):
            teacher = inputs.teacher_feature(i)
            student = inputs.layer(adapter, inputs.student.features[i])
            errors.append(masked_error(student, teacher, masks[i]) / teacher.shape[1])
        cells = torch.stack([masks[i].sum() for i in self.level_indices]).sum()
        return {"fgfi_loss": self.strength * torch.stack(errors).sum() / (2 * cells.clamp(min=1))}

    def _masks(self, inputs: LossInputs) -> list[Tensor]:
        """Return the cells near objects on every level, (B, H, W) bool each."""
        targets = inputs.targets
        assert isinstance(targets, Targets)  # the distiller supplies everything that `reads` names
        t = inputs.teacher
        device = targets.boxes.device
        grids = [
            grid_anchors(shape, stride, self.anchor_scale, self.anchor_ratios, device)
            for shape, stride in zip(t.shapes, t.strides, strict=True)
        ]
        boxes = targets.clipped_boxes
        hits = imitation_hits(grids, boxes, targets.image_index, targets.batch_size, self.psi)
        return [count > 0 for count in hits]
