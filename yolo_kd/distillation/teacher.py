"""The frozen teacher, which is verified, chooses its fastest way to run, and runs once for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.config.speed import AUTO, Speed
from yolo_kd.distillation.teacher_runner import Pending, Runner, Way, largest_difference, ways
from yolo_kd.environment import release_memory
from yolo_kd.errors import AuditError
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.structures import DetectorOutputs

TOLERANCE = 0.05
"""Largest difference of an output tensor to that of the plain float32 teacher, norm divided by norm. bfloat16 has 8
bits; a network of 20 to 50 layers accumulates 1 to 3 %."""
EXACT = Speed(teacher_precision="fp32")
PROBE_IMAGES = 4
"""Number of images of the first batch on which the ways to run are measured."""
PROBE_ROUNDS = 5
CLEARLY = 1.5
"""Factor by which a later way in the list must be faster. With a smaller one, noise would decide, and a training could
not be repeated bit for bit."""


def fingerprint(model: nn.Module) -> str:
    """Return a hash over every parameter and buffer of a model, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


class Teacher:
    """A frozen detector in eval mode.

    It is no `nn.Module`, and no model refers to it, so no optimiser, EMA, checkpoint or distributed wrapper has it. On
    the first batch, it chooses the fastest way to run: the candidates are timed on a few images, and a candidate whose
    outputs differ from the plain float32 model's by more than `TOLERANCE` is dropped.

    Args:
        detector: The loaded teacher, which is copied.
        device: Device of the teacher.
        speed: How it runs; `teacher_compile="auto"` means no compilation here.
        layers: Names of other layers that the recipe reads.
        head_split: Also return the features inside the head, as `Loss.head_split` describes.
        reads: The outputs that the recipe reads; other branches of the head are not computed.

    Attributes:
        difference: Largest relative difference to the plain float32 model, on the first batch.
        on_settled: Called with a sentence for the log when the way to run is chosen.
    """

    def __init__(
        self,
        detector: LoadedDetector,
        device: torch.device,
        speed: Speed = EXACT,
        layers: Sequence[str] = (),
        head_split: bool = False,
        reads: Collection[str] = ("scores", "boxes", "one2one"),
    ):
        self.path = detector.path
        self.sha256 = detector.sha256
        self.difference = 0.0
        self.on_settled: Callable[[str], None] = lambda _: None
        self._device = device
        self._speed = speed
        self._reads = {*reads}
        self._build: Callable[[Way], Runner] | None = lambda way: Runner(
            detector.model, way, device, layers, head_split, self._reads
        )
        self._runner: Runner | None = None
        self._fingerprint = ""
        self._compiled: Callable[[Tensor], Any] | None = None
        self._compiled_shape: torch.Size | None = None
        separate_stream = device.type == "cuda" and speed.teacher_stream in (AUTO, True)
        self._stream = torch.cuda.Stream(device) if separate_stream else None

    @property
    def runner(self) -> Runner:
        """The copy that runs, chosen on the first batch."""
        assert self._runner is not None
        return self._runner

    @property
    def model(self) -> nn.Module:
        """The model that runs."""
        return self.runner.model

    def also_read(self, *reads: str) -> None:
        """Compute further outputs of the head; call it before the first batch."""
        self._reads |= {*reads}

    def __call__(self, images: Tensor) -> DetectorOutputs:
        """Return the teacher's outputs on (B, C, H, W) images in [0, 1]."""
        return self.begin(images).take()

    def begin(self, images: Tensor) -> Pending:
        """Start on a batch; with a separate CUDA stream, the teacher runs while the caller continues."""
        if self._build is not None:
            self._settle(images, self._build)
        if self._stream is None:
            return Pending(self._run(images))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        images.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return Pending(self._run(images), self._stream)

    def rehearsal(self) -> Runner:
        """Return a copy that runs in the most promising way, for measuring memory before the first batch."""
        return self._build(ways(self._speed, self._device)[0]) if self._build is not None else self.runner

    def _run(self, images: Tensor) -> DetectorOutputs:
        runner = self.runner
        fits = images.shape == self._compiled_shape
        runner.recorder.forward = runner.model if self._compiled is None or not fits else self._compiled
        return runner(images)

    def _settle(self, images: Tensor, build: Callable[[Way], Runner]) -> None:
        """Choose the way to run, on the first batch."""
        probe = images[:PROBE_IMAGES]
        exact = build(Way("fp32", channels_last=False, fused=False))(probe)
        differences: dict[Runner, float] = {}
        notes = []
        for way in ways(self._speed, self._device):
            runner = build(way)
            difference = largest_difference(runner(probe), exact)
            if way.precision != "fp32" and not difference <= TOLERANCE:
                notes.append(f"; {way} differs by {difference:.1%}, more than {TOLERANCE:.0%}, so it is not used")
            else:
                differences[runner] = difference
        if not differences:  # the difference of the requested way is too large
            runner = build(Way("fp32", channels_last=True))
            differences[runner] = largest_difference(runner(probe), exact)
        best, times = _fastest(list(differences), probe)
        self._runner, self.difference = best, differences[best]
        self._build = None  # and with it the plain model
        del build, runner, exact, best, differences
        release_memory()  # of the other candidates, which would fragment the remaining memory
        self._fingerprint = fingerprint(self._runner.model)
        compiled = self._compile(images) if self._speed.teacher_compile is True else "eager"
        slowest = max(times.values(), default=0.0)
        gain = f" ({times[self._runner.way]:.3f} s against {slowest:.3f} s)" if slowest else ""
        self.on_settled(
            f"Teacher runs in {self._runner.way}, {compiled}{gain}; largest difference to plain float32 "
            f"{self.difference:.2g}{''.join(notes)}"
        )

    def _compile(self, images: Tensor) -> str:
        """Compile for the shape of the first batch; other shapes (the last batch, multi-scale) run eagerly.

        Returns:
            The result, for the log.
        """
        runner = self.runner
        eager = runner(images)
        compiled = torch.compile(runner.model, dynamic=False)
        runner.recorder.forward = compiled
        try:
            difference = largest_difference(runner(images), eager)
        except Exception as error:  # no compiler, or an operator that it does not support
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"eager, as it could not be compiled: {lines[0][:120]}"
        if not difference <= TOLERANCE:
            return f"eager, as the compiled model differs by {difference:.1%}"
        self._compiled, self._compiled_shape = compiled, images.shape
        return "compiled"

    def verify_untouched(self) -> None:
        """Check that the teacher is frozen, in eval mode, and has bit for bit the weights that were loaded.

        Raises:
            AuditError: If it is not.
        """
        if self._runner is None:
            return
        model = self._runner.model
        if any(p.requires_grad for p in model.parameters()):
            raise AuditError(f"the teacher {self.path} is no longer frozen: some of its parameters require gradients.")
        if any(m.training for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            raise AuditError(f"the teacher {self.path} is no longer in eval mode.")
        if fingerprint(model) != self._fingerprint:
            raise AuditError(f"the weights of the teacher {self.path} changed during training; they must stay frozen.")

    def close(self) -> None:
        """Remove the hooks."""
        if self._runner is not None:
            self._runner.close()


def _fastest(runners: list[Runner], probe: Tensor) -> tuple[Runner, dict[Way, float]]:
    """Return the runner to use and the best time of each in seconds; no times if there is one runner.

    The first runner wins unless another is faster by `CLEARLY`.
    """
    best = runners[0]
    if len(runners) == 1:
        return best, {}
    # interleaved, so that a slow moment of the machine affects all of them
    rounds = [{r.way: r.seconds(probe) for r in runners} for _ in range(PROBE_ROUNDS)]
    times = {r.way: min(seconds[r.way] for seconds in rounds) for r in runners}
    for runner in runners[1:]:
        if times[runner.way] * CLEARLY < times[best.way]:
            best = runner
    return best, times
