"""BCKD: the published numbers, GIoU against a slow reading, and what the class divides by."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import BOXES, Facts, make_inputs, make_loss, make_pair
from yolo_kd.losses.bckd import BCKD, CLS_STRENGTH, LOC_STRENGTH, probability_gap
from yolo_kd.losses.kernels.ops import (
    box_giou,
    corners,
    distance_giou,
    expected_distance,
    gap_cross_entropy,
    giou_distance,
    target_score_sum,
)

FACTS = {
    "bckd": Facts(exempt={"gradcheck": "the weight of the localisation term takes no part in the gradient; see below"})
}

golden = pytest.mark.parametrize("case", cases("bckd"), ids=lambda g: f"case_{g.case}")


@golden
def test_class_term_equals_the_published_code(case: Golden) -> None:
    student = case["logits_s"].requires_grad_()
    rows = gap_cross_entropy(student, case["logits_t"], case.hyper["beta"])
    loss = case.hyper["cls_weight"] * (rows * case["label_weights"]).sum() / case["num_pos"]
    torch.testing.assert_close(loss, case["out_cls"], rtol=1e-5, atol=0)
    loss.backward()
    assert_gradient(student.grad, case["grad_logits_s"])


@golden
def test_localisation_term_equals_the_published_code(case: Golden) -> None:
    student = case["boxes_s"].requires_grad_()
    weighted = giou_distance(student, case["boxes_t"]) * case["loc_weight"]
    loss = case.hyper["loc_weight"] * weighted.sum() / case["num_pos"]
    torch.testing.assert_close(loss, case["out_loc"], rtol=1e-5, atol=0)
    loss.backward()
    assert_gradient(student.grad, case["grad_boxes_s"])


@golden
def test_localisation_weight_equals_the_published_code(case: Golden) -> None:
    gap = probability_gap(case["logits_s"], case["logits_t"]) * case["label_weights"]
    torch.testing.assert_close(gap, case["loc_weight"], rtol=1e-5, atol=1e-7)


def slow_giou(a: list[float], b: list[float]) -> float:
    def area(x1: float, y1: float, x2: float, y2: float) -> float:
        return max(0.0, x2 - x1) * max(0.0, y2 - y1)

    inner = area(max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3]))
    hull = area(min(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))
    union = area(*a) + area(*b) - inner
    return inner / union - (hull - union) / hull


def test_giou_equals_a_slow_reading() -> None:
    rng = torch.Generator().manual_seed(0)
    start = torch.rand(2, 200, 2, generator=rng) * 8
    boxes = torch.cat((start, start + torch.rand(2, 200, 2, generator=rng) * 15 + 0.1), -1)
    ours = box_giou(boxes[0], boxes[1]).tolist()
    assert ours == pytest.approx([slow_giou(a, b) for a, b in zip(*boxes.tolist(), strict=True)], abs=1e-5)
    assert min(ours) < -0.5
    assert max(ours) > 0.5


def test_giou_of_one_point_needs_no_position() -> None:
    distances = torch.rand(2, 50, 4, generator=torch.Generator().manual_seed(0)) * 10 + 0.1
    a, b = (corners(d[None], 1)[0] for d in distances)
    torch.testing.assert_close(box_giou(a, b), distance_giou(*distances), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(box_giou(8 * a + 36, 8 * b + 36), box_giou(a, b), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((3.0, 3.0, 3.0, 3.0), (3.0, 3.0, 3.0, 3.0)),  # both a point
        ((5.0, 5.0, 1.0, 1.0), (0.0, 0.0, 9.0, 9.0)),  # corners in the wrong order
        ((5.0, 5.0, 1.0, 1.0), (7.0, 7.0, 2.0, 2.0)),
        ((50.0, 50.0, -50.0, -50.0), (0.0, 0.0, 9.0, 9.0)),  # worth a lot where its area counts as positive
        ((50.0, 0.0, -50.0, 9.0), (0.0, 0.0, 9.0, 9.0)),
        ((0.0, 0.0, 1e5, 1e5), (0.0, 0.0, 1e-5, 1e-5)),
    ],
)
def test_giou_of_degenerate_boxes_is_finite(a: tuple, b: tuple) -> None:
    student = torch.tensor([a], requires_grad=True)
    value = giou_distance(student, torch.tensor([b]))
    value.sum().backward()
    assert 0 <= value.item() <= 2
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_gradients_are_those_of_the_values() -> None:
    rng = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 3, dtype=torch.float64, generator=rng)
    assert torch.autograd.gradcheck(lambda s: gap_cross_entropy(s, logits[1]), logits[0].requires_grad_())
    distances = torch.rand(2, 1, 6, 4, dtype=torch.float64, generator=rng) + 0.1
    boxes = [corners(d, 1) for d in distances]
    assert torch.autograd.gradcheck(lambda s: giou_distance(s, boxes[1]), boxes[0].requires_grad_())


def test_equals_a_slow_reading_of_the_definition() -> None:
    pair = make_pair(student_reg_max=1, teacher_reg_max=8)
    inputs = make_inputs(pair, seed=5)
    assert inputs.targets is not None
    assert inputs.targets.assignment is not None
    boxes = [expected_distance(v.boxes, v.reg_max).tolist() for v in (inputs.student, inputs.teacher)]
    probabilities = [v.scores.double().sigmoid().tolist() for v in (inputs.student, inputs.teacher)]
    cls = loc = 0.0
    for b in range(2):
        for a in range(inputs.student.scores.shape[1]):
            gap = 0.0
            for s, t in zip(probabilities[0][b][a], probabilities[1][b][a], strict=True):
                cls -= abs(t - s) ** 2 * (t * math.log(s) + (1 - t) * math.log(1 - s))
                gap = max(gap, abs(t - s))
            (sl, st, sr, sb), (tl, tt, tr, tb) = boxes[0][b][a], boxes[1][b][a]
            loc += gap * (1 - slow_giou([-sl, -st, sr, sb], [-tl, -tt, tr, tb]))
    divisor = inputs.targets.assignment.scores.sum().item()
    assert divisor > 2
    columns = make_loss(BCKD, pair, lam_cls=0.5, lam_loc=3.0, beta=2.0)(inputs)
    assert columns["kbcls_loss"].item() == pytest.approx(CLS_STRENGTH * 0.5 * cls / divisor, rel=1e-4)
    assert columns["kbloc_loss"].item() == pytest.approx(LOC_STRENGTH * 3.0 * loc / divisor, rel=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_an_image_without_objects_counts_as_one(batch: int) -> None:
    assert target_score_sum(make_inputs(boxes=((),) * batch)).item() == batch


def test_strength_stays_when_a_batch_without_objects_grows() -> None:
    pair = make_pair()
    loss = make_loss(BCKD, pair)
    inputs = make_inputs(pair, boxes=BOXES["none"])
    columns = loss(inputs)
    single = loss(make_inputs(pair, boxes=BOXES["none"][:1]))
    for name, value in columns.items():
        assert value.item() == pytest.approx(single[name].item(), rel=0.3), name
