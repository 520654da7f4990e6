"""The classes of a run: what teacher, student, data set and recipe make of what the user says about them."""

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
    """Say which class of the run is which of the teacher.

    Args:
        choice: What the user says about classes.
        recipe: What is distilled.
        teacher: The loaded teacher.
        data: What `read_dataset` returned, with the classes that the data set itself has.
        keys: Ultralytics' keys of the training.

    Returns:
        The mapping, and sentences that are worth a warning.

    Raises:
        ConfigError: If the class map names what is not there.
        PairError: If nothing matches although the recipe needs it, or there is nothing to keep.
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
        return classes, [f"{sentence} The recipe reads no classes, so it goes on without."]
    if classes.by == "placeholder":
        return classes, [
            f"the class names of the teacher and {where} say nothing ({classes.student[0]}, ...); they are paired by "
            f"index because both lists are equal. Write class_map={INDEX} if that is right."
        ]
    if len(classes.matched) < len(classes.student):
        return classes, [
            f"the teacher knows {len(classes.matched)} of the {len(classes.student)} classes of {where}; the others "
            f"learn from labels alone.\n{classes.table()}"
        ]
    return classes, []


def kept_classes(
    choice: ClassOptions, teacher: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> KeptClasses:
    """Return the classes of a run that keeps its teacher's; arguments as in `match_classes`.

    Raises:
        PairError: If names do not say what is old and what is new.
    """
    if teacher.random:
        raise PairError(f"keep_classes={TEACHER} needs a trained teacher; one of random weights knows no classes.")
    if keys.get("single_cls"):
        raise PairError("keep_classes cannot be combined with single_cls, which makes one class of all.")
    names = teacher.model.names
    names = names if isinstance(names, Mapping) else dict(enumerate(names))
    return KeptClasses.of(names, data["names"], choice.keep_conf)


def kept_problems(
    recipe: Recipe, classes: ClassMap, student: LoadedDetector, data: Mapping[str, Any], keys: Mapping[str, Any]
) -> list[str]:
    """Say what keeps a student from keeping its teacher's classes, in sentences; arguments as in `match_classes`."""
    if student.random:
        return [
            f"keep_classes={TEACHER} starts old classes from the student's own head, but student={student.path} has "
            "random weights. Name a trained checkpoint, such as the teacher's own file."
        ]
    problems = []
    if keys.get("pretrained") is False or isinstance(keys.get("pretrained"), str | Path):
        problems.append("keep_classes starts from the weights of student=. Leave pretrained= out, and name them there.")
    if keys.get("classes"):
        problems.append("classes= cannot be combined with keep_classes. Leave one of them out.")
    old = {normalised(name) for name in classes.teacher}
    labeled = any(normalised(str(name)) in old for name in data["names"].values())
    blind = [t.name for t in recipe.terms if find(t.name).reads & {"targets", "assignment"}]
    if blind and not labeled:
        problems.append(
            f"{', '.join(blind)} looks at labeled objects of the teacher's classes, and with keep_classes "
            f"data={keys.get('data')} labels none. Use a recipe without boxes of labels, such as "
            f"kd={KEEPING_RECIPE}."
        )
    head = layers_before_head(student.model)
    freeze = head if keys.get("freeze") is None else keys["freeze"]
    still = [t.name for t in recipe.terms if "features" in find(t.name).reads and not t.student_layers]
    if still and isinstance(freeze, int) and freeze >= head:
        problems.append(
            f"{', '.join(still)} compares features, which freeze={freeze} leaves as they are: with keep_classes only "
            f"the head is trained unless freeze= says otherwise. Use kd={KEEPING_RECIPE}, or add freeze=0, which costs "
            "more of the old classes."
        )
    with torch.random.fork_rng(devices=[]), quiet():
        model = DetectionModel(
            deepcopy(student.model.yaml), ch=data["channels"], nc=len(classes.student), verbose=False
        )
        model.load(student.model, verbose=False)
    try:
        check_extendable(model, student.model, classes.teacher, student.path)
    except PairError as error:
        problems.append(str(error))
    return problems


def check_same_classes(then: ClassMap, now: ClassMap) -> None:
    """Check that a run that goes on has the classes that it began with.

    Raises:
        PairError: Naming the first class that differs.
    """
    if then == now:
        return
    for i, (old, new) in enumerate(zip_longest(_described(then), _described(now), fillvalue="nothing")):
        if old != new:
            raise PairError(
                f"the classes are not those this run began with: class {i} was {old} and is {new} now. Put the "
                "names in the data YAML back, or start a new run."
            )
    raise PairError(
        f"the teacher's classes are not those this run began with: they were {short(then.teacher)} and are "
        f"{short(now.teacher)} now. Start a new run."
    )


def _described(classes: ClassMap) -> list[str]:
    """Say of each class of the student what it is."""
    sources = (" + ".join(classes.teacher[i] for i in s) or "nothing" for s in classes.sources)
    return [f"'{name}' (of the teacher: {s})" for name, s in zip(classes.student, sources, strict=True)]
