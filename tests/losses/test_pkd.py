"""Pearson distillation against published numbers and scipy's correlation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.pkd import PKD, pkd

every_case = pytest.mark.parametrize("case", cases("pkd"), ids=lambda c: c.case)


@every_case
def test_equals_the_published_implementation(case):
    maps = [case[f"s_feat_{i}"].requires_grad_() for i in range(3)]
    total = torch.zeros(())
    for i, s in enumerate(maps):
        value = case.hyper["loss_weight"] * pkd(s, case[f"t_feat_{i}"], resize_student=case.hyper["resize_stu"])
        assert value.item() == pytest.approx(case[f"out_total_{i}"].item(), rel=1e-5)
        total = total + value
    assert total.item() == pytest.approx(case["out_total"].item(), rel=1e-5)
    total.backward()
    for i, s in enumerate(maps):
        assert_gradient(s.grad, case[f"grad_s_feat_{i}"])


@pytest.mark.parametrize("unbiased", [True, False])
def test_is_one_minus_the_correlation_of_each_channel(unbiased):
    s = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    t = 0.5 * s + torch.randn(2, 4, 3, 5, dtype=torch.float64)
    r = [pearsonr(s[:, c].flatten(), t[:, c].flatten()).statistic for c in range(4)]
    expected = sum(1 - x for x in r) / 4 * (29 / 30 if unbiased else 1)
    assert pkd(s, t, unbiased=unbiased).item() == pytest.approx(expected, rel=1e-5)


def test_scale_and_offset_of_channels_cost_nothing():
    t = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    s = t * torch.tensor([2.0, 0.1, 30.0]).view(1, 3, 1, 1) + torch.tensor([3.0, -1.0, 7.0]).view(1, 3, 1, 1)
    assert pkd(s, t).item() == pytest.approx(0, abs=1e-9)
    assert pkd(-s, t, unbiased=False).item() == pytest.approx(2, rel=1e-4)


def test_resizes_the_side_that_was_named():
    small, large = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 8, 12)
    up = F.interpolate(small, (8, 12), mode="bilinear")
    down = F.interpolate(large, (4, 6), mode="bilinear")
    assert pkd(small, large, resize_student=True).item() == pytest.approx(pkd(up, large).item())
    assert pkd(small, large, resize_student=False).item() == pytest.approx(pkd(small, down).item())
    assert pkd(small, small * 2, resize_student=True) == pkd(small, small * 2)
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 6\).*\(2, 3, 8, 12\)"):
        pkd(small, large)
    with pytest.raises(ValueError, match="shapes must agree"):
        pkd(small[:, :2], large, resize_student=True)


def test_widths_are_compared_too():
    """The published code looks at heights only and fails on maps that differ in width alone."""
    s, t = torch.randn(2, 3, 4, 6), torch.randn(2, 3, 4, 12)
    assert pkd(s, t, resize_student=True).isfinite()


def test_constant_channels_are_finite():
    s = torch.full((2, 3, 4, 5), 0.7).requires_grad_()
    t = torch.randn(2, 3, 4, 5)
    value = pkd(s, t, unbiased=False)
    value.backward()
    assert value.item() == pytest.approx(0.5, rel=1e-2)
    assert s.grad.isfinite().all()


def test_single_value_per_channel_is_zero_not_nan():
    pair = make_pair()
    inputs = make_inputs(pair, batch=1, image=(32, 32))
    assert inputs.student.shapes[-1] == (1, 1)
    value = make_loss(PKD, pair, levels=["p5"])(inputs)["pkd_loss"]
    value.backward()
    assert value.item() == 0
    assert inputs.student.features[-1].grad.isfinite().all()


def test_strength_does_not_grow_with_the_image():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    once, tiled = pkd(s, t, unbiased=False), pkd(s.repeat(1, 1, 2, 3), t.repeat(1, 1, 2, 3), unbiased=False)
    assert tiled.item() == pytest.approx(once.item(), rel=1e-5)


def test_loss_adds_up_its_levels():
    pair = make_pair()
    inputs = make_inputs(pair)
    maps = [(inputs.aligned("conv1x1", i), inputs.teacher_feature(i)) for i in (0, 2)]
    expected = PKD.strength * sum(pkd(s, t, unbiased=False).item() for s, t in maps)
    assert make_loss(PKD, pair, levels=["p3", "p5"])(inputs)["pkd_loss"].item() == pytest.approx(expected, rel=1e-6)
