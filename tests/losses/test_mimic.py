"""Feature imitation against published numbers and loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import BOXES, IMAGE, Facts, make_inputs, make_loss, make_pair
from yolo_kd.losses.kernels.channel_stats import standardise
from yolo_kd.losses.mimic import Mimic, box_mask, mimic
from yolo_kd.structures import Targets

FACTS = {"mimic": Facts(values={"mask": "boxes"})}

every_case = pytest.mark.parametrize("case", cases("damo"), ids=lambda c: c.case)


def slow_mask(targets: Targets, shape: tuple[int, int]) -> np.ndarray:
    """Visit every cell and ask every box whether the two open rectangles meet."""
    mask = np.zeros((targets.batch_size, *shape), np.float32)
    high, wide = targets.image_size[0] / shape[0], targets.image_size[1] / shape[1]
    for image, box in zip(targets.image_index.tolist(), targets.boxes.tolist(), strict=True):
        for row in range(shape[0]):
            for column in range(shape[1]):
                across = box[0] < (column + 1) * wide and box[2] > column * wide
                down = box[1] < (row + 1) * high and box[3] > row * high
                mask[image, row, column] = max(mask[image, row, column], float(across and down))
    return mask


@every_case
def test_equals_the_published_standardised_form(case):
    maps = [case[f"s_feat_{i}"].requires_grad_() for i in range(3)]
    total = torch.zeros(())
    for i, s in enumerate(maps):
        aligned = F.conv2d(s, **case.state(f"p.align_module.{i}."))
        total = total + mimic(standardise(aligned), standardise(case[f"t_feat_{i}"]))
    assert case.hyper["loss_weight"] * total.item() == pytest.approx(case["out_mimic"].item(), rel=1e-5)
    total.backward()
    for i, s in enumerate(maps):
        assert_gradient(s.grad, case[f"grad_mimic_s_feat_{i}"])


@pytest.mark.parametrize("boxes", BOXES.values(), ids=BOXES)
@pytest.mark.parametrize("shape", [(16, 20), (8, 10), (4, 5)])
def test_mask_equals_loops(shape, boxes):
    targets = make_inputs(boxes=boxes).targets
    assert targets.image_size == IMAGE
    np.testing.assert_array_equal(box_mask(targets, shape).numpy(), slow_mask(targets, shape))


def test_mask_of_random_boxes_equals_loops():
    rng = np.random.default_rng(3)
    corners = rng.uniform(-30, 200, (40, 2))
    boxes = torch.from_numpy(np.concatenate([corners, corners + rng.uniform(0, 60, (40, 2))], 1)).float()
    index = torch.from_numpy(rng.integers(0, 5, 40))
    targets = Targets(boxes, torch.zeros(40, dtype=torch.int64), index, (96, 160), 5)
    for shape in ((12, 20), (6, 10), (3, 5)):
        np.testing.assert_array_equal(box_mask(targets, shape).numpy(), slow_mask(targets, shape))


def test_a_box_on_the_grid_marks_exactly_its_cells():
    targets = make_inputs(boxes=(((8, 16, 24, 24),),)).targets
    mask = box_mask(targets, (16, 20))[0]
    assert mask[2, 1:3].tolist() == [1, 1]
    assert mask.sum() == 2


def test_masked_error_equals_loops():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    mask = (rng.uniform(size=(2, 4, 5)) < 0.4).astype(float)
    total = 0.0
    for b in range(2):
        for i in range(4):
            for j in range(5):
                total += mask[b, i, j] * sum((s[b, c, i, j] - t[b, c, i, j]) ** 2 for c in range(3)) / 3
    ours = mimic(*(torch.from_numpy(x) for x in (s, t, mask)))
    assert ours.item() == pytest.approx(total / mask.sum(), rel=1e-6)


def test_a_full_mask_is_no_mask():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert mimic(s, t, torch.ones(2, 4, 5)).item() == pytest.approx(mimic(s, t).item(), rel=1e-5)
    assert mimic(s, t).item() == pytest.approx(F.mse_loss(s, t).item(), rel=1e-6)


def test_cells_outside_the_mask_get_no_gradient():
    pair = make_pair()
    inputs = make_inputs(pair)
    make_loss(Mimic, pair, mask="boxes", standardise=False)(inputs)["mimic_loss"].backward()
    for feature in inputs.student.features:
        outside = box_mask(inputs.targets, feature.shape[-2:]) == 0
        moved = feature.grad.abs().sum(1)
        assert not moved[outside].any()
        assert moved[~outside].all()


@pytest.mark.parametrize("standard", [True, False])
def test_without_boxes_the_masked_loss_is_zero(standard):
    pair = make_pair()
    inputs = make_inputs(pair, boxes=BOXES["none"])
    value = make_loss(Mimic, pair, mask="boxes", standardise=standard)(inputs)["mimic_loss"]
    value.backward()
    assert value.item() == 0
    assert not any(f.grad.any() for f in inputs.student.features)


@pytest.mark.parametrize("standard", [True, False])
@pytest.mark.parametrize("mask", ["none", "boxes"])
def test_loss_adds_up_its_levels(standard, mask):
    pair = make_pair()
    inputs = make_inputs(pair)
    expected = 0.0
    for i in (0, 2):
        s, t = inputs.aligned("conv1x1", i), inputs.teacher_feature(i)
        if standard:
            s, t = standardise(s), standardise(t)
        expected += (
            Mimic.strength * mimic(s, t, box_mask(inputs.targets, t.shape[-2:]) if mask == "boxes" else None).item()
        )
    loss = make_loss(Mimic, pair, levels=["p3", "p5"], mask=mask, standardise=standard)
    assert loss(inputs)["mimic_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_refuses_an_unknown_mask():
    with pytest.raises(ValueError, match=r"none or boxes, received 'box'\. Did you mean 'boxes'"):
        Mimic(mask="box")
    with pytest.raises(ValueError, match=r"mask \(2, 4, 6\), cells \(2, 4, 5\)"):
        mimic(torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5), torch.ones(2, 4, 6))
