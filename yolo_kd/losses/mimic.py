"""Plain feature imitation: squared error, of the whole map or inside the objects' boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from yolo_kd.errors import did_you_mean, listed
from yolo_kd.losses.base import LevelNames, Loss, check_levels
from yolo_kd.losses.kernels.channel_stats import standardising
from yolo_kd.losses.kernels.ops import EPS, same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs, Targets

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
STRENGTH = 1.0
MASKS = ("none", "boxes")


def mimic(student: Tensor, teacher: Tensor, mask: Tensor | None = None, standardised: bool = False) -> Tensor:
    """Mean squared error over channels and the cells that take part.

    L = Σ_{b,hw} m Σ_c (s - t)² / (C Σ_{b,hw} m)

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W); detached here.
        mask: (B, H, W) in [0, 1], None for all cells.
        standardised: Bring each channel of both maps to mean 0 and variance 1 over the batch first.

    Returns:
        Scalar, at least 0; zero with gradient zero where no cell takes part.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    if mask is not None:
        same_shape(mask=mask, cells=student[:, 0])

    scales = (standardising(student), standardising(teacher)) if standardised else None
    cells = student[:, 0].numel() if mask is None else mask.sum() + EPS
    return squared_error_sum(student, teacher, mask, scales) / (student.shape[1] * cells)


def box_mask(targets: Targets, shape: tuple[int, int]) -> Tensor:
    """Mark the cells that any ground-truth box of their image overlaps.

    A box smaller than a cell still marks the cells that it touches; what lies outside the image marks nothing.

    Args:
        targets: Ground truth, boxes in pixels.
        shape: Height and width of the level in cells.

    Returns:
        (B, H, W) float32, zero or one.
    """
    (h, w), (height, width) = shape, targets.image_size
    x1, y1, x2, y2 = targets.boxes.detach().float().unbind(-1)  # (M,) each
    column = torch.arange(w, device=x1.device)
    row = torch.arange(h, device=x1.device)
    in_column = (x1[:, None] * w / width < column + 1) & (x2[:, None] * w / width > column)  # (M, W)
    in_row = (y1[:, None] * h / height < row + 1) & (y2[:, None] * h / height > row)  # (M, H)
    of_image = targets.image_index[:, None] == torch.arange(targets.batch_size, device=x1.device)  # (M, B)
    image_row = (of_image[:, :, None] & in_row[:, None]).flatten(1).float()  # (M, B * H)
    covering = image_row.t() @ in_column.float()  # number of boxes over each cell
    return (covering > 0).float().unflatten(0, (targets.batch_size, h))


class Mimic(Loss):
    """Squared error of the head's input features, summed over levels.

    The hint loss of Romero et al., "FitNets", ICLR 2015, arXiv 1412.6550, equation 3, with a 1x1 convolution as the
    regressor and no separate first stage. With `mask: boxes` only cells under an object count, the region of Chen et
    al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017, and of its successors
    that use boxes in place of proposals. Where we depart: both maps may be standardised first, as DAMO-YOLO's mimic
    variant does, because the raw error grows with the square of the teacher's activations.

    It is a mean over channels and cells, so it grows with neither batch, width, image size nor number of boxes; weight
    1.0 multiplies it by `STRENGTH` only.

    Args:
        mask: `none` for all cells, `boxes` for those that a ground-truth box overlaps.
        standardise: Bring each channel of both maps to mean 0 and variance 1 over the batch first. False is the
            published form; its strength depends on the teacher's activations, and under a COCO-trained YOLOv8s it is
            about 6 times weaker.
        levels: Levels to use, all by default.
    """

    name = "mimic"
    columns = ("mimic_loss",)
    reads = frozenset({"features", "targets"})
    adapter = "conv1x1"
    paper = "Romero et al. 2015, arXiv 1412.6550"

    def __init__(
        self, *, mask: Literal["none", "boxes"] = "none", standardise: bool = True, levels: LevelNames | None = None
    ):
        super().__init__()
        if mask not in MASKS:
            raise ValueError(f"mask must be {listed(MASKS)}, received {mask!r}.{did_you_mean(mask, MASKS)}")
        self.mask = mask
        self.standardise = standardise
        self.level_names = check_levels(levels)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return the one term."""
        terms = []
        for i in self.levels:
            student, teacher = step.aligned("conv1x1", i, as_is=True), step.teacher_feature(i, as_is=True)
            mask = None
            if self.mask == "boxes":
                assert step.targets is not None, "the loss reads targets, but the step has none"
                mask = box_mask(step.targets, (teacher.shape[-2], teacher.shape[-1]))
            terms.append(mimic(student, teacher, mask, self.standardise))
        return {"mimic_loss": STRENGTH * torch.stack(terms).sum()}
