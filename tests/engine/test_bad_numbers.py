"""Whole trainings that meet NaN and infinity: what is skipped, what is said, what stops, and what is restored."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.test_trainer import make, record_steps, rows_of
from yolo_kd.distillation.finite_guard import LIMIT
from yolo_kd.errors import AuditError, NumbersError

pytestmark = pytest.mark.e2e

RECIPE = {"losses": {"objectness": {}, "ultralytics": {"schedule": {"kind": "linear", "start": 1.0, "end": 0.2}}}}


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """Return what Ultralytics' logger, which does not propagate, has said."""
    logger = logging.getLogger("ultralytics")
    logger.addHandler(caplog.handler)
    yield lambda: caplog.text
    logger.removeHandler(caplog.handler)


def term_is(value: float, when: Callable[[Any, int], bool]) -> Callable[[Any], None]:
    """Return a callback that makes the term `ultralytics` yield that value in the batches that `when` chooses."""

    def start(trainer: Any) -> None:
        term = trainer.distillation.distiller.losses["ultralytics"]
        forward, seen = term.forward, [0]

        def poisoned(step: Any) -> dict:
            columns = forward(step)
            seen[0] += 1
            return {k: v * value for k, v in columns.items()} if when(trainer, seen[0]) else columns

        term.forward = poisoned

    return start


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **trainer.distillation.distiller.state_dict()}


def finite(trainer: Any) -> bool:
    return all(v.isfinite().all() for v in weights(trainer).values())


@pytest.mark.parametrize("where", ["in the middle", "at the end of an epoch"])
def test_a_bad_batch_of_one_term_is_skipped_and_counted(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, said: Callable, where: str
) -> None:
    """Four batches in an epoch, an optimiser step for each; the seventh or eighth is bad."""
    bad = {"in the middle": 7, "at the end of an epoch": 8}[where]
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4, nbs=4, epochs=3)
    states: list[dict] = []
    trainer.add_callback("on_train_start", term_is(float("nan"), lambda _, i: i == bad + 1))  # the audit is one call
    trainer.add_callback(
        "on_train_batch_end", lambda t: states.append({k: v.clone() for k, v in weights(t).items() if "bn" not in k})
    )
    steps = record_steps(trainer)
    trainer.train()
    assert len(steps) == 12
    assert all(torch.equal(states[bad - 1][k], v) for k, v in states[bad - 2].items())  # no optimiser step
    assert not all(torch.equal(states[bad][k], v) for k, v in states[bad - 1].items())
    assert finite(trainer)
    assert [r["epoch"] for r in rows_of(trainer.save_dir)] == ["1", "2", "3"]
    assert all(float(v) == float(v) for r in rows_of(trainer.save_dir) for v in r.values())
    assert "epoch 2: 1 batch was skipped because of NaN or infinity in dis_loss (1x)." in said()
    assert "1 batch was skipped in total because of NaN or infinity in dis_loss (1x)." in said()
    assert "recovering" not in said()
    assert torch.load(trainer.best, weights_only=False)["yolo_kd"]["skipped_batches"] == 1


def test_a_bad_batch_among_several_of_one_step(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, said: Callable
) -> None:
    trainer = make(
        tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4, nbs=8, epochs=2, warmup_epochs=0
    )
    trainer.add_callback("on_train_start", term_is(float("inf"), lambda _, i: i == 4))
    trainer.train()
    assert trainer.accumulate == 2
    assert finite(trainer)
    assert "epoch 1: 1 batch was skipped because of NaN or infinity in dis_loss (1x)." in said()


def test_a_bad_batch_of_the_task(tmp_path: Path, shapes: Path, student: Path, teacher: Path, said: Callable) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4, nbs=4)

    def start(t: Any) -> None:
        task_loss, seen = t.distillation.task_loss, [0]

        class Poisoned:
            loss_names = task_loss.loss_names

            def __call__(self, predictions: Any, batch: dict) -> tuple:
                loss, items = task_loss(predictions, batch)
                seen[0] += 1
                return (loss / 0, {k: v / 0 for k, v in items.items()}) if seen[0] in {1, 3} else (loss, items)

        t.distillation.task_loss = Poisoned()

    trainer.add_callback("on_train_start", start)
    trainer.train()
    assert finite(trainer)
    assert [row.term for row in trainer.distillation.audit_rows] == ["objectness", "ultralytics"]  # on the second batch
    assert "box_loss (2x), cls_loss (2x), dfl_loss (2x)." in said()


