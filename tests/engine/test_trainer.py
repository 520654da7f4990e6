"""Whole trainings on a drawn set: columns, checkpoints, resume, and the comparison with Ultralytics' own trainer."""

from __future__ import annotations

import copy
import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel

from tests.support.models import narrow_checkpoint
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import AuditError, CheckpointError, ConfigError, PairError
from yolo_kd.safe_loading.checkpoint import sha256

pytestmark = pytest.mark.e2e

FAST = {
    "imgsz": 64,
    "batch": 8,
    "epochs": 2,
    "workers": 0,
    "plots": False,
    "seed": 3,
    "optimizer": "AdamW",
    "lr0": 1e-3,
}


def make(folder: Path, data: Path, model: Path, cls: type = DistillationTrainer, **keys: Any) -> DetectionTrainer:
    """Return a trainer that writes to folder/run."""
    overrides = {
        **FAST,
        "data": str(data),
        "model": str(model),
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
    }
    return cls(overrides={**overrides, **keys})


def record_steps(trainer: DetectionTrainer) -> list[dict[str, float]]:
    """Return a list that fills with the loss items of every batch."""
    steps: list[dict[str, float]] = []
    trainer.add_callback("on_train_batch_end", lambda t: steps.append({k: float(v) for k, v in t.loss_items.items()}))
    return steps


def trained(folder: Path, data: Path, model: Path, **keys: Any) -> tuple:
    """Make a trainer, ours if there is a kd key, and train at once: making it seeds the random numbers."""
    trainer = make(folder, data, model, DistillationTrainer if "kd" in keys else DetectionTrainer, **keys)
    steps = record_steps(trainer)
    trainer.train()
    return trainer, steps


def rows_of(folder: Path) -> list[dict[str, str]]:
    with open(folder / "results.csv") as file:
        return list(csv.DictReader(file))


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return YOLO(path).model.float().state_dict()


