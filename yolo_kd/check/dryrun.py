"""A dry run of a training, which leaves no label cache, repaired image, folder or logger run behind."""

from __future__ import annotations

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics.data import dataset as labels
from ultralytics.engine import trainer as engine
from ultralytics.utils import LOGGER, callbacks

from yolo_kd.patches import replaced
from yolo_kd.upstream.image_repairs import repairs_written_to

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class ImageRecord:
    """The result of Ultralytics' scan of one image.

    Attributes:
        file: The image.
        label_file: Path of its label file.
        shape: Height and width in pixels, (0, 0) if the image was refused.
        classes: Class of each box, (N,).
        boxes: Normalised xywh of each box, (N, 4).
        labeled: Whether the label file exists.
        problem: Why the image was refused, empty otherwise.
        remark: What Ultralytics corrected silently, empty otherwise.
    """

    file: str
    label_file: str
    shape: tuple[int, int]
    classes: np.ndarray
    boxes: np.ndarray
    labeled: bool
    problem: str = ""
    remark: str = ""


@dataclass
class Trace:
    """The record of a dry run.

    Attributes:
        folder: Temporary folder, removed at the end.
        split: The split being scanned, set by the caller; empty for none.
        records: Images of each split.
        warnings: Warnings of Ultralytics.
    """

    folder: Path
    split: str = ""
    records: dict[str, list[ImageRecord]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@contextmanager
def nothing_written() -> Iterator[Trace]:
    """Let Ultralytics work without writing, printing or reporting anything, for the duration.

    The label cache of a scan is kept in memory, and no cache file is read. Ultralytics repairs a truncated JPEG in
    place; here the repaired image goes to a temporary folder, and so does everything that a trainer writes.
    """
    folder = Path(tempfile.mkdtemp(prefix="yolo-kd-check-"))
    trace = Trace(folder)
    memory: dict[str, Any] = {}
    verify = labels.verify_image_label

    def recorded(arguments: tuple) -> Sequence[Any]:
        result = verify(arguments)
        if trace.split:
            trace.records.setdefault(trace.split, []).append(_record(arguments, result))
        return result

    def load(path: Path) -> Any:
        if trace.split or str(path) not in memory:  # scan each split, even if two of them are one folder
            raise FileNotFoundError(path)
        return deepcopy(memory[str(path)])  # the caller changes it

    def save(_prefix: str, path: Path, cache: dict, version: str) -> None:
        cache["version"] = version
        memory[str(path)] = deepcopy(cache)

    def swallow(record: logging.LogRecord) -> bool:
        if record.levelno >= logging.WARNING:
            trace.warnings.append(" ".join(_COLOUR.sub("", record.getMessage()).split()))
        return False

    level = LOGGER.level
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        stack.callback(LOGGER.setLevel, level)
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(repairs_written_to(folder))
        stack.enter_context(replaced(labels, "verify_image_label", recorded))
        stack.enter_context(replaced(labels, "load_dataset_cache_file", load))
        stack.enter_context(replaced(labels, "save_dataset_cache_file", save))
        stack.enter_context(replaced(callbacks, "add_integration_callbacks", lambda _instance: None))
        stack.enter_context(replaced(engine, "check_amp", _has_amp))
        LOGGER.setLevel(logging.WARNING)  # this also switches progress bars off
        LOGGER.addFilter(swallow)
        stack.callback(LOGGER.removeFilter, swallow)
        yield trace


def _has_amp(model: torch.nn.Module) -> bool:
    """Return True on a GPU, in place of Ultralytics' check of mixed precision, which downloads a model."""
    return next(model.parameters()).device.type not in ("cpu", "mps")


def _reason(message: str) -> str:
    """Return why an image was refused; Ultralytics' last resort is a HEIF reader, whose absence is not the reason."""
    unreadable = "pi_heif" in message or "cannot identify image" in message
    return "the file cannot be read as an image" if unreadable else " ".join(message.split())


def _record(arguments: tuple, result: Sequence[Any]) -> ImageRecord:
    file, label_file, prefix, *_ = arguments
    found, rows, shape, *_, message = result
    message = _COLOUR.sub("", message).removeprefix(_COLOUR.sub("", prefix))
    message = message.removeprefix(f"{file}: ").removeprefix("ignoring corrupt image/label: ")
    exists = Path(label_file).is_file()
    if found is None:
        rows = np.zeros((0, 5), np.float32)
        return ImageRecord(file, label_file, (0, 0), rows[:, 0], rows[:, 1:], exists, problem=_reason(message))
    size = int(shape[0]), int(shape[1])
    return ImageRecord(file, label_file, size, rows[:, 0].astype(int), rows[:, 1:5], exists, remark=message)
