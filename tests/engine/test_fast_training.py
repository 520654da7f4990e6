"""Whole trainings with the keys that make them faster, against trainings without."""

from __future__ import annotations

import csv
import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics.engine import trainer as engine

from tests.engine.test_trainer import make
from yolo_kd.config.speed import SPEED_KEYS
from yolo_kd.distillation.memory_probe import MemoryProbe
from yolo_kd.distillation.teacher import Pending
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.upstream.heads import head_split_points
from yolo_kd.upstream.recorders import outputs_of

pytestmark = pytest.mark.e2e

RECIPE = {"losses": {"objectness": {}, "ultralytics": {}, "fgd": {}, "crosskd": {}}}


def losses_of(trainer: Any) -> list[dict[str, float]]:
    """Train and return the loss items of every step."""
    steps: list[dict[str, float]] = []
    trainer.add_callback("on_train_batch_end", lambda t: steps.append({k: float(v) for k, v in t.loss_items.items()}))
    trainer.train()
    return steps


def test_ten_steps_are_those_of_the_plain_teacher(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fused, channels-last and without what nobody reads, in float32: the same losses as Ultralytics' plain model."""
    keys = {"teacher": str(teacher), "kd": RECIPE, "batch": 4, "epochs": 3, "val": False, "nbs": 4}
    keys |= {"optimizer": "SGD", "lr0": 1e-4, "momentum": 0.0, "warmup_epochs": 0}  # others blow up rounding
    keys |= {"threads": 2}
    fast = make(tmp_path / "fast", shapes, student, teacher_precision="fp32", **keys)
    ours = losses_of(fast)[:10]
    plain = make(tmp_path / "plain", shapes, student, teacher_precision="fp32", **keys)
    model = load_detector(teacher, role="teacher").model.float().eval()

    def begin(images: torch.Tensor) -> Pending:
        frozen = plain.distillation.teacher
        if frozen._build is not None:
            frozen._settle(images, frozen._build)  # crosskd runs the end of its head
        split = head_split_points(model)
        captured: dict[str, torch.Tensor] = {}
        handles = [
            m.register_forward_hook(lambda _m, _i, o, k=k: captured.update({k: o.clone()})) for k, m in split.items()
        ]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            out = model(images)
        for handle in handles:
            handle.remove()
        return Pending(outputs_of(out, model, captured))

    plain.add_callback("on_train_start", lambda t: monkeypatch.setattr(t.distillation.teacher, "begin", begin))
    theirs = losses_of(plain)[:10]
    assert len(ours) == len(theirs) == 10
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-8)  # logits are near 7: KL rounds there


def test_threads(tmp_path: Path, shapes: Path, student: Path) -> None:
    before = torch.get_num_threads()
    trainer = make(tmp_path, shapes, student, kd="none", threads=before + 1, epochs=1, val=False)
    seen: list[int] = []
    trainer.add_callback("on_train_batch_end", lambda _: seen.append(torch.get_num_threads()))
    trainer.train()
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


def test_keys_are_kept_for_resume(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    keys = {"teacher_precision": "fp32", "teacher_channels_last": False, "threads": 1}
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="objectness", val=False, **keys)
    trainer.train()
    assert trainer.distillation.teacher.runner.way.channels_last is False
    saved = yaml.safe_load((trainer.save_dir / "kd.yaml").read_text())["speed"]
    assert {k: saved[k] for k in keys} == keys
    assert saved.keys() == SPEED_KEYS.keys()


def test_a_resumed_run_goes_on_the_way_that_was_settled(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="objectness", val=False)
    trainer.add_callback("on_model_save", lambda t: shutil.copy(t.last, tmp_path / "mid.pt"))
    trainer.train()
    way = trainer.distillation.teacher.runner.way
    kept = torch.load(tmp_path / "mid.pt", map_location="cpu", weights_only=False)["train_args"]["kd"]["speed"]
    assert (kept["teacher_precision"], kept["teacher_channels_last"]) == (way.precision, way.channels_last)
    assert yaml.safe_load((trainer.save_dir / "kd.yaml").read_text())["speed"]["teacher_precision"] == "auto"


DEEP = {"losses": {"mimic": {"student_layers": ["model.9"], "teacher_layers": ["model.9"]}}}


@pytest.mark.parametrize("kd", ["crosskd", DEEP], ids=["crosskd", "layers"])
def test_automatic_batch_size_measures_the_whole_step(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, kd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[MemoryProbe] = []

    def probe(model: MemoryProbe, imgsz: int, **_keys: Any) -> int:
        seen.append(model)
        copy = deepcopy(model).train()
        copy(torch.full((2, 3, imgsz, imgsz), torch.nan)).backward()
        assert all(p.grad is not None for p in copy.distiller.parameters())
        assert all(p.grad is None for p in model.parameters())
        return 4

    monkeypatch.setattr(engine, "check_train_batch_size", probe)
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=kd, batch=-1, epochs=1, teacher_precision="fp32")
    trainer.train()
    assert len(seen) == 1
    assert trainer.batch_size == 4
    assert not isinstance(trainer.model, MemoryProbe)
    with open(trainer.save_dir / "results.csv") as file:
        assert len(list(csv.DictReader(file))) == 1
