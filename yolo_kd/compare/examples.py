"""Pictures of a report: where two arms differ most, beside labels and teacher, and what their necks look at."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
from ultralytics.utils.patches import imread

from yolo_kd.compare.size_metrics import ImageResult, overlaps
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.unlabeled.pseudo_labels import labels_found
from yolo_kd.upstream.heads import strides_of
from yolo_kd.upstream.recorders import outputs_of

CONFIDENCE = 0.25  # predictions below are neither counted nor drawn here
IOU = 0.5
EACH_WAY = 3  # pictures in which the arm gains, and in which it loses
ATTENTION = 2  # pictures of which attention is shown
_SIDE, _SMALL = 360, 220  # pixels of a panel's longer side
_FOUND, _FALSE, _MISSED = (0, 158, 115), (230, 120, 0), (255, 255, 255)


@dataclass(frozen=True)
class Choice:
    """A picture that is worth showing.

    Attributes:
        index: Its place in the list of results.
        run: The paired run, by its place, in which the two arms differ most in the direction of the mean.
        reference: F1 of the reference there, mean over seeds.
        arm: F1 of the arm.
    """

    index: int
    run: int
    reference: float
    arm: float


@dataclass(frozen=True)
class Scene:
    """A picture in which two arms differ.

    Attributes:
        name: Name of its file.
        seed: The seed whose predictions are drawn.
        reference: F1 of the reference there, mean over seeds.
        arm: F1 of the arm.
        panels: Title and JPEG data URI of each panel.
    """

    name: str
    seed: int
    reference: float
    arm: float
    panels: tuple[tuple[str, str], ...]


def f1(image: ImageResult) -> float:
    """Return the F1 of a picture's predictions; 1 for none where there is nothing."""
    found, wrong, missed = outcome(image)
    total = 2 * len(found) + len(wrong) + len(missed)
    return 2 * len(found) / total if total else 1.0


def outcome(image: ImageResult) -> tuple[list[int], list[int], list[int]]:
    """Return the predictions that found an object, those that did not, and the objects that were missed, as indices."""
    sure = np.argsort(-image.scores, kind="mergesort")
    sure = sure[image.scores[sure] >= CONFIDENCE]
    same = image.classes[sure][:, None] == image.true_classes
    label = labels_found(np.where(same, overlaps(image.boxes[sure], image.true_boxes), 0), IOU)
    missed = np.setdiff1d(np.arange(len(image.true_boxes)), label)
    return sure[label >= 0].tolist(), sure[label < 0].tolist(), missed.tolist()


def choose(reference: Sequence[Sequence[ImageResult]], arm: Sequence[Sequence[ImageResult]]) -> list[Choice]:
    """Choose the pictures in which two arms differ most, as many gains as losses where there are.

    Args:
        reference: Results of the reference for each paired seed, all in the same order of pictures.
        arm: The same of the arm.

    Returns:
        The pictures, gains first, the largest difference first.
    """
    if not reference or not arm:
        return []
    ours, theirs = (np.array([[f1(i) for i in run] for run in side]) for side in (arm, reference))
    differences = ours - theirs  # (runs, pictures)
    gain = differences.mean(0)
    order = np.argsort(-gain, kind="mergesort")
    up = [i for i in order[:EACH_WAY] if gain[i] > 0]
    down = [i for i in order[::-1][:EACH_WAY] if gain[i] < 0]
    return [
        Choice(int(i), int(np.argmax(differences[:, i] * np.sign(gain[i]))), theirs[:, i].mean(), ours[:, i].mean())
        for i in [*up, *down]
    ]


def scene(
    chosen: Choice, results: Mapping[str, Sequence[ImageResult]], names: Mapping[int, str], seed: int
) -> Scene | None:
    """Draw one picture with its labels and with each model's predictions; None if its file is gone.

    Args:
        chosen: What `choose` returned.
        results: Predictions by title of the panel.
        names: Class names.
        seed: The seed that the predictions are of.
    """
    first = next(iter(results.values()))[chosen.index]
    picture = read_picture(first.name)
    if picture is None:
        return None
    panels = [("labels", jpeg(draw_labels(picture, first, names)))]
    panels += [(title, jpeg(draw_predictions(picture, run[chosen.index], names))) for title, run in results.items()]
    return Scene(Path(first.name).name, seed, chosen.reference, chosen.arm, tuple(panels))


def read_picture(path: str) -> np.ndarray | None:
    """Read a picture as (H, W, 3) RGB bytes, None if it cannot be read."""
    pixels = imread(path) if Path(path).exists() else None
    if pixels is None:
        return None
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        pixels = cv2.cvtColor(pixels.reshape(*pixels.shape[:2]), cv2.COLOR_GRAY2BGR)
    return np.ascontiguousarray(pixels[..., 2::-1].astype(np.uint8))


