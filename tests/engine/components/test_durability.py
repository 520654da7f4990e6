"""Trainings that are killed, stopped and starved of disk: what is left, and how the run goes on."""

from __future__ import annotations

import csv
import math
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ultralytics import YOLO
from ultralytics.engine import trainer as engine
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn import tasks

from tests.support.forked import Server, Writes
from tests.support.models import narrow_checkpoint
from yolo_kd.engine.component import Hosted
from yolo_kd.engine.components.durability import Durability
from yolo_kd.engine.run_files import damage, previous_of
from yolo_kd.engine.signals import Interrupted, Terminated
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import CheckpointError, SaveError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")

FAST = {"imgsz": 64, "batch": 8, "nbs": 8, "workers": 0, "plots": False, "seed": 3, "optimizer": "AdamW", "lr0": 1e-3}
FAST |= {"teacher_precision": "fp32", "teacher_channels_last": True}  # on models so small the clock would decide


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with Server() as started:
        yield started


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {
        "teacher": str(narrow_checkpoint("yolov8n", folder, width=0.25, seed=1, file="teacher.pt")),
        "student": str(narrow_checkpoint("yolov8n", folder, seed=2, file="student.pt")),
    }


class Run:
    """A run in a folder of its own: its command, and what it has written."""

    def __init__(self, folder: Path, data: Path, models: dict[str, str], **keys: Any):
        self.folder = folder / "run"
        given = {**FAST, **models, "kd": "ultralytics", "data": data, "epochs": 3, **keys}
        place = {"project": folder, "name": "run", "exist_ok": True}
        self.overrides = {**given, **place}
        self.command = ["train", *(f"{k}={v}" for k, v in self.overrides.items())]
        self.last = self.folder / "weights" / "last.pt"
        self.log = folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def keys(self) -> dict[str, Any]:
        """The command as a trainer takes it."""
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in self.overrides.items()}
        return {("model" if k == "student" else k): v for k, v in plain.items()}

    @property
    def resume(self) -> list[str]:
        return ["train", f"resume={self.last}"]

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def rows(self) -> list[dict[str, str]]:
        with open(self.folder / "results.csv") as file:
            return list(csv.DictReader(file))

    def epochs(self) -> list[int]:
        return [int(row["epoch"]) for row in self.rows()]

    def finished(self) -> int:
        """Number of rows in the table, the one that is being written included."""
        table = self.folder / "results.csv"
        return max(len(table.read_text().splitlines()) - 1, 0) if table.exists() else 0

    def saved(self, name: str = "last.pt") -> dict[str, Any]:
        return torch.load(self.last.with_name(name), map_location="cpu", weights_only=False)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return YOLO(path).model.float().state_dict()


class Stopped(RuntimeError):
    """Ends a training in this process at the end of an epoch, the gentlest way there is."""


def train_here(run: Run, resume: bool, until: int | None) -> None:
    """Train in this process, up to the checkpoint of an epoch or to the end."""
    trainer = DistillationTrainer(overrides={"resume": str(run.last)} if resume else run.keys)

    def stop(t: Any) -> None:
        if t.epoch + 1 == until:
            raise Stopped

    if until is not None:
        trainer.add_callback("on_fit_epoch_end", stop)
        with pytest.raises(Stopped):
            trainer.train()
    else:
        trainer.train()


def distance(a: Path, b: Path, start: Path) -> float:
    """Return how far two students are from each other, as a part of how far the second one is from the start."""
    one, two, zero = (
        torch.cat([v.flatten().double() for k, v in weights_of(p).items() if "num_batches" not in k])
        for p in (a, b, start)
    )
    return float((one - two).norm() / (two - zero).norm())


KILLS = 30
EPOCHS = 50


