"""Keeps batches with NaN or infinity out of the weights, and raises an error if there are too many."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from yolo_kd.errors import NumbersError, listed
from yolo_kd.structures import DetectorOutputs

LIMIT = 20  # bad batches in a row that stop the training
GRADIENT = "the gradient"


class FiniteGuard:
    """Lets a batch change the weights only if every component of its loss is finite.

    The gradients of a loss that is not finite are not finite, and stay so when they are multiplied by zero. They are
    therefore replaced by zeros, at the few tensors through which they reach the weights: the head's outputs, the
    features that the terms read, and the parameters of the adapters. If an optimiser step accumulates the gradients of
    several batches, only the bad batch is lost.

    A batch is judged on the device, and the host reads the counts once in `LIMIT` batches and once in an epoch, so that
    no step on a GPU waits for the host. On a CPU, reading costs nothing, and a good batch gets no hooks.

    Args:
        parameters: Parameters that the terms train in addition to the student's.
        lazy: Judge on the device; the default is to do so except on a CPU.

    Attributes:
        admitted: Whether the teacher was checked.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = (), lazy: bool | None = None):
        self._lazy = lazy
        self._mask: Tensor | None = None  # True if the current batch is good, a 0-d bool; None if it needs no mask
        self._handles: list[RemovableHandle] = [p.register_hook(self._gate) for p in parameters]
        self._names: tuple[str, ...] = ()
        self._counts = torch.zeros(
            1, dtype=torch.int64
        )  # how often each name was not finite; the last is skipped batches
        self._run = torch.zeros((), dtype=torch.int64)  # bad batches in a row
        self._overflows = torch.zeros((), dtype=torch.int64)  # gradients in a row that were not finite
        self._reported: list[int] = [0]  # the counts at the end of the last epoch
        self._last: dict[str, Tensor] = {}
        self._screened = 0
        self.admitted = False

    @property
    def skipped(self) -> int:
        """Number of skipped batches; reading it waits for the device."""
        return int(self._counts[-1])

    # ---------------------------------------------------------------------------------------------- each batch

    def admit(self, teacher: DetectorOutputs, name: str) -> None:
        """Check the teacher's outputs on the first batch; `screen` checks later batches.

        Raises:
            NumbersError: If an output is not finite.
        """
        if self.admitted:
            return
        self.admitted = True
        if bad := [what for what, tensors in _outputs(teacher) if not all(t.isfinite().all() for t in tensors)]:
            raise NumbersError(
                f"the teacher {name} returns NaN or infinity on the first batch (in its {listed(bad)}). Validate it on "
                "this data set with 'yolo val', and train it again or choose another one."
            )

    def screen(
        self, loss: Tensor, items: Mapping[str, Tensor], inputs: Iterable[Tensor], teacher: DetectorOutputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and the logged items; if the loss is not finite, zero and the last good items.

        Args:
            loss: One component for each item, with gradient.
            items: Logged items by column.
            inputs: Tensors through which the loss reaches the student.
            teacher: The teacher's outputs on the batch, which may be the cause.
        """
        if not self._screened:
            self._start(loss, items, teacher)
        self._screened += 1
        finite = loss.detach().isfinite()
        good = finite.all()
        if not self._is_lazy(loss) and good:
            self._mask = None
            self._run.zero_()
            self._last = dict(items)
            return loss, self._last
        self._mask = good
        self._count(~finite, good, teacher)
        for tensor in inputs:
            if tensor.requires_grad:
                tensor.register_hook(self._gate)
        self._last = {k: torch.where(good, v, self._last.get(k, torch.zeros_like(v))) for k, v in items.items()}
        return torch.where(good, loss, 0.0), self._last

    def _is_lazy(self, tensor: Tensor) -> bool:
        return tensor.device.type != "cpu" if self._lazy is None else self._lazy

    def _gate(self, gradient: Tensor) -> Tensor | None:
        return None if self._mask is None else torch.where(self._mask, gradient, 0.0)

    def _start(self, loss: Tensor, items: Mapping[str, Tensor], teacher: DetectorOutputs) -> None:
        self._names = (*items, *(f"the teacher's {what}" for what, _ in _outputs(teacher)), GRADIENT)
        self._reported = [0] * (len(self._names) + 1)
        self._counts = torch.zeros(len(self._reported), dtype=torch.int64, device=loss.device)
        self._run, self._overflows = self._run.to(loss.device), self._overflows.to(loss.device)

    def _count(self, bad: Tensor, good: Tensor, teacher: DetectorOutputs) -> None:
        # a sum is finite only if all its elements are, and needs no second tensor of their size
        sums = [torch.stack([t.sum(dtype=torch.float32) for t in tensors]).sum() for _, tensors in _outputs(teacher)]
        blamed = ~torch.stack(sums).isfinite() & ~good
        self._counts += torch.cat([bad, blamed, torch.stack([good & ~good, ~good])])
        self._run += 1
        self._run *= ~good

    # ---------------------------------------------------------------------------------------------- each step

    def allows_step(self, norm: Tensor, parameters: Sequence[Tensor], scaled: bool) -> bool:
        """Return whether the optimiser may step; gradients may overflow even if the loss is finite.

        Args:
            norm: Norm of all gradients, averaged over processes, so that all processes decide alike.
            parameters: The parameters of the optimiser.
            scaled: Whether there is a gradient scaler, which skips such steps itself.
        """
        overflow = ~norm.isfinite()
        self._overflows += 1
        self._overflows *= overflow
        if not self._is_lazy(norm):
            self._counts[-2:] += overflow
            return not overflow and bool(norm > 0)  # zero if every batch since the last step was bad
        if not scaled:
            for p in parameters:
                if p.grad is not None:
                    p.grad.masked_fill_(overflow, 0)
            self._counts[-2:] += overflow
        return True

    # ---------------------------------------------------------------------------------------------- each epoch

    def check(self, weights: Callable[[], Mapping[str, Tensor]], recoverable: bool) -> None:
        """Stop after `LIMIT` bad batches in a row; reads the counts once in `LIMIT` batches on a GPU, always on a CPU.

        Args:
            weights: Returns the state of student and adapters.
            recoverable: Whether there is a checkpoint to return to at the end of the epoch if the weights are broken.

        Raises:
            NumbersError: With the names of what was not finite.
        """
        if self._is_lazy(self._run) and self._screened % LIMIT:
            return
        run, overflows = int(self._run), int(self._overflows)
        if max(run, overflows) < LIMIT:
            return
        what = f"{run} batches" if run >= LIMIT else f"{overflows} steps"
        cause = f"the last {what} in a row were skipped because of NaN or infinity in {self._blame() or GRADIENT}."
        if not _broken(weights, recoverable, cause):
            raise NumbersError(
                f"{cause} The weights are still finite. Lower the weight= of that term or remove the term; if it is "
                "the task loss, lower lr0= or set amp=False."
            )

    def end_epoch(self, epoch: int, weights: Callable[[], Mapping[str, Tensor]], recoverable: bool) -> tuple[str, bool]:
        """Return what was skipped in the epoch, and whether the weights must be restored.

        Args:
            epoch: Number of the epoch, from 0.
            weights: As in `check`.
            recoverable: As in `check`.

        Returns:
            A sentence, empty if no batch was skipped, and whether the weights are not finite.

        Raises:
            NumbersError: If weights are not finite and cannot be restored.
        """
        counts = self._counts.tolist()
        fresh = [now - then for now, then in zip(counts, self._reported, strict=True)]
        self._reported = counts
        if not fresh[-1]:
            return "", False
        sentence = (
            f"epoch {epoch + 1}: {_batches(fresh[-1])} skipped because of NaN or infinity in {self._blame(fresh)}."
        )
        broken = _broken(weights, recoverable, sentence)
        if broken:  # the next epoch starts from other weights
            self._run.zero_()
            self._overflows.zero_()
        return sentence, broken

    def summary(self) -> str:
        """Return a sentence about all skipped batches, empty if there are none."""
        if not (skipped := self.skipped):
            return ""
        return f"{_batches(skipped)} skipped in total because of NaN or infinity in {self._blame()}."

    def close(self) -> None:
        """Remove the hooks and forget the last batch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = {}
        self._mask = None

    def _blame(self, counts: Sequence[int] = ()) -> str:
        """Return the names of what was not finite, with their counts."""
        named = zip(self._names, counts or self._counts.tolist(), strict=False)
        return ", ".join(f"{name} ({n}x)" for name, n in named if n)


def _outputs(teacher: DetectorOutputs) -> list[tuple[str, list[Tensor]]]:
    """Return a teacher's outputs by name."""
    found = [("features", list(teacher.features)), ("scores", [teacher.scores]), ("boxes", [teacher.boxes])]
    return [*found, ("layers", list(teacher.layers.values()))] if teacher.layers else found


def _broken(weights: Callable[[], Mapping[str, Tensor]], recoverable: bool, cause: str) -> bool:
    """Return whether a weight is not finite; waits for the device.

    Raises:
        NumbersError: If so, and the weights cannot be restored.
    """
    found = (name for name, t in weights().items() if t.is_floating_point() and not t.isfinite().all())
    name = next(found, None)
    if name is not None and not recoverable:
        raise NumbersError(
            f"{cause} The weights are no longer finite ({name}), and there is no earlier epoch to return to. Lower "
            "lr0=, lengthen warmup_epochs= or set amp=False."
        )
    return name is not None


def _batches(n: int) -> str:
    return "1 batch was" if n == 1 else f"{n} batches were"
