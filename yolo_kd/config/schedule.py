"""How the strength of a term changes over a training: by a schedule, and by the gradients that were measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

from yolo_kd.losses.base import check_range

KINDS = ("constant", "linear", "cosine")

RATIO = 0.3
"""The term's gradient over the task loss's that a weight aims at which sets itself."""


@dataclass(frozen=True)
class Schedule:
    """Multiplier of a term's weight.

    Attributes:
        kind: Way from `start` to `end`: `constant` stays at `start`.
        start: Multiplier after the warm-up, at least 0.
        end: Multiplier at the end of training, at least 0.
        warmup: Fraction of the training over which the multiplier rises linearly from 0 to its value.
        stop: Fraction of the training after which the term is off, 1 for never, or `close_mosaic` for the epoch in
            which Ultralytics closes the mosaic augmentation.
    """

    kind: str = "constant"
    start: float = 1.0
    end: float = 1.0
    warmup: float = 0.0
    stop: float | str = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, received {self.kind!r}")
        check_range("start", self.start, 0)
        check_range("end", self.end, 0)
        check_range("warmup", self.warmup, 0, 1)
        if self.stop != "close_mosaic":
            if isinstance(self.stop, str):
                raise ValueError(
                    f"stop must be a number of at least 0 and at most 1 or close_mosaic, received {self.stop!r}"
                )
            check_range("stop", self.stop, 0, 1)

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
