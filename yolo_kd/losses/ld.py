"""Localisation distillation on distance distributions, with the valuable localisation region (LD, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from yolo_kd.losses.base import AboveZero, AtLeastZero, Loss
from yolo_kd.losses.kernels.ops import assigned, box_distributions, categorical_kl, same_shape, weighted_mean
from yolo_kd.structures import LossInputs

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
MAIN_STRENGTH = 1.0
VLR_STRENGTH = 2.0

ANCHOR_CELLS = 8  # side of a reference box in cells: the square anchor of the paper's detector
CANDIDATES = 9  # reference boxes per level and object that set the threshold
LOWER = 0.25  # lower limit of the region as a fraction of the threshold


def localisation_kl(student: Tensor, teacher: Tensor, temperature: float = 10.0) -> Tensor:
    """Divergence of the student's distribution from the teacher's, as the published code reduces it.

    T² · KL(softmax(t / T) ‖ softmax(s / T)), averaged over the bins   (localisation distillation)

    Args:
        student: (..., bins) logits, with gradient.
        teacher: (..., bins) logits; detached here.
        temperature: T, above zero.

    Returns:
        (...), at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    return categorical_kl(student, teacher, temperature) / student.shape[-1]


def reference_boxes(shapes: Sequence[tuple[int, int]], strides: Sequence[int], like: Tensor) -> Tensor:
    """Return a square box for each point, 8 cells of its level wide and centred on it, (A, 4) xyxy in pixels.

    Args:
        shapes: Height and width of each level.
        strides: Pixels per cell of each level.
        like: Floating-point tensor with the device and dtype of the result.
    """
    levels = []
    for (h, w), stride in zip(shapes, strides, strict=True):
        y = (torch.arange(h, device=like.device, dtype=like.dtype) + 0.5) * stride
        x = (torch.arange(w, device=like.device, dtype=like.dtype) + 0.5) * stride
        centre = torch.stack((x.repeat(h), y.repeat_interleave(w)), -1)
        half = ANCHOR_CELLS * stride / 2
        levels.append(torch.cat((centre - half, centre + half), -1))
    return torch.cat(levels)


