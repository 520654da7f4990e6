"""Semantic-aware alignment (2022): features aligned by class, centre, edge and background over the whole batch."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from yolo_kd.losses.base import AboveZero, AtLeastZero, LevelNames, Loss, check_levels, check_range
from yolo_kd.losses.kernels.layout import channels_innermost
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.sea_alignment import cell_alignment
from yolo_kd.structures import LossInputs, Targets

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
CAD_GAIN = 14.0
TDD_GAIN = 14.0
LDA_GAIN = 14.0

CHUNK = 2**24  # cells of box masks held at once
FEW_CLASSES = 128  # up to here a GPU handles classes that do not occur faster than it answers which do


def covered_cells(
    boxes: Tensor, slot: Tensor, slots: int, shape: tuple[int, int], stride: int, chunk: int = CHUNK
) -> Tensor:
    """Mark the cells that boxes overlap, in one plane for each group of boxes.

    A cell belongs to a box when they share some area, so that even the smallest object has a cell on every level; a box
    without an area has none.

    Args:
        boxes: (M, 4) xyxy pixels.
        slot: (M,) plane of each box, int64 in [0, slots).
        slots: Number of planes.
        shape: Height and width of the level, in cells.
        stride: Pixels per cell.
        chunk: Cells to hold in memory at once; results do not depend on it.

    Returns:
        (slots, H, W) bool.
    """
    height, width = shape
    left, top = (torch.arange(n, device=boxes.device) * stride for n in (width, height))
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    columns = ((x1 < left + stride) & (x2 > left) & (x2 > x1)).float()  # (M, W)
    rows = ((y1 < top + stride) & (y2 > top) & (y2 > y1)).float()  # (M, H)
    count = torch.zeros((slots, height, width), device=boxes.device)
    for part in torch.arange(len(boxes), device=boxes.device).split(max(chunk // (height * width), 1)):
        count.index_add_(0, slot[part], rows[part][:, :, None] * columns[part][:, None])
    return count > 0


def semantic_masks(
    boxes: Tensor,
    labels: Tensor,
    image_index: Tensor,
    classes: int,
    batch_size: int,
    shape: tuple[int, int],
    stride: int,
    shrink: float,
) -> Tensor:
    """Sort cells into categories: the centre and the edge of each class, and background.

    The centre of a class is what its boxes cover once shrunk about their middles, its edge is the rest of them. A cell
    may belong to several classes; background belongs to none.

    Args:
        boxes: (M, 4) xyxy pixels.
        labels: (M,) int64 in [0, classes).
        image_index: (M,) image of each box.
        classes: Number of classes, K.
        batch_size: Number of images, B.
        shape: Height and width of the level, in cells.
        stride: Pixels per cell.
        shrink: Share of a box's sides that its centre keeps, in (0, 1].

    Returns:
        (B, 2 * K + 1, H, W) bool: K centres, K edges, background.
    """
    slot, slots = image_index * classes + labels, batch_size * classes
    middle, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2 * shrink
    shrunk = torch.cat([middle - half, middle + half], dim=1)
    both = covered_cells(torch.cat([boxes, shrunk]), torch.cat([slot, slot + slots]), 2 * slots, shape, stride)
    whole, centre = both.view(2, batch_size, classes, *shape)
    background = ~whole.any(dim=1, keepdim=True)
    return torch.cat([centre, whole & ~centre, background], dim=1)


class Categories(NamedTuple):
    """The categories that the cells of a level belong to, listed image by image: few of all P occur in any one image.

    Attributes:
        masks: (B, Q, H, W), 1 in the cells of each category that occurs in the image and 0 elsewhere.
        which: (B, Q) int64 in [0, P), the categories' numbers; those without a cell may be any.
        cells: (P,) number of cells in the batch.
    """

    masks: Tensor
    which: Tensor
    cells: Tensor


def count_cells(masks: Tensor, which: Tensor, categories: int) -> Categories:
    """Return the categories with their number of cells.

    Args:
        masks: (B, Q, H, W) bool.
        which: (B, Q) int64 in [0, P).
        categories: P.
    """
    masks = masks.float()
    cells = masks.new_zeros(categories).index_add_(0, which.flatten(), masks.sum((2, 3)).flatten())
    return Categories(masks, which, cells)


def category_anchors(feature: Tensor, categories: Categories, dtype: torch.dtype | None = None) -> Tensor:
    """Return the mean feature of each category over all cells of all images: a_p = Σ M_p F / Σ M_p.

    Args:
        feature: (B, C, H, W).
        categories: P categories.
        dtype: Precision of the matrix product, which sums up in float32 at least; that of `feature` by default.

    Returns:
        (P, C), float32 at least, zero for categories without a cell.
    """
    masks, which, cells = categories
    dtype = dtype or feature.dtype
    flat, masks = feature.flatten(2).to(dtype), masks.to(dtype).flatten(2)
    # (B, Q, C), the way round in which the gradient lies in memory as the feature does
    sums = masks @ flat.mT if channels_innermost(flat) else (flat @ masks.mT).mT
    sums = sums.to(torch.promote_types(dtype, torch.float32)).flatten(0, 1)
    pooled = sums.new_zeros(len(cells), feature.shape[1]).index_add(0, which.flatten(), sums)
    return pooled / cells.clamp(min=1)[:, None]


def anchor_distillation(student: Tensor, teacher: Tensor, present: Tensor) -> Tensor:
    """Category anchor distillation (CAD): mean over present categories and channels of (a^S − a^T)².

    Args:
        student: (P, C) anchors.
        teacher: (P, C) anchors; detached here.
        present: (P,) bool, categories with a cell.

    Returns:
        Scalar, at least 0.

    Raises:
        ValueError: If shapes differ.
    """
    same_shape(student=student, teacher=teacher)
    error = (student - teacher.detach()).square().mean(1)
    return (error * present).sum() / present.sum().clamp(min=1)


class SEA(Loss):
    """Semantic-aware alignment: category anchors, distances to them, and where each channel responds.

    arXiv 2203.00862. **Reconstructed**: no code is public and its formulas and coefficients were not at hand. The paper
    gives: three losses beside the task's, on anchors of each class and of background pooled over all images of the
    batch, on the distribution of distances to them (τ₁) and on localisation (τ₂), temperatures that matter little from
    0.01 to 5, no parameters besides. Ours are: centres as boxes shrunk to half their sides and cells counted by any
    overlap; squared error as the anchors' distance; cosine as the distance to them; student anchors with gradient;
    softmax over space per channel as localisation; the factor τ²; all means; and all strengths.

    A departure by choice: the paper acts on the convolutions of both head branches. Teacher and student towers differ
    in width and depth there, so all three terms act on the features that the head receives, the student's aligned by a
    1x1 convolution. Means over levels, so that strength does not depend on their number. Anchors are those of the
    images on one device.

    Args:
        alpha: Strength of category anchor distillation, at least 0.
        beta: Strength of topological distance distillation, at least 0.
        gamma: Strength of localisation distribution alignment, at least 0.
        tau1: Temperature of the distances, above 0.
        tau2: Temperature over space, above 0.
        shrink: Share of a box's sides that its centre keeps, in (0, 1].
        levels: Levels to use, all by default.
    """

    name = "sea"
    columns = ("kcad_loss", "ktdd_loss", "klda_loss")
    reads = frozenset({"features", "targets"})
    adapter = "conv1x1"
    paper = "SEA, 2022, arXiv 2203.00862 (reconstructed)"

    def __init__(
        self,
        *,
        alpha: AtLeastZero = 1.0,
        beta: AtLeastZero = 1.0,
        gamma: AtLeastZero = 1.0,
        tau1: AboveZero = 0.5,
        tau2: AboveZero = 1.0,
        shrink: Annotated[float, Field(gt=0, le=1)] = 0.5,
        levels: LevelNames | None = None,
    ):
        super().__init__()
        self.alpha = check_range("alpha", alpha, 0)
        self.beta = check_range("beta", beta, 0)
        self.gamma = check_range("gamma", gamma, 0)
        self.tau1 = check_range("tau1", tau1, 0, above=True)
        self.tau2 = check_range("tau2", tau2, 0, above=True)
        self.shrink = check_range("shrink", shrink, 0, 1, above=True)
        self.level_names = check_levels(levels)

    def forward(self, step: LossInputs) -> dict[str, Tensor]:
        """Return the three terms, means over levels."""
        categories = step.once(("semantic masks", self.shrink), lambda: self._categories(step))
        cad, tdd, lda = [], [], []
        for i in self.levels:
            s, t = step.aligned("conv1x1", i, as_is=True), step.teacher_feature(i, as_is=True)
            same_shape(student=s, teacher=t)
            present = categories[i].cells > 0
            # maps that come in bfloat16 gain nothing from products in float32; sums of cells would overflow in float16
            dtype = torch.promote_types(s.dtype, torch.bfloat16)
            anchors = category_anchors(s, categories[i], dtype), category_anchors(t, categories[i], dtype)
            cad.append(anchor_distillation(*anchors, present))
            alignment = cell_alignment(s, t, anchors, present, self.tau1, self.tau2, dtype)
            tdd.append(alignment[0])
            lda.append(alignment[1])
        return {
            "kcad_loss": CAD_GAIN * self.alpha * torch.stack(cad).mean(),
            "ktdd_loss": TDD_GAIN * self.beta * torch.stack(tdd).mean(),
            "klda_loss": LDA_GAIN * self.gamma * torch.stack(lda).mean(),
        }

    def _categories(self, step: LossInputs) -> list[Categories]:
        """Return the categories of every level's cells."""
        targets = step.targets
        assert isinstance(targets, Targets)  # the distiller supplies what `reads` names
        classes = step.student.scores.shape[-1]
        numbered = _all_classes if _takes_all(targets.boxes.device.type, classes) else _occurring
        slot, which, total = numbered(targets, classes)
        index = torch.cat([which, total + which, which.new_full((targets.batch_size, 1), 2 * total)], dim=1)
        boxes, image, t = targets.clipped_boxes, targets.image_index, step.teacher
        most = which.shape[1]
        return [
            count_cells(
                semantic_masks(boxes, slot, image, most, targets.batch_size, shape, stride, self.shrink),
                index,
                2 * total + 1,
            )
            for shape, stride in zip(t.shapes, t.strides, strict=True)
        ]