def test_without_a_teacher_it_is_ultralytics_trainer(tmp_path: Path, shapes: Path, student: Path) -> None:
    theirs, their_steps = trained(tmp_path / "theirs", shapes, student)
    ours, our_steps = trained(tmp_path / "ours", shapes, student, kd="none")
    assert their_steps == our_steps
    for (name, a), b in zip(weights_of(theirs.last).items(), weights_of(ours.last).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_recipe_ultralytics_trains_like_distill_model(tmp_path: Path, shapes: Path, family: str) -> None:
    """Equal seed and teacher: the same loss in every step, from the random projector to the last batch."""
    teacher = narrow_checkpoint(family, tmp_path, width=0.25, seed=1, file="teacher.pt")
    student = narrow_checkpoint(family, tmp_path, seed=2, file="student.pt")
    _, theirs = trained(tmp_path / "theirs", shapes, student, distill_model=str(teacher), epochs=3)
    _, ours = trained(tmp_path / "ours", shapes, student, teacher=str(teacher), kd="ultralytics", epochs=3)
    curves = [theirs, ours]
    assert len(curves[0]) == len(curves[1]) == 6
    for step, (a, b) in enumerate(zip(*curves, strict=True)):
        assert list(a) == list(b)
        for column in a:
            assert b[column] == pytest.approx(a[column], rel=2e-3), (step, column)
    assert curves[1][0]["dis_loss"] == pytest.approx(curves[0][0]["dis_loss"], rel=1e-5)


def test_terms_are_columns_everywhere(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    seen: list[dict] = []
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="objectness", plots=True)
    trainer.add_callback("on_fit_epoch_end", lambda t: seen.append(t.label_loss_items(t.tloss)))
    trainer.train()
    rows = rows_of(trainer.save_dir)
    assert [r["epoch"] for r in rows] == ["1", "2"]
    for column in ("train/kcls_loss", "train/kbox_loss"):
        assert all(float(r[column]) > 0 for r in rows)
        assert column in seen[0]
    assert not any(name.startswith("val/k") for name in rows[0])
    assert {"val/box_loss", "val/cls_loss", "val/dfl_loss"} <= set(rows[0])
    assert "kcls_loss" in trainer.progress_string()
    assert (trainer.save_dir / "results.png").stat().st_size > 10_000
    saved = yaml.safe_load((trainer.save_dir / "kd.yaml").read_text())
    assert saved["teacher_sha256"] == sha256(teacher)
    assert saved["recipe"]["losses"]["objectness"]["weight"] == 1.0
    assert [row.term for row in trainer.distillation.audit_rows] == ["objectness"]


PLAIN = """
import sys
sys.modules["yolo_kd"] = None  # importing it would fail
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel
import torch
model = YOLO(sys.argv[1])
assert type(model.model) is DetectionModel
assert getattr(model.model, "criterion", None) is None
assert not any(m._forward_hooks for m in model.model.modules())
model.predict(torch.zeros(1, 3, 64, 64), verbose=False)
print(sum(p.numel() for p in model.model.parameters()))
"""


def test_every_checkpoint_is_plain_at_any_moment(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    """Mid-run files included: they load without yolo_kd, restrictedly, and hold a student's parameters only."""
    copies: list[Path] = []

    def keep(trainer: Any) -> None:
        for file in sorted(trainer.wdir.glob("*.pt")):
            copy = tmp_path / f"{len(copies)}-{file.name}"
            copy.write_bytes(file.read_bytes())
            copies.append(copy)

    recipe = {
        "losses": {
            "objectness": {},
            "ultralytics": {},
            "at": {"student_layers": ["model.9"], "teacher_layers": ["model.9"]},
        }
    }
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=recipe, save_period=1)
    trainer.add_callback("on_model_save", keep)
    trainer.train()
    expected = str(sum(p.numel() for p in YOLO(student).model.parameters()))
    environment = {**os.environ, "ULTRALYTICS_SAFE_LOAD": "1"}
    picks = [copies[0], copies[-1], trainer.last, trainer.best]
    assert {p.name.split("-")[-1] for p in copies} >= {"last.pt", "best.pt", "epoch0.pt"}
    for file in picks:
        found = subprocess.run(
            [sys.executable, "-c", PLAIN, str(file)], capture_output=True, text=True, env=environment, check=False
        )
        assert found.returncode == 0, found.stderr
        assert found.stdout.split()[-1] == expected
    mid = torch.load(copies[0], map_location="cpu", weights_only=False)
    final = torch.load(trainer.best, map_location="cpu", weights_only=False)
    assert "yolo_kd" in mid["optimizer"]
    assert final["optimizer"] is None
    assert final["yolo_kd"]["teacher_sha256"] == sha256(teacher)
    assert type(trainer.model) is DetectionModel
    assert not any(m._forward_hooks for m in trainer.model.modules())


class Stopped(RuntimeError):
    """Raised by a test to end a training as a power cut would."""


def stop_after(epoch: int) -> Any:
    def callback(trainer: Any) -> None:
        if trainer.epoch + 1 == epoch:
            raise Stopped

    return callback


def interrupted(folder: Path, data: Path, model: Path, after: int = 2, **keys: Any) -> Path:
    """Train until the checkpoint of epoch `after` is written, and return it."""
    trainer = make(folder, data, model, **{"epochs": 4, **keys})
    trainer.add_callback("on_fit_epoch_end", stop_after(after))
    with pytest.raises(Stopped):
        trainer.train()
    return trainer.last


@pytest.mark.parametrize("family", ["yolov8n", "yolo26n"])
def test_resume_restores_everything(tmp_path: Path, shapes: Path, family: str) -> None:
    teacher = narrow_checkpoint(family, tmp_path, width=0.25, seed=1, file="teacher.pt")
    student = narrow_checkpoint(family, tmp_path, seed=2, file="student.pt")
    recipe = {"losses": {"ultralytics": {"weight": 0.5, "schedule": {"kind": "linear", "end": 0.0}}}}
    last = interrupted(tmp_path, shapes, student, teacher=str(teacher), kd=recipe)
    saved = torch.load(last, map_location="cpu", weights_only=False)
    resumed = DistillationTrainer(overrides={"resume": str(last)})
    restored: dict[str, Any] = {}

    def look(trainer: Any) -> None:
        restored["adapters"] = {k: v.clone() for k, v in trainer.distillation.distiller.state_dict().items()}
        restored["optimizer"] = trainer.optimizer.state_dict()
        restored["epoch"] = trainer.start_epoch
        restored["updates"] = trainer.ema.updates
        restored["criterion"] = type(trainer.model.criterion).__name__

    resumed.add_callback("on_train_start", look)
    steps = record_steps(resumed)
    resumed.train()
    assert restored["criterion"] == "DistillationCriterion"
    assert restored["epoch"] == 2
    assert restored["updates"] == saved["updates"]
    for name, tensor in saved["optimizer"]["yolo_kd"].items():
        assert torch.equal(restored["adapters"][name], tensor), name
    assert len(restored["optimizer"]["state"]) == len(saved["optimizer"]["state"])
    assert resumed.plan.recipe.to_dict()["losses"]["ultralytics"]["weight"] == 0.5
    assert [r["epoch"] for r in rows_of(resumed.save_dir)] == ["1", "2", "3", "4"]
    # the schedule goes on at half way, it does not begin anew: 1 -> 0 over the whole run
    values = [float(r["train/dis_loss"]) for r in rows_of(resumed.save_dir)]
    assert values[2] < 0.75 * values[0]
    assert values[3] < 0.5 * values[0]
    assert all(step["dis_loss"] > 0 for step in steps)


def test_weights_that_set_themselves_are_logged_and_resumed(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    keys = {"teacher": str(teacher), "kd": "fgd", "kd.fgd.weight": "auto", "kd.fgd.ratio": 0.5}
    last = interrupted(tmp_path, shapes, student, **keys)
    saved = torch.load(last, map_location="cpu", weights_only=False)["optimizer"]["yolo_kd"]
    resumed = DistillationTrainer(overrides={"resume": str(last)})
    restored: dict[str, Any] = {}
    resumed.add_callback(
        "on_train_start", lambda t: restored.update(copy.deepcopy(t.distillation.distiller.auto.state_dict()))
    )
    resumed.train()
    assert restored["_extra_state"] == saved["auto._extra_state"] == 4  # two batches in each of two epochs
    assert torch.equal(restored["log_weight"], saved["auto.log_weight"])
    assert torch.equal(restored["count"], saved["auto.count"])
    rows = rows_of(resumed.save_dir)
    weights = [float(row["train/fgd_w"]) for row in rows]
    assert all(weight != 1.0 for weight in weights)
    assert not any(name.startswith("val/fgd") for name in rows[0])
    assert "fgd_w" in resumed.progress_string()
    assert resumed.plan.recipe.terms[0].ratio == 0.5
    assert yaml.safe_load((resumed.save_dir / "kd.yaml").read_text())["recipe"]["losses"]["fgd"]["weight"] == "auto"


def test_resume_checks_the_teacher(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    moving = tmp_path / "teacher.pt"
    moving.write_bytes(teacher.read_bytes())
    last = interrupted(tmp_path, shapes, student, after=1, teacher=str(moving), kd="objectness")
    other = narrow_checkpoint("yolov8n", tmp_path, width=0.25, seed=9, file="other.pt")
    with pytest.raises(CheckpointError, match="is not the file this run began with"):
        DistillationTrainer(overrides={"resume": str(last), "teacher": str(other)})
    moving.rename(tmp_path / "moved.pt")
    with pytest.raises(CheckpointError, match=r"is gone. If it has moved, add teacher="):
        DistillationTrainer(overrides={"resume": str(last)})
    trainer = DistillationTrainer(overrides={"resume": str(last), "teacher": str(tmp_path / "moved.pt")})
    trainer.train()
    assert len(rows_of(trainer.save_dir)) == 4


def test_resume_from_a_plain_checkpoint_is_refused(tmp_path: Path, shapes: Path, student: Path) -> None:
    last = interrupted(tmp_path, shapes, student, after=1, kd="none")
    with pytest.raises(CheckpointError, match="was not written by a distillation"):
        DistillationTrainer(overrides={"resume": str(last)})
    trainer = DistillationTrainer(overrides={"resume": str(last), "kd": "none"})
    trainer.train()
    assert len(rows_of(trainer.save_dir)) == 4
    with pytest.raises(CheckpointError, match="is a finished training"):
        DistillationTrainer(overrides={"resume": str(last), "kd": "none"})


def test_recovery_from_nan_restores_adapters(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="ultralytics", epochs=3)
    poisoned: list[int] = []

    def poison(t: Any) -> None:
        if t.epoch == 1 and not poisoned:
            poisoned.append(1)
            t.loss = t.loss * float("nan")
            with torch.no_grad():
                for p in t.distillation.distiller.parameters():
                    p.fill_(float("nan"))

    trainer.add_callback("on_train_epoch_end", poison)
    trainer.train()
    assert poisoned
    assert all(torch.isfinite(p).all() for p in trainer.distillation.distiller.parameters())
    assert [r["epoch"] for r in rows_of(trainer.save_dir)] == ["1", "2", "3"]


def test_layers_by_name_and_inside_the_head(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    recipe = {
        "losses": {
            "mimic": {"student_layers": ["model.4", "model.6"], "teacher_layers": ["model.4", "model.6"]},
            "crosskd": {},
            "cwd": {"levels": ["p4"]},
        }
    }
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=recipe, teacher_precision="fp32")
    trainer.train()
    assert [row.term for row in trainer.distillation.audit_rows] == ["mimic", "crosskd", "cwd"]
    assert all(row.gradient > 0 for row in trainer.distillation.audit_rows)
    assert all(0 < row.share < 1e4 for row in trainer.distillation.audit_rows), (
        "where a term reads, the task loss passes as well"
    )
    assert not any(m._forward_hooks for m in trainer.model.modules())


def test_training_keys_of_ultralytics_work(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    keys = {
        "multi_scale": 0.5,
        "freeze": 5,
        "close_mosaic": 1,
        "val": False,
        "cos_lr": True,
        "cls_pw": 0.5,
        "rect": True,
    }
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="objectness", **keys)
    trainer.train()
    assert trainer.best.exists()


@pytest.mark.parametrize("channels_last", [None, False])
def test_bfloat16_on_the_cpu(
    channels_last: bool | None, tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    from yolo_kd.environment import cpu_has_bf16

    if not cpu_has_bf16():
        pytest.skip("this processor has no bfloat16 instructions")
    seen: set[tuple[torch.dtype, bool]] = set()
    keys = {"amp": "bf16", "device": "cpu", "channels_last": channels_last}
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="ultralytics", **keys)

    def look(module: Any, _inputs: Any, output: torch.Tensor) -> None:
        if module.training:
            seen.add((output.dtype, output.is_contiguous()))

    trainer.add_callback("on_train_start", lambda t: t.model.model[4].register_forward_hook(look))
    trainer.add_callback("on_train_end", lambda t: t.model.model[4]._forward_hooks.clear())
    trainer.train()
    assert seen == {(torch.bfloat16, channels_last is False)}
    assert trainer.args.amp == "bf16"
    saved = torch.load(trainer.last, weights_only=False)["model"]
    assert all(tensor.is_contiguous() for tensor in saved.state_dict().values())


def test_from_python_as_ultralytics_users_would(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    model = YOLO(student)
    keys = {**FAST, "data": str(shapes), "project": str(tmp_path), "epochs": 1}
    model.train(
        trainer=DistillationTrainer, teacher=str(teacher), kd="objectness", **{"kd.objectness.weight": 0.5}, **keys
    )
    assert model.trainer.plan.recipe.terms[0].weight == 0.5
    assert type(model.model) is DetectionModel
    assert model.predict(torch.zeros(1, 3, 64, 64), verbose=False)


def test_nothing_is_made_when_the_input_is_bad(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    other = narrow_checkpoint("yolov8n", tmp_path / "models", nc=2, names={0: "a", 1: "b"})
    bad: list[tuple[type[Exception], str, dict]] = [
        (
            PairError,
            r"none of the 3 classes of data=.* \(circle, .* the teacher's 2 \(a, b\)",
            {"teacher": str(other), "kd": "objectness"},
        ),
        (ConfigError, "no teacher", {}),
        (ConfigError, "kd is given but no teacher", {"kd": "objectness"}),
        (ConfigError, "random_teacher=true", {"teacher": "yolov8s.yaml"}),
        (ConfigError, "write teacher= with kd=ultralytics", {"distill_model": str(teacher)}),
        (CheckpointError, "does not exist", {"teacher": str(tmp_path / "no.pt")}),
        (PairError, "hides the gradients", {"teacher": str(teacher), "kd.objectness.weight": "auto", "compile": True}),
        (PairError, "levels of stride", {"teacher": "yolov8n-p6.yaml", "random_teacher": True}),
    ]
    for error, message, keys in bad:
        with pytest.raises(error, match=message):
            make(tmp_path / "out", shapes, student, **keys)
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_learns_is_an_error(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd="objectness", epochs=1)

    def meddle(t: Any) -> None:
        with torch.no_grad():
            next(t.distillation.teacher.runner.model.parameters()).add_(1)

    trainer.add_callback("on_train_end", meddle)
    with pytest.raises(AuditError, match="changed during training"):
        trainer.train()
