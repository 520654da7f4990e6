"""Checks the two models: their files, their heads level by level, and whether the teacher is the better one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from ultralytics.models.yolo.detect import DetectionValidator
from ultralytics.utils.torch_utils import select_device

from yolo_kd.check.report import Report, number, some
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.engine.plan import Plan
from yolo_kd.losses.base import find
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.upstream.heads import bins_of, channels_of, family_of, head_of, neck_layers, strides_of

IMAGES = 64
"""Largest number of validation images on which both models are evaluated."""
SECONDS = 15.0
"""Time for one model; a slow teacher is evaluated on fewer images."""
BLIND = 0.01
"""A model with less mAP50-95 detects nothing."""
LEVEL, WORSE = 0.01, 0.05
"""A teacher must be ahead of its student by the first; one that is behind by more than the second does harm."""


def describe_files(report: Report, detectors: Mapping[str, LoadedDetector]) -> None:
    """Report the files that were loaded and their models."""
    rows: list[tuple[str, ...]] = [("model", "file", "sha256", "family", "parameters", "classes", "trained on")]
    for role, detector in detectors.items():
        model, digest = detector.model, detector.sha256[:12]
        count, family = sum(p.numel() for p in model.parameters()), family_of(model)
        trained = "random weights" if detector.random else _trained_on(detector)
        rows.append((role, str(detector.path), digest, family, f"{count / 1e6:.2f} M", str(head_of(model).nc), trained))
        report.facts.setdefault("files", {})[role] = {
            "path": str(detector.path.resolve()),
            "sha256": detector.sha256,
            "family": family,
            "parameters": count,
            "classes": [str(model.names[i]) for i in sorted(model.names)],
            "random": detector.random,
            "trained_on": None if detector.random else trained,
        }
    report.tables["files"] = rows


def _trained_on(detector: LoadedDetector) -> str:
    arguments = detector.checkpoint.get("train_args") or {}
    data = arguments.get("data")
    return f"{Path(*Path(str(data)).parts[-2:])}, {arguments.get('imgsz', '?')} px" if data else "not recorded"


def describe_levels(report: Report, plan: Plan, detectors: Mapping[str, LoadedDetector]) -> None:
    """Report the levels of both heads, with the recipe's adapters between them."""
    sides = {role: _levels(detector.model) for role, detector in detectors.items()}
    kinds: dict[str, list[str]] = {}
    for term in plan.recipe.terms:
        if not term.student_layers and not term.teacher_layers and "features" in find(term.name).reads:
            kinds.setdefault(find(term.name).adapter or "none", []).append(term.name)
    adapter = ", ".join(f"{kind} ({', '.join(names)})" for kind, names in kinds.items()) or "not needed"
    rows = [("level", "stride", "student layer", "channels", "teacher layer", "channels", "adapter")]
    levels = []
    for stride in sorted({stride for side in sides.values() for stride in side}):
        s, t = (sides.get(role, {}).get(stride, ("-", "-")) for role in ("student", "teacher"))
        name = f"p{stride.bit_length() - 1}"
        rows.append((name, str(stride), *s, *t, adapter if "-" not in (*s, *t) else "-"))
        levels.append({"level": name, "stride": stride, "student": s, "teacher": t, "adapters": kinds})
    for term in plan.recipe.terms:
        if term.student_layers or term.teacher_layers:
            s_layers, t_layers = (" ".join(names) or "neck" for names in (term.student_layers, term.teacher_layers))
            rows.append(("-", "-", s_layers, "-", t_layers, "-", f"{find(term.name).adapter or 'none'} ({term.name})"))
    report.tables["levels"] = rows
    report.facts["levels"] = levels
    report.facts["bins"] = {role: bins_of(detector.model) for role, detector in detectors.items()}


def _levels(model: Any) -> dict[int, tuple[str, str]]:
    layers = (f"model.{i}" for i in neck_layers(model))
    channels = (str(c) for c in channels_of(model))
    return {stride: pair for stride, *pair in zip(strides_of(model), layers, channels, strict=True)}  # type: ignore[misc]


def check_quality(
    report: Report,
    detectors: Mapping[str, LoadedDetector],
    dataset: Any,
    data: Mapping[str, Any],
    keys: Mapping[str, Any],
    folder: Path,
    classes: ClassMap | None = None,
) -> None:
    """Evaluate teacher and student on the same few validation images.

    A student whose head has other classes is left out, since training gives it a new head.
    """
    single = bool(keys.get("single_cls"))
    names = ["object"] if single else [str(n).strip().lower() for n in data["names"].values()]
    chosen: list[int] = []
    results: dict[str, dict[str, Any]] = {}
    for role, detector in detectors.items():  # the teacher first: it decides how many images there is time for
        heads = [str(detector.model.names[i]).strip().lower() for i in sorted(detector.model.names)]
        same = single or (role == "teacher" and (classes is None or classes.is_identity))
        if detector.random:
            level = "warning" if role == "teacher" else "note"
            advice = "It teaches noise; use it only for experiments." if role == "teacher" else ""
            report.add(level, "quality", f"the {role} has random weights and was not evaluated.", advice)
        elif heads != names and not (same and len(heads) == len(names)):
            text = f"the {role} was not evaluated: its head has {len(heads)} other classes ({some(heads)})"
            report.add("note", "quality", f"{text}{', which training replaces' if role == 'student' else ''}.")
        else:
            chosen = chosen or _choose(detector, dataset, keys)
            results[role] = evaluate(detector, Subset(dataset, chosen), dataset, data, keys, folder)
    if not results:
        return
    rows = [("model", "mAP50-95", "mAP50")]
    rows += [(role, number(r["map"]), number(r["map50"])) for role, r in results.items()]
    report.tables[f"accuracy on {len(chosen)} of {len(dataset)} val images"] = rows
    report.facts["accuracy"] = {"images": len(chosen), "of": len(dataset), **results}
    if "teacher" in results:
        judge(report, results, len(chosen))


