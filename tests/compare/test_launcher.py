"""Resuming, retrying and stopping without trainings: a small script stands in for one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.comparison import fake_comparison
from tests.support.models import narrow_model
from yolo_kd.compare import launcher as module
from yolo_kd.compare.launcher import resume_point, settle, train_all, words_of
from yolo_kd.compare.runs import FAILED, FINISHED, WAITING, Run, plan_runs, write_text
from yolo_kd.compare.upstream import PREVIOUS
from yolo_kd.config.train_options import parse_train
from yolo_kd.errors import ConfigError


def checkpoint(file: Path, epoch: int, optimizer: Any = "state") -> None:
    """Write what Ultralytics leaves after an epoch, or with epoch -1 and no optimiser at the end."""
    file.parent.mkdir(parents=True, exist_ok=True)
    model = narrow_model("yolov8n", file.parents[4])
    model.args = {}
    state = {"state": {}, "param_groups": []} if optimizer else None
    torch.save({"epoch": epoch, "ema": model.half(), "model": None, "optimizer": state, "train_args": {}}, file)


def test_resume_point(tmp_path: Path) -> None:
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[1]
    assert resume_point(run) is None
    checkpoint(run.last, 1)
    assert resume_point(run) == run.last
    assert words_of(run, run.last) == ("yolo_kd", ["train", f"resume={run.last}"])
    run.last.write_bytes(run.last.read_bytes()[:1000])  # cut short by a kill
    assert resume_point(run) is None
    checkpoint(run.last.with_name(PREVIOUS), 0)
    assert resume_point(run) == run.last.with_name(PREVIOUS)


def test_a_finished_training_is_recognised(tmp_path: Path) -> None:
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[0]
    assert not settle(run)
    checkpoint(run.last, 2)
    checkpoint(run.best, 2)
    assert not settle(run)
    checkpoint(run.last, 3)  # the last of four epochs, not stripped yet
    assert resume_point(run) is None
    assert settle(run)
    assert torch.load(run.last, weights_only=False)["optimizer"] is None
    assert settle(run)


def test_words_of_a_baseline_and_of_upstream(tmp_path: Path) -> None:
    baseline, upstream = plan_runs(fake_comparison(tmp_path, "baseline,distill_model", 1, trust_checkpoints="true"))
    last = Path("last.pt")
    assert words_of(baseline, last)[1] == ["train", "resume=last.pt", "kd=none", "trust_checkpoints=true"]
    assert words_of(upstream, last) == ("yolo_kd.compare.upstream", ["resume=last.pt"])
    assert words_of(upstream, None)[1] == [f"keys={upstream.experiment}"]


def test_a_training_may_do_what_only_its_caller_may_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,objectness", 1, trust_checkpoints="true"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for run in runs:
        write_text(run.experiment, yaml.safe_dump(run.keys))
        module, (verb, *words) = words_of(run, None)
        assert (module, verb) == ("yolo_kd", "train")
        options = parse_train(words)
        assert options.trust_checkpoints
        assert Path(options.ultralytics["project"], options.ultralytics["name"]) == run.folder
        with pytest.raises(ConfigError, match="leads out of the current folder"):
            parse_train(words[:1])


# ------------------------------------------------------------------------------------------------ the scheduler

STAND_IN = textwrap.dedent(
    """
    import os, pathlib, sys, time, yaml
    keys = yaml.safe_load(pathlib.Path(sys.argv[-1].partition("=")[2]).read_text())
    folder = pathlib.Path(keys["project"]) / keys["name"]
    (folder / "weights").mkdir(parents=True)
    (folder / "threads").write_text(os.environ.get("OMP_NUM_THREADS", "") + " " + str(os.cpu_count()))
    name = folder.parent.name
    print("about to train", name, flush=True)
    if name == "fgd" and not (folder.parent / "repaired").exists():
        raise MemoryError("no room")
    if name == "mgd":
        os.kill(os.getpid(), 9)
    if name == "pkd":
        time.sleep(60)
    (folder / "results.csv").write_text("epoch,time,metrics/mAP50-95(B)\\n1,1,0.5\\n")
    (folder / "weights" / "best.pt").write_bytes(b"x")
    """
)


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a small script take the place of trainings."""
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.setattr(module, "words_of", lambda run, resume: ("stand_in", [f"cfg={run.experiment}"]))


