"""Knowledge review against published numbers and loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import Facts, make_inputs, make_loss, make_pair
from yolo_kd.errors import PairError
from yolo_kd.losses.reviewkd import Fusion, ReviewKD, hcl, review

FACTS = {
    "reviewkd": Facts(
        exempt={"minimum": "the fusion is trained, so its output is not the teacher's features at the start"}
    )
}

every_case = pytest.mark.parametrize("case", cases("reviewkd"), ids=lambda c: c.case)

OURS = {
    "conv1.0": "reduce",
    "conv1.1": "reduce_norm",
    "att_conv.0": "gate",
    "conv2.0": "expand",
    "conv2.1": "expand_norm",
}


def fusions(case: Golden) -> nn.ModuleList:
    """Return our modules, deepest first, with the published ones' parameters."""
    student, teacher, mid = (case.hyper[k] for k in ("in_channels", "out_channels", "mid_channel"))
    modules = nn.ModuleList()
    for k in range(3):
        module = Fusion(student[2 - k], mid, teacher[2 - k], deeper=k > 0)
        state = {}
        for name, value in case.state(f"p.abfs.{k}.").items():
            block, leaf = name.rsplit(".", 1)
            state[f"{OURS[block]}.{leaf}"] = value
        module.load_state_dict(state)
        modules.append(module)
    return modules


@every_case
def test_equals_the_published_implementation(case):
    maps = [case[f"s_feat_{i}"].requires_grad_() for i in range(3)]
    outputs = review(fusions(case), maps)
    total = torch.zeros(())
    for i, fused in enumerate(outputs):
        expected = case[f"abf_out_{i}"]
        assert (fused - expected).abs().max() <= 1e-5 * expected.abs().max()
        value = hcl(fused, case[f"t_feat_{i}"])
        assert value.item() == pytest.approx(case[f"out_hcl_{i}"].item(), rel=1e-5)
        total = total + value
    assert total.item() == pytest.approx(case["out_hcl"].item(), rel=1e-5)
    total.backward()
    for i, s in enumerate(maps):
        assert_gradient(s.grad, case[f"grad_s_feat_{i}"])


def slow_hcl(s: np.ndarray, t: np.ndarray) -> float:
    """Pool cell by cell over the rows and columns that adaptive pooling assigns to it."""
    height, width = s.shape[-2:]
    total, weights, weight = ((s - t) ** 2).mean(), 1.0, 1.0
    for side in (4, 2, 1):
        if side >= height:
            continue
        weight /= 2
        weights += weight
        errors = []
        for i in range(side):
            rows = slice(i * height // side, math.ceil((i + 1) * height / side))
            for j in range(side):
                columns = slice(j * width // side, math.ceil((j + 1) * width / side))
                errors.append((s[..., rows, columns].mean((2, 3)) - t[..., rows, columns].mean((2, 3))) ** 2)
        total += weight * np.mean(errors)
    return total / weights


@pytest.mark.parametrize("size", [(7, 9), (8, 4), (5, 5), (4, 6), (2, 9), (1, 5), (1, 1)])
def test_pooled_error_equals_loops(size):
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 3, *size)), rng.normal(size=(2, 3, *size))
    assert hcl(torch.from_numpy(s), torch.from_numpy(t)).item() == pytest.approx(slow_hcl(s, t), rel=1e-9)


def test_pooled_error_vanishes_at_agreement_only():
    t = torch.randn(2, 3, 8, 8)
    assert hcl(t.clone(), t).item() == 0
    assert hcl(t + 0.5, t).item() == pytest.approx(0.25, rel=1e-5), "an offset is seen in full at every scale"


def test_deeper_levels_reach_finer_ones_and_not_the_other_way():
    pair = make_pair()
    loss = make_loss(ReviewKD, pair)
    for finest, deepest in ((True, False), (False, True)):
        inputs = make_inputs(pair)
        outputs = review(loss.fusions, inputs.student.features)
        outputs[0 if finest else 2].square().sum().backward()
        assert (inputs.student.features[2].grad is not None) == (finest or deepest)
        assert (inputs.student.features[0].grad is not None) == finest


def test_fusion_ignores_train_and_eval_mode():
    pair = make_pair()
    loss = make_loss(ReviewKD, pair)
    value = loss.train()(make_inputs(pair))["rev_loss"].item()
    assert loss.eval()(make_inputs(pair))["rev_loss"].item() == value
    assert not list(loss.buffers())


def test_gate_weighs_the_level_against_the_deeper_one():
    fusion = Fusion(3, 4, 5, deeper=True)
    with torch.no_grad():
        fusion.gate.weight.zero_()
        fusion.gate.bias.copy_(torch.tensor([-100.0, 100.0]))
    residual = torch.randn(2, 4, 2, 3)
    fused = fusion(torch.randn(2, 3, 4, 6), residual)[1]
    torch.testing.assert_close(fused, residual.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_loss_adds_up_its_levels():
    pair = make_pair()
    inputs = make_inputs(pair)
    loss = make_loss(ReviewKD, pair, levels=["p5", "p3"], mid_channels=6)
    assert [f.reduce.in_channels for f in loss.fusions] == [16, 8], "deepest first, whatever the order in the recipe"
    assert [f.gate is None for f in loss.fusions] == [True, False]
    outputs = review(loss.fusions, [inputs.student.features[i] for i in (0, 2)])
    expected = ReviewKD.strength * sum(
        hcl(f, inputs.teacher.features[i]).item() for f, i in zip(outputs, (0, 2), strict=True)
    )
    assert loss(inputs)["rev_loss"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("mid", [0, -3, 2.5, True, "128"])
def test_refuses_a_width(mid):
    with pytest.raises(ValueError, match="mid_channels must be a"):
        ReviewKD(mid_channels=mid)


def test_refuses_an_unknown_level():
    with pytest.raises(PairError, match="'p6'"):
        make_loss(ReviewKD, make_pair(), levels=["p6"])
