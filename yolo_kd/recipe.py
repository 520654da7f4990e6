"""Recipes: what to distil. A YAML file or a mapping becomes a frozen record, or every mistake in it is reported."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yolo_kd.losses  # noqa: F401  registers the losses that ship with the package
from yolo_kd.errors import YoloKDError, did_you_mean, listed
from yolo_kd.losses.base import Loss, parameters, registered
from yolo_kd.schedules import RATIO, Schedule
from yolo_kd.yaml_lines import Item, problem, raise_if, read_yaml, shown, wrap

T = TypeVar("T")

TOP_KEYS = ("losses", "plugins")
LAYER_KEYS = ("student_layers", "teacher_layers")
TERM_KEYS = ("weight", "ratio", "schedule", *LAYER_KEYS)
AUTO = "auto"  # the weight that sets itself
MAX_RATIO = 10.0
LAYER_READS = frozenset({"features", "targets"})
SCHEDULE_KEYS = tuple(f.name for f in fields(Schedule))
INLINE = "inline"  # the name of a recipe that came from no file

_PACKAGE = Path(__file__).resolve().parent
# in the wheel; in the checkout, where an editable installation finds them too
_FOLDERS = (_PACKAGE / "cfg" / "kd", _PACKAGE.parent / "cfg" / "kd")


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


@dataclass(frozen=True)
class Recipe:
    """What to distil.

    Attributes:
        name: Name of the file without its ending, `inline` for a mapping.
        terms: Losses in the order in which they were written, which is the order of the columns.
        plugins: Modules to import before the losses are looked up.
    """

    name: str
    terms: tuple[TermSpec, ...]
    plugins: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe with every default filled in, in plain types that YAML and `load_recipe` read back."""
        losses = {}
        for term in self.terms:
            defaults = {k: p.default for k, p in _constructor(registered()[term.name]).items()}
            arguments = {k: term.arguments.get(k, default) for k, default in defaults.items()}
            losses[term.name] = {
                **({"weight": term.weight} if term.ratio is None else {"weight": AUTO, "ratio": term.ratio}),
                "schedule": asdict(term.schedule),
                **{k: list(getattr(term, k)) for k in LAYER_KEYS if getattr(term, k)},
                **{k: _plain(v) for k, v in arguments.items()},
            }
        return {"losses": losses, "plugins": list(self.plugins)}


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with the package, by name."""
    for folder in _FOLDERS:
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return {}


def describe(path: str | os.PathLike[str]) -> str:
    """Return what a recipe is for: the first paragraph of the comment at the head of its file, as one line."""
    lines = []
    for line in Path(path).read_text(encoding="utf-8-sig").splitlines():
        text = line.strip()
        if not text.startswith("#") or not text.strip("# "):
            break
        lines.append(text.lstrip("#").strip())
    return " ".join(lines)


def load_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: Name of a recipe that ships with the package, path of a YAML file, or a mapping as such a file holds.
        overrides: Values that replace what the recipe says, by `loss.key` or `loss.schedule.key`.
        name: Name of the recipe where a mapping cannot tell it, e.g. when a run is resumed.

    Raises:
        ConfigError: With one line for every mistake: file, line, what was received, what is allowed.
    """
    problems: list[str] = []
    given = {key: wrap(value, f"kd.{key} on the command line", problems) for key, value in (overrides or {}).items()}
    recipe = read_recipe(wrap(source, "kd" if isinstance(source, Mapping) else "", problems), given, problems, name)
    raise_if(problems)
    assert recipe is not None  # it is None only together with a problem
    return recipe


def read_recipe(
    source: Item, overrides: Mapping[str, Item], problems: list[str], name: str | None = None
) -> Recipe | None:
    """Do the work of `load_recipe` for a source and overrides that know where they were written.

    Args:
        source: Item that holds a name, a path or a mapping.
        overrides: Items by `loss.key`.
        problems: Receives one line per mistake.
        name: Name of the recipe.

    Returns:
        The recipe, None if anything is wrong with it.
    """
    before = len(problems)
    root: Item | None = source
    if not isinstance(source.value, dict):
        path = _find(source, problems)
        root = None if path is None else read_yaml(path, problems)
        name = name or (path.stem if path else None)
    if root is None:
        return None
    name = name or INLINE
    if not isinstance(root.value, dict):
        if root.value is None:
            sentence = "the recipe is empty. It needs 'losses:' with at least one loss."
        else:
            sentence = f"a recipe must be a mapping with the key 'losses', received {shown(root)}."
        problems.append(problem(root.where, sentence))
        return None
    _unknown_keys(root.value, TOP_KEYS, "of a recipe", problems)
    plugins = read_plugins(root.value.get("plugins"), problems)
    losses = _losses(root, problems)
    if losses is None:
        return None
    replaced = _override(losses, overrides, name, problems)
    terms = [_term(loss, item, replaced, problems) for loss, item in losses.items()]
    _check_columns(losses, problems)
    valid = [term for term in terms if term is not None]
    if valid and len(valid) == len(terms) and not any(term.weight for term in valid):
        where = root.value["losses"].where
        problems.append(problem(where, "every weight is 0: nothing would be distilled. Raise one, or write kd=none."))
    return Recipe(name, tuple(valid), plugins) if len(problems) == before else None


