"""The options of a training: `key=value` words, experiment files and Python mappings end in one checked object."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool
from pydantic.dataclasses import dataclass

from yolo_kd.config.class_options import CLASS_KEYS, ClassOptions
from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.experiment import command_line_items, is_override, with_experiment
from yolo_kd.config.groups import KeyGroup
from yolo_kd.config.plugins import PluginKeys, Plugins, split_names
from yolo_kd.config.recipe import Inherit, Recipe, read_recipe
from yolo_kd.config.source import Item, problem, raise_if, shown, wrap
from yolo_kd.config.speed import SPEED_KEYS, Speed
from yolo_kd.config.ultralytics_keys import checked_keys
from yolo_kd.config.unlabeled import SOURCE_KEY, UNLABELED_KEYS, UnlabeledOptions
from yolo_kd.config.validation import CONFIG, mistakes, validate

DEFAULT_RECIPE = "default"
KEEPING_RECIPE = "objectness"  # the default with keep_classes, where terms on features would have nothing to train


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _resumed(value: Any) -> Any:
    if value is True:  # the newest run of the machine, which is what Ultralytics would take, may be anybody's
        sentence = "name the checkpoint to continue: resume=runs/detect/train/weights/last.pt."
        raise mistakes([((), sentence)])
    return None if value is False else value


PathText = Annotated[str, BeforeValidator(_text), Field(strict=True, pattern=r"\S", title="the path of a file")]


@dataclass(frozen=True, config=CONFIG)
class TrainKeys(KeyGroup):
    """The keys of a training that belong to no group. The descriptions of the fields are their documentation."""

    teacher: PathText | None = Field(
        default=None, description="Checkpoint of the large, trained detector. On resume: its new path, if it has moved."
    )
    student: PathText | None = Field(
        default=None, description="Checkpoint or model YAML of the small detector that is trained."
    )
    data: PathText | None = Field(default=None, description="Data set: a data YAML, as Ultralytics takes it.")
    kd: Annotated[str | dict[str, Any] | None, BeforeValidator(_text)] = Field(
        default=None,
        description=f"What to distil: a recipe's name, its file, or '{NO_RECIPE}' for the student alone.",
    )
    plugins: Plugins = field(default_factory=list)
    inherit: Inherit | None = Field(
        default=None,
        description="Initialisation of the student: thinned (a thinned copy of the teacher), true (what fits of its "
        "neck and head), false (its own weights); without the key, as the recipe says for a student without weights.",
    )
    trust_checkpoints: StrictBool = Field(
        default=False, description="Load checkpoints that hold more than tensors and known classes, which can run code."
    )
    random_teacher: StrictBool = Field(
        default=False, description="Allow a model YAML as teacher, which was never trained, to try things out."
    )
    resume: Annotated[PathText | None, BeforeValidator(_resumed)] = Field(
        default=None, description="Checkpoint (last.pt) of the run to continue."
    )


@dataclass(frozen=True, config=CONFIG)
class TrainOptions(TrainKeys):
    """What a training was asked to do.

    `train_options(options.to_keys())` is the same object: that is how it travels to another process.

    Attributes:
        kd_overrides: Changes to the recipe, by `loss.key`.
        speed: How the training is made fast.
        class_options: Which classes correspond, and which are kept.
        unlabeled: How unlabeled images are used, None without.
        keys: Ultralytics' keys, without the data set.
        recipe: What to distil, None for the student alone and for a run that is resumed.
        given: Names of the keys that were given, rather than left to their defaults.
    """

    kd_overrides: dict[str, Any] = field(default_factory=dict)
    speed: Speed = field(default_factory=Speed)
    class_options: ClassOptions = field(default_factory=ClassOptions)
    unlabeled: UnlabeledOptions | None = None
    keys: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @property
    def ultralytics(self) -> dict[str, Any]:
        """Every key that is Ultralytics', as it takes them; never model, task, mode, resume or cfg."""
        return {**self.keys, **({} if self.data is None else {"data": self.data})}

    @property
    def pooled(self) -> bool:
        """Whether there are unlabeled images to train on."""
        return self.unlabeled is not None and self.unlabeled.ratio > 0

    def to_keys(self) -> dict[str, Any]:
        """Return the keys that `train_options` turns into this object: those that were given, and the recipe."""
        keys = {key: getattr(self, key) for key in _FIELDS} | self.speed.to_keys() | self.class_options.to_keys()
        keys |= self.unlabeled.to_keys() if self.unlabeled else {}
        chosen = {key: value for key, value in keys.items() if value is not None and key in {*self.given, "kd"}}
        return {**self.keys, **chosen, **{f"kd.{key}": value for key, value in self.kd_overrides.items()}}


