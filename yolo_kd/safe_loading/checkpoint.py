"""Loading models from files that may come from a stranger.

A `.pt` file is a pickle, and unpickling can run code. Ultralytics has a restricted loader, off by default; here it is
on by default and never degrades silently.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.utils import SETTINGS
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_kd.errors import CheckpointError, DataError, did_you_mean, first_line, listed
from yolo_kd.safe_loading.architecture import check_description, check_is_detector, check_model
from yolo_kd.safe_loading.pickle_scan import Refused
from yolo_kd.safe_loading.restricted import quiet, restricted_loading

EXPORTS = {
    ".onnx": "an ONNX file",
    ".engine": "a TensorRT engine",
    ".torchscript": "a TorchScript export",
    ".tflite": "a TensorFlow Lite file",
    ".pb": "a TensorFlow graph",
    ".mlpackage": "a Core ML package",
    ".mlmodel": "a Core ML model",
    ".xml": "an OpenVINO model",
}


@dataclass(frozen=True)
class LoadedDetector:
    """A detector read from a checkpoint or built from a model YAML.

    Attributes:
        model: The detector, float32, in eval mode, on the CPU.
        checkpoint: The checkpoint's dictionary, empty for a model YAML.
        path: The file it came from.
        sha256: Hash of that file.
        random: True if the weights are random because the source is a model YAML.
    """

    model: Any  # an Ultralytics DetectionModel, whose attributes nn.Module does not declare
    checkpoint: dict[str, Any]
    path: Path
    sha256: str
    random: bool = False


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's content in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def load_checkpoint_file(path: str | Path, *, role: str = "model", trust: bool = False) -> tuple[dict[str, Any], Path]:
    """Read a checkpoint's dictionary, restrictedly unless `trust`.

    Args:
        path: A `.pt` file, or the name of one that Ultralytics can download.
        role: What the file is for, used in messages: teacher, student, model, resume.
        trust: Allow everything a pickle can hold, including code.

    Returns:
        The dictionary and the file that was read.

    Raises:
        CheckpointError: If it is missing, damaged, not a checkpoint, or asks for more than the allow-list holds.
    """
    path = Path(check_model_file_from_stem(str(path)))
    _check_path(path, role)
    with restricted_loading(trust):
        try:
            checkpoint, file = tasks.torch_safe_load(str(path))
        except AttributeError:  # something else than a dictionary, of which Ultralytics reads the attribute `model`
            checkpoint, file = {}, str(path)
        except Exception as error:
            if not path.exists() and not (Path(SETTINGS["weights_dir"]) / path.name).exists():
                raise CheckpointError(
                    f"{role}={path} is not here and could not be downloaded. Name a file that exists, or go online."
                    f"{_neighbour(path)}"
                ) from error
            raise CheckpointError(_refusal(role, path, error)) from error
    if held_model(checkpoint) is None:
        raise CheckpointError(f"{role}={path} is not an Ultralytics checkpoint: it holds no model.")
    return checkpoint, Path(file)


def held_model(checkpoint: Any) -> Any:
    """Return the model of a checkpoint's dictionary, the averaged one where there is one; None if it holds none."""
    if not isinstance(checkpoint, dict):
        return None
    ema = checkpoint.get("ema")
    model = checkpoint.get("model") if ema is None else ema
    return model if isinstance(model, nn.Module) else None


def _check_path(path: Path, role: str) -> None:
    """Check what can be said of a checkpoint without opening it.

    Raises:
        CheckpointError: If it is an address, missing, no file, or of another kind by its ending.
    """
    if ":/" in str(path):
        raise CheckpointError(f"{role}={path} is an address. Download the file first and name it.")
    if (kind := EXPORTS.get(path.suffix.lower())) is not None:
        raise CheckpointError(
            f"{role}={path} is {kind}, not a checkpoint. Name the .pt file that it was exported from."
        )
    if path.suffix.lower() != ".pt":
        raise CheckpointError(f"{role}={path} is not a checkpoint: it must end in .pt (or .yaml for random weights).")
    try:
        if path.is_dir():
            raise CheckpointError(
                f"{role}={path} is a folder, not a checkpoint. Name a file such as {path / 'best.pt'}."
            )
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{role}={path} is a device or a pipe, not a file.")
        if not path.exists() and not _downloadable(path):
            raise CheckpointError(f"{role}={path} does not exist.{_neighbour(path)}")
    except OSError as error:  # a name that is too long, a folder that may not be entered
        raise CheckpointError(f"{role}={str(path)[:80]} cannot be read: {error.strerror}.") from error


