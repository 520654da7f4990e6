"""Batches with NaN or infinity: kept out of the weights, named, counted, and an error once there are too many."""

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
    """Lets a batch into the weights only if every component of its loss is finite.

    A loss that is not finite has gradients that are not finite either, and multiplying them by zero does not help. So
    the gradients themselves are replaced by zeros, at the few tensors through which they reach the weights: the head's
    outputs, the features that the terms read, and the parameters of the adapters. Of several batches whose gradients
    are summed up before an optimiser step, only the bad one is lost.

    Whether a batch is good is decided on the device, and the host asks for the counts once in `LIMIT` batches and once
    in an epoch: on a GPU no step waits for it. On a CPU asking is free, so a good batch gets no hooks at all.

    Args:
        parameters: Parameters that the terms train besides the student's.
        lazy: Decide on the device; by default everywhere but on a CPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter] = (), lazy: bool | None = None):
        self._lazy = lazy
        self._mask: Tensor | None = None  # of the batch at hand: None for surely good, otherwise a 0-d bool
        self._handles: list[RemovableHandle] = [p.register_hook(self._gate) for p in parameters]
        self._names: tuple[str, ...] = ()
        self._counts = torch.zeros(1, dtype=torch.int64)  # times that each name was not finite; last, batches left out
        self._run = torch.zeros((), dtype=torch.int64)  # bad batches in a row
        self._overflows = torch.zeros((), dtype=torch.int64)  # gradients in a row that were not finite
        self._reported: list[int] = [0]  # the counts at the end of the last epoch
        self._last: dict[str, Tensor] = {}
        self._seen = 0
        self.admitted = False  # whether the teacher was checked

    @property
    def skipped(self) -> int:
        """Batches left out since the start; waits for the device."""
        return int(self._counts[-1])

    # ---------------------------------------------------------------------------------------------- each batch

    def admit(self, teacher: DetectorOutputs, name: str) -> None:
        """Check the teacher on the first batch; later ones go through `screen`.

        Raises:
            NumbersError: If anything that it yields is not finite.
        """
        if self.admitted:
            return
        self.admitted = True
        bad = [what for what, tensors in _outputs(teacher) if not all(t.isfinite().all() for t in tensors)]
        if bad:
            raise NumbersError(
                f"the teacher {name} yields NaN or infinity on the first batch (its {listed(bad)}). Validate it on "
                "this data set with 'yolo val', and train it again or choose another one."
            )

    def screen(
        self, loss: Tensor, items: Mapping[str, Tensor], inputs: Iterable[Tensor], teacher: DetectorOutputs
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return loss and logged items, or where the loss is not finite zero and the last good items.

        Args:
            loss: One component for each item, with gradient.
            items: What is logged, by column.
            inputs: Tensors through which the loss reaches the student.
            teacher: What the teacher made of the batch, to tell whether it is to blame.
        """
        if not self._seen:
            self._start(loss, items, teacher)
        self._seen += 1
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
        # a sum is finite only if all it adds up is, and needs no second tensor of that size
        sums = [torch.stack([t.sum(dtype=torch.float32) for t in tensors]).sum() for _, tensors in _outputs(teacher)]
        blamed = ~torch.stack(sums).isfinite() & ~good
        self._counts += torch.cat([bad, blamed, torch.stack([good & ~good, ~good])])
        self._run += 1
        self._run *= ~good

    # ---------------------------------------------------------------------------------------------- each step

    def allows_step(self, norm: Tensor, parameters: Sequence[Tensor], scaled: bool) -> bool:
        """Return whether the optimiser may step: the second line, for gradients that overflow on their way.

        Args:
            norm: Norm of all gradients, after the average over processes: all of them decide alike.
            parameters: What the optimiser steps.
            scaled: A gradient scaler is on. It leaves out such steps by itself, and expects some.
        """
        overflow = ~norm.isfinite()
        self._overflows += 1
        self._overflows *= overflow
        if not self._is_lazy(norm):
            self._counts[-2:] += overflow
            return not overflow and bool(norm > 0)  # exactly zero when every batch since the last step was bad
        if not scaled:
            for p in parameters:
                if p.grad is not None:
                    p.grad.masked_fill_(overflow, 0)
            self._counts[-2:] += overflow
        return True

    # ---------------------------------------------------------------------------------------------- seldom

    def check(self, weights: Callable[[], Mapping[str, Tensor]], recoverable: bool) -> None:
        """Stop when batch after batch is bad; looks once in `LIMIT` batches on a GPU, every time on a CPU.

        Args:
            weights: Returns the state of student and adapters.
            recoverable: There is a checkpoint to go back to at the end of the epoch, where the weights are the cause.

        Raises:
            NumbersError: Naming what was not finite.
        """
        if self._is_lazy(self._run) and self._seen % LIMIT:
            return
        run, overflows = int(self._run), int(self._overflows)
        if max(run, overflows) < LIMIT:
            return
        what = f"{run} batches" if run >= LIMIT else f"{overflows} steps"
        cause = f"the last {what} in a row were skipped because of NaN or infinity in {self._blame() or GRADIENT}."
        if broken := _not_finite(weights):
            if recoverable:
                return
            raise NumbersError(
                f"{cause} The student's weights themselves are no longer finite ({broken}), and there is no earlier "
                "epoch to go back to. Lower lr0=, lengthen warmup_epochs= or set amp=False."
            )
        raise NumbersError(
            f"{cause} The weights are still finite. Lower that term's weight= or leave the term out; if it is the "
            "student's own loss, lower lr0= or set amp=False."
        )

    def end_epoch(self, epoch: int, weights: Callable[[], Mapping[str, Tensor]], recoverable: bool) -> tuple[str, bool]:
        """Say what was skipped in the epoch, and whether the weights need to be restored.

        Args:
            epoch: Number of the epoch, from 0.
            weights: As in `check`.
            recoverable: As in `check`.

        Returns:
            A sentence, empty when all was well, and True when weights are not finite.

        Raises:
            NumbersError: If weights are not finite and cannot be restored.
        """
        counts = self._counts.tolist()
        fresh = [now - then for now, then in zip(counts, self._reported, strict=True)]
        self._reported = counts
        if not fresh[-1]:
            return "", False
        said = f"epoch {epoch + 1}: {_batches(fresh[-1])} skipped because of NaN or infinity in {self._blame(fresh)}."
        broken = _not_finite(weights)
        if broken and not recoverable:
            raise NumbersError(
                f"{said} The weights are no longer finite ({broken}), and there is no earlier epoch to go back to. "
                "Lower lr0=, lengthen warmup_epochs= or set amp=False."
            )
        if broken:  # what follows starts from other weights
            self._run.zero_()
            self._overflows.zero_()
        return said, bool(broken)

    def summary(self) -> str:
        """Return what was skipped since the start in a sentence, empty when nothing was."""
        if not (skipped := self.skipped):
            return ""
        return f"{_batches(skipped)} skipped in all because of NaN or infinity in {self._blame()}."

    def close(self) -> None:
        """Take the hooks off and forget the last batch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._last = {}
        self._mask = None

    def _blame(self, counts: Sequence[int] = ()) -> str:
        """Return the names of what was not finite, with the number of times."""
        named = zip(self._names, counts or self._counts.tolist(), strict=False)
        return ", ".join(f"{name} ({n}x)" for name, n in named if n)


def _outputs(view: DetectorOutputs) -> list[tuple[str, list[Tensor]]]:
    """Return what a teacher yields, by name."""
    found = [("features", list(view.features)), ("scores", [view.scores]), ("boxes", [view.boxes])]
    return [*found, ("layers", list(view.layers.values()))] if view.layers else found


def _not_finite(weights: Callable[[], Mapping[str, Tensor]]) -> str:
    """Return the name of the first tensor that is not finite, empty when all are; waits for the device."""
    for name, tensor in weights().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return name
    return ""


def _batches(n: int) -> str:
    return "1 batch was" if n == 1 else f"{n} batches were"
