"""A run that goes on from a checkpoint, and what the checkpoint may decide about it.

A run that is resumed takes its arguments from the checkpoint, and the checkpoint may be a stranger's. It may decide how
to train. It may not decide where files are written, what is fetched from the network, or which code is imported: those
the user says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER, RANK

from yolo_kd.config.command_line import NO_RECIPE
from yolo_kd.config.speed import SPEED_KEYS
from yolo_kd.config.train_options import TrainOptions
from yolo_kd.config.ultralytics_keys import wrong_values
from yolo_kd.config.unlabeled import SOURCE_KEY
from yolo_kd.engine.checks_before import check_unlabeled_images, fitting, read_dataset
from yolo_kd.engine.class_resolution import check_same_classes, match_classes
from yolo_kd.engine.epoch_position import EpochPosition
from yolo_kd.engine.plan import Plan
from yolo_kd.engine.run_files import restore, usable
from yolo_kd.engine.setup import Request, Setup
from yolo_kd.errors import CheckpointError, ConfigError, DataError
from yolo_kd.safe_loading.architecture import check_model
from yolo_kd.safe_loading.checkpoint import held_model, is_model_yaml, load_checkpoint_file, load_detector
from yolo_kd.safe_loading.dataset import is_local_yaml

MAX_VALUES = 20_000  # with shared lists counted wherever they stand
MAX_TEXT = 1 << 20
MAX_DEPTH = 20


def check_resumable(keys: Mapping[str, Any], options: TrainOptions | None, trust: bool) -> dict[str, Any]:
    """Check that a training can continue from a checkpoint, before anything is done with what it holds.

    A damaged file gives way to its predecessor, which then takes its place.

    Args:
        keys: Ultralytics' keys that the user gave, `resume` among them.
        options: All keys that the user gave; None in a process of multi-GPU training, whose parent has checked them.
        trust: Load checkpoints without restriction.

    Returns:
        The data set that the run continues with.

    Raises:
        YoloKDError: If it cannot continue.
    """
    path = _source(keys["resume"])
    found = usable(path)
    checkpoint, _ = load_checkpoint_file(found, role="resume", trust=trust)
    _check_unfinished(checkpoint, found, alone=options is None or options.kd == NO_RECIPE)
    state = (checkpoint.get("train_args") or {}).get("kd")
    data, split = _check_arguments(checkpoint, found, keys, trust)
    dataset = read_dataset(data, split, train_optional=isinstance(state, Mapping) and bool(state.get("unlabeled")))
    if options is not None:
        _check_plugins(state, options.plugins, found)
    if found != path and RANK in {-1, 0}:
        LOGGER.warning(restore(path))
    return dataset


def resumed_setup(state: Any, request: Request, data: Mapping[str, Any], keys: Mapping[str, Any]) -> Setup:
    """Return the plan of a run that continues, with what the user says anew, and its files opened and checked.

    Args:
        state: The plan's record in the checkpoint's arguments. What it says of trust does not count: whoever made the
            file must not decide what may run here.
        request: What the user asks for.
        data: What `check_resumable` returned.
        keys: Ultralytics' keys of the run.

    Raises:
        YoloKDError: If the record is damaged, a file is gone or another one, or the classes differ.
    """
    plan = replace(_changed(Plan.from_dict(state), request.options), trust_checkpoints=request.trust)
    images, labeled = None, True
    if plan.unlabeled is not None:
        try:
            images, labeled = check_unlabeled_images(plan, data, keys)
        except DataError as error:
            raise DataError(f"{error} If they are elsewhere now, add {SOURCE_KEY}=<place>.") from error
    is_yaml = plan.random_teacher and is_model_yaml(plan.teacher)
    if not is_yaml and not Path(plan.teacher).is_file():
        raise CheckpointError(
            f"the teacher {plan.teacher} of this run is gone. If it has moved, add teacher=<its new path>."
        )
    teacher = load_detector(plan.teacher, role="teacher", trust=request.trust, **fitting(data, keys))
    if not is_yaml and teacher.sha256 != plan.teacher_sha256:
        raise CheckpointError(
            f"teacher={plan.teacher} is not the file this run began with: its SHA-256 is {teacher.sha256[:12]}..., the "
            f"run's teacher had {plan.teacher_sha256[:12]}.... Name the original file with teacher=."
        )
    if plan.classes is not None:
        classes, _ = match_classes(plan.choice, plan.recipe, teacher, data, keys)
        check_same_classes(plan.classes, classes)
    return Setup(plan, teacher, images, labeled)


def _changed(plan: Plan, options: TrainOptions | None) -> Plan:
    """Return a plan with what a user may change on resume: where files are now, and how the teacher runs.

    Raises:
        ConfigError: If unlabeled images are given to a run that had none.
    """
    if options is None:
        return plan
    speed = {key: getattr(options.speed, key) for key in SPEED_KEYS if key in options.given}
    plan = replace(plan, teacher=options.teacher or plan.teacher, speed=replace(plan.speed, **speed))
    if options.unlabeled is None:
        return plan
    if plan.unlabeled is None:
        raise ConfigError(f"{SOURCE_KEY} cannot be given on resume: this run has no unlabeled images. Leave it out.")
    return replace(plan, unlabeled=replace(plan.unlabeled, source=options.unlabeled.source))


def is_plain(value: Any) -> bool:
    """Return True for nested dictionaries and lists of plain values that stay small when they are written out."""
    left = [MAX_VALUES]

    def walk(entry: Any, depth: int) -> bool:
        left[0] -= 1
        if left[0] < 0 or depth > MAX_DEPTH:
            return False
        if isinstance(entry, str):
            return len(entry) <= MAX_TEXT
        if isinstance(entry, dict):
            return all(isinstance(k, str | int) and walk(v, depth + 1) for k, v in entry.items())
        if isinstance(entry, list | tuple):
            return all(walk(v, depth + 1) for v in entry)
        return entry is None or isinstance(entry, bool | int | float | Path)

    return walk(value, 0)


def _source(resume: Any) -> Path:
    """Return the checkpoint to go on from.

    Raises:
        ConfigError: If it is not named; Ultralytics would take the newest run of the machine instead.
    """
    if not isinstance(resume, str | Path) or Path(resume).suffix.lower() != ".pt":
        raise ConfigError(
            f"resume={resume} names no checkpoint. Write resume=<run>/weights/last.pt, the file to go on from."
        )
    return Path(resume)


def _check_unfinished(checkpoint: Mapping[str, Any], path: Any, alone: bool) -> None:
    """Check that a checkpoint is one that a training can go on from.

    Args:
        checkpoint: Its dictionary.
        path: Its file, for messages.
        alone: True if the run to resume has no teacher.

    Raises:
        CheckpointError: If it is finished, or holds no distillation.
    """
    arguments = checkpoint.get("train_args") or {}
    if not isinstance(arguments, Mapping):
        raise CheckpointError(f"resume={path} is damaged: its training arguments are not a mapping.")
    if arguments.get("kd") is None and "yolo_kd" not in checkpoint and not alone:  # the latter stands in finished files
        raise CheckpointError(
            f"resume={path} was not written by a distillation: it names no teacher and no recipe. Start a new run with "
            f"student={path} and teacher=, or add kd=none to go on training it alone."
        )
    epoch = checkpoint.get("epoch")
    inside_first_epoch = EpochPosition.of_checkpoint(checkpoint) is not None
    if checkpoint.get("optimizer") is None or not isinstance(epoch, int) or (epoch < 0 and not inside_first_epoch):
        raise CheckpointError(
            f"resume={path} is a finished training: it holds no optimiser state. Name the last.pt of a run that was "
            "interrupted."
        )


def _check_arguments(
    checkpoint: Mapping[str, Any], path: Path, given: Mapping[str, Any], trust: bool
) -> tuple[str, str]:
    """Check the arguments of a run that is to continue, before anything is done with them.

    Args:
        checkpoint: The checkpoint's dictionary.
        path: Its file.
        given: Ultralytics' keys that the user gave.
        trust: Load checkpoints without restriction.

    Returns:
        The data set and the split that the run continues with.

    Raises:
        CheckpointError: If they would write elsewhere, fetch something, or are not the arguments of a training.
    """
    arguments = checkpoint.get("train_args") or {}
    if not isinstance(arguments, Mapping) or not is_plain(arguments):
        raise CheckpointError(f"resume={path} is damaged: its training arguments are not plain values.")
    home = path.resolve().parent.parent
    saved = given.get("save_dir") or arguments.get("save_dir")
    if not isinstance(saved, str | Path) or (Path(saved).resolve() != home and not given.get("save_dir")):
        raise CheckpointError(
            f"resume={path} belongs to the run folder {saved or 'of no name'}, but lies in {home}. To go on writing in "
            f"the latter, add save_dir={home}; otherwise name the file in its own folder."
        )
    data = given.get("data") or arguments.get("data")
    own = str(data) == str(arguments.get("data"))  # YOLO(...).train(resume=True) hands the checkpoint's on as given
    if not isinstance(data, str | Path) or (own and not is_local_yaml(str(data))):
        raise CheckpointError(
            f"resume={path} names the data set {str(data)[:80]!r}, no data YAML of this machine. Add data=<yaml>."
        )
    if arguments.get("distill_model"):
        raise CheckpointError(
            f"resume={path} was written by Ultralytics' own distillation (distill_model=). Resume it there."
        )
    known = {key: value for key, value in arguments.items() if key in DEFAULT_CFG_DICT}
    told = {key: value for key, value in given.items() if key in DEFAULT_CFG_DICT}
    try:
        get_cfg({**DEFAULT_CFG_DICT, **known})
        if wrong := wrong_values({**known, **told}):
            raise ValueError(wrong[0])
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(
            f"resume={path} cannot go on, its training arguments are not valid here: {reason}"
        ) from error
    check_model(held_model(checkpoint), f"resume={path}", rebuilt=True, trust=trust)
    best = path.with_name("best.pt")
    if best.exists() and best != path:  # Ultralytics opens it when the training ends
        load_checkpoint_file(best, role="model", trust=trust)
    return str(data), str(known.get("split") or "val")


def _check_plugins(state: Any, named: Sequence[str], path: Path) -> None:
    """Check that the user named every plugin that a checkpoint's recipe would import.

    Raises:
        CheckpointError: Naming the others.
    """
    recipe = state.get("recipe") if isinstance(state, Mapping) else None
    plugins = recipe.get("plugins") if isinstance(recipe, Mapping) else None
    unnamed = [str(name)[:80] for name in plugins or [] if name not in named] if isinstance(plugins, list) else []
    if unnamed:
        names = ",".join(dict.fromkeys([*named, *unnamed]))
        raise CheckpointError(
            f"resume={path} asks to import {', '.join(unnamed[:6])}, and importing runs code. If that code is yours, "
            f"add plugins=[{names}]."
        )