@pytest.mark.long
@pytest.mark.timeout(3000)
@pytest.mark.e2e
def test_thirty_kills_cost_nothing_but_the_resumes(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server, record_property: Any
) -> None:
    """Killed at random moments and in the middle of writing, a run ends as one that was stopped between epochs.

    The comparison is exact: a run in this process is stopped gently after the epochs from which the killed run went on,
    and resumed there. A kill may cost nothing beyond what a resume costs anyway.
    """
    run = Run(tmp_path / "killed", shapes, models, epochs=EPOCHS)
    chance = random.Random(0)
    started = time.monotonic()
    weights = run.last.parent
    weights.mkdir(parents=True)
    writes = Writes(weights)
    span, went_on_from, in_writing = 0.0, [], 0
    for kill in range(KILLS):
        saved = run.saved()["epoch"] + 1 if run.last.exists() else 0
        went_on_from.append(saved)
        begun = time.time()
        child = server.start(run.resume if saved else run.command, run.log)
        if kill % 2 == 0:
            writes.wait_for("last.pt.partial", 3 if kill == 0 else chance.randint(1, 2), child)
        else:
            # a random moment, and on a machine that has become faster before it gets ahead: epochs must be left
            end = time.time() + chance.uniform(0, 1.5 * span)
            while time.time() < end and run.finished() < 1.5 * kill:
                time.sleep(0.01)
        child.send(signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL, run.output[-3000:]
        span = span or time.time() - begun
        in_writing += any(file.stat().st_mtime > begun for file in weights.glob("*.partial"))
        for file in weights.glob("*.pt"):
            assert not damage(file), f"kill {kill} left half of {file.name}"
    writes.close()
    went_on_from.append(run.saved()["epoch"] + 1)
    print(f"{time.monotonic() - started:.0f} s for {KILLS} kills, at epoch {went_on_from[-1]}, {in_writing} in writing")
    assert server.run(run.resume, run.log) == 0, run.output[-3000:]

    assert run.epochs() == [*range(1, EPOCHS + 1)]
    times = [float(row["time"]) for row in run.rows()]
    assert times == sorted(times)
    assert in_writing  # half of the kills aim at it; what every step of writing leaves is in test_saving.py
    assert not [*weights.glob("*.partial")]
    assert not previous_of(run.last).exists()
    assert {p.name for p in weights.iterdir()} == {"last.pt", "best.pt"}

    gentle = Run(tmp_path / "gentle", shapes, models, epochs=EPOCHS)
    stops = sorted(set(went_on_from) - {0})
    for number, until in enumerate([*stops, None]):
        train_here(gentle, resume=number > 0, until=until)
    whole = Run(tmp_path / "whole", shapes, models, epochs=EPOCHS)
    assert server.run(whole.command, whole.log) == 0
    for name in ("last.pt", "best.pt"):
        mine, theirs = (weights_of(r.last.with_name(name)) for r in (run, gentle))
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs), name
    for mine, theirs in zip(run.rows(), gentle.rows(), strict=True):
        assert {k: v for k, v in mine.items() if k != "time"} == {k: v for k, v in theirs.items() if k != "time"}
    away = distance(run.last, whole.last, Path(models["student"]))
    print(f"{len(stops)} resumes, {in_writing} kills while writing, distance {away:.3f}")


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.e2e
def test_sigterm_saves_says_how_to_go_on_and_exits_with_143(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server
) -> None:
    run = Run(tmp_path, shapes, models, epochs=200)
    child = server.start(run.command, run.log)
    child.wait_for("2/200")
    child.send(signal.SIGTERM)
    assert child.wait() == 143, run.output[-3000:]
    assert "SIGTERM: finishing this batch and saving; a second signal ends at once." in run.output
    said = f"Continue with: yolo-kd train resume={run.last}"
    assert said in run.output
    assert "Traceback" not in run.output
    before = len(run.rows())
    assert not damage(run.last)
    assert YOLO(run.last).predict(torch.zeros(1, 3, 64, 64), verbose=False)
    child = server.start(run.resume, run.log)
    child.wait_for(f"{before + 2}/200")
    child.send(signal.SIGINT)
    assert child.wait() == 130, run.output[-3000:]
    assert said in run.output
    assert run.epochs() == [*range(1, len(run.rows()) + 1)]
    assert len(run.rows()) > before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.e2e
