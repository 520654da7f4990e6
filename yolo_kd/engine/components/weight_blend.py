"""Blends a student's weights before and after training, so that it does not forget its old classes."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.upstream.heads import class_rows


class Blend:
    """The weights of a student before training, and the share of the trained weights in a blend.

    Wortsman et al., "Robust fine-tuning of zero-shot models", CVPR 2022, https://arxiv.org/abs/2109.01903, section 3:
    (1 - share) * start + share * trained, for each weight and each statistic. On the way from trained to start, a
    fine-tuned model recovers old abilities much faster than it loses new ones. Departure from the paper: the rows of
    new classes, which start at random, keep their trained weights. The paper has none, since its class rows are
    computed from text.
    """

    def __init__(self, start: Mapping[str, Tensor], share: float) -> None:
        """Copy the tensors of a start.

        Args:
            start: Tensors by name in the student's state dict; others are not blended.
            share: Share of the trained weights, above 0 and at most 1.
        """
        self.start = {name: tensor.detach().float().cpu().clone() for name, tensor in start.items()}
        self.share = share

    @classmethod
    def of(cls, student: nn.Module, share: float, frozen: Collection[str] = ()) -> Blend:
        """Copy the current weights of a student.

        Args:
            student: The student before its first step.
            share: Share of the trained weights.
            frozen: Substrings of names; such tensors are not trained and not copied.
        """
        tensors = {name: t for name, t in student.state_dict().items() if t.is_floating_point()}
        return cls({name: t for name, t in tensors.items() if not any(text in name for text in frozen)}, share)

    @torch.no_grad()
    def apply(self, student: nn.Module, new: Sequence[int]) -> None:
        """Replace the weights of a trained student by the blend.

        Args:
            student: The student, changed in place.
            new: Indices of its new classes.
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
        """Replace the weights of a student by the blend for the duration; arguments as for `apply`."""
        state = student.state_dict()
        trained = {name: state[name].clone() for name in self.start}
        self.apply(student, new)
        try:
            yield
        finally:
            for name, tensor in trained.items():
                state[name].copy_(tensor)


def blend_checkpoint(checkpoint: dict[str, Any], blend: Blend, new: Sequence[int]) -> None:
    """Blend the weights in a checkpoint of a training, once.

    Args:
        checkpoint: The loaded checkpoint, changed in place unless it is a finished one.
        blend: The blend.
        new: Indices of the new classes.
    """
    if "yolo_kd" not in checkpoint:  # the key of finished files
        for key in ("ema", "model"):
            if isinstance(checkpoint.get(key), nn.Module):
                blend.apply(checkpoint[key], new)
