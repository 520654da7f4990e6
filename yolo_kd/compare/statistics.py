"""What paired runs prove: differences by seed, their interval, exact tests, and the sentence that sums them up."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from yolo_kd.compare.records import MAIN, Paired, Spread

ALPHA = 0.05
CONFIDENCE = 1 - ALPHA
MIN_PAIRS = 3  # below, a t interval is too wide or too accidental for a verdict
EXACT_PAIRS = 12  # up to here all 2^n sign patterns are counted; beyond, a random sample of them
_SAMPLED = 99_999
_DECIMALS = 12  # of differences of metrics and of their sums; smaller digits are rounding errors

GAIN, LOSS, NOISE, UNCERTAIN = "better", "worse", "inside the noise", "not safe"
THIN, NOTHING = "not enough evidence", "no result"
BEST_FIRST = (GAIN, UNCERTAIN, NOISE, LOSS, THIN, NOTHING)


def spread(numbers: Sequence[float] | np.ndarray) -> Spread:
    """Return mean and sample standard deviation; numbers that are not finite are left out."""
    kept = [v for v in numbers if math.isfinite(v)]
    if not kept:
        return Spread()
    sd = float(np.std(kept, ddof=1)) if len(kept) > 1 else None
    return Spread(n=len(kept), mean=float(np.mean(kept)), sd=sd)


def paired(arm: Mapping[int, float], reference: Mapping[int, float]) -> Paired:
    """Compare an arm with the reference over the seeds that both have.

    Args:
        arm: The arm's metric by seed; a number that is not finite counts as missing.
        reference: The reference's metric by seed.
    """
    ours, theirs = ({s: v for s, v in side.items() if math.isfinite(v)} for side in (arm, reference))
    seeds = tuple(sorted(ours.keys() & theirs.keys()))
    dropped = tuple(sorted((arm.keys() | reference.keys()) - set(seeds)))
    if not seeds:
        return Paired(dropped=dropped)
    # 0.3 - 0.1 and 0.4 - 0.2 are equal but for their last bits
    differences = np.round([ours[s] - theirs[s] for s in seeds], _DECIMALS)
    flat = len(seeds) > 1 and np.ptp(differences) == 0
    ends: dict[str, float] = {}
    if flat:  # without rounding errors of a mean and of a standard deviation
        same = float(differences[0])
        ends = {"mean": same, "sd": 0.0, "low": same, "high": same}
    elif len(seeds) > 1:
        test = stats.ttest_1samp(differences, 0.0)
        interval = test.confidence_interval(CONFIDENCE)
        ends = {"low": float(interval.low), "high": float(interval.high), "p_t": float(test.pvalue)}
    exact = len(seeds) <= EXACT_PAIRS
    return Paired(
        seeds=seeds,
        differences=tuple(differences.tolist()),
        dropped=dropped,
        p_exact=_sign_flip(differences),
        p_smallest=min(1.0, 2.0 / 2 ** len(seeds)) if exact else 1 / (_SAMPLED + 1),
        **{**dict(spread(differences)), **ends},
    )


def _sign_flip(differences: np.ndarray) -> float:
    """Return the two-sided p of the mean under random signs, exact for few pairs."""
    if len(differences) == 1 or not differences.any():  # the sign of a single pair is as likely either way
        return 1.0
    exact = len(differences) <= EXACT_PAIRS
    test = stats.permutation_test(
        (differences,),
        # sums order the patterns as means do; scipy's allowance for rounding vanishes where the observed sum is zero
        lambda x, axis: np.round(np.sum(x, axis=axis), _DECIMALS),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf if exact else _SAMPLED,
        rng=np.random.default_rng(0),
    )
    return float(test.pvalue)


def holm(p_values: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return p values after Holm's correction for the number of tests; None stays None and does not count."""
    given = sorted((p, name) for name, p in p_values.items() if p is not None)
    steps = [(len(given) - rank) * p for rank, (p, _) in enumerate(given)]
    adjusted = np.minimum(np.maximum.accumulate(steps), 1.0).tolist() if given else []
    return {**p_values, **dict(zip((name for _, name in given), adjusted, strict=True))}


