"""Progress of a comparison: one line per run, with the training time that is left for all runs."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TextIO

from yolo_kd.compare.runs import FAILED, FINISHED, MAP_COLUMN, RUNNING, Run

_LINES_PER_RUN = 10  # in a log file; a terminal shows every epoch in place


class Progress:
    """Writes lines about runs.

    On a terminal, the lines of running trainings are rewritten in place. Anywhere else, such as in a log file, a line
    is added when a run starts, ends, or has finished another tenth of its epochs.

    Args:
        stream: Where to write.
        jobs: Trainings at a time, for the estimate.
    """

    def __init__(self, stream: TextIO, jobs: int):
        self._stream = stream
        self._jobs = jobs
        self._live = stream.isatty()
        self._shown: list[str] = []
        self._reported: dict[str, int] = {}

    def __call__(self, runs: Sequence[Run], event: str, run: Run | None) -> None:
        """Report an event of `launcher.train_all`."""
        if event == "start" and run is not None:
            verb = "continues" if run.attempts[-1].resumed else "starts"
            self._add(f"{self._prefix(runs, run)} {verb}, log: {run.log}")
        elif event == "end" and run is not None:
            self._reported.pop(run.name, None)
            self._add(self.line(runs, run))
        active = [r for r in runs if r.status == RUNNING]
        if self._live:
            self._redraw([self.line(runs, r) for r in active])
        else:
            for r in active:
                done = len(r.rows())
                if done and done * _LINES_PER_RUN // r.epochs > self._reported.get(r.name, 0):
                    self._reported[r.name] = done * _LINES_PER_RUN // r.epochs
                    self._add(self.line(runs, r))

    def line(self, runs: Sequence[Run], run: Run) -> str:
        """Return the line of a run: its progress, its metric, and the training time that is left for the comparison."""
        rows = run.rows()
        metrics = [row[MAP_COLUMN] for row in rows if MAP_COLUMN in row]
        if run.status == FINISHED:
            shown = f", best mAP50-95 {max(metrics):.3f}" if metrics else ""
            state = f"finished after {len(rows)} epochs{shown}, {_duration(run.seconds() or 0)}"
        elif run.status == FAILED:
            lines = run.error.splitlines()
            state = f"FAILED: {lines[0]} {lines[-1] if len(lines) > 1 else ''}".rstrip() + f" (log: {run.log})"
        else:
            state = f"epoch {len(rows)}/{run.epochs}" + (f", mAP50-95 {metrics[-1]:.3f}" if metrics else "")
        left = self.left(runs)
        ahead = f"; about {_duration(left)} of training left" if left is not None and left > 0 else ""
        return f"{self._prefix(runs, run)} {state}{ahead}"

    def left(self, runs: Sequence[Run]) -> float | None:
        """Return the seconds of training that are left for the whole comparison, None before the first epoch."""
        pace: dict[str, list[float]] = {}  # seconds per epoch, by arm
        for run in runs:
            rows, seconds = len(run.rows()), run.seconds()
            if rows and seconds:
                pace.setdefault(run.arm.name, []).append(seconds / rows)
        average = [fmean(found) for found in pace.values()]
        if not average:
            return None
        ahead = [run for run in runs if run.status not in (FINISHED, FAILED)]
        epochs = [(max(run.epochs - len(run.rows()), 0), pace.get(run.arm.name, average)) for run in ahead]
        return sum(count * fmean(found) for count, found in epochs) / min(self._jobs, max(len(ahead), 1))

    @staticmethod
    def _prefix(runs: Sequence[Run], run: Run) -> str:
        return f"[{list(runs).index(run) + 1}/{len(runs)}] {run.name}:"

    def _add(self, line: str) -> None:
        self._redraw([])
        self._stream.write(f"{line}\n")
        self._stream.flush()

    def _redraw(self, lines: list[str]) -> None:
        if not self._live or lines == self._shown:
            return
        if self._shown:
            self._stream.write(f"\033[{len(self._shown)}A\033[J")  # up to the first line, clear everything below
        self._stream.writelines(f"{line}\n" for line in lines)
        self._stream.flush()
        self._shown = lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
