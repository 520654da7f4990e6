"""What a training is to do, resolved and checked before Ultralytics makes a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER

from yolo_kd import __version__
from yolo_kd.assignments import NO_RECIPE
from yolo_kd.checkpoints import LoadedDetector, load_detector
from yolo_kd.class_choice import ClassChoice
from yolo_kd.classes import ClassMap
from yolo_kd.datafiles import optional_train, restricted_data
from yolo_kd.errors import CheckpointError, ConfigError, DataError, PairError
from yolo_kd.losses.base import find
from yolo_kd.matching import kept_problems, match_classes
from yolo_kd.options import default_recipe
from yolo_kd.plugins import import_plugins
from yolo_kd.pool import SOURCE_KEY, Pool
from yolo_kd.pool_files import PoolImages, check_apart, find_images, has_labels, log_warning, readable_images
from yolo_kd.recipe import Recipe, inherit_mistake, load_recipe
from yolo_kd.speed import Speed
from yolo_kd.taps import check_levels
from yolo_kd.values import wrong_values


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
    choice: ClassChoice = field(default_factory=ClassChoice)
    classes: ClassMap | None = None  # what came of the choice, None until both models are known
    pool: Pool | None = None

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
            "pool": None if self.pool is None else self.pool.to_keys(),
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
        pool = state.get("pool") or {}
        if not isinstance(pool, Mapping):
            raise CheckpointError("the checkpoint's record of its distillation is damaged: pool is no mapping.")
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
            ClassChoice.of(state),
            None if state.get("classes") is None else ClassMap.from_dict(state["classes"]),
            Pool.of(pool),
        )


def is_resolved(kd: Any) -> bool:
    """Return whether this is a plan as `to_dict` gives it: a worker of multi-GPU training receives its parent's."""
    return isinstance(kd, Mapping) and "teacher_sha256" in kd


