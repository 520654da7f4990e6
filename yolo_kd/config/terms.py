"""One loss of a recipe: what a person wrote becomes a checked record, or every mistake in it is reported."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

import yolo_kd.losses  # noqa: F401  registers the losses that ship with the package
from yolo_kd.config.schedule import RATIO, Schedule
from yolo_kd.config.source import Item, problem, shown
from yolo_kd.errors import YoloKDError, did_you_mean, listed
from yolo_kd.losses.base import Loss, parameters, registered

T = TypeVar("T")

LAYER_KEYS = ("student_layers", "teacher_layers")
TERM_KEYS = ("weight", "ratio", "schedule", *LAYER_KEYS)
AUTO = "auto"  # the weight that sets itself
MAX_RATIO = 10.0
LAYER_READS = frozenset({"features", "targets"})
SCHEDULE_KEYS = tuple(f.name for f in fields(Schedule))


@dataclass(frozen=True)
class TermSpec:
    """One loss of a recipe.

    Attributes:
        name: Name of the loss.
        weight: Multiplier of its scalars, at least 0; where it sets itself, the one that it starts from.
        schedule: How the multiplier changes over the training.
        arguments: Arguments of the loss's constructor, only those that were given.
        student_layers: Layers of the student to read in place of its neck's outputs, finest first, () for the neck.
        teacher_layers: Layers of the teacher likewise; as many as the student's side has.
        ratio: Where the weight sets itself: the term's gradient over the task loss's that it aims at. None otherwise.
    """

    name: str
    weight: float = 1.0
    schedule: Schedule = field(default_factory=Schedule)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    ratio: float | None = None


def read_losses(root: Item, problems: list[str]) -> dict[str, Item] | None:
    """Return the terms of a recipe as a mapping of mappings that may be changed, None where there are none."""
    item = root.value.get("losses")
    if item is None:
        problems.append(problem(root.where, "the recipe has no key 'losses'; it needs at least one loss."))
        return None
    if item.value is None or item.value == {}:
        problems.append(problem(item.where, f"no losses. Name at least one of {listed(list(registered()))}."))
        return None
    if not isinstance(item.value, dict):
        sentence = f"losses must be a mapping from the name of a loss to its keys, received {shown(item)}."
        problems.append(problem(item.where, sentence))
        return None
    losses = {}
    for name, term in item.value.items():
        if term.value is None:
            losses[name] = Item({}, term.where)
        elif isinstance(term.value, dict):
            losses[name] = Item(dict(term.value), term.where)
        else:
            problems.append(
                problem(term.where, f"loss '{name}' must be a mapping such as {{weight: 1.0}}, received {shown(term)}.")
            )
            losses[name] = Item({}, term.where)
    return losses


def override(
    losses: dict[str, Item], overrides: Mapping[str, Item], recipe: str, problems: list[str]
) -> frozenset[str]:
    """Put overrides in the place of what the recipe says and return the losses whose kind of schedule was replaced."""
    replaced = set()
    for key, item in overrides.items():
        name, _, rest = key.partition(".")
        if name not in losses:
            sentence = f"recipe '{recipe}' has no loss '{name}'.{did_you_mean(name[:60], losses)}"
            problems.append(problem(item.where, f"{sentence} It has {listed(list(losses))}."))
            continue
        term: dict[str, Item] = losses[name].value
        first, _, second = rest.partition(".")
        if not first or (second and first != "schedule") or (rest.endswith(".")):
            sentence = f"an override is written kd.{name}.<key>=value or kd.{name}.schedule.<key>=value."
            problems.append(problem(item.where, sentence))
        elif second:
            schedule = term.get("schedule", Item({}, item.where))
            if isinstance(schedule.value, dict):  # otherwise the recipe's own mistake is reported below
                term["schedule"] = Item({**schedule.value, second: item}, schedule.where)
            if second == "kind":
                replaced.add(name)
        else:
            term[first] = item
            if first == "weight" and item.value != AUTO and f"{name}.ratio" not in overrides:
                term.pop("ratio", None)  # the recipe's own, which the command line switched off
    return frozenset(replaced)


def read_term(name: str, item: Item, replaced: frozenset[str], problems: list[str]) -> TermSpec | None:
    """Check one loss of a recipe; None if anything is wrong with it."""
    before, entries = len(problems), item.value
    losses = registered()
    if name not in losses:
        known = listed(list(losses))
        sentence = f"unknown loss '{name}'.{did_you_mean(name[:60], losses)} Known losses: {known}."
        problems.append(problem(item.where, sentence))
    weight, ratio = _weight(name, entries.get("weight"), entries.get("ratio"), problems)
    schedule = _schedule(name, entries.get("schedule"), name in replaced, problems)
    layers = {key: _layers(name, key, entries.get(key), problems) for key in LAYER_KEYS}
    if name not in losses:
        return None
    if any(layers.values()) and (other := sorted(losses[name].reads - LAYER_READS - {"one2one"})):
        sentence = f"loss '{name}' reads {listed(other)}, which belong to the head's levels; it cannot take layers."
        problems.append(problem(next(entries[k].where for k in LAYER_KEYS if k in entries), sentence))
    keys = constructor(losses[name])
    if taken := [key for key in TERM_KEYS if key in keys]:
        sentence = f"loss '{name}' has a constructor argument '{taken[0]}', a name that recipes use themselves."
        problems.append(problem(item.where, f"{sentence} Rename it in {losses[name].__module__}."))
        return None
    unknown_keys(entries, (*TERM_KEYS, *keys), f"of loss '{name}'", problems)
    for key, parameter in keys.items():
        if parameter.default is parameter.empty and key not in entries:
            problems.append(problem(item.where, f"loss '{name}' needs the key '{key}'."))
    given = {key: entries[key] for key in keys if key in entries}
    typed = {k: v for k, v in given.items() if _right_type(k, v, keys[k], f"of loss '{name}'", problems)}
    arguments = {key: _argument(value, keys[key]) for key, value in typed.items()}
    if not any(p.default is p.empty and k not in arguments for k, p in keys.items()):
        _construct(losses[name], arguments, typed, item.where, f"loss '{name}'", problems)
    if len(problems) > before:
        return None
    return TermSpec(name, weight, schedule, arguments, ratio=ratio, **layers)


def _layers(name: str, key: str, item: Item | None, problems: list[str]) -> tuple[str, ...]:
    """Return names of layers, () where none were given or they are wrong; that they exist is for the models to say."""
    if item is None:
        return ()
    names = [entry.value for entry in item.value] if isinstance(item.value, list) else []
    if not names or not all(isinstance(n, str) and n for n in names) or len(set(names)) < len(names):
        sentence = f"{key} of loss '{name}' must be a list of different layer names such as [model.4, model.6]"
        problems.append(problem(item.where, f"{sentence}, received {shown(item)}."))
        return ()
    return tuple(names)


def _weight(name: str, item: Item | None, ratio: Item | None, problems: list[str]) -> tuple[float, float | None]:
    """Return weight and ratio of a term, the defaults where none were given or the given ones are wrong."""
    auto = item is not None and item.value == AUTO
    if item is not None and not auto and (not _finite(item.value) or item.value < 0):
        sentence = f"weight of loss '{name}' must be a number of at least 0 or {AUTO}, received {shown(item)}."
        problems.append(problem(item.where, sentence))
        return 1.0, None
    if ratio is not None and not auto:
        sentence = f"ratio of loss '{name}' has no effect without weight: {AUTO}. Write that, or leave ratio out."
        problems.append(problem(ratio.where, sentence))
    elif ratio is not None and (not _finite(ratio.value) or not 0 < ratio.value <= MAX_RATIO):
        sentence = (
            f"ratio of loss '{name}' must be a number above 0 and at most {MAX_RATIO:g}, received {shown(ratio)}."
        )
        problems.append(problem(ratio.where, sentence))
    elif auto:
        return 1.0, RATIO if ratio is None else float(ratio.value)
    return 1.0 if item is None or auto else float(item.value), None


def _schedule(name: str, item: Item | None, kind_replaced: bool, problems: list[str]) -> Schedule:
    """Return a schedule, the default where none was given or the given one is wrong."""
    if item is None:
        return Schedule()
    label = f"of the schedule of loss '{name}'"
    if not isinstance(item.value, dict):
        sentence = f"schedule of loss '{name}' must be a mapping such as {{kind: cosine, start: 1.0, end: 0.1}}"
        problems.append(problem(item.where, f"{sentence}, received {shown(item)}."))
        return Schedule()
    unknown_keys(item.value, SCHEDULE_KEYS, label, problems)
    keys = inspect.signature(Schedule).parameters
    typed = {
        key: value
        for key, value in item.value.items()
        if key in keys and (key == "stop" or _right_type(key, value, keys[key], label, problems))
    }
    values = {key: _argument(value, keys[key]) for key, value in typed.items()}
    made = _construct(Schedule, values, typed, item.where, f"schedule of loss '{name}'", problems)
    if made is None:
        return Schedule()
    # a key that changes nothing is a mistake, unless the command line switched the recipe's schedule off
    if made.kind == "constant" and made.end not in (Schedule.end, made.start) and not kind_replaced:
        sentence = f"end {label} has no effect with kind: constant. Write kind: linear or cosine, or leave it out."
        problems.append(problem(item.value["end"].where, sentence))
    return made


def check_columns(losses: Mapping[str, Item], problems: list[str]) -> None:
    """Refuse two terms that report under one name: their numbers could not be told apart."""
    known = registered()
    owner: dict[str, str] = {}
    for name, item in losses.items():
        for column in known[name].columns if name in known else ():
            if column in owner:
                sentence = f"losses '{owner[column]}' and '{name}' both report the column '{column}'; use one of them."
                problems.append(problem(item.where, sentence))
                break
            owner[column] = name


def unknown_keys(entries: Mapping[str, Item], allowed: tuple[str, ...], label: str, problems: list[str]) -> None:
    """Report keys that a mapping may not have; `label` says whose they are, as in "of a recipe"."""
    for key, item in entries.items():
        if key not in allowed:
            sentence = f"unknown key '{key}' {label}.{did_you_mean(key[:60], allowed)} Allowed: {', '.join(allowed)}."
            problems.append(problem(item.where, sentence))


def _right_type(key: str, item: Item, parameter: inspect.Parameter, label: str, problems: list[str]) -> bool:
    """Compare a value with the type of its default, where there is one to compare with."""
    value, default = item.value, parameter.default
    annotation = str(parameter.annotation)
    whole = annotation == "int" or (isinstance(default, int) and "float" not in annotation)
    if isinstance(default, bool):
        right, expected = isinstance(value, bool), "true or false"
    elif isinstance(default, int | float):
        right = _finite(value) and (not whole or isinstance(value, int))
        expected = "a whole number" if whole else "a number"
    elif isinstance(default, str):
        right, expected = isinstance(value, str), "text"
    elif isinstance(default, list | tuple):
        right, expected = isinstance(value, list), "a list"
    elif isinstance(default, Mapping):
        right, expected = isinstance(value, dict), "a mapping"
    else:
        right, expected = not (isinstance(value, float) and not math.isfinite(value)), "a finite number"
    optional = default is None or "None" in annotation
    if right or (value is None and optional):
        return True
    problems.append(problem(item.where, f"{key} {label} must be {expected}, received {shown(item)}."))
    return False


def _argument(item: Item, parameter: inspect.Parameter) -> Any:
    """Return the value that a constructor gets: 2 where 2.0 is meant becomes 2.0, so that a recipe has one spelling."""
    value = item.plain()
    return float(value) if isinstance(parameter.default, float) and isinstance(value, int) else value


def _construct(
    make: Callable[..., T],
    values: dict[str, Any],
    items: Mapping[str, Item],
    where: str,
    label: str,
    problems: list[str],
) -> T | None:
    """Call a constructor to see whether it accepts its arguments; None if it does not.

    A constructor stops at its first mistake. So that all of them are reported, the argument that it names is left out
    and it is called again.
    """
    left, failed = dict(values), False
    while True:
        try:
            made = make(**left)
        except Exception as error:  # a plugin may raise anything
            expected = isinstance(error, ValueError | TypeError | YoloKDError)
            sentence = str(error) if expected else f"{type(error).__name__}: {error}"
            found = {key: match.start() for key in left if (match := re.search(rf"\b{re.escape(key)}\b", sentence))}
            key = min(found, key=lambda k: found[k]) if found else None
            place = where if key is None else items[key].where
            problems.append(problem(place, f"{label}: {sentence.rstrip('.')}."))
            failed = True
            if key is None or inspect.signature(make).parameters[key].default is inspect.Parameter.empty:
                return None
            del left[key]
        else:
            return None if failed else made


def constructor(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the keys of a loss without *args and **kwargs, which a class without a constructor inherits."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: p for key, p in parameters(loss).items() if p.kind not in variable}


def _finite(value: Any) -> bool:
    """Return True for a number that a float can hold; True and False are not numbers here."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def plain(value: Any) -> Any:
    """Return a value in types that YAML writes without tags."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