def judge(report: Report, results: Mapping[str, Mapping[str, Any]], images: int) -> None:
    """Report whether the teacher is good enough to learn from.

    Args:
        report: Receives the finding.
        results: By role, mAP50-95 as `map`, and as `classes` mAP50 and number of boxes by class.
        images: Number of images evaluated.
    """
    teacher = results["teacher"]["map"]
    where = f"on {images} val images"
    if teacher < BLIND:
        text = f"the teacher detects nothing {where} (mAP50-95 {teacher:.3f})."
        advice = "It was trained on other classes, images or imgsz, or not long enough: train it on this data "
        report.add("error", "quality", text, f"{advice}(yolo-kd train kd=none student=<teacher model> data=...).")
        return
    weak = [name for name, (ap, count) in results["teacher"]["classes"].items() if ap < BLIND * 5 and count >= 10]
    if weak:
        text = f"the teacher hardly detects {some([repr(n) for n in weak])}: mAP50 below {BLIND * 5:g} {where}."
        report.add("warning", "quality", text, "Train it on these classes, or for longer, or check their labels.")
    if "student" not in results:
        report.add("note", "quality", f"the teacher reaches mAP50-95 {teacher:.3f} {where}.")
        return
    student = results["student"]["map"]
    text = f"mAP50-95 {where}: teacher {teacher:.3f}, student {student:.3f}"
    if teacher < student - WORSE:
        report.add("error", "quality", f"the teacher is worse than the student. {text}.", "Choose a better teacher.")
    elif teacher < student + LEVEL:
        advice = "Choose a larger teacher, train it longer, or start from an untrained student."
        report.add("warning", "quality", f"the teacher is not better than the student. {text}.", advice)
    else:
        report.add("note", "quality", f"{text}: {teacher - student:.3f} to learn.")


def _choose(detector: LoadedDetector, dataset: Any, keys: Mapping[str, Any]) -> list[int]:
    """Return evenly spread images, as many as there is time for."""
    size = int(np.max(keys.get("imgsz") or 640))
    device = select_device(devices_of(keys)[0], verbose=False)
    model = deepcopy(detector.model).to(device).eval()
    images = torch.zeros(1, dataset.channels, size, size, device=device)
    with torch.no_grad():
        model(images)
        began = time.perf_counter()
        model(images)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - began
    count = min(len(dataset), IMAGES, max(8, int(SECONDS / seconds)))
    return evenly_spread(count, len(dataset))


def evenly_spread(count: int, among: int) -> list[int]:
    """Return `count` of the indices below `among`, including the first and the last."""
    return np.linspace(0, among - 1, count).round().astype(int).tolist()


def evaluate(
    detector: LoadedDetector,
    subset: Subset,
    dataset: Any,
    data: Mapping[str, Any],
    keys: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """Return the accuracy of a detector on some images of a data set, as Ultralytics' validation computes it."""
    used = ("imgsz", "single_cls", "max_det", "iou", "split", "classes", "agnostic_nms")
    args = {k: keys[k] for k in used if keys.get(k) is not None} | {"task": "detect", "mode": "val"}
    args |= {"data": str(keys["data"]), "device": devices_of(keys)[0], "plots": False, "verbose": False}
    loader = DataLoader(subset, batch_size=8, collate_fn=dataset.collate_fn)
    validator = DetectionValidator(loader, save_dir=folder / "val", args=args)
    validator(model=deepcopy(detector.model))
    box, counts = validator.metrics.box, validator.metrics.nt_per_class
    names = {0: "object"} if keys.get("single_cls") else data["names"]
    classes = {str(names[int(c)]): (float(box.ap50[i]), int(counts[int(c)])) for i, c in enumerate(box.ap_class_index)}
    return {"map": float(box.map), "map50": float(box.map50), "classes": classes}


def devices_of(keys: Mapping[str, Any]) -> list[Any]:
    """Return the devices requested for a training, `[None]` for Ultralytics' choice."""
    device = keys.get("device")
    if isinstance(device, str):
        device = [part.strip(" []()") for part in device.split(",")]
    return (list(device) if isinstance(device, list | tuple) else [device]) or [None]
