"""`yolo-kd check`: what it finds in data, models and terms, that training agrees, and that it leaves no trace."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from torch.utils.data import Subset
from ultralytics import YOLO
from ultralytics.utils import LOGGER

from tests.support.models import narrow_checkpoint, narrow_yaml
from yolo_kd.check import check, terms
from yolo_kd.check import models as quality
from yolo_kd.check.dataset import check_dataset
from yolo_kd.check.dryrun import nothing_written
from yolo_kd.check.report import BROKEN, READY, WARNED, Report
from yolo_kd.cli import main
from yolo_kd.config.train_options import TrainOptions, train_options
from yolo_kd.distillation.audit import AuditRow
from yolo_kd.engine.checks_before import read_dataset
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import ConfigError
from yolo_kd.safe_loading.checkpoint import load_detector, sha256


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make checks short: one batch, and random models pass for models that see something."""
    monkeypatch.setattr(terms, "BATCHES", 1)
    monkeypatch.setattr(quality, "BLIND", -1.0)


def asked(teacher: Any, student: Any, data: Any, **keys: Any) -> TrainOptions:
    return train_options(
        {"teacher": str(teacher), "student": str(student), "data": str(data), "imgsz": 64, "batch": 8, **keys}
    )


def texts(report: Report, *levels: str) -> list[str]:
    return [f"{f.topic}: {f.text}" for f in report.findings if not levels or f.level in levels]


def found(report: Report, level: str, *parts: str) -> bool:
    """Return whether one finding of that level holds all parts."""
    lines = [f"{f.topic}: {f.text} {f.advice}" for f in report.findings if f.level == level]
    return any(all(part in line for part in parts) for line in lines)


# ------------------------------------------------------------------------------------------------- the whole check


