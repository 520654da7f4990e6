"""Trains the runs of a comparison, each in a process of its own and several at a time."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml
from ultralytics.utils.torch_utils import strip_optimizer

from yolo_kd.compare.arms import ALONE, UPSTREAM
from yolo_kd.compare.records import Attempt
from yolo_kd.compare.runs import FAILED, FINISHED, RUNNING, WAITING, Run, versions, write_text
from yolo_kd.compare.upstream import PREVIOUS
from yolo_kd.errors import CheckpointError
from yolo_kd.safe_loading.checkpoint import load_checkpoint_file

_LOG_LINES = 15
_POLL = 0.3  # seconds between two checks of the trainings


def resume_point(run: Run) -> Path | None:
    """Return the checkpoint that a run can continue from, None where it has to start from scratch."""
    for file in (run.last, run.last.with_name(PREVIOUS)):
        checkpoint = _read_checkpoint(file)
        if checkpoint and checkpoint.get("optimizer") is not None and 0 <= checkpoint["epoch"] < run.epochs - 1:
            return file
    return None


def settle(run: Run) -> bool:
    """Return whether a run has trained to its end although its state does not show it; if so, finish its files."""
    checkpoint = _read_checkpoint(run.last)
    if not checkpoint or not run.best.exists():
        return False
    if checkpoint.get("optimizer") is None and checkpoint["epoch"] == -1:
        return True
    if checkpoint["epoch"] < run.epochs - 1:
        return False
    for file in (run.last, run.best):  # stopped before Ultralytics removed the optimiser from the files
        strip_optimizer(file)
    return True


def _read_checkpoint(file: Path) -> dict[str, Any] | None:
    """Read a checkpoint that a run of this comparison wrote; None if it is missing or incomplete."""
    if not file.exists():
        return None
    try:
        # trusted, since a run wrote it; the allow-list lacks Ultralytics' wrapper of teacher and student
        return load_checkpoint_file(file, role="resume", trust=True)[0]
    except CheckpointError:
        return None


def words_of(run: Run, resume: Path | None) -> tuple[str, list[str]]:
    """Return the module that trains a run and its arguments."""
    if run.arm.kind == UPSTREAM:
        return "yolo_kd.compare.upstream", [f"resume={resume}" if resume else f"keys={run.experiment}"]
    if resume:
        words = ["train", f"resume={resume}"] + ["kd=none"] * (run.arm.kind == ALONE)
    else:
        words = ["train", f"cfg={run.experiment}", f"project={run.folder.parent}"]
    # only the command line may trust checkpoints or write outside the current folder, an experiment file may not
    return "yolo_kd", words + ["trust_checkpoints=true"] * run.arm.options.trust_checkpoints


def command_of(run: Run) -> str:
    """Return the command that trains a run from scratch."""
    module, words = words_of(run, None)
    return shlex.join([*(["yolo-kd"] if module == "yolo_kd" else ["python", "-m", module]), *words])


# ------------------------------------------------------------------------------------------------ training


@dataclass
class _Process:
    run: Run
    popen: subprocess.Popen
    log: IO[bytes]
    started: float


def train_all(runs: Sequence[Run], jobs: int, report: Callable[[Sequence[Run], str, Run | None], None]) -> None:
    """Train every run that is not finished, `jobs` at a time. A run that fails does not affect the others.

    Args:
        runs: All runs.
        jobs: How many at a time.
        report: Called with all runs, an event (`start`, `end`, or `look` in between), and the run that starts or ends.
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
                report(runs, "start", process.run)
            time.sleep(_POLL)
            for process in [p for p in active if p.popen.poll() is not None]:
                active.remove(process)
                _end(process)
                report(runs, "end", process.run)
            report(runs, "look", None)
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
    threads = str(min(share, int(os.environ.get("OMP_NUM_THREADS") or share)))
    run.status, run.error = RUNNING, ""
    command, now = shlex.join(["python", "-m", module, *words]), time.strftime("%Y-%m-%d %H:%M:%S")
    run.attempts.append(
        Attempt(command=command, resumed=resume is not None, started=now, jobs=jobs, versions=versions())
    )
    run.save()
    log = open(run.log, "ab" if resume else "wb")  # noqa: SIM115  closed when the process ends
    popen = subprocess.Popen(
        [sys.executable, "-m", "yolo_kd.compare.worker", str(share), module, *words],
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | ({"OMP_NUM_THREADS": threads} if jobs > 1 else {}),
        start_new_session=True,  # so that the whole process group can be ended
    )
    return _Process(run, popen, log, time.monotonic())


def _end(process: _Process) -> None:
    """Record how a training ended."""
    run, code = process.run, process.popen.returncode
    _close(process)
    seconds = round(time.monotonic() - process.started, 1)
    run.attempts[-1] = run.attempts[-1].model_copy(update={"seconds": seconds, "exit_code": code})
    if code == 0 and run.best.exists():
        run.status = FINISHED
        run.last.with_name(PREVIOUS).unlink(missing_ok=True)
    else:
        run.status, run.error = FAILED, _reason(run.log, code)
    run.save()


def _stop(process: _Process) -> None:
    """End a training because the comparison ends."""
    _close(process)  # the worker ends when its standard input closes
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
    """Return why a training failed: how it ended and the last lines that it printed."""
    if code == 0:
        how = "It ended without a checkpoint."
    elif code < 0:
        hint = " Often the machine ran out of memory." if code == -9 else ""
        how = f"It was ended by signal {-code}.{hint}"
    else:
        how = f"It ended with exit code {code}."
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.splitlines()]
    return "\n".join([how, *[line for line in lines if line.strip()][-_LOG_LINES:]])
