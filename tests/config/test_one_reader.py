"""Whichever way a training is asked for, its files are read once and its losses are constructed once."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.support.models import narrow_checkpoint
from yolo_kd import DistillationTrainer
from yolo_kd.compare.arms import parse_compare
from yolo_kd.config import source
from yolo_kd.config.train_options import parse_train
from yolo_kd.engine import checks_before, resume, setup
from yolo_kd.errors import ConfigError
from yolo_kd.losses.base import find
from yolo_kd.safe_loading import checkpoint

ONCE = {"recipe": 1, "loss": 1, "teacher opened": 1, "teacher hashed": 1, "data": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a teacher, a student, a recipe, an experiment and a file of arms."""
    here = tmp_path_factory.mktemp("one_reader")
    narrow_checkpoint("yolov8n", here, file="teacher.pt")
    narrow_checkpoint("yolov8n", here, seed=1, file="student.pt")
    (here / "recipe.yaml").write_text("losses:\n  objectness:\n    weight: 2.0\n", encoding="utf-8")
    (here / "arms.yaml").write_text("baseline:\nmine: {kd: recipe.yaml}\n", encoding="utf-8")
    return here


@pytest.fixture
def words(folder: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """The keys of a training, which the tests give in different ways."""
    monkeypatch.chdir(folder)
    return {"teacher": "teacher.pt", "data": str(shapes), "epochs": 2, "imgsz": 64, "project": str(tmp_path)}


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read, and the loss constructed."""
    found: Counter[str] = Counter()

    def count(owner: type | ModuleType, name: str, what: Callable[..., str | None]) -> None:
        original = getattr(owner, name)

        @functools.wraps(original)
        def counted(*arguments: Any, **keywords: Any) -> Any:
            if key := what(*arguments, **keywords):
                found[key] += 1
            return original(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counted)

    count(source, "parse_yaml", lambda text, name, problems: "recipe" if name == "recipe.yaml" else None)
    count(find("objectness"), "__init__", lambda *_, **__: "loss")
    for module in [
        m for n, m in sys.modules.items() if n.startswith("yolo_kd.") and hasattr(m, "load_checkpoint_file")
    ]:
        count(module, "load_checkpoint_file", lambda path, **_: "teacher opened" if _is_teacher(path) else None)
    count(checkpoint, "sha256", lambda path: "teacher hashed" if _is_teacher(path) else None)
    for module in (checks_before, resume):
        count(module, "read_dataset", lambda *_, **__: "data")
    return found


def _is_teacher(path: Any) -> bool:
    return Path(path).name == "teacher.pt"


def test_command_line(words: dict[str, Any], counts: Counter[str]) -> None:
    given = {**words, "student": "student.pt", "kd": "recipe.yaml"}
    options = parse_train([f"{key}={value}" for key, value in given.items()])
    DistillationTrainer(overrides={"kd": options})
    assert counts == ONCE


def test_python_keywords(words: dict[str, Any], counts: Counter[str]) -> None:
    DistillationTrainer(overrides={**words, "model": "student.pt", "kd": "recipe.yaml"})
    assert counts == ONCE


def test_refused_keywords(words: dict[str, Any], counts: Counter[str]) -> None:
    """A mistake in the keys is found before any model or data set is opened."""
    with pytest.raises(ConfigError, match="unknown key 'epoch'"):
        DistillationTrainer(overrides={**words, "model": "student.pt", "kd": "recipe.yaml", "epoch": 3})
    assert counts == {"recipe": 1, "loss": 1}


def test_experiment_file(words: dict[str, Any], counts: Counter[str], tmp_path: Path) -> None:
    keys = {key: value for key, value in words.items() if key != "project"}
    lines = [f"{key}: {value}\n" for key, value in {**keys, "student": "student.pt", "kd": "recipe.yaml"}.items()]
    (tmp_path / "experiment.yaml").write_text("".join(lines), encoding="utf-8")
    DistillationTrainer(overrides={"kd": parse_train([f"cfg={tmp_path}/experiment.yaml", f"project={tmp_path}"])})
    assert counts == ONCE


def test_arms_of_a_comparison(words: dict[str, Any], counts: Counter[str]) -> None:
    given = {**words, "student": "student.pt", "arms": "arms.yaml", "seeds": 2}
    comparison = parse_compare([f"{key}={value}" for key, value in given.items()])
    assert counts == {"recipe": 1, "loss": 1}
    (arm,) = [arm for arm in comparison.arms if arm.name == "mine"]
    setup.prepare(arm.options)
    assert counts == ONCE


def test_resume(words: dict[str, Any], counts: Counter[str]) -> None:
    """The recipe of a run that continues stands in its checkpoint, so no recipe file is read."""
    trainer = DistillationTrainer(overrides={**words, "model": "student.pt", "kd": "recipe.yaml"})
    trainer.last.parent.mkdir(parents=True, exist_ok=True)
    content = torch.load("student.pt", weights_only=False)
    torch.save({**content, "epoch": 0, "optimizer": {}, "train_args": vars(trainer.args)}, trainer.last)
    counts.clear()
    resumed = DistillationTrainer(overrides={"resume": str(trainer.last)})
    assert resumed.plan.to_dict() == trainer.plan.to_dict()
    assert counts == {key: number for key, number in ONCE.items() if key != "recipe"}