@pytest.mark.e2e
def test_a_pair_that_fits(
    few: None, shapes: Path, student: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on models this small and a busy machine the clock would say anything; work done is work done
    monkeypatch.setattr(terms.time, "perf_counter", time.process_time)
    report = check(asked(teacher, student, shapes, kd="objectness_fgd"))
    assert report.verdict in (READY, WARNED), texts(report, "error")
    facts = report.to_dict()
    assert facts["files"]["teacher"]["sha256"] == sha256(teacher)
    assert facts["files"]["teacher"]["family"] == "yolov8"
    assert facts["files"]["student"]["classes"] == ["circle", "square", "triangle"]
    assert [(row["level"], row["stride"]) for row in facts["levels"]] == [("p3", 8), ("p4", 16), ("p5", 32)]
    assert [row["student"] for row in facts["levels"]] == [["model.15", "32"], ["model.18", "64"], ["model.21", "128"]]
    assert [row["teacher"][1] for row in facts["levels"]] == ["64", "128", "256"]
    assert facts["levels"][0]["adapters"] == {"conv1x1": ["fgd"]}
    assert [row["term"] for row in facts["terms"]] == ["objectness", "fgd"]
    assert all(row["gradient"] > 0 and -1 <= row["cosine"] <= 1 for row in facts["terms"])
    assert facts["images"] == {"train": 16, "val": 8}
    assert facts["accuracy"]["images"] == 8
    cost = facts["cost"]
    assert cost["with_teacher_and_terms"]["megabytes"] > cost["student_alone"]["megabytes"] > 1
    assert cost["step_ratio"] > 1
    assert cost["steps_per_epoch"] == 2
    text = report.to_text()
    assert text.splitlines()[-1].startswith(f"verdict: {report.verdict}")
    assert "conv1x1 (fgd)" in text
    json.dumps(facts, allow_nan=False)


@pytest.mark.e2e
def test_a_student_that_will_start_from_its_teacher(few: None, shapes: Path, teacher: Path, tmp_path: Path) -> None:
    fresh = narrow_yaml("yolov8n", tmp_path)
    report = check(asked(teacher, fresh, shapes))
    assert found(report, "note", "start: inherited 355 of 355 tensors of the student (100% of their values)", "thinned")
    assert not found(check(asked(teacher, fresh, shapes, inherit=False)), "note", "start:")


@pytest.mark.e2e
def test_a_student_of_another_family_starts_as_it_is(few: None, shapes: Path, teacher: Path, tmp_path: Path) -> None:
    report = check(asked(teacher, narrow_yaml("yolo11n", tmp_path), shapes))
    assert found(report, "warning", "start: inherited 0 of", "C3k2 here, C2f in the teacher", "the student's family")
    assert {f["family"] for f in report.to_dict()["files"].values()} == {"yolov8", "yolo11"}


def snapshot(*folders: Path) -> dict[Path, tuple[int, int]]:
    files = (p for folder in folders for p in [folder, *folder.rglob("*")])
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


@pytest.mark.e2e
def test_nothing_is_written(
    few: None, shapes: Path, student: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = copied(shapes, tmp_path / "data")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    before, level = snapshot(tmp_path, student.parent, teacher.parent), LOGGER.level
    check(asked(teacher, student, data, kd="objectness"))
    assert snapshot(tmp_path, student.parent, teacher.parent) == before | {
        temporary: (temporary.stat().st_mtime_ns, temporary.stat().st_size)
    }
    assert not list(temporary.iterdir())
    assert LOGGER.level == level
    assert not LOGGER.filters


@pytest.mark.e2e
def test_it_measures_what_training_audits(
    few: None, shapes: Path, student: Path, teacher: Path, tmp_path: Path
) -> None:
    """The same seed, the same first batch, the same numbers."""
    keys = {"kd": "objectness_fgd", "seed": 5, "optimizer": "AdamW", "epochs": 1, "plots": False, "close_mosaic": 0}
    report = check(asked(teacher, student, shapes, **keys))
    overrides = {"teacher": str(teacher), "model": str(student), "data": str(shapes), "imgsz": 64, "batch": 8, **keys}
    trainer = DistillationTrainer(overrides={**overrides, "project": str(tmp_path), "workers": 0})
    trainer.train()
    assert len(trainer.distillation.audit_rows) == 2
    for row, facts in zip(trainer.distillation.audit_rows, report.facts["terms"], strict=True):
        for name in ("value", "gradient", "share", "cosine"):
            assert facts[name] == pytest.approx(getattr(row, name), rel=1e-3, abs=1e-4), (row.term, name)


def test_everything_wrong_is_found_at_once(shapes: Path, student: Path, tmp_path: Path) -> None:
    """Wrong classes and wrong levels together, and the data set is looked at all the same."""
    other = narrow_checkpoint("yolov8n-p6", tmp_path, nc=2, names={0: "a", 1: "b"})
    report = check(asked(other, student, shapes, kd="objectness"))
    assert report.verdict == BROKEN
    assert found(report, "error", "pair", "none of the 3 classes", "the teacher's 2 (a, b)")
    assert found(report, "error", "levels of stride 8, 16 or 32")
    assert report.facts["images"] == {"train": 16, "val": 8}
    assert [row["stride"] for row in report.facts["levels"]] == [8, 16, 32, 64]
    assert report.facts["levels"][3]["student"] == ["-", "-"]
    assert "terms" not in report.facts
    assert found(report, "note", "teacher was not evaluated: its head has 2 other classes (a, b)")


def test_missing_files_are_findings(shapes: Path, tmp_path: Path) -> None:
    report = check(asked(tmp_path / "no.pt", tmp_path / "neither.pt", shapes))
    assert report.verdict == BROKEN
    assert found(report, "error", "no.pt does not exist")
    assert found(report, "error", "neither.pt does not exist")
    assert report.facts["images"] == {"train": 16, "val": 8}


def test_a_missing_data_set_is_a_finding(student: Path, teacher: Path, tmp_path: Path) -> None:
    report = check(asked(teacher, student, tmp_path / "no.yaml"))
    assert found(report, "error", "data", "no.yaml cannot be used")
    assert report.facts["files"]["student"]["sha256"] == sha256(student)


@pytest.mark.e2e
def test_one_term_that_cannot_serve_does_not_hide_the_others(
    few: None, shapes: Path, teacher: Path, tmp_path: Path
) -> None:
    student = narrow_checkpoint("yolo26n", tmp_path, seed=2)
    kd = {"losses": {"ld": {}, "at": {"student_layers": ["model.44"]}, "objectness": {}}}
    report = check(asked(teacher, student, shapes, kd=kd))
    assert report.verdict == BROKEN
    assert found(report, "error", "terms", "'ld' compares distance distributions", "Change or remove the term 'ld'")
    assert found(report, "error", "terms", "no layer 'model.44'", "Its layers are model.0 to")
    assert [row["term"] for row in report.facts["terms"]] == ["objectness"]


def test_a_device_that_is_not_there(shapes: Path, student: Path, teacher: Path) -> None:
    with pytest.raises(ConfigError, match=r"device=17 is not here.*leave it out"):
        asked(teacher, student, shapes, kd="objectness", device="17")


@pytest.mark.parametrize(
    ("keys", "batch", "share"),
    [
        ({}, 16, 16),
        ({"batch": 32, "device": "0,1"}, 32, 16),
        ({"batch": -1}, None, 16),
        ({"batch": 8, "device": 0}, 8, 8),
    ],
)
def test_several_devices_share_a_batch(keys: dict, batch: int | None, share: int) -> None:
    assert terms._batches_of(keys) == (batch, share)


@pytest.mark.e2e
def test_a_student_with_another_head_gets_a_new_one(few: None, shapes: Path, teacher: Path, tmp_path: Path) -> None:
    names = dict(enumerate("abcde"))
    student = narrow_checkpoint("yolov8n", tmp_path, nc=5, names=names, seed=2)
    report = check(asked(teacher, student, shapes, kd="objectness_fgd"))
    assert report.verdict in (READY, WARNED), texts(report, "error")
    assert [row["term"] for row in report.facts["terms"]] == ["objectness", "fgd"]
    assert found(
        report, "note", "student was not evaluated", "5 other classes (a, b, c and 2 more)", "training replaces"
    )
    assert "student" not in report.facts["accuracy"]


@pytest.mark.e2e
def test_what_ultralytics_refuses_is_a_finding(few: None, shapes: Path, student: Path, teacher: Path) -> None:
    report = check(asked(teacher, student, shapes, kd="objectness", freeze=23))
    assert found(report, "error", "training would stop here", "froze the entire model")


@pytest.mark.e2e
def test_a_random_teacher_is_worth_a_warning(few: None, shapes: Path, student: Path) -> None:
    report = check(asked("yolov8n.yaml", student, shapes, kd="objectness", random_teacher=True))
    assert report.verdict == WARNED
    assert found(report, "warning", "the teacher has random weights")


@pytest.mark.e2e
def test_auto_weights_are_shown_with_what_they_found(few: None, shapes: Path, student: Path, teacher: Path) -> None:
    report = check(asked(teacher, student, shapes, kd={"losses": {"at": {"weight": "auto"}}}))
    (row,) = report.facts["terms"]
    assert row["auto"]
    assert row["share"] == pytest.approx(0.3, rel=0.01)
    assert "auto " in report.to_text()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"resume": "last.pt", "student": None}, "leave out resume"),
        ({"teacher": None, "kd": "none"}, "needs a teacher"),
    ],
)
def test_what_is_no_training_to_check(keys: dict, message: str, shapes: Path, student: Path) -> None:
    options = {"teacher": str(student), "student": str(student), "data": str(shapes), **keys}
    with pytest.raises(ConfigError, match=message):
        check(train_options({k: v for k, v in options.items() if v is not None}))


