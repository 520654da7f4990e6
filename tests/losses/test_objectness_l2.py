"""The raw-logit form against published numbers and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.objectness_l2 import STRENGTH, ObjectnessL2, objectness_logit_l2

every_case = pytest.mark.parametrize("case", cases("objscaled_seed"), ids=lambda c: c.case)


def outputs(raw, case):
    """Split (N, anchors * (5 + nc), H, W) into boxes, objectness and classes of each anchor."""
    anchors, nc = case.hyper["anchors"], case.hyper["num_classes"]
    rows = raw.unflatten(1, (anchors, 5 + nc)).movedim(2, -1)  # (N, anchors, H, W, 5 + nc)
    return rows[..., :4], rows[..., 4:5], rows[..., 5:]


@every_case
def test_equals_the_published_form(case):
    # the trimmed copy has no first map; the gradients of the other two do not depend on it
    levels = [i for i in range(3) if f"s_out_{i}" in case]
    maps = {i: case[f"s_out_{i}"].requires_grad_() for i in levels}
    teacher = [outputs(case[f"t_out_{i}"], case) for i in levels]
    total = objectness_logit_l2([outputs(m, case) for m in maps.values()], teacher, case.hyper["lambda_pi"])
    if "out_total" in case:
        assert total.item() == pytest.approx(case["out_total"].item(), rel=1e-5)
    total.backward()
    for i in (1, 2):
        assert_gradient(maps[i].grad, case[f"grad_s_out_{i}"])


def slow(inputs):
    """Sum over levels of three means, entry by entry; boxes as bins, or decoded where their numbers differ."""
    s, t = inputs.student, inputs.teacher

    def boxes(outputs):
        raw = outputs.boxes.detach().double().numpy()
        if s.reg_max == t.reg_max or outputs.reg_max == 1:
            return raw
        bins = softmax(raw.reshape(*raw.shape[:2], 4, outputs.reg_max), axis=-1)
        return (bins * np.arange(outputs.reg_max)).sum(-1)

    s_scores, t_scores = (v.scores.detach().double().numpy() for v in (s, t))
    s_boxes, t_boxes = boxes(s), boxes(t)
    total, start = 0.0, 0
    for f in t.features:
        points = range(start, start + f.shape[2] * f.shape[3])
        start = points.stop
        sums, counts = [0.0] * 3, [0] * 3
        for b in range(len(f)):
            for a in points:
                weight = expit(t_scores[b, a].max())
                errors = (
                    s_boxes[b, a] - t_boxes[b, a],
                    np.array([s_scores[b, a].max() - t_scores[b, a].max()]),
                    s_scores[b, a] - t_scores[b, a],
                )
                for k, error in enumerate(errors):
                    sums[k] += weight * (error**2).sum()
                    counts[k] += len(error)
        total += sum(x / n for x, n in zip(sums, counts, strict=True))
    return total


@pytest.mark.parametrize("bins", [(8, 8), (8, 4), (1, 8), (8, 1), (1, 1)])
def test_equals_loops_over_points(bins):
    pair = make_pair(student_reg_max=bins[0], teacher_reg_max=bins[1])
    inputs = make_inputs(pair, image=(64, 96), seed=4)
    value = make_loss(ObjectnessL2, pair, lam=2.5)(inputs)["kobj2_loss"] / STRENGTH
    assert value.item() == pytest.approx(2.5 * slow(inputs), rel=1e-4)


def test_default_is_the_published_lambda():
    pair = make_pair()
    value = make_loss(ObjectnessL2, pair)(make_inputs(pair))["kobj2_loss"] / STRENGTH
    assert value.item() == pytest.approx(10 * slow(make_inputs(pair)), rel=1e-4)


def test_teacher_that_sees_nothing_teaches_nothing():
    s = [(torch.randn(2, 5, 4), torch.randn(2, 5, 1), torch.randn(2, 5, 3))]
    t = [(torch.randn(2, 5, 4), torch.full((2, 5, 1), -200.0), torch.randn(2, 5, 3))]
    assert objectness_logit_l2(s, t).item() == 0


@pytest.mark.parametrize("value", [-0.1, None, "10"])
def test_bad_lambda(value):
    with pytest.raises(ValueError, match=rf"^lam must be a number of at least 0, received {value!r}$"):
        ObjectnessL2(lam=value)


def test_shapes_are_named():
    s = [(torch.zeros(2, 5, 4), torch.zeros(2, 5, 1), torch.zeros(2, 5, 3))]
    t = [(torch.zeros(2, 6, 4), torch.zeros(2, 6, 1), torch.zeros(2, 6, 3))]
    with pytest.raises(ValueError, match=r"^shapes must agree, received student \(2, 5, 4\), teacher \(2, 6, 4\)$"):
        objectness_logit_l2(s, t)
