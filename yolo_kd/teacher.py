"""The frozen teacher: loaded safely, verified, made fast, and asked for one view per batch."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.checkpoints import LoadedDetector
from yolo_kd.environment import cpu_has_bf16, release_memory
from yolo_kd.errors import AuditError
from yolo_kd.speed import AUTO, Speed
from yolo_kd.taps import TeacherTap, find_layers, fuse_keeping_branches
from yolo_kd.views import View

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# A fast way is taken if each tensor that it yields is this close to the plain float32 teacher's, as the norm of the
# difference over the norm. bfloat16 has 8 bits; a network of 20 to 50 layers comes to 1 to 3 %.
TOLERANCE = 0.05
EXACT = Speed(teacher_precision="fp32")
PROBE_IMAGES = 4  # of the first batch, to measure with
PROBE_ROUNDS = 5
# A way further down the list must be faster by this factor: otherwise the noise of a measurement would decide, and a
# training could not be repeated to the bit.
CLEARLY = 1.5


def fingerprint(model: nn.Module) -> str:
    """Return a hash over every parameter and buffer of a model, bit for bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Way:
    """One way to run a teacher.

    Attributes:
        precision: A key of `PRECISIONS`.
        channels_last: Layout of the feature maps.
        fused: Convolutions are joined with their normalisation, which changes nothing but the rounding.
    """

    precision: str
    channels_last: bool
    fused: bool = True

    def __str__(self) -> str:
        return f"{self.precision}, {'channels-last' if self.channels_last else 'contiguous'}"


def ways(speed: Speed, device: torch.device) -> list[Way]:
    """Return the ways to try, the most promising first; where the user decides, one.

    The last one is always float32 where the precision is not given, as that is what the others are measured against.
    """
    if speed.teacher_precision != AUTO:
        precisions = [speed.teacher_precision]
    elif device.type == "cuda":
        precisions = ["fp16", "bf16", "fp32"]
    else:
        precisions = ["bf16", "fp32"] if device.type == "cpu" and cpu_has_bf16() else ["fp32"]
    layouts = [True, False] if speed.teacher_channels_last == AUTO else [bool(speed.teacher_channels_last)]
    # half-precision convolutions want channels-last everywhere; only float32 is worth a second look
    return [Way(p, last) for p in precisions for last in layouts if p == "fp32" or last or len(layouts) == 1]


class Pending:
    """A view that may still be in the making on a stream of its own.

    Args:
        view: The view.
        stream: Where it is made, None if it is complete.
    """

    def __init__(self, view: View, stream: torch.cuda.Stream | None = None):
        self._view = view
        self._stream = stream

    def take(self) -> View:
        """Return the view, ready to be used on the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in _tensors(self._view).values():
                tensor.record_stream(current)  # its memory must not be given away before the current stream is done
            self._stream = None
        return self._view


class Runner:
    """A copy of the teacher that runs one way.

    Args:
        plain: The model, which is copied.
        way: How it runs.
        device: Where it runs.
        layers: Names of other layers to hand out.
        head_split: Also hand out the features inside the head.
        reads: What is read of the head.
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
        self.tap = TeacherTap(self.model, find_layers(self.model, layers, "teacher", head_split), reads)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> View:
        """Return the view of (B, C, H, W) images."""
        images = images.to(dtype=PRECISIONS[self.way.precision], memory_format=self._layout)
        with torch.autocast(images.device.type, enabled=False):
            return self.tap(images)

    def seconds(self, images: Tensor) -> float:
        """Return the time of a pass; one must have been made already."""
        start = time.perf_counter()
        self(images)
        if images.device.type == "cuda":
            torch.cuda.synchronize(images.device)
        return time.perf_counter() - start


