"""Which class is which: reading a class map, matching names, merging, and what it makes of scores and targets."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from yolo_kd.classes import KEEP_CONF, ClassChoice, ClassMap, MappedTail, is_placeholder, match, normalised
from yolo_kd.errors import CheckpointError, ConfigError, PairError
from yolo_kd.views import Assignment, Targets, View


def named(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


ROAD = named("person", "car", "traffic light", "truck")

# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("a", "b"), [("Traffic Light", "traffic_light"), ("T.V.", "tv"), ("fire-hydrant ", "Fire Hydrant")]
)
def test_case_spaces_and_punctuation_do_not_count(a: str, b: str) -> None:
    assert normalised(a) == normalised(b)


def test_a_name_of_signs_alone_keeps_them() -> None:
    assert normalised("+") != normalised("-")


@pytest.mark.parametrize("name", ["0", "12", "class0", "class_0", "Class 7", "item", "label-3"])
def test_placeholders(name: str) -> None:
    assert is_placeholder(name)


@pytest.mark.parametrize("name", ["car", "class", "a1", "boeing 747", "items"])
def test_names_that_say_something(name: str) -> None:
    assert not is_placeholder(name)


# ------------------------------------------------------------------------------------------------ matching


def test_the_same_names_are_the_identity() -> None:
    classes = match(ROAD, named("Person", "car", "traffic_light", "truck"))
    assert classes.is_identity
    assert classes.by == "name"
    assert classes.matched == (0, 1, 2, 3)


def test_another_order_is_matched_by_name() -> None:
    classes = match(ROAD, named("truck", "TRAFFIC-LIGHT", "person", "bus"))
    assert classes.sources == ((3,), (2,), (0,), ())
    assert classes.matched == (0, 1, 2)
    assert not classes.is_identity


def test_more_teacher_classes_are_not_the_identity() -> None:
    assert not match(ROAD, named("person", "car")).is_identity


def test_a_map_merges_and_overrides_what_names_say() -> None:
    ours = named("vehicle", "person", "lamp", "car")
    classes = match(ROAD, ours, {"car": "vehicle", "Truck": "vehicle", 2: 2})
    assert classes.sources == ((1, 3), (0,), (2,), ())


def test_names_that_differ_in_signs_only_stay_apart() -> None:
    assert match(named("tv-1", "tv 1"), named("tv 1", "tv-1")).sources == ((1,), (0,))
    assert match(named("tv-1", "tv 1"), named("tv1", "x")).sources == ((), ())  # either could be meant


def test_placeholders_match_only_as_equal_lists() -> None:
    assert match(named("0", "1"), named("0", "1")).by == "placeholder"
    assert match(named("class0", "car"), named("class_0", "CAR")).by == "placeholder"
    assert match(named("0", "1", "2"), named("0", "1")).matched == ()
    assert match(named("0", "car"), named("car", "0")).sources == ((1,), ())
    assert match(named("0", "1"), named("0", "1"), "index").by == "index"
    assert match(named("0", "1"), named("a", "b"), {"0": "b", 1: "a"}).sources == ((1,), (0,))


def test_by_index_needs_equal_counts() -> None:
    assert match(named("a", "b"), named("x", "y"), "index").is_identity
    assert match(named("a"), named("item"), by_index=True).is_identity
    with pytest.raises(PairError, match=r"the teacher knows 2 \(a, b\), the data set has 1 \(x\)"):
        match(named("a", "b"), named("x"), "index")


@pytest.mark.parametrize(
    ("class_map", "message"),
    [
        ({"cra": "vehicle"}, r"the teacher has no class 'cra'\. Did you mean 'car'\?"),
        ({"car": "vehcle"}, r"the student has no class 'vehcle'\. Did you mean 'vehicle'\?"),
        ({9: "vehicle"}, "the teacher has no class of index 9; it has 0 to 3"),
        ({"car": -1}, "the student has no class of index -1; it has 0 to 1"),
        ({"car": "vehicle", 1: "person"}, "maps teacher class 1 'car' twice, as 'car' and as '1'"),
    ],
)
def test_a_map_that_names_what_is_not_there(class_map: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        match(ROAD, named("vehicle", "person"), class_map)


def test_every_mistake_of_a_map_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        match(ROAD, named("vehicle"), {"cra": "vehicle", "car": "x", "truck": "vehicle"})
    assert len(error.value.problems) == 2


# ------------------------------------------------------------------------------------------------ what the user says


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{car: vehicle, truck: vehicle}", {"car": "vehicle", "truck": "vehicle"}),
        ("{'car': 'big vehicle'}", {"car": "big vehicle"}),
        ('{"0": 1}', {"0": 1}),
        ("index", "index"),
        ({"car": 0, 1: "x"}, {"car": 0, 1: "x"}),
    ],
)
def test_a_class_map_as_it_is_written(text: object, expected: object) -> None:
    choice = ClassChoice.of({"class_map": text})
    assert choice.class_map == expected
    assert ClassChoice.of(choice.to_keys()) == choice


def test_what_is_not_given_stays_out() -> None:
    assert ClassChoice.of({"class_map": None, "keep_classes": None}) == ClassChoice()
    assert ClassChoice().to_keys() == {}
    kept = ClassChoice.of({"keep_classes": "teacher", "keep_conf": 0.2})
    assert (kept.keep_classes, kept.keep_conf) == (True, 0.2)
    assert ClassChoice.of(kept.to_keys()) == kept
    assert ClassChoice.of({"keep_classes": "teacher"}).keep_conf == KEEP_CONF


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class_map": "car"}, "class_map must be index or a mapping .* received 'car'"),
        ({"class_map": 3}, "received 3"),
        ({"class_map": ["car"]}, r"received \['car'\]"),
        ({"class_map": {}}, "class_map is empty"),
        ({"class_map": "{}"}, "class_map is empty"),
        ({"class_map": {"car": ""}}, "'car' is mapped to nothing"),
        ({"class_map": "{car: }"}, "'car' is mapped to nothing"),
        ({"class_map": "{car:vehicle}"}, "'car:vehicle' is mapped to nothing"),
        ({"class_map": {"car": []}}, "'car' is mapped to nothing"),
        ({"class_map": {"car": ["a"]}}, r"must be mapped to the name or index of one student class, received \['a'\]"),
        ({"class_map": {"car": True}}, "received True"),
        ({"class_map": {1.5: "a"}}, "a teacher class is a name or an index, received 1.5"),
        ({"class_map": "{car: a, car: b}"}, "key 'car' is given twice"),
        (
            {"class_map": {"Traffic Light": "a", "traffic_light": "b"}},
            "'traffic_light' twice, first as 'Traffic Light'",
        ),
        ({"class_map": "{0: a}"}, "key '0' is read as a number; put it in quotes"),
        ({"class_map": "{car: a"}, "not valid YAML"),
        ({"keep_classes": "student"}, "keep_classes must be teacher, received 'student'"),
        ({"keep_classes": True}, "keep_classes must be teacher, received True"),
        ({"keep_classes": "teacher", "keep_conf": 0}, "keep_conf must be a number between 0 and 1, received 0"),
        ({"keep_classes": "teacher", "keep_conf": 1}, "keep_conf must be a number between 0 and 1, received 1"),
        ({"keep_classes": "teacher", "keep_conf": "low"}, "received 'low'"),
        ({"keep_conf": 0.1}, "add keep_classes=teacher, or leave keep_conf out"),
        ({"keep_classes": "teacher", "class_map": "index"}, "class_map cannot be given with keep_classes"),
    ],
)
def test_mistakes_in_what_the_user_says(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ClassChoice.of(keys)


# ------------------------------------------------------------------------------------------------ scores and targets


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


def view(scores: torch.Tensor, second: torch.Tensor | None = None) -> View:
    return View((torch.zeros(2, 4, 2, 2),), scores, torch.zeros(2, 4, 64), (8,), 16, second)


def test_the_usual_case_touches_nothing() -> None:
    classes = match(ROAD, ROAD)
    scores = torch.randn(2, 4, 4)
    seen = view(scores)
    targets = Targets(
        torch.zeros(1, 4), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), (8, 8), 2
    )
    assert classes.teacher_view(seen) is seen
    assert classes.student_view(seen) is seen
    assert classes.targets(targets) is targets
    assert classes.teacher_logits(scores) is scores


def test_single_classes_keep_their_bits_beside_a_merger() -> None:
    classes = match(ROAD, named("vehicle", "person", "dog"), {"car": "vehicle", "truck": "vehicle"})
    scores, second = torch.randn(2, 4, 4), torch.randn(2, 4, 4)
    seen = classes.teacher_view(view(scores, second))
    assert seen.scores.shape == (2, 4, 2)
    assert torch.equal(seen.scores[..., 1], scores[..., 0])
    p = scores.double().sigmoid()
    torch.testing.assert_close(seen.scores[..., 0].double().sigmoid(), 1 - (1 - p[..., 1]) * (1 - p[..., 3]))
    assert seen.one2one_scores is not None
    assert torch.equal(seen.one2one_scores[..., 1], second[..., 0])
    half = classes.teacher_logits(scores.bfloat16())
    assert half.dtype == torch.bfloat16


def test_a_teacher_that_was_not_asked_for_scores() -> None:
    classes = match(ROAD, named("truck", "car"))
    empty = view(torch.zeros(2, 0, 0))
    assert classes.teacher_view(empty).scores.shape == (2, 0, 0)


def test_the_student_and_the_objectness_are_of_matched_classes() -> None:
    classes = match(named("b", "a"), named("x", "a", "b"))
    scores = torch.randn(2, 4, 3, requires_grad=True)
    seen = classes.student_view(view(scores, scores))
    assert torch.equal(seen.scores, scores[..., 1:])
    assert torch.equal(seen.one2one_scores, scores[..., 1:])
    seen.scores.sum().backward()
    assert torch.equal(scores.grad[..., 0], torch.zeros(2, 4))
    teacher = classes.teacher_view(view(torch.tensor([[[3.0, -1.0]]]).expand(2, 4, 2)))
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
    assert match(ROAD, ROAD).table() == "Classes: all 4 of teacher and student agree"
