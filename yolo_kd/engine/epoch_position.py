"""The position inside an epoch at which a training was interrupted, so that it continues with the next batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

POSITION = "yolo_kd_position"  # key in a checkpoint that was written inside an epoch


@dataclass(frozen=True)
class EpochPosition:
    """The progress of an interrupted epoch.

    Attributes:
        batches: Batches that were trained.
        of: Batches in the epoch.
        losses: Mean of each logged loss over these batches.
    """

    batches: int
    of: int
    losses: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> EpochPosition | None:
        """Return the position in a checkpoint, None for the checkpoint of a finished epoch."""
        try:
            state = checkpoint[POSITION]
            losses = {str(name): float(value) for name, value in state["losses"].items()}
            return cls(int(state["batches"]), int(state["of"]), losses)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):
            return None

    def done(self, batches: int) -> int:
        """Return the number of batches to skip in an epoch of `batches`; the batch size may have changed.

        At least one batch remains, because Ultralytics' epoch needs one.
        """
        return max(min(round(self.batches * batches / max(self.of, 1)), batches - 1), 0)

    def merged(self, losses: Mapping[str, Any], skipped: int, trained: int) -> dict[str, Any]:
        """Return the mean losses of the whole epoch, given those of the `trained` batches after the `skipped` ones."""
        share = skipped / max(skipped + trained, 1)
        return {k: v * (1 - share) + self.losses.get(k, v) * share for k, v in losses.items()}


class RestOfEpoch:
    """A data loader with a shorter epoch; it forwards everything else to the loader.

    Args:
        loader: The loader.
        batches: Number of batches.
    """

    def __init__(self, loader: Any, batches: int):
        self.loader = loader
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.loader), self._batches)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)