class Teacher:
    """A frozen detector in eval mode that yields a view of each batch.

    It is no `nn.Module` and hangs on no model, so that no optimiser, EMA, checkpoint or distributed wrapper ever finds
    it. On the first batch it settles on the fastest way to run: the candidates are timed on a few images, and one whose
    outputs are further than `TOLERANCE` from those of the plain float32 model is passed over.

    Args:
        detector: The loaded teacher. It is copied, not changed.
        device: Where it runs.
        speed: What the user wants; a compile that is left open is off.
        layers: Names of other layers that the recipe reads.
        head_split: Also hand out the features inside the head, as `Loss.head_split` describes.
        reads: What the recipe reads; branches of the head that it does not read are not computed.
        on_settled: Called once the way is settled, with a sentence for the log.
    """

    def __init__(
        self,
        detector: LoadedDetector,
        device: torch.device,
        speed: Speed = EXACT,
        layers: Sequence[str] = (),
        head_split: bool = False,
        reads: Collection[str] = ("scores", "boxes", "one2one"),
        on_settled: Callable[[str], None] | None = None,
    ):
        self.path = detector.path
        self.sha256 = detector.sha256
        self.difference = 0.0  # largest relative difference to the plain float32 model, on the first batch
        self._device = device
        self._speed = speed
        self._build: Callable[[Way], Runner] | None = lambda way: Runner(
            detector.model, way, device, layers, head_split, reads
        )
        self._on_settled = on_settled
        self._runner: Runner | None = None
        self._fingerprint = ""
        self._compiled: Callable[[Tensor], Any] | None = None
        self._compiled_shape: torch.Size | None = None
        own_stream = device.type == "cuda" and speed.teacher_stream in (AUTO, True)
        self._stream = torch.cuda.Stream(device) if own_stream else None

    @property
    def runner(self) -> Runner:
        """The copy that runs, settled on the first batch.

        Raises:
            RuntimeError: Before the first batch.
        """
        if self._runner is None:
            raise RuntimeError("the teacher has seen no batch yet")
        return self._runner

    def __call__(self, images: Tensor) -> View:
        """Return the teacher's view of (B, C, H, W) images in [0, 1]."""
        return self.begin(images).take()

    def begin(self, images: Tensor) -> Pending:
        """Start on a batch; with a stream of its own the teacher then works while the caller goes on."""
        if self._build is not None:
            self._settle(images, self._build)
        if self._stream is None:
            return Pending(self._run(images))
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        images.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            return Pending(self._run(images), self._stream)

    def rehearsal(self) -> Runner:
        """Return a copy that runs in the most promising way, to measure memory with before the first batch."""
        return self._build(ways(self._speed, self._device)[0]) if self._build is not None else self.runner

    def _run(self, images: Tensor) -> View:
        runner = self.runner
        fits = images.shape == self._compiled_shape
        runner.tap.forward = runner.model if self._compiled is None or not fits else self._compiled
        return runner(images)

    def _settle(self, images: Tensor, build: Callable[[Way], Runner]) -> None:
        """Choose the way to run, on the first batch."""
        probe = images[:PROBE_IMAGES]
        exact = build(Way("fp32", channels_last=False, fused=False))(probe)
        candidates = ways(self._speed, self._device)
        differences: dict[Runner, float] = {}
        notes = []
        for way in candidates:
            runner = build(way)
            difference = largest_difference(runner(probe), exact)
            if way.precision != "fp32" and not difference <= TOLERANCE:
                notes.append(f"; {way} differs by {difference:.1%}, more than {TOLERANCE:.0%}, so it is not used")
            else:
                differences[runner] = difference
        if not differences:  # what was asked for is too far off
            runner = build(Way("fp32", channels_last=True))
            differences[runner] = largest_difference(runner(probe), exact)
        best, *others = differences
        times: dict[Way, float] = {}
        if others:
            # in turn, so that a slow moment of the machine hits all of them
            rounds = [{r.way: r.seconds(probe) for r in differences} for _ in range(PROBE_ROUNDS)]
            times = {r.way: min(seconds[r.way] for seconds in rounds) for r in differences}
        for runner in others:
            if times[runner.way] * CLEARLY < times[best.way]:
                best = runner
        self._runner, self.difference = best, differences[best]
        self._build = None  # and with it the plain model
        del build, runner, exact, best, others, differences
        release_memory()  # the candidates' memory, which would otherwise lie in pieces between what lives on
        self._fingerprint = fingerprint(self._runner.model)
        compiled = self._compile(images) if self._speed.teacher_compile is True else "eager"
        if self._on_settled is not None:
            slowest = max(times.values(), default=0.0)
            gain = f" ({times[self._runner.way]:.3f} s against {slowest:.3f} s)" if slowest else ""
            self._on_settled(
                f"Teacher runs in {self._runner.way}, {compiled}{gain}; largest difference to plain float32 "
                f"{self.difference:.2g}{''.join(notes)}"
            )

    def _compile(self, images: Tensor) -> str:
        """Compile for the shape of the first batch; other shapes (the last batch, multi-scale) stay eager.

        Returns:
            What came of it, for the log.
        """
        runner = self.runner
        eager = runner(images)
        compiled = torch.compile(runner.model, dynamic=False)
        runner.tap.forward = compiled
        try:
            difference = largest_difference(runner(images), eager)
        except Exception as error:  # no compiler, an operator that it does not know: the eager model is as right
            lines = str(error).strip().splitlines() or [type(error).__name__]
            return f"eager, as it could not be compiled: {lines[0][:120]}"
        if not difference <= TOLERANCE:
            return f"eager, as compiled it differs by {difference:.1%}"
        self._compiled, self._compiled_shape = compiled, images.shape
        return "compiled"

    def verify_untouched(self) -> None:
        """Check that the weights are bit for bit those that were loaded, in eval mode and frozen.

        Raises:
            AuditError: If anything trained or replaced them.
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
        """Take the hooks off."""
        if self._runner is not None:
            self._runner.tap.remove()


def largest_difference(view: View, reference: View) -> float:
    """Return the largest relative difference over a view's tensors: norm of the difference over the norm."""
    worst = 0.0
    for name, exact in _tensors(reference).items():
        exact, found = exact.float(), _tensors(view)[name].float()
        gap = ((found - exact).norm() / exact.norm().clamp(min=1e-12)).item()
        worst = math.inf if math.isnan(gap) else max(worst, gap)
    return worst


def _tensors(view: View) -> dict[str, Tensor]:
    """Return all tensors of a view that hold anything, by name."""
    named = {f"features {i}": f for i, f in enumerate(view.features)} | {
        f"layer {k}": v for k, v in view.layers.items()
    }
    named |= {"scores": view.scores, "boxes": view.boxes}
    if view.one2one_scores is not None:
        named["one2one scores"] = view.one2one_scores
    return {name: tensor for name, tensor in named.items() if tensor.numel()}
