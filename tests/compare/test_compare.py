"""Whole comparisons of tiny models: killed and continued, an arm that fails, and Ultralytics' own trainer as an arm."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics.nn.tasks import DetectionModel

from tests.support.models import narrow_checkpoint
from yolo_kd.cli import main
from yolo_kd.compare.arms import parse_compare
from yolo_kd.compare.launcher import train_all
from yolo_kd.compare.pipeline import check_all
from yolo_kd.compare.runs import FINISHED, Run, plan_runs
from yolo_kd.compare.upstream import PREVIOUS
from yolo_kd.errors import CheckpointError, ConfigError
from yolo_kd.safe_loading.checkpoint import load_detector

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    teacher = narrow_checkpoint("yolov8n", folder, width=0.25, seed=1, file="teacher.pt")
    return teacher, narrow_checkpoint("yolov8n", folder, seed=2, file="student.pt")


def words(folder: Path, data: Path, models: tuple[Path, Path], **keys: Any) -> list[str]:
    """Return the words of a comparison of tiny trainings."""
    given = {
        "teacher": models[0], "student": models[1], "data": data, "imgsz": 64, "batch": 8, "epochs": 3, "workers": 0,
        "optimizer": "AdamW", "lr0": 1e-3, "device": "cpu", "project": folder, "name": "c",
    }  # fmt: skip
    return [f"{key}={value}" for key, value in {**given, **keys}.items()]


def epochs_of(folder: Path) -> list[str]:
    try:
        with open(folder / "results.csv") as file:
            return [row["epoch"] for row in csv.DictReader(file)]
    except FileNotFoundError:
        return []


def first_loss(folder: Path) -> float:
    with open(folder / "results.csv") as file:
        return float(next(csv.DictReader(file))["train/box_loss"])


def command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "yolo_kd", "compare", *arguments]


@pytest.mark.e2e
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process as only POSIX can")
def test_killed_and_continued(tmp_path: Path, shapes: Path, models: tuple[Path, Path]) -> None:
    # all pictures in one batch, so that the first epoch's losses are those of the first step
    arguments = words(tmp_path, shapes, models, arms="baseline,objectness", seeds=3, batch=16)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    runs = tmp_path / "c" / "runs"
    middle = runs / "objectness" / "seed0"  # the second of six
    first = subprocess.Popen(command(arguments), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not (epochs_of(middle) and (middle / "weights" / "last.pt").exists()):
        assert time.monotonic() < deadline
        assert first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    kept = len(epochs_of(middle))
    assert json.loads(middle.with_suffix(".json").read_text())["status"] == "running"

    done = subprocess.run(command(arguments), cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 arms x 3 seeds, 6 trainings, 1 finished before, 1 at a time." in done.stdout
    assert "[2/6] objectness seed 0: continues" in done.stdout or kept == 3
    assert "\033" not in done.stdout
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert summary["problems"] == []
    assert {run["status"] for run in summary["runs"]} == {"finished"}
    # what had finished was not trained again, what was under way lost no finished epoch
    attempts = {f"{run['arm']} seed {run['seed']}": len(run["attempts"]) for run in summary["runs"]}
    assert attempts == {name: 2 if name == "objectness seed 0" else 1 for name in attempts}
    for arm in ("baseline", "objectness"):
        for seed in range(3):
            assert sorted(set(epochs_of(runs / arm / f"seed{seed}"))) == ["1", "2", "3"]
    # paired: a seed's first batch, and what the untrained student makes of it, is the same in every arm
    first = [[first_loss(runs / arm / f"seed{seed}") for seed in range(3)] for arm in ("baseline", "objectness")]
    assert first[0] == pytest.approx(first[1], rel=1e-4)
    assert len({round(value, 3) for value in first[0]}) == 3
    arm = summary["arms"][1]
    assert arm["difference"]["test"]["mAP50-95"]["n"] == 3
    assert arm["audit"][0]["term"] == "objectness"
    assert arm["audit"][0]["gradient"] > 0
    assert arm["latency_ms"] > 0
    assert summary["runs"][1]["terms"].keys() == {"kcls_loss", "kbox_loss"}
    assert any("Interrupted and continued: objectness seed 0" in note for note in summary["notes"])
    page = (tmp_path / "c" / "report.html").read_text()
    assert "Not drawn" not in page
    assert summary["verdict"].split(",")[0] in page.replace("&#39;", "'")
    assert json.loads((tmp_path / "c" / "summary.json").read_text())["verdicts"][0] in done.stdout


@pytest.mark.e2e
def test_distill_model_is_ultralytics_own_trainer_and_can_be_stopped(
    tmp_path: Path, shapes: Path, models: tuple[Path, Path]
) -> None:
    comparison = parse_compare(words(tmp_path, shapes, models, arms="distill_model,baseline", seeds=1))
    (run, _) = runs = plan_runs(comparison)

    def stop(_runs: Any, event: str, _run: Run | None) -> None:
        if event == "look" and (run.last.with_name(PREVIOUS)).exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_all(runs[:1], 1, stop)
    run.last.write_bytes(run.last.read_bytes()[:5000])  # as if the kill had met the checkpoint while it was written
    again = plan_runs(comparison)
    train_all(again[:1], 1, lambda *_: None)
    assert again[0].status == FINISHED, again[0].error
    assert [attempt.resumed for attempt in again[0].attempts] == [False, True]
    assert sorted(set(epochs_of(run.folder))) == ["1", "2", "3"]
    with open(run.folder / "results.csv") as file:
        assert all(float(row["train/dis_loss"]) > 0 for row in csv.DictReader(file))
    assert not run.last.with_name(PREVIOUS).exists()
    assert type(load_detector(run.best).model) is DetectionModel
    assert "yolo_kd" not in torch.load(run.best, weights_only=False)


@pytest.mark.e2e
def test_an_arm_that_fails_is_in_the_report(tmp_path: Path, shapes: Path, models: tuple[Path, Path]) -> None:
    """A recipe whose plugin breaks after the checks, in the middle of a training."""
    plugin = tmp_path / "breaking.py"
    plugin.write_text(
        "import torch\n"
        "from yolo_kd.losses.base import Loss\n"
        "class Breaking(Loss):\n"
        '    """A loss that breaks.\n\n    Args:\n    """\n'
        "    name, paper, cost = 'breaking', 'none', '0 %'\n"
        "    columns = ('kbrk_loss',)\n"
        "    reads = frozenset({'scores'})\n"
        "    def forward(self, step):\n"
        "        raise RuntimeError('broken on purpose')\n"
    )
    recipe = tmp_path / "bad.yaml"
    recipe.write_text("plugins: [breaking]\nlosses: {breaking: {}}\n")
    # in a process of its own, since a loss that was registered stays so
    done = subprocess.run(
        command(words(tmp_path, shapes, models, arms=f"baseline,{recipe}", seeds=1, epochs=1)),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "bad seed 0: FAILED: It ended with exit code 1." in done.stdout
    assert "1 of 2 trainings failed. The same command tries them again." in done.stdout
    page = (tmp_path / "c" / "report.html").read_text()
    assert "RuntimeError: broken on purpose" in page
    assert "bad: no result" in page


@pytest.mark.e2e
def test_unlabeled_images_alone_and_a_teacher_of_other_classes(
    tmp_path: Path, shapes: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """No arm needs training labels, and a teacher that cannot be evaluated on the data set is no failure."""
    root = shapes.parent
    data, arms = tmp_path / "data.yaml", tmp_path / "arms.yaml"
    data.write_text(f"path: {root}\nval: {root / 'images' / 'val'}\nnames: [circle, square, triangle]\n")
    arms.write_text(
        "distill: {kd: objectness, unlabeled_mode: distill}\nboth: {kd: objectness, unlabeled_mode: both}\n"
    )
    teacher = narrow_checkpoint("yolov8n", tmp_path, nc=2, names={0: "ball", 1: "box"}, width=0.25, file="other.pt")
    keys = {"unlabeled": root / "images" / "train", "class_map": "{ball: circle, box: square}"}
    given = words(tmp_path, data, (teacher, models[1]), arms=arms, seeds=1, epochs=1, **keys)
    assert main(["compare", *given]) == 0
    printed = capsys.readouterr()
    assert "FAILED" not in printed.out + printed.err
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert [arm["runs"] for arm in summary["arms"]] == [1, 1]
    assert summary["problems"] == summary["teachers"] == []
    assert any(note.startswith("The teacher other.pt has no row of its own: a model of 2") for note in summary["notes"])


def test_everything_is_checked_before_the_first_training(
    tmp_path: Path, shapes: Path, models: tuple[Path, Path]
) -> None:
    def problems(**keys: Any) -> str:
        given = {"arms": "baseline,objectness", "seeds": 1, **keys}
        comparison = parse_compare(words(tmp_path, given.pop("data", shapes), models, **given))
        with pytest.raises((ConfigError, CheckpointError)) as info:
            check_all(comparison, {run.arm.name for run in plan_runs(comparison)})
        return str(info.value)

    text = problems(teacher=tmp_path / "no.pt", student=tmp_path / "none.pt")
    assert "student=" in text
    assert "teacher=" in text
    assert "cannot be used" in problems(data=tmp_path / "no.yaml")
    two = narrow_checkpoint("yolov8n", tmp_path, nc=2, names={0: "a", 1: "b"}, file="two.pt")
    assert "none of the 3 classes" in problems(teacher=two)
    assert not (tmp_path / "c" / "runs").exists()


def test_mistakes_end_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "arms=baseline,objectnes", "seeds=0", f"project={tmp_path}"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert any("Did you mean 'objectness'?" in line for line in lines)
    assert any("seeds must be a whole number" in line for line in lines)
    assert list(tmp_path.iterdir()) == []