def _downloadable(path: Path) -> bool:
    """Return whether a missing file is one that Ultralytics finds by its bare name."""
    known = path.name in GITHUB_ASSETS_NAMES or (Path(SETTINGS["weights_dir"]) / path.name).exists()
    return path.name == str(path) and known


def _neighbour(path: Path) -> str:
    """Return a hint at the file that may have been meant."""
    names = [p.name for p in path.parent.glob("*.pt")] if path.parent.is_dir() else []
    names += GITHUB_ASSETS_NAMES if path.name == str(path) else []
    return did_you_mean(path.name, names) or (
        f" Its folder {path.parent} does not exist." if not path.parent.is_dir() else ""
    )


def _refusal(role: str, path: Path, error: Exception) -> str:
    """Say in a sentence why a file could not be loaded."""
    if isinstance(error, OSError):
        return f"{role}={path} cannot be read: {error.strerror or first_line(error)}."
    names = error.names if isinstance(error, Refused) else ()
    if not names and not isinstance(error, Refused):
        try:
            names = tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))))
        except Exception:
            names = ()
    if names:
        shown = listed([name[:80] for name in names[:6]]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return (
            f"{role}={path} was refused: besides weights it asks for {shown}, and loading those can run code. "
            "If you made the file yourself, add trust_checkpoints=true."
        )
    if isinstance(error, Refused) and not error.foreign:
        return f"{role}={path} was refused: {error.reason}. Get the file from a source you trust."
    reason = (
        error.reason if isinstance(error, Refused) else f"the file is damaged or of another kind: {first_line(error)}"
    )
    return f"{role}={path} is not a loadable checkpoint: {reason}."


def load_detector(
    source: str | Path, *, role: str = "model", trust: bool = False, nc: int | None = None, channels: int = 3
) -> LoadedDetector:
    """Load a detector from anything Ultralytics takes.

    Args:
        source: A checkpoint, the name of one to download, or a model YAML (random weights).
        role: What it is for, used in messages.
        trust: Load without restriction.
        nc: Number of classes for a model YAML.
        channels: Image channels for a model YAML.

    Returns:
        The detector, float32, in eval mode, on the CPU.

    Raises:
        CheckpointError: If it is missing, unsafe, damaged, or not a detector.
    """
    source = Path(check_model_file_from_stem(str(source)))
    if source.suffix.lower() in {".yaml", ".yml"}:
        return _build_detector(source, role, nc, channels, trust)
    checkpoint, path = load_checkpoint_file(source, role=role, trust=trust)
    what = f"{role}={source}"
    model = held_model(checkpoint)
    check_model(model, what, rebuilt=role == "student", trust=trust)
    try:
        model = model.float().eval()
    except Exception as error:  # a file can hold layers whose parts do not fit each other
        raise CheckpointError(f"{what} is not a loadable checkpoint: {first_line(error)}.") from error
    return LoadedDetector(model, checkpoint, path, sha256(path))


def _build_detector(source: Path, role: str, nc: int | None, channels: int, trust: bool) -> LoadedDetector:
    """Build a detector with random weights from a model YAML."""
    what = f"{role}={source}"
    if ":/" in str(source):
        raise CheckpointError(f"{what} is an address. Download the file first and name it.")
    try:
        with restricted_loading(trust), torch.random.fork_rng(devices=[]), quiet():
            if not trust:
                check_description(tasks.yaml_model_load(source), what)
            torch.manual_seed(0)  # a random teacher is the same again when its run is resumed
            model = tasks.DetectionModel(str(source), ch=channels, nc=nc, verbose=False)
    except CheckpointError:
        raise
    except FileNotFoundError as error:
        raise CheckpointError(f"{what} does not exist, and Ultralytics ships no model of that name.") from error
    except Exception as error:
        reason = str(error) if isinstance(error, DataError) else first_line(error)
        raise CheckpointError(f"{what} is not a model YAML for a detector ({reason}).") from error
    check_is_detector(model, what)
    path = Path(model.yaml.get("yaml_file", source))
    digest = sha256(path) if path.exists() else hashlib.sha256(repr(model.yaml).encode()).hexdigest()
    return LoadedDetector(model.eval(), {}, path, digest, random=True)
