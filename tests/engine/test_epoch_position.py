"""Where in an epoch a run goes on."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from yolo_kd.engine.epoch_position import POSITION, EpochPosition, RestOfEpoch


class Loader:
    """Hands out numbers and has an attribute of its own."""

    def __init__(self) -> None:
        self.sampler = "its sampler"

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(range(10))

    def __len__(self) -> int:
        return 10


def test_it_survives_a_checkpoint() -> None:
    position = EpochPosition(3, 8, {"box_loss": 1.5})
    assert EpochPosition.of_checkpoint({POSITION: asdict(position)}) == position
    assert EpochPosition.of_checkpoint({"epoch": 3}) is None


@pytest.mark.parametrize(
    ("batches", "of", "now", "done"),
    [(3, 8, 8, 3), (3, 8, 16, 6), (5, 8, 4, 2), (8, 8, 8, 7), (1, 1, 1, 0), (0, 8, 8, 0)],
)
def test_how_many_batches_are_left_out(batches: int, of: int, now: int, done: int) -> None:
    """The batch size may be another one now; one batch always stays."""
    assert EpochPosition(batches, of).done(now) == done


def test_losses_are_means_over_the_whole_epoch() -> None:
    position = EpochPosition(3, 8, {"box_loss": 1.0})
    assert position.merged({"box_loss": 2.0}, skipped=3, trained=5)["box_loss"] == pytest.approx((3 * 1 + 5 * 2) / 8)
    assert position.merged({"new_loss": 2.0}, skipped=3, trained=5) == {"new_loss": 2.0}


def test_the_rest_of_an_epoch() -> None:
    rest = RestOfEpoch(Loader(), 4)
    assert [*rest] == [0, 1, 2, 3]
    assert len(rest) == 10
    assert rest.sampler == "its sampler"
