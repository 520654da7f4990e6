"""The notes of a report: what a reader has to know to read its numbers correctly."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from yolo_kd.compare.arms import Comparison
from yolo_kd.compare.records import MAIN, ArmSummary
from yolo_kd.compare.runs import FINISHED, Run


def notes_on(comparison: Comparison, runs: Sequence[Run], arms: Sequence[ArmSummary], headline: str) -> list[str]:
    """Return the notes, a sentence or two each.

    Args:
        comparison: The comparison.
        runs: All runs.
        arms: All arms.
        headline: The split of the verdicts.
    """
    others = [arm for arm in arms if arm.name != comparison.reference]
    notes = [*_on_method(others, comparison.reference, headline)]
    for arm in arms:
        dropped = arm.difference[headline][MAIN].dropped
        if dropped and arm.name != comparison.reference:
            seeds = ", ".join(map(str, dropped))
            notes.append(f"{arm.name}: seed {seeds} has no partner and is left out of the differences.")
        notes += _on_keys(comparison, arm)
    return [*notes, *_on_runs(comparison, runs)]


def assigned(keys: Mapping[str, Any]) -> str:
    """Return keys as they are written on a command line."""
    return ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items())


def _on_method(others: Sequence[ArmSummary], reference: str, headline: str) -> Iterator[str]:
    pairs = max((arm.difference[headline][MAIN].n for arm in others), default=0)
    smallest = min(1.0, 2 / 2**pairs) if pairs else 1.0
    yield (
        f"Runs of one seed share initial weights, batches and budget, so arms are compared with {reference} seed by "
        "seed. Intervals are 95 % t intervals of the mean of these differences."
    )
    yield (
        "The sign-flip test asks how often random signs give a mean at least as large. "
        f"With {pairs} {'pair' if pairs == 1 else 'pairs'} its smallest possible p is {smallest:.3g}; it cannot go "
        "below 0.05 with fewer than 6."
    )
    if headline == "test":
        yield "The verdict is on test: every best.pt was chosen on val, which flatters val a little."
    else:
        yield "The data has no test split. Every best.pt was chosen on val, which flatters all arms a little."
    if len(others) > 1:
        yield (
            f"{len(others)} arms are compared with one {reference}. Each interval is for its arm alone; a verdict also "
            "requires that the paired t test holds after Holm's correction for the number of arms. Precision, recall, "
            "classes and sizes are not corrected: read them as hints."
        )


def _on_keys(comparison: Comparison, arm: ArmSummary) -> Iterator[str]:
    """Yield in what an arm differs from the others apart from its recipe."""
    differs = dict(arm.differs)
    if start := differs.pop("inherit", False):
        apart = _without_start(comparison, arm.name)
        yield (
            f"{arm.name} starts from its teacher ({assigned({'inherit': start})}), so part of its difference is due to "
            "that start: "
            + (f"{apart} does the same without it." if apart else "an arm with inherit: false separates the two.")
        )
    if differs:
        yield f"{arm.name} also differs in {assigned(differs)}, so its difference is not due to its recipe alone."


def _without_start(comparison: Comparison, name: str) -> str | None:
    """Return the arm that differs from another in its start alone, None if there is none."""
    arm = next(arm for arm in comparison.arms if arm.name == name)
    same = replace(arm.options, inherit=False)
    return next((other.name for other in comparison.arms if other.kind == arm.kind and other.options == same), None)


def _on_runs(comparison: Comparison, runs: Sequence[Run]) -> Iterator[str]:
    attempts = [attempt for run in runs for attempt in run.attempts]
    if continued := [run.name for run in runs if any(attempt.resumed for attempt in run.attempts)]:
        yield (
            f"Interrupted and continued: {', '.join(continued)}. After a continuation, batches are drawn in a new "
            "order, so these runs share batches with their partners only up to that point."
        )
    if comparison.jobs > 1 or any(attempt.jobs > 1 for attempt in attempts):
        yield "Several trainings ran at the same time and slowed each other down, so training times are noisy."
    if len({tuple(sorted(attempt.versions.items())) for attempt in attempts}) > 1:
        yield "Runs were trained with different versions of their packages, see below."
    if stopped := [run.name for run in runs if run.status == FINISHED and len(run.rows()) < run.epochs]:
        yield f"Stopped before the last epoch by patience= or time=: {', '.join(stopped)}."