def test_one_arm_fails_and_the_others_go_on(tmp_path: Path, stand_in: None) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd,mgd,cwd", 1))
    events: list[tuple[str, str]] = []
    train_all(runs, 2, lambda _runs, event, run: events.append((event, run.arm.name)) if run else None)
    found = {run.arm.name: run for run in runs}
    assert {name: run.status for name, run in found.items()} == {
        "baseline": FINISHED, "fgd": FAILED, "mgd": FAILED, "cwd": FINISHED,
    }  # fmt: skip
    assert found["fgd"].error.splitlines()[0] == "It ended with exit code 1."
    assert "MemoryError: no room" in found["fgd"].error
    assert "signal 9. Often the machine ran out of memory." in found["mgd"].error
    assert sorted(events) == sorted((event, name) for name in found for event in ("start", "end"))
    # a failed run is tried again by the next call, a finished one is not
    (found["fgd"].folder.parent / "repaired").touch()
    again = plan_runs(fake_comparison(tmp_path, "baseline,fgd,mgd,cwd", 1))
    train_all(again, 1, lambda *_: None)
    assert [run.status for run in again] == [FINISHED, FINISHED, FAILED, FINISHED]
    assert [len(run.attempts) for run in again] == [1, 2, 2, 1]


def test_processors_are_shared_between_jobs(tmp_path: Path, stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    runs = plan_runs(fake_comparison(tmp_path, "baseline,cwd", 1))
    train_all(runs, 2, lambda *_: None)
    assert [(run.folder / "threads").read_text() for run in runs] == ["4 4", "4 4"]


def test_the_experiment_file_is_what_was_asked_for(tmp_path: Path, stand_in: None) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,cwd", 1, lr0=1e-5))
    train_all(runs, 1, lambda *_: None)
    keys = yaml.safe_load(runs[1].experiment.read_text())
    assert keys == runs[1].keys
    assert keys["lr0"] == 1e-5
    state = json.loads(runs[1].folder.with_suffix(".json").read_text())
    assert state["status"] == FINISHED
    assert state["attempts"][0]["versions"]["ultralytics"]


def test_a_stopped_comparison_takes_its_trainings_along(tmp_path: Path, stand_in: None) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,pkd", 1))

    def stop(_runs: Any, event: str, run: Run | None) -> None:
        if event == "start" and run is not None and run.arm.name == "pkd":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train_all(runs, 2, stop)
    assert time.monotonic() - began < 30
    assert runs[1].status == WAITING


KILLED = """
import sys, yolo_kd.compare.launcher as module
from pathlib import Path
from tests.support.comparison import fake_comparison
from yolo_kd.compare.runs import plan_runs
module.words_of = lambda run, resume: ("stand_in", [f"cfg={run.experiment}"])
folder = Path(sys.argv[1])
module.train_all(plan_runs(fake_comparison(folder, "pkd,baseline", 1)), 1, lambda *_: None)
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="needs process groups")
@pytest.mark.e2e
def test_a_killed_comparison_takes_its_trainings_along(tmp_path: Path, stand_in: None) -> None:
    """Killed without a chance to tidy up: the training notices and ends by itself."""
    root = Path(__file__).resolve().parents[2]
    parent = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=root, env={**os.environ})
    log = tmp_path / "fake" / "runs" / "pkd" / "seed0.log"
    deadline = time.monotonic() + 300
    while not (log.exists() and b"about to train" in log.read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    children = _children(parent.pid)
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def _alive(pid: int) -> bool:
    import psutil

    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
