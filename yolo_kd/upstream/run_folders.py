"""What trainings that run at the same time compete for: the name of a run's folder, and a data set's label cache."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ultralytics.data import dataset
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, RANK

from yolo_kd.patches import original, replaced

TRIES = 1000


@contextmanager
def exclusive_run_folder() -> Iterator[None]:
    """Let Ultralytics' trainer choose a folder that no other process has chosen, for the duration.

    Ultralytics looks for a free name first and makes the folder later, so two trainings that start together share it.
    """
    with replaced(engine, "get_save_dir", partial(claim, original(engine, "get_save_dir"))):
        yield


@contextmanager
def shared_data() -> Iterator[None]:
    """Make Ultralytics write label caches atomically and keep the run's folder while it launches DDP processes."""
    launch = partial(keep_folder, original(engine, "generate_ddp_command"))
    with (
        replaced(dataset, "save_dataset_cache_file", save_cache),
        replaced(engine, "generate_ddp_command", launch),
    ):
        yield


def claim(choose: Callable[..., Path], args: Any, name: str | None = None) -> Path:
    """Choose the run's folder and create it, unless the user named it or allows it to exist.

    Args:
        choose: Ultralytics' function that chooses a free name.
        args: Ultralytics' training arguments.
        name: Name of the folder, as in Ultralytics.

    Raises:
        FileExistsError: If other processes take every name first.
    """
    given = getattr(args, "save_dir", None) or getattr(args, "exist_ok", False) or RANK not in {-1, 0}
    folder = choose(args, name)
    if given:
        return folder
    for _ in range(TRIES):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()  # fails if another process was faster
        except FileExistsError:
            folder = choose(args, name)
        else:
            return folder
    raise FileExistsError(f"no free folder next to {folder} after {TRIES} tries")


def keep_folder(generate: Callable[..., tuple[list[str], str]], trainer: Any) -> tuple[list[str], str]:
    """Return Ultralytics' DDP command and keep the run's folder.

    Ultralytics removes the trainer's folder when it generates the command; it gets an empty temporary one to remove.

    Args:
        generate: Ultralytics' function that generates the command.
        trainer: The trainer.
    """
    if trainer.resume:
        return generate(trainer)
    folder, trainer.save_dir = trainer.save_dir, Path(tempfile.mkdtemp())
    try:
        return generate(trainer)
    finally:
        trainer.save_dir = folder


def save_cache(prefix: str, path: Path, x: dict, version: str) -> None:
    """Write a label cache to a temporary file and rename it; a reader finds either the old cache or the new one.

    Args:
        prefix: Start of log messages.
        path: The cache file.
        x: The content; receives the version.
        version: Version of the format.
    """
    x["version"] = version
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, x)  # type: ignore[arg-type]
        os.replace(temporary, path)
        LOGGER.info(f"{prefix}New cache created: {path}")
    except OSError as error:  # as in Ultralytics, training goes on without a cache
        temporary.unlink(missing_ok=True)
        LOGGER.warning(f"{prefix}The label cache {path} was not saved: {error}")
