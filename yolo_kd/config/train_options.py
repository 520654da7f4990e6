"""The options of a training: `key=value` words, experiment files and Python mappings end in one checked object."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ModelWrapValidatorHandler,
    StrictBool,
    ValidationInfo,
    model_validator,
)
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from yolo_kd.config.class_options import CLASS_KEYS, ClassOptions
from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.experiment import command_line_items, is_override, read_items, with_experiment
from yolo_kd.config.plugins import PluginKeys, split_names
from yolo_kd.config.recipe import Inherit, Recipe, read_recipe
from yolo_kd.config.source import Item, raise_if, shown, wrap
from yolo_kd.config.speed import SPEED_KEYS, Speed
from yolo_kd.config.ultralytics_keys import checked_keys
from yolo_kd.config.unlabeled import SOURCE_KEY, UNLABELED_KEYS, UnlabeledOptions
from yolo_kd.config.validation import CONFIG, Group, Loc, checked, mistakes, validate

__all__ = ["TrainOptions", "parse_train", "read_items", "resolve_items", "train_options"]

_INCOMPLETE = "incomplete"

DEFAULT_RECIPE = "default"
KEEPING_RECIPE = "objectness"  # the default with keep_classes, where terms on features would have nothing to train


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _resumed(value: Any) -> Any:
    if value is True:  # the newest run of the machine, which is what Ultralytics would take, may be anybody's
        sentence = "name the checkpoint to continue: resume=runs/detect/train/weights/last.pt."
        raise mistakes([((), sentence)])
    return None if value is False else value


def _ultralytics(keys: dict[str, Any]) -> dict[str, Any]:
    good, wrong = checked_keys(keys, OWN_KEYS)
    if wrong:
        raise mistakes(((key,), sentence) for key, sentence in wrong)
    return good


PathText = Annotated[str, BeforeValidator(_text), Field(strict=True, pattern=r"\S", title="the path of a file")]


@dataclass(frozen=True, config=CONFIG)
class TrainOptions:
    """What a training was asked to do; the descriptions of the fields are their documentation.

    `train_options(options.to_keys())` is the same object: that is how it travels to another process.
    """

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
    kd_overrides: dict[str, Any] = Field(default_factory=dict, description="Changes to the recipe, by loss.key.")
    plugins: tuple[str, ...] = Field(default=(), description=str(PluginKeys.model_fields["plugins"].description))
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
    speed: Speed = field(default_factory=lambda: Speed())
    class_options: ClassOptions = field(default_factory=lambda: ClassOptions())
    unlabeled: UnlabeledOptions | None = None
    keys: Annotated[dict[str, Any], AfterValidator(_ultralytics)] = field(default_factory=dict)
    recipe: Recipe | None = None
    given: frozenset[str] = field(default=frozenset(), compare=False)

    @model_validator(mode="wrap")
    @classmethod
    def _belong_together(cls, data: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        # what is missing may stand in a file that could not be read
        return handler(data) if info.context == _INCOMPLETE else checked(data, handler, _rules)

    @property
    def ultralytics(self) -> dict[str, Any]:
        """Every key that is Ultralytics', as it takes them; never model, task, mode, resume or cfg."""
        return {**self.keys, **({} if self.data is None else {"data": self.data})}

    @property
    def pooled(self) -> bool:
        """Whether there are unlabeled images to train on."""
        return self.unlabeled is not None and self.unlabeled.ratio > 0

    @property
    def pool(self) -> dict[str, Any]:
        """The keys of the unlabeled images that were given."""
        return self._given(self.unlabeled.to_keys()) if self.unlabeled else {}

    @property
    def classes(self) -> dict[str, Any]:
        """The keys about classes that have an effect."""
        return self.class_options.to_keys()

    @property
    def own_keys(self) -> dict[str, Any]:
        """This package's keys that were given, as a training takes them, all but the student."""
        keys = {
            "teacher": self.teacher,
            "kd": self.kd,
            "plugins": list(self.plugins) or None,
            "inherit": self.inherit,
            "trust_checkpoints": self.trust_checkpoints or None,
            "random_teacher": self.random_teacher or None,
        }
        found = {key: value for key, value in keys.items() if value is not None}
        changes = {f"kd.{key}": value for key, value in self.kd_overrides.items()}
        return found | self._given(self.speed.to_keys()) | self.classes | self.pool | changes

    def to_keys(self) -> dict[str, Any]:
        """Return the keys that `train_options` turns into this object."""
        named = {"student": self.student, "resume": self.resume}
        return {**self.ultralytics, **{k: v for k, v in named.items() if v is not None}, **self.own_keys}

    def _given(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in keys.items() if key in self.given}


# the keys that are fields of the training itself; the others are in groups of their own
_FIELDS = ("teacher", "student", "data", "kd", "inherit", "trust_checkpoints", "random_teacher", "resume")

