"""Checks of model YAMLs and loaded models, before Ultralytics builds or runs anything from them.

A model YAML can name any function of PyTorch and any size, and a loaded model carries a description in the same form,
from which the trainer builds its model. A loaded model can also have attributes of any kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from ultralytics.nn import modules, tasks
from ultralytics.nn.modules.head import OBB, Detect, Pose, Segment, WorldDetect, YOLOEDetect

from yolo_kd.errors import CheckpointError, first_line
from yolo_kd.safe_loading.restricted import quiet, restricted_loading

MAX_PARAMETERS = 10**9  # the largest model YAML of Ultralytics has a tenth of it
MAX_LAYERS = 500
MAX_REPEATS = 100
MAX_MULTIPLE = 10  # of depth or width
MAX_NUMBER = 10**6  # as an argument of a layer
ALLOWED_CALLABLES = (
    "forward",
    "criterion",
)  # the method of a fused model; the loss in a checkpoint of a running training
OTHER_TASKS = {"segment": Segment, "pose": Pose, "obb": OBB}  # their heads extend a detection head by a branch


def check_description(config: Any, what: str, held: int | None = None) -> None:
    """Check that the description of a model builds layers only, and no more of them than a detector needs.

    Args:
        config: The content of a model YAML, or the description in a checkpoint.
        what: The file it belongs to, for messages.
        held: Number of parameters in the checkpoint.

    Raises:
        CheckpointError: With the entry that is no layer or too large.
    """
    if not isinstance(config, Mapping) or not all(isinstance(config.get(key), list) for key in ("backbone", "head")):
        raise CheckpointError(f"{what} is not a model YAML for a detector: it needs the lists 'backbone' and 'head'.")
    rows = [*config["backbone"], *config["head"]]
    if len(rows) > MAX_LAYERS:
        raise CheckpointError(f"{what} describes {len(rows)} layers, more than {MAX_LAYERS}.")
    scales = config.get("scales")
    multiples = [config.get("depth_multiple"), config.get("width_multiple")]
    rows_of_scales = scales.values() if isinstance(scales, Mapping) else ()
    multiples += [n for row in rows_of_scales if isinstance(row, list | tuple) for n in row[:2]]
    for number in multiples:
        if number is not None and not (isinstance(number, int | float) and 0 < number <= MAX_MULTIPLE):
            raise CheckpointError(
                f"{what}: a multiple of depth or width must lie in (0, {MAX_MULTIPLE}], not {number}."
            )
    for row in rows:
        _check_row(row, what)
    count = _count_parameters(config, what)
    if held is not None and count > 2 * held + 10**6:
        raise CheckpointError(f"{what} was refused: its description builds {count:,} parameters, it holds {held:,}.")
    if count > MAX_PARAMETERS:
        raise CheckpointError(f"{what} describes {count:,} parameters; at most {MAX_PARAMETERS:,} are allowed.")


def _check_row(row: Any, what: str) -> None:
    """Check the description of one layer.

    Raises:
        CheckpointError: If it is no layer or too large.
    """
    if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], str):
        raise CheckpointError(f"{what}: a layer must be [from, repeats, module, arguments], not {str(row)[:80]}.")
    _, repeats, module, arguments = row
    if not isinstance(repeats, int) or repeats > MAX_REPEATS:
        raise CheckpointError(f"{what}: a layer repeats {str(repeats)[:40]} times; at most {MAX_REPEATS} are allowed.")
    # TorchVision downloads weights
    if module == "TorchVision" or not (module.startswith(("nn.", "torchvision.ops.")) or hasattr(modules, module)):
        raise CheckpointError(f"{what}: {module[:80]!r} is no layer that may be used without trust_checkpoints=true.")
    if any(isinstance(n, int | float) and abs(n) > MAX_NUMBER for n in _leaves(arguments)):
        raise CheckpointError(f"{what}: a layer {module} has an argument above {MAX_NUMBER:,}.")


def _count_parameters(config: Mapping[str, Any], what: str) -> int:
    """Count the parameters that a description builds, without memory for them."""
    with torch.device("meta"), restricted_loading(), quiet():
        try:
            channels = config.get("channels", 3)
            layers, _ = tasks.parse_model(deepcopy(dict(config)), ch=channels, verbose=False)
        except Exception as error:
            raise CheckpointError(f"{what} is not a model YAML for a detector ({first_line(error)}).") from error
    return sum(p.numel() for p in layers.parameters())


def _leaves(value: Any) -> Iterator[Any]:
    """Yield the entries of nested lists."""
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    else:
        yield value


def check_model(model: Any, what: str, rebuilt: bool, trust: bool = False) -> None:
    """Check the model in a checkpoint.

    Args:
        model: The model.
        what: The file it belongs to, for messages.
        rebuilt: True if the trainer builds a new model from its description.
        trust: Check only whether it is a detector.

    Raises:
        CheckpointError: If it is no detector, or has attributes that no detector has.
    """
    check_is_detector(model, what)
    if trust:
        return
    _check_attributes(model, what)
    if rebuilt:
        check_description(model.yaml, what, sum(p.numel() for p in model.parameters()))


def _check_attributes(model: nn.Module, what: str) -> None:
    """Check the attributes that are used later, since a file can set them to anything.

    Raises:
        CheckpointError: With the first that is wrong.
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


def check_is_detector(model: nn.Module, what: str) -> None:
    """Check that a model ends in one of Ultralytics' anchor-free detection heads.

    Raises:
        CheckpointError: With the head or the task that was found.
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
    # the head decides: the task that the file states may be wrong
    for task, heads in OTHER_TASKS.items():
        if isinstance(head, heads):
            raise CheckpointError(f"{what} is a model for the task '{task}'; a detector (task 'detect') is needed.")
    if head.cv2 is None:
        raise CheckpointError(
            f"{what} was fused for inference and has lost a branch of its head; use the training checkpoint."
        )
