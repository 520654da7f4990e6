"""The runs of a comparison: which there are, what identifies each, and what earlier calls left of it."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from yolo_kd._version import __version__
from yolo_kd.compare.arms import DISTILLED, UPSTREAM, Arm, Comparison
from yolo_kd.config.recipe import load_recipe
from yolo_kd.config.unlabeled import SOURCE_KEY
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.checkpoint import sha256

FINISHED, FAILED, RUNNING, WAITING = "finished", "failed", "running", "waiting"
DEFAULTS = {"plots": False}  # what a comparison sets where the user does not
_PATHS = ("teacher", "student", "data", "kd", "model", "distill_model")


@dataclass
class Run:
    """One training: an arm with a seed.

    Attributes:
        arm: The arm.
        seed: The seed.
        folder: Where Ultralytics writes; the files beside it carry its name.
        keys: Keys of the training, as they stand in its experiment file.
        identity: What must be the same when a run goes on: its keys, and the content of the files they name.
        status: `waiting`, `running`, `finished` or `failed`.
        attempts: One record for each time that it was started.
        error: Last lines of the log of a failed run.
    """

    arm: Arm
    seed: int
    folder: Path
    keys: dict[str, Any]
    identity: dict[str, Any]
    status: str = WAITING
    attempts: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def name(self) -> str:
        """Name in messages and in the report."""
        return f"{self.arm.name} seed {self.seed}"

    @property
    def best(self) -> Path:
        """The checkpoint that is evaluated."""
        return self.folder / "weights" / "best.pt"

    @property
    def last(self) -> Path:
        """The checkpoint that a training goes on from."""
        return self.folder / "weights" / "last.pt"

    @property
    def experiment(self) -> Path:
        """File of the run's keys."""
        return self.folder.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """What the training printed."""
        return self.folder.with_suffix(".log")

    @property
    def epochs(self) -> int:
        """Epochs that were asked for."""
        return int(self.keys.get("epochs", 100))

    def save(self) -> None:
        """Write the state, in one piece."""
        state = {
            "arm": self.arm.name,
            "seed": self.seed,
            "status": self.status,
            "error": self.error,
            "attempts": self.attempts,
            "identity": self.identity,
        }
        write_text(self.folder.with_suffix(".json"), json.dumps(state, indent=1) + "\n")

    def rows(self) -> list[dict[str, float]]:
        """Return the lines of results.csv, one per epoch."""
        # a run that was stopped between this file and its checkpoint repeats an epoch: the second time counts
        return [*{row["epoch"]: row for row in self._lines()}.values()]

    def seconds(self) -> float | None:
        """Return the training time of all epochs; the clock of results.csv starts anew where a run was continued."""
        spent: dict[float, float] = {}
        epoch = clock = 0.0
        for row in self._lines():
            went_on = row["epoch"] > epoch and row["time"] >= clock
            spent[row["epoch"]] = row["time"] - clock if went_on else row["time"]
            epoch, clock = row["epoch"], row["time"]
        return sum(spent.values()) if spent else None

    def _lines(self) -> list[dict[str, float]]:
        try:
            with open(self.folder / "results.csv", encoding="utf-8") as file:
                rows = [{k.strip(): _number(v) for k, v in row.items() if k} for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []
        return [row for row in rows if math.isfinite(row.get("epoch", math.nan) + row.get("time", math.nan))]


def write_text(path: Path, text: str) -> None:
    """Write a file in one piece: it is either the old one or the new one, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


# ------------------------------------------------------------------------------------------------ what there is to do


def plan_runs(comparison: Comparison) -> list[Run]:
    """Return all runs with what earlier calls of the same command left of them, seed by seed.

    Raises:
        ConfigError: If the folder holds runs of other settings.
    """
    hashes = Hashes()
    runs = [
        _run(arm, seed, comparison.folder, hashes) for seed in comparison.seeds for arm in comparison.arms
    ]  # seed by seed, so that a comparison that is stopped early has pairs
    problems = []
    for run in runs:
        state = _state(run)
        if state is None:
            continue
        if differing := _differing(state["identity"], run.identity):
            problems.append(
                f"{run.folder} was trained with other settings: {'; '.join(differing)}. Add name=<another> for a "
                "comparison of its own, or restore the settings to go on with this one."
            )
        run.status, run.attempts, run.error = state["status"], state["attempts"], state["error"]
        if run.status == FINISHED and not run.best.exists():
            run.status = WAITING
    if problems:
        raise ConfigError(problems)
    return runs


class Hashes:
    """SHA-256 of files, each read once."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, path: Any) -> str | None:
        """Return the hash, None for what is no file here, such as a model that Ultralytics knows by its name."""
        if not isinstance(path, str) or not os.path.isfile(path):
            return None
        if path not in self._known:
            self._known[path] = sha256(path)
        return self._known[path]


def _run(arm: Arm, seed: int, folder: Path, hashes: Hashes) -> Run:
    keys = keys_of(arm) | {"seed": seed, "project": str(folder / "runs" / arm.name), "name": f"seed{seed}"}
    keys["exist_ok"] = True
    identity: dict[str, Any] = {"keys": keys, "trainer": UPSTREAM if arm.kind == UPSTREAM else "yolo_kd"}
    files = {key: hashes(keys.get(key)) for key in ("teacher", "student", "model", "distill_model", "data")}
    identity["files"] = {key: digest for key, digest in files.items() if digest}
    if arm.kind == DISTILLED:
        # the name of a recipe, and that of its file, say nothing about what is in it
        identity["recipe"] = load_recipe(keys["kd"], arm.options.kd_overrides).to_dict()
    # through JSON and back, so that it equals what is read from a file
    return Run(arm, seed, folder / "runs" / arm.name / f"seed{seed}", keys, json.loads(json.dumps(identity)))


def keys_of(arm: Arm) -> dict[str, Any]:
    """Return the keys of an arm's training, without seed and folder, as they stand in an experiment file."""
    options = arm.options
    keys: dict[str, Any] = {**DEFAULTS, **{k: v for k, v in options.ultralytics.items() if v is not None}}
    if arm.kind == UPSTREAM:
        keys = {"model": options.student, "distill_model": options.teacher, **arm.extra, **keys}
    else:
        keys = {"student": options.student, **options.own_keys, **_anywhere(options.pool), **keys}
    for key in _PATHS:  # so that a comparison can be continued from another folder
        if isinstance(keys.get(key), str) and os.path.isfile(keys[key]):
            keys[key] = os.path.abspath(keys[key])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}


