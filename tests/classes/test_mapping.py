"""The mapping of teacher classes onto student classes, in scores and targets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_kd.classes.mapping import ClassMap, MappedTail
from yolo_kd.classes.match import match
from yolo_kd.errors import CheckpointError
from yolo_kd.structures import Assignment, DetectorOutputs, Targets


def named(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


ROAD = named("person", "car", "traffic light", "truck")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(-60, 60), min_size=2, max_size=6))
def test_a_merger_is_the_chance_that_any_is_there(logits: list[float]) -> None:
    """Against the plain product, in float64 and by logarithms of what is left, where the product would be one."""
    classes = ClassMap(("t",) * len(logits), ("s",), (tuple(range(len(logits))),))
    found = classes.teacher_logits(torch.tensor([logits], dtype=torch.float32)).double().item()
    none_there = sum(-math.log1p(math.exp(t)) for t in torch.tensor(logits, dtype=torch.float32).tolist())
    assert 1 / (1 + math.exp(-found)) == pytest.approx(-math.expm1(none_there), rel=1e-4, abs=1e-30)
    assert 1 / (1 + math.exp(found)) == pytest.approx(math.exp(none_there), rel=2e-3, abs=1e-30)


def test_the_plain_product() -> None:
    p = torch.tensor([0.3, 0.6, 0.1], dtype=torch.float64)
    classes = ClassMap(("a", "b", "c"), ("s",), ((0, 1, 2),))
    found = classes.teacher_logits(p.logit().float()).sigmoid()
    assert found.item() == pytest.approx(1 - 0.7 * 0.4 * 0.9, rel=1e-6)


def test_extreme_logits_stay_finite_and_have_gradients() -> None:
    logits = torch.tensor([[-300.0, -300.0], [300.0, 300.0], [-300.0, 300.0]], requires_grad=True)
    merged = ClassMap(("a", "b"), ("s",), ((0, 1),)).teacher_logits(logits)
    assert merged.isfinite().all()
    merged.sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def outputs(scores: torch.Tensor, second: torch.Tensor | None = None) -> DetectorOutputs:
    return DetectorOutputs((torch.zeros(2, 4, 2, 2),), scores, torch.zeros(2, 4, 64), (8,), 16, second)


def test_the_usual_case_touches_nothing() -> None:
    classes = match(ROAD, ROAD)
    scores = torch.randn(2, 4, 4)
    mapped = outputs(scores)
    targets = Targets(
        torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), (8, 8), 2
    )
    assert classes.teacher_outputs(mapped) is mapped
    assert classes.student_outputs(mapped) is mapped
    assert classes.targets(targets) is targets
    assert classes.teacher_logits(scores) is scores


def test_single_classes_keep_their_bits_beside_a_merger() -> None:
    classes = match(ROAD, named("vehicle", "person", "dog"), {"car": "vehicle", "truck": "vehicle"})
    scores, second = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    mapped = classes.teacher_outputs(outputs(scores, second))
    assert mapped.scores.shape == (2, 4, 2)
    assert torch.equal(mapped.scores[..., 1], scores[..., 0])
    p = scores.double().sigmoid()
    torch.testing.assert_close(mapped.scores[..., 0].double().sigmoid(), 1 - (1 - p[..., 1]) * (1 - p[..., 3]))
    assert mapped.one2one_scores is not None
    assert torch.equal(mapped.one2one_scores[..., 1], second[..., 0])
    half = classes.teacher_logits(scores.bfloat16())
    assert half.dtype == torch.bfloat16


def test_a_teacher_that_was_not_asked_for_scores() -> None:
    classes = match(ROAD, named("truck", "car"))
    empty = outputs(torch.zeros(2, 0, 0))
    assert classes.teacher_outputs(empty).scores.shape == (2, 0, 0)


def test_the_student_and_the_objectness_are_of_matched_classes() -> None:
    classes = match(named("b", "a"), named("x", "a", "b"))
    scores = torch.randn(2, 4, 3, requires_grad=True)
    mapped = classes.student_outputs(outputs(scores, scores))
    assert torch.equal(mapped.scores, scores[..., 1:])
    assert torch.equal(mapped.one2one_scores, scores[..., 1:])
    mapped.scores.sum().backward()
    assert torch.equal(scores.grad[..., 0], torch.zeros(2, 4))
    teacher = classes.teacher_outputs(outputs(torch.tensor([[[3.0, -1.0]]]).expand(2, 4, 2)))
    assert torch.equal(teacher.scores[0, 0], torch.tensor([-1.0, 3.0]))
    assert teacher.objectness[0, 0].item() == pytest.approx(torch.tensor(3.0).sigmoid().item())


def test_targets_of_unmatched_classes_are_background() -> None:
    classes = match(named("b", "a"), named("x", "a", "b"))
    scores = torch.zeros(1, 4, 3)
    scores[0, 0, 0] = 0.9  # an unmatched class
    scores[0, 1, 2] = 0.7
    assignment = Assignment(torch.tensor([[True, True, False, False]]), scores, torch.arange(16.0).view(1, 4, 4))
    boxes = torch.arange(12.0).view(3, 4)
    found = classes.targets(Targets(boxes, torch.tensor([0, 2, 1]), torch.tensor([0, 1, 1]), (8, 8), 2, assignment))
    assert torch.equal(found.boxes, boxes[1:])
    assert found.labels.tolist() == [1, 0]
    assert found.image_index.tolist() == [1, 1]
    assert found.assignment is not None
    assert found.assignment.foreground.tolist() == [[False, True, False, False]]
    assert torch.equal(found.assignment.scores, scores[..., 1:])
    assert found.assignment.boxes is assignment.boxes


def test_the_end_of_the_teachers_head_is_mapped_like_its_scores() -> None:
    classes = match(ROAD, named("vehicle", "person"), {"car": "vehicle", "truck": "vehicle"})
    tail = nn.Conv2d(3, 4, 1).eval().requires_grad_(False)
    maps = torch.randn(2, 3, 5, 5, requires_grad=True)
    mapped = MappedTail(tail, classes)
    assert not mapped.training
    found = mapped(maps)
    expected = classes.teacher_logits(tail(maps).flatten(2).transpose(1, 2))
    torch.testing.assert_close(found.flatten(2).transpose(1, 2), expected)
    found.sum().backward()
    assert maps.grad is not None
    assert maps.grad.abs().sum() > 0


# ------------------------------------------------------------------------------------------------ records and words


def test_a_mapping_survives_being_written() -> None:
    classes = match(ROAD, named("vehicle", "person", "dog"), {"car": "vehicle", "truck": "vehicle"})
    assert ClassMap.from_dict(classes.to_dict()) == classes
    for damaged in ({}, None, {**classes.to_dict(), "sources": [[9], [], []]}, {**classes.to_dict(), "student": ["a"]}):
        with pytest.raises(CheckpointError, match="damaged: its class map"):
            ClassMap.from_dict(damaged)


def test_the_table() -> None:
    classes = match(ROAD, named("vehicle", "person", "dog"), {"car": "vehicle", "truck": "vehicle"})
    lines = [line.split() for line in classes.table().splitlines()]
    assert lines[0][:5] == ["Classes:", "2", "of", "the", "student's"]
    assert ["0", "vehicle", "1", "car", "+", "3", "truck"] in lines
    assert ["2", "dog", "-"] in lines
    assert lines[-1][-2:] == ["traffic", "light"]
    many = named(*(f"n {i}" for i in range(80)))
    text = match(many, {**many, 80: "raccoon"}).table()
    assert len(text.splitlines()) < 20
    assert "80 raccoon  -" in text
    assert match(ROAD, ROAD).table() == "Classes: teacher and student have the same 4"
