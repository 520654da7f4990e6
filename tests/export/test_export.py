"""Export and the comparison with the checkpoint, on tiny detectors whose outputs depend on the picture."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from ultralytics import YOLO
from ultralytics.nn.tasks import DetectionModel, SegmentationModel, yaml_model_load

from yolo_kd.errors import CheckpointError, ConfigError, DataError, ParityError
from yolo_kd.export import export
from yolo_kd.export.export import ExportResult, check_request, export_model
from yolo_kd.export.parity import verify_onnx
from yolo_kd.export.pictures import find_images
from yolo_kd.safe_loading.checkpoint import load_detector

SIZE = 96


def tiny_model(name: str, kind: type[DetectionModel] = DetectionModel) -> DetectionModel:
    """Build a narrow model whose outputs depend on the picture and whose class scores reach from nearly 0 to nearly 1.

    Untrained weights give the same tiny score everywhere: a comparison of such outputs would prove nothing.
    """
    config = yaml_model_load(name)
    config["scales"] = {"n": [0.33, 0.125, 512]}
    config["scale"] = "n"
    torch.manual_seed(0)
    model = kind(config, ch=3, nc=3, verbose=False)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = norms[0].momentum
    for norm in norms:
        norm.momentum = None  # average of what is seen, instead of a slow drift from (0, 1)
    model.train()
    with torch.no_grad():
        model(torch.rand(8, 3, SIZE, SIZE))
    for norm in norms:
        norm.momentum = momentum
    head = model.model[-1]
    for branch in ("cv3", "one2one_cv3"):
        for level in getattr(head, branch, None) or ():
            nn.init.normal_(level[-1].weight, std=0.3)
            nn.init.normal_(level[-1].bias, mean=-2.0)
    return model.eval()


def save_checkpoint(model: nn.Module, path: Path, **train_args: Any) -> Path:
    """Save a model the way the trainer does: half precision in a dictionary."""
    args = {"task": "detect", "imgsz": SIZE, **train_args}
    torch.save({"epoch": -1, "model": model.half(), "ema": None, "optimizer": None, "train_args": args}, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for index, shape in enumerate([(80, 120, 3), (96, 96, 3), (150, 70, 3)]):
        coarse = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), cv2.resize(coarse, shape[1::-1], interpolation=cv2.INTER_CUBIC))
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny checkpoints by the name of their model YAML, each built once."""
    folder = tmp_path_factory.mktemp("originals")

    def get(name: str) -> Path:
        path = folder / f"{name}.pt"
        return path if path.exists() else save_checkpoint(tiny_model(f"{name}.yaml"), path)

    return get


