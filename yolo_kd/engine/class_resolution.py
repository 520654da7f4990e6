"""Resolves the classes of a run from the user's options, the teacher, the student, the data set and the recipe."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from ultralytics.nn.tasks import DetectionModel

from yolo_kd.classes.mapping import INDEX, ClassMap
from yolo_kd.classes.match import match, nothing_matched
from yolo_kd.classes.names import normalised, short
from yolo_kd.config.class_options import TEACHER, ClassOptions
from yolo_kd.config.recipe import Recipe
from yolo_kd.config.train_options import KEEPING_RECIPE
from yolo_kd.engine.components.kept_head import KeptClasses, check_extendable
from yolo_kd.errors import PairError
from yolo_kd.losses.base import find
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.safe_loading.restricted import quiet
from yolo_kd.upstream.heads import layers_before_head


def match_classes(
    choice: ClassOptions, recipe: Recipe, teacher: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> tuple[ClassMap, list[str]]:
    """Match the teacher's classes with those of the run.

    Args:
        choice: The user's class options.
        recipe: The recipe.
        teacher: The loaded teacher.
        data: The data set as `read_dataset` returns it, with the classes of its label files.
        keys: Ultralytics' keys of the training.

    Returns:
        The class map, and sentences for warnings.

    Raises:
        ConfigError: If `class_map` names classes that do not exist.
        PairError: If no class matches although the recipe needs classes, or there are none to keep.
    """
    names, single = teacher.model.names, bool(keys.get("single_cls"))
    names = names if isinstance(names, Mapping) else dict(enumerate(names))
    if choice.keep_classes:
        return kept_classes(choice, teacher, data, keys).classes, []
    ours = {0: "item"} if single else data["names"]
    by_index = (teacher.random and len(names) == len(ours)) or (single and len(names) == 1)
    classes = match(names, ours, choice.class_map, by_index)
    where = f"data={keys.get('data')}"
    if not classes.matched:
        sentence = nothing_matched(classes, keys.get("data"), single)
        if needy := [t.name for t in recipe.terms if find(t.name).reads - {"features", "boxes"}]:
            raise PairError(f"{sentence} (Needed by {', '.join(needy)}.)")
        return classes, [f"{sentence} The recipe does not need classes."]
    if classes.by == "placeholder":
        return classes, [
            f"the class names of the teacher and {where} are meaningless ({classes.student[0]}, ...); classes are "
            f"matched by index because both lists are equal. Write class_map={INDEX} if that is correct."
        ]
    if len(classes.matched) < len(classes.student):
        return classes, [
            f"the teacher has {len(classes.matched)} of the {len(classes.student)} classes of {where}; the others are "
            f"learned from labels only.\n{classes.table()}"
        ]
    return classes, []


def kept_classes(
    choice: ClassOptions, teacher: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> KeptClasses:
    """Return the classes of a run that keeps its teacher's classes; arguments as in `match_classes`.

    Raises:
        PairError: If old and new classes cannot be told apart, or the teacher has none.
    """
    if teacher.random:
        raise PairError(f"keep_classes={TEACHER} needs a trained teacher, but this one has random weights.")
    if keys.get("single_cls"):
        raise PairError("keep_classes cannot be combined with single_cls, which merges all classes.")
    names = teacher.model.names
    names = names if isinstance(names, Mapping) else dict(enumerate(names))
    return KeptClasses.of(names, data["names"], choice.keep_conf)


def kept_problems(
    recipe: Recipe, classes: ClassMap, student: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> list[str]:
    """Return sentences on why a student cannot keep its teacher's classes; arguments as in `match_classes`."""
    if student.random:
        return [
            f"keep_classes={TEACHER} initialises old classes from the student's head, but student={student.path} has "
            "random weights. Name a trained checkpoint, such as the teacher's file."
        ]
    problems = []
    if keys.get("pretrained") is False or isinstance(keys.get("pretrained"), str | Path):
        problems.append(
            "keep_classes starts from the weights of student=. Remove pretrained=, and name the weights there."
        )
    if keys.get("classes"):
        problems.append("classes= cannot be combined with keep_classes. Remove one of them.")
    old = {normalised(name) for name in classes.teacher}
    labeled = any(normalised(str(name)) in old for name in data["names"].values())
    blind = [t.name for t in recipe.terms if find(t.name).reads & {"targets", "assignment"}]
    if blind and not labeled:
        problems.append(
            f"{', '.join(blind)} needs labeled objects of the teacher's classes, but with keep_classes "
            f"data={keys.get('data')} has none. Use a recipe that reads no labels, such as kd={KEEPING_RECIPE}."
        )
    head = layers_before_head(student.model)
    freeze = head if keys.get("freeze") is None else keys["freeze"]
    frozen = [t.name for t in recipe.terms if "features" in find(t.name).reads and not t.student_layers]
    if frozen and isinstance(freeze, int) and freeze >= head:
        problems.append(
            f"{', '.join(frozen)} compares features, which do not change with freeze={freeze}: with keep_classes, only "
            f"the head is trained unless freeze= is given. Use kd={KEEPING_RECIPE}, or add freeze=0, with which the "
            "student forgets more of the old classes."
        )
    with torch.random.fork_rng(devices=[]), quiet():
        shape = {"ch": data["channels"], "nc": len(classes.student)}
        model = DetectionModel(deepcopy(student.model.yaml), **shape, verbose=False)
        model.load(student.model, verbose=False)
    try:
        check_extendable(model, student.model, classes.teacher, student.path)
    except PairError as error:
        problems.append(str(error))
    return problems


def check_same_classes(then: ClassMap, now: ClassMap) -> None:
    """Check that a resumed run has the same classes as before.

    Raises:
        PairError: With the first class that differs.
    """
    if then == now:
        return
    for i, (old, new) in enumerate(zip_longest(_described(then), _described(now), fillvalue="nothing")):
        if old != new:
            raise PairError(
                f"the classes have changed since this run began: class {i} was {old} and is now {new}. Restore the "
                "names in the data YAML, or start a new run."
            )
    raise PairError(
        f"the teacher's classes have changed since this run began: they were {short(then.teacher)} and are now "
        f"{short(now.teacher)}. Start a new run."
    )


def _described(classes: ClassMap) -> list[str]:
    """Return a description of each student class."""
    sources = (" + ".join(classes.teacher[i] for i in s) or "nothing" for s in classes.sources)
    return [f"'{name}' (of the teacher: {s})" for name, s in zip(classes.student, sources, strict=True)]