def test_a_signal_to_workers_as_well_stops_it_as_gently(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server, number: int
) -> None:
    """A terminal and Slurm signal every process of a job: those that load data may die before the batch is over."""
    run = Run(tmp_path, shapes, models, epochs=200, batch=2)
    child = server.start(run.command, run.log, workers=2)
    child.wait_for("2/200")
    assert "Using 2 dataloader workers" in run.output
    child.send(number, group=True)
    assert child.wait() == 128 + number, run.output[-3000:]
    assert f"Continue with: yolo-kd train resume={run.last}" in run.output
    assert not damage(run.last)
    assert "yolo_kd_position" in run.saved() or run.saved()["epoch"] + 1 == len(run.rows())
    finished = len(run.rows())
    child = server.start(run.resume, run.log, workers=2)
    child.wait_for(f"{finished + 2}/200")
    child.send(signal.SIGKILL, group=True)
    child.wait()
    assert run.epochs()[: finished + 1] == [*range(1, finished + 2)]


@pytest.mark.e2e
def test_a_second_signal_ends_at_once(tmp_path: Path, shapes: Path, models: dict[str, str], server: Server) -> None:
    run = Run(tmp_path, shapes, models, epochs=200)
    for number, code in ((signal.SIGTERM, -signal.SIGTERM), (signal.SIGINT, 130)):
        child = server.start(run.command, run.log)
        child.wait_for("2/200")
        os.kill(child.pid, signal.SIGSTOP)  # so that both are there before it can finish the batch
        child.send(number)
        child.send({signal.SIGTERM: signal.SIGINT, signal.SIGINT: signal.SIGTERM}[number])
        os.kill(child.pid, signal.SIGCONT)
        # which of the two Python sees first is not ours to say: the second one decides how it ends
        assert child.wait() in {-signal.SIGTERM, 130, code}, run.output[-3000:]
        assert "Continue with" not in run.output
        assert not damage(run.last)


@pytest.mark.e2e
def test_before_the_first_batch_a_signal_ends_at_once(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server
) -> None:
    run = Run(tmp_path, shapes, models)
    child = server.start(run.command, run.log)
    child.wait_for("Distilling ultralytics")
    child.send(signal.SIGTERM)
    assert child.wait() == 143, run.output[-3000:]
    assert not run.last.exists()
    assert server.run(run.resume, run.log) == 2
    assert "this run ended before its first checkpoint, so there is nothing to resume. Start it again" in run.output
    assert server.run(run.command, run.log) == 0
    assert run.epochs() == [1, 2, 3]


MOMENTS = {
    "first batch": ("on_train_batch_end", 0, 1),
    "inside the first epoch": ("on_train_batch_end", 0, 3),
    "inside the second epoch": ("on_train_batch_end", 1, 5),
    "last batch of an epoch": ("on_train_batch_end", 1, 8),
    "validation": ("on_val_batch_start", 1, 1),
    "between epochs": ("on_fit_epoch_end", 1, 1),
    "last epoch": ("on_train_batch_end", 2, 6),
    "final validation": ("on_val_batch_start", 3, 1),
}


