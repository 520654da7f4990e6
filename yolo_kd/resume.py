"""What a checkpoint may decide about the run that goes on from it.

A run that is resumed takes its arguments from the checkpoint, and the checkpoint may be a stranger's. It may decide how
to train. It may not decide where files are written, what is fetched from the network, or which code is imported: those
the user says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ultralytics.cfg import get_cfg
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_kd.checkpoints import check_model, held_model, load_checkpoint_file
from yolo_kd.errors import CheckpointError, ConfigError
from yolo_kd.values import wrong_values

MAX_VALUES = 20_000  # with shared lists counted wherever they stand
MAX_TEXT = 1 << 20
MAX_DEPTH = 20


def check_resume_source(resume: Any) -> Path:
    """Return the checkpoint to go on from.

    Raises:
        ConfigError: If it is not named; Ultralytics would take the newest run of the machine instead.
    """
    if not isinstance(resume, str | Path) or Path(resume).suffix.lower() != ".pt":
        raise ConfigError(
            f"resume={resume} names no checkpoint. Write resume=<run>/weights/last.pt, the file to go on from."
        )
    return Path(resume)


def check_arguments(checkpoint: Mapping[str, Any], path: Path, given: Mapping[str, Any]) -> tuple[str, str]:
    """Check the arguments of a run that is to go on, before anything is done with them.

    Args:
        checkpoint: The checkpoint's dictionary.
        path: Its file.
        given: What the user gave beside `resume`.

    Returns:
        The data set and the split that the run goes on with.

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
    trust = bool(given.get("trust_checkpoints"))
    check_model(held_model(checkpoint), f"resume={path}", rebuilt=True, trust=trust)
    best = path.with_name("best.pt")
    if best.exists() and best != path:  # Ultralytics opens it when the training ends
        load_checkpoint_file(best, role="model", trust=trust)
    return str(data), str(known.get("split") or "val")


def check_plugins(state: Any, named: Sequence[str], path: Path) -> None:
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


def is_local_yaml(data: str) -> bool:
    """Return whether a data set is a YAML file that is here, or one of those that come with Ultralytics."""
    if "://" in data or ":/" in data or not data.lower().endswith((".yaml", ".yml")):
        return False
    return Path(data).is_file() or len(Path(data).parts) == 1
