#!/usr/bin/env python3
"""Train with Ultralytics' own detection trainer, its own `distill_model=` included: the arm that ours is compared with.

It is `yolo train` with one difference: `amp=bf16` also works on a CPU, so that both arms of a comparison train in the
same precision.

    python scripts/train_upstream.py model=yolov8n.yaml data=coco8.yaml distill_model=yolov8s.pt epochs=3
"""

from __future__ import annotations

import sys

from ultralytics.models.yolo.detect import DetectionTrainer

from yolo_kd.options import parse_assignments
from yolo_kd.trainer import cpu_bf16_autocast


def main() -> None:
    """Train with the keys of the command line."""
    if not sys.argv[1:] or sys.argv[1] in {"-h", "--help"}:
        print(__doc__)
        return
    keys = {"task": "detect", "mode": "train", **parse_assignments(sys.argv[1:])}
    with cpu_bf16_autocast():
        DetectionTrainer(overrides=keys).train()


if __name__ == "__main__":
    main()
