"""Paired differences against scipy and hand-computed numbers, down to one seed, none, and seeds that change nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy import stats

from yolo_kd.compare.records import Paired
from yolo_kd.compare.statistics import (
    GAIN,
    LOSS,
    NOISE,
    NOTHING,
    THIN,
    UNCERTAIN,
    Context,
    gap_closed,
    holm,
    judge,
    paired,
    points,
    sentence,
    spread,
)

BASE = {0: 0.500, 1: 0.510, 2: 0.505}
BETTER = {0: 0.512, 1: 0.523, 2: 0.519}  # differences 0.012, 0.013, 0.014


def test_three_pairs_equal_scipy_and_a_computation_by_hand() -> None:
    found = paired(BETTER, BASE)
    reference = stats.ttest_rel([*BETTER.values()], [*BASE.values()])
    interval = reference.confidence_interval(0.95)
    assert found.seeds == (0, 1, 2)
    assert found.differences == pytest.approx([0.012, 0.013, 0.014])
    assert found.mean == pytest.approx(0.013)
    assert found.sd == pytest.approx(0.001)
    assert found.p_t == pytest.approx(reference.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    # t(0.975, 2) = 4.302653 from a table, times 0.001 / sqrt(3)
    assert found.high - found.mean == pytest.approx(4.302653 * 0.001 / math.sqrt(3), rel=1e-6)


def test_sign_flip_counts_all_patterns() -> None:
    """Of the eight sign patterns only + + + and - - - reach the mean: p is 2 / 8, the smallest there is."""
    found = paired(BETTER, BASE)
    assert found.p_exact == pytest.approx(0.25)
    assert found.p_smallest == pytest.approx(0.25)
    mixed = paired({0: 0.6, 1: 0.4, 2: 0.7}, {0: 0.5, 1: 0.5, 2: 0.5})  # 0.1, -0.1, 0.2
    # |mean| >= 0.2 / 3: all patterns but those of sum 0
    sums = [a * 0.1 + b * 0.1 + c * 0.2 for a, b, c in itertools.product((1, -1), repeat=3)]
    assert mixed.p_exact == pytest.approx(sum(abs(s) >= 0.2 - 1e-9 for s in sums) / 8)


@example([0, 0, 0, 0, 0, 5, 22, -27])  # 0.005 + 0.022 - 0.027 is not zero
@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8))
def test_sign_flip_equals_a_count_of_all_patterns(steps: list[int]) -> None:
    differences = [step / 1000 for step in steps]
    found = paired(dict(enumerate(differences)), dict.fromkeys(range(len(steps)), 0.0))
    patterns = itertools.product((1, -1), repeat=len(steps))
    sums = [sum(s * d for s, d in zip(signs, steps, strict=True)) for signs in patterns]
    above = sum(s >= sum(steps) for s in sums) / len(sums)
    below = sum(s <= sum(steps) for s in sums) / len(sums)
    assert found.p_exact == pytest.approx(min(1.0, 2 * min(above, below)))


def test_two_pairs_have_an_interval_but_no_verdict() -> None:
    found = paired({0: 0.52, 1: 0.55}, {0: 0.50, 1: 0.51})
    # 0.02 and 0.04: mean 0.03, sd 0.0141421, t(0.975, 1) = 12.7062
    assert found.mean == pytest.approx(0.03)
    assert found.low == pytest.approx(0.03 - 12.7062 * 0.0141421356 / math.sqrt(2), rel=1e-4)
    assert found.p_smallest == 0.5
    assert judge(found.model_copy(update={"p_holm": found.p_t})) == THIN


def test_one_pair_has_neither_interval_nor_verdict() -> None:
    found = paired({0: 0.52}, {0: 0.50})
    assert (found.mean, found.sd, found.low, found.high, found.p_t) == (pytest.approx(0.02), None, None, None, None)
    assert found.p_exact == found.p_smallest == 1.0
    assert judge(found) == THIN


def test_equal_differences_say_nothing_about_chance() -> None:
    found = paired({0: 0.3, 1: 0.4, 2: 0.5}, {0: 0.1, 1: 0.2, 2: 0.3})  # 0.2 up to the last bits of a float
    assert found.flat
    assert found.sd == 0.0
    assert found.low == found.high == pytest.approx(0.2)
    assert found.p_t is None
    assert judge(found) == THIN
    text = sentence("fgd", found, THIN, Context("baseline"))
    assert "all 3 seeds gave exactly the same difference" in text


def test_identical_arms() -> None:
    found = paired(BASE, BASE)
    assert found.mean == 0
    assert found.p_exact == 1.0
    assert judge(found) == THIN


def test_seeds_without_a_partner_are_dropped_and_named() -> None:
    found = paired({0: 0.5, 1: 0.6, 3: math.nan}, {0: 0.4, 2: 0.5, 3: 0.5})
    assert found.seeds == (0,)
    assert found.differences == pytest.approx([0.1])
    assert found.dropped == (1, 2, 3)


def test_no_pairs() -> None:
    found = paired({}, {0: 0.5})
    assert (found.n, found.mean, found.p_exact, found.dropped) == (0, None, None, (0,))
    assert judge(found) == NOTHING
    assert sentence("fgd", found, NOTHING, Context("baseline")).startswith("fgd: no result")


def test_many_pairs_are_sampled_the_same_way_twice() -> None:
    values = dict(enumerate(np.random.default_rng(0).normal(0.01, 0.02, 14).tolist()))
    zeros = dict.fromkeys(values, 0.0)
    first = paired(values, zeros)
    assert first.p_exact == paired(values, zeros).p_exact
    assert first.p_exact == pytest.approx(stats.ttest_1samp([*values.values()], 0).pvalue, abs=0.05)


def test_holm_against_a_computation_by_hand() -> None:
    # sorted 0.01 0.02 0.04: 3 * 0.01, max(2 * 0.02, 0.03), max(0.04, 0.04)
    assert holm({"a": 0.04, "b": 0.01, "c": 0.02, "d": None}) == {
        "a": pytest.approx(0.04),
        "b": pytest.approx(0.03),
        "c": pytest.approx(0.04),
        "d": None,
    }
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.mark.parametrize(
    ("low", "high", "adjusted", "word"),
    [
        (0.001, 0.02, 0.03, GAIN),
        (0.001, 0.02, None, GAIN),
        (0.001, 0.02, 0.05, UNCERTAIN),
        (-0.001, 0.02, 0.06, NOISE),
        (0.0, 0.02, 0.05, NOISE),
        (-0.03, -0.01, 0.01, LOSS),
    ],
)
def test_judge(low: float, high: float, adjusted: float | None, word: str) -> None:
    ends = {"mean": (low + high) / 2, "sd": 0.01, "low": low, "high": high, "p_t": 0.04, "p_holm": adjusted}
    assert judge(Paired(n=3, seeds=(0, 1, 2), differences=(0.0, 0.0, 0.0), **ends)) == word


def test_gap_closed() -> None:
    found = paired(BETTER, BASE)
    assert gap_closed(found, 0.505, 0.531) == pytest.approx(0.5)
    assert gap_closed(found, 0.505, 0.505) is None
    assert gap_closed(found, 0.505, None) is None
    assert gap_closed(Paired(), None, 0.6) is None


def test_spread() -> None:
    assert spread([0.1, 0.2, 0.3]).sd == pytest.approx(0.1)
    assert spread([0.1]) == spread([0.1, math.nan])
    assert (spread([0.1]).mean, spread([0.1]).sd) == (0.1, None)
    assert spread([]).mean is None


@pytest.mark.parametrize(
    ("value", "text"), [(0.0134, "+1.3"), (-0.0061, "−0.6"), (0.0, "±0.0"), (-0.0002, "±0.0"), (0.0005001, "+0.1")]
)
def test_points(value: float, text: str) -> None:
    assert points(value) == text


def test_the_sentence_of_a_gain() -> None:
    found = paired(BETTER, BASE)
    text = sentence("objectness_fgd", found, GAIN, Context("baseline", gap=0.41, teacher=True, time_ratio=1.349))
    assert text == (
        "objectness_fgd: +1.3 mAP50-95 over baseline, 95 % interval +1.1 to +1.5, 3 paired seeds, closes 41 % of the "
        "gap to the teacher, costs 1.35x the training time."
    )


def test_the_other_sentences() -> None:
    found = paired({0: 0.51, 1: 0.50, 2: 0.52}, BASE)
    assert judge(found) == NOISE
    noise = sentence("fgd", found, NOISE, Context("baseline", teacher=True, gap=0.2))
    assert "is inside the noise, 95 % interval" in noise
    assert "closes" not in noise
    thin = sentence("fgd", paired({0: 0.51}, {0: 0.5}), THIN, Context("baseline"))
    assert thin == (
        "fgd: not enough evidence (1 paired seed, at least 3 are needed for a verdict). "
        "So far +1.0 mAP50-95 over baseline."
    )
    better = paired(BETTER, BASE).model_copy(update={"p_holm": 0.07})
    unsafe = sentence("fgd", better, UNCERTAIN, Context("baseline", arms=4))
    assert "with 4 arms compared" in unsafe
    assert "p = 0.07 after Holm" in unsafe
    assert "there is no gap to close" in sentence("fgd", better, GAIN, Context("baseline", teacher=True))
    assert "is above the teacher" in sentence("fgd", better, GAIN, Context("baseline", teacher=True, gap=1.2))
