"""The frozen teacher: loaded safely, verified, made fast, and asked for one view per batch."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.config.speed import AUTO, Speed
from yolo_kd.distillation.teacher_runner import Runner, Way, _tensors, largest_difference, ways
from yolo_kd.environment import release_memory
from yolo_kd.errors import AuditError
from yolo_kd.safe_loading.checkpoint import LoadedDetector
from yolo_kd.structures import DetectorOutputs

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


class Pending:
    """A view that may still be in the making on a stream of its own.

    Args:
        view: The view.
        stream: Where it is made, None if it is complete.
    """

    def __init__(self, view: DetectorOutputs, stream: torch.cuda.Stream | None = None):
        self._view = view
        self._stream = stream

    def take(self) -> DetectorOutputs:
        """Return the view, ready to be used on the current stream."""
        if self._stream is not None:
            current = torch.cuda.current_stream()
            current.wait_stream(self._stream)
            for tensor in _tensors(self._view).values():
                tensor.record_stream(current)  # its memory must not be given away before the current stream is done
            self._stream = None
        return self._view


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

    def __call__(self, images: Tensor) -> DetectorOutputs:
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

    def _run(self, images: Tensor) -> DetectorOutputs:
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
