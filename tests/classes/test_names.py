"""Class names: normalised spelling and meaningless names."""

from __future__ import annotations

import pytest

from yolo_kd.classes.names import is_placeholder, normalised


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
