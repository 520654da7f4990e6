"""Words of a command line become values, and every mistake is reported."""

from __future__ import annotations

import re

import pytest

from yolo_kd.config.command_line import parse_assignments
from yolo_kd.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "values"),
    [
        ([], {}),
        (["a=1", "b=[1,2]"], {"a": 1, "b": [1, 2]}),
        (["a", "=", "1"], {"a": 1}),
        (["a=", "1"], {"a": 1}),
        (["a", "=1"], {"a": 1}),
        ([" a = 1 "], {"a": 1}),
        (["a=[1,", "2]", "b=3"], {"a": [1, 2], "b": 3}),
        (["a=", "[1,", "2]"], {"a": [1, 2]}),
        (["a=(0.5,", "2.0)"], {"a": (0.5, 2.0)}),
        (["a=1e-3", "b=1e2"], {"a": 0.001, "b": 100.0}),
        (["a=None", "b=true", "c=FALSE"], {"a": None, "b": True, "c": False}),
        (["a=text", "b=a=b", "c=x.y/z", "d='q'"], {"a": "text", "b": "a=b", "c": "x.y/z", "d": "q"}),
        (["a=x[1", "b=1"], {"a": "x[1", "b": 1}),
        (["a=[1,x]"], {"a": "[1,x]"}),
        (
            ["name=007", "project=1e3", "teacher=1", "data=2"],
            {"name": "007", "project": "1e3", "teacher": "1", "data": "2"},
        ),
        (["teacher='a b.pt'", "student=none"], {"teacher": "a b.pt", "student": None}),
        (["kd=None"], {"kd": "none"}),
        (["kd.fgd.weight=0.5"], {"kd.fgd.weight": 0.5}),
    ],
)
def test_assignments(words, values):
    assert parse_assignments(words) == values


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epochs"], "'epochs' is not key=value. Write epochs=<value>."),
        (["--epochs", "a=3"], "'--epochs' is not key=value. Write epochs=<value>, without dashes."),
        (["=3"], "'=3' has no key before '='."),
        (["="], "'=' has no key before '='."),
        (["a="], "'a=' has no value. Write a=<value>, or leave it out."),
        (["a=", "b=1"], "'a=' has no value."),
        (["a=1", "a=2"], "key 'a' is given twice: a=1 and a=2. Keep one."),
        (["a=1", "a", "=", "1"], "key 'a' is given twice: a=1 and a=1. Keep one."),
        (["a=[1,", "b=2"], "'a=[1,' opens a bracket that is never closed."),
    ],
)
def test_mistakes_in_assignments(words, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_assignments(words)


def test_all_mistakes_in_assignments_together():
    with pytest.raises(ConfigError) as info:
        parse_assignments(["a", "=1", "=", "b=", "c=1", "c=2", "d=1"])
    assert len(info.value.problems) == 3
