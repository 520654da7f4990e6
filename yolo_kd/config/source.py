"""YAML files read so that every value knows the line it was written on, and every mistake is collected.

Only the plain part of YAML is allowed: mappings with text keys, lists, text, numbers, true/false and null. Anchors,
aliases, merge keys and tags are refused, which also rules out alias bombs and objects built by a loader.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yolo_kd.errors import ConfigError

MAX_BYTES = 256 * 1024  # PyYAML reads about 100 KB/s; a larger file is not one that a person wrote
MAX_DEPTH = 20  # its composer recurses, and so do the readers of what it returns

_TAG = "tag:yaml.org,2002:"
_KINDS = {"bool": "true or false", "null": "nothing", "int": "a number", "float": "a number", "timestamp": "a date"}
# what people mean as a number and PyYAML, which follows YAML 1.1, takes for text
_NUMBER = re.compile(r"([-+]?)(\d+\.?\d*|\.\d+)(?:[eE]([-+]?)(\d+))?")


@dataclass(frozen=True)
class Item:
    """A value and where it was written.

    Attributes:
        value: A `dict[str, Item]`, a `list[Item]`, or a plain value.
        where: `file:line` of the key (of the value in a list), or another name of the place; empty for none.
    """

    value: Any
    where: str = ""

    def plain(self) -> Any:
        """Return the value without places, all the way down."""
        if isinstance(self.value, dict):
            return {key: _unwrapped(item) for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [_unwrapped(item) for item in self.value]
        return self.value


def _unwrapped(value: Any) -> Any:
    return value.plain() if isinstance(value, Item) else value


def problem(where: str, sentence: str) -> str:
    """Return one line that says where and what."""
    line = f"{where}: {sentence}" if where else sentence
    return " ".join(line.splitlines())


def shown(value: Any, limit: int = 60) -> str:
    """Return a value as it is quoted in a message: short, and `nothing` for None."""
    if isinstance(value, Item):
        value = value.plain()
    try:
        text = "nothing" if value is None else repr(value)
    except Exception:  # an integer of thousands of digits, or somebody's own class
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def display(path: str | os.PathLike[str]) -> str:
    """Return a path as messages show it: relative to the current folder where it lies inside."""
    try:
        return os.fspath(Path(path).relative_to(Path.cwd()))
    except (ValueError, OSError):
        return os.fspath(path)


def wrap(value: Any, where: str, problems: list[str], depth: int = 0) -> Item:
    """Return a value of the Python interface in the form that a file is read into.

    Args:
        value: Mappings, lists, tuples and plain values.
        where: Its name in messages; entries are named `where.key`.
        problems: Receives mistakes.
        depth: Levels above this one.
    """
    if depth > MAX_DEPTH:
        problems.append(problem(where, f"nested more than {MAX_DEPTH} deep."))
        return Item(None, where)
    if isinstance(value, Mapping):
        entries = {}
        for key, entry in value.items():
            if isinstance(key, str):
                entries[key] = wrap(entry, f"{where}.{key}" if where else key, problems, depth + 1)
            else:
                problems.append(problem(where, f"keys must be text, received {shown(key)}."))
        return Item(entries, where)
    if isinstance(value, list | tuple):
        return Item([wrap(entry, where, problems, depth + 1) for entry in value], where)
    return Item(value, where)


def read_yaml(path: str | os.PathLike[str], problems: list[str]) -> Item | None:
    """Read a file.

    Args:
        path: A YAML file in UTF-8.
        problems: Receives one line per mistake.

    Returns:
        The whole file as one item (of value None if it is empty), or None if it could not be read as YAML at all.
    """
    name = display(path)
    try:
        # not exists(): a pipe or a device could be read for ever
        if not os.path.isfile(path):
            folder, other = "is a folder, not a file.", "is a device or a pipe, not a file."
            sentence = folder if os.path.isdir(path) else other if os.path.exists(path) else "no such file."
            problems.append(problem(name, sentence))
            return None
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        problems.append(problem(name, f"cannot be read: {reason}."))
        return None
    if len(data) > MAX_BYTES:
        problems.append(problem(name, f"is larger than {MAX_BYTES // 1024} KB. Is it the right file?"))
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.append(problem(f"{name}:{line}", "not UTF-8 text. Save the file in that encoding."))
        return None
    return parse_yaml(text, name, problems)


def parse_yaml(text: str, name: str, problems: list[str]) -> Item | None:
    """Read YAML text.

    Args:
        text: The text.
        name: Name of the file, for messages.
        problems: Receives one line per mistake.

    Returns:
        The text as one item (of value None if it is empty), or None if it could not be read as YAML at all.
    """
    try:
        refused = list(_refused(text, name))
        if refused:
            problems.extend(refused)
            return None
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = 1 if mark is None else mark.line + 1
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        problems.append(problem(f"{name}:{line}", f"not valid YAML: {reason}."))
        return None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        problems.append(problem(f"{name}:{line}", f"not valid YAML: character {error.character!r} is not allowed."))
        return None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # e.g. an escape beyond the last character of Unicode
        problems.append(problem(name, f"not valid YAML: {error}."))
        return None
    if node is None:
        return Item(None, f"{name}:1")
    reader = _Reader(name, problems)
    # a root that was refused is None: the reason is in the list already
    return reader.item(node, f"{name}:{node.start_mark.line + 1}")


def raise_if(problems: list[str]) -> None:
    """Raise all mistakes at once, if there are any."""
    if problems:
        raise ConfigError(dict.fromkeys(problems))


def _refused(text: str, name: str) -> Iterator[str]:
    """Yield what must not reach the composer: tags, aliases, which can grow without bound, and deep nesting."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = name if event.start_mark is None else f"{name}:{event.start_mark.line + 1}"
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            sign = "*" if isinstance(event, yaml.AliasEvent) else "&"
            yield problem(where, f"'{sign}{anchor}': no anchors and no aliases here; write the values out.")
        if tag := getattr(event, "tag", None):
            yield problem(where, f"the tag '{tag.replace(_TAG, '!!')}' is not allowed here; write plain values.")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                yield problem(where, f"nested more than {MAX_DEPTH} deep.")
                return  # what follows could be as deep as the file is long
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


