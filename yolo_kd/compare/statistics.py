"""What paired runs prove: differences by seed, their interval, exact tests, and the sentence that sums them up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
MIN_PAIRS = 3  # below, a t interval is so wide or so accidental that no verdict is given
EXACT_PAIRS = 12  # up to here all 2^n sign patterns are counted; beyond, a random sample of them
_SAMPLED = 99_999
_DECIMALS = 12  # of differences of metrics and of their sums; what lies beyond is rounding

GAIN, LOSS, NOISE, UNCERTAIN = "better", "worse", "inside the noise", "not safe"
THIN, NOTHING = "not enough evidence", "no result"


@dataclass(frozen=True)
class Spread:
    """Values of one arm over its seeds.

    Attributes:
        n: Number of values.
        mean: Their mean, None without any.
        sd: Sample standard deviation, None below two values.
    """

    n: int
    mean: float | None
    sd: float | None


@dataclass(frozen=True)
class Paired:
    """Differences between an arm and the reference, seed by seed, in the unit of the metric.

    Attributes:
        seeds: Seeds that both finished.
        differences: Arm minus reference, in the order of the seeds.
        dropped: Seeds that only one of the two finished; they are left out.
        mean: Mean difference, None without pairs.
        sd: Standard deviation of the differences, None below two pairs.
        low: Lower end of the 95 % t interval of the mean, None below two pairs.
        high: Its upper end.
        p_t: Two-sided p of the paired t test, None below two pairs and where all differences are equal.
        p_exact: Two-sided p of the sign-flip permutation test of the mean, None without pairs.
        p_smallest: The smallest p that this test can reach with so many pairs.
    """

    seeds: tuple[int, ...] = ()
    differences: tuple[float, ...] = ()
    dropped: tuple[int, ...] = ()
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    p_t: float | None = None
    p_exact: float | None = None
    p_smallest: float | None = None

    @property
    def n(self) -> int:
        """Number of pairs."""
        return len(self.seeds)

    @property
    def flat(self) -> bool:
        """True if several seeds gave exactly one difference, so that they say nothing about chance."""
        return self.n > 1 and self.sd == 0


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation; values that are not finite are left out."""
    kept = [v for v in values if math.isfinite(v)]
    if not kept:
        return Spread(0, None, None)
    return Spread(len(kept), float(np.mean(kept)), float(np.std(kept, ddof=1)) if len(kept) > 1 else None)


def paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """Compare an arm with the reference over the seeds that both have.

    Args:
        arm: The metric by seed; a value that is not finite counts as missing.
        reference: The same of the reference.
    """
    ours, theirs = ({s: v for s, v in side.items() if math.isfinite(v)} for side in (arm, reference))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    dropped = tuple(sorted((arm.keys() | reference.keys()) - set(seeds)))
    if not seeds:
        return Paired(dropped=dropped)
    # differences of decimals such as 0.3 - 0.1 and 0.4 - 0.2 are equal but for their last bits
    differences = np.round([ours[s] - theirs[s] for s in seeds], _DECIMALS)
    n = len(seeds)
    mean = float(differences.mean())
    result: dict[str, Any] = {
        "seeds": seeds,
        "differences": tuple(differences.tolist()),
        "dropped": dropped,
        "mean": mean,
        "p_exact": _sign_flip(differences),
        "p_smallest": min(1.0, 2.0 / 2**n) if n <= EXACT_PAIRS else 1 / (_SAMPLED + 1),
    }
    if n > 1:
        if np.ptp(differences) == 0:
            result |= {"mean": float(differences[0]), "sd": 0.0}
            result |= {"low": result["mean"], "high": result["mean"]}
        else:
            test = stats.ttest_1samp(differences, 0.0)
            interval = test.confidence_interval(CONFIDENCE)
            result |= {"sd": float(differences.std(ddof=1)), "p_t": float(test.pvalue)}
            result |= {"low": float(interval.low), "high": float(interval.high)}
    return Paired(**result)


def _sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p of the mean under random signs, exact for few pairs."""
    if len(differences) == 1 or not differences.any():  # one pair: its sign is as likely either way
        return 1.0
    exact = len(differences) <= EXACT_PAIRS
    test = stats.permutation_test(
        (differences,),
        # sums order the patterns as means do; scipy's own allowance for rounding is none where the observed one is zero
        lambda x, axis: np.round(np.sum(x, axis=axis), _DECIMALS),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else _SAMPLED,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p values adjusted after Holm for the number of tests; None stays None and does not count."""
    known = sorted((p, name) for name, p in p_values.items() if p is not None)
    adjusted: dict[str, float | None] = dict.fromkeys(p_values)
    highest = 0.0
    for rank, (p, name) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[name] = highest
    return adjusted


