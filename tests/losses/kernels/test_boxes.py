"""Boxes painted onto cells, against a loop over boxes and cells."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from tests.support.loss_contract import BOXES, IMAGE
from yolo_kd.losses.kernels import boxes as module
from yolo_kd.losses.kernels.boxes import box_cells, cell_weights, paint


def flat(per_image):
    """Return boxes (M, 4) and their image index of boxes per image."""
    index = [i for i, image in enumerate(per_image) for _ in image]
    xyxy = [b for image in per_image for b in image]
    return torch.tensor(xyxy, dtype=torch.float32).view(-1, 4), torch.tensor(index, dtype=torch.int64)


def slow_cells(box, image_size, shape):
    """Return first column, first row, last column, last row of one box, None where it lies outside the image."""
    (height, width), (h, w) = image_size, shape
    x1, y1, x2, y2 = (float(v) for v in box)
    if x2 < 0 or y2 < 0 or x1 >= width or y1 >= height:
        return None
    x1, x2 = max(x1, 0), min(x2, width)
    y1, y2 = max(y1, 0), min(y2, height)
    f = np.float32
    return (
        math.floor(f(x1) / f(width) * f(w)),
        math.floor(f(y1) / f(height) * f(h)),
        math.ceil(f(x2) / f(width) * f(w)),
        math.ceil(f(y2) / f(height) * f(h)),
    )


def slow_weights(per_image, image_size, shape):
    """One over the cells of the smallest box at each cell, by loops."""
    out = np.zeros((len(per_image), *shape), np.float32)
    for i, image in enumerate(per_image):
        for box in image:
            if (cells := slow_cells(box, image_size, shape)) is None:
                continue
            x1, y1, x2, y2 = cells
            weight = np.float32(1) / np.float32(y2 + 1 - y1) / np.float32(x2 + 1 - x1)
            for y in range(y1, min(y2, shape[0] - 1) + 1):
                for x in range(x1, min(x2, shape[1] - 1) + 1):
                    out[i, y, x] = max(out[i, y, x], weight)
    return out


def weights(per_image, image_size, shape):
    boxes, index = flat(per_image)
    cells = box_cells(boxes, image_size, shape)
    return paint(cell_weights(cells), cells, index, len(per_image), shape).numpy()


@pytest.mark.parametrize("shape", [(16, 20), (8, 10), (4, 5), (1, 1), (7, 3)])
@pytest.mark.parametrize("name", BOXES)
def test_equals_the_loop(name, shape):
    np.testing.assert_array_equal(weights(BOXES[name], IMAGE, shape), slow_weights(BOXES[name], IMAGE, shape))


def test_equals_the_loop_on_random_boxes():
    rng = np.random.default_rng(0)
    centres, sizes = rng.uniform(-40, 200, (3, 30, 2)), rng.uniform(0, 120, (3, 30, 2))
    per_image = np.concatenate([centres - sizes / 2, centres + sizes / 2], -1).astype(np.float32).tolist()
    for shape in ((16, 20), (8, 10), (4, 5)):
        np.testing.assert_array_equal(weights(per_image, IMAGE, shape), slow_weights(per_image, IMAGE, shape))


def test_cells_are_inclusive_and_the_border_counts_one_more():
    boxes = torch.tensor([[16.0, 16, 32, 32], [17, 17, 17, 17], [144, 112, 160, 128], [0, 0, 160, 128]])
    cells = box_cells(boxes, IMAGE, (16, 20))
    assert cells.tolist() == [[2, 2, 4, 4], [2, 2, 3, 3], [18, 14, 20, 16], [0, 0, 20, 16]]
    torch.testing.assert_close(1 / cell_weights(cells), torch.tensor([9.0, 4, 9, 21 * 17]))
    painted = paint(torch.ones(4), cells, torch.arange(4), 4, (16, 20))
    assert painted.sum((1, 2)).tolist() == [9, 4, 4, 320]


@pytest.mark.parametrize(
    "box", [(-9, 5, -1, 50), (5, -9, 50, -1), (160, 5, 170, 50), (5, 128, 50, 140), (-50, -50, -8, -8)]
)
def test_a_box_outside_covers_nothing_and_does_not_wrap(box):
    assert not weights([[box]], IMAGE, (16, 20)).any()


def test_a_box_over_the_left_border_is_clipped():
    np.testing.assert_array_equal(
        weights([[(-70, 8, 20, 20)]], IMAGE, (16, 20)), weights([[(0, 8, 20, 20)]], IMAGE, (16, 20))
    )


def test_the_largest_value_wins_within_a_group_only():
    cells = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2], [0, 0, 2, 2]])
    canvas = paint(torch.tensor([3.0, 2.0, 5.0]), cells, torch.tensor([0, 0, 2]), 3, (3, 3))
    assert canvas[0].tolist() == [[3, 3, 0], [3, 3, 2], [0, 2, 2]]
    assert not canvas[1].any()
    assert (canvas[2] == 5).all()


def test_the_memory_bound_changes_nothing(monkeypatch):
    expected = weights(BOXES["typical"], IMAGE, (16, 20))
    monkeypatch.setattr(module, "BUDGET", 500)
    np.testing.assert_array_equal(weights(BOXES["typical"], IMAGE, (16, 20)), expected)
