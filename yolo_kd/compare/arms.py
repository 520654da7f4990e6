"""Reads what a comparison runs: arms, seeds and the keys that all arms share, checked before anything is written."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_kd.config.class_options import CLASS_KEYS
from yolo_kd.config.command_line import NO_RECIPE, parse_assignments
from yolo_kd.config.recipe import shipped_recipes
from yolo_kd.config.source import Item, problem, raise_if, read_yaml, shown
from yolo_kd.config.train_options import DEFAULT_RECIPE, TrainOptions, default_recipe, read_items, resolve_items
from yolo_kd.config.train_options import OWN_KEYS as TRAIN_KEYS
from yolo_kd.config.unlabeled import UNLABELED_KEYS
from yolo_kd.errors import ConfigError, did_you_mean, listed

BASELINE = "baseline"  # the student alone
UPSTREAM = "distill_model"  # Ultralytics' own trainer with its own distillation
ALONE, DISTILLED = "alone", "distilled"  # kinds of arm; UPSTREAM is the third

COMPARE_KEYS: dict[str, str] = {
    "arms": f"what is compared: recipes, {BASELINE}, {UPSTREAM}, or a YAML file of arms ({BASELINE} and kd=)",
    "seeds": "how often each arm trains, with seeds seed, seed + 1, ... (3)",
    "jobs": "how many trainings run at a time (1)",
}
DEFAULT_SEEDS, DEFAULT_JOBS, DEFAULT_PROJECT, DEFAULT_NAME = 3, 1, "runs/compare", "compare"

# keys that a comparison sets for each run
_TAKEN = {
    "resume": "repeat the command of a comparison to continue it.",
    "save_dir": "write project= and name= for the folder of the comparison.",
    "exist_ok": "the same command in the same folder continues the comparison; write another name= for a new one.",
    "save": "a comparison needs the checkpoints of its runs.",
}
# keys that must be the same for all arms
_SHARED = ("data", "seed", "project", "name", "cfg", *COMPARE_KEYS)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_UPSTREAM_KEYS = ("dis",)
_DISTILLATION_KEYS = ("inherit", "random_teacher", *CLASS_KEYS, *UNLABELED_KEYS)


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        name: Its name in the report and in folder names.
        kind: `alone`, `distilled`, or `distill_model` for Ultralytics' own trainer.
        options: Its training.
        extra: Keys that only Ultralytics' own trainer takes (`dis`).
        differs: Keys in which it differs from the other arms, apart from recipe and teacher.
    """

    name: str
    kind: str
    options: TrainOptions
    extra: dict[str, Any]
    differs: dict[str, Any]


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        folder: Where everything is written.
        arms: At least two arms, in the order of the command.
        reference: Name of the arm that the others are compared with.
        seeds: Seeds of each arm.
        jobs: Trainings at a time.
        command: The command line, for the report.
    """

    folder: Path
    arms: tuple[Arm, ...]
    reference: str
    seeds: tuple[int, ...]
    jobs: int
    command: tuple[str, ...] = ()


def parse_compare(arguments: Sequence[str]) -> Comparison:
    """Read a command line.

    Raises:
        ConfigError: With one line for every mistake on the command line, in the experiment file, in the file of arms
            and in every arm's recipe.
    """
    problems: list[str] = []
    items = read_items(arguments, problems)
    raise_if(problems)  # keys of an unreadable file must not be reported as missing
    given = {key: items.pop(key, None) for key in COMPARE_KEYS}
    seeds = _number("seeds", given["seeds"], 1, DEFAULT_SEEDS, problems)
    jobs = _number("jobs", given["jobs"], 1, DEFAULT_JOBS, problems)
    for key in [k for k in items if k in _TAKEN]:
        item = items.pop(key)
        if item.value is not None:
            problems.append(problem(item.where, f"{key} cannot be given to compare: {_TAKEN[key]}"))
    _misspelt(items, problems)
    kd = items.pop("kd", None)
    changes = {key: items.pop(key) for key in [*items] if key.startswith("kd.")}
    default = default_recipe("keep_classes" in items and items["keep_classes"].value is not None)
    wanted = _arms(given["arms"], kd, changes, default, problems)
    arms = _resolve(wanted, items, default, problems)
    first = _number("seed", items.get("seed"), 0, 0, problems)
    raise_if(problems)
    names = [arm.name for arm in arms]
    alone = [arm.name for arm in arms if arm.kind == ALONE]
    return Comparison(
        _folder(items, arguments),
        tuple(arms),
        BASELINE if BASELINE in names else (alone or names)[0],
        tuple(range(first, first + seeds)),
        jobs,
        tuple(arguments),
    )


def _misspelt(items: dict[str, Item], problems: list[str]) -> None:
    """Remove and report unknown keys that are closest to a key of compare, which the check of train's keys ignores."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    allowed = [*DEFAULT_CFG_DICT, *TRAIN_KEYS, *COMPARE_KEYS]
    for key in [k for k in items if k not in allowed and not k.startswith("kd.")]:
        hint = did_you_mean(key[:60], allowed)
        if any(hint == did_you_mean(name, [name]) for name in COMPARE_KEYS):
            problems.append(problem(items.pop(key).where, f"unknown key '{key}'.{hint}"))


