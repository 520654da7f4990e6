"""What a training is to do, resolved and checked before Ultralytics makes a folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from yolo_kd._version import __version__
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.class_options import ClassOptions
from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.plugins import import_plugins
from yolo_kd.config.recipe import Recipe, inherit_mistake, load_recipe
from yolo_kd.config.speed import Speed
from yolo_kd.config.train_options import default_recipe
from yolo_kd.config.unlabeled import SOURCE_KEY, UnlabeledOptions
from yolo_kd.errors import CheckpointError, ConfigError
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector


@dataclass(frozen=True)
class Plan:
    """What to distil from which teacher, resolved and checked; plain enough to ride in a checkpoint's arguments."""

    recipe: Recipe
    teacher: str
    teacher_sha256: str
    trust_checkpoints: bool = False
    random_teacher: bool = False
    inherit: bool | str | None = None  # None for what the recipe says of students without weights
    speed: Speed = field(default_factory=Speed)
    choice: ClassOptions = field(default_factory=ClassOptions)
    classes: ClassMap | None = None  # what came of the choice, None until both models are known
    unlabeled: UnlabeledOptions | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return {
            "name": self.recipe.name,
            "recipe": self.recipe.to_dict(),
            "teacher": self.teacher,
            "teacher_sha256": self.teacher_sha256,
            "trust_checkpoints": self.trust_checkpoints,
            "random_teacher": self.random_teacher,
            "inherit": self.inherit,
            "speed": self.speed.to_keys(),
            **self.choice.to_keys(),
            "classes": None if self.classes is None else self.classes.to_dict(),
            "unlabeled": None if self.unlabeled is None else self.unlabeled.to_keys(),
            "version": __version__,
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Plan:
        """Rebuild a plan from `to_dict`.

        Raises:
            ConfigError: If the recipe in it has mistakes, which it has where a plugin was changed since.
            CheckpointError: If it was not made by `to_dict`.
        """
        if not isinstance(state, Mapping):
            raise CheckpointError("the checkpoint's record of its distillation is no mapping. Start a new run instead.")
        if "pool" in state:
            raise CheckpointError(
                "the checkpoint was written by an earlier revision of yolo_kd, whose record of the distillation this "
                "one cannot read. Finish the run with that revision, or start a new run."
            )
        try:
            texts = [state[key] for key in ("name", "teacher", "teacher_sha256")]
            switches = [state[key] for key in ("trust_checkpoints", "random_teacher")]
            inherit = state["inherit"]
            recipe = state["recipe"]
        except KeyError as error:
            raise CheckpointError(
                f"the checkpoint's record of its distillation lacks {error}. Start a new run instead."
            ) from error
        types_agree = all(isinstance(t, str) for t in texts) and all(isinstance(s, bool) for s in switches)
        if not types_agree or inherit_mistake(inherit):
            raise CheckpointError("the checkpoint's record of its distillation is damaged: a value has another type.")
        speed = state.get("speed") or {}
        if not isinstance(speed, Mapping):
            raise CheckpointError("the checkpoint's record of its distillation is damaged: speed is no mapping.")
        unlabeled = state.get("unlabeled") or {}
        if not isinstance(unlabeled, Mapping):
            raise CheckpointError("the checkpoint's record of its distillation is damaged: unlabeled is no mapping.")
        if not isinstance(recipe, Mapping):
            raise CheckpointError("the checkpoint's record of its distillation is damaged: it holds no recipe.")
        name, teacher, digest = texts
        trust, random = switches
        return cls(
            load_recipe(recipe, name=name),
            teacher,
            digest,
            trust,
            random,
            inherit,
            Speed.of(speed),
            ClassOptions.of(state),
            None if state.get("classes") is None else ClassMap.from_dict(state["classes"]),
            UnlabeledOptions.of(unlabeled),
        )


def is_resolved(kd: Any) -> bool:
    """Return whether this is a plan as `to_dict` gives it: a worker of multi-GPU training receives its parent's."""
    return isinstance(kd, Mapping) and "teacher_sha256" in kd


def make_plan(own: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Plan | None, LoadedDetector | None]:
    """Resolve recipe and teacher.

    Args:
        own: This package's keys of a training: `teacher`, `kd`, `plugins`, `inherit`, `trust_checkpoints`,
            `random_teacher` and those of `yolo_kd.config`: speed, class options and unlabeled images.
        changes: Changes to the recipe, by `loss.key`.

    Returns:
        The plan, None for the student alone, and the teacher where it had to be loaded for it.

    Raises:
        ConfigError: If keys are missing or contradict each other, or the recipe has mistakes.
        CheckpointError: If the teacher cannot be loaded.
    """
    source, teacher = own.get("kd"), own.get("teacher")
    if isinstance(source, Mapping) and is_resolved(source):
        return Plan.from_dict(source), None
    choice = ClassOptions.of(own)
    if source is None and teacher is None:
        raise ConfigError("no teacher: add teacher=<checkpoint>, or kd=none to train the student alone.")
    unlabeled = UnlabeledOptions.of(own)
    if source == NO_RECIPE:
        if own.get(SOURCE_KEY) is not None:
            raise ConfigError(
                f"{SOURCE_KEY}= needs a teacher that says what is on the images, but kd=none has none: add "
                f"teacher=<checkpoint> and a recipe, or leave out {SOURCE_KEY}."
            )
        if teacher is not None or changes or own.get("inherit"):
            raise ConfigError("kd=none trains the student alone and takes no teacher, no inherit and no kd. keys.")
        if choice != ClassOptions():
            raise ConfigError("kd=none trains the student alone, so class_map and keep_classes have no teacher.")
        return None, None
    if teacher is None:
        raise ConfigError(f"kd={source} needs a teacher: add teacher=<checkpoint>.")
    speed = Speed.of(own)
    plugins = import_plugins(own.get("plugins"))
    recipe = load_recipe(default_recipe(choice.keep_classes) if source is None else source, changes)
    recipe = replace(recipe, plugins=tuple(dict.fromkeys((*plugins, *recipe.plugins))))
    trust, random = (bool(own.get(k, False)) for k in ("trust_checkpoints", "random_teacher"))
    inherit = own.get("inherit")
    if sentence := inherit_mistake(inherit):
        raise ConfigError(sentence)
    if inherit and choice.keep_classes:
        raise ConfigError("inherit cannot be combined with keep_classes, where the head starts from the student's own.")
    if str(teacher).lower().endswith((".yaml", ".yml")):
        if not random:
            raise ConfigError(
                f"teacher={teacher} is a model YAML, so its weights would be random and teach nothing. Name a trained "
                "checkpoint, or add random_teacher=true if that is what you want."
            )
        return Plan(recipe, str(teacher), "", trust, random, inherit, speed, choice, unlabeled=unlabeled), None
    detector = load_detector(teacher, role="teacher", trust=trust)
    file, digest = str(detector.path.resolve()), detector.sha256
    return Plan(recipe, file, digest, trust, random, inherit, speed, choice, unlabeled=unlabeled), detector
