"""Loading models from files that may come from a stranger.

A `.pt` file is a pickle, and unpickling can run code. Ultralytics has a restricted loader, off by default; here it is
on by default and never degrades silently.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from ultralytics.nn import modules, tasks
from ultralytics.nn.modules.head import OBB, Detect, Pose, Segment, WorldDetect, YOLOEDetect
from ultralytics.utils import LOGGER, SETTINGS, remove_colorstr, torch_utils
from ultralytics.utils.checks import check_model_file_from_stem
from ultralytics.utils.downloads import GITHUB_ASSETS_NAMES

from yolo_kd.archive import Refused, inspect
from yolo_kd.datafiles import restricted_data
from yolo_kd.errors import CheckpointError, DataError, did_you_mean, listed

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
MAX_PARAMETERS = 10**9  # of a model YAML; the largest that Ultralytics ships has a tenth of it
MAX_LAYERS, MAX_REPEATS, MAX_MULTIPLE, MAX_NUMBER = 500, 100, 10, 10**6
ALLOWED_CALLABLES = ("forward", "criterion")  # a fused model's method; the loss that Ultralytics saves in mid-run
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
    with ExitStack() as stack:
        stack.enter_context(restricted_data())
        stack.enter_context(patch.object(tasks, "SAFE_LOAD", not trust))
        if not trust:
            stack.enter_context(patch.object(tasks, "_SafeLoad", _Inspecting))
            # strip_optimizer, which opens best.pt and last.pt of a run, knows no restriction at all
            stack.enter_context(patch.object(torch_utils, "torch_load", _restricted_load))
        yield


class _Inspecting(tasks._SafeLoad):
    """Ultralytics' restricted loading with a look at the file before."""

    @classmethod
    @contextmanager
    def loading(cls, weight: Any) -> Iterator[None]:
        try:
            inspect(weight)
        except Refused as error:
            error.path = str(weight)
            raise
        with super().loading(weight):
            yield


def _restricted_load(file: Any, map_location: Any = None) -> Any:
    return tasks.torch_safe_load(str(file), safe_only=True)[0]


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
        return f"{role}={path} cannot be read: {error.strerror or _first_line(error)}."
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
        error.reason if isinstance(error, Refused) else f"the file is damaged or of another kind: {_first_line(error)}"
    )
    return f"{role}={path} is not a loadable checkpoint: {reason}."


def _first_line(error: Exception) -> str:
    """Return the first line of a message as the middle of a sentence: no signs in front, no full stop at its end."""
    text = re.sub(r"^(ERROR)?\W*", "", str(error).strip().partition("\n")[0])
    return text[:160].rstrip(". ") or type(error).__name__


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
        raise CheckpointError(f"{what} is not a loadable checkpoint: {_first_line(error)}.") from error
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
        reason = str(error) if isinstance(error, DataError) else _first_line(error)
        raise CheckpointError(f"{what} is not a model YAML for a detector ({reason}).") from error
    check_is_detector(model, what)
    path = Path(model.yaml.get("yaml_file", source))
    digest = sha256(path) if path.exists() else hashlib.sha256(repr(model.yaml).encode()).hexdigest()
    return LoadedDetector(model.eval(), {}, path, digest, random=True)


