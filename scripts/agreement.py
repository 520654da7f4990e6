#!/usr/bin/env python3
"""Measure how well students reproduce a teacher: mAP50-95 against the teacher's confident detections.

The teacher's detections serve as labels, so the images need none. Only the teacher's classes count; a student's classes
are matched by name. To see what a student with keep_classes=teacher has kept, name the original student first: the
table shows every student's agreement as a share of the first one's.

python scripts/agreement.py --teacher yolov8s.pt --images photos yolov8n.pt runs/detect/train/weights/best.pt
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ultralytics import YOLO
from ultralytics.utils.metrics import ap_per_class, box_iou

from yolo_kd.classes.match import match
from yolo_kd.classes.names import short
from yolo_kd.errors import DataError, PairError, YoloKDError
from yolo_kd.safe_loading.restricted import restricted_loading
from yolo_kd.unlabeled.images import images_below

IOUS = torch.linspace(0.5, 0.95, 10)
LOWEST = 0.001  # least confidence of a student's detection, as in Ultralytics' validation


def images_of(folder: Path) -> list[Path]:
    """Return the sorted images in a folder and its subfolders.

    Raises:
        DataError: If there are none.
    """
    found = [Path(image) for image in images_below(folder)] if folder.is_dir() else []
    if not found:
        raise DataError(f"--images={folder} holds no images.")
    return found


def detections(model: YOLO, file: Path, imgsz: int, conf: float) -> np.ndarray:
    """Return the (N, 6) detections of an image: x1, y1, x2, y2 in pixels of the file, confidence, class."""
    (result,) = model.predict(file, imgsz=imgsz, conf=conf, iou=0.7, max_det=300, verbose=False)
    return result.boxes.data.float().cpu().numpy()[:, :6]


def hits(predicted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which of the (P, 6) predictions match a label, (P, 10) for the ten overlaps.

    At each overlap, a prediction takes the label of its class with the largest overlap, and a label taken by several
    predictions goes to the most confident one, as in Ultralytics' validation.
    """
    correct = np.zeros((len(predicted), len(IOUS)), dtype=bool)
    if not len(predicted) or not len(labels):
        return correct
    iou = box_iou(torch.from_numpy(labels[:, :4]), torch.from_numpy(predicted[:, :4])).numpy()
    iou = iou * (labels[:, 5][:, None] == predicted[:, 5][None])
    for k, least in enumerate(IOUS.tolist()):
        pairs = np.argwhere(iou >= least)
        pairs = pairs[iou[pairs[:, 0], pairs[:, 1]].argsort()[::-1]]
        pairs = pairs[np.unique(pairs[:, 1], return_index=True)[1]]
        pairs = pairs[np.unique(pairs[:, 0], return_index=True)[1]]
        correct[pairs[:, 1], k] = True
    return correct


def agreement(student: YOLO, names: dict[int, str], labels: dict[Path, np.ndarray], imgsz: int) -> dict[str, Any]:
    """Return how well a student reproduces the teacher's detections.

    Args:
        student: The student.
        names: The teacher's class names.
        labels: The teacher's detections, by image.
        imgsz: Image size in pixels.

    Returns:
        `map` and `map50` over the classes that the teacher detected, and `lacking`, the classes that the student lacks.

    Raises:
        PairError: If the student has none of the teacher's classes.
    """
    classes = match(student.names, names)  # student classes onto teacher classes
    if not classes.matched:
        raise PairError(
            f"{student.ckpt_path} has none of the teacher's classes ({short(list(names.values()))}), it has "
            f"{short(list(student.names.values()))}."
        )
    theirs = {s: i for i, sources in enumerate(classes.sources) for s in sources}
    correct, confidence, predicted, wanted = [], [], [], []
    for file, label in labels.items():
        found = detections(student, file, imgsz, LOWEST)
        found = found[[int(c) in theirs for c in found[:, 5]]]
        found[:, 5] = [theirs[int(c)] for c in found[:, 5]]
        correct.append(hits(found, label))
        confidence.append(found[:, 4])
        predicted.append(found[:, 5])
        wanted.append(label[:, 5])
    ap = ap_per_class(*(np.concatenate(part) for part in (correct, confidence, predicted, wanted)))[5]
    lacking = [names[i] for i in range(len(names)) if i not in classes.matched]
    return {"map": float(ap.mean()), "map50": float(ap[:, 0].mean()), "lacking": lacking}


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each student, and write the numbers as JSON with --json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("students", nargs="+", type=Path, help="checkpoints; the others are compared with the first")
    parser.add_argument("--teacher", required=True, type=Path, help="checkpoint whose detections serve as labels")
    parser.add_argument("--images", required=True, type=Path, help="folder of images, with its subfolders")
    parser.add_argument("--imgsz", type=int, default=640, help="image size in pixels (640)")
    parser.add_argument("--conf", type=float, default=0.5, help="least confidence of the teacher's detections (0.5)")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    args = parser.parse_args(argv)
    try:
        with restricted_loading():
            files = images_of(args.images)
            teacher = YOLO(args.teacher, task="detect")
            labels = {file: detections(teacher, file, args.imgsz, args.conf) for file in files}
            count = sum(map(len, labels.values()))
            if not count:
                raise DataError(f"the teacher detects nothing with confidence {args.conf} on the {len(files)} images.")
            rows = {
                str(path): agreement(YOLO(path, task="detect"), teacher.names, labels, args.imgsz)
                for path in args.students
            }
    except YoloKDError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    kinds = len({int(c) for label in labels.values() for c in label[:, 5]})
    print(f"{count} detections of {kinds} classes by {args.teacher} on {len(files)} images, confidence {args.conf}\n")
    print("| student | mAP50-95 | mAP50 | of the first | classes it lacks |\n|---|---|---|---|---|")
    first = next(iter(rows.values()))["map"]
    for path, row in rows.items():
        row["of_first"] = row["map"] / first if first else None
        share = "-" if row["of_first"] is None else f"{row['of_first']:.1%}"
        print(f"| {path} | {row['map']:.4f} | {row['map50']:.4f} | {share} | {len(row['lacking'])} |")
    if args.json:
        figures = {"images": len(files), "detections": count, "classes": kinds, "conf": args.conf, "students": rows}
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
