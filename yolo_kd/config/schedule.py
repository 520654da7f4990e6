"""The strength of a term over a training, as a schedule."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from yolo_kd.config.validation import CONFIG, Number

RATIO = 0.3
"""Default aim of a weight that sets itself: the term's gradient over the task loss's."""

Multiplier = Annotated[Number, Field(ge=0)]
Fraction = Annotated[Number, Field(ge=0, le=1)]


@dataclass(frozen=True, config=CONFIG)
class Schedule:
    """Multiplier of a term's weight.

    Attributes:
        kind: Way from `start` to `end`; `constant` stays at `start`.
        start: Multiplier after the warm-up, at least 0.
        end: Multiplier at the end of training, at least 0.
        warmup: Fraction of the training over which the multiplier rises linearly from 0 to its value.
        stop: Fraction of the training after which the term is off, 1 for never, or `close_mosaic` for the epoch in
            which Ultralytics closes the mosaic augmentation.
    """

    kind: Literal["constant", "linear", "cosine"] = Field(
        default="constant", description="Way from start to end; constant stays at start."
    )
    start: Multiplier = Field(default=1.0, description="Multiplier of the weight after the warm-up.")
    end: Multiplier = Field(default=1.0, description="Multiplier of the weight at the end of training.")
    warmup: Fraction = Field(
        default=0.0, description="Fraction of the training over which the multiplier rises linearly from 0."
    )
    stop: Fraction | Literal["close_mosaic"] = Field(
        default=1.0,
        description="Fraction of the training after which the term is off (1: never), or close_mosaic for the epoch in "
        "which Ultralytics closes the mosaic augmentation.",
    )

    def __call__(self, progress: float, close_mosaic: float = 1.0) -> float:
        """Return the multiplier.

        Args:
            progress: Fraction of the training that has passed, in [0, 1].
            close_mosaic: Progress at which the mosaic augmentation closes, 1 if it never does.
        """
        stop = close_mosaic if self.stop == "close_mosaic" else float(self.stop)
        if progress >= stop and stop < 1:
            return 0.0
        blend = {"constant": 0.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}[self.kind]
        value = self.start + (self.end - self.start) * blend
        return value * min(progress / self.warmup, 1.0) if self.warmup else value
