"""Export with Ultralytics and, for ONNX, a comparison of the file with its checkpoint.

`export_model` lets Ultralytics write the file, in any of its formats. `parity` then compares an ONNX file with its
checkpoint. The report goes to `<stem>.parity.json` in the same folder, and a file that fails raises `ParityError`.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ultralytics import YOLO
from ultralytics.cfg import DEFAULT_CFG_DICT, get_cfg
from ultralytics.engine.exporter import export_formats, validate_args
from ultralytics.utils import DEFAULT_CFG, LOGGER

from yolo_kd.config.ultralytics_keys import wrong_value, wrong_values
from yolo_kd.errors import CheckpointError, ConfigError, ParityError, SetupError, did_you_mean, listed
from yolo_kd.export.parity import Parity, summary, verify_onnx
from yolo_kd.export.pictures import find_images
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector, sha256
from yolo_kd.safe_loading.dataset import is_local_yaml
from yolo_kd.safe_loading.restricted import restricted_loading

# names of formats that the exporter accepts in addition to those it lists
ALIASES = {
    **dict.fromkeys(("tensorrt", "trt"), "engine"),
    **dict.fromkeys(("mlmodel", "mlpackage", "mlprogram", "apple", "ios"), "coreml"),
    **dict.fromkeys(("huawei", "cann", "om"), "ascend"),
    **dict.fromkeys(("vitis", "vitisai", "versal"), "xilinx"),
    **dict.fromkeys(("tflite", "tfjs"), "litert"),
}
DEPRECATED_KEYS = ("half", "int8", "end2end")


@dataclass(frozen=True)
class ExportResult:
    """An exported model.

    Attributes:
        file: The exported file, or for some formats a folder.
        format: Its format, as Ultralytics lists it.
        parity: The comparison with the checkpoint, None for formats other than ONNX.
        report: The JSON file of the comparison, None without a comparison.
        verdict: One sentence for the user.
    """

    file: Path
    format: str
    parity: Parity | None
    report: Path | None
    verdict: str


def export_model(
    model: str | Path,
    *,
    format: str = "onnx",
    images: str | Path | None = None,
    tolerance_boxes: float | None = None,
    tolerance_scores: float | None = None,
    trust_checkpoints: bool = False,
    **ultralytics_export_keys: Any,
) -> ExportResult:
    """Export a checkpoint with Ultralytics, and compare an ONNX file with it.

    Args:
        model: The checkpoint of a detector.
        format: An export format of Ultralytics.
        images: Folder, picture or data YAML (its val split) to compare on. By default the val split of the data set on
            which the checkpoint was trained, or the photographs in the ultralytics package if that data set is gone.
        tolerance_boxes: Largest difference of a box coordinate in pixels, see `yolo_kd.export.parity`.
        tolerance_scores: Largest difference of a probability.
        trust_checkpoints: Load the checkpoint without restriction: it may run code.
        ultralytics_export_keys: `imgsz`, `batch`, `dynamic`, `simplify`, `quantize`, `nms` ... as in Ultralytics.

    Returns:
        The exported file and, for ONNX, the comparison.

    Raises:
        ConfigError: For an unknown format or key or an impossible value, before anything is written.
        CheckpointError: If the checkpoint is missing, unsafe or no detector.
        DataError: If `images` holds no readable picture.
        SetupError: If a package that the format needs is not installed.
        ParityError: If the ONNX file differs from its checkpoint. File and report remain for inspection.
    """
    if not isinstance(trust_checkpoints, bool):
        raise ConfigError(f"trust_checkpoints must be true or false, received {trust_checkpoints!r}.")
    if not isinstance(model, str | Path):
        raise ConfigError(f"model must be the path of a checkpoint, received {model!r}.")
    gate = {"images": images, "tolerance_boxes": tolerance_boxes, "tolerance_scores": tolerance_scores}
    kind, args = check_request(format, ultralytics_export_keys, gate)
    if kind == "onnx":
        for package in ("onnx", "onnxruntime"):
            _require(package)
    detector, trained = _checkpoint(model, trust_checkpoints, ultralytics_export_keys)
    pictures = find_images(images, {**detector.checkpoint, "train_args": trained}) if kind == "onnx" else None
    file = _export(detector, format, trained.get("data"), trust_checkpoints, ultralytics_export_keys)
    if pictures is None:
        verdict = f"{file}: not compared with the checkpoint, because only format=onnx is compared."
        LOGGER.info(verdict)
        return ExportResult(file, kind, None, None, verdict)
    parity = verify_onnx(
        file, detector, pictures, args, tolerance_boxes=tolerance_boxes, tolerance_scores=tolerance_scores
    )
    report = file.with_suffix(".parity.json")
    _write_report(report, parity, detector, file, ultralytics_export_keys)
    lines = summary(parity)
    LOGGER.info("\n".join(lines))
    if not parity.passed:
        reasons = "\n".join(f"  {problem}" for problem in parity.problems)
        raise ParityError(f"{file} does not compute what {model} computes; do not deploy it:\n{reasons}\nSee {report}.")
    return ExportResult(file, kind, parity, report, lines[-1])


def _export(detector: LoadedDetector, format: str, data: Any, trust: bool, keys: dict[str, Any]) -> Path:
    """Let Ultralytics write the file; `data` is the data set on which the checkpoint was trained."""
    with restricted_loading(trust):
        try:
            model = YOLO(str(detector.path))
            # a checkpoint must not choose what is downloaded for calibration
            if not is_local_yaml(str(data)):
                model.overrides["data"] = None
            return Path(model.export(format=format, **keys))
        except ImportError as error:
            raise SetupError(f"format={format} needs a package that cannot be imported: {error}.") from error
        except (AssertionError, TypeError, ValueError, SystemError) as error:
            raise ConfigError(f"Ultralytics cannot export {detector.path} with format={format}: {error}") from error


def _checkpoint(model: str | Path, trust: bool, keys: dict[str, Any]) -> tuple[LoadedDetector, dict[str, Any]]:
    """Load the checkpoint to export, and return it with its training arguments.

    Raises:
        CheckpointError: If it is missing, unsafe, no detector or no checkpoint.
        ConfigError: If it was trained at an impossible size and `keys` names no other.
    """
    detector = load_detector(model, trust=trust)
    if detector.random:
        raise CheckpointError(f"model={model} has random weights; export needs a checkpoint such as best.pt.")
    trained = detector.checkpoint.get("train_args")
    trained = trained if isinstance(trained, dict) else {}
    if (wrong := wrong_value("imgsz", trained.get("imgsz"), "export")) and "imgsz" not in keys:
        raise ConfigError(f"model={model} was trained at an impossible size: {wrong}")
    return detector, trained


def check_request(format: str, keys: dict[str, Any], gate: dict[str, Any]) -> tuple[str, SimpleNamespace]:
    """Check the request before the checkpoint is opened.

    Args:
        format: The format as the user wrote it.
        keys: Export keys of Ultralytics.
        gate: Keys of the comparison: images, tolerance_boxes, tolerance_scores.

    Returns:
        The format as Ultralytics lists it, and the export arguments completed by Ultralytics' defaults.

    Raises:
        ConfigError: With every mistake.
    """
    table = export_formats()
    formats = [name for name in table["Argument"] if name != "-"]
    word = str(format).lower()
    kind = ALIASES.get(word, word)
    allowed = [key for key in DEFAULT_CFG_DICT if key not in ("model", "mode", "task", "format")]
    problems = wrong_values(keys, "export")
    if kind not in formats:
        hint = did_you_mean(word, [*formats, *ALIASES])
        problems.append(f"format={format} is not an export format.{hint} Allowed: {listed(formats)}.")
    for key in keys:
        if key not in allowed and key not in DEPRECATED_KEYS:
            hint = did_you_mean(key, [*allowed, *gate, "trust_checkpoints"])
            problems.append(f"{key} is not an export key of Ultralytics or yolo-kd.{hint}")
    if (images := gate["images"]) is not None and not isinstance(images, str | Path):
        problems.append(f"images must be the path of a folder, a picture or a data YAML, received {images!r}.")
    for key in ("tolerance_boxes", "tolerance_scores"):
        value = gate[key]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        if value is not None and not number:
            hint = " PyYAML reads 1e-3 as text: write 0.001 or 1.0e-3." if isinstance(value, str) else ""
            problems.append(f"{key} must be a number of at least 0, received {value!r}.{hint}")
    if kind in formats and kind != "onnx":
        for key in (name for name, value in gate.items() if value is not None):
            problems.append(f"{key} has no effect with format={kind}: only format=onnx is compared. Leave it out.")
    args = SimpleNamespace()
    if not problems:
        try:
            args = get_cfg(DEFAULT_CFG, {"batch": 1, "data": None, "device": None, **keys, "format": kind})
            validate_args(kind, args, dict(zip(table["Argument"], table["Arguments"], strict=True))[kind])
        except (AssertionError, TypeError, ValueError, SyntaxError) as error:
            problems.append(str(error).removeprefix("ERROR ❌️ "))
    if problems:
        raise ConfigError(problems)
    return kind, args


def _write_report(file: Path, parity: Parity, detector: LoadedDetector, exported: Path, keys: dict[str, Any]) -> None:
    """Write the comparison as strict JSON, in which a number that is not finite becomes null."""
    packages = ("torch", "onnx", "onnxruntime", "ultralytics", "yolo-kd")
    result = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(parity).items()}
    content = {
        "passed": parity.passed,
        "judged": parity.judged,
        "checkpoint": {"path": str(detector.path), "sha256": detector.sha256},
        "onnx": {"path": str(exported), "sha256": sha256(exported)},
        "export_keys": {key: value if isinstance(value, (bool, int)) else str(value) for key, value in keys.items()},
        "versions": {package: _version(package) for package in packages},
        **result,
    }
    file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def _version(package: str) -> str:
    try:
        return version(package)
    except ImportError:
        return "not installed"


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError as error:
        raise SetupError(
            f"format=onnx needs the package {package}: {error}. Install it: pip install {package}"
        ) from error
