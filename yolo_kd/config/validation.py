"""Pydantic's error lists as sentences: the place, the key, what was received, what is allowed, the closest match.

A model says everything: the types, bounds and choices of its fields become its JSON Schema, and the words for what a
key allows are read from that schema. A field's `title` replaces these words, its `examples` are appended to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, cast

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import InitErrorDetails, PydanticCustomError

from yolo_kd.config.source import Item, problem, shown
from yolo_kd.errors import did_you_mean, listed

T = TypeVar("T")
Loc = tuple[int | str, ...]

CONFIG = ConfigDict(extra="forbid", validate_by_name=True, validate_by_alias=True)
STRICT = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Text = Annotated[str, Field(strict=True, min_length=1)]


_MISTAKE = "mistake"  # the type of errors whose sentence is complete
_UNKNOWN = ("extra_forbidden", "unexpected_keyword_argument")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")


class _Untitled(GenerateJsonSchema):
    """Writes only the titles that a model gives; pydantic would make one of every field's name."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def sort(self, value: Any, parent_key: str | None = None) -> Any:
        return value  # in the order of the fields


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    """Return the validator of a model or an annotated type."""
    return TypeAdapter(model)


def json_schema(model: Any) -> dict[str, Any]:
    """Return the JSON Schema of a model, of the keys as they are written."""
    return _adapter(model).json_schema(schema_generator=_Untitled)


def validate(model: type[T], item: Item, problems: list[str], label: str = "") -> T | None:
    """Turn what was read into a validated object.

    Args:
        model: A pydantic model or dataclass.
        item: A mapping whose entries know their places.
        problems: Receives one sentence per mistake.
        label: The owner of the keys in messages, as in "of loss 'cwd'"; empty for keys that stand alone.

    Returns:
        The object, None if anything is wrong with it.
    """
    try:
        return cast(T, _adapter(cast(Any, model)).validate_python(item.plain()))
    except ValidationError as error:
        problems += _Translator(model, item, label).sentences(error)
        return None


def mistakes(lines: Iterable[tuple[Loc, str]]) -> ValidationError:
    """Return the error for a validator to raise: complete sentences by key.

    Args:
        lines: Pairs of a key's location, () for the model itself, and a sentence.
    """
    found = (InitErrorDetails(type=_custom(sentence), loc=loc, input=None) for loc, sentence in lines)
    return ValidationError.from_exception_data("configuration", [*found])


def words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[str]:
    """Return the alternatives that a JSON Schema allows, in words: `["a number of at least 0", "auto"]`."""
    if "$ref" in schema:
        return words(
            {**_resolved(schema, definitions), **{k: v for k, v in schema.items() if k != "$ref"}}, definitions
        )
    found = [schema["title"]] if "title" in schema and "properties" not in schema else _words(schema, definitions)
    if example := next(iter(schema.get("examples", ())), None):
        found[-1] += f" such as {yaml.safe_dump(example, default_flow_style=True, sort_keys=False, width=1000).strip()}"
    return found


def _words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> list[str]:
    if "anyOf" in schema:
        options = [word for option in schema["anyOf"] for word in words(option, definitions)]
        return [*dict.fromkeys(option for option in options if option != "nothing")] or ["nothing"]
    if "const" in schema or "enum" in schema:
        choices = schema.get("enum", [schema.get("const")])
        return [str(choice).lower() if isinstance(choice, bool) else str(choice) for choice in choices]
    kind = schema.get("type")
    if kind in ("number", "integer"):
        return [("a whole number" if kind == "integer" else "a number") + _bounds(schema)]
    if kind == "array" and (items := schema.get("items")):
        return [f"a list, each entry {listed(words(items, definitions))}"]
    names = {"boolean": ["true", "false"], "string": ["text"], "array": ["a list"], "object": ["a mapping"]}
    return list(names.get(str(kind), ["nothing"] if kind == "null" else ["any value"]))


def _bounds(schema: Mapping[str, Any]) -> str:
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    if above is not None and below is not None:
        return f" between {above:g} and {below:g}"
    left = f" of at least {low:g}" if low is not None else f" above {above:g}" if above is not None else ""
    right = f"at most {high:g}" if high is not None else f"below {below:g}" if below is not None else ""
    return f"{left} and {right}" if left and right else left or (f" of {right}" if right else "")


