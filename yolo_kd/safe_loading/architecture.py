"""Checks of a model YAML and of a loaded model, before Ultralytics builds or runs anything from it."""

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

MAX_PARAMETERS = 10**9  # of a model YAML; the largest that Ultralytics ships has a tenth of it


MAX_LAYERS, MAX_REPEATS, MAX_MULTIPLE, MAX_NUMBER = 500, 100, 10, 10**6


ALLOWED_CALLABLES = ("forward", "criterion")  # a fused model's method; the loss that Ultralytics saves in mid-run


OTHER_TASKS = {"segment": Segment, "pose": Pose, "obb": OBB}  # their heads are detection heads with a branch more


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
            raise CheckpointError(f"{what} is not a model YAML for a detector ({first_line(error)}).") from error
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
