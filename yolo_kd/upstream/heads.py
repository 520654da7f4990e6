"""The structure of a detector: its head, the layers that feed it, and the branches inside it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import nn
from ultralytics.nn.modules.head import Detect

from yolo_kd.errors import ConfigError, did_you_mean
from yolo_kd.patches import replaced

CLASS_BRANCHES = ("cv3", "one2one_cv3")  # attributes of a head; only an end-to-end head has the second


def head_of(model: nn.Module) -> Detect:
    """Return the detection head of an Ultralytics detector."""
    return model.model[-1]  # type: ignore[index]


def family_of(model: nn.Module) -> str:
    """Return the family of a detector: `yolov8` for a model that was built from yolov8n.yaml, `-` if unknown."""
    file = str(getattr(model, "yaml", {}).get("yaml_file") or "")
    return re.sub(r"(?<=\d)[a-z](?=-|$)", "", Path(file).stem) or "-"


def neck_layers(model: nn.Module) -> tuple[int, ...]:
    """Return the indices of the layers that feed the head, finest level first."""
    return tuple(head_of(model).f)


def layers_before_head(model: nn.Module) -> int:
    """Return the number of layers before the head; as Ultralytics' `freeze`, it leaves only the head trainable."""
    return len(model.model) - 1  # type: ignore[arg-type]


def strides_of(model: nn.Module) -> tuple[int, ...]:
    """Return the stride of each head level in pixels."""
    return tuple(int(s) for s in head_of(model).stride)


def channels_of(model: nn.Module) -> tuple[int, ...]:
    """Return the number of channels of the features that feed the head, per level."""
    return tuple(
        next(m for m in branch.modules() if isinstance(m, nn.Conv2d)).in_channels for branch in head_of(model).cv2
    )


def bins_of(model: nn.Module) -> int:
    """Return the number of bins of the head's distance distributions, 1 for a head that predicts distances."""
    return int(head_of(model).reg_max)


def neck_and_head(model: nn.Module) -> list[tuple[int, tuple[int, nn.Module]]]:
    """Return the layers behind the backbone as (distance from the head, (index, layer)), in order."""
    layers: list[nn.Module] = list(model.model)  # type: ignore[arg-type]
    first = len(model.yaml["backbone"])  # type: ignore[index]
    return [(len(layers) - 1 - i, (i, layers[i])) for i in range(first, len(layers))]


def class_rows(model: nn.Module) -> frozenset[str]:
    """Return the names of the tensors in a detector's state dict that have one row per class."""
    names = {tensor: name for name, tensor in model.named_parameters()}
    branches = [b for a in CLASS_BRANCHES for b in getattr(head_of(model), a, None) or ()]
    return frozenset(names[parameter] for branch in branches for parameter in branch[-1].parameters())


def find_layers(model: nn.Module, names: Sequence[str], role: str, head_split: bool = False) -> dict[str, nn.Module]:
    """Return layers by the names that a recipe uses: `model.9`, or a module inside it such as `model.9.cv2`.

    Args:
        model: The detector.
        names: Layer names.
        role: teacher or student, for messages.
        head_split: Also return the layers of `head_split_points`.

    Raises:
        ConfigError: If there is no such layer, with the closest match.
    """
    layers = {}
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules or not name:
            top = [k for k in modules if k.startswith("model.") and k.count(".") == 1]
            raise ConfigError(
                f"the {role} has no layer '{name}'.{did_you_mean(name, modules)} Its layers are {top[0]} to {top[-1]} "
                "and everything inside them."
            )
        layers[name] = modules[name]
    return layers | (head_split_points(model) if head_split else {})


def head_split_points(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose outputs enter the activation of the second convolution in each branch of the head.

    They are the normalisation layers, or in a fused model the convolutions, under the names `cls0`, `box0`, `cls1`...
    """
    head = head_of(model)
    points = {}
    for name, branches in (("cls", head.cv3), ("box", head.cv2)):
        for i, branch in enumerate(branches):
            block = _last_convolution(branch[-2])
            points[f"{name}{i}"] = getattr(block, "bn", block.conv)
    return points


def head_tails(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """Return the layers after `head_split_points`, frozen: per level the end of the class and of the box branch."""

    def tail(branch: Any) -> nn.Module:
        activation = deepcopy(_last_convolution(branch[-2]).act)
        if hasattr(activation, "inplace"):
            activation.inplace = False  # the losses need its input unchanged
        return nn.Sequential(activation, branch[-1]).eval().requires_grad_(False)

    head = head_of(model)
    return [(tail(cls), tail(box)) for cls, box in zip(head.cv3, head.cv2, strict=True)]


def _last_convolution(block: nn.Module) -> Any:
    """Return the last block of convolution, normalisation and activation in a module of a branch."""
    return [m for m in block.modules() if hasattr(m, "conv") and hasattr(m, "act")][-1]


class OptimizerScope(nn.Module):
    """Student and distillation modules under the names that Ultralytics' optimiser builder looks for.

    The builder receives it in place of the student. The adapters then join the parameter groups of Ultralytics' own
    projector and are trained alike. It exists only for that one call.
    """

    def __init__(self, student: nn.Module, distiller: nn.Module):
        super().__init__()
        self.student_model = student
        self.projector = distiller


def fuse_keeping_branches(model: nn.Module) -> nn.Module:
    """Fuse convolutions with their normalisation, and keep both branches of an end-to-end head.

    Ultralytics' fusion deletes the branch that inference does not use.
    """
    with replaced(head_of(model), "fuse", lambda *_args, **_kwargs: None):
        return model.fuse(verbose=False)  # type: ignore[operator]