def _number(key: str, item: Item | None, least: int, default: int, problems: list[str]) -> int:
    if item is None or item.value is None:
        return default
    if isinstance(item.value, int) and not isinstance(item.value, bool) and item.value >= least:
        return item.value
    problems.append(problem(item.where, f"{key} must be a whole number of at least {least}, received {shown(item)}."))
    return default


def _folder(items: Mapping[str, Item], arguments: Sequence[str]) -> Path:
    def text(key: str) -> str | None:
        return os.fspath(items[key].value) if key in items and items[key].value else None

    experiment = parse_assignments(arguments).get("cfg")
    name = text("name") or (Path(experiment).stem if experiment else DEFAULT_NAME)
    return (Path(text("project") or DEFAULT_PROJECT) / name).absolute()


# ------------------------------------------------------------------------------------------------ names -> keys


def _arms(
    item: Item | None, kd: Item | None, changes: Mapping[str, Item], default: str, problems: list[str]
) -> list[tuple[str, dict[str, Item]]]:
    """Return each arm's name and keys, nothing where they are wrong; `default` is a recipe."""
    if item is None or item.value is None:
        recipe = kd if kd is not None and kd.value is not None else Item(default)
        if str(recipe.value).lower() == NO_RECIPE:
            problems.append(problem(recipe.where, "kd=none is the baseline itself. Add arms=baseline,<recipe>."))
            return []
        name = recipe.value if isinstance(recipe.value, str) else "recipe"
        return [(BASELINE, {"kd": Item(NO_RECIPE)}), (Path(name).stem, {"kd": recipe, **changes})]
    # arms replace the recipe of an experiment file, but a recipe on the command line must not be ignored
    if kd is not None and kd.value is not None and not kd.where:
        problems.append("kd is what the arms differ in: name recipes in arms=, or leave arms out to compare with one.")
    for key, change in changes.items():
        place = "" if change.where.startswith("kd.") else change.where
        problems.append(problem(place, f"{key} changes the recipe of one arm: write it into that arm in a YAML file."))
    named = _named(item, problems)
    names = [name for name, _ in named]
    for name in dict.fromkeys(names):
        if names.count(name) > 1:
            problems.append(problem(item.where, f"arm '{name}' is given {names.count(name)} times. Keep one."))
        if not _NAME.fullmatch(name):
            sentence = f"arm '{name}' must be named with letters, digits, '.', '_' and '-', since it names a folder."
            problems.append(problem(item.where, sentence))
    if len(set(names)) == 1 and not problems:
        sentence = f"a comparison needs at least two arms, received '{names[0]}' only. Add {BASELINE}, for instance."
        problems.append(problem(item.where, sentence))
    return list(dict(named).items())


def _named(item: Item, problems: list[str]) -> list[tuple[str, dict[str, Item]]]:
    if isinstance(item.value, dict):
        return _mapping(item, problems)
    if isinstance(item.value, str):
        inside = item.value.strip().removeprefix("[").removesuffix("]")
        words = [Item(word.strip().strip("'\""), item.where) for word in inside.split(",") if word.strip()]
    elif isinstance(item.value, list | tuple):
        words = [word if isinstance(word, Item) else Item(word, item.where) for word in item.value]
    else:
        words = [item]
    if not words:
        problems.append(problem(item.where, f"arms is empty. Write arms={BASELINE},{DEFAULT_RECIPE}, for instance."))
    arms = []
    for word in words:
        arms += _word(word, problems)
    return arms


def _word(word: Item, problems: list[str]) -> list[tuple[str, dict[str, Item]]]:
    """Return the arms that one word names: a built-in arm, a recipe file, or a file of arms."""
    name = word.value
    allowed = [BASELINE, UPSTREAM, *shipped_recipes()]
    if not isinstance(name, str):
        problems.append(problem(word.where, f"an arm is a name or a YAML file, received {shown(word)}."))
        return []
    if name in allowed:
        kd = NO_RECIPE if name == BASELINE else name
        return [(name, {"kd": Item(kd, word.where)})]
    if Path(name).suffix.lower() in (".yaml", ".yml"):
        root = read_yaml(name, problems)
        if root is None:
            return []
        if isinstance(root.value, dict) and "losses" in root.value:
            return [(Path(name).stem, {"kd": Item(str(Path(name).absolute()), word.where)})]
        return _named(root, problems) if isinstance(root.value, list) else _mapping(root, problems)
    sentence = f"unknown arm {shown(name)}.{did_you_mean(name[:60], allowed)} Arms: {listed(allowed)}, or a YAML file."
    problems.append(problem(word.where, sentence))
    return []


