"""Plain feature imitation: squared error of the whole map, or inside the objects' boxes."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from yolo_kd.losses.base import FeatureLoss
from yolo_kd.losses.kernels.channel_stats import standardising
from yolo_kd.losses.kernels.ops import EPS, same_shape
from yolo_kd.losses.kernels.squared_error import squared_error_sum
from yolo_kd.structures import LossInputs, Targets


def mimic(student: Tensor, teacher: Tensor, mask: Tensor | None = None, standardised: bool = False) -> Tensor:
    """Mean squared error over channels and the cells of a mask.

    L = Σ_{b,hw} m Σ_c (s - t)² / (C Σ_{b,hw} m)

    Args:
        student: (B, C, H, W), already at the teacher's width.
        teacher: (B, C, H, W); detached here.
        mask: (B, H, W) in [0, 1], None for all cells.
        standardised: Rescale each channel of both maps to mean 0 and variance 1 over the batch first.

    Returns:
        Scalar, at least 0; zero with gradient zero if the mask is empty.

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

    A box smaller than a cell still marks the cells that it touches. A box outside the image marks nothing.

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


class Mimic(FeatureLoss):
    """Squared error of the heads' input features, summed over levels.

    The hint loss of Romero et al., "FitNets", ICLR 2015, arXiv 1412.6550, equation 3, with a 1x1 convolution as the
    regressor and without a separate first stage. With `mask: boxes` only cells under an object count. That is the
    region of Chen et al., "Learning Efficient Object Detection Models with Knowledge Distillation", NeurIPS 2017, and
    of its successors that use boxes instead of proposals. One departure: both maps may be standardised first, as in
    DAMO-YOLO's mimic variant, because the raw error grows with the square of the teacher's activations.

    The term is a mean over channels and cells, which does not grow with batch size, width, image size or number of
    boxes.

    Args:
        mask: `none` for all cells, `boxes` for cells that a ground-truth box overlaps.
        standardise: Rescale each channel of both maps to mean 0 and variance 1 over the batch first. False is the
            published form; its strength depends on the teacher's activations, and under a COCO-trained YOLOv8s it is
            about 6 times weaker.
        levels: Levels to use, all by default.
    """

    name = "mimic"
    columns = ("mimic_loss",)
    reads = frozenset({"features", "targets"})
    adapter = "conv1x1"
    paper = "Romero et al. 2015, arXiv 1412.6550"

    mask: Literal["none", "boxes"] = "none"
    standardise: bool = True

    def level_loss(self, inputs: LossInputs, level: int) -> Tensor:
        """Return the squared error of one level."""
        student, teacher = self.maps(inputs, level)
        mask = None
        if self.mask == "boxes":
            assert inputs.targets is not None  # the distiller supplies everything that `reads` names
            mask = box_mask(inputs.targets, inputs.teacher.shapes[level])
        return mimic(student, teacher, mask, self.standardise)
