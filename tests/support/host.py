"""A plain Ultralytics trainer that hosts one component, to test the component without the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ultralytics.cfg import DEFAULT_CFG
from ultralytics.models.yolo.detect import DetectionTrainer

from tests.support.models import narrow_yaml
from yolo_kd.engine.component import Component, Hosted


class Host(Hosted, DetectionTrainer):
    """A trainer for detection that hosts one component, and has no other part of the package.

    Args:
        make: Returns the component for a trainer.
        folder: Where the run's folder is created.
        **keys: Ultralytics' keys.
    """

    def __init__(self, make: Callable[[Any], Component], folder: Path, **keys: Any):
        self.components = (make(self),)
        model = str(narrow_yaml("yolov8n", folder / "architecture"))
        run = {"model": model, "project": str(folder), "name": "run", "device": "cpu", "workers": 0, "plots": False}
        super().__init__(DEFAULT_CFG, {**run, "imgsz": 64, "mosaic": 0.0, **keys})