# --------------------------------------------------------------------------------------------------- command line


@pytest.mark.e2e
def test_json_is_all_there_is_on_stdout(
    few: None, shapes: Path, student: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        f"teacher={teacher}",
        f"student={student}",
        f"data={shapes}",
        "imgsz=64",
        "batch=8",
        "kd.objectness.weight=2",
    ]
    code = main(["check", *words, "--json"])
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert code == (1 if report["verdict"] == BROKEN else 0)
    assert report["terms"][0]["weight"] == 2.0
    assert {f["level"] for f in report["findings"]} <= {"error", "warning", "note"}
    assert "checking the data set" in err


@pytest.mark.e2e
def test_exit_codes(
    shapes: Path, student: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"student={student}", f"data={shapes}", "imgsz=64", "batch=8"]
    assert main(["check", f"teacher={tmp_path}/no.pt", *words]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("verdict: will not work (1 error")
    for wrong in (["epoch=3"], ["json=maybe"], ["-json"], ["kd=fdg"]):
        assert main(["check", f"teacher={teacher}", *words, *wrong]) == 2
        out, err = capsys.readouterr()
        assert not out
        assert err.startswith("error: ")


# ------------------------------------------------------------------------------------------------------- data set


def copied(shapes: Path, folder: Path) -> Path:
    """Return the data YAML of a copy of the drawn set."""
    shutil.copytree(shapes.parent, folder)
    for cache in folder.rglob("*.cache"):
        cache.unlink()
    text = (folder / shapes.name).read_text().replace(str(shapes.parent), str(folder))
    (folder / shapes.name).write_text(text)
    return folder / shapes.name


def scanned(data: Path, **keys: Any) -> Report:
    report = Report({})
    with nothing_written() as trace:
        check_dataset(report, trace, read_dataset(str(data), "val"), {"imgsz": 64, **keys})
    return report


def files(data: Path, split: str) -> list[tuple[Path, Path]]:
    images = sorted(p for p in (data.parent / "images" / split).iterdir() if p.suffix in (".jpg", ".png"))
    return [(image, data.parent / "labels" / split / f"{image.stem}.txt") for image in images]


def test_a_clean_data_set_has_no_findings(shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    report = scanned(data, imgsz=640)
    assert not texts(report, "error", "warning")
    boxes = sum(len(label.read_text().split("\n")) - 1 for _, label in files(data, "train"))
    assert sum(row["train"] for row in report.facts["classes"]) == boxes


def corrupt_image(data: Path) -> None:
    files(data, "train")[0][0].write_bytes(b"no image")


def corrupt_label(data: Path) -> None:
    files(data, "train")[0][1].write_text("0 0.5 0.5 1.5 0.2\n")


def class_beyond_the_names(data: Path) -> None:
    files(data, "val")[1][1].write_text("7 0.5 0.5 0.2 0.2\n")


def missing_labels(data: Path) -> None:
    for _, label in files(data, "train")[:3]:
        label.unlink()


def mostly_background(data: Path) -> None:
    for _, label in files(data, "val")[:5]:
        label.write_text("")


def no_class(data: Path) -> None:
    for split in ("train", "val"):
        for _, label in files(data, split):
            label.write_text("".join(f"{line}\n" for line in label.read_text().splitlines() if line[0] != "2"))


def copies(data: Path) -> None:
    (image, label), *_ = files(data, "train")
    shutil.copyfile(image, image.with_name(f"again{image.suffix}"))
    shutil.copyfile(label, label.with_name("again.txt"))


def overlap(data: Path) -> None:
    for image, label in files(data, "val")[:2]:
        shutil.copyfile(image, data.parent / "images" / "train" / f"leak-{image.name}")
        shutil.copyfile(label, data.parent / "labels" / "train" / f"leak-{label.name}")


def tiny_objects(data: Path) -> None:
    for _, label in files(data, "train")[:4]:
        label.write_text("0 0.5 0.5 0.02 0.3\n")


def repeated_line(data: Path) -> None:
    files(data, "train")[0][1].write_text("0 0.5 0.5 0.2 0.3\n0 0.5 0.5 0.2 0.3\n")


@pytest.mark.parametrize(
    ("damage", "level", "parts"),
    [
        (corrupt_image, "warning", ("1 of 16 train images are left out", "cannot be read as an image")),
        (corrupt_label, "warning", ("1 of 16 train images are left out", "out of bounds")),
        (class_beyond_the_names, "warning", ("1 of 8 val images are left out", "Label class 7 exceeds")),
        (missing_labels, "warning", ("19% of the train images (3) have no label file", "background")),
        (mostly_background, "warning", ("62% of the val images have no box",)),
        (no_class, "warning", ("no train image shows 'triangle'", "it cannot be learned")),
        (no_class, "warning", ("no val image shows 'triangle'", "its accuracy cannot be measured")),
        (copies, "warning", ("1 train images are copies of others", "again")),
        (overlap, "warning", ("2 of 8 val images (25%) are also in train", "leak-")),
        (tiny_objects, "warning", ("less than 4 px wide or high at imgsz=64", "Use a larger imgsz")),
        (repeated_line, "note", ("1 train label files contain a line twice",)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damage_is_found(damage: Callable, level: str, parts: tuple, shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    assert not found(scanned(data, imgsz=640), level, *parts)
    damage(data)
    assert found(scanned(data), level, *parts), texts(scanned(data))


def test_images_of_equal_size_and_ends_are_no_copies(shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    for i, value in enumerate((10, 200)):
        picture = np.zeros((300, 300, 3), np.uint8)
        picture[150, 150] = value
        image = data.parent / "images" / "train" / f"plain{i}.bmp"
        cv2.imwrite(str(image), picture)
        (data.parent / "labels" / "train" / f"plain{i}.txt").write_text("0 0.5 0.5 0.2 0.3\n")
    assert scanned(data).facts["duplicates"]["train"] == 0


def test_one_folder_for_train_and_val_is_one_big_overlap(shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    data.write_text(f"path: {data.parent}\ntrain: images/train\nval: images/train\nnames: [circle, square, triangle]\n")
    assert found(scanned(data), "warning", "16 of 16 val images (100%) are also in train")


def test_a_truncated_jpeg_is_said_and_left_as_it_is(shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    picture = np.random.default_rng(0).integers(0, 255, (96, 96, 3), np.uint8)
    image = data.parent / "images" / "train" / "cut.jpg"
    cv2.imwrite(str(image), picture)
    image.write_bytes(image.read_bytes() + b"tail")
    (data.parent / "labels" / "train" / "cut.txt").write_text("0 0.5 0.5 0.2 0.3\n")
    before = image.read_bytes()
    assert found(scanned(data), "warning", "1 train images are truncated JPEGs: cut.jpg", "in place")
    assert image.read_bytes() == before


def test_no_usable_image_is_an_error(shapes: Path, tmp_path: Path) -> None:
    data = copied(shapes, tmp_path / "data")
    for image, _ in files(data, "train"):
        image.write_bytes(b"no image")
    assert found(scanned(data), "error", "the train images cannot be used")


# ---------------------------------------------------------------------------------------------------- the teacher


def test_accuracy_is_that_of_ultralytics(shapes: Path, tmp_path: Path) -> None:
    """On the whole validation set, against Ultralytics' own validation of the file."""
    model = narrow_checkpoint("yolov8n", tmp_path, width=0.25, seed=1)
    keys = {"imgsz": 64, "data": str(shapes), "device": "cpu"}
    with nothing_written() as trace:
        data = read_dataset(str(shapes), "val")
        dataset = check_dataset(Report({}), trace, data, keys)["val"]
        result = quality.evaluate(load_detector(model), Subset(dataset, range(8)), dataset, data, keys, trace.folder)
    theirs = YOLO(model).val(
        data=str(shapes), imgsz=64, rect=False, plots=False, verbose=False, workers=0, batch=8, project=str(tmp_path)
    )
    assert result["map50"] == pytest.approx(theirs.box.map50, abs=1e-9)
    assert result["map"] == pytest.approx(theirs.box.map, abs=1e-9)
    assert sum(count for _, count in result["classes"].values()) == theirs.nt_per_class.sum()


@pytest.mark.parametrize(
    ("teacher_map", "student_map", "level", "part"),
    [
        (0.60, 0.40, "note", "0.200 to learn"),
        (0.60, None, "note", "the teacher reaches mAP50-95 0.600"),
        (0.60, 0.595, "warning", "not better than the student"),
        (0.60, 0.62, "warning", "not better than the student"),
        (0.50, 0.60, "error", "worse than the student"),
        (0.001, None, "error", "the teacher detects nothing"),
    ],
)
def test_a_teacher_must_be_ahead(teacher_map: float, student_map: float | None, level: str, part: str) -> None:
    report = Report({})
    classes = {"circle": (0.8, 20), "rare": (0.0, 2)}
    results = {"teacher": {"map": teacher_map, "classes": classes}}
    if student_map is not None:
        results["student"] = {"map": student_map, "classes": classes}
    quality.judge(report, results, 64)
    assert [f.level for f in report.findings] == [level]
    assert found(report, level, part)


def test_a_class_that_the_teacher_does_not_know() -> None:
    report = Report({})
    quality.judge(report, {"teacher": {"map": 0.4, "classes": {"circle": (0.8, 20), "square": (0.01, 30)}}}, 64)
    assert found(report, "warning", "hardly detects 'square'")


# ------------------------------------------------------------------------------------------------------ the terms


def judged(share: float, cosine: float, **term: Any) -> Report:
    report = Report({})
    entry = SimpleNamespace(ratio=None, weight=2.0, **term)
    distiller = SimpleNamespace(terms={"fgd": entry}, weight=lambda _name: 2.0)
    row = AuditRow("fgd", 1.0, share, share, cosine)
    terms.judge(report, SimpleNamespace(distiller=distiller), {"fgd": [row, row]}, {})  # type: ignore[arg-type]
    return report


def test_terms_are_judged() -> None:
    assert not judged(0.4, 0.1).findings
    assert found(
        judged(0.4, -0.5),
        "warning",
        "works against the task loss: the cosine of their gradients is -0.50",
        "Lower kd.fgd.weight",
    )
    assert found(
        judged(6.0, 0.1), "warning", "too strong", "its gradient is 6 x that of the task loss", "kd.fgd.weight=0.1,"
    )
    assert found(judged(0.001, 0.1), "warning", "too weak", "kd.fgd.weight=6e+02", "weight=auto")


def test_a_term_that_does_nothing_is_an_error_if_it_never_does() -> None:
    def report(problems: int) -> Report:
        made = Report({})
        distiller = SimpleNamespace(terms={"fgfi": SimpleNamespace(ratio=None, weight=1.0)}, weight=lambda _name: 1.0)
        rows = [AuditRow("fgfi", 0.0, 0.0, 0.0, 0.0)] * 2
        sentence = "term 'fgfi' has no gradient into the student on the first batch."
        trainer: Any = SimpleNamespace(distiller=distiller)
        terms.judge(made, trainer, {"fgfi": rows}, {"fgfi": [sentence] * problems})
        return made

    assert found(report(2), "error", "no gradient into the student on 2 of 2 batches")
    assert found(report(1), "warning", "no gradient into the student on 1 of 2 batches")


# -------------------------------------------------------------------------------------------------------- dry run


def test_the_dry_run_ends_when_it_fails(shapes: Path) -> None:
    from ultralytics.data import dataset as labels

    before, level = labels.save_dataset_cache_file, LOGGER.level
    dry = nothing_written()
    trace = dry.__enter__()
    folder = trace.folder
    LOGGER.warning("heard")
    assert folder.exists()
    assert not dry.__exit__(RuntimeError, RuntimeError("stopped"), None)
    assert trace.warnings == ["heard"]
    assert labels.save_dataset_cache_file is before
    assert LOGGER.level == level != logging.WARNING
    assert not folder.exists()
