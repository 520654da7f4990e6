"""Weights between a student's start and what training made of them, so that it keeps what it knew."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.upstream.heads import class_rows


class Blend:
    """Where a student started, and how far from there the finished one stands.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, https://arxiv.org/abs/2109.01903, section 3:
    (1 - share) * start + share * trained, for every weight and every statistic. What a fine-tuned model has forgotten
    comes back far faster along this line than what it has learned is lost. The rows of new classes, which have no start
    worth the name, stay as they were trained; there were none in the paper, whose class rows came from text.
    """

    def __init__(self, start: Mapping[str, Tensor], share: float) -> None:
        """Take over a start.

        Args:
            start: Tensors by name in the student's state dict; others are not blended.
            share: Share of the way from the start, above 0 and at most 1.
        """
        self.start = {name: tensor.detach().float().cpu().clone() for name, tensor in start.items()}
        self.share = share

    @classmethod
    def of(cls, student: nn.Module, share: float, frozen: Collection[str] = ()) -> Blend:
        """Remember a student as it is.

        Args:
            student: The student before its first step.
            share: Share of the way from here.
            frozen: Parts of names whose tensors are not trained and need not be remembered.
        """
        tensors = {name: t for name, t in student.state_dict().items() if t.is_floating_point()}
        return cls({name: t for name, t in tensors.items() if not any(part in name for part in frozen)}, share)

    @torch.no_grad()
    def apply(self, student: nn.Module, new: Sequence[int]) -> None:
        """Move a trained student back towards its start.

        Args:
            student: It, changed in place.
            new: Its classes that the start did not know.
        """
        state = student.state_dict()
        rows = class_rows(student)
        for name, start in self.start.items():
            tensor = state[name]
            blended = torch.lerp(start, tensor.float().cpu(), self.share)
            if name in rows:
                blended[list(new)] = tensor[list(new)].float().cpu()
            tensor.copy_(blended)

    @contextmanager
    def applied(self, student: nn.Module, new: Sequence[int]) -> Iterator[None]:
        """Let a trained student stand where the finished one will, for the duration; arguments as for `apply`."""
        state = student.state_dict()
        trained = {name: state[name].clone() for name in self.start}
        self.apply(student, new)
        try:
            yield
        finally:
            for name, tensor in trained.items():
                state[name].copy_(tensor)


def blend_checkpoint(checkpoint: dict[str, Any], blend: Blend, new: Sequence[int]) -> None:
    """Blend the weights that a checkpoint of a training holds, once.

    Args:
        checkpoint: What `torch.load` returned, changed in place; a finished one is left alone.
        blend: The start.
        new: The classes that it did not know.
    """
    if "yolo_kd" not in checkpoint:  # stands in finished files
        for key in ("ema", "model"):
            if isinstance(checkpoint.get(key), nn.Module):
                blend.apply(checkpoint[key], new)