@pytest.fixture
def checkpoint(originals: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies of the tiny checkpoints, because an export lands beside its checkpoint."""
    return lambda name: Path(shutil.copy(originals(name), tmp_path / "best.pt"))


@pytest.fixture(scope="module")
def exported(originals: Callable[[str], Path], pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A YOLOv8 checkpoint `best.pt` with its ONNX file, not to be changed."""
    path = Path(shutil.copy(originals("yolov8n"), tmp_path_factory.mktemp("exported") / "best.pt"))
    return export_model(path, imgsz=SIZE, images=pictures).file


def report_of(file: Path) -> dict[str, Any]:
    """Read a report as strict JSON."""

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(file.with_suffix(".parity.json").read_text(encoding="utf-8"), parse_constant=refuse)


def altered(exported: Path, folder: Path, change: Callable[[onnx.ModelProto], None]) -> Path:
    """Copy checkpoint and ONNX file to a folder and change the latter; return the checkpoint."""
    graph = onnx.load(str(exported))
    change(graph)
    onnx.save(graph, str(folder / "best.onnx"))
    return Path(shutil.copy(exported.with_name("best.pt"), folder / "best.pt"))


def stub_native_export(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    """Let Ultralytics "write" a file that is there already."""
    monkeypatch.setattr(YOLO, "export", lambda self, **keys: str(file))


def strengthen_one_weight(graph: onnx.ModelProto) -> None:
    tensor = next(t for t in graph.graph.initializer if len(t.dims) == 4 and t.dims[1] > 1)
    weights = numpy_helper.to_array(tensor).copy()
    weights[0, 0] += 0.5
    tensor.CopyFrom(numpy_helper.from_array(weights, tensor.name))


def add_teacher_tensor(graph: onnx.ModelProto) -> None:
    stored = sum(int(np.prod(t.dims)) for t in graph.graph.initializer)
    extra = np.zeros(int(0.05 * stored), np.float32)
    graph.graph.initializer.append(numpy_helper.from_array(extra, "teacher.weight"))


@pytest.mark.e2e
def test_onnx_file_of_v8_agrees_and_the_report_says_so(exported: Path) -> None:
    report = report_of(exported)
    assert report["passed"] is True
    assert report["problems"] == []
    assert report["output"] == "raw"
    assert report["precision"] == "fp32"
    assert report["compared"] == 3 * (12**2 + 6**2 + 3**2)
    assert 0 < report["boxes_max"] < report["tolerance_boxes"] == 0.03
    assert 0 < report["scores_max"] < report["tolerance_scores"] == 2e-4
    assert report["checkpoint"]["sha256"] == load_detector(exported.with_name("best.pt")).sha256
    assert len(report["onnx"]["sha256"]) == 64
    assert len(report["images"]) == 3
    assert report["images_source"].startswith("images=")
    assert set(report["versions"]) == {"torch", "onnx", "onnxruntime", "ultralytics", "yolo-kd"}
    assert 0.98 < report["initializer_elements"] / report["student_elements"] < 1.02


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "keys", "output"),
    [
        ("yolo26n", {}, "raw"),
        ("yolo26n", {"nms": False}, "one-to-one detections"),
        ("yolov10n", {}, "raw"),
        ("yolov10n", {"nms": False}, "one-to-one detections"),
        ("yolov8n", {"nms": True, "conf": 0.1}, "detections after NMS"),
        ("yolov8n", {"nms": True, "max_det": 5, "batch": 2, "dynamic": True}, "detections after NMS"),
        ("yolov8n", {"dynamic": True, "batch": 2, "simplify": False}, "raw"),
        ("yolov8n", {"batch": 2, "imgsz": [64, 128]}, "raw"),
        ("yolo26n", {"nms": False, "dynamic": True, "agnostic_nms": True, "max_det": 20}, "one-to-one detections"),
    ],
)
def test_every_head_mode_agrees(
    checkpoint: Callable[[str], Path], pictures: Path, name: str, keys: dict[str, Any], output: str
) -> None:
    result = export_model(checkpoint(name), images=pictures, **{"imgsz": SIZE, **keys})
    assert isinstance(result, ExportResult)
    assert result.parity is not None
    assert result.parity.passed
    assert result.parity.output == output
    assert result.parity.compared > 20
    assert result.parity.unmatched == 0
    widths = {shape[3] for shape in result.parity.input_shapes}
    assert len(widths) == (2 if keys.get("dynamic") else 1)
    assert result.report == result.file.with_suffix(".parity.json")


@pytest.mark.e2e
def test_half_precision_is_recognised_and_judged_by_its_own_tolerance(
    checkpoint: Callable[[str], Path], pictures: Path, tmp_path: Path
) -> None:
    path = checkpoint("yolov8n")
    result = export_model(path, images=pictures, imgsz=SIZE, quantize=16)
    assert result.parity is not None
    assert result.parity.precision == "fp16"
    assert result.parity.tolerance_boxes == 30.0
    assert result.parity.scores_max > 2e-4

    # A GPU export takes fp16 pictures as well; the gate must feed it what it asks for.
    from onnxruntime.transformers import float16

    export_model(path, images=pictures, imgsz=SIZE)
    graph = onnx.load(str(tmp_path / "best.onnx"))
    onnx.save(float16.convert_float_to_float16(graph, keep_io_types=False), str(tmp_path / "io16.onnx"))
    args = check_request("onnx", {"imgsz": SIZE}, dict.fromkeys(("images", "tolerance_boxes", "tolerance_scores")))[1]
    assert verify_onnx(tmp_path / "io16.onnx", load_detector(path), find_images(pictures, {}), args).passed


@pytest.mark.e2e
def test_int8_file_is_reported_and_judged_only_on_request(checkpoint: Callable[[str], Path], shapes: Path) -> None:
    keys = {"imgsz": SIZE, "images": shapes, "quantize": 8, "data": str(shapes)}
    result = export_model(checkpoint("yolov8n"), **keys)
    assert result.parity is not None
    assert result.parity.precision == "int8"
    assert result.parity.tolerance_boxes is None
    assert result.parity.boxes_max > 0.03
    assert "not judged" in result.verdict
    assert report_of(result.file)["judged"] is False
    with pytest.raises(ParityError, match="boxes differ"):
        export_model(checkpoint("yolov8n"), **keys, tolerance_boxes=1e-3)


