"""Channel-wise distillation against published numbers, loops and torch's own divergence."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.cwd import CWD, cwd
from yolo_kd.losses.kernels.channel_stats import standardise
from yolo_kd.losses.kernels.ops import categorical_kl

every_case = pytest.mark.parametrize("case", cases("cwd"), ids=lambda c: c.case)
every_damo_case = pytest.mark.parametrize("case", cases("damo"), ids=lambda c: c.case)
every_kl_case = pytest.mark.parametrize("case", cases("mmrazor"), ids=lambda c: c.case)


def students(case: Golden) -> list[torch.Tensor]:
    return [case[f"s_feat_{i}"].requires_grad_() for i in range(3)]


@every_case
def test_equals_two_published_implementations(case):
    maps = students(case)
    total = torch.zeros(())
    for i, s in enumerate(maps):
        aligned = F.conv2d(s, **case.state(f"p{i}.align."))
        value = case.hyper["weight"] * cwd(aligned, case[f"t_feat_{i}"], case.hyper["tau"])
        for other in ("mmrazor", "torchdistiller"):
            assert value.item() == pytest.approx(case[f"out_kl_{other}_{i}"].item(), rel=1e-5)
        total = total + value
    assert total.item() == pytest.approx(case["out_kl_total"].item(), rel=1e-5)
    total.backward()
    for i, s in enumerate(maps):
        assert_gradient(s.grad, case[f"grad_s_feat_{i}"])


@every_damo_case
def test_equals_the_published_standardised_form(case):
    maps = students(case)
    total = torch.zeros(())
    for i, s in enumerate(maps):
        aligned = F.conv2d(s, **case.state(f"p.align_module.{i}."))
        total = total + cwd(standardise(aligned), standardise(case[f"t_feat_{i}"]), case.hyper["tau"])
    assert case.hyper["loss_weight"] * total.item() == pytest.approx(case["out_cwd"].item(), rel=1e-5)
    total.backward()
    for i, s in enumerate(maps):
        assert_gradient(s.grad, case[f"grad_cwd_s_feat_{i}"])


@every_kl_case
@pytest.mark.parametrize("logits", ["logits4", "logits2"])
def test_its_divergence_equals_the_published_one_in_each_reduction(case, logits):
    weight, tau = case.hyper["kl_loss_weight"], case.hyper["tau"]
    s, t = case[f"{logits}_s"].requires_grad_(), case[f"{logits}_t"]
    each = weight * categorical_kl(s, t, tau, dim=1)
    rank = logits[-1]
    expected = {"sum": each.sum(), "mean": each.sum() / s.numel(), "batchmean": each.sum() / len(s)}
    for reduction, value in expected.items():
        assert value.item() == pytest.approx(case[f"out_kl{rank}_{reduction}"].item(), rel=1e-5)
    expected["batchmean"].backward()
    assert_gradient(s.grad, case[f"grad_{logits}_s_batchmean"])


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_equals_loops_and_torchs_own_divergence(tau):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, 4, 5)), rng.normal(size=(2, 3, 4, 5))
    total = 0.0
    for b in range(2):
        for c in range(3):
            p, q = (np.exp(x[b, c] / tau) / np.exp(x[b, c] / tau).sum() for x in (t, s))
            total += tau**2 * sum(p[i, j] * np.log(p[i, j] / q[i, j]) for i in range(4) for j in range(5))
    ours = cwd(torch.from_numpy(s), torch.from_numpy(t), tau).item()
    assert ours == pytest.approx(total / 6, rel=1e-9)

    rows = [torch.from_numpy(x).reshape(6, 20).div(tau).log_softmax(-1) for x in (s, t)]
    assert ours == pytest.approx(tau**2 * F.kl_div(*rows, reduction="batchmean", log_target=True).item(), rel=1e-9)


def test_an_offset_of_a_channel_costs_nothing():
    teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert cwd(teacher + torch.tensor([3.0, -1.0, 7.0]).view(1, 3, 1, 1), teacher).item() == pytest.approx(0, abs=1e-12)


def test_a_hot_softmax_approaches_half_the_variance_of_the_difference():
    """The limit that makes large temperatures comparable with squared error."""
    s, t = torch.randn(2, 3, 6, 6, dtype=torch.float64), torch.randn(2, 3, 6, 6, dtype=torch.float64)
    limit = (t - s).var((2, 3), correction=0).mean() / 2
    assert cwd(s, t, 1e4).item() == pytest.approx(limit.item(), rel=1e-3)


def test_strength_does_not_grow_with_the_image():
    s, t = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert cwd(s.repeat(1, 1, 2, 3), t.repeat(1, 1, 2, 3)).item() == pytest.approx(cwd(s, t).item(), rel=1e-5)


@pytest.mark.parametrize("standard", [True, False])
def test_loss_adds_up_its_levels(standard):
    pair = make_pair()
    inputs = make_inputs(pair)
    loss = make_loss(CWD, pair, levels=["p3", "p5"], temperature=2.0, standardise=standard)
    expected = 0.0
    for i in (0, 2):
        s, t = inputs.aligned("conv1x1", i), inputs.teacher_feature(i)
        if standard:
            s, t = standardise(s), standardise(t)
        expected += CWD.strength * cwd(s, t, 2.0).item()
    assert loss(inputs)["cwd_loss"].item() == pytest.approx(expected, rel=1e-6)


def test_standardised_loss_ignores_the_scale_of_the_teacher():
    pair = make_pair()
    loss = make_loss(CWD, pair)
    inputs, scaled = make_inputs(pair), make_inputs(pair)
    with torch.no_grad():
        for feature in scaled.teacher.features:
            feature.mul_(50).add_(3)
    assert loss(scaled)["cwd_loss"].item() == pytest.approx(loss(inputs)["cwd_loss"].item(), rel=1e-3)


@pytest.mark.parametrize("keys", [{"temperature": 0}, {"temperature": -1.0}, {"temperature": "hot"}, {"levels": "p3"}])
def test_refuses(keys):
    with pytest.raises(ValueError, match=f"{next(iter(keys))} must be"):
        CWD(**keys)