def judge(result: Paired, adjusted: float | None) -> str:
    """Say in a word what the pairs show.

    Args:
        result: The paired differences.
        adjusted: p of the t test after correction for the number of arms, None where there is none.

    Returns:
        `better` or `worse` if the interval excludes zero and the test still holds after the correction, `not safe`
        if only before it, `inside the noise` if the interval holds zero, `not enough evidence` below three pairs or
        where the seeds changed nothing, `no result` without pairs.
    """
    if result.mean is None:
        return NOTHING
    if result.n < MIN_PAIRS or result.flat or result.low is None or result.high is None:
        return THIN
    if result.low <= 0 <= result.high:
        return NOISE
    if adjusted is not None and adjusted >= ALPHA:
        return UNCERTAIN
    return GAIN if result.mean > 0 else LOSS


def gap_closed(result: Paired, reference: float | None, teacher: float | None) -> float | None:
    """Return the share of the distance between reference and teacher that an arm covers, 1 for all of it.

    Args:
        result: The paired differences.
        reference: The reference's mean over the paired seeds.
        teacher: The teacher's value.

    Returns:
        None where the teacher is not better than the reference: then there is no gap to close.
    """
    if result.mean is None or reference is None or teacher is None or not teacher > reference:
        return None
    return result.mean / (teacher - reference)


def points(value: float) -> str:
    """Return a difference of a metric in points (hundredths) with its sign, such as +1.3 or −0.4."""
    text = f"{abs(value) * 100:.1f}"
    sign = "±" if float(text) == 0 else "+" if value > 0 else "−"
    return f"{sign}{text}"


def sentence(
    name: str,
    reference: str,
    result: Paired,
    word: str,
    *,
    adjusted: float | None = None,
    arms: int = 1,
    gap: float | None = None,
    teacher: bool = False,
    time_ratio: float | None = None,
    metric: str = "mAP50-95",
) -> str:
    """Return the verdict on one arm in a sentence.

    Args:
        name: The arm.
        reference: What it is compared with.
        result: The paired differences of the metric.
        word: What `judge` said.
        adjusted: p after correction for the number of arms.
        arms: Number of arms compared with the reference.
        gap: What `gap_closed` said.
        teacher: Whether there is a teacher to measure a gap to.
        time_ratio: Training time over the reference's.
        metric: Name of the metric, with its split.
    """
    if word == NOTHING or result.mean is None:
        return f"{name}: no result, because no seed was finished by both {name} and {reference}."
    difference = f"{points(result.mean)} {metric}"
    pairs = f"{result.n} paired seed{'s' if result.n != 1 else ''}"
    interval = ""
    if result.low is not None and result.high is not None:
        interval = f"95 % interval {points(result.low)} to {points(result.high)}"
    cost = f"costs {time_ratio:.2f}x the training time" if time_ratio is not None else ""
    share = ""
    if gap is not None and word in (GAIN, UNCERTAIN) and gap > 0:
        share = f"closes {gap * 100:.0f} % of the gap to the teacher" if gap <= 1 else "is above the teacher"
    elif teacher and gap is None:
        share = f"the teacher is not better than {reference}, so there is no gap to close"
    tail = "".join(f", {part}" for part in (share, cost) if part)
    if word == THIN:
        why = (
            f"all {result.n} seeds gave exactly the same difference, so they say nothing about chance"
            if result.flat and result.n >= MIN_PAIRS
            else f"{pairs}, at least {MIN_PAIRS} are needed for a verdict"
        )
        return f"{name}: not enough evidence ({why}). So far {difference} over {reference}{tail}."
    if word == NOISE:
        return f"{name}: {difference} over {reference} is inside the noise, {interval}, {pairs}{tail}."
    if word == UNCERTAIN:
        return (
            f"{name}: {difference} over {reference}, {interval}, {pairs}, is not safe: with {arms} arms compared, "
            f"chance alone gives such a difference too often (p = {adjusted:.2g} after Holm){tail}."
        )
    worse = f"worse than {reference}, {difference}" if word == LOSS else f"{difference} over {reference}"
    return f"{name}: {worse}, {interval}, {pairs}{tail}."