def make_plan(own: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[Plan | None, LoadedDetector | None]:
    """Resolve recipe and teacher.

    Args:
        own: This package's keys of a training: `teacher`, `kd`, `plugins`, `inherit`, `trust_checkpoints`,
            `random_teacher` and those of `yolo_kd.speed`, `yolo_kd.classes` and `yolo_kd.pool`.
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
    choice = ClassChoice.of(own)
    if source is None and teacher is None:
        raise ConfigError("no teacher: add teacher=<checkpoint>, or kd=none to train the student alone.")
    pool = Pool.of(own)
    if source == NO_RECIPE:
        if own.get(SOURCE_KEY) is not None:
            raise ConfigError(
                f"{SOURCE_KEY}= needs a teacher that says what is on the images, but kd=none has none: add "
                f"teacher=<checkpoint> and a recipe, or leave out {SOURCE_KEY}."
            )
        if teacher is not None or changes or own.get("inherit"):
            raise ConfigError("kd=none trains the student alone and takes no teacher, no inherit and no kd. keys.")
        if choice != ClassChoice():
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
        return Plan(recipe, str(teacher), "", trust, random, inherit, speed, choice, pool=pool), None
    detector = load_detector(teacher, role="teacher", trust=trust)
    file, digest = str(detector.path.resolve()), detector.sha256
    return Plan(recipe, file, digest, trust, random, inherit, speed, choice, pool=pool), detector


def check_models(
    plan: Plan | None, detector: LoadedDetector | None, keys: Mapping[str, Any], trust: bool
) -> LoadedDetector | None:
    """Check data set, student and teacher against each other.

    Args:
        plan: The plan, None for the student alone.
        detector: The teacher if it is loaded already.
        keys: Ultralytics' keys of the training.
        trust: Load checkpoints without restriction.

    Returns:
        The loaded teacher, None for the student alone.

    Raises:
        ConfigError: If a key has a value that no training can have.
        DataError: If the data set cannot be used.
        CheckpointError: If a model cannot be loaded.
        PairError: If they do not fit each other.
    """
    if wrong := wrong_values(keys):
        raise ConfigError(wrong)
    pool = plan is not None and plan.pool is not None
    data = read_dataset(keys.get("data"), keys.get("split") or "val", train_optional=pool)
    nc = 1 if keys.get("single_cls") else data["nc"]
    channels = data["channels"]
    student = load_detector(keys.get("model") or "", role="student", trust=trust, nc=nc, channels=channels)
    if isinstance(pretrained := keys.get("pretrained"), str | Path):
        load_detector(pretrained, role="pretrained", trust=trust)
    if plan is None:
        return None
    detector = detector or load_detector(plan.teacher, role="teacher", trust=trust, nc=nc, channels=channels)
    problems, warnings = pair_problems(plan, detector, student, data, keys)
    if problems:
        raise PairError("\n".join(problems))
    for warning in warnings:
        LOGGER.warning(warning)
    return detector


def check_pool(
    plan: Plan, keys: Mapping[str, Any], warn: Callable[[str], None] = log_warning
) -> tuple[PoolImages, bool]:
    """Find the images of a plan's pool, and check that a training can use them.

    Args:
        plan: The plan, with a pool.
        keys: Ultralytics' keys of the training.
        warn: Receives what is worth a warning.

    Returns:
        The images, and whether there are labelled ones as well.

    Raises:
        ConfigError: If keys do not go together.
        DataError: If the images cannot be used.
    """
    assert plan.pool is not None
    if keys.get("rect"):
        raise ConfigError(
            f"rect=True orders images by their shape, {SOURCE_KEY}= draws them in an order of its own. Leave one out."
        )
    split = keys.get("split") or "val"
    data = read_dataset(keys.get("data"), split, train_optional=True)
    place = ",".join(plan.pool.source)
    images = readable_images(find_images(plan.pool.source), place, warn)
    check_apart(images, data[split], place, warn)
    labelled = has_labels(data.get("train"))
    auto = [term.name for term in plan.recipe.terms if term.ratio is not None]
    if labelled and keys.get("batch") == 1:
        raise ConfigError(f"batch=1 has no room for a labelled and an unlabelled image ({SOURCE_KEY}=). Use batch=2.")
    if not labelled and not plan.pool.distils:
        raise ConfigError(
            f"data={keys.get('data')} has no labelled training images, and with unlabeled_mode={plan.pool.mode} the "
            "terms of the recipe act on those only. Write unlabeled_mode=both or distill."
        )
    if not labelled and not plan.pool.labels and auto:
        raise ConfigError(
            f"weight: auto (here: {', '.join(auto)}) follows the task loss, but there is none: data={keys.get('data')} "
            "has no labelled training images. Give a number as weight, or write unlabeled_mode=both."
        )
    return images, labelled


def pair_problems(
    plan: Plan, teacher: LoadedDetector, student: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """Compare teacher, student, data set and training keys.

    Args:
        plan: The plan.
        teacher: The loaded teacher.
        student: The loaded student.
        data: What `read_dataset` returned.
        keys: Ultralytics' keys of the training.

    Returns:
        A sentence for each thing that keeps them from being trained together, and one for each that is worth a warning.
    """
    problems: list[str] = []
    warnings: list[str] = []
    try:
        classes, warnings = match_classes(plan.choice, plan.recipe, teacher, data, keys)
        problems += kept_problems(plan.recipe, classes, student, data, keys) if plan.choice.keep_classes else []
    except (PairError, ConfigError) as error:
        problems += str(error).splitlines()
    if plan.choice.keep_classes and not any(find(term.name).teaches_classes for term in plan.recipe.terms):
        warnings.append(
            f"keep_classes: no term of kd={plan.recipe.name} compares class scores, so nothing but their start keeps "
            "the old classes. Add one, such as objectness."
        )
    if not student.random and student.sha256 == teacher.sha256:
        warnings.append(f"teacher and student are the same file {student.path}: this is self-distillation.")
    try:
        check_levels(student.model, teacher.model)
    except PairError as error:
        problems.append(str(error))
    if (takes := teacher.model.yaml.get("channels", 3)) != data["channels"]:
        problems.append(
            f"teacher={plan.teacher} takes images of {takes} channels, data={keys.get('data')} has {data['channels']}. "
            "Train the teacher on this data set first."
        )
    if keys.get("compile") and (auto := [term.name for term in plan.recipe.terms if term.ratio is not None]):
        problems.append(
            f"compile= cannot be combined with weight: auto (here: {', '.join(auto)}): a compiled model hides the "
            "gradients between neck and head. Add compile=False, or give a number as weight."
        )
    return problems, warnings


def read_dataset(data: Any, split: str, train_optional: bool = False) -> dict[str, Any]:
    """Read a data YAML as Ultralytics does.

    Args:
        data: The data YAML, or a name that Ultralytics knows.
        split: The split that training validates on.
        train_optional: It may name no training images, since there is a pool; `train` is then None.

    Raises:
        DataError: If it is missing or lacks what training needs.
    """
    if not data:
        raise DataError("no data set: add data=<data yaml>.")
    with restricted_data() as scripts, optional_train() if train_optional else nullcontext():
        try:
            found = check_det_dataset(str(data), split=split)
        except Exception as error:
            text = scripts[0] if scripts else _sentence(error).removeprefix(f"{data} ")
            raise DataError(f"data={data} cannot be used: {text or type(error).__name__}") from error
    train = found.get("train")
    if not train and train_optional:
        return found
    if missing := [path for path in (train if isinstance(train, list) else [train]) if not Path(str(path)).exists()]:
        raise DataError(f"data={data} cannot be used: its training images were not found, missing path '{missing[0]}'")
    return found


def _sentence(error: Exception) -> str:
    """Return a message of Ultralytics without its signs and its advice about other things."""
    text = str(error).replace("❌", "").partition("Note dataset download")[0].partition("Verify YAML with")[0]
    return re.sub(r"\s+\.", ".", " ".join(text.split()))
