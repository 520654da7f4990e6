"""Loading models from files that may come from a stranger.

A `.pt` file is a pickle, and unpickling can run code. Ultralytics has a restricted loader, off by default; here it is
on by default and never degrades silently.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from ultralytics.nn import tasks
from ultralytics.nn.modules.head import OBB, Detect, Pose, Segment, WorldDetect, YOLOEDetect
from ultralytics.utils import LOGGER, SETTINGS
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_kd.errors import CheckpointError, did_you_mean, listed

OTHER_TASKS = {"segment": Segment, "pose": Pose, "obb": OBB}  # their heads are detection heads with a branch more


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


@contextmanager
def restricted_loading(trust: bool = False) -> Iterator[None]:
    """Make every checkpoint load of Ultralytics in this process restricted for the duration, unless `trust`.

    Ultralytics reads its switch from the environment once, at import; several of its loads (resume, recovery from NaN,
    final validation) take no argument. So the switch itself is turned here and turned back afterwards.

    Args:
        trust: Load without restriction: files may run code.

    Raises:
        CheckpointError: If this torch is too old for restricted loading; it would silently load without.
    """
    if not trust and not tasks._SafeLoad.SUPPORTED:
        raise CheckpointError(
            f"torch {torch.__version__} cannot load checkpoints restrictedly, which needs torch 2.6 or newer. Upgrade "
            "torch, or set trust_checkpoints=true if you trust every checkpoint of this command."
        )
    before = tasks.SAFE_LOAD
    tasks.SAFE_LOAD = not trust
    try:
        yield
    finally:
        tasks.SAFE_LOAD = before


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
    if path.suffix.lower() != ".pt":
        raise CheckpointError(f"{role}={path} is not a checkpoint: it must end in .pt (or .yaml for random weights).")
    if path.is_dir():
        raise CheckpointError(f"{role}={path} is a folder, not a checkpoint. Name a file such as {path / 'best.pt'}.")
    if not path.exists() and not _downloadable(path):
        raise CheckpointError(f"{role}={path} does not exist.{_neighbour(path)}")
    with restricted_loading(trust):
        try:
            checkpoint, file = tasks.torch_safe_load(str(path))
        except Exception as error:
            if not path.exists() and not (Path(SETTINGS["weights_dir"]) / path.name).exists():
                raise CheckpointError(
                    f"{role}={path} is not here and could not be downloaded. Name a file that exists, or go online."
                    f"{_neighbour(path)}"
                ) from error
            raise CheckpointError(_refusal(role, path, error)) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("ema") or checkpoint.get("model"), nn.Module):
        raise CheckpointError(f"{role}={path} is not an Ultralytics checkpoint: it holds no model.")
    return checkpoint, Path(file)


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
    try:
        names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        names = []
    if names:
        shown = listed(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return (
            f"{role}={path} was refused: besides weights it asks for {shown}, and loading those can run code. "
            "If you made the file yourself, add trust_checkpoints=true."
        )
    reason = _first_line(error)
    return f"{role}={path} is not a loadable checkpoint: the file is empty, damaged or of another kind ({reason})."


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:160]


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
    model = (checkpoint.get("ema") or checkpoint["model"]).float().eval()
    check_is_detector(model, f"{role}={source}")
    return LoadedDetector(model, checkpoint, path, sha256(path))


def _build_detector(source: Path, role: str, nc: int | None, channels: int, trust: bool) -> LoadedDetector:
    """Build a detector with random weights from a model YAML."""
    try:
        with restricted_loading(trust), torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(0)  # a random teacher is the same again when its run is resumed
            model = tasks.DetectionModel(str(source), ch=channels, nc=nc, verbose=False)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{role}={source} does not exist, and Ultralytics ships no model of that name."
        ) from error
    except Exception as error:
        raise CheckpointError(f"{role}={source} is not a model YAML for a detector ({_first_line(error)}).") from error
    check_is_detector(model, f"{role}={source}")
    path = Path(model.yaml.get("yaml_file", source))
    digest = sha256(path) if path.exists() else hashlib.sha256(repr(model.yaml).encode()).hexdigest()
    return LoadedDetector(model.eval(), {}, path, digest, random=True)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ultralytics from announcing what is only done on the way to something else."""
    level = LOGGER.level
    LOGGER.setLevel(logging.WARNING)
    try:
        yield
    finally:
        LOGGER.setLevel(level)


def check_is_detector(model: nn.Module, what: str) -> None:
    """Check that a model ends in one of Ultralytics' anchor-free detection heads.

    Raises:
        CheckpointError: Naming the head or the task that was found.
    """
    layers = getattr(model, "model", None)
    head = layers[-1] if isinstance(layers, nn.Sequential) and len(layers) else None
    if not isinstance(head, Detect):
        found = type(head).__name__ if head is not None else type(model).__name__
        raise CheckpointError(
            f"{what} is not a YOLO detector: it ends in {found}, a detection head (Detect) is needed."
        )
    if isinstance(head, (WorldDetect, YOLOEDetect)):
        raise CheckpointError(
            f"{what} is an open-vocabulary model ({type(head).__name__}); a plain detector is needed."
        )
    # judged by the head: what a file says of its own task may be wrong
    for task, heads in OTHER_TASKS.items():
        if isinstance(head, heads):
            raise CheckpointError(f"{what} is a model for the task '{task}'; a detector (task 'detect') is needed.")
    if head.cv2 is None:
        raise CheckpointError(
            f"{what} was fused for inference and has lost a branch of its head; use the training checkpoint."
        )
