"""Objectness-scaled distillation against loops over points, with boxes as corners in pixels."""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax

from tests.losses.kernels.test_ops import slow_nms
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.losses.kernels.ops import feature_map_nms
from yolo_kd.losses.objectness import BOX_GAIN, CLS_GAIN, Objectness, objectness_box, objectness_class
from yolo_kd.structures import LossInputs


def slow_giou(a, b):
    """GIoU of two boxes, xyxy."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union - (hull - union) / hull


def slow_box(raw, reg_max, x, y, stride):
    """Decode one point's raw output to a box, xyxy pixels."""
    if reg_max > 1:
        raw = [sum(k * p for k, p in enumerate(softmax(raw[i * reg_max : (i + 1) * reg_max]))) for i in range(4)]
    left, top, right, bottom = (d * stride for d in raw)
    return x - left, y - top, x + right, y + bottom


def slow_objectness(inputs, fm_nms):
    """Class and box term as the docstrings state them, point by point."""
    s, t = inputs.student, inputs.teacher
    shapes = [(f.shape[2], f.shape[3]) for f in t.features]
    points = [
        ((u + 0.5) * stride, (v + 0.5) * stride, stride)
        for (h, w), stride in zip(shapes, t.strides, strict=True)
        for v in range(h)
        for u in range(w)
    ]
    s_scores, t_scores, s_boxes, t_boxes = (x.detach().double().numpy() for x in (s.scores, t.scores, s.boxes, t.boxes))
    kept = slow_nms(t_scores, shapes)
    cls = box = total = 0.0
    for b in range(len(t_scores)):
        for a, point in enumerate(points):
            if fm_nms and not kept[b, a]:
                continue
            p, q = expit(t_scores[b, a]), expit(s_scores[b, a])
            weight = p.max()
            total += weight
            for pc, qc in zip(p, q, strict=True):
                cls += weight * (pc * math.log(pc / qc) + (1 - pc) * math.log((1 - pc) / (1 - qc)))
            if s.reg_max == t.reg_max > 1:
                sides = zip(s_boxes[b, a].reshape(4, -1), t_boxes[b, a].reshape(4, -1), strict=True)
                kl = [np.sum(softmax(tr) * np.log(softmax(tr) / softmax(sr))) for sr, tr in sides]
                box += weight * sum(kl) / 4
            else:
                boxes = slow_box(s_boxes[b, a], s.reg_max, *point), slow_box(t_boxes[b, a], t.reg_max, *point)
                box += weight * (1 - slow_giou(*boxes))
    return cls / total, box / total


@pytest.mark.parametrize("fm_nms", [True, False])
@pytest.mark.parametrize("bins", [(8, 8), (8, 4), (1, 8), (8, 1), (1, 1)])
def test_equals_loops_over_points(bins, fm_nms):
    pair = make_pair(student_reg_max=bins[0], teacher_reg_max=bins[1])
    inputs = make_inputs(pair, image=(64, 96), seed=4)
    out = make_loss(Objectness, pair, fm_nms=fm_nms)(inputs)
    cls, box = slow_objectness(inputs, fm_nms)
    assert out["kcls_loss"].item() == pytest.approx(CLS_GAIN * cls, rel=1e-4)
    assert out["kbox_loss"].item() == pytest.approx(BOX_GAIN * box, rel=1e-4)


def test_strengths_are_factors():
    pair, inputs = make_pair(), make_inputs()
    one = make_loss(Objectness, pair)(inputs)
    three = make_loss(Objectness, pair, lam_cls=3.0, lam_box=0.5)(inputs)
    assert three["kcls_loss"].item() == pytest.approx(3 * one["kcls_loss"].item())
    assert three["kbox_loss"].item() == pytest.approx(0.5 * one["kbox_loss"].item())
    assert all(v.item() == 0 for v in make_loss(Objectness, pair, lam_cls=0, lam_box=0)(inputs).values())


def test_points_that_the_teacher_calls_background_have_no_say():
    pair, inputs = make_pair(), make_inputs()
    scores = inputs.teacher.scores.clone()
    scores[:, 20:] = -80.0
    teacher = replace(inputs.teacher, scores=scores)
    moved = inputs.student.scores.detach().clone()
    moved[:, 20:] += 5.0
    loss = make_loss(Objectness, pair)
    before = loss(LossInputs(inputs.student, teacher))
    after = loss(LossInputs(replace(inputs.student, scores=moved), teacher))
    for name, value in before.items():
        assert after[name].item() == pytest.approx(value.item(), rel=1e-6)


def test_strength_does_not_grow_with_the_image():
    pair = make_pair()
    loss = make_loss(Objectness, pair)
    small, large = loss(make_inputs(pair, image=(320, 320))), loss(make_inputs(pair, image=(640, 640)))
    for name, value in small.items():
        assert large[name].item() == pytest.approx(value.item(), rel=0.1)


def test_suppression_is_computed_once_in_a_step():
    pair, inputs = make_pair(), make_inputs()
    with patch("yolo_kd.losses.objectness.feature_map_nms", wraps=feature_map_nms) as spy:
        make_loss(Objectness, pair)(inputs)
        make_loss(Objectness, pair, lam_cls=2.0)(inputs)
        assert spy.call_count == 1
        make_loss(Objectness, pair, fm_nms=False)(inputs)
        assert spy.call_count == 1


@pytest.mark.parametrize("key", ["lam_cls", "lam_box"])
@pytest.mark.parametrize("value", [-1, "1e-3", True, math.nan])
def test_bad_strengths(key, value):
    with pytest.raises(ValueError, match=rf"^{key} must be a number of at least 0, received {value!r}$"):
        Objectness(**{key: value})


def test_shapes_are_named():
    with pytest.raises(ValueError, match=r"^shapes must agree, received student \(2, 5, 3\), teacher \(2, 5, 4\)$"):
        objectness_class(torch.zeros(2, 5, 3), torch.zeros(2, 5, 4), torch.ones(2, 5))
    with pytest.raises(ValueError, match=r"^shapes must agree, received student \(2, 5, 16\), teacher \(2, 6, 16\)$"):
        objectness_box(torch.zeros(2, 5, 16), torch.zeros(2, 6, 16), torch.ones(2, 5), 4, 4)
    with pytest.raises(ValueError, match=r"student_distances \(2, 5, 4\), teacher_distances \(2, 6, 4\)$"):
        objectness_box(torch.zeros(2, 5, 16), torch.zeros(2, 6, 4), torch.ones(2, 5), 4, 1)
