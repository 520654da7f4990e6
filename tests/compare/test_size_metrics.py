"""Average precision by size against pycocotools, and by hand."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from yolo_kd.compare.records import SizeScore
from yolo_kd.compare.size_metrics import SIZES, ImageResult, ap_by_size, areas, overlaps


def image(name: str, shape: tuple[int, int], predictions: list, objects: list) -> ImageResult:
    """Predictions as (x1, y1, x2, y2, score, class), objects as (x1, y1, x2, y2, class)."""
    p = np.array(predictions, float).reshape(-1, 6)
    t = np.array(objects, float).reshape(-1, 5)
    return ImageResult(name, shape, p[:, :4], p[:, 4], p[:, 5].astype(int), t[:, :4], t[:, 4].astype(int))


def drawn(seed: int, count: int = 25, classes: int = 3) -> list[ImageResult]:
    """Random images of 640 pixels: objects of all sizes, predictions of varying quality, and false predictions."""
    rng = np.random.default_rng(seed)
    images = []
    for n in range(count):
        objects, predictions = [], []
        for _ in range(rng.integers(0, 9)):
            side = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            corner = rng.uniform(0, 640 - side)
            c = rng.integers(classes)
            objects.append([*corner, *(corner + side), c])
            for _ in range(rng.integers(0, 3)):
                shift = rng.normal(0, 0.08, 4) * np.tile(side, 2)
                found = rng.integers(classes) if rng.random() < 0.1 else c
                predictions.append([*(np.r_[corner, corner + side] + shift), rng.random(), found])
        for _ in range(rng.integers(0, 5)):
            side = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            corner = rng.uniform(0, 640 - side)
            predictions.append([*corner, *(corner + side), rng.random(), rng.integers(classes)])
        images.append(image(f"{n}.png", (480, 640), predictions, objects))
    return images


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools(seed: int) -> None:
    coco_module = pytest.importorskip("pycocotools.coco")
    from pycocotools.cocoeval import COCOeval

    images = drawn(seed)
    annotations, results = [], []
    for n, picture in enumerate(images, 1):
        for box, c in zip(picture.true_boxes, picture.true_classes, strict=True):
            wide, high = box[2] - box[0], box[3] - box[1]
            annotations.append(
                {"id": len(annotations) + 1, "image_id": n, "category_id": int(c), "area": wide * high, "iscrowd": 0}
                | {"bbox": [box[0], box[1], wide, high]}
            )
        for box, score, c in zip(picture.boxes, picture.scores, picture.classes, strict=True):
            found = [box[0], box[1], box[2] - box[0], box[3] - box[1]]
            results.append({"image_id": n, "category_id": int(c), "bbox": found, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = {
            "images": [{"id": n} for n in range(1, len(images) + 1)],
            "annotations": annotations,
            "categories": [{"id": c} for c in range(3)],
        }
        coco.createIndex()
        judge = COCOeval(coco, coco.loadRes(results), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    ours = ap_by_size(images, range(3))
    assert [ours[size].ap for size in SIZES] == pytest.approx(judge.stats[3:6].tolist(), abs=1e-9)
    assert sum(score.objects for score in ours.values()) == len(annotations)


def test_by_hand() -> None:
    """Two large objects, one found exactly, with a false prediction ranked above it."""
    box = [100, 100, 300, 300]
    pictures = [
        image("a", (640, 640), [[0, 0, 200, 200, 0.9, 0], [*box, 0.8, 0]], [[*box, 0]]),
        image("b", (640, 640), [], [[*box, 0]]),
    ]
    found = ap_by_size(pictures, [0])
    # precision 1/2 at recall 1/2, nothing beyond: 51 of the 101 recalls are reached
    assert found["large"].model_dump() == {"ap": pytest.approx(0.5 * 51 / 101), "objects": 2}
    assert found["small"] == SizeScore(ap=None, objects=0)


def test_size_is_measured_at_640_pixels() -> None:
    boxes = np.array([[0.0, 0.0, 31.0, 31.0]])
    assert areas(boxes, (640, 480)) == pytest.approx(31.0**2)
    assert areas(boxes * 2, (1280, 960)) == pytest.approx(31.0**2)
    small = image("a", (1280, 960), [[0, 0, 62, 62, 0.9, 0]], [[0, 0, 62, 62, 0]])
    assert ap_by_size([small], [0])["small"].model_dump() == {"ap": pytest.approx(1.0), "objects": 1}


def test_a_prediction_of_another_size_is_not_held_against_a_size() -> None:
    object_, other = [0, 0, 20, 20], [100, 100, 400, 400]
    pictures = [image("a", (640, 640), [[*other, 0.95, 0], [*object_, 0.9, 0]], [[*object_, 0]])]
    found = ap_by_size(pictures, [0])
    assert found["small"].ap == pytest.approx(1.0)


def test_nothing_at_all() -> None:
    empty = ap_by_size([image("a", (64, 64), [], [])], [0])
    assert set(empty) == set(SIZES)
    assert all(score == SizeScore(ap=None, objects=0) for score in empty.values())


def test_overlaps() -> None:
    a = np.array([[0.0, 0.0, 2.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    b = np.array([[1.0, 0.0, 3.0, 2.0]])
    assert overlaps(a, b) == pytest.approx(np.array([[1 / 3], [0.0]]))
    assert overlaps(a, b[:0]).shape == (2, 0)
