"""The ways to run a teacher (precision, memory format, fusion), and a copy of it that runs in one of them."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.config.speed import AUTO, Speed
from yolo_kd.environment import cpu_has_bf16
from yolo_kd.structures import DetectorOutputs
from yolo_kd.upstream.heads import find_layers, fuse_keeping_branches
from yolo_kd.upstream.recorders import TeacherRecorder

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Way:
    """One way to run a teacher.

    Attributes:
        precision: A key of `PRECISIONS`.
        channels_last: Memory format of the feature maps.
        fused: Whether convolutions are fused with their normalisation, which changes the rounding only.
    """

    precision: str
    channels_last: bool
    fused: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, {'channels-last' if self.channels_last else 'contiguous'}"


def ways(speed: Speed, device: torch.device) -> list[Way]:
    """Return the ways to try, the most promising first; only one if the user chose it.

    If the precision is not given, the last way is float32, with which the others are compared.
    """
    if speed.teacher_precision != AUTO:
        precisions = [speed.teacher_precision]
    elif device.type == "cuda":
        precisions = ["fp16", "bf16", "fp32"]
    else:
        precisions = ["bf16", "fp32"] if device.type == "cpu" and cpu_has_bf16() else ["fp32"]
    layouts = [True, False] if speed.teacher_channels_last == AUTO else [bool(speed.teacher_channels_last)]
    # half-precision convolutions are fastest in channels-last everywhere; only float32 may be faster without
    return [Way(p, last) for p in precisions for last in layouts if p == "fp32" or last or len(layouts) == 1]


class Pending:
    """Outputs that may still be computed on a CUDA stream.

    Args:
        outputs: The outputs.
        stream: The stream, None if they are complete.
    """

    def __init__(self, outputs: DetectorOutputs, stream: torch.cuda.Stream | None = None):
        self._outputs = outputs
        self._stream = stream

    def take(self) -> DetectorOutputs:
        """Return the outputs, ready for use on the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in _tensors(self._outputs).values():
                tensor.record_stream(current)  # its memory must not be reused before the current stream has finished
            self._stream = None
        return self._outputs


class Runner:
    """A copy of the teacher that runs in one way.

    Args:
        plain: The model, which is copied.
        way: How it runs.
        device: Device of the copy.
        layers: Names of other layers whose outputs are returned.
        head_split: Also return the features inside the head.
        reads: The outputs of the head that the terms read.
    """

    def __init__(
        self,
        plain: nn.Module,
        way: Way,
        device: torch.device,
        layers: Sequence[str],
        head_split: bool,
        reads: Collection[str],
    ):
        model = deepcopy(plain).eval().requires_grad_(False)
        model = fuse_keeping_branches(model) if way.fused else model
        self._layout: Any = torch.channels_last if way.channels_last else torch.contiguous_format
        self.model = model.to(device=device, dtype=PRECISIONS[way.precision]).to(memory_format=self._layout)
        self.way = way
        self.recorder = TeacherRecorder(self.model, find_layers(self.model, layers, "teacher", head_split), reads)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> DetectorOutputs:
        """Return the outputs on (B, C, H, W) images in [0, 1]."""
        images = images.to(dtype=PRECISIONS[self.way.precision], memory_format=self._layout)
        with torch.autocast(images.device.type, enabled=False):
            return self.recorder(images)

    def begin(self, images: Tensor) -> Pending:
        """Return the outputs as `Teacher.begin` does."""
        return Pending(self(images))

    def close(self) -> None:
        """Remove the hooks."""
        self.recorder.remove()

    def seconds(self, images: Tensor) -> float:
        """Return the time of a pass in seconds; call the runner once before."""
        start = time.perf_counter()
        self(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start


def largest_difference(outputs: DetectorOutputs, reference: DetectorOutputs) -> float:
    """Return the largest relative difference of all tensors: norm of the difference divided by the norm."""
    worst = 0.0
    for name, exact in _tensors(reference).items():
        exact, found = exact.float(), _tensors(outputs)[name].float()
        gap = ((found - exact).norm() / exact.norm().clamp(min=1e-12)).item()
        worst = math.inf if math.isnan(gap) else max(worst, gap)
    return worst


def _tensors(outputs: DetectorOutputs) -> dict[str, Tensor]:
    """Return all tensors that are not empty, by name."""
    named = {f"features {i}": f for i, f in enumerate(outputs.features)}
    named |= {f"layer {name}": layer for name, layer in outputs.layers.items()}
    named |= {"scores": outputs.scores, "boxes": outputs.boxes}
    if outputs.one2one_scores is not None:
        named["one2one scores"] = outputs.one2one_scores
    return {name: tensor for name, tensor in named.items() if tensor.numel()}
