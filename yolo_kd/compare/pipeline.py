"""The sequence of a comparison: check, train, evaluate, summarise, report."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset

from yolo_kd.compare.arms import DISTILLED, Arm, Comparison, parse_compare
from yolo_kd.compare.evaluate import OtherClassesError, audit_of, evaluate, settings_of
from yolo_kd.compare.latency import export_onnx, onnx_latency
from yolo_kd.compare.launcher import train_all
from yolo_kd.compare.progress import Progress
from yolo_kd.compare.records import AuditRow, Evaluation
from yolo_kd.compare.report import write_report
from yolo_kd.compare.runs import FAILED, FINISHED, Run, attempting, keys_of, locked, plan_runs
from yolo_kd.compare.summary import Measurements, summarise, teacher_of
from yolo_kd.engine.checks_before import read_dataset
from yolo_kd.engine.setup import prepare
from yolo_kd.environment import check_cpu_bf16, check_torchvision
from yolo_kd.errors import ConfigError, YoloKDError
from yolo_kd.safe_loading.restricted import quiet, restricted_loading


def compare(arguments: Sequence[str]) -> int:
    """Train every arm with every seed, evaluate, and write the report; continue where an earlier call was stopped.

    Args:
        arguments: `key=value` words: the keys of `arms.COMPARE_KEYS` and those of train.

    Returns:
        0 if every run finished, 1 if one failed.

    Raises:
        YoloKDError: For every mistake that can be found before the first training.
    """
    comparison = parse_compare(arguments)
    # before anything is written; to continue earlier runs, only the models of unfinished ones must exist
    data = None if comparison.folder.exists() else check_all(comparison, {arm.name for arm in comparison.arms})
    with locked(comparison.folder):
        runs = plan_runs(comparison)
        data = data or check_all(comparison, {run.arm.name for run in runs if run.status != FINISHED})
        done = sum(run.status == FINISHED for run in runs)
        say(
            f"{len(comparison.arms)} arms x {len(comparison.seeds)} seeds, {len(runs)} trainings, {done} finished "
            f"before, {comparison.jobs} at a time. Folder: {comparison.folder}"
        )
        if comparison.jobs > 1 and done < len(runs):
            cache_labels(data)
        train_all(runs, comparison.jobs, Progress(sys.stdout, comparison.jobs))
        measured = measure(comparison, runs, data)
        summary = summarise(comparison, runs, measured)
        files = write_report(comparison.folder, summary, measured)
    for sentence in summary.verdicts:
        say(sentence)
    for problem in summary.problems:
        say(f"FAILED {problem.splitlines()[0]}")
    say(f"Report: {files['html']}")
    failed = [run.name for run in runs if run.status == FAILED]
    if failed:
        say(f"{len(failed)} of {len(runs)} trainings failed. The same command tries them again.")
    return 1 if failed else 0


def cache_labels(data: dict[str, Any]) -> None:
    """Let Ultralytics write its label caches first, since trainings that start together would overwrite them."""
    with quiet():
        for split in ("train", "val", "test"):
            if data.get(split):
                build_yolo_dataset(get_cfg(overrides={"task": "detect"}), data[split], 1, data, mode="val")


def say(line: str) -> None:
    """Print a line without delay, also to a file."""
    print(line, flush=True)


def check_all(comparison: Comparison, open_arms: Collection[str]) -> dict[str, Any]:
    """Check everything that a training checks at its start, for all arms together.

    Args:
        comparison: The comparison.
        open_arms: Arms with unfinished trainings; the models of the other arms need not exist any more.

    Returns:
        The data YAML as Ultralytics reads it.

    Raises:
        YoloKDError: With one line per mistake.
    """
    check_torchvision()
    problems: list[str] = []
    for arm in (arm for arm in comparison.arms if arm.name in open_arms):
        try:
            _check(arm)
        except YoloKDError as error:
            problems += [line for line in str(error).splitlines() if line not in problems]
    if problems:
        raise ConfigError(problems)
    keys = comparison.arms[0].options.ultralytics
    pooled = all(arm.options.pooled for arm in comparison.arms)
    return read_dataset(keys["data"], keys.get("split") or "val", train_optional=pooled)


def _check(arm: Arm) -> None:
    options = arm.options
    keys = options.ultralytics
    if str(keys.get("amp", "")).lower() == "bf16" and (
        str(keys.get("device")) == "cpu" or not torch.cuda.is_available()
    ):
        check_cpu_bf16()
    with restricted_loading(options.trust_checkpoints):
        prepare(options)


def measure(comparison: Comparison, runs: Sequence[Run], data: Mapping[str, Any]) -> Measurements:
    """Evaluate all finished runs and their teachers.

    A checkpoint that cannot be evaluated is reported and left out, like a training that failed.
    """
    folder, cache = comparison.folder, comparison.folder / "evaluations"
    problems: list[str] = []
    notes: list[str] = []
    trust = any(arm.options.trust_checkpoints for arm in comparison.arms)
    settings = settings_of(keys_of(comparison.arms[0]), data, trust)
    say("Evaluating on " + " and ".join(settings.splits))
    teachers: dict[str, Evaluation] = {}
    for path in dict.fromkeys(t for arm in comparison.arms if (t := teacher_of(arm)) and t.endswith(".pt")):
        with attempting(problems, path):
            try:
                teachers[path] = evaluate(Path(path), settings, cache)
            except OtherClassesError as error:  # with class_map=, which is no failure
                notes.append(f"The teacher {Path(path).name} has no row of its own: {error}")
    evaluations: dict[str, Evaluation] = {}
    firsts: dict[str, Path] = {}  # one checkpoint of each arm
    for run in (run for run in runs if run.status == FINISHED):
        firsts.setdefault(run.arm.name, run.best)
        with attempting(problems, run.name):
            evaluations[run.name] = evaluate(run.best, settings, cache)
    say("Measuring the exported students")
    exports = {name: (checkpoint, folder / "onnx" / f"{name}.onnx") for name, checkpoint in firsts.items()}
    exports |= {path: (Path(path), folder / "onnx" / "teachers" / f"{n}.onnx") for n, path in enumerate(teachers)}
    files: dict[str, Path] = {}
    for name, (checkpoint, target) in exports.items():
        with attempting(problems, f"export of {name}"):
            files[name] = export_onnx(checkpoint, target, settings.imgsz, trust)
    latencies: dict[str, float] = {}
    with attempting(problems, "latency"):
        latencies = onnx_latency(files)
    audits: dict[str, tuple[AuditRow, ...]] = {}
    for name in (arm.name for arm in comparison.arms if arm.name in firsts and arm.kind == DISTILLED):
        with attempting(problems, f"audit of {name}"):
            audits[name] = audit_of(firsts[name], trust)
    return Measurements(
        settings, evaluations, teachers, latencies, audits, data["names"], cache, tuple(problems), tuple(notes)
    )
