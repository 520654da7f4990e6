"""Which of a teacher's detections are objects: how certain must it be before its word can stand for a label?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou

from yolo_kd.check.models import evenly_spread
from yolo_kd.check.report import Report
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.distillation.sub_batches import as_student
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.unlabeled.pseudo_labels import detect, labels_found

IMAGES = 64
"""Validation images that are looked at, at most, evenly spread."""
OVERLAP = 0.5
"""A detection that covers a label of its class by at least this is an object."""
LOWEST, STEPS = 0.1, 9
"""Confidences are looked at from here to 1, in this many equal steps."""
ENOUGH = 20
"""Steps with fewer detections say nothing."""
LIKELY, SELDOM = 0.5, 0.2
"""A label should be an object more often than the one; what is one less often than the other is background."""


def check_certainty(
    report: Report,
    pool: UnlabeledOptions,
    teacher: Teacher,
    dataset: Any,
    classes: ClassMap,
    device: torch.device,
    only: Sequence[int] | None = None,
) -> None:
    """Compare the teacher's detections with the labels of validation images, by confidence.

    Args:
        report: Receives a table, the numbers, and a warning if `unlabeled_conf` lets in what is rarely an object.
        pool: The thresholds of the training.
        teacher: The teacher, of which scores and boxes are read.
        dataset: Ultralytics' validation set, without augmentation.
        classes: Which class is which.
        device: Where the teacher runs.
        only: Classes of the student that are trained, all by default; labels of others are not in the set.
    """
    chosen = evenly_spread(min(len(dataset), IMAGES), len(dataset))
    confidence, hit = [], []
    for index in chosen:
        sample = dataset[index]
        view = teacher(sample["img"][None].to(device).float() / 255)
        found = as_student(detect(classes.teacher_view(view), LOWEST, pool.iou), classes, only)
        sides = torch.tensor(sample["img"].shape[-1:-3:-1], device=device).repeat(2)
        boxes = box_convert(sample["bboxes"].to(device), "cxcywh", "xyxy") * sides
        labels = sample["cls"].to(device).flatten().long()
        confidence.append(found.confidence.cpu().numpy())
        overlaps = torch.where(found.labels[:, None] == labels, box_iou(found.boxes, boxes), 0)
        hit.append(labels_found(overlaps.cpu().numpy(), OVERLAP) >= 0)
    judge(report, pool, np.concatenate(confidence), np.concatenate(hit), len(chosen))


def judge(report: Report, pool: UnlabeledOptions, confidence: np.ndarray, hit: np.ndarray, images: int) -> None:
    """Report what share of detections are objects, and thresholds that fit that better if there are.

    Args:
        report: Receives them.
        pool: The thresholds of the training.
        confidence: Of every detection, (M,).
        hit: Whether it is an object, (M,).
        images: On how many images.
    """
    edges = np.linspace(LOWEST, 1, STEPS + 1).round(3)
    place = np.digitize(confidence, edges[1:-1])
    counts = np.bincount(place, minlength=STEPS)
    hits = np.bincount(place, weights=hit, minlength=STEPS)
    rows = [("confidence", "detections", "objects")]
    rows += [
        (f"{a:g} to {b:g}", str(n), f"{h / n:.0%}")
        for a, b, n, h in zip(edges[:-1], edges[1:], counts, hits, strict=True)
        if n
    ]
    report.tables[f"the teacher's detections on {images} val images, by the labels there"] = rows
    report.facts["certainty"] = {
        "images": images,
        "from": edges[:-1].tolist(),
        "detections": counts.tolist(),
        "objects": hits.astype(int).tolist(),
    }
    taken = confidence > pool.conf
    sure = _first_above(edges, counts, hits, LIKELY)
    doubtful = taken & (confidence <= (1.0 if sure is None else sure))
    if doubtful.sum() < ENOUGH or hit[doubtful].mean() >= LIKELY:
        return
    below = "" if sure is None else f" lie below {sure:g} and"
    text = (
        f"{int(doubtful.sum())} of the teacher's {int(taken.sum())} detections above unlabeled_conf={pool.conf:g} on "
        f"{images} val images{below} are labelled objects in {hit[doubtful].mean():.0%} of cases only."
    )
    if sure is None:
        advice = "No confidence makes its detections likely to be objects: use unlabeled_mode=distill."
    else:
        possible = _first_above(edges, counts, hits, SELDOM)
        low = min(edges[0] if possible is None else possible, sure - 0.1)
        advice = f"Write unlabeled_conf={sure:g}"
        advice += f" unlabeled_low={low:.1g}." if pool.labels else "."
    report.add("warning", "pool", text, advice)


def _first_above(edges: np.ndarray, counts: np.ndarray, hits: np.ndarray, share: float) -> float | None:
    """Return the least edge from which on detections of every step are objects that often, None if there is none."""
    first = None
    for i in reversed(range(STEPS)):
        if counts[i] >= ENOUGH:
            if hits[i] < share * counts[i]:
                break
            first = float(edges[i])
    return first
