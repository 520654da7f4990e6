"""Which channels a narrow model takes from a wide model of the same family, for each dimension of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import A2C2f, C2f, Concat

from yolo_kd.upstream.recorders import layer_outputs

Groups = Sequence[tuple[str, int]]  # name and width of each map in the concatenation that a convolution reads


class Thinning:
    """Selects the channels of a teacher that a student's tensors start with.

    From a layer of n channels the student takes as many as it has, evenly spread and in order: uniform selection
    (Xu et al., arXiv 2311.18823, section 3). A layer that reads it takes the same channels, so that a thinned layer
    receives what it was trained on, without the dropped channels. Where a layer reads a concatenation, each map of it
    is thinned separately. Where the teacher's blocks are deeper, the student takes the first ones.

    Args:
        student: The narrow detector.
        teacher: The wide detector.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self._concatenations = _concatenations(student), _concatenations(teacher)
        self._modules = dict(student.named_modules()), dict(teacher.named_modules())

    def refuses(self, name: str) -> str:
        """Return why a tensor of the student cannot be thinned, an empty text if it can be tried."""
        path = name.split(".")[:-1]
        for end in range(1, len(path) + 1):
            student, teacher = (modules.get(".".join(path[:end])) for modules in self._modules)
            if type(student) is not type(teacher):
                theirs = type(teacher).__name__ if teacher else "nothing"
                return f"{type(student).__name__} here, {theirs} in the teacher"
            if hasattr(student, "num_heads"):
                return "channels of an attention belong to its heads"
            if isinstance(student, nn.Conv2d) and student.groups > 1 and student.weight.shape[1] > 1:
                return "channels of a grouped convolution belong to its groups"
        return ""

    def __call__(self, name: str, student: Tensor, teacher: Tensor) -> Tensor | None:
        """Thin a tensor of the teacher to the student's shape.

        Args:
            name: Name of the tensor in the state dicts.
            student: The student's tensor.
            teacher: The teacher's tensor.

        Returns:
            The thinned tensor, None where the teacher's is narrower or has another kind of shape.
        """
        if student.ndim != teacher.ndim or student.shape[2:] != teacher.shape[2:]:
            return None
        for dim in range(min(student.ndim, 2)):
            taken = self._channels(name, dim, student.shape[dim], teacher.shape[dim])
            if taken is None:
                return None
            teacher = teacher.index_select(dim, taken.to(teacher.device))
        return teacher

    def _channels(self, name: str, dim: int, student: int, teacher: int) -> Tensor | None:
        """Return the indices that the student takes along a dimension, given both sizes; None if it cannot."""
        module = name.rpartition(".")[0]
        ours, theirs = (groups.get(module) for groups in self._concatenations)
        if dim == 1 and ours and theirs:
            widths, start, taken = dict(ours), 0, []
            for group, width in theirs:
                if group in widths:
                    if width < widths[group]:
                        return None
                    taken.append(start + spread(widths.pop(group), width))
                start += width
            return None if widths else torch.cat(taken)
        return spread(student, teacher) if student <= teacher else None


def spread(count: int, among: int) -> Tensor:
    """Return `count` of the indices below `among`, evenly spread, in order, (count,) int64."""
    return torch.arange(count) * among // count


@torch.no_grad()
def _concatenations(model: nn.Module) -> dict[str, Groups]:
    """Return, for each convolution that reads a concatenation, the maps in it."""
    layers: list[nn.Module] = list(model.model)  # type: ignore[arg-type]
    inputs = [[j if j >= 0 else i + j for j in _input_indices(layer)] for i, layer in enumerate(layers)]
    sources = {i: inputs[i] for i, layer in enumerate(layers) if isinstance(layer, Concat)}
    wanted = {str(j): layers[j] for js in sources.values() for j in js}
    widths = {int(name): map_.shape[1] for name, map_ in layer_outputs(model, wanted).items()}
    modules = dict(model.named_modules())
    found: dict[str, Groups] = {}
    for i in range(len(layers)):
        if len(inputs[i]) == 1 and inputs[i][0] in sources:
            groups = [(f"{k}", widths[j]) for k, j in enumerate(sources[inputs[i][0]])]
            total = sum(width for _, width in groups)
            # the first convolutions of a block read the input of the block
            for name in ("conv", "cv1.conv", "cv2.conv"):
                conv = modules.get(f"model.{i}.{name}")
                if isinstance(conv, nn.Conv2d) and conv.in_channels == total:
                    found[f"model.{i}.{name}"] = groups
    for name, module in modules.items():
        if isinstance(module, C2f | A2C2f):  # they concatenate the outputs of their inner blocks
            blocks = [f"block {k}" for k in range(len(module.m))]
            before = ["first", "second"] if isinstance(module, C2f) else ["first"]
            names = [*before, *blocks]
            conv = module.cv2.conv
            found[f"{name}.cv2.conv"] = [(group, conv.in_channels // len(names)) for group in names]
    return found


def _input_indices(layer: nn.Module) -> list[int]:
    """Return the indices of the layers that a layer reads, as Ultralytics writes them: -1 is the layer before."""
    read: Any = getattr(layer, "f", -1)
    return [read] if isinstance(read, int) else list(read)