@pytest.mark.parametrize("what", ["features", "scores", "boxes"])
def test_a_teacher_that_starts_with_nan_is_refused(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, what: str
) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE)

    def spoil(t: Any) -> None:
        t.distillation.teacher(torch.rand(2, 3, 64, 64))  # settles
        layers = t.distillation.teacher.runner.model.model
        module = {"features": layers[15], "scores": layers[-1].cv3[0], "boxes": layers[-1].cv2[0]}[what]
        with torch.no_grad():
            [*module.parameters()][-1].fill_(float("nan"))

    trainer.add_callback("on_train_start", spoil)
    with pytest.raises(NumbersError, match=rf"the teacher .*model\.pt returns NaN or infinity .*{what}"):
        trainer.train()
    assert not trainer.last.exists()


def test_a_term_that_starts_with_nan_is_refused(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE)
    trainer.add_callback("on_train_start", term_is(float("nan"), lambda *_: True))
    with pytest.raises(AuditError, match="term 'ultralytics' is not finite on the first batch"):
        trainer.train()


def test_a_bad_batch_of_the_teacher_is_skipped_and_named(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, said: Callable
) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4)

    def start(t: Any) -> None:
        begin, seen = t.distillation.teacher.begin, [0]

        def poisoned(images: torch.Tensor) -> Any:
            pending = begin(images)
            seen[0] += 1
            if seen[0] == 3:
                pending.take().scores[0, 5, 1] = torch.nan
            return pending

        t.distillation.teacher.begin = poisoned

    trainer.add_callback("on_train_start", start)
    trainer.train()
    assert finite(trainer)
    assert "kcls_loss (1x)" in said()
    assert "the teacher's scores (1x)." in said()


def test_many_bad_batches_in_a_row_stop_with_the_term(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4, epochs=9)
    trainer.add_callback("on_train_start", term_is(float("nan"), lambda _, i: i > 6))
    with pytest.raises(NumbersError, match=rf"the last {LIMIT} batches in a row .* dis_loss \({LIMIT}x\)"):
        trainer.train()
    assert finite(trainer)
    assert trainer.epoch == 6
    assert trainer.last.exists()


@pytest.mark.parametrize("broken", ["the student", "the adapters"])
def test_broken_weights_are_restored_from_the_last_checkpoint(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, said: Callable, broken: str
) -> None:
    """Ultralytics goes back to last.pt; optimiser, adapters and the schedule's progress go back with it."""
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4, epochs=4)
    poisoned: list[int] = []
    progress: list[float] = []

    def poison(t: Any) -> None:
        progress.append(t.model.criterion.progress)
        if t.epoch == 2 and not poisoned:
            poisoned.append(1)
            module = t.model.model[3] if broken == "the student" else t.distillation.distiller
            with torch.no_grad():
                for p in module.parameters():
                    p.fill_(float("nan"))

    trainer.add_callback("on_train_batch_end", poison)
    restored: list[bool] = []
    trainer.add_callback("on_train_epoch_start", lambda t: restored.append(finite(t)))
    trainer.train()
    assert "Loss NaN/Inf detected (attempt 1/3), recovering from last.pt" in said()
    assert "epoch 3: 3 batches were skipped" in said()
    assert restored == [True] * 5
    assert finite(trainer)
    assert [r["epoch"] for r in rows_of(trainer.save_dir)] == ["1", "2", "3", "4"]
    assert progress == pytest.approx([(epoch + i / 4) / 4 for epoch in (0, 1, 2, 2, 3) for i in range(4)])


def test_weights_that_break_in_the_first_epoch_stop_the_run(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=4)

    def poison(t: Any) -> None:
        with torch.no_grad():
            next(t.model.parameters()).fill_(float("nan"))

    trainer.add_callback("on_train_batch_end", poison)
    with pytest.raises(NumbersError, match=r"epoch 1: 3 batches were .*no longer finite \(model\.0\.conv\.weight\)"):
        trainer.train()
