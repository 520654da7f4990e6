"""Trains with Ultralytics' own trainer and its `distill_model=`: the arm `distill_model` of a comparison.

This is `yolo train` with one difference: `amp=bf16` also works on a CPU, so that all arms of a comparison train in the
same precision. This package changes neither model nor loss nor data.

    python -m yolo_kd.compare.upstream model=yolov8n.yaml data=coco8.yaml distill_model=yolov8s.pt epochs=3
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_kd.config.command_line import parse_assignments
from yolo_kd.environment import check_torchvision
from yolo_kd.upstream.cpu_bf16 import cpu_bf16_autocast

PREVIOUS = "last.complete.pt"  # a complete copy of last.pt


def main(words: Sequence[str] | None = None) -> None:
    """Train with the keys of the command line, or with those of the YAML file `keys=`."""
    keys = parse_assignments(sys.argv[1:] if words is None else words)
    if file := keys.pop("keys", None):
        keys = {**yaml.safe_load(Path(file).read_text(encoding="utf-8")), **keys}
    check_torchvision()
    with cpu_bf16_autocast():
        trainer = DetectionTrainer(overrides={"task": "detect", "mode": "train", **keys})
        trainer.add_callback("on_model_save", keep_complete)
        trainer.train()


def keep_complete(trainer: DetectionTrainer) -> None:
    """Copy the checkpoint that was just written, so that a kill during the next write leaves a complete one."""
    copy = trainer.last.with_name(PREVIOUS)
    partial = copy.with_suffix(".partial")
    shutil.copyfile(trainer.last, partial)
    os.replace(partial, copy)


if __name__ == "__main__":
    main()
