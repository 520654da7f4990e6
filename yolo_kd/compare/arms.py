"""Reads what a comparison runs: arms, seeds and the keys that all arms share, checked before anything is written."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic.dataclasses import dataclass as validated
from typing_extensions import TypedDict

from yolo_kd.config.class_options import CLASS_KEYS
from yolo_kd.config.command_line import NO_RECIPE, parse_assignments
from yolo_kd.config.experiment import read_items
from yolo_kd.config.recipe import shipped_recipes
from yolo_kd.config.source import Item, problem, raise_if, read_yaml, shown
from yolo_kd.config.train_options import DEFAULT_RECIPE, TrainOptions, default_recipe, resolve_items
from yolo_kd.config.train_options import OWN_KEYS as TRAIN_KEYS
from yolo_kd.config.unlabeled import UNLABELED_KEYS
from yolo_kd.config.validation import CONFIG, Number, Whole, validate
from yolo_kd.errors import ConfigError, did_you_mean, listed
from yolo_kd.safe_loading.checkpoint import is_model_yaml

BASELINE = "baseline"  # the student alone
UPSTREAM = "distill_model"  # Ultralytics' own trainer with its own distillation
ALONE, DISTILLED = "alone", "distilled"  # kinds of arm; UPSTREAM is the third

COMPARE_KEYS: dict[str, str] = {
    "arms": f"what is compared: recipes, {BASELINE}, {UPSTREAM}, or a YAML file of arms ({BASELINE} and kd=)",
    "seeds": "how often each arm trains, with seeds seed, seed + 1, ... (3)",
    "jobs": "how many trainings run at a time (1)",
}
DEFAULT_PROJECT, DEFAULT_NAME = "runs/compare", "compare"

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
_DISTILLATION_KEYS = ("inherit", "random_teacher", *CLASS_KEYS, *UNLABELED_KEYS)

_ArmKeys = list[tuple[str, dict[str, Item]]]  # name and keys of each arm


@validated(frozen=True, config=CONFIG)
class _Numbers:
    """Keys of a comparison that are numbers."""

    seeds: Annotated[Whole, Field(ge=1)] = 3
    jobs: Annotated[Whole, Field(ge=1)] = 1
    seed: Annotated[Whole, Field(ge=0)] = 0


class _UpstreamKeys(TypedDict, total=False):
    """Keys that only Ultralytics' own trainer takes."""

    dis: Annotated[Number, Field(gt=0)]


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
    given = {key: item for key in ("seed", *COMPARE_KEYS) if (item := items.get(key)) and item.value is not None}
    items = {key: item for key, item in items.items() if key not in COMPARE_KEYS}
    named = given.pop("arms", None)
    numbers = validate(_Numbers, Item(given), problems) or _Numbers()
    for key in [k for k in items if k in _TAKEN]:
        item = items.pop(key)
        if item.value is not None:
            problems.append(problem(item.where, f"{key} cannot be given to compare: {_TAKEN[key]}"))
    _misspelt(items, problems)
    kd = items.pop("kd", None)
    changes = {key: items.pop(key) for key in [*items] if key.startswith("kd.")}
    default = default_recipe("keep_classes" in items and items["keep_classes"].value is not None)
    wanted = _Reader(problems).arms(named, kd, changes, default)
    arms = _resolve(wanted, items, default, problems)
    raise_if(problems)
    names = [arm.name for arm in arms]
    alone = [arm.name for arm in arms if arm.kind == ALONE]
    return Comparison(
        _folder(items, arguments),
        tuple(arms),
        BASELINE if BASELINE in names else (alone or names)[0],
        tuple(range(numbers.seed, numbers.seed + numbers.seeds)),
        numbers.jobs,
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


def _folder(items: Mapping[str, Item], arguments: Sequence[str]) -> Path:
    project, name = (items[key].value if key in items else None for key in ("project", "name"))
    experiment = parse_assignments(arguments).get("cfg")
    default = Path(experiment).stem if experiment else DEFAULT_NAME
    return Path(project or DEFAULT_PROJECT, name or default).absolute()


# ------------------------------------------------------------------------------------------------ names -> keys


class _Reader:
    """Reads which arms are compared; `problems` receives a line for every mistake."""

    def __init__(self, problems: list[str]):
        self.problems = problems

    def refuse(self, where: str, sentence: str) -> None:
        """Report a mistake."""
        self.problems.append(problem(where, sentence))

    def arms(self, item: Item | None, kd: Item | None, changes: Mapping[str, Item], default: str) -> _ArmKeys:
        """Return each arm's name and keys, nothing where they are wrong; `default` is a recipe."""
        kd = kd if kd is not None and kd.value is not None else None
        if item is None:
            return self.recipe_and_baseline(kd or Item(default), changes)
        # arms replace the recipe of an experiment file, but a recipe on the command line must not be ignored
        if kd is not None and not kd.where:
            self.refuse(
                "", "kd is what the arms differ in: name recipes in arms=, or leave arms out to compare with one."
            )
        for key, change in changes.items():
            place = "" if change.where.startswith("kd.") else change.where
            self.refuse(place, f"{key} changes the recipe of one arm: write it into that arm in a YAML file.")
        found = self.named(item)
        for name, count in Counter(name for name, _ in found).items():
            if count > 1:
                self.refuse(item.where, f"arm '{name}' is given {count} times. Keep one.")
            if not _NAME.fullmatch(name):
                rule = "must be named with letters, digits, '.', '_' and '-', since it names a folder."
                self.refuse(item.where, f"arm '{name}' {rule}")
        if len(found) == 1 and not self.problems:
            only = f"a comparison needs at least two arms, received '{found[0][0]}' only."
            self.refuse(item.where, f"{only} Add {BASELINE}, for instance.")
        return list(dict(found).items())

    def recipe_and_baseline(self, recipe: Item, changes: Mapping[str, Item]) -> _ArmKeys:
        """Return the arms of a command that names none: one recipe and the baseline."""
        if str(recipe.value).lower() == NO_RECIPE:
            self.refuse(recipe.where, "kd=none is the baseline itself. Add arms=baseline,<recipe>.")
            return []
        name = Path(recipe.value).stem if isinstance(recipe.value, str) else "recipe"
        return [(BASELINE, {"kd": Item(NO_RECIPE)}), (name, {"kd": recipe, **changes})]

    def named(self, item: Item) -> _ArmKeys:
        """Return the arms of `arms=`: a mapping, a list, or words with commas between them."""
        if isinstance(item.value, dict):
            return self.mapping(item)
        words = item.value if isinstance(item.value, list | tuple) else [item]
        if isinstance(item.value, str):
            inside = item.value.strip().removeprefix("[").removesuffix("]").split(",")
            words = [stripped for word in inside if (stripped := word.strip().strip("'\""))]
        if not words:
            self.refuse(item.where, f"arms is empty. Write arms={BASELINE},{DEFAULT_RECIPE}, for instance.")
        items = (word if isinstance(word, Item) else Item(word, item.where) for word in words)
        return [arm for word in items for arm in self.word(word)]

    def word(self, word: Item) -> _ArmKeys:
        """Return the arms that one word names: a built-in arm, a recipe file, or a file of arms."""
        name = word.value
        allowed = [BASELINE, UPSTREAM, *shipped_recipes()]
        if not isinstance(name, str):
            self.refuse(word.where, f"an arm is a name or a YAML file, received {shown(word)}.")
            return []
        if name in allowed:
            return [(name, {"kd": Item(NO_RECIPE if name == BASELINE else name, word.where)})]
        if Path(name).suffix.lower() in (".yaml", ".yml"):
            root = read_yaml(name, self.problems)
            if root is None:
                return []
            if isinstance(root.value, dict) and "losses" in root.value:
                return [(Path(name).stem, {"kd": Item(str(Path(name).absolute()), word.where)})]
            return self.named(root) if isinstance(root.value, list) else self.mapping(root)
        choice = f"Arms: {listed(allowed)}, or a YAML file."
        self.refuse(word.where, f"unknown arm {shown(name)}.{did_you_mean(name[:60], allowed)} {choice}")
        return []

    def mapping(self, root: Item) -> _ArmKeys:
        """Return the arms of a YAML mapping of names to keys of train."""
        if not isinstance(root.value, dict) or not root.value:
            received = f"received {shown(root)}" if root.value else "it is empty"
            self.refuse(root.where, f"arms must be a mapping of names to keys of train; {received}.")
            return []
        arms: _ArmKeys = []
        for name, item in root.value.items():
            if item.value is None:
                arms += self.word(Item(name, item.where))
            elif isinstance(item.value, dict):
                arms += self.entry(name, item)
            else:
                rule = "must be a mapping of keys of train, or empty"
                self.refuse(item.where, f"arm '{name}' {rule}, received {shown(item)}.")
        return arms

    def entry(self, name: str, item: Item) -> _ArmKeys:
        """Return the arm of an entry of such a mapping."""
        keys = dict(item.value)
        for key in [k for k in keys if k in _SHARED or k in _TAKEN]:
            self.refuse(keys.pop(key).where, f"arm '{name}' cannot set {key}: it is the same for all arms.")
        if "kd" not in keys and name in (BASELINE, UPSTREAM, *shipped_recipes()):
            keys["kd"] = Item(NO_RECIPE if name == BASELINE else name, item.where)
        if "kd" in keys:
            return [(name, keys)]
        fix = f"Add kd: <recipe>, kd: {UPSTREAM} or kd: {NO_RECIPE}."
        self.refuse(item.where, f"arm '{name}' names no recipe. {fix}")
        return []


# ------------------------------------------------------------------------------------------------ keys -> trainings


def _resolve(wanted: _ArmKeys, common: Mapping[str, Item], default: str, problems: list[str]) -> list[Arm]:
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
    extra = _UpstreamKeys()
    if kind == ALONE:
        merged = {k: item for k, item in merged.items() if k in keys or k not in ("teacher", *_DISTILLATION_KEYS)}
    if kind == UPSTREAM:
        # checked as the recipe with the same loss; keys that only Ultralytics' own trainer has are checked here
        merged["kd"] = Item("ultralytics", kd.where)
        apart = {key: merged.pop(key) for key in _UpstreamKeys.__annotations__ if key in merged}
        extra = validate(_UpstreamKeys, Item(apart), problems) or extra
        merged = {k: item for k, item in merged.items() if k not in UNLABELED_KEYS or k in keys}
        for key in [k for k in merged if k.startswith("kd.") or k in _DISTILLATION_KEYS]:
            problems.append(problem(merged.pop(key).where, f"{key} has no meaning for Ultralytics' own trainer."))
    # an empty key means the default, except for kd
    merged = {key: item for key, item in merged.items() if item.value is not None or key == "kd"}
    try:
        options = resolve_items(merged)
    except ConfigError as error:
        problems += error.problems
        return None
    apart_from = ("kd", "teacher", *_UpstreamKeys.__annotations__)
    differs = {k: item.plain() for k, item in keys.items() if k not in apart_from and not k.startswith("kd.")}
    if kind == DISTILLED and options.inherit is None and (start := _start(options)):
        differs["inherit"] = start
    return Arm(name, kind, options, dict(extra), differs)


def _start(options: TrainOptions) -> bool | str:
    """Return the recipe's student initialisation, False if the student has weights or the teacher has none."""
    pretrained = options.ultralytics.get("pretrained")
    student, teacher = (is_model_yaml(name or "") for name in (options.student, options.teacher))
    weightless = not isinstance(pretrained, str) and (student or pretrained is False)
    if not weightless or teacher or options.class_options.keep_classes or options.recipe is None:
        return False
    return options.recipe.inherit
