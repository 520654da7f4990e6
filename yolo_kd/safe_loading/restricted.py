"""Restricted loading of checkpoints, for every load that Ultralytics makes in this process.

A `.pt` file is a pickle, and unpickling can run code. Ultralytics has a restricted loader, off by default; here it is
on by default and never degrades silently.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch
from ultralytics.nn import tasks
from ultralytics.utils import LOGGER, remove_colorstr, torch_utils

from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading.archive import inspect
from yolo_kd.safe_loading.dataset import restricted_data
from yolo_kd.safe_loading.pickle_scan import Refused


@contextmanager
def restricted_loading(trust: bool = False) -> Iterator[None]:
    """Make every checkpoint load of Ultralytics in this process restricted for the duration, unless `trust`.

    Ultralytics reads its switch from the environment once, at import; several of its loads (resume, recovery from NaN,
    final validation) take no argument. So the switch itself is turned here and turned back afterwards.

    Args:
        trust: Load without restriction: files may run code.

    Raises:
        CheckpointError: If this torch is too old for restricted loading; it would silently load without.
    """
    if not trust and not tasks._SafeLoad.SUPPORTED:
        raise CheckpointError(
            f"torch {torch.__version__} cannot load checkpoints restrictedly, which needs torch 2.6 or newer. Upgrade "
            "torch, or set trust_checkpoints=true if you trust every checkpoint of this command."
        )
    with ExitStack() as stack:
        stack.enter_context(restricted_data())
        stack.enter_context(patch.object(tasks, "SAFE_LOAD", not trust))
        if not trust:
            stack.enter_context(patch.object(tasks, "_SafeLoad", _Inspecting))
            # strip_optimizer, which opens best.pt and last.pt of a run, knows no restriction at all
            stack.enter_context(patch.object(torch_utils, "torch_load", _restricted_load))
        yield


class _Inspecting(tasks._SafeLoad):
    """Ultralytics' restricted loading with a look at the file before."""

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
    """Keep Ultralytics from announcing what is only done on the way to something else.

    Its warnings remain, without the colours that it gives them wherever they go unless they go to a terminal.
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
