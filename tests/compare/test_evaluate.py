"""Evaluation: Ultralytics' own numbers, and predictions kept in pixels of the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ultralytics import YOLO

from tests.support.models import narrow_checkpoint
from yolo_kd.compare import evaluate as module
from yolo_kd.compare.evaluate import (
    OtherClassesError,
    Settings,
    audit_of,
    evaluate,
    load_predictions,
    predictions_file,
    save_predictions,
    settings_of,
)
from yolo_kd.compare.records import SplitResult
from yolo_kd.compare.size_metrics import ImageResult


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("model"))


def test_settings(tmp_path: Path) -> None:
    found = settings_of({"data": "d.yaml", "imgsz": 320, "batch": -1, "epochs": 3, "iou": 0.6}, {"test": "x"}, False)
    assert found == Settings("d.yaml", ("val", "test"), {"imgsz": 320, "batch": 16, "iou": 0.6})
    assert settings_of({"data": "d.yaml", "batch": 0.7}, {"test": None}, True).splits == ("val",)
    assert settings_of({"data": "d.yaml"}, {}, False).imgsz == 640


@pytest.mark.slow
def test_numbers_are_those_of_ultralytics(tmp_path: Path, shapes: Path, model: Path) -> None:
    settings = Settings(str(shapes), ("val", "test"), {"imgsz": 96, "batch": 4, "device": "cpu"})
    found = evaluate(model, settings, tmp_path)
    reference = YOLO(model).val(
        data=str(shapes), split="val", imgsz=96, batch=4, device="cpu", plots=False, verbose=False,
        save_dir=str(tmp_path / "val"),
    )  # fmt: skip
    metrics = found.splits["val"].metrics
    expected = (reference.box.map, reference.box.map50, reference.box.mp, reference.box.mr)
    assert list(metrics.values()) == pytest.approx([float(v) for v in expected], abs=1e-6)
    assert list(found.splits["val"].classes) == ["circle", "square", "triangle"]
    assert found.parameters == sum(p.numel() for p in YOLO(model).model.parameters())
    assert found.gflops > 0
    # labels come back where the data set has them, in pixels of the file
    images = load_predictions(predictions_file(tmp_path, found.key, "val"))
    root = Path(yaml.safe_load(shapes.read_text()).get("path") or shapes.parent)
    assert len(images) == 8
    for image in images:
        label = next(root.rglob(f"labels/val/{Path(image.name).stem}.txt"))
        rows = np.loadtxt(label, ndmin=2).reshape(-1, 5)
        height, width = image.shape
        centre, size = rows[:, 1:3] * (width, height), rows[:, 3:5] * (width, height)
        boxes = np.concatenate([centre - size / 2, centre + size / 2], 1)
        order, ours = np.lexsort(boxes.T), np.lexsort(image.true_boxes.T)
        assert image.true_boxes[ours] == pytest.approx(boxes[order], abs=0.1)


def test_what_was_evaluated_is_read_back(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def once(*arguments: object) -> tuple[SplitResult, list]:
        calls.append(arguments)
        return SplitResult(images=0, metrics={"mAP50": 0.25}, classes={"a": None}, sizes={}), []

    monkeypatch.setattr(module, "_validate", once)
    settings = Settings("d.yaml", ("val",), {"imgsz": 64})
    first = evaluate(model, settings, tmp_path)
    assert evaluate(model, settings, tmp_path) == first
    assert len(calls) == 1
    evaluate(model, Settings("d.yaml", ("val",), {"imgsz": 96}), tmp_path)
    assert len(calls) == 2
    for damage in ("{", "{}", first.to_json().replace('"gflops"', '"flops"')):
        (tmp_path / f"{first.key}.json").write_text(damage)
        assert evaluate(model, settings, tmp_path) == first
    assert len(calls) == 5


def test_predictions_survive_the_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [
        ImageResult(f"{n}.png", (10 + n, 20), rng.random((n, 4)).astype("f4"), rng.random(n).astype("f4"),
                    rng.integers(0, 3, n), rng.random((2 - n % 3, 4)).astype("f4"), rng.integers(0, 3, 2 - n % 3))
        for n in range(4)
    ]  # fmt: skip
    save_predictions(tmp_path / "new" / "p.npz", images)
    for before, after in zip(images, load_predictions(tmp_path / "new" / "p.npz"), strict=True):
        assert (before.name, before.shape) == (after.name, after.shape)
        for key in ("boxes", "scores", "classes", "true_boxes", "true_classes"):
            assert np.array_equal(getattr(before, key), getattr(after, key))
    save_predictions(tmp_path / "none.npz", [])
    assert load_predictions(tmp_path / "none.npz") == []


def test_a_checkpoint_without_an_audit(model: Path) -> None:
    assert audit_of(model, trust=False) == ()


@pytest.mark.slow
def test_a_model_with_more_classes_counts_in_those_of_the_data(tmp_path: Path, shapes: Path, model: Path) -> None:
    """The same detector with its classes at other indices, and one more that it never sees, has the same numbers."""
    checkpoint = torch.load(model, weights_only=False)
    wide = narrow_checkpoint("yolov8n", tmp_path, nc=4, names={0: "x", 1: "Square", 2: "circle", 3: "TRIANGLE"})
    other = torch.load(wide, weights_only=False)
    state = other["model"].state_dict()
    for name, tensor in checkpoint["model"].state_dict().items():
        if tensor.shape == state[name].shape:
            state[name].copy_(tensor)
        else:
            state[name][[2, 1, 3]] = tensor
            state[name][0] = 0 if name.endswith("weight") else -20
    torch.save(other, wide)
    settings = Settings(str(shapes), ("val",), {"imgsz": 96, "batch": 4, "device": "cpu"})
    plain, found = (evaluate(file, settings, tmp_path / "cache").splits["val"] for file in (model, wide))
    assert list(found.classes) == ["circle", "Square", "TRIANGLE"]
    assert list(found.classes.values()) == pytest.approx(list(plain.classes.values()), abs=1e-6)
    assert found.metrics == pytest.approx(plain.metrics, abs=1e-6)
    assert found.sizes == plain.sizes
    strange = narrow_checkpoint("yolov8n", tmp_path / "s", nc=2, names={0: "a", 1: "b"})
    with pytest.raises(OtherClassesError, match=r"a model of 2 classes \(a, b\) cannot be evaluated on this data set"):
        evaluate(strange, settings, tmp_path / "cache")
