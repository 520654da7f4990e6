"""Checks of data set, student, teacher and unlabeled images, made before Ultralytics creates a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER

from yolo_kd.config.unlabeled import SOURCE_KEY
from yolo_kd.engine.class_resolution import kept_problems, match_classes
from yolo_kd.engine.plan import Plan
from yolo_kd.errors import ConfigError, DataError, PairError
from yolo_kd.losses.base import find
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector
from yolo_kd.safe_loading.dataset import optional_train, restricted_data
from yolo_kd.unlabeled.images import UnlabeledImages, check_apart, find_images, has_labels, log_warning, readable_images
from yolo_kd.upstream.pairing import check_levels


def check_models(
    plan: Plan | None, detector: LoadedDetector | None, keys: Mapping[str, Any], trust: bool
) -> tuple[LoadedDetector | None, dict[str, Any]]:
    """Check data set, student and teacher against each other.

    Args:
        plan: The plan, None for the student alone.
        detector: The teacher if it is loaded already.
        keys: Ultralytics' keys of the training.
        trust: Load checkpoints without restriction.

    Returns:
        The loaded teacher, None for the student alone, and what `read_dataset` returned.

    Raises:
        DataError: If the data set cannot be used.
        CheckpointError: If a model cannot be loaded.
        PairError: If they do not fit each other.
    """
    unlabeled = plan is not None and plan.unlabeled is not None
    data = read_dataset(keys.get("data"), keys.get("split") or "val", train_optional=unlabeled)
    size = fitting(data, keys)
    student = load_detector(keys.get("model") or "", role="student", trust=trust, **size)
    if isinstance(pretrained := keys.get("pretrained"), str | Path):
        load_detector(pretrained, role="pretrained", trust=trust)
    if plan is None:
        return None, data
    detector = detector or load_detector(plan.teacher, role="teacher", trust=trust, **size)
    problems, warnings = pair_problems(plan, detector, student, data, keys)
    if problems:
        raise PairError("\n".join(problems))
    for warning in warnings:
        LOGGER.warning(warning)
    return detector, data


def fitting(data: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of classes and channels that `load_detector` builds a model YAML with, to fit a data set."""
    return {"nc": 1 if keys.get("single_cls") else data["nc"], "channels": data["channels"]}


def check_unlabeled_images(
    plan: Plan, data: Mapping[str, Any], keys: Mapping[str, Any], warn: Callable[[str], None] = log_warning
) -> tuple[UnlabeledImages, bool]:
    """Find the unlabeled images of a plan, and check that a training can use them.

    Args:
        plan: The plan, with options for unlabeled images.
        data: What `read_dataset` returned.
        keys: Ultralytics' keys of the training.
        warn: Receives what is worth a warning.

    Returns:
        The images, and whether there are labeled ones as well.

    Raises:
        ConfigError: If keys do not go together.
        DataError: If the images cannot be used.
    """
    assert plan.unlabeled is not None
    if keys.get("rect"):
        raise ConfigError(
            f"rect=True orders images by their shape, {SOURCE_KEY}= draws them in an order of its own. Leave one out."
        )
    place = ",".join(plan.unlabeled.source)
    images = readable_images(find_images(plan.unlabeled.source), place, warn)
    check_apart(images, data[keys.get("split") or "val"], place, warn)
    labeled = has_labels(data.get("train"))
    auto = [term.name for term in plan.recipe.terms if term.ratio is not None]
    if labeled and keys.get("batch") == 1:
        raise ConfigError(f"batch=1 has no room for a labeled and an unlabeled image ({SOURCE_KEY}=). Use batch=2.")
    if not labeled and not plan.unlabeled.distils:
        raise ConfigError(
            f"data={keys.get('data')} has no labeled training images, and with unlabeled_mode={plan.unlabeled.mode} "
            "the terms of the recipe act on those only. Write unlabeled_mode=both or distill."
        )
    if not labeled and not plan.unlabeled.labels and auto:
        raise ConfigError(
            f"weight: auto (here: {', '.join(auto)}) follows the task loss, but there is none: data={keys.get('data')} "
            "has no labeled training images. Give a number as weight, or write unlabeled_mode=both."
        )
    return images, labeled


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
        train_optional: It may name no training images, since there are unlabeled ones; `train` is then None.

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
