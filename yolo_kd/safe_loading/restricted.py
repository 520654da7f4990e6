"""Restricted loading for every checkpoint that Ultralytics loads in this process.

A `.pt` file is a pickle, and unpickling can run code. The restricted loader of Ultralytics is off by default. Here it
is on by default, each file is inspected before it is loaded, and nothing falls back to unrestricted loading silently.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, remove_colorstr, torch_utils

from yolo_kd.errors import CheckpointError
from yolo_kd.patches import replaced
from yolo_kd.safe_loading.archive import inspect
from yolo_kd.safe_loading.dataset import restricted_data
from yolo_kd.safe_loading.pickle_scan import Refused


@contextmanager
def restricted_loading(trust: bool = False) -> Iterator[None]:
    """Restrict every checkpoint load of Ultralytics in this process for the duration.

    Ultralytics reads its switch from the environment once, at import, and several of its loads (resume, recovery from
    NaN, final validation) have no argument for it. The switch itself is therefore replaced.

    Args:
        trust: Load without restriction: files may run code.

    Raises:
        CheckpointError: If this torch has no restricted loading; Ultralytics would then load without restriction.
    """
    if not trust and not tasks._SafeLoad.SUPPORTED:
        raise CheckpointError(
            f"torch {torch.__version__} cannot load checkpoints restrictedly, which needs torch 2.6 or newer. Upgrade "
            "torch, or set trust_checkpoints=true if you trust every checkpoint of this command."
        )
    with ExitStack() as stack:
        stack.enter_context(restricted_data())
        stack.enter_context(replaced(tasks, "SAFE_LOAD", not trust))
        if not trust:
            stack.enter_context(replaced(tasks, "_SafeLoad", _Inspecting))
            # strip_optimizer opens best.pt and last.pt of a run without any restriction
            stack.enter_context(replaced(torch_utils, "torch_load", _restricted_load))
        yield


class _Inspecting(tasks._SafeLoad):
    """Ultralytics' restricted loading, preceded by an inspection of the file."""

    @classmethod
    @contextmanager
    def loading(cls, weight: Any) -> Iterator[None]:
        try:
            inspect(weight)
        except Refused as error:
            error.path = str(weight)
            raise
        with super().loading(weight):
            yield


def _restricted_load(file: Any, map_location: Any = None) -> Any:
    return tasks.torch_safe_load(str(file), safe_only=True)[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the information that Ultralytics logs, for the duration.

    Warnings remain. Outside a terminal they are logged without colours.
    """
    level = LOGGER.level

    def plain(record: logging.LogRecord) -> bool:
        if not sys.stdout.isatty():
            record.msg = remove_colorstr(str(record.msg))
        return True

    LOGGER.setLevel(logging.WARNING)
    LOGGER.addFilter(plain)
    try:
        yield
    finally:
        LOGGER.removeFilter(plain)
        LOGGER.setLevel(level)
