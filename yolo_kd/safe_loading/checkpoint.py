"""Loading detectors from checkpoints and model YAMLs of any origin.

`load_detector` is the one entry for teachers, students and files to export. A checkpoint is loaded restrictedly (see
`restricted`), its model is checked (see `architecture`), and every failure becomes a `CheckpointError` that names the
file, the reason and what to do.
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
        checkpoint: The dictionary in the checkpoint, empty for a model YAML.
        path: The file.
        sha256: Hash of the file.
        random: True if the weights are random because the file is a model YAML.
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
    """Read the dictionary in a checkpoint, restrictedly unless `trust`.

    Args:
        path: A `.pt` file, or the name of one that Ultralytics can download.
        role: The key that names the file, for messages: teacher, student, model, resume.
        trust: Load without restriction: the file may run code.

    Returns:
        The dictionary and the path of the file.

    Raises:
        CheckpointError: If the file is missing, damaged, no checkpoint, or asks for names that can run code.
    """
    path = Path(check_model_file_from_stem(str(path)))
    _check_path(path, role)
    with restricted_loading(trust):
        try:
            checkpoint, file = tasks.torch_safe_load(str(path))
        except AttributeError:  # not a dictionary: Ultralytics then reads its attribute `model`
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
    """Return the model in a checkpoint's dictionary, preferably the averaged one; None if there is no model."""
    if not isinstance(checkpoint, dict):
        return None
    ema = checkpoint.get("ema")
    model = checkpoint.get("model") if ema is None else ema
    return model if isinstance(model, nn.Module) else None


def _check_path(path: Path, role: str) -> None:
    """Check the path of a checkpoint without opening the file.

    Raises:
        CheckpointError: If it is an address, does not exist, is no file, or has the suffix of another kind of file.
    """
    _check_local(path, f"{role}={path}")
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
    except OSError as error:  # for example, the name is too long or access to the folder is denied
        raise CheckpointError(f"{role}={str(path)[:80]} cannot be read: {error.strerror}.") from error


def _check_local(path: Path, what: str) -> None:
    if ":/" in str(path):
        raise CheckpointError(f"{what} is an address. Download the file first and name it.")


def _downloadable(path: Path) -> bool:
    """Return whether a missing file is one that Ultralytics finds by its bare name."""
    available = path.name in GITHUB_ASSETS_NAMES or (Path(SETTINGS["weights_dir"]) / path.name).exists()
    return path.name == str(path) and available


def _neighbour(path: Path) -> str:
    """Return a hint: the closest name of a file, or that the folder does not exist."""
    names = [p.name for p in path.parent.glob("*.pt")] if path.parent.is_dir() else []
    names += GITHUB_ASSETS_NAMES if path.name == str(path) else []
    return did_you_mean(path.name, names) or (
        f" Its folder {path.parent} does not exist." if not path.parent.is_dir() else ""
    )


def _refusal(role: str, path: Path, error: Exception) -> str:
    """Return a sentence that says why a file could not be loaded."""
    file = f"{role}={path}"
    if isinstance(error, OSError):
        return f"{file} cannot be read: {error.strerror or first_line(error)}."
    refused = error if isinstance(error, Refused) else None
    names = refused.names if refused else _unsafe_names(path)
    if names:
        shown = listed([name[:80] for name in names[:6]]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return (
            f"{file} was refused: besides weights it asks for {shown}, and loading those can run code. "
            "If you made the file yourself, add trust_checkpoints=true."
        )
    if refused is None:
        return f"{file} is not a loadable checkpoint: the file is damaged or of another kind: {first_line(error)}."
    if refused.foreign:
        return f"{file} is not a loadable checkpoint: {refused.reason}."
    return f"{file} was refused: {refused.reason}. Get the file from a source you trust."


def _unsafe_names(path: Path) -> tuple[str, ...]:
    """Return the names for which PyTorch's restricted loader would refuse a file, none if the file is damaged."""
    try:
        return tuple(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))))
    except Exception:
        return ()


def is_model_yaml(source: str | Path) -> bool:
    """Return whether a model is named by its YAML, so that its weights are random."""
    return Path(source).suffix.lower() in {".yaml", ".yml"}


def load_detector(
    source: str | Path, *, role: str = "model", trust: bool = False, nc: int | None = None, channels: int = 3
) -> LoadedDetector:
    """Load a detector from anything Ultralytics takes.

    Args:
        source: A checkpoint, the name of one that Ultralytics can download, or a model YAML (random weights).
        role: The key that names the source, for messages.
        trust: Load without restriction: the file may run code.
        nc: Number of classes for a model YAML.
        channels: Image channels for a model YAML.

    Returns:
        The detector, float32, in eval mode, on the CPU.

    Raises:
        CheckpointError: If the source is missing, unsafe, damaged, or no detector.
    """
    source = Path(check_model_file_from_stem(str(source)))
    what = f"{role}={source}"
    if is_model_yaml(source):
        return _build_detector(source, what, nc, channels, trust)
    checkpoint, path = load_checkpoint_file(source, role=role, trust=trust)
    model = held_model(checkpoint)
    check_model(model, what, rebuilt=role == "student", trust=trust)
    try:
        model = model.float().eval()
    except Exception as error:  # the layers in a file need not be consistent
        raise CheckpointError(f"{what} is not a loadable checkpoint: {first_line(error)}.") from error
    return LoadedDetector(model, checkpoint, path, sha256(path))


def _build_detector(source: Path, what: str, nc: int | None, channels: int, trust: bool) -> LoadedDetector:
    """Build a detector with random weights from a model YAML."""
    _check_local(source, what)
    try:
        with restricted_loading(trust), torch.random.fork_rng(devices=[]), quiet():
            if not trust:
                check_description(tasks.yaml_model_load(source), what)
            torch.manual_seed(0)  # a resumed run needs the same random teacher
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