OWN_KEYS: dict[str, str] = {
    **{
        name: str(TrainOptions.__pydantic_fields__[name].description)  # type: ignore[attr-defined]
        for name in (*(f for f in _FIELDS if f not in ("data", "resume")), "plugins")
    },
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


def resolve_items(items: Mapping[str, Item]) -> TrainOptions:
    """Return the options that the keys of `read_items` ask for.

    Raises:
        ConfigError: With one line for every mistake.
    """
    return _resolve(dict(items), [])


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
    ours = {*OWN_KEYS, "data", "resume"}
    given = {k: item for k, item in items.items() if item.value is not None or (k not in ours and not is_override(k))}
    if "kd" in given and str(given["kd"].value).lower() == NO_RECIPE:
        given["kd"] = Item(NO_RECIPE, given["kd"].where)
    resuming = "resume" in given and given["resume"].value is not False
    plugins = given.get("plugins")
    if plugins is not None:
        plugins = wrap(split_names(plugins.plain()), plugins.where, problems)
    modules = validate(PluginKeys, Item({"plugins": plugins} if plugins else {}), problems)
    kd = given.get("kd") or (None if resuming else _default(given))
    overrides = {key.removeprefix("kd."): item for key, item in given.items() if is_override(key)}
    recipe, recipe_problems = None, list[str]()
    if kd is not None and kd.value != NO_RECIPE and not resuming:
        recipe = read_recipe(kd, overrides, recipe_problems)
    rest = {key: item for key, item in given.items() if key not in ours and not is_override(key)}
    tree = {
        **{key: given[key] for key in _FIELDS if key in given and key != "kd"},
        **({"kd": kd} if kd is not None and isinstance(kd.value, str | dict | os.PathLike) else {}),
        "plugins": Item(tuple(modules.plugins) if modules else ()),
        "kd_overrides": Item(overrides),
        "speed": Group({key: given[key] for key in SPEED_KEYS if key in given}),
        "class_options": Group({key: given[key] for key in CLASS_KEYS if key in given}),
        "keys": Group(rest),
        "recipe": Item(recipe),
        "given": Item(frozenset(given)),
    }
    unlabeled = {key: given[key] for key in UNLABELED_KEYS if key in given}
    if unlabeled and (not resuming or SOURCE_KEY in unlabeled):
        tree["unlabeled"] = Group(unlabeled, next(iter(unlabeled.values())).where)
    options = validate(TrainOptions, Item(tree), problems, context=None if complete else _INCOMPLETE)
    raise_if(problems + recipe_problems)
    assert options is not None
    return options


def _default(given: Mapping[str, Item]) -> Item:
    return Item(default_recipe("keep_classes" in given) if "teacher" in given else NO_RECIPE)


def _rules(options: Mapping[str, Any]) -> list[tuple[Loc, str]]:
    """Return the mistakes between keys, given the fields of a training as they were written."""
    given, kd = options.get("given", frozenset()), options.get("kd")
    overrides, teacher = [*(options.get("kd_overrides") or ())], options.get("teacher")
    if options.get("resume"):
        lines: list[tuple[Loc, str]] = []
        for key in ("student", "kd", *(k for k in UNLABELED_KEYS if k != SOURCE_KEY), *CLASS_KEYS):
            if key in given and not (key == "kd" and kd == NO_RECIPE):  # kd=none: the run that goes on has no teacher
                sentence = f"{key} cannot be given with resume: it stands in the checkpoint. Leave out {key}."
                lines.append((_loc(key), sentence))
        for key in overrides:
            lines.append(
                ((), f"kd.{key} cannot be given with resume: the recipe stands in the checkpoint. Leave it out.")
            )
        return lines
    lines = [
        ((), f"{key} is missing. Add {key}={example}, or resume=<last.pt> to continue a run.")
        for key, example in (("student", "yolov8n.pt"), ("data", "coco8.yaml"))
        if options.get(key) is None
    ]
    if kd == NO_RECIPE and teacher is not None:
        sentence = f"kd={NO_RECIPE} trains the student alone, but teacher={teacher} is given."
        lines.append((("kd",), f"{sentence} Leave one out, or write teacher=none."))
    if kd == NO_RECIPE and overrides and (teacher is not None or "kd" in given):
        lines.append(((), f"kd.{overrides[0]} is given, but kd={NO_RECIPE} distils nothing. Leave one out."))
    elif kd == NO_RECIPE and overrides:
        lines.append(((), f"kd.{overrides[0]} is given but no teacher. Add teacher=<model.pt>, or leave it out."))
    if teacher is None and kd not in (None, NO_RECIPE):
        sentence = f"kd is given but no teacher. Add teacher=<model.pt>, or write kd={NO_RECIPE} for the student alone."
        lines.append((() if isinstance(kd, Mapping) else ("kd",), sentence))
    if teacher is None and (about := [key for key in CLASS_KEYS if key in given]):
        sentence = f"{about[0]} is about a teacher's classes, but none is given."
        lines.append((_loc(about[0]), f"{sentence} Add teacher=<model.pt>, or leave it out."))
    if teacher is not None and options.get("inherit") and "keep_classes" in given:
        sentence = "inherit is not compatible with keep_classes, which initialises the head from the student's own."
        lines.append((("inherit",), f"{sentence} Leave one out."))
    if teacher is None and kd == NO_RECIPE and SOURCE_KEY in given:
        sentence = f"{SOURCE_KEY} needs a teacher to find the objects on the images, but kd={NO_RECIPE} has none."
        lines.append((_loc(SOURCE_KEY), f"{sentence} Add teacher=<model.pt> and a recipe, or leave out {SOURCE_KEY}."))
    return lines


def _loc(key: str) -> Loc:
    return ("class_options", key) if key in CLASS_KEYS else ("unlabeled", key) if key in UNLABELED_KEYS else (key,)