def _resolved(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    return definitions[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _custom(sentence: str) -> PydanticCustomError:
    return PydanticCustomError(_MISTAKE, "{sentence}", {"sentence": sentence})


def _says_more(key: tuple[Loc, str], path: Loc) -> bool:
    return key[0][: len(path)] == path and (len(key[0]) > len(path) or bool(key[1]))


class _Translator:
    """Turns the errors of one validation into sentences."""

    def __init__(self, model: Any, item: Item, label: str):
        self.schema = json_schema(model)
        self.definitions = self.schema.get("$defs", {})
        self.item = item
        self.label = label

    def sentences(self, error: ValidationError) -> list[str]:
        """Return one sentence per mistake, in the order of the errors."""
        found: dict[tuple[Loc, str], str] = {}
        for line in error.errors(include_url=False):
            kind = line["type"]
            item, path = self.find(line["loc"])
            place = item.where
            if kind in _MISSING:
                key = str(line["loc"][-1])
                found[(*path, key), kind] = problem(place, self.missing(path, key, line["input"]))
            elif kind in _UNKNOWN:
                found[path, kind] = problem(place, self.unknown(path))
            elif kind in (_MISTAKE, "value_error"):
                text = line["ctx"]["sentence"] if kind == _MISTAKE else f"{self.name(path)}: {line['ctx']['error']}"
                found[path, text] = problem(place, text)
            else:  # each alternative of a union has an error of its own; one sentence is enough
                text = f"{self.name(path)} must be {self.allowed(path)}, received {shown(item)}."
                found.setdefault((path, ""), problem(place, text + self.closest(path, item.value)))
        # the mistake in an entry says more than that the whole does not fit another alternative
        return [text for (path, kind), text in found.items() if kind or not any(_says_more(key, path) for key in found)]

    def find(self, loc: Loc) -> tuple[Item, Loc]:
        """Return what was written at a location, and the steps to it.

        Pydantic adds a step for each union, which names the alternative that was tried; it leads nowhere in the text.
        """
        item, path = self.item, []
        for step in loc:
            inside = item.value
            within = isinstance(inside, list | tuple) and isinstance(step, int) and step < len(inside)
            if within or (isinstance(inside, dict) and step in inside):
                item = entry if isinstance(entry := inside[step], Item) else Item(entry, item.where)
                path.append(step)
        return item, tuple(path)

    def schema_of(self, path: Loc) -> Mapping[str, Any]:
        """Return the JSON Schema of what stands at a path."""
        schema: Mapping[str, Any] = self.schema
        for step in path:
            options = [_resolved(schema, self.definitions)]
            options = [_resolved(o, self.definitions) for o in options[0].get("anyOf", options)]
            inner = [o.get("properties", {}).get(step) or o.get("additionalProperties") for o in options]
            inner += [o.get("items") for o in options] if isinstance(step, int) else []
            schema = next((found for found in inner if isinstance(found, Mapping)), {})
        return schema

    def is_model(self, path: Loc) -> bool:
        """Return whether a mapping has keys of its own, and not just any."""
        schema = self.schema_of(path)
        options = [_resolved(option, self.definitions) for option in schema.get("anyOf", [schema])]
        return any("properties" in option for option in options)

    def allowed(self, path: Loc) -> str:
        return listed(words(self.schema_of(path), self.definitions))

    def closest(self, path: Loc, received: Any) -> str:
        return (
            did_you_mean(received, words(self.schema_of(path), self.definitions)) if isinstance(received, str) else ""
        )

    def name(self, path: Loc) -> str:
        """Return what a key is called: `end of the schedule of loss 'cwd'`."""
        name, owners = "", ""
        for i, step in enumerate(path):
            if isinstance(step, int):
                name += f"[{step}]"
            elif name and not self.is_model(path[:i]):
                name += f": '{step}'"
            else:
                owners = f" of the {name}{owners}" if name else owners
                name = str(step)
        return f"{name}{owners}" + (f" {self.label}" if self.label else "")

    def unknown(self, path: Loc) -> str:
        allowed = list(_resolved(self.schema_of(path[:-1]), self.definitions).get("properties", {}))
        hint = did_you_mean(str(path[-1])[:60], allowed)
        quoted = self.name(path).replace(str(path[-1]), f"'{path[-1]}'", 1)
        return f"unknown key {quoted}.{hint} Allowed: {', '.join(allowed)}."

    def missing(self, path: Loc, key: str, received: Any) -> str:
        owner = self.name(path).strip().removeprefix("of ")
        if owner:
            return f"{owner} needs the key '{key}', {self.allowed((*path, key))}."
        first = next(iter(received), key)
        return f"{first} has no effect without {key}: add {key}=<{self.allowed((*path, key))}>, or leave {first} out."
