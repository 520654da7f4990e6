"""The lines that a comparison prints while it trains."""

from __future__ import annotations

import io
from pathlib import Path

from tests.support.comparison import fail, fake_comparison, finish
from yolo_kd.compare.progress import Progress
from yolo_kd.compare.runs import RUNNING, plan_runs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_for_a_log_file(tmp_path: Path) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 2, epochs=4))
    out = io.StringIO()
    progress = Progress(out, 1)
    finish(runs[0], [])
    runs[0].status = RUNNING
    progress(runs, "start", runs[0])
    for epochs in (1, 2, 4):
        finish(runs[0], [0.1 * n for n in range(1, epochs + 1)], pace=30)
        runs[0].status = RUNNING
        progress(runs, "look", None)
        progress(runs, "look", None)  # nothing new, no line
    finish(runs[0], [0.1, 0.2, 0.3, 0.25], pace=30)
    progress(runs, "end", runs[0])
    fail(runs[1])
    progress(runs, "end", runs[1])
    lines = out.getvalue().splitlines()
    assert "\033" not in out.getvalue()
    assert lines[0].startswith("[1/4] baseline seed 0: starts, log: ")
    # 16 epochs in all, one done, 30 s each
    assert lines[1] == "[1/4] baseline seed 0: epoch 1/4, mAP50-95 0.100; about 8 min of training left"
    assert lines[3] == "[1/4] baseline seed 0: epoch 4/4, mAP50-95 0.400; about 6 min of training left"
    assert lines[4].startswith(
        "[1/4] baseline seed 0: finished after 4 epochs, best mAP50-95 0.300, 2 min; about 6 min"
    )
    assert lines[5].startswith("[2/4] fgd seed 0: FAILED: It ended with exit code 1. RuntimeError")
    assert len(lines) == 6


def test_jobs_divide_the_time_that_is_left(tmp_path: Path) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 2, epochs=4))
    assert Progress(io.StringIO(), 2).left(runs) is None
    finish(runs[0], [0.1] * 4, pace=10)
    assert Progress(io.StringIO(), 2).left(runs) == 3 * 4 * 10 / 2
    assert Progress(io.StringIO(), 8).left(runs) == 3 * 4 * 10 / 3
    finish(runs[1], [0.1] * 2, pace=20)  # an arm goes by its own pace
    runs[1].status = RUNNING
    assert Progress(io.StringIO(), 1).left(runs) == 2 * 20 + 4 * 10 + 4 * 20


def test_lines_of_a_terminal_are_rewritten(tmp_path: Path) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, epochs=4))
    out = Terminal()
    progress = Progress(out, 1)
    finish(runs[0], [0.1])
    runs[0].status = RUNNING
    progress(runs, "look", None)
    finish(runs[0], [0.1, 0.2])
    runs[0].status = RUNNING
    progress(runs, "look", None)
    assert out.getvalue().count("\033[1A\033[J") == 1
    assert "epoch 2/4" in out.getvalue()