def region_overlap(anchors: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return how each reference box overlaps each object.

    Args:
        anchors: (A, 4) xyxy in pixels.
        boxes: (M, 4) xyxy in pixels.

    Returns:
        The IoU, the squared distance of centres, and the measure that the published code names DIoU: the overlap as a
        fraction of the reference box, less the squared distance of centres over the squared diagonal of the hull.
        (M, A) each.
    """
    a, b = anchors[None], boxes[:, None]
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    iou = overlap / (area_a + area_b - overlap).clamp(min=1e-6)
    centres = ((a[..., :2] + a[..., 2:] - b[..., :2] - b[..., 2:]) / 2).square().sum(-1)
    diagonal = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).square().sum(-1)
    return iou, centres, overlap / area_a.clamp(min=1e-6) - centres / diagonal.clamp(min=1e-6)


def valuable_region(
    anchors: Tensor, level_sizes: Sequence[int], boxes: Tensor, image_index: Tensor, batch_size: int
) -> Tensor:
    """Weights of the valuable localisation region: points around an object that are nearly positive.

    The threshold θ of an object is the mean plus the standard deviation of its candidates' IoU; the candidates are the
    9 reference boxes of each level with the nearest centres (the rule of ATSS). Points with 0.25 θ ≤ d < θ form the
    region, with d from `region_overlap`, the measure that the published code names DIoU. The weight of a point is its
    IoU with the object; where regions overlap, the largest one.

    The (M, A) matrices of all objects of the batch are in memory at once: with 8400 points and 500 objects, 17 MB each.

    Args:
        anchors: (A, 4) reference boxes, xyxy in pixels, level by level.
        level_sizes: Points of each level.
        boxes: (M, 4) objects of all images, xyxy in pixels. M may be zero.
        image_index: (M,) image of each object, int64.
        batch_size: B.

    Returns:
        (B, A) in [0, 1], zero outside the region.

    Raises:
        ValueError: If the numbers of points and reference boxes, or of objects and image indices, differ.
    """
    if sum(level_sizes) != len(anchors):
        raise ValueError(f"level_sizes {tuple(level_sizes)} must sum to the length of anchors {tuple(anchors.shape)}")
    same_shape(image_index=image_index, boxes=boxes[:, 0])
    iou, centres, closeness = region_overlap(anchors, boxes)
    candidates = []
    for near, level in zip(centres.sqrt().split(list(level_sizes), 1), iou.split(list(level_sizes), 1), strict=True):
        index = near.topk(min(CANDIDATES, near.shape[1]), dim=1, largest=False).indices
        candidates.append(level.gather(1, index))
    overlaps = torch.cat(candidates, 1)
    mean = overlaps.mean(1, keepdim=True)
    variance = (overlaps - mean).square().sum(1, keepdim=True) / max(overlaps.shape[1] - 1, 1)
    threshold = mean + variance.sqrt()
    weight = iou * ((closeness >= LOWER * threshold) & (closeness < threshold))
    index = image_index[:, None].expand_as(weight)
    return weight.new_zeros(batch_size, len(anchors)).scatter_reduce(0, index, weight, "amax")


class LD(Loss):
    """Localisation distillation on positives and on the valuable localisation region.

    Zheng et al., "Localization Distillation for Dense Object Detection", CVPR 2022, arXiv 2102.12252, the sections on
    localisation distillation and on the valuable localisation region. Departures from the published code:

    - Positives come from the task loss's label assignment. They weigh their target score instead of the student's
      confidence, which an untrained student does not have.
    - Each term is divided by the sum of its weights, because the code's fixed divisors 4 and 16 let it grow with the
      number of objects. It is summed over the bins, like the paper's equation, so that it does not depend on their
      number.
    - Points lie in the middle of cells, as in YOLO, and so do the reference boxes of the region.
    - There is no class term: the paper's softmax over classes does not match heads of independent sigmoids, and is
      constant for a single class. `bckd` has a class term that matches.

    As in the code, the region may share points with the positives. Without objects both terms are zero.

    Args:
        temperature: T of both softmaxes, above 0.
        lam_main: Strength on the positives, at least 0; 0.25 in the paper.
        lam_vlr: Strength on the valuable region, at least 0; 0.25 in the paper.
    """

    name = "ld"
    columns = ("kld_loss", "kvlr_loss")
    reads = frozenset({"boxes", "targets", "assignment"})
    paper = "Zheng et al. 2022, arXiv 2102.12252"
    needs_bins = True
    instead = "bckd"

    temperature: AboveZero = 10.0
    lam_main: AtLeastZero = 0.25
    lam_vlr: AtLeastZero = 0.25

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the term of the positives and the term of the valuable region."""
        student, teacher = box_distributions(inputs)
        rows = inputs.student.reg_max * localisation_kl(student, teacher, self.temperature).mean(-1)  # (B, A)
        main = weighted_mean(rows, assigned(inputs).scores.float().amax(-1))
        vlr = weighted_mean(rows, inputs.once("valuable region", lambda: self._region(inputs)))
        return {
            "kld_loss": MAIN_STRENGTH * self.lam_main * main,
            "kvlr_loss": VLR_STRENGTH * self.lam_vlr * vlr,
        }

    @staticmethod
    def _region(inputs: LossInputs) -> Tensor:
        """Return the weights of the valuable region, (B, A)."""
        student, targets = inputs.student, inputs.targets
        assert targets is not None  # `assigned` has run
        boxes = targets.boxes.float()
        anchors = reference_boxes(student.shapes, student.strides, boxes)
        return valuable_region(anchors, student.level_sizes, boxes, targets.image_index, targets.batch_size)
