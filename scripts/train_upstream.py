#!/usr/bin/env python3
"""Train with Ultralytics' own detection trainer, including its `distill_model=`.

It equals `yolo train`, except that `amp=bf16` also works on a CPU, so that both arms of a comparison train in the same
precision. `yolo-kd compare arms=distill_model,...` runs the same.

    python scripts/train_upstream.py model=yolov8n.yaml data=coco8.yaml distill_model=yolov8s.pt epochs=3
"""

from __future__ import annotations

import sys


def main() -> None:
    """Train with the keys of the command line."""
    if not sys.argv[1:] or sys.argv[1] in {"-h", "--help"}:
        print(__doc__)
        return
    from yolo_kd.compare.upstream import main as train

    train()


if __name__ == "__main__":
    main()
