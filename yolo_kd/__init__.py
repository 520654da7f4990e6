"""Distillation trainer for Ultralytics YOLO detectors.

The public names are imported on first use, so that `import yolo_kd` is quick and asks nothing of the network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from yolo_kd._version import __version__

if TYPE_CHECKING:
    from yolo_kd.config.recipe import Recipe, load_recipe
    from yolo_kd.distillation.distillation import Distillation
    from yolo_kd.engine.signals import Interrupted, Terminated
    from yolo_kd.engine.trainer import DistillationTrainer
    from yolo_kd.errors import (
        AuditError,
        CheckpointError,
        ConfigError,
        DataError,
        NumbersError,
        PairError,
        ParityError,
        SaveError,
        SetupError,
        YoloKDError,
    )
    from yolo_kd.export.export import export_model
    from yolo_kd.losses.base import Loss

_HOMES = {
    "AuditError": "yolo_kd.errors",
    "CheckpointError": "yolo_kd.errors",
    "ConfigError": "yolo_kd.errors",
    "DataError": "yolo_kd.errors",
    "Distillation": "yolo_kd.distillation.distillation",
    "DistillationTrainer": "yolo_kd.engine.trainer",
    "SetupError": "yolo_kd.errors",
    "Interrupted": "yolo_kd.engine.signals",
    "Loss": "yolo_kd.losses.base",
    "NumbersError": "yolo_kd.errors",
    "PairError": "yolo_kd.errors",
    "ParityError": "yolo_kd.errors",
    "Recipe": "yolo_kd.config.recipe",
    "SaveError": "yolo_kd.errors",
    "Terminated": "yolo_kd.engine.signals",
    "YoloKDError": "yolo_kd.errors",
    "export_model": "yolo_kd.export.export",
    "load_recipe": "yolo_kd.config.recipe",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'yolo_kd' has no attribute '{name}'")
