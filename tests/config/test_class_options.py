"""What the user says about classes."""

from __future__ import annotations

import pytest

from yolo_kd.config.class_options import KEEP_CONF, ClassOptions
from yolo_kd.errors import ConfigError


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
    choice = ClassOptions.of({"class_map": text})
    assert choice.class_map == expected
    assert ClassOptions.of(choice.to_keys()) == choice


def test_what_is_not_given_stays_out() -> None:
    assert ClassOptions.of({"class_map": None, "keep_classes": None}) == ClassOptions()
    assert ClassOptions().to_keys() == {}
    kept = ClassOptions.of({"keep_classes": "teacher", "keep_conf": 0.2})
    assert (kept.keep_classes, kept.keep_conf) == ("teacher", 0.2)
    assert ClassOptions.of(kept.to_keys()) == kept
    assert ClassOptions.of({"keep_classes": "teacher"}).keep_conf == KEEP_CONF


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"class_map": "car"}, "class_map must be index or a mapping .* received 'car'"),
        ({"class_map": 3}, "received 3"),
        ({"class_map": ["car"]}, r"received \['car'\]"),
        ({"class_map": {}}, "class_map must be index or a mapping .* such as {car: vehicle, .*}, received {}"),
        ({"class_map": "{}"}, "class_map must be index or a mapping .* received '{}'"),
        ({"class_map": {"car": ""}}, "class_map: 'car' must be the name of a class or its index, received ''"),
        ({"class_map": "{car: }"}, "class_map must be index or a mapping .* received '{car: }'"),
        ({"class_map": "{car:vehicle}"}, "received '{car:vehicle}'"),
        ({"class_map": {"car": []}}, r"'car' must be the name of a class or its index, received \[\]"),
        ({"class_map": {"car": ["a"]}}, r"must be the name of a class or its index, received \['a'\]"),
        ({"class_map": {"car": True}}, "received True"),
        ({"class_map": {1.5: "a"}}, "a mapping of teacher classes to student classes .* received {1.5: 'a'}"),
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
        ClassOptions.of(keys)
