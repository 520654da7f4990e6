"""Semantic-aware alignment (2022): features aligned by class, centre, edge and background over the whole batch."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from yolo_kd.losses.base import AboveZero, AtLeastZero, FeatureLoss
from yolo_kd.losses.kernels.layout import channels_innermost
from yolo_kd.losses.kernels.ops import same_shape
from yolo_kd.losses.kernels.sea_alignment import cell_alignment
from yolo_kd.structures import LossInputs, Targets

# weight 1.0: the gradient into the neck is about a third of the task loss's (table and command in docs/losses.md)
CAD_GAIN = 14.0
TDD_GAIN = 14.0
LDA_GAIN = 14.0

CHUNK = 2**24  # cells of box masks in memory at once
FEW_CLASSES = 128  # up to this number a GPU computes with absent classes faster than it answers which are present


def covered_cells(
    boxes: Tensor, slot: Tensor, slots: int, shape: tuple[int, int], stride: int, chunk: int = CHUNK
) -> Tensor:
    """Mark the cells that boxes overlap, in one plane for each group of boxes.

    A cell belongs to a box if they share some area, so that even the smallest object has a cell on every level. A box
    without area has none.

    Args:
        boxes: (M, 4) xyxy pixels.
        slot: (M,) plane of each box, int64 in [0, slots).
        slots: Number of planes.
        shape: Height and width of the level, in cells.
        stride: Pixels per cell.
        chunk: Cells in memory at once; it does not change the results.

    Returns:
        (slots, H, W) bool.
    """
    height, width = shape
    left, top = (torch.arange(n, device=boxes.device) * stride for n in (width, height))
    x1, y1, x2, y2 = boxes[:, :, None].unbind(1)
    columns = ((x1 < left + stride) & (x2 > left) & (x2 > x1)).float()  # (M, W)
    rows = ((y1 < top + stride) & (y2 > top) & (y2 > y1)).float()  # (M, H)
    count = torch.zeros((slots, height, width), device=boxes.device)
    for some in torch.arange(len(boxes), device=boxes.device).split(max(chunk // (height * width), 1)):
        count.index_add_(0, slot[some], rows[some][:, :, None] * columns[some][:, None])
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

    The centre of a class is the area of its boxes after they shrink about their middles; its edge is the rest of the
    boxes. A cell may belong to several classes. A background cell belongs to none.

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
    """The categories of a level's cells, listed image by image, because few of all P categories occur in one image.

    Attributes:
        masks: (B, Q, H, W), 1 in the cells of each category that occurs in the image and 0 elsewhere.
        which: (B, Q) int64 in [0, P), the numbers of the categories; any number for a category without a cell.
        cells: (P,) number of cells of each category in the batch.
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
        dtype: Precision of the matrix product, which adds up in float32 or better; that of `feature` by default.

    Returns:
        (P, C), float32 or better, zero for categories without a cell.
    """
    masks, which, cells = categories
    dtype = dtype or feature.dtype
    flat, masks = feature.flatten(2).to(dtype), masks.to(dtype).flatten(2)
    # (B, Q, C), in the order that gives the gradient the memory format of the feature
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


class SEA(FeatureLoss):
    """Semantic-aware alignment: category anchors, distances to them, and where each channel responds.

    arXiv 2203.00862. **Reconstructed**: no code is public, and its formulas and coefficients were not available.

    The paper gives three losses in addition to the task loss: one on anchors of each class and of background, pooled
    over all images of the batch, one on the distribution of distances to the anchors (τ₁), and one on localisation
    (τ₂). The temperatures matter little from 0.01 to 5, and there are no other parameters.

    This reconstruction chooses: centres as boxes shrunk to half their sides, and cells counted by any overlap; squared
    error between anchors; cosine as the distance to them; student anchors with gradient; softmax over space per channel
    as localisation; the factor τ²; all means; and all strengths.

    Departures:

    - The paper acts on the convolutions of both head branches. There the towers of teacher and student differ in width
      and depth, so that all three terms act on the input features of the head, the student's aligned by a 1x1
      convolution.
    - Terms are means over levels, so that the strength does not depend on their number.
    - Anchors span the images on one device.

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

    alpha: AtLeastZero = 1.0
    beta: AtLeastZero = 1.0
    gamma: AtLeastZero = 1.0
    tau1: AboveZero = 0.5
    tau2: AboveZero = 1.0
    shrink: Annotated[float, Field(gt=0, le=1)] = 0.5

    def forward(self, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the three terms, averaged over levels."""
        categories = inputs.once(("semantic masks", self.shrink), lambda: self._categories(inputs))
        terms = [self._terms(*self.maps(inputs, level), categories[level]) for level in self.level_indices]
        cad, tdd, lda = (torch.stack(term).mean() for term in zip(*terms, strict=True))
        return {
            "kcad_loss": CAD_GAIN * self.alpha * cad,
            "ktdd_loss": TDD_GAIN * self.beta * tdd,
            "klda_loss": LDA_GAIN * self.gamma * lda,
        }

    def _terms(self, student: Tensor, teacher: Tensor, categories: Categories) -> tuple[Tensor, ...]:
        """Return the three terms of one level."""
        same_shape(student=student, teacher=teacher)
        present = categories.cells > 0
        # bfloat16 maps gain nothing from float32 products. Sums of cells would overflow in float16.
        dtype = torch.promote_types(student.dtype, torch.bfloat16)
        anchors = category_anchors(student, categories, dtype), category_anchors(teacher, categories, dtype)
        cad = anchor_distillation(*anchors, present)
        return cad, *cell_alignment(student, teacher, anchors, present, self.tau1, self.tau2, dtype)

    def _categories(self, inputs: LossInputs) -> list[Categories]:
        """Return the categories of the cells of every level."""
        targets = inputs.targets
        assert isinstance(targets, Targets)  # the distiller supplies everything that `reads` names
        classes = inputs.student.scores.shape[-1]
        numbered = _all_classes if _takes_all(targets.boxes.device.type, classes) else _occurring
        slot, which, total = numbered(targets, classes)
        index = torch.cat([which, total + which, which.new_full((targets.batch_size, 1), 2 * total)], dim=1)
        boxes, image, t = targets.clipped_boxes, targets.image_index, inputs.teacher
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
    """Return whether maps of all classes cost less than asking which classes occur. A CPU need not wait."""
    return device != "cpu" and classes <= FEW_CLASSES


def _occurring(targets: Targets, _classes: int) -> tuple[Tensor, Tensor, int]:
    """Number the classes that occur in each image. The host waits for the answer.

    Returns:
        The number of each box's class within its image, (M,); the class of each number, (B, Q); classes in the batch.
    """
    classes, labels = targets.labels.unique(return_inverse=True)
    total = len(classes)
    occurring, row = (targets.image_index * total + labels).unique(return_inverse=True)
    image_of, class_of = occurring // max(total, 1), occurring % max(total, 1)
    first = torch.searchsorted(occurring, torch.arange(targets.batch_size, device=occurring.device) * total)
    rank = torch.arange(len(occurring), device=occurring.device) - first[image_of]
    which = occurring.new_zeros(targets.batch_size, int(rank.max()) + 1 if len(occurring) else 0)
    which[image_of, rank] = class_of
    return rank[row], which, total


def _all_classes(targets: Targets, classes: int) -> tuple[Tensor, Tensor, int]:
    """Return the same for all classes of the model, without asking the device which of them occur."""
    labels = targets.labels
    return labels, torch.arange(classes, device=labels.device).expand(targets.batch_size, -1), classes
