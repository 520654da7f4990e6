"""Strength over a training, against values worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing

from yolo_kd.config.schedule import Schedule
from yolo_kd.config.source import Item
from yolo_kd.config.validation import validate
from yolo_kd.distillation.auto_weight import FRESH, HIGHEST, LOWEST, AutoWeights, balance, is_measured


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
        ({"kind": "cosin"}, "kind must be constant, linear or cosine, received 'cosin'. Did you mean 'cosine'?"),
        ({"kind": None}, "kind must be constant, linear or cosine, received nothing."),
        ({"start": -1}, "start must be a number of at least 0, received -1."),
        ({"end": "1e-3"}, "end must be a number of at least 0, received '1e-3'."),
        ({"end": math.nan}, "end must be a number of at least 0, received nan."),
        ({"warmup": 1.5}, "warmup must be a number of at least 0 and at most 1, received 1.5."),
        ({"warmup": 3}, "warmup must be a number of at least 0 and at most 1, received 3."),
        ({"stop": -0.1}, "stop must be a number of at least 0 and at most 1 or close_mosaic, received -0.1."),
        ({"stop": True}, "stop must be a number of at least 0 and at most 1 or close_mosaic, received True."),
        (
            {"stop": "mosaic"},
            "stop must be a number of at least 0 and at most 1 or close_mosaic, received 'mosaic'. Did "
            "you mean 'close_mosaic'?",
        ),
    ],
)
def test_bad_values(keys, message):
    problems: list[str] = []
    assert validate(Schedule, Item(keys), problems) is None
    assert problems == [message]
    with pytest.raises(ValueError, match=next(iter(keys))):
        Schedule(**keys)


def test_gradients_are_measured_often_at_first_and_seldom_later():
    assert [step for step in range(100) if is_measured(step)] == [*range(10), 20, 40, 60, 80]


def balanced(measurements: list[tuple[float, float]], ratio: float = 0.3) -> list[float]:
    """Return the weight after each (task, term) measurement."""
    log_weight, count, weights = torch.zeros(1), torch.zeros(1), []
    for task, term in measurements:
        log_weight, count = balance(
            log_weight, count, torch.tensor([ratio]), torch.tensor([task]), torch.tensor([term])
        )
        weights.append(log_weight.exp().item())
    return weights


def test_balance_by_hand():
    # the first measurement counts alone: 0.3 * 4 / 2; each one after it FRESH
    second = math.exp((1 - FRESH) * math.log(0.6) + FRESH * math.log(2.4))
    third = math.exp((1 - FRESH) * math.log(second) + FRESH * math.log(0.3))
    assert balanced([(4, 2), (8, 1), (1, 1)]) == pytest.approx([0.6, second, third], rel=1e-5)


def test_a_term_that_hardly_pulls_at_first_is_not_overdone_for_long():
    """What `mgd` wants in the first steps on blood cells, measured: its generators start from random numbers."""
    wanted = [34.4, 33.1, 29.9, 21.4, 9.8, 5.6, 0.99, 1.46, 1.57, 1.40, 1.42, 1.46, 1.32, 1.21, 1.25, 1.44, 1.10]
    measured = [w for step, w in enumerate(wanted) if is_measured(step)]
    assert balanced([(w / 0.3, 1.0) for w in measured])[-1] < 1.5 * wanted[-1]


def test_a_constant_measurement_gives_the_target_ratio_at_once_and_for_good():
    for ratio in (0.1, 0.3, 2.0):
        for weight in balanced([(3.0, 7.0)] * 10, ratio):
            assert weight * 7.0 / 3.0 == pytest.approx(ratio, rel=1e-5)


def test_a_weight_stays_within_bounds_and_comes_back_from_them():
    weights = balanced([(1.0, 1e-9)] * 20 + [(1.0, 0.3)] * 20)
    assert max(weights) == pytest.approx(HIGHEST)
    assert weights[-1] == pytest.approx(1.0, rel=0.02)
    assert min(balanced([(1e-9, 1.0)] * 20)) == pytest.approx(LOWEST)


@pytest.mark.parametrize("nothing", [(0.0, 1.0), (1.0, 0.0), (math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0)])
def test_a_measurement_without_gradient_changes_nothing(nothing: tuple[float, float]):
    assert balanced([nothing]) == [1.0]
    assert balanced([(4, 2), nothing, (8, 1)]) == pytest.approx([0.6, 0.6, 1.2], rel=1e-5)


def test_auto_weights_resume_where_they_stopped():
    def measure(weights: AutoWeights, step: int) -> None:
        if weights.tick():
            weights.update(torch.tensor([1.0 + step, 2.0]), torch.tensor([2.0, 1.0 + step]))

    through, stopped, resumed = (AutoWeights({"fgd": 0.3, "mgd": 0.5}) for _ in range(3))
    for step in range(50):
        measure(through, step)
        measure(stopped if step < 21 else resumed, step)
        if step == 20:
            resumed.load_state_dict(stopped.state_dict())
    assert through.weight("fgd") != through.weight("mgd")
    for name in through.names:
        assert torch.equal(through.weight(name), resumed.weight(name))
    assert through.steps == resumed.steps == 50


def _rank(rank: int, folder: str) -> None:
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    weights = AutoWeights({"a": 0.3, "b": 0.3, "c": 0.3})
    # a: both ranks see objects; b: only rank 1; c: none
    task = torch.tensor([1.0 + 2 * rank, 4.0, math.nan])
    term = torch.tensor([1.0, 0.0 if rank == 0 else 2.0, 1.0])
    weights.update(task, term)
    torch.save(torch.stack([weights.weight(n) for n in weights.names]), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.e2e
def test_weights_are_the_same_on_all_ranks(tmp_path: Path):
    multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert first.tolist() == pytest.approx([0.6, 0.6, 1.0])  # (1 + 3) / 2 over 1; rank 1 alone; as it began