def jpeg(picture: np.ndarray) -> str:
    """Return RGB bytes as a data URI."""
    _, data = cv2.imencode(".jpg", np.ascontiguousarray(picture[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, 82])
    return f"data:image/jpeg;base64,{base64.b64encode(data.tobytes()).decode()}"


def draw_labels(picture: np.ndarray, image: ImageResult, names: Mapping[int, str]) -> np.ndarray:
    """Draw the labelled objects."""
    canvas, scale = _canvas(picture)
    for box, c in zip(image.true_boxes, image.true_classes, strict=True):
        _box(canvas, box * scale, _FOUND, str(names.get(int(c), c)))
    return canvas


def draw_predictions(picture: np.ndarray, image: ImageResult, names: Mapping[int, str]) -> np.ndarray:
    """Draw predictions: solid where they found an object, dashed where not, dotted for objects that were missed."""
    canvas, scale = _canvas(picture)
    found, wrong, missed = outcome(image)
    for t in missed:
        _box(canvas, image.true_boxes[t] * scale, _MISSED, "missed", dash=(2, 4))
    for group, color, dash in ((wrong, _FALSE, (7, 5)), (found, _FOUND, None)):
        for p in group:
            label = f"{names.get(int(image.classes[p]), image.classes[p])} {image.scores[p]:.2f}"
            _box(canvas, image.boxes[p] * scale, color, label, dash)
    return canvas


def _canvas(picture: np.ndarray, side: int = _SIDE) -> tuple[np.ndarray, float]:
    scale = side / max(picture.shape[:2])
    size = (max(1, round(picture.shape[1] * scale)), max(1, round(picture.shape[0] * scale)))
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.ascontiguousarray(cv2.resize(picture, size, interpolation=way)), scale


def _box(
    canvas: np.ndarray, box: np.ndarray, color: tuple[int, int, int], label: str, dash: tuple[int, int] | None = None
) -> None:
    """Draw a box on a dark rim, so that it is seen on any picture, and its label inside the picture."""
    height, width = canvas.shape[:2]
    x1, y1, x2, y2 = (int(v) for v in np.clip(box.round(), 0, [width - 1, height - 1] * 2))
    sides = (((x1, y1), (x2, y1)), ((x2, y1), (x2, y2)), ((x2, y2), (x1, y2)), ((x1, y2), (x1, y1)))
    for tone, thick in (((0, 0, 0), 4), (color, 2)):
        for a, b in sides:
            _line(canvas, a, b, tone, thick, dash)
    (w, h), _ = cv2.getTextSize(label, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)
    x, y = min(x1, max(0, width - w - 4)), max(h + 5, y1 - 3)
    cv2.rectangle(canvas, (x, y - h - 3), (x + w + 3, y + 3), (0, 0, 0), -1)
    cv2.putText(canvas, label, (x + 2, y), cv2.FONT_HERSHEY_SIMPLEX, 0.38, (255, 255, 255), 1, cv2.LINE_AA)


def _line(
    canvas: np.ndarray, a: tuple[int, int], b: tuple[int, int], color: tuple[int, int, int], thick: int, dash: Any
) -> None:
    if dash is None:
        cv2.line(canvas, a, b, color, thick)
        return
    on, off = dash
    length = max(abs(b[0] - a[0]), abs(b[1] - a[1]), 1)
    for start in range(0, length, on + off):
        end = min(start + on, length)
        points = [tuple(round(p + (q - p) * at / length) for p, q in zip(a, b, strict=True)) for at in (start, end)]
        cv2.line(canvas, points[0], points[1], color, thick)


# ------------------------------------------------------------------------------------------------ attention


def attention(
    checkpoint: Path, pictures: Sequence[np.ndarray], imgsz: int, trust: bool
) -> list[list[tuple[str, str]]] | None:
    """Show where the features that enter a model's head are strong, level by level.

    The map is the mean over channels of the squared features, divided by its largest value.

    Args:
        checkpoint: The detector.
        pictures: RGB bytes.
        imgsz: Side of the network's input.
        trust: Load without restriction.

    Returns:
        For each picture, name of the level and data URI; None for a model of other than three channels.
    """
    model = load_detector(checkpoint, trust=trust).model
    if model.yaml.get("channels", 3) != 3:
        return None
    strides = strides_of(model)
    shown = []
    for picture in pictures:
        small, _ = _canvas(picture, imgsz)
        height, width = small.shape[:2]
        coarsest = max(strides)
        padded = np.full((-(-height // coarsest) * coarsest, -(-width // coarsest) * coarsest, 3), 114, np.uint8)
        padded[:height, :width] = small
        with torch.no_grad():
            images = torch.from_numpy(padded).permute(2, 0, 1)[None].float() / 255
            features = outputs_of(model(images), model).features
        panels = []
        for stride, feature in zip(strides, features, strict=True):
            strength = feature[0].float().square().mean(0).numpy()
            full = cv2.resize(strength, padded.shape[1::-1], interpolation=cv2.INTER_LINEAR)[:height, :width]
            panels.append((f"stride {stride}", jpeg(_heat(picture, full / max(float(full.max()), 1e-12)))))
        shown.append(panels)
    return shown


def _heat(picture: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """Lay a map over the picture in grey: dark where it is weak, bright where it is strong, also without colour."""
    canvas, _ = _canvas(picture, _SMALL)
    grey = cv2.cvtColor(canvas, cv2.COLOR_RGB2GRAY)[..., None].repeat(3, -1)
    heat = mpl.colormaps["inferno"](cv2.resize(strength, canvas.shape[1::-1]))[..., :3] * 255
    return (0.35 * grey + 0.65 * heat).astype(np.uint8)
