"""A teacher's detections, against Ultralytics' decoding and suppression."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.nms import non_max_suppression

from tests.support.models import make_sure, narrow_model
from yolo_kd.structures import DetectorOutputs
from yolo_kd.unlabeled.pseudo_labels import Detections, detect, inside, labels_found, points_of, pseudo_labels
from yolo_kd.upstream.recorders import outputs_of


@pytest.fixture(scope="module", params=["yolov8n", "yolo26n"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DetectionModel:
    return make_sure(narrow_model(request.param, tmp_path_factory.mktemp("models"), seed=1)).eval()


def raw_and_decoded(model: DetectionModel, images: int = 3) -> tuple[DetectorOutputs, torch.Tensor]:
    """Return outputs, and the same outputs decoded by Ultralytics: (B, 4 + nc, A), boxes as xywh."""
    torch.manual_seed(2)
    pixels = torch.rand(images, 3, 96, 64)
    with torch.no_grad():
        whole = model(pixels)
        head = model.model[-1]
        raw = whole[1] if isinstance(whole, tuple) else whole
        main = raw.get("one2many", raw)
        plain = copy.copy(head)
        plain.export = False
        decoded = head._inference(dict(main))
    return outputs_of(raw, model), decoded


@pytest.mark.parametrize(("conf", "iou"), [(0.1, 0.7), (0.4, 0.7), (0.1, 0.3), (0.999, 0.7)])
def test_equal_to_ultralytics(model: DetectionModel, conf: float, iou: float) -> None:
    outputs, decoded = raw_and_decoded(model)
    ours = detect(outputs, conf, iou)
    theirs = non_max_suppression(decoded, conf, iou)
    assert len(ours) == sum(map(len, theirs))
    assert conf > 0.9 or len(ours) > 20, "the test would show little"
    for i, expected in enumerate(theirs):
        mine = ours.where(ours.image_index == i)
        torch.testing.assert_close(mine.boxes, expected[:, :4], rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(mine.confidence, expected[:, 4])
        assert mine.labels.tolist() == expected[:, 5].tolist()


def test_no_more_than_ultralytics_keeps(model: DetectionModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolo_kd.unlabeled.pseudo_labels.MOST", 4)
    outputs, decoded = raw_and_decoded(model)
    ours = detect(outputs, 0.05, 0.7)
    theirs = non_max_suppression(decoded, 0.05, 0.7, max_det=4)
    assert [len(t) for t in theirs] == ours.image_index.bincount(minlength=3).tolist() == [4, 4, 4]
    torch.testing.assert_close(ours.boxes, torch.cat([t[:, :4] for t in theirs]), rtol=1e-4, atol=1e-3)


def test_the_band_holds_what_is_not_certain(model: DetectionModel) -> None:
    """Compare with a loop over images, points and boxes."""
    outputs, _ = raw_and_decoded(model)
    low, conf, iou = 0.1, 0.5, 0.6
    found = pseudo_labels(outputs, low, conf, iou)
    everything = detect(outputs, low, iou)
    assert torch.equal(found.certain.boxes, detect(outputs, conf, iou).boxes), "one suppression serves both"
    centres, strides = points_of(outputs)
    assert len(centres) == outputs.scores.shape[1]
    expected = torch.zeros_like(found.ignored)
    columns = (everything.image_index, everything.labels, everything.confidence, everything.boxes)
    seen = list(zip(*(column.tolist() for column in columns), strict=True))
    for i in range(3):
        for a, (x, y) in enumerate(centres.tolist()):
            for c in range(outputs.scores.shape[-1]):
                hits = [
                    confidence > conf
                    for image, label, confidence, (x1, y1, x2, y2) in seen
                    if image == i and label == c and x1 < x < x2 and y1 < y < y2
                ]
                expected[i, c, a] = bool(hits) and not any(hits)
    assert torch.equal(found.ignored, expected)
    assert 0 < expected.float().mean() < 1
    assert strides.shape == (len(centres), 1)


def test_confidences_in_the_order_of_labels() -> None:
    index = torch.tensor([0, 0, 2, 2, 2])
    found = Detections(torch.zeros(5, 4), torch.zeros(5).long(), torch.arange(1.0, 6.0), index)
    expected = torch.tensor([[1.0, 2.0, 0.0], [0.0, 0.0, 0.0], [3.0, 4.0, 5.0], [0.0, 0.0, 0.0]])
    assert torch.equal(found.padded_confidence(4), expected)
    nothing = found.where(torch.zeros(5, dtype=torch.bool))
    assert nothing.padded_confidence(2).shape == (2, 0)
    assert [part.shape for part in inside(nothing, torch.rand(7, 2), 3)] == [(0,), (0, 7)]


def test_nothing_seen(model: DetectionModel) -> None:
    outputs, _ = raw_and_decoded(model)
    found = pseudo_labels(replace(outputs, scores=outputs.scores - 100), 0.1, 0.4, 0.7)
    assert len(found.certain) == 0
    assert found.certain.boxes.shape == (0, 4)
    assert not found.ignored.any()


def test_a_label_is_found_once_and_by_the_most_certain() -> None:
    overlaps = np.random.default_rng(0).random((35, 25)) * (np.random.default_rng(1).random((35, 25)) < 0.2)
    expected, free = [], set(range(25))
    for row in overlaps:
        best = max(free, key=lambda label: row[label])
        expected.append(best if row[best] >= 0.5 else -1)
        free -= {expected[-1]}
    before = overlaps.copy()
    assert labels_found(overlaps, 0.5).tolist() == expected
    assert (overlaps == before).all()
    assert 5 < sum(label >= 0 for label in expected) < 25, "the test would show little"


@pytest.mark.parametrize(("detections", "labelled"), [(3, 0), (0, 3), (0, 0)])
def test_no_detections_or_no_labels(detections: int, labelled: int) -> None:
    assert labels_found(np.zeros((detections, labelled)), 0.5).tolist() == [-1] * detections