@pytest.mark.parametrize("kd", ["ultralytics", "none"])
@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.e2e
def test_a_stopped_run_trains_every_batch_once(
    tmp_path: Path, shapes: Path, models: dict[str, str], moment: str, kd: str
) -> None:
    """Three epochs of eight batches are twenty-four steps, wherever a signal fell; the table has every epoch once."""
    event, epoch, count = MOMENTS[moment]
    given = models if kd != "none" else {"student": models["student"]}
    run = Run(tmp_path, shapes, given, kd=kd, batch=2, nbs=2)
    steps: list[dict[str, float]] = []
    calls: list[int] = []

    def step(trainer: Any) -> None:
        steps.append({k: float(v) for k, v in trainer.loss_items.items()})

    def strike(_caller: Any) -> None:
        at = first.epoch if event != "on_val_batch_start" else first.validated
        if at == epoch:
            calls.append(1)
            if len(calls) == count:
                signal.raise_signal(signal.SIGTERM)

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)}
    first: Any = DistillationTrainer(overrides=run.keys)
    first.validated = -1
    first.add_callback("on_train_batch_end", step)
    first.add_callback("on_val_start", lambda _: setattr(first, "validated", first.validated + 1))
    first.add_callback(event, strike)
    with pytest.raises(Terminated, match=rf"Stopped by SIGTERM.*Continue with: yolo-kd train .*resume={run.last}"):
        first.train()
    assert {n: signal.getsignal(n) for n in before} == before
    done = len(steps)
    second: Any = DistillationTrainer(overrides={"resume": str(run.last), **({"kd": "none"} if kd == "none" else {})})
    progress: list[float] = []
    second.add_callback("on_train_batch_end", step)
    if kd != "none":
        second.add_callback("on_train_batch_end", lambda t: progress.append(t.model.criterion.progress))
    second.train()

    repeated = 1 if moment in {"last batch of an epoch", "validation"} else 0  # Ultralytics' epoch needs a batch
    assert len(steps) == 24 + repeated
    assert run.epochs() == [1, 2, 3]
    assert [float(r["time"]) for r in run.rows()] == sorted(float(r["time"]) for r in run.rows())
    if kd != "none":
        assert progress == pytest.approx([i / 24 for i in range(done - repeated, 24)])
    for number, row in enumerate(run.rows()):
        if repeated and number >= 1:
            continue
        mean = sum(s["box_loss"] for s in steps[number * 8 : number * 8 + 8]) / 8
        assert float(row["train/box_loss"]) == pytest.approx(mean, rel=1e-3)
    assert run.saved()["optimizer"] is None
    assert "yolo_kd_position" not in run.saved()
    assert not previous_of(run.last).exists()


def _without_groups(state: dict[str, Any]) -> None:
    del state["param_groups"]


def _fewer_weights(state: dict[str, Any]) -> None:
    state["param_groups"][0]["params"].pop()


def _other_shape(state: dict[str, Any]) -> None:
    next(s for s in state["state"].values() if "exp_avg" in s)["exp_avg"] = torch.zeros(7)


def _no_tensors(state: dict[str, Any]) -> None:
    state["state"] = {0: "nothing"}


def _no_adapters(state: dict[str, Any]) -> None:
    state["yolo_kd"] = {"adapters.x": torch.zeros(1)}


@pytest.mark.e2e
def test_damaged_training_state_is_a_sentence(tmp_path: Path, shapes: Path, models: dict[str, str]) -> None:
    run = Run(tmp_path, shapes, models)
    train_here(run, resume=False, until=2)
    whole = run.last.read_bytes()
    for damage_it in (_without_groups, _fewer_weights, _other_shape, _no_tensors, _no_adapters):
        run.last.write_bytes(whole)
        checkpoint = run.saved()
        damage_it(checkpoint["optimizer"])
        torch.save(checkpoint, run.last)
        with pytest.raises(CheckpointError, match=r"last\.pt cannot be resumed: its training state is damaged"):
            train_here(run, resume=True, until=None)


@pytest.mark.e2e
def test_without_saving_a_signal_saves_nevertheless(tmp_path: Path, shapes: Path, models: dict[str, str]) -> None:
    run = Run(tmp_path, shapes, models, save=False)
    trainer: Any = DistillationTrainer(overrides=run.keys)
    trainer.add_callback("on_fit_epoch_end", lambda t: signal.raise_signal(signal.SIGINT) if t.epoch == 1 else None)
    with pytest.raises(Interrupted):
        trainer.train()
    assert run.saved()["epoch"] == 1
    train_here(run, resume=True, until=None)
    assert run.epochs() == [1, 2, 3]


