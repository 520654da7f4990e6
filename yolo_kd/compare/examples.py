"""Example images of a report: those in which two arms differ most, drawn with labels and predictions."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from ultralytics.utils.patches import imread

from yolo_kd.compare.size_metrics import ImageResult, overlaps
from yolo_kd.unlabeled.pseudo_labels import labels_found

CONFIDENCE = 0.25  # predictions below it are neither counted nor drawn
IOU = 0.5
EACH_WAY = 3  # images in which the arm gains, and in which it loses
_SIDE = 360  # pixels of a panel's longer side
_DPI = 64  # a power of two, so that sizes in inches are exact
_FOUND, _FALSE, _MISSED = "#009e73", "#e67800", "#ffffff"


@dataclass(frozen=True)
class Choice:
    """An image that is worth showing.

    Attributes:
        index: Index of the image in the results.
        run: Index of the paired run in which the two arms differ most in the direction of the mean.
        reference: F1 of the reference on this image, mean over seeds.
        arm: F1 of the arm, mean over seeds.
    """

    index: int
    run: int
    reference: float
    arm: float


@dataclass(frozen=True)
class Example:
    """An image in which two arms differ, with its drawings.

    Attributes:
        name: Name of the file.
        seed: The seed whose predictions are drawn.
        reference: F1 of the reference on this image, mean over seeds.
        arm: F1 of the arm, mean over seeds.
        panels: Title and JPEG data URI of each panel.
    """

    name: str
    seed: int
    reference: float
    arm: float
    panels: tuple[tuple[str, str], ...]


def f1(image: ImageResult) -> float:
    """Return the F1 of the predictions on an image, 1 if it has neither objects nor predictions."""
    found, wrong, missed = outcome(image)
    total = 2 * len(found) + len(wrong) + len(missed)
    return 2 * len(found) / total if total else 1.0


def outcome(image: ImageResult) -> tuple[list[int], list[int], list[int]]:
    """Return indices of predictions that found an object, of other predictions, and of objects that were missed."""
    sure = np.argsort(-image.scores, kind="mergesort")
    sure = sure[image.scores[sure] >= CONFIDENCE]
    same = image.classes[sure][:, None] == image.true_classes
    label = labels_found(np.where(same, overlaps(image.boxes[sure], image.true_boxes), 0), IOU)
    missed = np.setdiff1d(np.arange(len(image.true_boxes)), label)
    return sure[label >= 0].tolist(), sure[label < 0].tolist(), missed.tolist()


def choose(reference: Sequence[Sequence[ImageResult]], arm: Sequence[Sequence[ImageResult]]) -> list[Choice]:
    """Choose the images in which two arms differ most: up to `EACH_WAY` gains and as many losses.

    Args:
        reference: Results of the reference for each paired seed, all in the same order of images.
        arm: Results of the arm, in the same order.

    Returns:
        The images, gains first, each group sorted by the size of the difference.
    """
    if not reference or not arm:
        return []
    ours, theirs = (np.array([[f1(i) for i in run] for run in side]) for side in (arm, reference))
    differences = ours - theirs  # (runs, images)
    gain = differences.mean(0)
    order = np.argsort(-gain, kind="mergesort")
    up = [i for i in order[:EACH_WAY] if gain[i] > 0]
    down = [i for i in order[::-1][:EACH_WAY] if gain[i] < 0]
    return [
        Choice(int(i), int(np.argmax(differences[:, i] * np.sign(gain[i]))), theirs[:, i].mean(), ours[:, i].mean())
        for i in [*up, *down]
    ]


def draw(
    chosen: Choice, results: Mapping[str, Sequence[ImageResult]], names: Mapping[int, str], seed: int
) -> Example | None:
    """Draw one image with its labels and with each model's predictions; None if its file no longer exists.

    Args:
        chosen: The image, one of those that `choose` returned.
        results: Predictions by the panel's title.
        names: Class names by index.
        seed: The seed of the predictions.
    """
    first = next(iter(results.values()))[chosen.index]
    pixels = read_image(first.name)
    if pixels is None:
        return None
    panels = [("labels", jpeg(draw_labels(pixels, first, names)))]
    panels += [(title, jpeg(draw_predictions(pixels, run[chosen.index], names))) for title, run in results.items()]
    return Example(Path(first.name).name, seed, chosen.reference, chosen.arm, tuple(panels))


def read_image(path: str) -> np.ndarray | None:
    """Read an image as (H, W, 3) RGB bytes, None if it cannot be read."""
    pixels = imread(path) if Path(path).exists() else None
    if pixels is None:
        return None
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        pixels = cv2.cvtColor(pixels.reshape(*pixels.shape[:2]), cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(pixels[..., 2::-1].astype(np.uint8))


def jpeg(pixels: np.ndarray) -> str:
    """Return RGB bytes as a data URI."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def draw_labels(pixels: np.ndarray, image: ImageResult, names: Mapping[int, str]) -> np.ndarray:
    """Draw the labeled objects."""
    labels = [str(names.get(int(c), c)) for c in image.true_classes]
    return _drawn(pixels, [(box, _FOUND, "-", label) for box, label in zip(image.true_boxes, labels, strict=True)])


def draw_predictions(pixels: np.ndarray, image: ImageResult, names: Mapping[int, str]) -> np.ndarray:
    """Draw predictions that found an object (solid), other predictions (dashed) and missed objects (dotted)."""
    found, wrong, missed = outcome(image)
    boxes = [(image.true_boxes[t], _MISSED, ":", "missed") for t in missed]
    for group, color, line in ((wrong, _FALSE, "--"), (found, _FOUND, "-")):
        for p in group:
            label = f"{names.get(int(image.classes[p]), image.classes[p])} {image.scores[p]:.2f}"
            boxes.append((image.boxes[p], color, line, label))
    return _drawn(pixels, boxes)


def _drawn(pixels: np.ndarray, boxes: Sequence[tuple[np.ndarray, str, str, str]]) -> np.ndarray:
    """Draw boxes with a dark outline, which stands out on any image, and their labels inside the image.

    Args:
        pixels: The image.
        boxes: Corners, colour, line style and label of each box.
    """
    height, width = pixels.shape[:2]
    sides = [max(1, round(side * _SIDE / max(height, width))) for side in (width, height)]
    figure = Figure(figsize=(sides[0] / _DPI, sides[1] / _DPI), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.imshow(pixels, extent=(0, width, height, 0), aspect="auto")
    for box, color, line, label in boxes:
        x1, y1, x2, y2 = np.clip(box, 0, [width, height] * 2)
        outline = [withStroke(linewidth=4.5, foreground="black")]
        style: dict[str, Any] = {"linewidth": 2.25, "linestyle": line, "path_effects": outline}
        axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color, **style))
        x, side = (x1, "left") if x1 < width / 2 else (x2, "right")
        above = "bottom" if y1 > height / 10 else "top"
        axes.text(x, y1, label, fontsize=9, color="white", backgroundcolor="black", ha=side, va=above)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]