def _find(source: Item, problems: list[str]) -> Path | None:
    """Return the file that a name or a path stands for."""
    value, names = source.value, shipped_recipes()
    if isinstance(value, os.PathLike):
        return Path(value)
    if not isinstance(value, str) or not value.strip():
        sentence = f"a recipe is a name, a path to a YAML file or a mapping, received {shown(value)}."
        problems.append(problem(source.where, sentence))
        return None
    if value in names:
        return names[value]
    path = Path(value)
    if path.suffix.lower() in (".yaml", ".yml"):
        if len(path.parts) == 1 and path.stem in names and not os.path.exists(value):
            sentence = f"no file '{value}' in the current folder. Write kd={path.stem} for the recipe of that name."
            problems.append(problem(source.where, sentence))
            return None
        return path
    if len(path.parts) > 1 and os.path.isfile(value):
        return path
    problems.append(
        problem(
            source.where,
            f"unknown recipe {shown(value)}.{did_you_mean(value[:60], names)} Recipes: {listed(list(names))}, or the "
            "path of a .yaml file.",
        )
    )
    return None


def import_plugins(names: Any) -> tuple[str, ...]:
    """Import modules that were named beside the recipe, so that their losses register themselves.

    Args:
        names: Module names, or one as text with commas, None for none.

    Returns:
        The names.

    Raises:
        ConfigError: If one is no name or cannot be imported.
    """
    problems: list[str] = []
    imported = read_plugins(wrap(split_names(names), "plugins", problems), problems)
    raise_if(problems)
    return imported


def split_names(value: Any) -> Any:
    """Return `[a, b]` or `a,b`, as a command line has it, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    return [name.strip() for name in value.strip().removeprefix("[").removesuffix("]").split(",")]


def read_plugins(item: Item | None, problems: list[str]) -> tuple[str, ...]:
    """Do the work of `import_plugins` for an item that knows where it was written; every import is logged."""
    if item is None or item.value is None:
        return ()
    if not isinstance(item.value, list):
        sentence = f"plugins must be a list of module names such as [my_package.my_loss], received {shown(item)}."
        problems.append(problem(item.where, sentence))
        return ()
    for entry in item.value:
        if not isinstance(entry.value, str) or not all(part.isidentifier() for part in entry.value.split(".")):
            problems.append(problem(entry.where, f"a plugin must be the name of a module, received {shown(entry)}."))
            continue
        if entry.value not in sys.modules:
            from ultralytics.utils import LOGGER

            LOGGER.info(f"Importing plugin {entry.value}" + (f", named in {entry.where}" if entry.where else ""))
        try:
            importlib.import_module(entry.value)
        except Exception as error:  # whatever the module does when it is imported
            reason = f"{type(error).__name__}: {error}"
            hint = " Is it installed, or its folder in PYTHONPATH?" if isinstance(error, ImportError) else ""
            problems.append(problem(entry.where, f"plugin '{entry.value}' cannot be imported: {reason}.{hint}"))
    return tuple(entry.value for entry in item.value if isinstance(entry.value, str))


def _losses(root: Item, problems: list[str]) -> dict[str, Item] | None:
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


def _override(
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


def _term(name: str, item: Item, replaced: frozenset[str], problems: list[str]) -> TermSpec | None:
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
    keys = _constructor(losses[name])
    if taken := [key for key in TERM_KEYS if key in keys]:
        sentence = f"loss '{name}' has a constructor argument '{taken[0]}', a name that recipes use themselves."
        problems.append(problem(item.where, f"{sentence} Rename it in {losses[name].__module__}."))
        return None
    _unknown_keys(entries, (*TERM_KEYS, *keys), f"of loss '{name}'", problems)
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
    _unknown_keys(item.value, SCHEDULE_KEYS, label, problems)
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


def _check_columns(losses: Mapping[str, Item], problems: list[str]) -> None:
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


def _unknown_keys(entries: Mapping[str, Item], allowed: tuple[str, ...], label: str, problems: list[str]) -> None:
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


def _constructor(loss: type[Loss]) -> dict[str, inspect.Parameter]:
    """Return the keys of a loss without *args and **kwargs, which a class without a constructor inherits."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {key: p for key, p in parameters(loss).items() if p.kind not in variable}


def _finite(value: Any) -> bool:
    """Return True for a number that a float can hold; True and False are not numbers here."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


def _plain(value: Any) -> Any:
    """Return a value in types that YAML writes without tags."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value
