"""Example images: which are chosen, and what is drawn on them."""

from __future__ import annotations

import base64
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.compare.test_size_metrics import image
from tests.support.comparison import NAMES, pictures
from yolo_kd.compare import examples

BOX = [20, 20, 60, 60]


def test_outcome_and_f1() -> None:
    picture = image(
        "a",
        (96, 96),
        [
            [*BOX, 0.9, 0],  # found
            [21, 20, 60, 60, 0.8, 0],  # the same object again
            [*BOX, 0.7, 1],  # another class
            [0, 0, 10, 10, 0.1, 2],  # not sure enough to count
        ],
        [[*BOX, 0], [0, 0, 10, 10, 2]],
    )
    found, wrong, missed = examples.outcome(picture)
    assert (found, wrong, missed) == ([0], [1, 2], [1])
    assert examples.f1(picture) == pytest.approx(2 / (2 + 2 + 1))
    assert examples.f1(image("b", (9, 9), [], [])) == 1.0
    assert examples.f1(image("c", (9, 9), [], [[*BOX, 0]])) == 0.0


def test_choose_takes_both_directions() -> None:
    hit = [[*BOX, 0.9, 0]]
    truth = [[*BOX, 0]]
    good, bad = (image("x", (96, 96), p, truth) for p in (hit, []))
    reference = [[good, bad, good, bad], [good, bad, bad, bad]]
    arm = [[bad, good, bad, bad], [good, good, bad, bad]]
    chosen = examples.choose(reference, arm)
    assert chosen[0] == examples.Choice(1, 0, 0.0, 1.0)
    # the other two are losses of one run each, and it is that run that is drawn
    assert sorted((c.index, c.run, c.reference, c.arm) for c in chosen[1:]) == [(0, 0, 1.0, 0.5), (2, 0, 0.5, 0.0)]
    assert examples.choose([], []) == []


def decoded(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.partition(",")[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)


def test_an_example_has_a_panel_per_model(tmp_path: Path) -> None:
    file = pictures(tmp_path, 1)[0]
    truth = [[*BOX, 0]]
    found = image(str(file), (96, 96), [[*BOX, 0.9, 0]], truth)
    missed = image(str(file), (96, 96), [[0, 0, 30, 30, 0.6, 7]], truth)  # a class without a name, too
    made = examples.draw(examples.Choice(0, 0, 0.0, 1.0), {"teacher": [found], "baseline": [missed]}, NAMES, 5)
    assert made is not None
    assert [title for title, _ in made.panels] == ["labels", "teacher", "baseline"]
    shown = [decoded(uri) for _, uri in made.panels]
    assert all(max(p.shape) == 360 for p in shown)
    assert np.abs(shown[1].astype(int) - shown[2]).max() > 100
    file.unlink()
    assert examples.draw(examples.Choice(0, 0, 0.0, 1.0), {"teacher": [found]}, NAMES, 5) is None


def test_boxes_at_the_rim_and_grey_pictures(tmp_path: Path) -> None:
    grey = tmp_path / "grey.png"
    cv2.imwrite(str(grey), np.zeros((40, 90), np.uint8))
    pixels = examples.read_image(str(grey))
    assert pixels is not None
    assert pixels.shape == (40, 90, 3)
    outside = image("a", (40, 90), [[-20, -20, 200, 100, 0.9, 0]], [[80, 30, 90, 40, 1]])
    assert examples.draw_predictions(pixels, outside, NAMES).shape == (160, 360, 3)
    assert examples.read_image(str(tmp_path / "none.png")) is None
