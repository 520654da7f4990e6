"""Comparisons that look finished without a training: everything that a report needs, written in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from yolo_kd.compare.arms import Comparison, parse_compare
from yolo_kd.compare.evaluate import Settings, predictions_file, save_predictions
from yolo_kd.compare.records import METRICS, Attempt, AuditRow, Evaluation, SplitResult, Summary
from yolo_kd.compare.runs import FAILED, FINISHED, Run, plan_runs, versions
from yolo_kd.compare.size_metrics import ImageResult, ap_by_size
from yolo_kd.compare.summary import Measurements, summarise

NAMES = {0: "circle", 1: "square", 2: "triangle"}


def fake_comparison(folder: Path, arms: str = "baseline,objectness,fgd", seeds: int = 3, **keys: Any) -> Comparison:
    """Return a comparison whose models and data need not exist."""
    given = {"teacher": "teacher.pt", "student": "student.pt", "data": "data.yaml", "epochs": 4, "imgsz": 64}
    given |= {"project": folder, "name": "fake", "arms": arms, "seeds": seeds, **keys}
    return parse_compare([f"{key}={value}" for key, value in given.items()])


def finish(run: Run, values: Sequence[float], terms: Sequence[str] = (), pace: float = 2.0) -> None:
    """Mark a run as finished and write its results.csv."""
    run.folder.mkdir(parents=True, exist_ok=True)
    head = ["epoch", "time", "train/box_loss", *(f"train/{t}" for t in terms), "metrics/mAP50-95(B)"]
    lines = [",".join(head)]
    for epoch, value in enumerate(values, 1):
        row = [epoch, epoch * pace, 1.0, *(0.5 / epoch * (i + 1) for i, _ in enumerate(terms)), value]
        lines.append(",".join(f"{v:.6g}" for v in row))
    (run.folder / "results.csv").write_text("\n".join(lines) + "\n")
    run.status = FINISHED
    run.attempts = [attempt()]


def attempt() -> Attempt:
    return Attempt(command="...", resumed=False, started="now", jobs=1, versions=versions())


def fail(run: Run, reason: str = "It ended with exit code 1.\nRuntimeError: <out> of memory & more") -> None:
    """Mark a run as failed."""
    run.status, run.error = FAILED, reason
    run.attempts = [attempt()]


def pictures(folder: Path, count: int = 6, side: int = 96) -> list[Path]:
    """Write images with a bright square each."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for n in range(count):
        canvas = np.full((side, side, 3), 40 + 20 * n, np.uint8)
        canvas[20:60, 20:60] = 220
        files.append(folder / f"{n:03}.png")
        cv2.imwrite(str(files[-1]), canvas)
    return files


def predictions(files: Sequence[Path], quality: float, seed: int) -> list[ImageResult]:
    """Return predictions on these images, which find the square with this probability and miss it otherwise."""
    rng = np.random.default_rng(seed)
    images = []
    for n, file in enumerate(files):
        box = np.array([[20.0, 20, 60, 60]]) + (0 if rng.random() < quality else 25)
        truth = np.array([[20.0, 20, 60, 60]])
        images.append(
            ImageResult(str(file), (96, 96), box, np.array([0.9]), np.array([n % 3]), truth, np.array([n % 3]))
        )
    return images


def evaluation(cache: Path, key: str, base: float, images: Sequence[ImageResult], splits: Sequence[str]) -> Evaluation:
    """Return what `evaluate` returns for a checkpoint with an mAP50-95 of `base`."""
    results = {}
    for split in splits:
        shift = 0.0 if split == "val" else -0.01
        results[split] = SplitResult(
            images=len(images),
            metrics=dict(zip(METRICS, (base + shift, base + 0.2, base + 0.25, base + 0.15), strict=True)),
            classes={name: base + shift + 0.01 * i for i, name in NAMES.items()},
            sizes=ap_by_size(images, list(NAMES)),
        )
        save_predictions(predictions_file(cache, key, split), list(images))
    return Evaluation(key=key, sha256=key * 4, parameters=3_000_000, gflops=8.1, splits=results)


def measurements(folder: Path, **found: Any) -> Measurements:
    """Return measurements of which nothing is given but what the test is about."""
    nothing: dict[str, Any] = {"evaluations": {}, "teachers": {}, "latencies": {}, "audits": {}}
    settings = Settings("d.yaml", ("val",), {})
    return Measurements(**{"settings": settings, **nothing, "names": NAMES, "cache": folder, **found})


def fake_summary(
    folder: Path,
    gains: dict[str, Sequence[float]],
    *,
    splits: Sequence[str] = ("val", "test"),
    broken: Sequence[str] = (),
    **keys: Any,
) -> tuple[Summary, Measurements, Comparison]:
    """Return a comparison in which each arm gains that much over the baseline, seed by seed.

    Args:
        folder: Where to write.
        gains: Differences by arm, one per seed.
        splits: Splits of the data.
        broken: Names of runs that failed, such as `fgd seed 1`.
        keys: More keys of the comparison.
    """
    seeds = max(len(g) for g in gains.values())
    comparison = fake_comparison(folder, ",".join(["baseline", *gains]), seeds, **keys)
    runs = plan_runs(comparison)
    files = pictures(folder / "pictures")
    cache = comparison.folder / "evaluations"
    evaluations = {}
    for run in runs:
        if run.name in broken:
            fail(run)
            continue
        noise = 0.01 * np.sin(5 * run.seed)
        gain = gains[run.arm.name][run.seed] if run.arm.name in gains else 0.0
        value = 0.5 + noise + gain
        terms = ("kcls_loss", "kbox_loss") if run.arm.name != "baseline" else ()
        finish(run, [value * part for part in (0.3, 0.7, 0.9, 1.0)], terms, pace=2.0 if terms else 1.5)
        images = predictions(files, 0.5 + 4 * gain, run.seed)
        evaluations[run.name] = evaluation(cache, f"{run.arm.name}{run.seed}", value, images, splits)
    teachers = {"teacher.pt": evaluation(cache, "teacher", 0.56, predictions(files, 1.0, 9), splits)}
    latencies = {arm.name: 3.0 for arm in comparison.arms} | {"teacher.pt": 9.0}
    row = AuditRow(term="objectness", value=3.1, gradient=0.05, share=0.52)
    measured = measurements(
        cache,
        settings=Settings("data.yaml", tuple(splits), {"imgsz": 64}),
        evaluations=evaluations,
        teachers=teachers,
        latencies=latencies,
        audits=dict.fromkeys(gains, (row,)),
    )
    return summarise(comparison, runs, measured), measured, comparison