@pytest.mark.e2e
def test_changed_weight_fails_and_the_report_says_so(
    exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = altered(exported, tmp_path, strengthen_one_weight)
    stub_native_export(monkeypatch, tmp_path / "best.onnx")
    with pytest.raises(ParityError, match="differ by up to") as caught:
        export_model(path, imgsz=SIZE, images=pictures)
    assert caught.value.exit_code == 1
    report = report_of(tmp_path / "best.onnx")
    assert report["passed"] is False
    assert report["scores_max"] > report["tolerance_scores"]
    assert any("scores differ" in problem for problem in report["problems"])
    # The gate is as strict as the user makes it.
    assert export_model(path, imgsz=SIZE, images=pictures, tolerance_boxes=1e4, tolerance_scores=1.0).parity is not None


@pytest.mark.e2e
def test_not_a_number_fails_in_strict_json(
    exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def poison(graph: onnx.ModelProto) -> None:
        tensor = next(t for t in graph.graph.initializer if len(t.dims) == 4)
        tensor.CopyFrom(numpy_helper.from_array(np.full(tuple(tensor.dims), np.nan, np.float32), tensor.name))

    path = altered(exported, tmp_path, poison)
    stub_native_export(monkeypatch, tmp_path / "best.onnx")
    with pytest.raises(ParityError, match="not finite"):
        export_model(path, imgsz=SIZE, images=pictures)
    report = report_of(tmp_path / "best.onnx")
    assert report["passed"] is False
    assert report["scores_max"] is None


@pytest.mark.e2e
def test_teacher_tensor_is_found(
    exported: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = altered(exported, tmp_path, add_teacher_tensor)
    stub_native_export(monkeypatch, tmp_path / "best.onnx")
    with pytest.raises(ParityError, match="holds other tensors") as caught:
        export_model(path, imgsz=SIZE, images=pictures)
    report = report_of(tmp_path / "best.onnx")
    assert report["passed"] is False
    assert report["scores_max"] < 2e-4
    assert str(report["initializer_elements"]) in str(caught.value)
    assert str(report["student_elements"]) in str(caught.value)


@pytest.mark.e2e
def test_missing_detection_fails(checkpoint: Callable[[str], Path], pictures: Path) -> None:
    """A file with another confidence threshold than asked for drops detections that PyTorch has."""
    path = checkpoint("yolov8n")
    file = export_model(path, imgsz=SIZE, images=pictures, nms=True, conf=0.1).file
    gate = dict.fromkeys(("images", "tolerance_boxes", "tolerance_scores"))
    args = check_request("onnx", {"imgsz": SIZE, "nms": True, "conf": 0.05, "iou": 0.9}, gate)[1]
    parity = verify_onnx(file, load_detector(path), find_images(pictures, {}), args)
    assert not parity.passed


@pytest.mark.e2e
def test_an_nms_file_without_any_detection_is_no_proof(checkpoint: Callable[[str], Path], pictures: Path) -> None:
    with pytest.raises(ParityError, match="Nothing was compared"):
        export_model(checkpoint("yolov8n"), imgsz=SIZE, images=pictures, nms=True, conf=0.9999)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"format": "onx"}, "format=onx .* Did you mean 'onnx'"),
        ({"imgzs": 96}, "imgzs .* Did you mean 'imgsz'"),
        ({"tolerance_box": 1}, "tolerance_box .* Did you mean 'tolerance_boxes'"),
        ({"tolerance_boxes": "1e-3"}, r"tolerance_boxes must be a number .*1\.0e-3"),
        ({"tolerance_scores": -1}, "tolerance_scores must be a number of at least 0"),
        ({"format": "torchscript", "tolerance_scores": 0.1}, "no effect with format=torchscript"),
        ({"format": "torchscript", "simplify": False}, "'simplify' is not supported"),
        ({"quantize": 7}, "quantize=7"),
    ],
)
def test_mistake_is_named_before_anything_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    path = checkpoint("yolov8n")
    (tmp_path / "best.onnx").write_text("precious")
    with pytest.raises(ConfigError, match=message):
        export_model(path, **keys)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["best.onnx", "best.pt"]
    assert (tmp_path / "best.onnx").read_text() == "precious"


