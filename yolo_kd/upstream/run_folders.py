"""What several trainings at once may reach for: the name of a run's folder, and a data set's label cache."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from ultralytics.data import dataset
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, RANK

TRIES = 1000

_lock = Lock()
_held: dict[tuple[int, str], tuple[int, Any]] = {}  # (module, attribute): how many hold it, and the original


@contextmanager
def exclusive_run_folder() -> Iterator[None]:
    """Let Ultralytics' trainer choose a folder that no other process has chosen, for the duration.

    Its own choice looks for a free name first and makes the folder later; two trainings started together then share it.
    """
    with _replaced(engine, "get_save_dir", claim):
        yield


@contextmanager
def shared_data() -> Iterator[None]:
    """Let Ultralytics write label caches whole, and keep the folder's name through a launch of several processes."""
    with ExitStack() as stack:
        stack.enter_context(_replaced(dataset, "save_dataset_cache_file", save_cache))
        stack.enter_context(_replaced(engine, "generate_ddp_command", keep_folder))
        yield


def claim(choose: Callable[..., Path], args: Any, name: str | None = None) -> Path:
    """Return the run's folder, made by this very call unless the user named it or allows it to exist.

    Args:
        choose: Ultralytics' own choice.
        args: Its training arguments.
        name: As in Ultralytics.
    """
    given = getattr(args, "save_dir", None) or getattr(args, "exist_ok", False) or RANK not in {-1, 0}
    folder = choose(args, name)
    if given:
        return folder
    for _ in range(TRIES):
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()  # fails where another process was faster: that is what makes it ours
        except FileExistsError:
            folder = choose(args, name)
        else:
            return folder
    raise FileExistsError(f"no free folder beside {folder} after {TRIES} tries")


def keep_folder(generate: Callable[..., tuple[list[str], str]], trainer: Any) -> tuple[list[str], str]:
    """Return Ultralytics' command for several processes, which removes the run's folder: another, empty one of ours."""
    if trainer.resume:
        return generate(trainer)
    folder, trainer.save_dir = trainer.save_dir, Path(tempfile.mkdtemp())
    try:
        return generate(trainer)
    finally:
        trainer.save_dir = folder


def save_cache(_save: Callable[..., None], prefix: str, path: Path, x: dict, version: str) -> None:
    """Write a label cache under another name and give it its own in one step; a reader finds the old one or the new.

    Args:
        prefix: Start of log messages.
        path: The cache file.
        x: What it holds; receives the version.
        version: Version of its format.
    """
    x["version"] = version
    path = Path(path)
    temporary = path.with_name(f".{path.name}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with open(temporary, "wb") as file:
            np.save(file, x)  # type: ignore[arg-type]
        os.replace(temporary, path)
        LOGGER.info(f"{prefix}New cache created: {path}")
    except OSError as error:  # as upstream: training goes on without a cache
        temporary.unlink(missing_ok=True)
        LOGGER.warning(f"{prefix}The label cache {path} was not saved: {error}")


@contextmanager
def _replaced(module: Any, attribute: str, function: Callable) -> Iterator[None]:
    """Give a module another function, which receives the original first, until the last who asked for it is done."""
    key = (id(module), attribute)
    with _lock:
        holders, original = _held.get(key, (0, getattr(module, attribute)))
        _held[key] = holders + 1, original
        if not holders:
            setattr(module, attribute, lambda *args, **kwargs: function(original, *args, **kwargs))
    try:
        yield
    finally:
        with _lock:
            holders, original = _held.pop(key)
            if holders > 1:
                _held[key] = holders - 1, original
            else:
                setattr(module, attribute, original)
