"""Upstream's own distillation loss against its published numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.distillation.adapters import build_adapters
from yolo_kd.errors import PairError
from yolo_kd.losses.ultralytics import Ultralytics, score_weighted_l2
from yolo_kd.structures import DetectorOutputs, LossInputs, PairSpec

every_case = pytest.mark.parametrize("case", cases("ultralytics"), ids=lambda c: c.case)


def golden_step(case):
    """Return the pair and the inputs of a stored case, with its projectors as adapters."""
    features = {who: tuple(case[f"{who}_feat_{i}"] for i in range(3)) for who in "st"}
    logits = [case[f"t_cls_logits_{i}"] for i in range(3)]  # (N, nc, H * W)
    scores = torch.cat(logits, -1).transpose(1, 2)
    nothing = torch.zeros(*scores.shape[:2], 4)
    for f in features["s"]:
        f.requires_grad_()
    widths = [tuple(f.shape[1] for f in features[who]) for who in "st"]
    pair = PairSpec(widths[0], widths[1], (8, 16, 32), scores.shape[-1], 1, 1)
    student = DetectorOutputs(features["s"], torch.zeros_like(scores), nothing, pair.strides, 1)
    teacher = DetectorOutputs(features["t"], scores, nothing, pair.strides, 1)
    adapters = build_adapters("mlp", pair)
    for i, adapter in enumerate(adapters):
        adapter.load_state_dict(case.state(f"p{i}."))
    return pair, LossInputs(student, teacher, align=lambda kind, i: {"mlp": adapters}[kind][i](student.features[i]))


@every_case
def test_equals_the_published_implementation(case):
    pair, inputs = golden_step(case)
    value = make_loss(Ultralytics, pair)(inputs)["dis_loss"]
    assert case.hyper["dis"] == 6.0
    assert value.item() == pytest.approx(case["out_total_dis6"].item(), rel=1e-5)
    value.backward()
    for i in range(3):
        if f"grad_s_feat_{i}" in case:  # the trimmed copy leaves out the largest map's
            assert_gradient(inputs.student.features[i].grad, case[f"grad_s_feat_{i}"])


@every_case
@pytest.mark.parametrize("level", [0, 1, 2])
def test_each_level_equals_the_published_implementation(case, level):
    pair, inputs = golden_step(case)
    value = make_loss(Ultralytics, pair, dis=1.0, levels=[f"p{level + 3}"])(inputs)["dis_loss"]
    assert value.item() == pytest.approx(case[f"out_sl2_{level}"].item(), rel=1e-5)


def slow(student, teacher, score):
    """Entry by entry."""
    error = weights = 0.0
    b, c, h, w = teacher.shape
    for i in range(b):
        for y in range(h):
            for x in range(w):
                weights += score[i, 0, y, x]
                for k in range(c):
                    error += score[i, 0, y, x] * (student[i, k, y, x] - teacher[i, k, y, x]) ** 2
    return error / (c * weights)


def test_equals_loops_over_cells():
    s, t, score = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5), torch.rand(2, 1, 4, 5)
    expected = slow(*(x.double().numpy() for x in (s, t, score)))
    assert score_weighted_l2(s, t, score).item() == pytest.approx(expected, rel=1e-5)


def test_weights_of_an_end_to_end_head_come_from_the_mean_of_both_logits():
    pair = make_pair()
    inputs = make_inputs(pair, one2one=True)
    t = inputs.teacher
    mean = replace(t, scores=(t.scores + t.one2one_scores) / 2, one2one_scores=None)
    loss = make_loss(Ultralytics, pair)
    merged = LossInputs(inputs.student, mean, align=inputs._align)
    alone = LossInputs(inputs.student, replace(t, one2one_scores=None), align=inputs._align)
    value = loss(inputs)["dis_loss"].item()
    assert value == pytest.approx(loss(merged)["dis_loss"].item(), rel=1e-6)
    assert value != pytest.approx(loss(alone)["dis_loss"].item(), rel=1e-4)


def test_cells_are_weighted_row_by_row():
    """A weight at one point of the flat scores must meet the feature of the very same cell."""
    pair = make_pair(student_channels=(4, 4, 4), teacher_channels=(4, 4, 4), equal=True)
    inputs = make_inputs(pair, equal=True)
    w = inputs.teacher.shapes[0][1]
    scores = torch.full_like(inputs.teacher.scores, -200.0)
    scores[0, 2 * w + 3, 1] = 200.0
    features = [f.detach().clone() for f in inputs.student.features]
    features[0][0, :, 2, 3] += 2.0
    features[0][0, :, 3, 2] += 100.0
    teacher = replace(inputs.teacher, scores=scores)
    value = make_loss(Ultralytics, pair, dis=1.0)(
        LossInputs(replace(inputs.student, features=tuple(features)), teacher)
    )
    assert value["dis_loss"].item() == pytest.approx(4.0, rel=1e-5)


def test_a_level_that_the_pair_lacks():
    with pytest.raises(PairError, match=r"^loss 'ultralytics' names level 'p6', but this pair has p3, p4 or p5\."):
        Ultralytics(levels=["p3", "p6"]).build(make_pair())


@pytest.mark.parametrize("value", [-6, np.nan, True])
def test_bad_gain(value):
    with pytest.raises(ValueError, match=r"^dis must be a number of at least 0, received "):
        Ultralytics(dis=value)


def test_shapes_are_named():
    s, t = torch.zeros(2, 3, 4, 5), torch.zeros(2, 3, 4, 6)
    with pytest.raises(
        ValueError, match=r"^shapes must agree, received student \(2, 3, 4, 5\), teacher \(2, 3, 4, 6\)$"
    ):
        score_weighted_l2(s, t, torch.ones(2, 1, 4, 6))
    with pytest.raises(ValueError, match=r"^shapes must agree, received score \(2, 1, 4, 5\), cells \(2, 1, 4, 6\)$"):
        score_weighted_l2(t, t, torch.ones(2, 1, 4, 5))
