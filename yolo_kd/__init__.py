"""Distillation trainer for Ultralytics YOLO detectors.

The public names are imported on first use, so that `import yolo_kd` is quick and asks nothing of the network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolo_kd.errors import YoloKDError
    from yolo_kd.export import export_model
    from yolo_kd.losses.base import Loss
    from yolo_kd.recipe import Recipe, load_recipe
    from yolo_kd.trainer import DistillationTrainer

__version__ = "0.1.0"

_HOMES = {
    "DistillationTrainer": "yolo_kd.trainer",
    "Loss": "yolo_kd.losses.base",
    "Recipe": "yolo_kd.recipe",
    "YoloKDError": "yolo_kd.errors",
    "export_model": "yolo_kd.export",
    "load_recipe": "yolo_kd.recipe",
}

__all__ = ["DistillationTrainer", "Loss", "Recipe", "YoloKDError", "__version__", "export_model", "load_recipe"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'yolo_kd' has no attribute '{name}'")
