"""Turns runs and measurements into one `Summary`, which every page and table is made from."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from yolo_kd.compare import records, statistics
from yolo_kd.compare.arms import ALONE, UPSTREAM, Arm, Comparison
from yolo_kd.compare.evaluate import Settings
from yolo_kd.compare.launcher import command_of
from yolo_kd.compare.notes import notes_on
from yolo_kd.compare.records import MAIN, METRICS, ArmSummary, Evaluation, Group, GroupScore, Paired, Verdict
from yolo_kd.compare.runs import FAILED, MAP_COLUMN, Run, keys_of, versions
from yolo_kd.compare.size_metrics import SIZES

# columns of results.csv that every training has, with or without distillation
_TASK_LOSS = {"train/box_loss", "train/cls_loss", "train/dfl_loss", "train/l1_loss"}


@dataclass(frozen=True)
class Measurements:
    """Everything that was measured after the trainings.

    Attributes:
        settings: How checkpoints were evaluated.
        evaluations: Evaluations by the run's name.
        teachers: Evaluations by the teacher's path.
        latencies: Milliseconds per image of the exported model, by the arm's name or the teacher's path.
        audits: Audit of the first batch by the arm's name.
        names: Names of the data set's classes by index.
        cache: Folder with the predictions of each evaluation.
        problems: What went wrong apart from trainings, a sentence each.
        notes: What else a reader has to know, a sentence each.
    """

    settings: Settings
    evaluations: Mapping[str, Evaluation]
    teachers: Mapping[str, Evaluation]
    latencies: Mapping[str, float]
    audits: Mapping[str, tuple[records.AuditRow, ...]]
    names: Mapping[int, str]
    cache: Path
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def summarise(comparison: Comparison, runs: Sequence[Run], measured: Measurements) -> records.Summary:
    """Return everything that the report contains.

    Args:
        comparison: The comparison.
        runs: All runs.
        measured: What was measured after the trainings.
    """
    settings, reference = measured.settings, comparison.reference
    headline = settings.headline
    arms = tuple(_Arms(comparison, runs, measured).summaries())
    means = {arm.name: arm.difference[headline][MAIN].mean for arm in arms}
    ranking = sorted(arms, key=lambda arm: -math.inf if (mean := means[arm.name]) is None else mean, reverse=True)
    verdicts = {arm.name: arm.verdict for arm in ranking if arm.verdict}
    failed = tuple(f"{run.name}: {run.error}" for run in runs if run.status == FAILED)
    return records.Summary(
        verdict=_headline([*verdicts.values()], reference),
        verdicts=tuple(verdict.sentence for verdict in verdicts.values()),
        ranking=tuple(verdicts),
        metric=MAIN,
        headline_split=headline,
        splits=settings.splits,
        reference=reference,
        seeds=comparison.seeds,
        jobs=comparison.jobs,
        evaluation={"data": settings.data, **settings.keys, "imgsz": settings.imgsz},
        teachers=tuple(
            records.TeacherSummary(path=path, latency_ms=measured.latencies.get(path), **dict(result))
            for path, result in measured.teachers.items()
        ),
        arms=arms,
        runs=tuple(_run(run, measured.evaluations.get(run.name)) for run in runs),
        notes=(*notes_on(comparison, runs, arms, headline), *measured.notes),
        problems=(*measured.problems, *failed),
        commands=records.Commands(
            comparison=shlex.join(["yolo-kd", "compare", *comparison.command]),
            runs={run.name: command_of(run) for run in runs},
        ),
        versions=versions(),
    )


class _Arms:
    """The arms of a comparison with their evaluated runs."""

    def __init__(self, comparison: Comparison, runs: Sequence[Run], measured: Measurements):
        self.comparison, self.runs, self.measured = comparison, runs, measured
        self.reference, self.splits = comparison.reference, measured.settings.splits
        self.evaluated = {
            arm.name: [run for run in runs if run.arm.name == arm.name and run.name in measured.evaluations]
            for arm in comparison.arms
        }

    def summaries(self) -> list[ArmSummary]:
        """Summarise every arm; p values are corrected for the number of arms."""
        pairs = {(split, metric): self.pairs(split, metric) for split in self.splits for metric in METRICS}
        return [
            self.summary(arm, {s: {metric: pairs[s, metric][arm.name] for metric in METRICS} for s in self.splits})
            for arm in self.comparison.arms
        ]

    def pairs(self, split: str, metric: str) -> dict[str, Paired]:
        """Compare every arm with the reference in one metric on one split."""
        base = self.metric(self.reference, split, metric)
        found = {name: statistics.paired(self.metric(name, split, metric), base) for name in self.evaluated}
        adjusted = statistics.holm({name: pair.p_t for name, pair in found.items() if name != self.reference})
        return {name: pair.model_copy(update={"p_holm": adjusted.get(name)}) for name, pair in found.items()}

    def metric(self, arm: str, split: str, metric: str) -> dict[int, float]:
        """Return a metric of an arm by seed."""
        return {seed: result.metrics[metric] for seed, result in self.results(arm, split).items()}

    def summary(self, arm: Arm, difference: dict[str, dict[str, Paired]]) -> ArmSummary:
        """Summarise one arm."""
        runs, measured = self.evaluated[arm.name], self.measured
        first = measured.evaluations[runs[0].name] if runs else None
        seconds = {run.seed: spent for run in runs if (spent := run.seconds())}
        base = {run.seed: spent for run in self.evaluated[self.reference] if (spent := run.seconds())}
        is_reference = arm.name == self.reference
        ratio = statistics.spread([spent / base[seed] for seed, spent in seconds.items() if seed in base]).mean
        found = ArmSummary(
            name=arm.name,
            kind=arm.kind,
            about=about(arm),
            differs={key: _plain(value) for key, value in arm.differs.items()},
            runs=len(runs),
            failed=sum(run.status == FAILED for run in self.runs if run.arm.name == arm.name),
            parameters=first.parameters if first else None,
            gflops=first.gflops if first else None,
            latency_ms=measured.latencies.get(arm.name),
            audit=measured.audits.get(arm.name, ()),
            metrics={
                split: {name: statistics.spread([*self.metric(arm.name, split, name).values()]) for name in METRICS}
                for split in self.splits
            },
            difference=difference,
            gap_closed={split: self.gap_closed(arm, split, difference[split][MAIN]) for split in self.splits},
            classes={split: self.group(arm.name, "classes", split) for split in self.splits},
            sizes={split: self.group(arm.name, "sizes", split) for split in self.splits},
            seconds=statistics.spread([*seconds.values()]),
            time_ratio=1.0 if is_reference else ratio,
        )
        return found if is_reference else found.model_copy(update={"verdict": self.verdict(found)})

    def gap_closed(self, arm: Arm, split: str, difference: Paired) -> float | None:
        """Return the share of the distance between reference and teacher that an arm covers on a split."""
        teachers = self.measured.teachers
        teacher = teachers.get(teacher_of(arm) or "") or (next(iter(teachers.values())) if len(teachers) == 1 else None)
        base = self.metric(self.reference, split, MAIN)
        mean = statistics.spread([base[seed] for seed in difference.seeds]).mean
        return statistics.gap_closed(difference, mean, teacher.splits[split].metrics[MAIN] if teacher else None)

    def group(self, arm: str, kind: Group, split: str) -> dict[str, GroupScore]:
        """Return mAP50-95 of an arm by class or object size, with the paired differences."""
        results, base = self.results(arm, split), self.results(self.reference, split)
        sample = next(iter([*results.values(), *base.values()]), None)
        if sample is None:
            return {}
        scores = {}
        for name in sample.group(kind):
            ours, theirs = (
                {seed: ap for seed, result in side.items() if (ap := result.group(kind).get(name)) is not None}
                for side in (results, base)
            )
            pairs = statistics.paired(ours, theirs)
            objects = sample.sizes[name].objects if kind == "sizes" else None
            spread = statistics.spread([*ours.values()])
            scores[name] = GroupScore(
                **dict(spread), difference=pairs.mean, low=pairs.low, high=pairs.high, pairs=pairs.n, objects=objects
            )
        return scores

    def results(self, arm: str, split: str) -> dict[int, records.SplitResult]:
        """Return the evaluations of an arm on a split by seed."""
        return {run.seed: self.measured.evaluations[run.name].splits[split] for run in self.evaluated[arm]}

    def verdict(self, arm: ArmSummary) -> Verdict:
        """Judge an arm on every split."""
        words = {split: statistics.judge(arm.difference[split][MAIN]) for split in self.splits}
        others, teacher = len(self.evaluated) - 1, bool(self.measured.teachers)
        sentences = {}
        for split, word in words.items():
            gap = arm.gap_closed[split]
            context = statistics.Context(self.reference, f"{MAIN} ({split})", others, teacher, gap, arm.time_ratio)
            sentences[split] = statistics.sentence(arm.name, arm.difference[split][MAIN], word, context)
        headline = self.measured.settings.headline
        return Verdict(word=words[headline], words=words, sentence=sentences[headline], by_split=sentences)


def _headline(ranked: Sequence[Verdict], reference: str) -> str:
    """Return the sentence at the top: the verdict on the best arm, or what holds for all arms."""
    if not ranked:
        return "There is nothing to compare."
    best = min(ranked, key=lambda verdict: statistics.BEST_FIRST.index(verdict.word))
    words = {verdict.word for verdict in ranked}
    if len(ranked) > 1 and statistics.GAIN not in words and words & {statistics.NOISE, statistics.UNCERTAIN}:
        return f"No arm is better than {reference} beyond doubt. The best so far: {best.sentence}"
    if len(ranked) > 1 and words == {statistics.LOSS}:
        return f"Every arm is worse than {reference}. The best of them: {best.sentence}"
    return best.sentence


def about(arm: Arm) -> str:
    """Return in a few words how an arm trains."""
    if arm.kind == ALONE:
        return "the student alone (kd=none)"
    if arm.kind == UPSTREAM:
        return "Ultralytics' own trainer with distill_model="
    kd = arm.options.kd
    text = f"kd={kd}" if isinstance(kd, str) else "kd=<written in the arm>"
    return " ".join([text, *(f"kd.{k}={_plain(v)}" for k, v in arm.options.kd_overrides.items())])


def teacher_of(arm: Arm) -> str | None:
    """Return the teacher that an arm learns from, None for the student alone."""
    keys = keys_of(arm)
    return keys.get("distill_model") if arm.kind == UPSTREAM else keys.get("teacher")


def _plain(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _run(run: Run, evaluation: Evaluation | None) -> records.RunSummary:
    rows = run.rows()
    columns = [c for c in (rows[0] if rows else {}) if c.startswith("train/") and c.endswith("_loss")]
    return records.RunSummary(
        **dict(run.state()),
        epochs=len(rows),
        seconds=run.seconds(),
        continued=sum(attempt.resumed for attempt in run.attempts),
        checkpoint=str(run.best),
        sha256=evaluation.sha256 if evaluation else None,
        splits=evaluation.splits if evaluation else {},
        curve=tuple((row["epoch"], row[MAP_COLUMN]) for row in rows if MAP_COLUMN in row),
        terms={c.removeprefix("train/"): tuple(row.get(c) for row in rows) for c in columns if c not in _TASK_LOSS},
    )


def runs_csv(summary: records.Summary) -> str:
    """Return one line per run: arm, seed, status, cost and every metric on every split."""
    splits, sizes = summary.splits, list(SIZES)
    plain = ["arm", "seed", "status", "epochs", "continued", "seconds", "checkpoint", "sha256"]
    measured = [f"{split}/{metric}" for split in splits for metric in METRICS]
    measured += [f"{split}/{MAIN} {size}" for split in splits for size in sizes]
    text = io.StringIO()
    writer = csv.DictWriter(text, [*plain[:6], *measured, *plain[6:]], lineterminator="\n")
    writer.writeheader()
    for run in summary.runs:
        row = {key: getattr(run, key) for key in plain}
        for split, result in run.splits.items():
            row |= {f"{split}/{metric}": result.metrics[metric] for metric in METRICS}
            row |= {f"{split}/{MAIN} {size}": result.sizes[size].ap for size in sizes}
        writer.writerow({k: "" if v is None else v for k, v in row.items()})
    return text.getvalue()
