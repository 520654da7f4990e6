"""Average precision by object size, from predictions and labels.

The rules are those of the COCO evaluation: ten IoU thresholds from 0.50 to 0.95, at most 100 predictions per image and
class, greedy matching that starts with the most certain prediction, precision read at 101 recalls. Objects outside a
size range are ignored. So are predictions that match such an object, and predictions outside the range without a match.

COCO's limits of 32² and 96² pixels are meant for images of 640 pixels. Boxes are therefore scaled to an image whose
longer side is 640: an object is small below 5 % of that side and large from 15 % on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from yolo_kd.compare.records import SizeScore

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, float("inf")),
}
REFERENCE_SIDE = 640
IOUS = np.linspace(0.5, 0.95, 10)
_RECALLS = np.linspace(0.0, 1.0, 101)
_MAX_PREDICTIONS = 100


@dataclass(frozen=True)
class ImageResult:
    """Predictions and labels of one image, boxes as (x1, y1, x2, y2) in pixels of the file.

    Attributes:
        name: Path of the image.
        shape: Height and width of the image.
        boxes: (P, 4) predicted boxes.
        scores: (P,) confidences of the predictions.
        classes: (P,) classes of the predictions.
        true_boxes: (T, 4) labeled boxes.
        true_classes: (T,) classes of the labels.
    """

    name: str
    shape: tuple[int, int]
    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    true_boxes: np.ndarray
    true_classes: np.ndarray


def areas(boxes: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return the areas of (N, 4) boxes, scaled to an image whose longer side is 640 pixels."""
    scale = REFERENCE_SIDE / max(shape)
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) * scale**2


def overlaps(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the (N, M) intersections over union of (N, 4) and (M, 4) boxes."""
    low = np.maximum(a[:, None, :2], b[None, :, :2])
    high = np.minimum(a[:, None, 2:], b[None, :, 2:])
    inside = np.clip(high - low, 0, None).prod(-1)
    size_a, size_b = ((x[:, 2] - x[:, 0]) * (x[:, 3] - x[:, 1]) for x in (a, b))
    union = size_a[:, None] + size_b[None] - inside
    return np.divide(inside, union, out=np.zeros_like(inside), where=union > 0)


def ap_by_size(images: Sequence[ImageResult], classes: Sequence[int]) -> dict[str, SizeScore]:
    """Return mAP50-95 for each size, averaged over the classes that have labeled objects of that size.

    Args:
        images: Predictions and labels.
        classes: Indices of the classes.
    """
    result = {}
    for size, limits in SIZES.items():
        found = [_class_ap(images, c, limits) for c in classes]
        present = [ap for ap, _ in found if ap is not None]
        ap = float(np.mean(present)) if present else None
        result[size] = SizeScore(ap=ap, objects=sum(n for _, n in found))
    return result


def _class_ap(images: Sequence[ImageResult], c: int, limits: tuple[float, float]) -> tuple[float | None, int]:
    """Return a class's AP in a range of areas, and the number of its labeled objects there."""
    matched = [_match(image, c, limits) for image in images]
    objects = sum(count for *_, count in matched)
    if not objects:
        return None, 0
    scores, hits, ignored, _ = zip(*matched, strict=True)
    order = np.argsort(-np.concatenate(scores), kind="mergesort")
    hit, ignore = (np.concatenate(x, axis=1)[:, order] for x in (hits, ignored))
    true = np.cumsum(hit & ~ignore, axis=1, dtype=float)
    false = np.cumsum(~hit & ~ignore, axis=1, dtype=float)
    return float(np.mean([_area_under(t, f, objects) for t, f in zip(true, false, strict=True)])), objects


def _area_under(true: np.ndarray, false: np.ndarray, objects: int) -> float:
    """Return the mean precision at 101 recalls, each the best at that recall or beyond."""
    recall = true / objects
    precision = true / np.maximum(true + false, np.spacing(1))
    best = np.maximum.accumulate(precision[::-1])[::-1]
    at = np.searchsorted(recall, _RECALLS, side="left")
    return float(np.append(best, 0.0)[at].mean())  # 0 where no prediction reaches a recall


def _match(image: ImageResult, c: int, limits: tuple[float, float]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """Match predictions of a class to its objects.

    Returns:
        Scores (P,), hits (10, P), ignored (10, P), and the number of objects inside the limits.
    """
    mine = np.flatnonzero(image.classes == c)
    mine = mine[np.argsort(-image.scores[mine], kind="mergesort")][:_MAX_PREDICTIONS]
    boxes, scores = image.boxes[mine], image.scores[mine]
    objects = image.true_boxes[image.true_classes == c]
    sizes = (areas(found, image.shape) for found in (objects, boxes))
    outside_object, outside = ((size < limits[0]) | (size >= limits[1]) for size in sizes)
    hit = np.zeros((len(IOUS), len(boxes)), bool)
    ignored = np.zeros_like(hit)
    iou = overlaps(boxes, objects)
    free = np.ones((len(IOUS), len(objects)), bool)
    rows = np.arange(len(IOUS))
    for p in range(len(boxes) if len(objects) else 0):
        fits = free & (iou[p] >= IOUS[:, None] - 1e-10)
        # an object inside the limits wins over one outside, however well that one fits
        worth = np.where(fits, iou[p] + 2.0 * ~outside_object, -1.0)
        pick = worth.argmax(1)
        taken = worth[rows, pick] >= 0
        free[rows[taken], pick[taken]] = False
        hit[:, p] = taken
        ignored[:, p] = taken & outside_object[pick]
    ignored |= ~hit & outside
    return scores, hit, ignored, int((~outside_object).sum())