@pytest.mark.e2e
def test_a_signal_in_another_thread_is_left_alone(tmp_path: Path, shapes: Path, models: dict[str, str]) -> None:
    """Python installs handlers in the main thread only; a training elsewhere runs without."""
    run = Run(tmp_path, shapes, models, epochs=1)
    before = signal.getsignal(signal.SIGINT)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            train_here(run, resume=False, until=None)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.e2e
def test_a_second_training_in_the_same_process_starts_clean(
    tmp_path: Path, shapes: Path, models: dict[str, str]
) -> None:
    """After one that was stopped, with everything that was replaced for its duration put back."""
    watched = (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)
    before = ([signal.getsignal(n) for n in watched], engine.strip_optimizer, engine.autocast, tasks.SAFE_LOAD)
    alone = Run(tmp_path / "alone", shapes, models)
    train_here(alone, resume=False, until=None)
    stopped = Run(tmp_path / "stopped", shapes, models)
    trainer: Any = DistillationTrainer(overrides=stopped.keys)
    trainer.add_callback("on_train_batch_end", lambda t: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(m._forward_hooks for m in trainer.model.modules())
    again = Run(tmp_path / "again", shapes, models)
    train_here(again, resume=False, until=None)
    assert ([signal.getsignal(n) for n in watched], engine.strip_optimizer, engine.autocast, tasks.SAFE_LOAD) == before
    mine, theirs = weights_of(again.last), weights_of(alone.last)
    assert all(torch.equal(mine[k], theirs[k]) for k in theirs)


# ---------------------------------------------------------------------------------------------- files


def broken(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "cut short":
        path.write_bytes(data[: len(data) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "zeros":
        path.write_bytes(bytes(len(data)))
    elif how == "one bit":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["cut short", "empty", "zeros", "one bit", "missing"])
@pytest.mark.e2e
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server, how: str
) -> None:
    run = Run(tmp_path, shapes, models, epochs=4)
    train_here(run, resume=False, until=3)
    assert run.saved()["epoch"] == 2
    assert run.saved("last.prev.pt")["epoch"] == 1
    broken(run.last, how)
    assert server.run(run.resume, run.log) == 0, run.output[-3000:]
    what = "is missing" if how == "missing" else "is damaged"
    assert f"{run.last} {what}" in run.output
    assert "continuing from its predecessor last.prev.pt, which is one checkpoint older" in run.output
    assert run.epochs() == [1, 2, 3, 4]
    assert run.last.with_name("last.damaged.pt").exists() == (how != "missing")


@pytest.mark.e2e
def test_two_damaged_checkpoints_are_an_error(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server
) -> None:
    run = Run(tmp_path, shapes, models, epochs=4)
    train_here(run, resume=False, until=3)
    broken(run.last, "one bit")
    broken(previous_of(run.last), "cut short")
    before = {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()}
    assert server.run(run.resume, run.log) == 2
    assert "Its predecessor last.prev.pt cannot be read either: it is cut short" in run.output
    assert {p: p.read_bytes() for p in run.folder.rglob("*") if p.is_file()} == before


@pytest.mark.e2e
def test_an_unsafe_checkpoint_is_refused_although_there_is_a_predecessor(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server
) -> None:
    run = Run(tmp_path, shapes, models, epochs=4)
    train_here(run, resume=False, until=3)
    torch.save({**run.saved(), "more": Path("x").resolve, "evil": os.system}, run.last)
    assert server.run(run.resume, run.log) == 2
    assert "was refused" in run.output
    assert not run.last.with_name("last.damaged.pt").exists()


@pytest.mark.e2e
def test_a_full_disk_leaves_the_checkpoint_before(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server
) -> None:
    """No file may grow beyond a size, which the system enforces: checkpoints cannot be written, small files can."""
    run = Run(tmp_path, shapes, models, epochs=3)
    assert server.run(run.command, run.log, file_size=200_000) == 1, run.output[-3000:]
    assert f"error: {run.last} could not be written (File too large" in run.output
    assert "There is no checkpoint yet" in run.output
    assert "Traceback" not in run.output
    assert not [*run.last.parent.iterdir()]
    train_here(run, resume=False, until=2)
    before = run.last.read_bytes()
    assert server.run(run.resume, run.log, file_size=200_000) == 1
    assert f"Once files can be written, continue with yolo-kd train resume={run.last}" in run.output
    assert run.last.read_bytes() == before
    assert server.run(run.resume, run.log) == 0
    assert run.epochs() == [1, 2, 3]


@pytest.mark.e2e
def test_a_disk_that_fills_up_at_the_very_end(
    tmp_path: Path, shapes: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the finished files are stripped: they stay as they were, and the run is finished when there is room."""
    run = Run(tmp_path, shapes, models)
    strip = engine.strip_optimizer

    def full(f: Any, s: Any = "", updates: Any = None) -> dict:
        Path(s).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 704 vs 598")

    monkeypatch.setattr(engine, "strip_optimizer", full)
    with pytest.raises(SaveError, match=r"last.pt could not be written .*continue with yolo-kd train resume="):
        train_here(run, resume=False, until=None)
    assert engine.strip_optimizer is full
    monkeypatch.setattr(engine, "strip_optimizer", strip)
    assert not [*run.last.parent.glob("*.partial")]
    assert run.saved()["epoch"] == 2
    train_here(run, resume=True, until=None)  # nothing to train, only to finish
    assert run.epochs() == [1, 2, 3]
    for name in ("last.pt", "best.pt"):
        assert run.saved(name)["optimizer"] is None
        assert run.saved(name)["yolo_kd"]["name"] == "ultralytics"
    with pytest.raises(CheckpointError, match="is a finished training"):
        train_here(run, resume=True, until=None)


@pytest.mark.parametrize("place", ["file", "proc"])
@pytest.mark.e2e
def test_a_folder_that_cannot_be_written_to(
    tmp_path: Path, shapes: Path, models: dict[str, str], server: Server, place: str
) -> None:
    (tmp_path / "file").touch()
    where = {"file": tmp_path / "file", "proc": Path("/proc/yolo_kd")}[place]
    if place == "proc" and not Path("/proc/self").exists():
        pytest.skip("no /proc")
    run = Run(tmp_path / "log", shapes, models)
    command = [f"project={where}" if w.startswith("project=") else w for w in run.command]
    assert server.run(command, run.log) == 2
    assert f"error: the run's folder {where}/run cannot be written to" in run.output
    assert "project=" in run.output
    assert "Traceback" not in run.output


@pytest.mark.e2e
def test_a_folder_removed_while_training_is_made_again(tmp_path: Path, shapes: Path, models: dict[str, str]) -> None:
    run = Run(tmp_path, shapes, models, epochs=4)
    trainer: Any = DistillationTrainer(overrides=run.keys)
    trainer.add_callback("on_fit_epoch_end", lambda t: shutil.rmtree(t.save_dir) if t.epoch == 1 else None)
    trainer.train()
    assert run.epochs() == [3, 4]
    assert {p.name for p in run.last.parent.iterdir()} == {"last.pt", "best.pt"}


@pytest.mark.e2e
def test_what_a_kill_between_two_files_left_out_is_made_up_for(
    tmp_path: Path, shapes: Path, models: dict[str, str]
) -> None:
    """`last.pt` is written first: the copies that belong to the same epoch come from it."""
    run = Run(tmp_path, shapes, models, save_period=1)
    train_here(run, resume=False, until=2)
    assert run.saved()["best_fitness"] == run.saved()["train_metrics"]["fitness"]
    saved = run.last.read_bytes()
    run.last.with_name("epoch1.pt").unlink()
    run.last.with_name("best.pt").write_bytes(run.last.with_name("epoch0.pt").read_bytes())
    with open(run.folder / "results.csv", "a") as file:
        file.write("3,1.0,0.")  # half a row of the epoch whose checkpoint was never written
    train_here(run, resume=True, until=3)
    assert run.last.with_name("epoch1.pt").read_bytes() == saved
    assert run.saved("best.pt")["epoch"] == 2
    assert run.epochs() == [1, 2, 3]
    (run.folder / "results.csv").unlink()
    train_here(run, resume=True, until=None)  # all epochs are done: the table comes from the checkpoint
    assert run.epochs() == [1, 2, 3]


@pytest.mark.e2e
def test_a_run_that_had_stopped_early_is_only_finished(
    tmp_path: Path, shapes: Path, models: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path, shapes, models, epochs=20, patience=2)
    validate = DetectionTrainer.validate

    def worse_and_worse(trainer: Any) -> tuple[dict, float]:
        metrics, _ = validate(trainer)
        trainer.best_fitness = 1.0
        return metrics, 1.0 - 0.1 * trainer.epoch

    monkeypatch.setattr(DetectionTrainer, "validate", worse_and_worse)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DistillationTrainer, "final_eval", raise_stopped)
        with pytest.raises(Stopped):
            train_here(run, resume=False, until=None)
    assert run.epochs() == [1, 2, 3]
    assert run.saved("best.pt")["epoch"] == 0
    train_here(run, resume=True, until=None)
    assert run.epochs() == [1, 2, 3]
    for name in ("last.pt", "best.pt"):
        assert run.saved(name)["optimizer"] is None
    mine = {name: weights_of(run.last.with_name(name)) for name in ("last.pt", "best.pt")}
    assert any(not torch.equal(mine["last.pt"][k], mine["best.pt"][k]) for k in mine["last.pt"])


def raise_stopped(_trainer: Any) -> None:
    raise Stopped


# ---------------------------------------------------------------------------------------------- data


@pytest.fixture
def own_shapes(tmp_path: Path, shapes: Path) -> Path:
    """A copy of the drawn set that a test may spoil."""
    shutil.copytree(shapes.parent, tmp_path / "data")
    for cache in (tmp_path / "data").rglob("*.cache"):
        cache.unlink()
    text = shapes.read_text().replace(str(shapes.parent), str(tmp_path / "data"))
    (tmp_path / "data" / shapes.name).write_text(text)
    return tmp_path / "data" / shapes.name


def files(data: Path, kind: str) -> list[Path]:
    return sorted((data.parent / kind / "train").glob("*.*"))


@pytest.mark.parametrize("how", ["deleted", "damaged"])
@pytest.mark.e2e
def test_an_image_lost_while_training(
    tmp_path: Path, own_shapes: Path, models: dict[str, str], server: Server, how: str
) -> None:
    run = Run(tmp_path, own_shapes, models, epochs=200, batch=4)
    child = server.start(run.command, run.log)
    child.wait_for("2/200")
    image = files(own_shapes, "images")[3]
    image.unlink() if how == "deleted" else image.write_bytes(b"no image")
    assert child.wait() == 2, run.output[-3000:]
    assert f"error: image {image} can no longer be read" in run.output
    assert f"continue with: yolo-kd train resume={run.last}" in run.output
    assert "Traceback" not in run.output
    image.unlink(missing_ok=True)
    finished = len(run.rows())
    child = server.start(run.resume, run.log)
    child.wait_for(f"{finished + 2}/200")
    child.send(signal.SIGKILL)
    child.wait()
    assert run.epochs()[: finished + 1] == [*range(1, finished + 2)]


NOT_A_BOX = {
    "nan": "0 nan 0.5 0.2 0.2\n",
    "nan class": "nan 0.5 0.5 0.2 0.2\n",
    "infinity": "0 0.5 0.5 inf 0.2\n",
    "nan polygon": "0 0.1 0.1 nan 0.4 0.4 0.4\n",
}


@pytest.mark.e2e
def test_labels_with_nan_and_corrupt_images_are_left_out(
    tmp_path: Path, own_shapes: Path, models: dict[str, str], server: Server
) -> None:
    """As Ultralytics does: named in the log, and not trained on, so no loss becomes NaN."""
    labels, images = files(own_shapes, "labels"), files(own_shapes, "images")
    for number, text in enumerate(NOT_A_BOX.values()):
        labels[number].write_text(text)
    images[5].write_bytes(images[5].read_bytes()[:200])
    run = Run(tmp_path, own_shapes, models, epochs=2, mosaic=0.0, batch=4)
    assert server.run(run.command, run.log) == 0, run.output[-3000:]
    for number in (*range(len(NOT_A_BOX)), 5):
        assert f"{images[number]}: ignoring corrupt image/label" in run.output
    assert "Using 11 train" in run.output
    assert all(math.isfinite(float(v)) for row in run.rows() for k, v in row.items() if k.startswith("train/"))


@pytest.mark.e2e
def test_only_labels_with_nan_is_an_error(
    tmp_path: Path, own_shapes: Path, models: dict[str, str], server: Server
) -> None:
    for label in files(own_shapes, "labels"):
        label.write_text(NOT_A_BOX["nan"])
    run = Run(tmp_path, own_shapes, models)
    assert server.run(run.command, run.log) == 2, run.output[-3000:]
    assert f"error: data={own_shapes} cannot be trained on: " in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("kd", ["objectness_fgd", "ultralytics", "objectness"])
@pytest.mark.e2e
def test_images_and_whole_batches_without_boxes(
    tmp_path: Path, own_shapes: Path, models: dict[str, str], server: Server, kd: str
) -> None:
    """Three of sixteen images have boxes, in batches of two: most batches are without."""
    for label in files(own_shapes, "labels")[3:]:
        label.write_text("")
    run = Run(tmp_path, own_shapes, models, kd=kd, epochs=2, batch=2, mosaic=0.0)
    assert server.run(run.command, run.log) == 0, run.output[-3000:]
    assert run.epochs() == [1, 2]
    assert all(math.isfinite(float(v)) for row in run.rows() for k, v in row.items() if k.startswith("train/"))


# ------------------------------------------------------------------------------------------------ the component alone


class Writer:
    """A trainer as far as saving needs one: each checkpoint is its number."""

    def __init__(self, wdir: Path, overrides: Any = None, _callbacks: Any = None):
        self.wdir, self.last, self.best = wdir, wdir / "last.pt", wdir / "best.pt"
        self.resume, self.best_fitness, self.fitness, self.saved = False, None, None, 0

    def save_model(self) -> bool:
        self.saved += 1
        self.wdir.mkdir(parents=True, exist_ok=True)
        self.last.write_bytes(str(self.saved).encode())
        (self.wdir / f"epoch{self.saved}.pt").write_bytes(b"copy")
        return True


class Saving(Hosted, Writer):
    def __init__(self, wdir: Path):
        self.components = (Durability(self),)
        super().__init__(wdir)


def test_alone_it_replaces_whole_files_and_keeps_the_predecessor(tmp_path: Path) -> None:
    host: Any = Saving(tmp_path / "weights")
    last = host.last
    last.parent.mkdir()
    last.write_bytes(b"of another run")
    assert host.save_model()
    assert last.read_bytes() == b"1"
    assert not previous_of(last).exists(), "the predecessor is of this run"
    host.save_model()
    assert (last.read_bytes(), previous_of(last).read_bytes()) == (b"2", b"1")
    assert sorted(path.name for path in last.parent.iterdir()) == ["epoch1.pt", "epoch2.pt", "last.prev.pt", "last.pt"]
    assert host.last is last, "the paths are the trainer's again"
