"""Measures how often a teacher's detections are objects, and derives the confidence at which they can be labels."""

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
"""Largest number of validation images, evenly spread over the set."""
OVERLAP = 0.5
"""A detection is an object if its IoU with a label of its class is at least this."""
LOWEST, STEPS = 0.1, 9
"""The confidence range starts here and has this many equal steps up to 1."""
ENOUGH = 20
"""Steps with fewer detections are ignored."""
LIKELY, SELDOM = 0.5, 0.2
"""Detections are labels if at least the first share are objects, and background if less than the second share are."""


def check_certainty(
    report: Report,
    options: UnlabeledOptions,
    teacher: Teacher,
    dataset: Any,
    classes: ClassMap,
    device: torch.device,
    only: Sequence[int] | None = None,
) -> None:
    """Compare the teacher's detections with the labels of validation images, by confidence.

    Args:
        report: Receives a table, the numbers, and a warning if `unlabeled_conf` lets in too few objects.
        options: The thresholds of the training.
        teacher: The teacher; its scores and boxes are read.
        dataset: Ultralytics' validation set, without augmentation.
        classes: The class map.
        device: Device of the teacher.
        only: The student classes that are trained, all by default; the set has no labels of others.
    """
    chosen = evenly_spread(min(len(dataset), IMAGES), len(dataset))
    confidence, hit = [], []
    for index in chosen:
        sample = dataset[index]
        outputs = classes.teacher_outputs(teacher(sample["img"][None].to(device).float() / 255))
        found = as_student(detect(outputs, LOWEST, options.iou), classes, only)
        sides = torch.tensor(sample["img"].shape[-1:-3:-1], device=device).repeat(2)
        boxes = box_convert(sample["bboxes"].to(device), "cxcywh", "xyxy") * sides
        labels = sample["cls"].to(device).flatten().long()
        confidence.append(found.confidence.cpu().numpy())
        overlaps = torch.where(found.labels[:, None] == labels, box_iou(found.boxes, boxes), 0)
        hit.append(labels_found(overlaps.cpu().numpy(), OVERLAP) >= 0)
    judge(report, options, np.concatenate(confidence), np.concatenate(hit), len(chosen))


def judge(report: Report, options: UnlabeledOptions, confidence: np.ndarray, hit: np.ndarray, images: int) -> None:
    """Report the share of objects among detections by confidence, and better thresholds if there are any.

    Args:
        report: Receives them.
        options: The thresholds of the training.
        confidence: Confidence of each detection, (M,).
        hit: True for each detection that is an object, (M,).
        images: Number of images.
    """
    edges = np.linspace(LOWEST, 1, STEPS + 1).round(3)
    step = np.digitize(confidence, edges[1:-1])
    counts, hits = (np.bincount(step, weights=weights, minlength=STEPS).astype(int) for weights in (None, hit))
    steps = zip(edges[:-1], edges[1:], counts, hits, strict=True)
    rows = [(f"{low:g} to {high:g}", str(n), f"{h / n:.0%}") for low, high, n, h in steps if n]
    title = f"the teacher's detections on {images} val images, compared with the labels"
    report.tables[title] = [("confidence", "detections", "objects"), *rows]
    report.facts["certainty"] = {
        "images": images,
        "from": edges[:-1].tolist(),
        "detections": counts.tolist(),
        "objects": hits.tolist(),
    }
    taken = confidence > options.conf
    sure = _first_above(edges, counts, hits, LIKELY)
    doubtful = taken & (confidence <= (1.0 if sure is None else sure))
    if doubtful.sum() < ENOUGH or hit[doubtful].mean() >= LIKELY:
        return
    below = "" if sure is None else f" lie below {sure:g} and"
    text = (
        f"{int(doubtful.sum())} of the teacher's {int(taken.sum())} detections above unlabeled_conf={options.conf:g} "
        f"on {images} val images{below} are labeled objects in only {hit[doubtful].mean():.0%} of cases."
    )
    if sure is None:
        advice = "Its detections are not reliable at any confidence: use unlabeled_mode=distill."
    else:
        possible = _first_above(edges, counts, hits, SELDOM)
        low = min(edges[0] if possible is None else possible, sure - 0.1)
        advice = f"Write unlabeled_conf={sure:g}{f' unlabeled_low={low:.1g}' if options.labels else ''}."
    report.add("warning", "unlabeled", text, advice)


def _first_above(edges: np.ndarray, counts: np.ndarray, hits: np.ndarray, share: float) -> float | None:
    """Return the lowest edge above which the share of objects is reached in every step, None if there is none."""
    first = None
    for i in reversed(range(STEPS)):
        if counts[i] >= ENOUGH:
            if hits[i] < share * counts[i]:
                break
            first = float(edges[i])
    return first