def test_all_mistakes_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        export_model("missing.pt", format="onx", imgzs=1, tolerance_boxes=-1)
    assert len(caught.value.problems) == 3


def test_bad_pictures_and_bad_checkpoints_write_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    path = checkpoint("yolov8n")
    (tmp_path / "best.onnx").write_text("precious")
    (tmp_path / "broken.jpg").write_text("no picture")
    with pytest.raises(DataError, match="does not exist"):
        export_model(path, images=tmp_path / "nowhere")
    with pytest.raises(DataError, match="cannot be read as a picture"):
        export_model(path, images=tmp_path / "broken.jpg")
    with pytest.raises(CheckpointError, match="does not exist"):
        export_model(tmp_path / "bset.pt")
    with pytest.raises(CheckpointError, match="random weights"):
        export_model("yolov8n.yaml")
    assert (tmp_path / "best.onnx").read_text() == "precious"
    assert not list(tmp_path.glob("*.json"))


def test_segmentation_checkpoint_is_refused(tmp_path: Path) -> None:
    model = SegmentationModel("yolov8n-seg.yaml", ch=3, nc=3, verbose=False)
    path = save_checkpoint(model, tmp_path / "seg.pt", task="segment")
    with pytest.raises(CheckpointError, match="segment"):
        export_model(path)
    assert [file.name for file in tmp_path.iterdir()] == ["seg.pt"]


@pytest.mark.e2e
def test_other_formats_pass_through_uncompared(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    result = export_model(checkpoint("yolov8n"), format="torchscript", imgsz=SIZE)
    assert result.file == tmp_path / "best.torchscript"
    assert result.file.exists()
    assert result.parity is None
    assert result.report is None
    assert "not compared" in result.verdict
    assert not list(tmp_path.glob("*.json"))


def test_alias_of_a_format_is_understood() -> None:
    gate = dict.fromkeys(("images", "tolerance_boxes", "tolerance_scores"))
    assert check_request("tensorrt", {}, gate)[0] == "engine"
    assert check_request("onnx", {"half": True}, gate)[1].quantize == 16


def test_pictures_come_from_the_val_split_or_from_the_package(shapes: Path, pictures: Path) -> None:
    found = find_images(None, {"train_args": {"data": str(shapes)}})
    assert found.source == f"val split of {shapes}"
    assert len(found.files) == 8
    assert all("val" in file.parts for file in found.files)
    gone = find_images(None, {"train_args": {"data": str(shapes.with_name("gone.yaml"))}})
    assert [file.name for file in gone.files] == ["bus.jpg", "zidane.jpg"]
    assert "was not found" in gone.source
    assert [file.name for file in find_images(pictures / "1.png", {}).files] == ["1.png"]
    assert find_images(shapes, {}).files == found.files


def test_val_split_may_be_a_list_or_a_text_file(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text(f"{pictures / '0.png'}\n{pictures / '1.png'}\n")
    data = tmp_path / "data.yaml"
    data.write_text(f"path: {tmp_path}\nval: [val.txt, {pictures / '2.png'}]\nnames: [a]\n")
    assert [file.name for file in find_images(data, {}).files] == ["0.png", "1.png", "2.png"]
    data.write_text("names: [a]\n")
    with pytest.raises(DataError, match="names no images in val:"):
        find_images(data, {})


def test_missing_package_is_named_before_the_checkpoint_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(export.SetupError, match="needs the package onnxruntime"):
        export_model("missing.pt")


@pytest.mark.parametrize(("named", "kept"), [("https://localhost:9/data.yaml", None), ("coco8.yaml", "coco8.yaml")])
def test_a_checkpoint_does_not_choose_what_is_fetched(
    named: str, kept: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ultralytics would calibrate on the data set that the checkpoint names, and fetch it first."""
    checkpoint = save_checkpoint(tiny_model("yolov8n.yaml"), tmp_path / "best.pt", data=named)
    seen: list[Any] = []
    monkeypatch.setattr(YOLO, "export", lambda self, **keys: seen.append(self.overrides["data"]) or str(checkpoint))
    export_model(checkpoint, format="openvino", quantize=8)
    assert seen == [kept]
