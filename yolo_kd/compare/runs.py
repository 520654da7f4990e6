"""The runs of a comparison: which there are, how far each is, and how they are trained side by side."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_kd import __version__
from yolo_kd.checkpoints import load_checkpoint_file, sha256
from yolo_kd.compare.arms import ALONE, DISTILLED, UPSTREAM, Arm, Comparison
from yolo_kd.compare.upstream import PREVIOUS
from yolo_kd.errors import CheckpointError, ConfigError
from yolo_kd.recipe import load_recipe

FINISHED, FAILED, RUNNING, WAITING = "finished", "failed", "running", "waiting"
DEFAULTS = {"plots": False}  # what a comparison sets where the user does not
_PATHS = ("teacher", "student", "data", "kd", "model", "distill_model")
_LOG_LINES = 15
_POLL = 0.3  # seconds between two looks at the trainings


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
        try:
            with open(self.folder / "results.csv", encoding="utf-8") as file:
                return [{k.strip(): _number(v) for k, v in row.items() if k} for row in csv.DictReader(file)]
        except FileNotFoundError:
            return []

    def seconds(self) -> float | None:
        """Return the training time of all epochs; the clock of results.csv starts anew where a run was continued."""
        total = before = 0.0
        times = [row["time"] for row in self.rows() if "time" in row]
        for now in times:
            total += now - before if now >= before else now
            before = now
        return total if times else None


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
        changes = arm.options.kd_overrides
        recipe = load_recipe(keys["kd"] if keys.get("kd") is not None else "objectness", changes).to_dict()
        # the name of an inline recipe or of a file says nothing about what is in it
        identity["recipe"] = recipe
    # through JSON and back, so that it equals what is read from a file
    return Run(arm, seed, folder / "runs" / arm.name / f"seed{seed}", keys, json.loads(json.dumps(identity)))


def keys_of(arm: Arm) -> dict[str, Any]:
    """Return the keys of an arm's training, without seed and folder, as they stand in an experiment file."""
    options = arm.options
    keys: dict[str, Any] = {**DEFAULTS, **{k: v for k, v in options.ultralytics.items() if v is not None}}
    if arm.kind == UPSTREAM:
        keys = {"model": options.student, "distill_model": options.teacher, **arm.extra, **keys}
    else:
        own: dict[str, Any] = {"teacher": options.teacher, "student": options.student, "kd": options.kd}
        switches = ("inherit", "trust_checkpoints", "random_teacher")
        own |= {key: True for key in switches if getattr(options, key)}
        own |= {f"kd.{key}": value for key, value in options.kd_overrides.items()}
        keys = {**{k: v for k, v in own.items() if v is not None}, **keys}
    for key in _PATHS:  # so that a comparison can be continued from another folder
        if isinstance(keys.get(key), str) and os.path.isfile(keys[key]):
            keys[key] = os.path.abspath(keys[key])
    return {k: list(v) if isinstance(v, tuple) else v for k, v in keys.items()}


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


# ------------------------------------------------------------------------------------------------ how far a run is


def resume_point(run: Run) -> Path | None:
    """Return the checkpoint from which a run can go on, None where it has to begin."""
    for file in (run.last, run.last.with_name(PREVIOUS)):
        checkpoint = _own_checkpoint(file)
        if checkpoint and checkpoint.get("optimizer") is not None and 0 <= checkpoint["epoch"] < run.epochs - 1:
            return file
    return None


def settle(run: Run) -> bool:
    """Return whether a run had trained to its end although nobody noted it, and finish its files if so."""
    checkpoint = _own_checkpoint(run.last)
    if not checkpoint or not run.best.exists():
        return False
    stripped = checkpoint.get("optimizer") is None and checkpoint["epoch"] == -1
    if not stripped and checkpoint["epoch"] < run.epochs - 1:
        return False
    if not stripped:  # stopped after the last epoch, before Ultralytics had taken the optimiser out of the files
        for file in (run.last, run.best):
            strip_optimizer(file)
    return True


def _own_checkpoint(file: Path) -> dict[str, Any] | None:
    """Read a checkpoint that a run of this comparison wrote; None if there is none or it was cut short."""
    if not file.exists():
        return None
    try:
        # trusted, since this program wrote it; Ultralytics' wrapper of teacher and student is not on the allow-list
        return load_checkpoint_file(file, role="resume", trust=True)[0]
    except CheckpointError:
        return None


