"""Training with unlabeled images: the component without the others, and whole trainings."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel

from tests.engine.test_trainer import interrupted, make, rows_of, trained, weights_of
from tests.support.host import Host
from tests.support.models import narrow_checkpoint, narrow_model
from tests.test_processes import two
from yolo_kd.cli import main
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.engine.components.unlabeled import Unlabeled
from yolo_kd.engine.signals import Interrupted
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import ConfigError
from yolo_kd.unlabeled.dataset import UNLABELED_MARK, MixedDataset
from yolo_kd.unlabeled.images import UnlabeledImages

MODES = ("distill", "pseudo", "both")
SURE = {"unlabeled_conf": 0.5, "unlabeled_low": 0.2}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """A folder of eight images without labels."""
    folder = tmp_path_factory.mktemp("unlabeled") / "pool"
    folder.mkdir()
    for image in (shapes.parent / "images" / "test").glob("*.png"):
        shutil.copy(image, folder / f"pool{image.name}")
    return folder


def note_images(trainer: DistillationTrainer) -> list[tuple[int, list[str]]]:
    """Return a list that fills with epoch and images of every batch."""
    seen: list[tuple[int, list[str]]] = []
    preprocess = trainer.preprocess_batch

    def noted(batch: dict) -> dict:
        seen.append((trainer.epoch, [Path(f).name for f in batch["im_file"]]))
        return preprocess(batch)

    trainer.preprocess_batch = noted  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("labeled", [True, False])
def test_alone_it_mixes_batches_and_sets_the_epoch(tmp_path: Path, shapes: Path, pool: Path, labeled: bool) -> None:
    data = tmp_path / "data.yaml"
    train = "train: images/train\n" if labeled else ""
    data.write_text(f"path: {shapes.parent}\n{train}val: images/val\nnames: [circle, square, triangle]\n")
    files = tuple(sorted(str(path) for path in pool.iterdir()))
    images = UnlabeledImages(files, ((96, 96),) * len(files))
    options = UnlabeledOptions(("pool",), ratio=3.0)
    host: Any = Host(lambda trainer: Unlabeled(trainer, options, images, labeled), tmp_path, data=str(data), batch=4)
    host.model = narrow_model("yolov8n", tmp_path / "model")
    host.train_loader = host.get_dataloader(host.data["train"], 4, -1, "train")
    assert isinstance(host.train_loader.dataset, MixedDataset)
    assert (host.train_loader.dataset.labeled, host.train_loader.dataset.unlabeled) == (16 if labeled else 0, 8)
    batch = next(iter(host.train_loader))
    assert list(batch[UNLABELED_MARK]) == [not labeled, True, True, True]
    assert labeled or not len(batch["bboxes"])
    host.epoch, host.skipped = 2, 1
    host.run_callbacks("on_train_epoch_start")
    steps = host.train_loader.sampler.steps
    assert len([*host.train_loader.sampler]) == 4 * (steps - 1), "the skipped batch is not drawn again"
    validation = host.build_dataset(host.data["val"], "val", 4)
    assert not isinstance(validation, MixedDataset)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.e2e
def test_every_mode_trains(tmp_path: Path, shapes: Path, student: Path, sure: Path, pool: Path, mode: str) -> None:
    before = sorted(p.name for p in pool.rglob("*"))
    keys = {"unlabeled": str(pool), "unlabeled_mode": mode, **SURE, "mosaic": 1.0, "close_mosaic": 1, "plots": True}
    recipe = {"losses": {"objectness": {}, "fgd": {}}}
    trainer = make(tmp_path, shapes, student, teacher=str(sure), kd=recipe, multi_scale=0.5, **keys)
    seen = note_images(trainer)
    trainer.train()
    assert len(seen) == 2 * 3, "24 images fill three batches of 8"
    rows = rows_of(trainer.save_dir)
    about = {name for name in rows[0] if "pool" in name}
    terms = {"train/kcls_pool", "train/kbox_pool", "train/fgd_pool"} if mode != "pseudo" else set()
    task = {"train/box_pool", "train/cls_pool", "train/dfl_pool"} if mode != "distill" else set()
    assert about == {"train/pool_obj", "train/pool_none"} | terms | task
    assert all(float(rows[-1][name]) > 0 for name in about - {"train/pool_none"})
    assert float(rows[0]["train/pool_none"]) < 1
    assert float(rows[0]["train/box_loss"]) > 0
    assert not any(name.startswith("val/") and "pool" in name for name in rows[0])
    saved = yaml.safe_load((trainer.save_dir / "kd.yaml").read_text())["unlabeled"]
    assert saved["unlabeled"] == [str(pool)]
    assert saved["unlabeled_mode"] == mode
    assert sorted(p.name for p in pool.rglob("*")) == before, "nothing is written beside the images"
    assert type(YOLO(trainer.best).model) is DetectionModel


@pytest.mark.e2e
def test_a_ratio_of_zero_is_a_training_without(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path
) -> None:
    plain, steps = trained(tmp_path / "plain", shapes, student, teacher=str(teacher), kd="objectness")
    keys = {"unlabeled": str(pool), "unlabeled_ratio": 0, "unlabeled_mode": "both"}
    zero, same = trained(tmp_path / "zero", shapes, student, teacher=str(teacher), kd="objectness", **keys)
    assert steps == same
    for (name, a), b in zip(weights_of(plain.last).items(), weights_of(zero.last).values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.e2e
def test_an_end_to_end_student(tmp_path: Path, shapes: Path, pool: Path) -> None:
    """Its criterion is replaced on resume, and must come back with its pool."""
    teacher = narrow_checkpoint("yolo26n", tmp_path, width=0.25, seed=1, file="teacher.pt", sure=True)
    student = narrow_checkpoint("yolo26n", tmp_path, seed=2, file="student.pt")
    keys = {"unlabeled": str(pool), "unlabeled_mode": "both", "unlabeled_ratio": 3, **SURE}
    last = interrupted(tmp_path, shapes, student, after=1, epochs=2, teacher=str(teacher), kd="objectness", **keys)
    resumed = DistillationTrainer(overrides={"resume": str(last)})
    seen = note_images(resumed)
    names: list[str] = []
    resumed.add_callback("on_train_start", lambda t: names.append(type(t.model.criterion).__name__))
    resumed.train()
    assert names == ["DistillationCriterion"]
    assert resumed.plan.unlabeled.ratio == 3
    in_pool = {p.name for p in pool.iterdir()}
    assert [sum(name in in_pool for name in files[2:]) for _, files in seen] == [6, 6, 6]
    assert [r["epoch"] for r in rows_of(resumed.save_dir)] == ["1", "2"]
    assert float(rows_of(resumed.save_dir)[1]["train/l1_pool"]) > 0


@pytest.mark.parametrize("labels", ["none", "missing"])
@pytest.mark.e2e
def test_not_a_single_label(tmp_path: Path, shapes: Path, student: Path, sure: Path, pool: Path, labels: str) -> None:
    root = shapes.parent
    lines = [f"path: {root}", f"val: {root / 'images' / 'val'}", "names: [circle, square, triangle]"]
    if labels == "none":
        shutil.copytree(root / "images" / "train", tmp_path / "bare")
        lines.append(f"train: {tmp_path / 'bare'}")
    data = tmp_path / "data.yaml"
    data.write_text("\n".join(lines))
    keys = {"unlabeled": str(pool), "batch": 4, **SURE, "plots": True}
    trainer = make(tmp_path, data, student, teacher=str(sure), kd="objectness", **keys)
    seen = note_images(trainer)
    trainer.train()
    rows = rows_of(trainer.save_dir)
    assert len(seen) == 4, "an epoch is a pass over the pool"
    assert {name for epoch, files in seen if epoch == 0 for name in files} == {p.name for p in pool.iterdir()}
    assert all(float(r["train/box_loss"]) == float(r["train/kcls_loss"]) == 0 for r in rows)
    assert all(float(r["train/kcls_pool"]) > 0 for r in rows)
    assert float(rows[0]["val/box_loss"]) > 0, "validation has labels"
    assert [row.term for row in trainer.distillation.audit_rows] == ["objectness"]


@pytest.mark.e2e
def test_resume_inside_an_epoch_draws_what_is_left(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path
) -> None:
    keys = {"teacher": str(teacher), "kd": "objectness", "unlabeled": str(pool), "batch": 4, "epochs": 2}
    whole = make(tmp_path / "whole", shapes, student, **keys)
    expected = note_images(whole)
    whole.train()
    assert len(expected) == 2 * 6
    cut = make(tmp_path / "cut", shapes, student, **keys)
    first = note_images(cut)
    cut.add_callback("on_train_batch_end", lambda t: os.kill(os.getpid(), signal.SIGINT) if len(first) == 8 else None)
    with pytest.raises(Interrupted):
        cut.train()
    resumed = DistillationTrainer(overrides={"resume": str(cut.last)})
    rest = note_images(resumed)
    resumed.train()
    assert first == expected[:8]
    assert rest == expected[8:]
    assert len(rows_of(resumed.save_dir)) == 2


@pytest.mark.e2e
def test_what_may_be_said_on_resume(tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path) -> None:
    keys = {"teacher": str(teacher), "kd": "objectness", "unlabeled": str(pool)}
    last = interrupted(tmp_path, shapes, student, after=1, **keys)
    for given in ({"unlabeled_ratio": 2}, {"unlabeled": str(pool), "unlabeled_mode": "both"}):
        with pytest.raises(ConfigError, match=rf"^{list(given)[-1]} cannot be given with resume"):
            DistillationTrainer(overrides={"resume": str(last), **given})
    assert DistillationTrainer(overrides={"resume": str(last), "unlabeled": str(pool)}).plan.unlabeled.ratio == 1
    moved = pool.parent / "moved"
    pool.rename(moved)
    try:
        with pytest.raises(
            Exception, match=r"unlabeled=.*pool cannot be used: .* does not exist.*add unlabeled=<place>"
        ):
            DistillationTrainer(overrides={"resume": str(last)})
        resumed = DistillationTrainer(overrides={"resume": str(last), "unlabeled": str(moved)})
        resumed.train()
        assert resumed.args.kd["unlabeled"]["unlabeled"] == [str(moved)], "the next resume needs no key"
        assert len(rows_of(resumed.save_dir)) == resumed.epochs
    finally:
        moved.rename(pool)


@pytest.mark.e2e
def test_a_run_without_a_pool_gets_none_on_resume(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path
) -> None:
    last = interrupted(tmp_path, shapes, student, after=1, teacher=str(teacher), kd="objectness")
    with pytest.raises(ConfigError, match=r"^unlabeled cannot be given on resume"):
        DistillationTrainer(overrides={"resume": str(last), "unlabeled": str(pool)})


@pytest.mark.e2e
def test_the_command_line(
    tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path, caplog: pytest.LogCaptureFixture
) -> None:
    words = [f"teacher={teacher}", f"student={student}", f"data={shapes}", f"project={tmp_path}", "name=run"]
    fast = ["imgsz=64", "batch=8", "epochs=1", "workers=0", "plots=False", "optimizer=AdamW", "val=False"]
    assert main(["train", *words, *fast, f"unlabeled={pool}/*", "unlabeled_ratio=1.5"]) == 0
    said = caplog.text
    assert "An epoch is 3 steps of 3 labeled and 5 unlabeled images" in said
    assert "Unlabeled images have no task loss" in said


@pytest.mark.e2e
def test_two_processes_see_other_images(tmp_path: Path, shapes: Path, student: Path, teacher: Path, pool: Path) -> None:
    two("pool", tmp_path / "seen", shapes, student, teacher, pool)
    seen: list[dict[str, Any]] = [json.loads((tmp_path / f"seen.{rank}").read_text()) for rank in (0, 1)]
    in_pool = {p.name for p in pool.iterdir()}
    for epoch in ("0", "1"):
        ours, theirs = ([n for n in s["images"][epoch] if n in in_pool] for s in seen)
        assert len(ours) == len(theirs) == 6
        assert not {*ours[:4]} & {*theirs[:4]} or epoch != "0", "one order, dealt out"
        assert {*ours} | {*theirs} == in_pool
    assert seen[0]["weights"] == seen[1]["weights"]
    assert seen[0]["images"] != seen[1]["images"]
