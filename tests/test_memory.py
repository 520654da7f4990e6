"""Running out of memory in the first epoch, growth over thousands of steps, and what a training leaves behind."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from ultralytics.data import dataset
from ultralytics.engine import trainer as engine
from ultralytics.nn import tasks

from tests.engine.test_trainer import make, record_steps, rows_of, weights_of
from tests.support.models import narrow_checkpoint
from yolo_kd.distillation.distiller import Distiller

pytestmark = pytest.mark.e2e

RECIPE = {
    "losses": {
        "objectness": {},
        "ultralytics": {"schedule": {"kind": "linear", "start": 1.0, "end": 0.2}},
        "fgd": {},
        "mgd": {},
        "at": {"student_layers": ["model.6"], "teacher_layers": ["model.6"]},
    }
}


# --------------------------------------------------------------------------------------------------- out of memory
def runs_out(where: str, batches: set[int]) -> Callable[[Any], None]:
    """Return a callback that lets the teacher, a term or the backward pass run out of memory at the given calls."""

    def start(trainer: Any) -> None:
        seen = [0]

        def count() -> None:
            seen[0] += 1
            if seen[0] in batches:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        if where == "the teacher":
            trainer.distillation.teacher(torch.rand(2, 3, 64, 64))  # settles
            trainer.distillation.teacher.runner.model.model[12].register_forward_hook(lambda *_: count())
        elif where == "a term":
            term = trainer.distillation.distiller.losses["objectness"]
            forward = term.forward
            term.forward = lambda step: (count(), forward(step))[1]
        else:
            trainer.distillation.distiller.adapters["mlp@neck"][0][0].weight.register_hook(lambda _: count())

    return start


@pytest.mark.parametrize("where", ["the teacher", "a term", "the backward pass"])
def test_ultralytics_halves_the_batch(tmp_path: Path, shapes: Path, student: Path, teacher: Path, where: str) -> None:
    """The third batch of eight images fails; all starts over with batches of four, then once more with two."""
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE, batch=8, epochs=3)
    progress: list[float] = []
    kept: list[int] = []
    trainer.add_callback("on_train_start", runs_out(where, {2, 4}))
    trainer.add_callback("on_train_batch_end", lambda t: progress.append(t.model.criterion.progress))

    def count_kept(t: Any) -> None:
        recorder = t.distillation._observer._layers
        kept.append(len(recorder._captured) if recorder else 0)

    trainer.add_callback("on_train_epoch_start", count_kept)
    steps = record_steps(trainer)
    trainer.train()
    assert trainer.args.batch == trainer.batch_size == 2
    whole = len(steps) - 3 * 8  # batches of the two attempts that were given up
    assert 0 < whole < 4
    assert progress[whole:] == pytest.approx([(epoch + i / 8) / 3 for epoch in range(3) for i in range(8)])
    assert [r["epoch"] for r in rows_of(trainer.save_dir)] == ["1", "2", "3"]
    assert [row.term for row in trainer.distillation.audit_rows] == list(RECIPE["losses"])
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert {id(p) for p in trainer.distillation.distiller.trained_parameters()} <= set(held)
    for column in trainer.distillation.distiller.columns:
        assert [step[column] for step in steps if step[column] <= 0] == [], column
    assert not any(kept)  # an attempt that was given up leaves no maps behind
    assert trainer.distillation.guard.skipped == 0


def test_running_out_of_memory_later_is_an_error(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE)
    trainer.add_callback("on_train_start", runs_out("the teacher", {3}))  # two batches in an epoch
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    assert not any(m._forward_hooks for m in trainer.model.modules())


# --------------------------------------------------------------------------------------------------------- growth
@pytest.mark.long
@pytest.mark.timeout(2400)
def test_memory_does_not_grow(tmp_path: Path, shapes: Path) -> None:
    """At step 2,000 a training holds what it held at step 200: resident memory within 2 %, and the same objects."""
    script = Path(__file__).parent / "support" / "long_run.py"
    models = [
        narrow_checkpoint("yolov3-tiny", tmp_path, width, seed=seed, file=f"{seed}.pt")
        for seed, width in ((1, 0.125), (2, 0.0625))
    ]
    command = [sys.executable, str(script), *map(str, models), str(shapes), str(tmp_path / "runs")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr[-3000:]
    samples = json.loads((tmp_path / "runs" / "samples.json").read_text())
    print(samples)
    early, late = samples["200"], samples["2000"]
    assert abs(late[0] / early[0] - 1) < 0.02, samples
    assert late[1] <= early[1], samples  # live tensors
    assert late[2] <= early[2] * 1.01, samples  # objects that the collector knows


# -------------------------------------------------------------------------------------------------- what is left
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def hooks(*models: nn.Module) -> list[str]:
    """Return the names of the modules and parameters on which something hangs."""
    named = [pair for model in models for pair in (*model.named_modules(), *model.named_parameters())]
    return [name for name, thing in named if any(getattr(thing, kind, None) for kind in HOOKS)]


def functions() -> tuple:
    """Return everything of Ultralytics that a training replaces for a while."""
    return (
        engine.get_save_dir,
        engine.generate_ddp_command,
        engine.autocast,
        dataset.save_dataset_cache_file,
        tasks.SAFE_LOAD,
    )


def left_over() -> list[Distiller]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is Distiller]


FRESH = """
import sys
from pathlib import Path
import tests.conftest
from tests.test_memory import train_once
train_once(*map(Path, sys.argv[1:]))
"""


def train_once(folder: Path, data: Path, model: Path, teacher: Path) -> Any:
    trainer = make(folder, data, model, teacher=str(teacher), kd=RECIPE)
    trainer.train()
    return trainer


def test_a_second_training_starts_clean(tmp_path: Path, shapes: Path, student: Path, teacher: Path) -> None:
    """The first, the second, and one in a process of its own write the same weights; nothing stays hung up."""
    before, hanging = functions(), len(left_over())
    weights = []
    for name in ("first", "second"):
        trainer = train_once(tmp_path / name, shapes, student, teacher)
        assert not hooks(
            trainer.model, trainer.ema.ema, trainer.distillation.teacher.runner.model, trainer.distillation.distiller
        )
        assert trainer.model.criterion is None
        assert "forward" not in vars(trainer.distillation.teacher.runner.model.model[-1])
        assert functions() == before
        weights.append(weights_of(trainer.last))
        del trainer
    assert len(left_over()) == hanging
    arguments = map(str, (tmp_path / "fresh", shapes, student, teacher))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    fresh = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    weights.append(weights_of(tmp_path / "fresh" / "run" / "weights" / "last.pt"))
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
        assert torch.equal(tensor, weights[2][name]), name


def test_a_training_that_fails_leaves_nothing_either(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path
) -> None:
    before = functions()
    trainer = make(tmp_path, shapes, student, teacher=str(teacher), kd=RECIPE)

    def fail(_: Any) -> None:
        raise ZeroDivisionError

    trainer.add_callback("on_train_batch_end", fail)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    assert not hooks(trainer.model, trainer.distillation.teacher.runner.model, trainer.distillation.distiller)
    assert trainer.model.criterion is None
    assert functions() == before
