"""YOLOv6's distribution distillation: the published numbers and a slow reading."""

from __future__ import annotations

import pytest
import torch

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import BOXES, make_inputs, make_loss, make_pair
from yolo_kd.config.schedule import Schedule
from yolo_kd.losses.dfl import DFL, STRENGTH, distribution_kl
from yolo_kd.losses.kernels.ops import weighted_mean

golden = pytest.mark.parametrize("case", cases("yolov6"), ids=lambda g: f"case_{g.case}")


@golden
def test_positives_among_other_points_equal_the_published_code(case: Golden) -> None:
    """The published code selects the positives; here they keep their place and the others weigh nothing."""
    student = case["dist_s_pos"].requires_grad_()
    places = torch.randperm(60, generator=torch.Generator().manual_seed(1))[: len(student)]
    rest = torch.randn(2, 60, *student.shape[1:], generator=torch.Generator().manual_seed(2))
    positive = torch.zeros(60).index_fill(0, places, 1)
    loss = distribution_kl(
        rest[0].index_copy(0, places, student),
        rest[1].index_copy(0, places, case["dist_t_pos"]),
        positive,
        case.hyper["temperature"],
    )
    torch.testing.assert_close(loss, case["out_dfl"], rtol=5e-5, atol=0)
    loss.backward()
    assert_gradient(student.grad, case["grad_dist_s"])


@golden
def test_the_weights_of_the_published_box_loss_cancel(case: Golden) -> None:
    loss = distribution_kl(case["dist_s_pos"], case["dist_t_pos"], torch.ones(23), case.hyper["temperature"])
    weighted = weighted_mean(loss.expand(23), case["bbox_weight_pos"].view(-1))
    torch.testing.assert_close(weighted, case["out_dfl_in_bbox_loss"], rtol=5e-5, atol=0)


@golden
def test_the_recipes_schedule_is_the_published_decay(case: Golden) -> None:
    schedule = Schedule(kind="cosine", start=1.0, end=0.01)
    ours = [schedule(epoch / case["decay_max_epoch"].item()) for epoch in case["decay_epochs"].tolist()]
    assert ours == pytest.approx(case["decay_values"].tolist(), rel=1e-5)


def test_equals_a_slow_reading_of_the_definition() -> None:
    pair = make_pair()
    inputs = make_inputs(pair, seed=6)
    assert inputs.targets is not None
    assert inputs.targets.assignment is not None
    total, count = 0.0, 0
    for b, a in inputs.targets.assignment.foreground.nonzero().tolist():
        for side in range(4):
            s, t = (v.boxes[b, a, side * 8 : side * 8 + 8].double() / 5 for v in (inputs.student, inputs.teacher))
            p, q = t.softmax(0), s.softmax(0)
            total += 25 * (p * (p / q).log()).sum().item()
            count += 1
    loss = make_loss(DFL, pair, temperature=5.0)(inputs)["kdfl_loss"]
    assert loss.item() == pytest.approx(STRENGTH * total / count, rel=1e-4)


def test_without_objects_it_is_zero() -> None:
    pair = make_pair()
    assert make_loss(DFL, pair)(make_inputs(pair, boxes=BOXES["none"]))["kdfl_loss"].item() == 0


def test_wrong_shapes_are_named() -> None:
    rows = torch.zeros(5, 4, 8)
    with pytest.raises(ValueError, match=r"positive \(4,\), points \(5,\)"):
        distribution_kl(rows, rows, torch.ones(4))
