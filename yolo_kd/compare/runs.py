"""The runs of a comparison: what identifies each of them, and its state after earlier calls."""

from __future__ import annotations

import contextlib
import csv
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from yolo_kd._version import __version__
from yolo_kd.compare.arms import UPSTREAM, Arm, Comparison
from yolo_kd.compare.records import Attempt, Identity, RunState, Status, run_name
from yolo_kd.config.source import shown
from yolo_kd.config.unlabeled import SOURCE_KEY
from yolo_kd.engine.run_files import write_atomically
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.checkpoint import sha256

FINISHED: Status = "finished"
FAILED: Status = "failed"
RUNNING: Status = "running"
WAITING: Status = "waiting"
MAP_COLUMN = "metrics/mAP50-95(B)"  # of results.csv
DEFAULTS = {"plots": False}  # keys that a comparison sets where the user does not
_PATHS = ("teacher", "student", "data", "kd", "model", "distill_model")


@dataclass
class Run:
    """One training: an arm with a seed.

    Attributes:
        arm: The arm.
        seed: The seed.
        folder: Where Ultralytics writes. The files of the run next to that folder have the same name.
        keys: Keys of the training, as its experiment file lists them.
        identity: What must be the same when a run continues.
        status: `waiting`, `running`, `finished` or `failed`.
        attempts: All starts so far.
        error: For a failed run, how it ended and the last lines of its log.
    """

    arm: Arm
    seed: int
    folder: Path
    keys: dict[str, Any]
    identity: Identity
    status: Status = WAITING
    attempts: list[Attempt] = field(default_factory=list)
    error: str = ""

    @property
    def name(self) -> str:
        """Name in messages and in the report."""
        return run_name(self.arm.name, self.seed)

    @property
    def best(self) -> Path:
        """The checkpoint that is evaluated."""
        return self.folder / "weights" / "best.pt"

    @property
    def last(self) -> Path:
        """The checkpoint that a training continues from."""
        return self.folder / "weights" / "last.pt"

    @property
    def state_file(self) -> Path:
        """The file of the run's state."""
        return self.folder.with_suffix(".json")

    @property
    def experiment(self) -> Path:
        """The file of the run's keys."""
        return self.folder.with_suffix(".yaml")

    @property
    def log(self) -> Path:
        """The file of what the training printed."""
        return self.folder.with_suffix(".log")

    @property
    def epochs(self) -> int:
        """Epochs that were asked for."""
        return int(self.keys.get("epochs", 100))

    def state(self) -> RunState:
        """Return the state as a record."""
        same = {name: getattr(self, name) for name in ("seed", "status", "error", "identity")}
        return RunState(arm=self.arm.name, attempts=tuple(self.attempts), **same)

    def save(self) -> None:
        """Write the state file, in one piece."""
        write_text(self.state_file, self.state().to_json())

    def rows(self) -> list[dict[str, float]]:
        """Return the lines of results.csv, one per epoch."""
        # a run that was stopped between this file and its checkpoint repeats an epoch, and the second line counts
        return [*{row["epoch"]: row for row in self._lines()}.values()]

    def seconds(self) -> float | None:
        """Return the training time of all epochs. The clock of results.csv restarts where a run was continued."""
        spent: dict[float, float] = {}
        epoch = clock = 0.0
        for row in self._lines():
            same_clock = row["epoch"] > epoch and row["time"] >= clock
            spent[row["epoch"]] = row["time"] - clock if same_clock else row["time"]
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
    """Write a file in one piece: whatever happens, it has either the old content or the new."""
    write_atomically(path, text.encode())


@contextlib.contextmanager
def attempting(problems: list[str], what: str) -> Iterator[None]:
    """Turn an error of work after the trainings into a line of the report; it does not end the comparison."""
    try:
        yield
    except Exception as error:
        problems.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())}")


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return float("nan")


# ------------------------------------------------------------------------------------------------ planning


def plan_runs(comparison: Comparison) -> list[Run]:
    """Return all runs, seed by seed, each with its state after earlier calls of the same command.

    Raises:
        ConfigError: If the folder holds runs of other settings, or a state file that cannot be read.
    """
    digest = functools.cache(sha256)  # reads each file once
    # seed by seed, so that a comparison that is stopped early has pairs
    runs = [_run(arm, seed, comparison.folder, digest) for seed in comparison.seeds for arm in comparison.arms]
    problems = []
    for run in runs:
        state = _state(run)
        if state is None:
            continue
        if differing := _differing(state.identity.model_dump(), run.identity.model_dump()):
            problems.append(
                f"{run.folder} was trained with other settings: {'; '.join(differing)}. Add name=<another> for a "
                "separate comparison, or restore the settings to continue this one."
            )
        run.status, run.attempts, run.error = state.status, [*state.attempts], state.error
        if run.status == FINISHED and not run.best.exists():
            run.status = WAITING
    if problems:
        raise ConfigError(problems)
    return runs


def _run(arm: Arm, seed: int, folder: Path, digest: Callable[[str], str]) -> Run:
    keys = keys_of(arm) | {"seed": seed, "project": str(folder / "runs" / arm.name), "name": f"seed{seed}"}
    keys["exist_ok"] = True
    # a value that is no file here may be the name of a model to download
    named = {key: keys.get(key) for key in ("teacher", "student", "model", "distill_model", "data")}
    files = {key: digest(name) for key, name in named.items() if isinstance(name, str) and os.path.isfile(name)}
    identity = Identity(
        keys=keys,
        trainer=UPSTREAM if arm.kind == UPSTREAM else "yolo_kd",
        files=files,
        # the content, since a recipe may change under the same name
        recipe=arm.options.recipe.to_dict() if arm.options.recipe is not None else None,
    )
    # through JSON and back, so that it equals what is read from a file
    identity = Identity.from_json(identity.to_json())
    return Run(arm, seed, folder / "runs" / arm.name / f"seed{seed}", keys, identity)


def keys_of(arm: Arm) -> dict[str, Any]:
    """Return the keys of an arm's training, without seed and folder, as its experiment file lists them."""
    options = arm.options
    keys: dict[str, Any] = {**DEFAULTS, **{k: v for k, v in options.ultralytics.items() if v is not None}}
    if arm.kind == UPSTREAM:
        keys = {"model": options.student, "distill_model": options.teacher, **arm.extra, **keys}
    else:
        keys = {**options.to_keys(), **keys}
        if options.unlabeled:
            keys[SOURCE_KEY] = [os.path.abspath(source) for source in options.unlabeled.source]
    for key in _PATHS:  # so that a comparison can be continued from another folder
        if isinstance(keys.get(key), str) and os.path.isfile(keys[key]):
            keys[key] = os.path.abspath(keys[key])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}


def _state(run: Run) -> RunState | None:
    try:
        return RunState.from_json(run.state_file.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(f"{run.state_file} is damaged ({error}). Delete it to train this run again.") from error


def _differing(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Return in which entries two identities differ."""
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
            before, after = ("not given" if value is None else shown(value) for value in (was, now))
            lines.append(f"{prefix}{key} was {before}, now {after}")
    return lines


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep every other comparison out of a folder.

    Raises:
        ConfigError: If another comparison is running there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / ".lock").acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"another comparison is at work in {folder}. Wait for it, or add name=<another> to use a separate folder."
        ) from None
    with lock:
        yield


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run depends on."""
    packages = ("ultralytics", "torch", "torchvision", "numpy", "onnx", "onnxruntime", "scipy")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"yolo-kd": __version__, "python": python, **{package: version(package) for package in packages}}
