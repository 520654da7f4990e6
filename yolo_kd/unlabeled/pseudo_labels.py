"""Pseudo-labels: a teacher's detections on unlabeled images, and the regions where it is uncertain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms
from ultralytics.utils.ops import xyxy2xywh

from yolo_kd.losses.kernels.ops import corners
from yolo_kd.structures import DetectorOutputs

MOST = 300  # detections per image, as in Ultralytics


@dataclass(frozen=True)
class Detections:
    """Detections on the images of a batch, ordered by image, the most confident of an image first.

    Attributes:
        boxes: Boxes in pixels, xyxy, (M, 4).
        labels: Class of each detection, (M,), int64.
        confidence: Probability of that class, (M,).
        image_index: Image of each detection, (M,), int64, ascending.
    """

    boxes: Tensor
    labels: Tensor
    confidence: Tensor
    image_index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: Tensor) -> Detections:
        """Return the detections where a (M,) mask is true."""
        return Detections(self.boxes[mask], self.labels[mask], self.confidence[mask], self.image_index[mask])

    def ranks(self, images: int) -> Tensor:
        """Return for each detection the number of detections of the same image before it, (M,)."""
        counts = self.image_index.bincount(minlength=images)
        return torch.arange(len(self), device=counts.device) - (counts.cumsum(0) - counts)[self.image_index]

    def padded_confidence(self, images: int) -> Tensor:
        """Return the confidences of each image in order, (images, N), padded with 0 to the longest row."""
        ranks = self.ranks(images)
        table = self.confidence.new_zeros(images, int(ranks.max()) + 1 if len(self) else 0)
        table[self.image_index, ranks] = self.confidence
        return table


def points_of(outputs: DetectorOutputs) -> tuple[Tensor, Tensor]:
    """Return the centre of each point in pixels, (A, 2) as x and y, and its stride, (A, 1)."""
    centres, strides = [], []
    for (height, width), stride in zip(outputs.shapes, outputs.strides, strict=True):
        y, x = (torch.arange(n, device=outputs.scores.device, dtype=torch.float32) + 0.5 for n in (height, width))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 2)
        centres.append(grid * stride)
        strides.append(torch.full((len(grid), 1), float(stride), device=grid.device))
    return torch.cat(centres), torch.cat(strides)


@torch.no_grad()
def detect(outputs: DetectorOutputs, conf: float, iou: float) -> Detections:
    """Return the detections of a detector, by class-wise non-maximum suppression of its raw outputs.

    A point belongs to its most probable class, as in Ultralytics' prediction. The suppression runs once for all images.

    Args:
        outputs: The detector's outputs, with scores and boxes.
        conf: Lowest probability of a detection, exclusive.
        iou: Overlap above which the less probable of two detections of a class is dropped.
    """
    probability = outputs.objectness
    image, point = (probability > conf).nonzero(as_tuple=True)
    centres, strides = points_of(outputs)
    raw = outputs.boxes[image, point].float()
    boxes = corners(raw[:, None], outputs.reg_max)[:, 0] * strides[point] + centres[point].repeat(1, 2)
    confidence = probability[image, point]
    labels = outputs.scores[image, point].float().sigmoid().argmax(-1)  # the first of those that round to 1
    kept = batched_nms(boxes, confidence, image * outputs.scores.shape[-1] + labels, iou)  # the most confident first
    kept = kept[image[kept].sort(stable=True).indices]
    found = Detections(boxes[kept], labels[kept], confidence[kept], image[kept])
    return found.where(found.ranks(len(outputs.scores)) < MOST)


@torch.no_grad()
def inside(detections: Detections, centres: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return the points inside detections, for each pair of image and class that occurs.

    Args:
        detections: The detections.
        centres: Centres of the points in pixels, (A, 2).
        classes: Number of classes.

    Returns:
        The pairs as image * classes + class, each once, (U,) int64, and the points of each pair, (U, A) bool.
    """
    x, y = centres.unbind(-1)
    x1, y1, x2, y2 = detections.boxes[..., None].unbind(1)
    covered = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    pairs, pair = (detections.image_index * classes + detections.labels).unique(return_inverse=True)
    counts = torch.zeros(len(pairs), len(centres), device=centres.device).index_add_(0, pair, covered.float())
    return pairs, counts > 0


@dataclass(frozen=True)
class Pseudo:
    """Detections that serve as labels, and the points that are neither object nor background.

    Attributes:
        certain: Detections that are more probable than the upper threshold.
        ignored: True for a class at points inside a less probable detection of the class and outside every certain
            one, (B, nc, A).
    """

    certain: Detections
    ignored: Tensor


def pseudo_labels(outputs: DetectorOutputs, low: float, conf: float, iou: float) -> Pseudo:
    """Split a teacher's detections into labels and uncertain ones.

    Args:
        outputs: The teacher's outputs.
        low: Lowest probability of an uncertain detection.
        conf: Probability above which a detection is a label.
        iou: Overlap above which the less probable of two detections of a class is dropped.
    """
    found = detect(outputs, low, iou)
    certain = found.where(found.confidence > conf)
    centres, _ = points_of(outputs)
    images, points, classes = outputs.scores.shape
    # a mask of all classes is large, and few classes occur in an image
    ignored = torch.zeros(images * classes, points, dtype=torch.bool, device=centres.device)
    pairs, covered = inside(found.where(found.confidence <= conf), centres, classes)
    ignored[pairs] = covered
    pairs, covered = inside(certain, centres, classes)
    ignored[pairs] &= ~covered
    return Pseudo(certain, ignored.view(images, classes, points))


def labels_found(overlaps: np.ndarray, least: float) -> np.ndarray:
    """Match the detections of an image with its labels: each detection takes the free label that it overlaps most.

    Args:
        overlaps: Intersection over union of each detection with each label, 0 where their classes differ, the most
            confident detection first, (M, N).
        least: Smallest overlap of a match.

    Returns:
        (M,) index of the label of each detection, -1 for none; each label occurs at most once.
    """
    free = overlaps.copy()
    found = np.full(len(free), -1)
    for i in range(len(free) if free.shape[1] else 0):
        best = free[i].argmax()
        if free[i, best] >= least:
            found[i] = best
            free[:, best] = -1
    return found


def labels_of(detections: Detections, image_size: Sequence[int]) -> dict[str, Tensor]:
    """Convert detections to the label entries of a batch, the inverse of `targets_of`.

    Args:
        detections: The detections; boxes are clipped to the image.
        image_size: Height and width of the images in pixels.
    """
    height, width = image_size
    size = detections.boxes.new_tensor([width, height, width, height])
    boxes = torch.minimum(detections.boxes.clamp(min=0), size)
    return {
        "bboxes": xyxy2xywh(boxes) / size,
        "cls": detections.labels[:, None].float(),
        "batch_idx": detections.image_index.float(),
    }