def judge(result: Paired) -> str:
    """Return what the pairs show, in a word.

    Returns:
        `better` or `worse` if the interval excludes zero and the t test still holds after the correction for the number
        of arms, `not safe` if it holds only before the correction, `inside the noise` if the interval contains zero,
        `not enough evidence` below three pairs or where the seeds changed nothing, `no result` without pairs.
    """
    if result.mean is None:
        return NOTHING
    if result.n < MIN_PAIRS or result.flat or result.low is None or result.high is None:
        return THIN
    if result.low <= 0 <= result.high:
        return NOISE
    if result.p_holm is not None and result.p_holm >= ALPHA:
        return UNCERTAIN
    return GAIN if result.mean > 0 else LOSS


def gap_closed(result: Paired, reference: float | None, teacher: float | None) -> float | None:
    """Return the share of the distance between reference and teacher that an arm covers, 1 for all of it.

    Args:
        result: The paired differences.
        reference: Mean metric of the reference over the paired seeds.
        teacher: Metric of the teacher.

    Returns:
        The share, or None where the teacher is not better than the reference and there is no gap to close.
    """
    if result.mean is None or reference is None or teacher is None or not teacher > reference:
        return None
    return result.mean / (teacher - reference)


def points(value: float) -> str:
    """Return a difference of a metric in points (hundredths) with its sign, such as +1.3 or −0.4."""
    text = f"{abs(value) * 100:.1f}"
    sign = "±" if float(text) == 0 else "+" if value > 0 else "−"
    return f"{sign}{text}"


@dataclass(frozen=True)
class Context:
    """What a verdict mentions besides the paired differences.

    Attributes:
        reference: Name of the arm that the others are compared with.
        metric: Name of the metric, with its split.
        arms: Number of arms compared with the reference.
        teacher: Whether there is a teacher to measure a gap to.
        gap: Result of `gap_closed`.
        time_ratio: Training time over the reference's.
    """

    reference: str
    metric: str = MAIN
    arms: int = 1
    teacher: bool = False
    gap: float | None = None
    time_ratio: float | None = None


def sentence(name: str, result: Paired, word: str, context: Context) -> str:
    """Return the verdict on one arm as a sentence.

    Args:
        name: Name of the arm.
        result: Its paired differences.
        word: Result of `judge`.
        context: What else the sentence mentions.
    """
    reference = context.reference
    if word == NOTHING or result.mean is None:
        return f"{name}: no result, because no seed was finished by both {name} and {reference}."
    difference = f"{points(result.mean)} {context.metric}"
    pairs = f"{result.n} paired seed{'s' if result.n != 1 else ''}"
    interval = ""
    if result.low is not None and result.high is not None:
        interval = f"95 % interval {points(result.low)} to {points(result.high)}"
    tail = _tail(word, context)
    if word == THIN:
        why = (
            f"all {result.n} seeds gave exactly the same difference, which carries no information about chance"
            if result.flat and result.n >= MIN_PAIRS
            else f"{pairs}, at least {MIN_PAIRS} are needed for a verdict"
        )
        return f"{name}: not enough evidence ({why}). So far {difference} over {reference}{tail}."
    if word == NOISE:
        return f"{name}: {difference} over {reference} is inside the noise, {interval}, {pairs}{tail}."
    if word == UNCERTAIN:
        return (
            f"{name}: {difference} over {reference}, {interval}, {pairs}, is not safe: with {context.arms} arms "
            f"compared, chance alone gives such a difference too often (p = {result.p_holm:.2g} after Holm){tail}."
        )
    worse = f"worse than {reference}, {difference}" if word == LOSS else f"{difference} over {reference}"
    return f"{name}: {worse}, {interval}, {pairs}{tail}."


def _tail(word: str, context: Context) -> str:
    """Return the end of a sentence: the share of the gap that is closed, and the training time."""
    tail, gap = "", context.gap
    if gap is not None and word in (GAIN, UNCERTAIN) and gap > 0:
        tail += f", closes {gap * 100:.0f} % of the gap to the teacher" if gap <= 1 else ", is above the teacher"
    elif context.teacher and gap is None:
        tail += f", the teacher is not better than {context.reference}, so there is no gap to close"
    if context.time_ratio is not None:
        tail += f", costs {context.time_ratio:.2f}x the training time"
    return tail