def check_description(config: Any, what: str, held: int | None = None) -> None:
    """Check that the description of a model builds layers only, and not more of them than a detector has.

    Args:
        config: What a model YAML holds; a checkpoint holds one too, from which the trainer builds its model.
        what: What it belongs to, for messages.
        held: Number of parameters that the checkpoint holds.

    Raises:
        CheckpointError: Naming the entry that is no layer or too large.
    """
    if not isinstance(config, Mapping) or not all(isinstance(config.get(part), list) for part in ("backbone", "head")):
        raise CheckpointError(f"{what} is not a model YAML for a detector: it needs the lists 'backbone' and 'head'.")
    rows = [*config["backbone"], *config["head"]]
    scales = config.get("scales")
    multiples = [config.get("depth_multiple"), config.get("width_multiple")]
    multiples += [n for row in scales.values() for n in row[:2]] if isinstance(scales, Mapping) else []
    if len(rows) > MAX_LAYERS:
        raise CheckpointError(f"{what} describes {len(rows)} layers, more than {MAX_LAYERS}.")
    for number in multiples:
        if number is not None and not (isinstance(number, int | float) and 0 < number <= MAX_MULTIPLE):
            raise CheckpointError(
                f"{what}: a multiple of depth or width must lie in (0, {MAX_MULTIPLE}], not {number}."
            )
    for row in rows:
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], str):
            raise CheckpointError(f"{what}: a layer must be [from, repeats, module, arguments], not {str(row)[:80]}.")
        if not isinstance(row[1], int) or row[1] > MAX_REPEATS:
            raise CheckpointError(
                f"{what}: a layer repeats {str(row[1])[:40]} times; at most {MAX_REPEATS} are allowed."
            )
        # TorchVision fetches weights from the network
        if row[2] == "TorchVision" or not (row[2].startswith(("nn.", "torchvision.ops.")) or hasattr(modules, row[2])):
            raise CheckpointError(
                f"{what}: {row[2][:80]!r} is no layer that may be used without trust_checkpoints=true."
            )
        if any(isinstance(n, int | float) and abs(n) > MAX_NUMBER for n in _leaves(row[3])):
            raise CheckpointError(f"{what}: a layer {row[2]} has an argument above {MAX_NUMBER:,}.")
    with torch.device("meta"), restricted_loading(), quiet():
        try:
            channels = config.get("channels", 3)
            layers, _ = tasks.parse_model(deepcopy(dict(config)), ch=channels, verbose=False)
        except Exception as error:
            raise CheckpointError(f"{what} is not a model YAML for a detector ({_first_line(error)}).") from error
    count = sum(p.numel() for p in layers.parameters())
    if held is not None and count > 2 * held + 10**6:
        raise CheckpointError(f"{what} was refused: its description builds {count:,} parameters, it holds {held:,}.")
    if count > MAX_PARAMETERS:
        raise CheckpointError(f"{what} describes {count:,} parameters; at most {MAX_PARAMETERS:,} are allowed.")


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the plain values of nested lists."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def check_model(model: Any, what: str, rebuilt: bool, trust: bool = False) -> None:
    """Check a checkpoint's model.

    Args:
        model: The model.
        what: What it is, for messages.
        rebuilt: True if the trainer takes its description and builds it anew.
        trust: Look at nothing but its kind.

    Raises:
        CheckpointError: If it is no detector, or its attributes are not those of one.
    """
    check_is_detector(model, what)
    if trust:
        return
    _check_attributes(model, what)
    if rebuilt:
        check_description(model.yaml, what, sum(p.numel() for p in model.parameters()))


def _check_attributes(model: nn.Module, what: str) -> None:
    """Check those attributes of a checkpoint's model that are relied on, since the file sets them as it likes.

    Raises:
        CheckpointError: Naming the first that is wrong.
    """
    names = getattr(model, "names", None)
    texts = list(names.values()) if isinstance(names, dict) else names if isinstance(names, list) else []
    wrong = None
    if not texts or not all(isinstance(text, str) for text in texts):
        wrong = "its class names are no list of texts"
    elif not isinstance(getattr(model, "yaml", None), dict):
        wrong = "it has no description of its layers"
    elif not isinstance(getattr(model, "stride", None), torch.Tensor):
        wrong = "it has no strides"
    elif any(value for module in model.modules() for key, value in vars(module).items() if key.endswith("_hooks")):
        wrong = "its layers have hooks, which a checkpoint cannot have"
    elif shadowed := [
        k for m in model.modules() for k, v in vars(m).items() if callable(v) and k not in ALLOWED_CALLABLES
    ]:
        wrong = f"a layer has a function in the place of '{shadowed[0]}'"
    if wrong:
        raise CheckpointError(f"{what} was refused: {wrong}. Get the file from a source you trust.")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Ultralytics from announcing what is only done on the way to something else.

    Its warnings remain, without the colours that it gives them wherever they go unless they go to a terminal.
    """
    level = LOGGER.level

    def plain(record: logging.LogRecord) -> bool:
        if not sys.stdout.isatty():
            record.msg = remove_colorstr(str(record.msg))
        return True

    LOGGER.setLevel(logging.WARNING)
    LOGGER.addFilter(plain)
    try:
        yield
    finally:
        LOGGER.removeFilter(plain)
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