_FIELDS = TrainKeys.documented()
_GROUPS: dict[str, type[KeyGroup]] = {"speed": Speed, "class_options": ClassOptions, "unlabeled": UnlabeledOptions}

OWN_KEYS: dict[str, str] = {
    **_FIELDS,
    "kd.<loss>.<key>": "One value of the recipe, such as kd.objectness.weight=0.5.",
    "cfg": "Experiment file: a YAML file of these same keys; keys of the command line win over it.",
    **CLASS_KEYS,
    **SPEED_KEYS,
    **UNLABELED_KEYS,
}


def parse_train(arguments: Sequence[str]) -> TrainOptions:
    """Return the options that a command line asks for; `cfg=` reads an experiment file, over which its words win.

    Raises:
        ConfigError: With one line for every mistake on the command line, in the experiment file and in the recipe.
    """
    problems: list[str] = []
    return _resolve(command_line_items(arguments, problems), problems)


def train_options(mapping: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a mapping of the same keys; None stands for a key of ours that was not given.

    Raises:
        ConfigError: With one line for every mistake.
    """
    problems: list[str] = []
    items = {}
    for key, value in mapping.items():
        if not isinstance(key, str):
            problems.append(f"keys must be text, received {shown(key)}.")
        elif is_override(key) or (key == "kd" and isinstance(value, Mapping)):
            items[key] = wrap(value, key, problems)
        else:
            items[key] = Item(value)  # Ultralytics' values are handed on as they are
    return _resolve(items, problems)


def default_recipe(keeps_classes: bool | str | None) -> str:
    """Return the recipe of a training that names none; a student that keeps classes learns in its head alone."""
    return KEEPING_RECIPE if keeps_classes else DEFAULT_RECIPE


def _resolve(items: dict[str, Item], problems: list[str]) -> TrainOptions:
    """Add the keys of the experiment file and check everything together."""
    items, complete = with_experiment(items, problems)
    return resolve_items(items, problems, complete)


def resolve_items(items: Mapping[str, Item], problems: list[str] | None = None, complete: bool = True) -> TrainOptions:
    """Check keys, each with its place.

    Args:
        items: Keys from `read_items`.
        problems: Mistakes that were found when the keys were read.
        complete: No keys are missing because their file could not be read.

    Raises:
        ConfigError: With one line for every mistake.
    """
    problems = [] if problems is None else problems
    given = {k: item for k, item in items.items() if item.value is not None or not _is_ours(k)}
    if "kd" in given and str(given["kd"].value).lower() == NO_RECIPE:
        given["kd"] = Item(NO_RECIPE, given["kd"].where)
    resuming = "resume" in given and given["resume"].value is not False
    if plugins := given.get("plugins"):
        given["plugins"] = wrap(split_names(plugins.plain()), plugins.where, problems)
    modules = validate(PluginKeys, Item({k: given[k] for k in ("plugins",) if k in given}), problems)
    kd = given.get("kd") or (None if resuming else _default(given))
    overrides = {key.removeprefix("kd."): item for key, item in given.items() if is_override(key)}
    recipe, recipe_problems = None, list[str]()
    if kd is not None and kd.value != NO_RECIPE and not resuming:
        recipe = read_recipe(kd, overrides, recipe_problems)
    tree = {key: given[key] for key in _FIELDS if key in given and key not in ("kd", "plugins")}
    if kd is not None and isinstance(kd.value, str | dict | os.PathLike):
        tree["kd"] = kd
    tree |= {"plugins": Item(modules.plugins if modules else []), "recipe": Item(recipe)}
    tree |= {"kd_overrides": Item(overrides), "given": Item(frozenset(given))}
    for name, model in _GROUPS.items():
        keys = {key: given[key] for key in model.documented() if key in given}
        if keys and not (resuming and model is UnlabeledOptions and SOURCE_KEY not in keys):
            group = validate(model, Item(keys, next(iter(keys.values())).where), problems)
            tree |= {name: Item(group)} if group else {}
    rest = {key: item for key, item in given.items() if not _is_ours(key)}
    good, wrong = checked_keys({key: item.plain() for key, item in rest.items()}, OWN_KEYS)
    options = validate(TrainOptions, Item({**tree, "keys": Item(good)}), problems)
    problems += [problem(rest[key].where, sentence) for key, sentence in wrong]
    if complete:  # otherwise what is missing may stand in the file that could not be read
        problems += [problem(where, sentence) for where, sentence in _contradictions(given, kd)]
    raise_if(problems + recipe_problems)
    assert options is not None
    return options


def _is_ours(key: str) -> bool:
    return key in OWN_KEYS or is_override(key)


def _default(given: Mapping[str, Item]) -> Item:
    return Item(default_recipe("keep_classes" in given) if "teacher" in given else NO_RECIPE)


CHANGEABLE = {"resume", "cfg", "data", "teacher", "plugins", "trust_checkpoints", SOURCE_KEY, *SPEED_KEYS}
"""Our keys that a resumed run takes anew: where files are now, what may run, and how fast."""


def _contradictions(given: Mapping[str, Item], kd: Item | None) -> Iterator[tuple[str, str]]:
    """Yield the mistakes between keys, each with the place it was written at; `kd` holds the default recipe, too."""
    overrides = [key for key in given if is_override(key)]
    if "resume" in given and given["resume"].value is not False:
        for key in sorted(given.keys() & OWN_KEYS.keys() - CHANGEABLE):
            # kd=none says that the run that goes on has no teacher
            if key != "kd" or given[key].value != NO_RECIPE:
                sentence = f"{key} cannot be given with resume: it stands in the checkpoint. Leave out {key}."
                yield given[key].where, sentence
        for key in overrides:
            yield "", f"{key} cannot be given with resume: the recipe stands in the checkpoint. Leave it out."
        return
    for key, example in (("student", "yolov8n.pt"), ("data", "coco8.yaml")):
        if key not in given:
            yield "", f"{key} is missing. Add {key}={example}, or resume=<last.pt> to continue a run."
    assert kd is not None
    alone = kd.value == NO_RECIPE
    if alone and overrides:
        if "teacher" in given or "kd" in given:
            yield "", f"{overrides[0]} is given, but kd={NO_RECIPE} distils nothing. Leave one out."
        else:
            yield "", f"{overrides[0]} is given but no teacher. Add teacher=<model.pt>, or leave it out."
    if "teacher" in given:
        yield from _contradictions_with_teacher(given, kd)
        return
    if not alone:
        sentence = f"Add teacher=<model.pt>, or write kd={NO_RECIPE} for the student alone."
        yield "" if isinstance(kd.value, dict) else kd.where, f"kd is given but no teacher. {sentence}"
    if about := [key for key in CLASS_KEYS if key in given]:
        sentence = f"{about[0]} is about a teacher's classes, but none is given."
        yield given[about[0]].where, f"{sentence} Add teacher=<model.pt>, or leave it out."
    if alone and SOURCE_KEY in given:
        sentence = f"{SOURCE_KEY} needs a teacher to find the objects on the images, but kd={NO_RECIPE} has none."
        fix = f"Add teacher=<model.pt> and a recipe, or leave out {SOURCE_KEY}."
        yield given[SOURCE_KEY].where, f"{sentence} {fix}"


def _contradictions_with_teacher(given: Mapping[str, Item], kd: Item) -> Iterator[tuple[str, str]]:
    if kd.value == NO_RECIPE:
        sentence = f"kd={NO_RECIPE} trains the student alone, but teacher={given['teacher'].value} is given."
        yield kd.where, f"{sentence} Leave one out, or write teacher=none."
    if "keep_classes" in given and "inherit" in given and given["inherit"].value:
        sentence = "inherit is not compatible with keep_classes, which initialises the head from the student's own."
        yield given["inherit"].where, f"{sentence} Leave one out."