class _Reader:
    """Turns nodes into items, collecting mistakes; `None` in place of an item stands for one that was refused."""

    def __init__(self, name: str, problems: list[str]):
        self.name = name
        self.problems = problems
        self.constructor = yaml.constructor.SafeConstructor()

    def line(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def item(self, node: yaml.Node, where: str) -> Item | None:
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, where)
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, where)
        items = (self.item(entry, self.line(entry)) for entry in node.value)
        return Item([item for item in items if item is not None], where)

    def mapping(self, node: yaml.MappingNode, where: str) -> Item:
        entries: dict[str, Item] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            place = self.line(key_node)
            if reason := self.refused_key(key_node):
                self.problems.append(problem(place, reason))
                continue
            key = key_node.value
            if key in first:
                self.problems.append(problem(place, f"key '{key}' is given twice, first in line {first[key]}."))
                continue
            first[key] = key_node.start_mark.line + 1
            item = self.item(value_node, place)
            if item is not None:
                entries[key] = item
        return Item(entries, where)

    def scalar(self, node: yaml.ScalarNode, where: str) -> Item | None:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        number = _NUMBER.fullmatch(text) if kind == "str" and node.style is None else None
        if number:
            reason = f"{text} is read as text; write {_spelled(number)}."
        elif kind in ("int", "float") and ":" in text:
            reason = f"{text} is read as a number to base 60; put it in quotes."
        elif kind in ("timestamp", "merge", "value"):
            reason = f"{text} is read as {_KINDS.get(kind, 'a sign of YAML')}; put it in quotes."
        else:
            try:
                return Item(self.constructor.construct_object(node), where)
            except ValueError:  # Python reads no integer of thousands of digits
                reason = f"{shown(text)} is too long for a number."
        self.problems.append(problem(where, reason))
        return None

    def refused_key(self, node: yaml.Node) -> str | None:
        """Return what is wrong with a key."""
        kind = node.tag.removeprefix(_TAG)
        if not isinstance(node, yaml.ScalarNode):
            return "a key must be text, not a mapping or a list."
        if kind == "merge":
            return "no inheritance with '<<' here; write the values out."
        return None if kind == "str" else f"key '{node.value}' is read as {_KINDS.get(kind, kind)}; put it in quotes."


def _spelled(number: re.Match[str]) -> str:
    """Return a number the way PyYAML recognises it: a point, and a sign in the exponent."""
    sign, mantissa, exponent_sign, exponent = number.groups()
    mantissa = f"0{mantissa}" if mantissa.startswith(".") else mantissa
    mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
    return f"{sign}{mantissa}" + (f"e{exponent_sign or '+'}{exponent}" if exponent else "")
