"""Pairing of classes: by name, by index, and by a class map."""

from __future__ import annotations

import pytest

from yolo_kd.classes.match import match
from yolo_kd.errors import ConfigError, PairError


def named(*names: str) -> dict[int, str]:
    return dict(enumerate(names))


ROAD = named("person", "car", "traffic light", "truck")


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
