"""Which channels of a wide model a narrow one of the same family takes: indices for every dimension of its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from ultralytics.nn.modules import A2C2f, C2f, Concat

from yolo_kd.upstream.recorders import layer_outputs

Parts = Sequence[tuple[str, int]]  # what a convolution's input is a concatenation of, by name and width


class Thinning:
    """The channels that a student's tensors take of a teacher's.

    Of a layer of n channels the student takes as many as it has, evenly spread and in order, as in uniform selection
    (Xu et al., arXiv 2311.18823, section 3). What reads the layer takes the same ones, so that a thinned layer still
    gets what it was trained on, less the rest; where a layer reads several, joined, each of them is thinned by itself.
    Where the teacher's blocks are deeper, the student takes the first of them.

    Args:
        student: The narrow detector.
        teacher: The wide one.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module):
        self._joined = _joined(student), _joined(teacher)
        self._modules = dict(student.named_modules()), dict(teacher.named_modules())

    def refuses(self, name: str) -> str:
        """Return why a tensor of the student cannot be thinned from the teacher's, nothing if it can be tried."""
        path = name.split(".")[:-1]
        for end in range(1, len(path) + 1):
            own, other = (modules.get(".".join(path[:end])) for modules in self._modules)
            if type(own) is not type(other):
                return f"{type(own).__name__} here, {type(other).__name__ if other else 'nothing'} in the teacher"
            if hasattr(own, "num_heads"):
                return "channels of an attention belong to its heads"
            if isinstance(own, nn.Conv2d) and own.groups > 1 and own.weight.shape[1] > 1:
                return "channels of a grouped convolution belong to its groups"
        return ""

    def __call__(self, name: str, own: Tensor, other: Tensor) -> Tensor | None:
        """Return the teacher's tensor thinned to the student's shape, None where it is narrower or of another kind.

        Args:
            name: Name of the tensor in the state dicts.
            own: The student's.
            other: The teacher's.
        """
        if own.ndim != other.ndim or own.shape[2:] != other.shape[2:]:
            return None
        for dim in range(min(own.ndim, 2)):
            taken = self._taken(name, dim, own.shape[dim], other.shape[dim])
            if taken is None:
                return None
            other = other.index_select(dim, taken.to(other.device))
        return other

    def _taken(self, name: str, dim: int, own: int, other: int) -> Tensor | None:
        """Return the channels that the student takes along a dimension."""
        module = name.rpartition(".")[0]
        parts = [joined.get(module) for joined in self._joined]
        if dim == 1 and parts[0] and parts[1]:
            widths, start, taken = dict(parts[0]), 0, []
            for part, width in parts[1]:
                if part in widths:
                    if width < widths[part]:
                        return None
                    taken.append(start + spread(widths.pop(part), width))
                start += width
            return None if widths else torch.cat(taken)
        return spread(own, other) if own <= other else None


def spread(count: int, among: int) -> Tensor:
    """Return that many of the indices below `among`, evenly spread, in order."""
    return torch.arange(count) * among // count


@torch.no_grad()
def _joined(model: nn.Module) -> dict[str, Parts]:
    """Return, for each convolution that reads several maps joined into one, what these are."""
    layers: list[nn.Module] = list(model.model)  # type: ignore[arg-type]
    reads = [[j if j >= 0 else i + j for j in _listed(layer)] for i, layer in enumerate(layers)]
    sources = {i: reads[i] for i, layer in enumerate(layers) if isinstance(layer, Concat)}
    wanted = {str(j): layers[j] for js in sources.values() for j in js}
    widths = {int(name): map_.shape[1] for name, map_ in layer_outputs(model, wanted).items()}
    modules = dict(model.named_modules())
    found: dict[str, Parts] = {}
    for i in range(len(layers)):
        if len(reads[i]) == 1 and reads[i][0] in sources:
            parts = [(f"{k}", widths[j]) for k, j in enumerate(sources[reads[i][0]])]
            total = sum(width for _, width in parts)
            # a block's first convolutions read what the block reads
            for name in ("conv", "cv1.conv", "cv2.conv"):
                conv = modules.get(f"model.{i}.{name}")
                if isinstance(conv, nn.Conv2d) and conv.in_channels == total:
                    found[f"model.{i}.{name}"] = parts
    for name, module in modules.items():
        if isinstance(module, C2f | A2C2f):  # they join what each of their inner blocks yields
            blocks = [f"block {k}" for k in range(len(module.m))]
            before = ["first", "second"] if isinstance(module, C2f) else ["first"]
            names = [*before, *blocks]
            conv = module.cv2.conv
            found[f"{name}.cv2.conv"] = [(part, conv.in_channels // len(names)) for part in names]
    return found


def _listed(layer: nn.Module) -> list[int]:
    """Return the numbers of the layers that a layer reads, as Ultralytics notes them: -1 is the one before."""
    read: Any = getattr(layer, "f", -1)
    return [read] if isinstance(read, int) else list(read)
