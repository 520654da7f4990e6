"""What a training distils from which teacher, resolved; and the record of it that travels in checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from yolo_kd._version import __version__
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.class_options import ClassOptions
from yolo_kd.config.recipe import Inherit, Recipe, load_recipe
from yolo_kd.config.speed import Speed
from yolo_kd.config.train_options import TrainOptions
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.errors import CheckpointError, ConfigError
from yolo_kd.safe_loading.checkpoint import LoadedDetector, is_model_yaml, load_detector


@dataclass(frozen=True)
class Plan:
    """What to distil from which teacher.

    Attributes:
        recipe: The recipe.
        teacher: The teacher's file.
        teacher_sha256: Its hash, empty for a model YAML.
        trust_checkpoints: Load checkpoints without restriction.
        random_teacher: The teacher may be a model YAML.
        inherit: Initialisation of the student; None for what the recipe says of students without weights.
        speed: How the teacher runs.
        choice: The user's class options.
        classes: The class map, None until both models are known.
        unlabeled: How unlabeled images are used, None without.
    """

    recipe: Recipe
    teacher: str
    teacher_sha256: str
    trust_checkpoints: bool = False
    random_teacher: bool = False
    inherit: Inherit | None = None
    speed: Speed = field(default_factory=Speed)
    choice: ClassOptions = field(default_factory=ClassOptions)
    classes: ClassMap | None = None
    unlabeled: UnlabeledOptions | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the record: plain types only."""
        return {
            "name": self.recipe.name,
            "recipe": self.recipe.to_dict(),
            "teacher": self.teacher,
            "teacher_sha256": self.teacher_sha256,
            "trust_checkpoints": self.trust_checkpoints,
            "random_teacher": self.random_teacher,
            "inherit": self.inherit,
            "speed": self.speed.to_keys(),
            "class_options": self.choice.to_keys(),
            "classes": None if self.classes is None else self.classes.to_dict(),
            "unlabeled": None if self.unlabeled is None else self.unlabeled.to_keys(),
            "version": __version__,
        }

    @classmethod
    def from_dict(cls, state: Any) -> Plan:
        """Rebuild a plan from its record.

        Raises:
            ConfigError: If the recipe in it has mistakes, which it has where a plugin was changed since.
            CheckpointError: If it was not made by `to_dict` of this revision.
        """
        try:
            record = _Record.model_validate(state)
        except ValidationError as error:
            places = ", ".join(dict.fromkeys(".".join(map(str, line["loc"])) for line in error.errors()))
            raise CheckpointError(
                f"the checkpoint's record of its distillation is damaged, or of another revision of yolo_kd (wrong: "
                f"{places or 'it is no mapping'}). Finish the run with the revision that began it, or start a new run."
            ) from error
        return cls(
            load_recipe(record.recipe, name=record.name),
            record.teacher,
            record.teacher_sha256,
            record.trust_checkpoints,
            record.random_teacher,
            record.inherit,
            Speed.of(record.speed),
            ClassOptions.of(record.class_options),
            None if record.classes is None else ClassMap.from_dict(record.classes),
            None if record.unlabeled is None else UnlabeledOptions.of(record.unlabeled),
        )


class _Record(BaseModel):
    """The types of a record; the values inside are checked by the models that they belong to."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str
    recipe: dict[str, Any]
    teacher: str
    teacher_sha256: str
    trust_checkpoints: bool
    random_teacher: bool
    inherit: Inherit | None
    speed: dict[str, Any]
    class_options: dict[str, Any]
    classes: dict[str, Any] | None
    unlabeled: dict[str, Any] | None
    version: str


def is_record(kd: Any) -> bool:
    """Return whether this is the record of a plan, which a process of multi-GPU training receives from its parent."""
    return isinstance(kd, Mapping) and "teacher_sha256" in kd


def make_plan(options: TrainOptions) -> tuple[Plan | None, LoadedDetector | None]:
    """Return what the options ask for.

    Returns:
        The plan, None for the student alone, and the teacher where it had to be loaded for it.

    Raises:
        ConfigError: If the teacher was never trained and `random_teacher` is not given.
        CheckpointError: If the teacher cannot be loaded.
    """
    teacher, recipe = options.teacher, options.recipe
    if teacher is None or recipe is None:
        return None, None
    plan = Plan(
        replace(recipe, plugins=tuple(dict.fromkeys((*options.plugins, *recipe.plugins)))),
        teacher,
        "",
        options.trust_checkpoints,
        options.random_teacher,
        options.inherit,
        options.speed,
        options.class_options,
        unlabeled=options.unlabeled if options.pooled else None,
    )
    if is_model_yaml(teacher):
        if not options.random_teacher:
            raise ConfigError(
                f"teacher={teacher} is a model YAML, so its weights would be random and teach nothing. Name a trained "
                "checkpoint, or add random_teacher=true if that is what you want."
            )
        return plan, None
    detector = load_detector(teacher, role="teacher", trust=options.trust_checkpoints)
    return replace(plan, teacher=str(detector.path.resolve()), teacher_sha256=detector.sha256), detector
