"""Pydantic's errors become sentences by their type and location, whatever the model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, Field, model_validator

from yolo_kd.config.source import Item, parse_yaml
from yolo_kd.config.validation import STRICT, json_schema, mistakes, validate, words


class Inner(BaseModel):
    model_config = STRICT

    low: float = Field(default=0.0, ge=0, lt=1)


class Outer(BaseModel):
    model_config = STRICT

    needed: str
    count: Annotated[int, Field(ge=1)] | Literal["all"] = "all"
    names: list[str] | None = Field(default=None, title="a list of names", examples=[["a", "b"]])
    by_name: dict[str, float] = {}
    inner: Inner = Inner()


def problems_of(text: str, label: str = "of it") -> list[str]:
    problems: list[str] = []
    item = parse_yaml(text, "f", problems)
    assert item is not None
    validate(Outer, item, problems, label)
    return problems


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("needed: 1", "f:1: needed of it must be text, received 1."),
        ("a: 1\nneeded: x", "f:1: unknown key 'a' of it. Allowed: needed, count, names, by_name, inner."),
        ("needed: x\ncuont: 1", "f:2: unknown key 'cuont' of it. Did you mean 'count'? Allowed: needed, count,"),
        ("count: 1", "f:1: it needs the key 'needed', text."),
        ("needed: x\ncount: 0", "f:2: count of it must be a whole number of at least 1 or all, received 0."),
        ("needed: x\ncount: al", "or all, received 'al'. Did you mean 'all'?"),
        ("needed: x\ncount: true", "f:2: count of it must be a whole number of at least 1 or all, received True."),
        ("needed: x\nnames: a", "f:2: names of it must be a list of names such as [a, b], received 'a'."),
        ("needed: x\nnames:\n  - a\n  - 2", "f:4: names[1] of it must be text, received 2."),
        ("needed: x\nby_name:\n  a: b", "f:3: by_name: 'a' of it must be a number, received 'b'."),
        ("needed: x\ninner:\n  low: 1", "f:3: low of the inner of it must be a number of at least 0 and below 1, rec"),
        ("needed: x\ninner:\n  lwo: 1", "f:3: unknown key 'lwo' of the inner of it. Did you mean 'low'? Allowed: low."),
    ],
)
def test_one_mistake_is_one_sentence(text: str, sentence: str) -> None:
    (line,) = problems_of(text)
    assert sentence in line


def test_all_mistakes_at_once() -> None:
    lines = problems_of("needed: 1\ncount: 7\nnames: 3\nx: 1\ninner: {low: 2}")
    assert sorted(line.split(":")[1] for line in lines) == ["1", "3", "4", "5"]


def test_a_validator_may_refuse_several_keys() -> None:
    class Picky(BaseModel):
        @model_validator(mode="after")
        def _refuse(self) -> Any:
            raise mistakes([(("a",), "a is wrong {really}."), ((), "so is all of it.")])

    problems: list[str] = []
    validate(Picky, Item({"a": Item(1, "f:1")}, "f"), problems)
    assert problems == ["f:1: a is wrong {really}.", "f: so is all of it."]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "number"}, ["a number"]),
        ({"type": "integer", "minimum": 1}, ["a whole number of at least 1"]),
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}, ["a number between 0 and 1"]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 10}, ["a number above 0 and at most 10"]),
        ({"type": "number", "maximum": 10}, ["a number of at most 10"]),
        ({"anyOf": [{"const": "auto"}, {"type": "boolean"}, {"type": "null"}]}, ["auto", "true", "false"]),
        ({"type": "array", "items": {"type": "number"}}, ["a list, each entry a number"]),
        ({"title": "the path of a file", "type": "string"}, ["the path of a file"]),
        ({"type": "null"}, ["nothing"]),
        ({}, ["any value"]),
    ],
)
def test_words(schema: dict[str, Any], expected: list[str]) -> None:
    assert words(schema, {}) == expected


def test_a_schema_has_no_titles_that_nobody_wrote() -> None:
    assert "title" not in json_schema(Outer)["properties"]["needed"]