def _mapping(root: Item, problems: list[str]) -> list[tuple[str, dict[str, Item]]]:
    """Return the arms of a YAML mapping of names to keys of train."""
    if not isinstance(root.value, dict) or not root.value:
        received = "it is empty" if not root.value else f"received {shown(root)}"
        problems.append(problem(root.where, f"arms must be a mapping of names to keys of train; {received}."))
        return []
    arms: list[tuple[str, dict[str, Item]]] = []
    for name, item in root.value.items():
        if item.value is None:
            arms += _word(Item(name, item.where), problems)
        elif isinstance(item.value, dict):
            keys = dict(item.value)
            for key in [k for k in keys if k in _SHARED or k in _TAKEN]:
                place = keys.pop(key).where
                problems.append(problem(place, f"arm '{name}' cannot set {key}: it is the same for all arms."))
            if "kd" not in keys and name in (BASELINE, UPSTREAM, *shipped_recipes()):
                keys["kd"] = Item(NO_RECIPE if name == BASELINE else name, item.where)
            if "kd" not in keys:
                sentence = f"arm '{name}' names no recipe. Add kd: <recipe>, kd: {UPSTREAM} or kd: {NO_RECIPE}."
                problems.append(problem(item.where, sentence))
                continue
            arms.append((name, keys))
        else:
            sentence = f"arm '{name}' must be a mapping of keys of train, or empty, received {shown(item)}."
            problems.append(problem(item.where, sentence))
    return arms


# ------------------------------------------------------------------------------------------------ keys -> trainings


def _resolve(
    wanted: Sequence[tuple[str, dict[str, Item]]], common: Mapping[str, Item], default: str, problems: list[str]
) -> list[Arm]:
    """Check every arm as a training; a mistake that all arms share is reported once."""
    found: dict[str, list[str]] = {}
    arms = []
    for name, keys in wanted or [("", {"kd": Item(default)})]:
        found[name] = []
        arm = _arm(name, keys, common, found[name])
        if arm is not None and wanted:
            arms.append(arm)
    everywhere = set.intersection(*(set(lines) for lines in found.values()))
    problems += sorted(everywhere, key=next(iter(found.values())).index)
    for name, lines in found.items():
        problems += [f"arm '{name}': {line}" for line in lines if line not in everywhere]
    return arms


def _arm(name: str, keys: dict[str, Item], common: Mapping[str, Item], problems: list[str]) -> Arm | None:
    kd = keys["kd"]
    kind = ALONE if kd.value == NO_RECIPE else UPSTREAM if kd.value == UPSTREAM else DISTILLED
    merged = {**common, **keys}
    extra = {}
    if kind == ALONE:
        for key in ("teacher", *_DISTILLATION_KEYS):
            if key not in keys:
                merged.pop(key, None)
    if kind == UPSTREAM:
        # checked as the recipe with the same loss; keys that only Ultralytics' own trainer has are checked here
        merged["kd"] = Item("ultralytics", kd.where)
        for key in _UPSTREAM_KEYS:
            if key in merged:
                extra[key] = merged.pop(key)
        merged = {k: item for k, item in merged.items() if k not in UNLABELED_KEYS or k in keys}
        for key in [k for k in merged if k.startswith("kd.") or k in _DISTILLATION_KEYS]:
            problems.append(problem(merged.pop(key).where, f"{key} has no meaning for Ultralytics' own trainer."))
    for key, item in extra.items():
        number = isinstance(item.value, int | float) and not isinstance(item.value, bool) and item.value > 0
        if not number:
            problems.append(problem(item.where, f"{key} must be a number above 0, received {shown(item)}."))
    # an empty key means the default, except for kd
    merged = {key: item for key, item in merged.items() if item.value is not None or key == "kd"}
    try:
        options = resolve_items(merged)
    except ConfigError as error:
        problems += error.problems
        return None
    differs = {
        key: item.plain()
        for key, item in keys.items()
        if key not in ("kd", "teacher", *_UPSTREAM_KEYS) and not key.startswith("kd.")
    }
    if kind == DISTILLED and options.inherit is None and (start := _start(options)):
        differs["inherit"] = start
    return Arm(name, kind, options, {k: i.plain() for k, i in extra.items()}, differs)


def _start(options: TrainOptions) -> bool | str:
    """Return the recipe's student initialisation, False if the student has weights or the teacher has none."""
    pretrained = options.ultralytics.get("pretrained")
    student, teacher = (str(name).lower().endswith((".yaml", ".yml")) for name in (options.student, options.teacher))
    weightless = not isinstance(pretrained, str) and (student or pretrained is False)
    if not weightless or teacher or options.classes.get("keep_classes"):
        return False
    assert options.recipe is not None
    return options.recipe.inherit
