"""The way of a comparison: check, train, evaluate, sum up, report."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ultralytics.cfg import get_cfg
from ultralytics.data import build_yolo_dataset

from yolo_kd.compare.arms import DISTILLED, Arm, Comparison, parse_compare
from yolo_kd.compare.evaluate import (
    OtherClassesError,
    Settings,
    audit_of,
    evaluate,
    export_onnx,
    onnx_latency,
    settings_of,
)
from yolo_kd.compare.launcher import train_all
from yolo_kd.compare.progress import Progress
from yolo_kd.compare.report import write_report
from yolo_kd.compare.runs import FAILED, FINISHED, Run, keys_of, locked, plan_runs
from yolo_kd.compare.summary import summarise, teacher_of
from yolo_kd.engine.checks_before import check_models, check_unlabeled_images, read_dataset
from yolo_kd.engine.plan import make_plan
from yolo_kd.environment import check_cpu_bf16, check_torchvision
from yolo_kd.errors import ConfigError, YoloKDError
from yolo_kd.safe_loading.restricted import quiet, restricted_loading


def compare(arguments: Sequence[str]) -> int:
    """Train every arm with every seed, evaluate, and write the report; go on where an earlier call was stopped.

    Args:
        arguments: `key=value` words, see `arms.OWN_KEYS` and the keys of train.

    Returns:
        0 if every run finished, 1 if one failed.

    Raises:
        YoloKDError: For everything that can be known before the first training.
    """
    comparison = parse_compare(arguments)
    # before anything is made; in a folder of earlier runs only what is still to be trained has to be there
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
        summary, parts = measure(comparison, runs, data)
        files = write_report(comparison.folder, summary, parts)
    for sentence in summary["verdicts"]:
        say(sentence)
    for problem in summary["problems"]:
        say(f"FAILED {problem.splitlines()[0]}")
    say(f"Report: {files['html']}")
    failed = [run.name for run in runs if run.status == FAILED]
    if failed:
        say(f"{len(failed)} of {len(runs)} trainings failed. The same command tries them again.")
    return 1 if failed else 0


def cache_labels(data: dict[str, Any]) -> None:
    """Let Ultralytics write its label caches, which trainings that start together would write over each other."""
    with quiet():
        for split in ("train", "val", "test"):
            if data.get(split):
                build_yolo_dataset(get_cfg(overrides={"task": "detect"}), data[split], 1, data, mode="val")


def say(line: str) -> None:
    """Print a line at once, also where the output is a file."""
    print(line, flush=True)


def check_all(comparison: Comparison, open_arms: Collection[str]) -> dict[str, Any]:
    """Check everything that a training would check at its start, for all arms together.

    Args:
        comparison: What is compared.
        open_arms: Arms that are still to be trained; the models of others need not be there any more.

    Returns:
        The data set as Ultralytics reads it.

    Raises:
        YoloKDError: With one line per mistake.
    """
    check_torchvision()
    problems: list[str] = []
    for arm in comparison.arms:
        if arm.name not in open_arms:
            continue
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
    keys = {**options.ultralytics, "model": options.student}
    if str(keys.get("amp", "")).lower() == "bf16" and (
        str(keys.get("device")) == "cpu" or not torch.cuda.is_available()
    ):
        check_cpu_bf16()
    plan, detector = make_plan(options.own_keys, options.kd_overrides)
    with restricted_loading(options.trust_checkpoints):
        check_models(plan, detector, keys, options.trust_checkpoints)
        if plan is not None and plan.unlabeled is not None:
            check_unlabeled_images(plan, keys)


def measure(comparison: Comparison, runs: Sequence[Run], data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Evaluate whatever has finished, and sum it up.

    A checkpoint that cannot be evaluated is reported and left out, like a training that failed.

    Returns:
        The summary, and what the pictures of the report are drawn from.
    """
    folder = comparison.folder
    problems: list[str] = []
    notes: list[str] = []
    trust = any(arm.options.trust_checkpoints for arm in comparison.arms)
    settings = settings_of(keys_of(comparison.arms[0]), data, trust)
    evaluations: dict[str, dict[str, Any]] = {}
    say("Evaluating on " + " and ".join(settings.splits))
    teachers = {}
    for path in dict.fromkeys(t for arm in comparison.arms if (t := teacher_of(arm)) and t.endswith(".pt")):
        if result := _tried(partial(_of_teacher, path, settings, folder / "evaluations", notes), path, problems):
            teachers[path] = result
    finished = [run for run in runs if run.status == FINISHED]
    for run in finished:
        result = _tried(partial(evaluate, run.best, settings, folder / "evaluations"), run.name, problems)
        if result:
            evaluations[run.name] = result
    firsts = {arm.name: next((r for r in finished if r.arm.name == arm.name), None) for arm in comparison.arms}
    say("Measuring the exported students")
    latencies = latencies_of({n: r.best for n, r in firsts.items() if r}, teachers, folder, settings, problems)
    audits = {}
    for name, first in firsts.items():
        if first and first.arm.kind == DISTILLED:
            audits[name] = _tried(partial(audit_of, first.best, trust), f"audit of {name}", problems) or []
    summary = summarise(comparison, runs, evaluations, teachers, latencies, audits, settings, problems, notes)
    parts = {
        "settings": settings,
        "evaluations": evaluations,
        "teachers": teachers,
        "checkpoints": {run.name: run.best for run in finished},
        "cache": folder / "evaluations",
        "names": data["names"],
    }
    return summary, parts


def _of_teacher(path: str, settings: Settings, cache: Path, notes: list[str]) -> dict[str, Any] | None:
    """Evaluate a teacher; one of other classes (class_map=) teaches, but has no metrics here, which is no failure."""
    try:
        return evaluate(Path(path), settings, cache)
    except OtherClassesError as error:
        notes.append(f"The teacher {Path(path).name} has no row of its own: {error}")
        return None


def latencies_of(
    checkpoints: dict[str, Path], teachers: dict[str, Any], folder: Path, settings: Settings, problems: list[str]
) -> dict[str, float]:
    """Export one checkpoint per arm and every teacher, and time the files; what cannot be exported is reported."""
    files: dict[str, Path] = {}
    wanted = {name: (checkpoint, f"{name}.onnx") for name, checkpoint in checkpoints.items()}
    wanted |= {path: (Path(path), f"teachers/{number}.onnx") for number, path in enumerate(teachers)}
    for name, (checkpoint, target) in wanted.items():
        work = partial(export_onnx, checkpoint, folder / "onnx" / target, settings.imgsz, settings.trust)
        file = _tried(work, f"export of {name}", problems)
        if file:
            files[name] = file
    return _tried(partial(onnx_latency, files), "latency", problems) or {}


def _tried(work: Any, what: str, problems: list[str]) -> Any:
    """Do something; an error becomes a line of the report instead of the end of a comparison of hours."""
    try:
        return work()
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")
        return None
