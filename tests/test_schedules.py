"""Strength over a training, against values worked out by hand."""

from __future__ import annotations

import math

import pytest

from yolo_kd.schedules import Schedule


@pytest.mark.parametrize(
    ("keys", "values"),  # at progress 0, 0.25, 0.5, 0.75, 1
    [
        ({}, (1, 1, 1, 1, 1)),
        ({"kind": "constant", "start": 0.5, "end": 9}, (0.5, 0.5, 0.5, 0.5, 0.5)),
        ({"kind": "linear", "start": 1, "end": 0}, (1, 0.75, 0.5, 0.25, 0)),
        ({"kind": "linear", "start": 0, "end": 2}, (0, 0.5, 1, 1.5, 2)),
        ({"kind": "cosine", "start": 1, "end": 0}, (1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125), 0)),
        ({"kind": "cosine", "start": 1, "end": 0.1}, (1, 0.868198, 0.55, 0.231802, 0.1)),
        ({"kind": "cosine", "start": 1, "end": 1}, (1, 1, 1, 1, 1)),
        ({"warmup": 0.5}, (0, 0.5, 1, 1, 1)),
        ({"warmup": 1.0}, (0, 0.25, 0.5, 0.75, 1)),
        ({"kind": "linear", "start": 1, "end": 0, "warmup": 0.5}, (0, 0.375, 0.5, 0.25, 0)),
        ({"stop": 0.5}, (1, 1, 0, 0, 0)),
        ({"stop": 0.6}, (1, 1, 1, 0, 0)),
        ({"stop": 0}, (0, 0, 0, 0, 0)),
        ({"start": 0}, (0, 0, 0, 0, 0)),
    ],
)
def test_table(keys, values):
    schedule = Schedule(**keys)
    assert [schedule(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(values, abs=1e-6)


def test_stops_where_mosaic_closes():
    schedule = Schedule(stop="close_mosaic")
    assert [schedule(p, close_mosaic=0.9) for p in (0, 0.89, 0.9, 1)] == [1, 1, 0, 0]


def test_mosaic_that_never_closes_stops_nothing():
    assert Schedule(stop="close_mosaic")(1.0) == 1
    assert Schedule(stop="close_mosaic")(1.0, close_mosaic=1.0) == 1


def test_closing_mosaic_is_ignored_unless_asked_for():
    assert Schedule()(0.95, close_mosaic=0.9) == 1


def test_a_decay_never_rises_and_stays_within_its_ends():
    for kind in ("linear", "cosine"):
        values = [Schedule(kind=kind, start=1, end=0.1)(i / 100) for i in range(101)]
        assert values == sorted(values, reverse=True)
        assert (values[0], values[-1]) == pytest.approx((1, 0.1))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kind": "cosin"}, "kind must be one of constant, linear, cosine, received 'cosin'"),
        ({"kind": None}, "kind must be one of constant, linear, cosine, received None"),
        ({"start": -1}, "start must be a number of at least 0, received -1"),
        ({"end": "1e-3"}, "end must be a number of at least 0, received '1e-3'"),
        ({"end": math.nan}, "end must be a number of at least 0, received nan"),
        ({"warmup": 1.5}, "warmup must be a number of at least 0 and at most 1, received 1.5"),
        ({"warmup": 3}, "warmup must be a number of at least 0 and at most 1, received 3"),
        ({"stop": -0.1}, "stop must be a number of at least 0 and at most 1, received -0.1"),
        ({"stop": True}, "stop must be a number of at least 0 and at most 1, received True"),
        ({"stop": "mosaic"}, "stop must be a number of at least 0 and at most 1 or close_mosaic, received 'mosaic'"),
    ],
)
def test_bad_values(keys, message):
    with pytest.raises(ValueError, match=r"must be") as error:
        Schedule(**keys)
    assert str(error.value) == message
