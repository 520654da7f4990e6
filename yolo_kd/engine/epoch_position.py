"""Where in an epoch a training was interrupted, so that it goes on there: no batch too many, none too few."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

POSITION = "yolo_kd_position"  # key in a checkpoint that was written inside an epoch


@dataclass(frozen=True)
class EpochPosition:
    """How far an epoch had got.

    Attributes:
        batches: Batches that were trained on.
        of: Batches in the epoch.
        losses: Mean of every logged loss over these batches.
    """

    batches: int
    of: int
    losses: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> EpochPosition | None:
        """Return the position that a checkpoint holds, None for one of a finished epoch."""
        try:
            state = checkpoint[POSITION]
            losses = {str(name): float(value) for name, value in state["losses"].items()}
            return cls(int(state["batches"]), int(state["of"]), losses)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError):  # none, or not one of ours
            return None

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return asdict(self)

    def done(self, batches: int) -> int:
        """Return how many batches of an epoch of `batches` to leave out; the batch size may be another one now.

        One always stays, because Ultralytics' epoch needs a batch.
        """
        return max(min(round(self.batches * batches / max(self.of, 1)), batches - 1), 0)

    def merged(self, losses: Mapping[str, Any], skipped: int, seen: int) -> dict[str, Any]:
        """Return mean losses of the epoch so far, from those of the `seen` batches after the `skipped` ones."""
        share = skipped / max(skipped + seen, 1)
        return {k: v * (1 - share) + self.losses.get(k, v) * share for k, v in losses.items()}


class RestOfEpoch:
    """A data loader of which the first epoch is shorter; everything else is the loader's own.

    Args:
        loader: The loader.
        batches: How many batches it hands out.
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