def _anywhere(pool: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of a pool with paths that do not depend on the current folder."""
    if SOURCE_KEY not in pool:
        return dict(pool)
    source = pool[SOURCE_KEY] if isinstance(pool[SOURCE_KEY], list | tuple) else [pool[SOURCE_KEY]]
    return {**pool, SOURCE_KEY: [os.path.abspath(place) for place in source]}


def _state(run: Run) -> dict[str, Any] | None:
    try:
        return json.loads(run.folder.with_suffix(".json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"{run.folder.with_suffix('.json')} is damaged ({error}). Delete it to train anew."
        ) from error


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Say in which entries two identities differ."""
    lines: list[str] = []
    for key in dict.fromkeys([*old, *new]):
        was, now = old.get(key), new.get(key)
        if was == now:
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            lines += _differing(was, now, "" if key == "keys" else f"{prefix}{key} ")
        elif prefix == "files ":
            lines.append(f"the content of {key}= has changed")
        else:
            lines.append(f"{prefix}{key} was {_short(was)}, now {_short(now)}")
    return lines


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other comparison out of a folder.

    Raises:
        ConfigError: If one is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another comparison is at work in {folder}. Wait for it, or add name=<another> for a folder of its own."
        ) from None
    try:
        yield
    finally:
        lock.release()


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    found = {"yolo-kd": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for package in ("ultralytics", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "scipy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def fingerprint(value: Any) -> str:
    """Return a short hash of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
