"""What a teacher detects on images that nobody labelled: objects, and places where it is not sure."""

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

MOST = 300  # detections of an image, as in Ultralytics


@dataclass(frozen=True)
class Detections:
    """Boxes on the images of a batch, by image, the most confident of an image first.

    Attributes:
        boxes: In pixels, xyxy, (M, 4).
        labels: Class of each, (M,), int64.
        confidence: Probability of that class, (M,).
        image_index: Image of each, (M,), int64, ascending.
    """

    boxes: Tensor
    labels: Tensor
    confidence: Tensor
    image_index: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, mask: Tensor) -> Detections:
        """Return the detections at which a (M,) mask is true."""
        return Detections(self.boxes[mask], self.labels[mask], self.confidence[mask], self.image_index[mask])

    def places(self, images: int) -> Tensor:
        """Return how many detections of the same image come before each, (M,)."""
        counts = self.image_index.bincount(minlength=images)
        return torch.arange(len(self), device=counts.device) - (counts.cumsum(0) - counts)[self.image_index]

    def padded_confidence(self, images: int) -> Tensor:
        """Return the confidences as (images, N), N being the most that one image has, in their order, 0 behind them."""
        places = self.places(images)
        table = self.confidence.new_zeros(images, int(places.max()) + 1 if len(self) else 0)
        table[self.image_index, places] = self.confidence
        return table


def points_of(view: DetectorOutputs) -> tuple[Tensor, Tensor]:
    """Return the centre of each point in pixels, (A, 2) as x and y, and its stride, (A, 1)."""
    centres, strides = [], []
    for (height, width), stride in zip(view.shapes, view.strides, strict=True):
        y, x = (torch.arange(n, device=view.scores.device, dtype=torch.float32) + 0.5 for n in (height, width))
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1).flip(-1).reshape(-1, 2)
        centres.append(grid * stride)
        strides.append(torch.full((len(grid), 1), float(stride), device=grid.device))
    return torch.cat(centres), torch.cat(strides)


@torch.no_grad()
def detect(view: DetectorOutputs, conf: float, iou: float) -> Detections:
    """Return what a detector sees, from its raw outputs, by suppression of what overlaps within a class.

    A point is of the class that it finds most probable, as in Ultralytics' prediction; the suppression runs once for
    all images.

    Args:
        view: The detector's view; both branches of its head must have been computed.
        conf: Detections are more probable than this.
        iou: Overlap above which the less probable of two detections of a class is dropped.
    """
    probability = view.objectness
    image, point = (probability > conf).nonzero(as_tuple=True)
    centres, strides = points_of(view)
    raw = view.boxes[image, point].float()
    boxes = corners(raw[:, None], view.reg_max)[:, 0] * strides[point] + centres[point].repeat(1, 2)
    confidence = probability[image, point]
    labels = view.scores[image, point].float().sigmoid().argmax(-1)  # of several that round to 1 the first, as there
    kept = batched_nms(boxes, confidence, image * view.scores.shape[-1] + labels, iou)  # the most confident first
    kept = kept[image[kept].sort(stable=True).indices]
    found = Detections(boxes[kept], labels[kept], confidence[kept], image[kept])
    return found.where(found.places(len(view.scores)) < MOST)


@torch.no_grad()
def inside(detections: Detections, centres: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return at which points a detection of which class lies, for the pairs of an image and a class that occur.

    Args:
        detections: The detections.
        centres: Centres of the points in pixels, (A, 2).
        classes: Number of classes.

    Returns:
        The pairs, image * classes + class, each once, (U,) int64; the points of each, (U, A) bool.
    """
    x, y = centres.unbind(-1)
    x1, y1, x2, y2 = detections.boxes[..., None].unbind(1)
    covered = (x > x1) & (x < x2) & (y > y1) & (y < y2)
    pairs, place = (detections.image_index * classes + detections.labels).unique(return_inverse=True)
    counts = torch.zeros(len(pairs), len(centres), device=centres.device).index_add_(0, place, covered.float())
    return pairs, counts > 0


@dataclass(frozen=True)
class Pseudo:
    """Detections that serve as labels, and what is neither object nor background.

    Attributes:
        certain: Detections that are more probable than the upper threshold.
        ignored: True for a class at points inside a less probable detection of it and outside every certain one,
            (B, nc, A).
    """

    certain: Detections
    ignored: Tensor


def pseudo_labels(view: DetectorOutputs, low: float, conf: float, iou: float) -> Pseudo:
    """Split a teacher's detections into labels and the band in which it is not sure.

    Args:
        view: The teacher's view.
        low: Lower end of the band.
        conf: Upper end of the band: detections above it are labels.
        iou: Overlap above which the less probable of two detections of a class is dropped.
    """
    found = detect(view, low, iou)
    certain = found.where(found.confidence > conf)
    centres, _ = points_of(view)
    images, points, classes = view.scores.shape
    # a map of all classes is large, and few of them occur in an image
    ignored = torch.zeros(images * classes, points, dtype=torch.bool, device=centres.device)
    pairs, covered = inside(found.where(found.confidence <= conf), centres, classes)
    ignored[pairs] = covered
    pairs, covered = inside(certain, centres, classes)
    ignored[pairs] &= ~covered
    return Pseudo(certain, ignored.view(images, classes, points))


def labels_found(overlaps: np.ndarray, least: float) -> np.ndarray:
    """Return which label each detection of an image finds, -1 for none: of those still to be found the best covered.

    Args:
        overlaps: Intersection over union of every detection with every label, 0 where their classes differ, the most
            confident detection first, (M, N).
        least: Overlap that is enough.

    Returns:
        (M,) indices of labels, each of them once at most.
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
    """Turn detections into the entries of a batch that hold labels, the inverse of what `targets_of` does.

    Args:
        detections: Boxes in pixels; what is beyond the image's border is cut off.
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
