#!/usr/bin/env python3
"""Write a student that starts as a thinned copy of a teacher, as a checkpoint that plain Ultralytics trains from.

`inherit=thinned` gives a distillation the same start; this file is for trainings without a teacher.

    python scripts/thin.py --teacher runs/bccd/teacher/weights/best.pt --student yolov8n.yaml --out thin.pt
    yolo-kd train kd=none student=thin.pt data=my.yaml
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from yolo_kd.distillation.student_init import thin
from yolo_kd.errors import YoloKDError
from yolo_kd.safe_loading.checkpoint import load_detector


def main() -> None:
    """Write the file and report what it took from the teacher."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="trained detector")
    parser.add_argument("--student", default="yolov8n.yaml", help="model YAML of the same family")
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    args = parser.parse_args()
    try:
        teacher = load_detector(args.teacher, role="teacher").model
        student = load_detector(args.student, role="student", nc=len(teacher.names)).model
    except YoloKDError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    result = thin(student, teacher)
    print(result.report())
    student.names = teacher.names
    args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"epoch": -1, "model": student.half(), "train_args": {}}, args.out)
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