def words_of(run: Run, resume: Path | None) -> tuple[str, list[str]]:
    """Return the module that trains a run and its arguments."""
    if run.arm.kind == UPSTREAM:
        return "yolo_kd.compare.upstream", [f"resume={resume}" if resume else f"keys={run.experiment}"]
    words = ["train", f"resume={resume}" if resume else f"cfg={run.experiment}"]
    if resume and run.arm.kind == ALONE:
        words.append("kd=none")
    if resume and run.arm.options.trust_checkpoints:
        words.append("trust_checkpoints=true")
    return "yolo_kd", words


def command_of(run: Run) -> str:
    """Return the command that trains a run from its beginning."""
    module, words = words_of(run, None)
    return " ".join(["yolo-kd" if module == "yolo_kd" else f"python -m {module}", *words])


# ------------------------------------------------------------------------------------------------ training


@dataclass
class _Process:
    run: Run
    popen: subprocess.Popen
    log: IO[bytes]
    started: float


def train_all(runs: Sequence[Run], jobs: int, tell: Callable[[Sequence[Run], str, Run | None], None]) -> None:
    """Train every run that is not finished, `jobs` at a time; a run that fails leaves the others alone.

    Args:
        runs: All runs.
        jobs: How many at a time.
        tell: Called with all runs, an event (`start`, `end`, or `look` in between) and the run that it is about.
    """
    for run in runs:
        if run.status != FINISHED and run.attempts and settle(run):
            run.status, run.error = FINISHED, ""
            run.save()
    waiting = [run for run in runs if run.status != FINISHED]
    for run in waiting:
        run.status = WAITING
    active: list[_Process] = []
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                process = _start(waiting.pop(0), jobs)
                active.append(process)
                tell(runs, "start", process.run)
            time.sleep(_POLL)
            for process in [p for p in active if p.popen.poll() is not None]:
                active.remove(process)
                _end(process)
                tell(runs, "end", process.run)
            tell(runs, "look", None)
    finally:
        for process in active:
            _stop(process)


def _start(run: Run, jobs: int) -> _Process:
    resume = resume_point(run)
    if resume is None and run.folder.exists():
        shutil.rmtree(run.folder)
    if resume is not None and resume.name == PREVIOUS:
        os.replace(resume, run.last)
        resume = run.last
    write_text(run.experiment, yaml.safe_dump(run.keys, sort_keys=False, allow_unicode=True))
    module, words = words_of(run, resume)
    share = max(1, (os.cpu_count() or 1) // jobs)
    environment = {**os.environ}
    if jobs > 1:
        environment["OMP_NUM_THREADS"] = str(min(share, int(os.environ.get("OMP_NUM_THREADS") or share)))
    run.status, run.error = RUNNING, ""
    run.attempts.append(
        {
            "command": f"python -m {module} {' '.join(words)}",
            "resumed": resume is not None,
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
            "jobs": jobs,
            "versions": versions(),
        }
    )
    run.save()
    log = open(run.log, "ab" if resume else "wb")  # noqa: SIM115  closed when the process ends
    popen = subprocess.Popen(
        [sys.executable, "-m", "yolo_kd.compare.child", str(share), module, *words],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=environment,
        start_new_session=True,  # so that it can end with everything it started
    )
    return _Process(run, popen, log, time.monotonic())


def _end(process: _Process) -> None:
    """Note how a training ended."""
    run, code = process.run, process.popen.returncode
    _close(process)
    run.attempts[-1] |= {"seconds": round(time.monotonic() - process.started, 1), "exit_code": code}
    if code == 0 and run.best.exists():
        run.status = FINISHED
        run.last.with_name(PREVIOUS).unlink(missing_ok=True)
    else:
        run.status, run.error = FAILED, _reason(run.log, code)
    run.save()


def _stop(process: _Process) -> None:
    """End a training that is under way, because the comparison ends."""
    _close(process)  # which it notices, see child.py
    try:
        process.popen.wait(10)
    except subprocess.TimeoutExpired:
        process.popen.kill()
    process.run.status = WAITING
    process.run.save()


def _close(process: _Process) -> None:
    with contextlib.suppress(OSError):
        process.popen.stdin.close()  # type: ignore[union-attr]
    process.log.close()


def _reason(log: Path, code: int) -> str:
    """Say why a training failed: how it ended and the last lines that it printed."""
    if code == 0:
        how = "It ended without a checkpoint."
    elif code < 0:
        hint = " Often the machine ran out of memory." if code == -9 else ""
        how = f"It was ended by signal {-code}.{hint}"
    else:
        how = f"It ended with exit code {code}."
    try:
        text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    except OSError:
        text = ""
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join([how, *[line for line in lines if line.strip()][-_LOG_LINES:]])


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