def _takes_all(device: str, classes: int) -> bool:
    """Return whether maps of all classes cost less than asking which of them occur: on a CPU nothing waits."""
    return device != "cpu" and classes <= FEW_CLASSES


def _occurring(targets: Targets, _classes: int) -> tuple[Tensor, Tensor, int]:
    """Number the classes that occur, in each image apart; the host waits for the answer.

    Returns:
        The number of each box's class within its image, (M,); the class of each number, (B, Q); classes in the batch.
    """
    classes, labels = targets.labels.unique(return_inverse=True)
    total = len(classes)
    found, row = (targets.image_index * total + labels).unique(return_inverse=True)
    image_of, class_of = found // max(total, 1), found % max(total, 1)
    first = torch.searchsorted(found, torch.arange(targets.batch_size, device=found.device) * total)
    rank = torch.arange(len(found), device=found.device) - first[image_of]
    which = found.new_zeros(targets.batch_size, int(rank.max()) + 1 if len(found) else 0)
    which[image_of, rank] = class_of
    return rank[row], which, total


def _all_classes(targets: Targets, classes: int) -> tuple[Tensor, Tensor, int]:
    """Do the same with every class of the model, without asking the device which of them occur."""
    labels = targets.labels
    return labels, torch.arange(classes, device=labels.device).expand(targets.batch_size, -1), classes
