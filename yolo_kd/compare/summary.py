"""From runs and their evaluations to one summary: plain data from which every page and table is made."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from yolo_kd.compare import statistics
from yolo_kd.compare.arms import ALONE, UPSTREAM, Arm, Comparison
from yolo_kd.compare.evaluate import METRICS, Settings
from yolo_kd.compare.launcher import command_of
from yolo_kd.compare.runs import FAILED, FINISHED, Run, keys_of, versions
from yolo_kd.compare.size_metrics import SIZES

MAIN = METRICS[0]
MAP_COLUMN = "metrics/mAP50-95(B)"
# columns of results.csv that every training has, whatever is distilled
_NATIVE = {"train/box_loss", "train/cls_loss", "train/dfl_loss", "train/l1_loss"}


def summarise(
    comparison: Comparison,
    runs: Sequence[Run],
    evaluations: Mapping[str, Mapping[str, Any]],
    teachers: Mapping[str, Mapping[str, Any]],
    latencies: Mapping[str, float],
    audits: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Settings,
    problems: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return everything that the report says, as plain data.

    Args:
        comparison: What was asked for.
        runs: All runs.
        evaluations: What `evaluate` returned, by the run's name.
        teachers: The same of the teachers, by path.
        latencies: Milliseconds of the exported student by the arm's name, and of teachers by path.
        audits: Audit of the first batch by the arm's name.
        settings: How checkpoints were evaluated.
        problems: What went wrong besides trainings, a sentence each.
        notes: What else a reader has to know, a sentence each.
    """
    headline = "test" if "test" in settings.splits else "val"
    found = {arm.name: [r for r in runs if r.arm.name == arm.name and r.name in evaluations] for arm in comparison.arms}
    arms = [_arm(arm, comparison, found, evaluations, teachers, latencies, audits, settings) for arm in comparison.arms]
    others = [arm for arm in arms if arm["name"] != comparison.reference]
    for split in settings.splits:
        for metric in METRICS:
            adjusted = statistics.holm({a["name"]: a["difference"][split][metric]["p_t"] for a in others})
            for arm in others:
                arm["difference"][split][metric]["p_holm"] = adjusted[arm["name"]]
    for arm in others:
        _verdict(arm, comparison.reference, headline, settings.splits, len(others), bool(teachers))
    ranked = sorted(others, key=_rank, reverse=True)
    return {
        "verdict": _headline(ranked, comparison.reference),
        "verdicts": [arm["verdict"]["sentence"] for arm in ranked],
        "ranking": [arm["name"] for arm in ranked],
        "metric": MAIN,
        "headline_split": headline,
        "splits": list(settings.splits),
        "reference": comparison.reference,
        "seeds": list(comparison.seeds),
        "jobs": comparison.jobs,
        "evaluation": {"data": settings.data, **settings.keys, "imgsz": settings.imgsz},
        "teachers": [_teacher(path, result, latencies) for path, result in teachers.items()],
        "arms": arms,
        "runs": [_run(run, evaluations.get(run.name)) for run in runs],
        "notes": [*_notes(comparison, runs, arms, headline, settings), *notes],
        "problems": [*problems, *(f"{run.name}: {run.error}" for run in runs if run.status == FAILED)],
        "commands": {
            "comparison": shlex.join(["yolo-kd", "compare", *comparison.command]),
            "runs": {run.name: command_of(run) for run in runs},
        },
        "versions": versions(),
    }


def _arm(
    arm: Arm,
    comparison: Comparison,
    found: Mapping[str, Sequence[Run]],
    evaluations: Mapping[str, Mapping[str, Any]],
    teachers: Mapping[str, Mapping[str, Any]],
    latencies: Mapping[str, float],
    audits: Mapping[str, Sequence[Mapping[str, Any]]],
    settings: Settings,
) -> dict[str, Any]:
    mine, reference = found[arm.name], found[comparison.reference]
    first = evaluations[mine[0].name] if mine else {}
    teacher = teachers.get(teacher_of(arm) or "") or (next(iter(teachers.values())) if len(teachers) == 1 else None)
    result: dict[str, Any] = {
        "name": arm.name,
        "kind": arm.kind,
        "about": about(arm),
        "differs": {key: _shown(value) for key, value in arm.differs.items()},
        "runs": len(mine),
        "failed": 0,
        "parameters": first.get("parameters"),
        "gflops": first.get("gflops"),
        "latency_ms": latencies.get(arm.name),
        "audit": [dict(row) for row in audits.get(arm.name, ())],
        "metrics": {},
        "difference": {},
        "gap_closed": {},
        "classes": {},
        "sizes": {},
    }
    seconds = {run.seed: run.seconds() for run in mine}
    known = [s for s in seconds.values() if s]
    result["seconds"] = asdict(statistics.spread(known))
    base_seconds = {run.seed: run.seconds() for run in reference}
    ratios = [s / b for seed, s in seconds.items() if s and (b := base_seconds.get(seed))]
    result["time_ratio"] = statistics.spread(ratios).mean if arm.name != comparison.reference else 1.0
    for split in settings.splits:
        values = {m: {r.seed: evaluations[r.name]["splits"][split]["metrics"][m] for r in mine} for m in METRICS}
        base = {m: {r.seed: evaluations[r.name]["splits"][split]["metrics"][m] for r in reference} for m in METRICS}
        result["metrics"][split] = {m: asdict(statistics.spread([*values[m].values()])) for m in METRICS}
        pairs = {m: statistics.paired(values[m], base[m]) for m in METRICS}
        result["difference"][split] = {m: {**asdict(pairs[m]), "n": pairs[m].n} for m in METRICS}
        paired_base = statistics.spread([base[MAIN][seed] for seed in pairs[MAIN].seeds]).mean
        top = teacher["splits"][split]["metrics"][MAIN] if teacher else None
        result["gap_closed"][split] = statistics.gap_closed(pairs[MAIN], paired_base, top)
        for kind in ("classes", "sizes"):
            result[kind][split] = _parts(kind, split, mine, reference, evaluations)
    return result


def _parts(
    kind: str,
    split: str,
    mine: Sequence[Run],
    reference: Sequence[Run],
    evaluations: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Return mAP50-95 by class or size with the paired difference; None where no object belongs to it."""

    def values(runs: Sequence[Run], name: str) -> dict[int, float]:
        found = {}
        for run in runs:
            part = evaluations[run.name]["splits"][split][kind].get(name)
            value = part["ap"] if isinstance(part, dict) else part
            if value is not None:
                found[run.seed] = value
        return found

    sample = evaluations[(mine or reference)[0].name]["splits"][split][kind] if mine or reference else {}
    parts = {}
    for name in sample:
        pairs = statistics.paired(values(mine, name), values(reference, name))
        parts[name] = {**asdict(statistics.spread([*values(mine, name).values()])), "difference": pairs.mean}
        parts[name] |= {"low": pairs.low, "high": pairs.high, "pairs": pairs.n}
        if kind == "sizes":
            parts[name]["objects"] = sample[name]["objects"]
    return parts


def _verdict(
    arm: dict[str, Any], reference: str, headline: str, splits: Sequence[str], arms: int, teacher: bool
) -> None:
    """Judge an arm on every split, and say it in a sentence on the one that counts."""
    words, sentences = {}, {}
    for split in splits:
        given = dict(arm["difference"][split][MAIN])
        adjusted = given.pop("p_holm")
        given.pop("n")
        result = statistics.Paired(**given)
        words[split] = statistics.judge(result, adjusted)
        sentences[split] = statistics.sentence(
            arm["name"],
            reference,
            result,
            words[split],
            adjusted=adjusted,
            arms=arms,
            gap=arm["gap_closed"][split],
            teacher=teacher,
            time_ratio=arm["time_ratio"],
            metric=f"{MAIN} ({split})",
        )
    arm["verdict"] = {"word": words[headline], "words": words, "sentence": sentences[headline], "by_split": sentences}


def _rank(arm: Mapping[str, Any]) -> float:
    split = next(iter(reversed(arm["difference"])))  # test where there is one
    mean = arm["difference"][split][MAIN]["mean"]
    return -math.inf if mean is None else mean


def _headline(ranked: Sequence[Mapping[str, Any]], reference: str) -> str:
    """Return the sentence at the top: the best arm's; after it, what holds for several."""
    if not ranked:
        return "There is nothing to compare."
    order = (statistics.GAIN, statistics.UNCERTAIN, statistics.NOISE, statistics.LOSS, statistics.THIN)
    best = min(ranked, key=lambda a: order.index(a["verdict"]["word"]) if a["verdict"]["word"] in order else 9)
    words = {arm["verdict"]["word"] for arm in ranked}
    if len(ranked) > 1 and statistics.GAIN not in words and words & {statistics.NOISE, statistics.UNCERTAIN}:
        return f"No arm is better than {reference} beyond doubt. The best so far: {best['verdict']['sentence']}"
    if len(ranked) > 1 and words == {statistics.LOSS}:
        return f"Every arm is worse than {reference}. The best of them: {best['verdict']['sentence']}"
    return best["verdict"]["sentence"]


def about(arm: Arm) -> str:
    """Say in a few words how an arm trains."""
    if arm.kind == ALONE:
        return "the student alone (kd=none)"
    if arm.kind == UPSTREAM:
        return "Ultralytics' own trainer with distill_model="
    kd = arm.options.kd
    text = f"kd={kd}" if isinstance(kd, str) else "kd=<written in the arm>"
    return " ".join([text, *(f"kd.{k}={_shown(v)}" for k, v in arm.options.kd_overrides.items())])


def teacher_of(arm: Arm) -> str | None:
    """Return the teacher that an arm learns from, None for the student alone."""
    keys = keys_of(arm)
    return keys.get("distill_model") if arm.kind == UPSTREAM else keys.get("teacher")


def _shown(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def assigned(keys: Mapping[str, Any]) -> str:
    """Return keys and their values as one writes them on a command line, for readers."""
    return ", ".join(f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in keys.items())


def _teacher(path: str, result: Mapping[str, Any], latencies: Mapping[str, float]) -> dict[str, Any]:
    return {
        "path": path,
        "sha256": result["sha256"],
        "parameters": result["parameters"],
        "gflops": result["gflops"],
        "latency_ms": latencies.get(path),
        "splits": result["splits"],
    }


def _run(run: Run, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    rows = run.rows()
    columns = [c for c in (rows[0] if rows else {}) if c.startswith("train/") and c.endswith("_loss")]
    return {
        "arm": run.arm.name,
        "seed": run.seed,
        "status": run.status,
        "epochs": len(rows),
        "seconds": run.seconds(),
        "continued": sum(1 for a in run.attempts if a["resumed"]),
        "attempts": run.attempts,
        "error": run.error,
        "keys": run.keys,
        "files": run.identity["files"],
        "checkpoint": str(run.best),
        "sha256": evaluation["sha256"] if evaluation else None,
        "splits": evaluation["splits"] if evaluation else {},
        "curve": [[row["epoch"], row[MAP_COLUMN]] for row in rows if MAP_COLUMN in row],
        "terms": {c.removeprefix("train/"): [row.get(c) for row in rows] for c in columns if c not in _NATIVE},
    }


def _notes(
    comparison: Comparison, runs: Sequence[Run], arms: Sequence[Mapping[str, Any]], headline: str, settings: Settings
) -> list[str]:
    """Return what a reader must know to read the numbers rightly."""
    others = len(arms) - 1
    pairs = max(
        (arm["difference"][headline][MAIN]["n"] for arm in arms if arm["name"] != comparison.reference), default=0
    )
    smallest = min(1.0, 2 / 2**pairs) if pairs else 1.0
    notes = [
        f"Runs of one seed share initial weights, batches and budget, so arms are compared with {comparison.reference} "
        "seed by seed. Intervals are 95 % t intervals of the mean of these differences.",
        "The sign-flip test asks how often random signs give a mean at least as large. "
        f"With {pairs} {'pair' if pairs == 1 else 'pairs'} its smallest possible p is {smallest:.3g}; it cannot go "
        "below 0.05 with fewer than 6.",
    ]
    if "test" in settings.splits:
        notes.append("The verdict is on test: every best.pt was chosen on val, which flatters val a little.")
    else:
        notes.append("The data has no test split. Every best.pt was chosen on val, which flatters all arms a little.")
    if others > 1:
        notes.append(
            f"{others} arms are compared with one {comparison.reference}; intervals are each arm's own. A verdict also "
            "asks that the paired t test holds after Holm's correction for that number. Precision, recall, classes and "
            "sizes carry no correction: read them as hints."
        )
    for arm in arms:
        dropped = arm["difference"][headline][MAIN]["dropped"]
        if dropped and arm["name"] != comparison.reference:
            seeds = ", ".join(map(str, dropped))
            notes.append(f"{arm['name']}: seed {seeds} has no partner and is left out of the differences.")
        other_keys = dict(arm["differs"])
        if start := other_keys.pop("inherit", False):
            apart = _without_start(comparison, arm["name"])
            notes.append(
                f"{arm['name']} starts from its teacher ({assigned({'inherit': start})}), so part of its difference is "
                "that start: "
                + (f"{apart} does the same without it." if apart else "an arm with inherit: false tells the two apart.")
            )
        if other_keys:
            notes.append(
                f"{arm['name']} also differs in {assigned(other_keys)}, so its difference is not that of its recipe "
                "alone."
            )
    continued = [run.name for run in runs if any(a["resumed"] for a in run.attempts)]
    if continued:
        notes.append(
            f"Interrupted and continued: {', '.join(continued)}. After a continuation batches are drawn anew, so these "
            "runs share their seed with their partners only up to that point."
        )
    if comparison.jobs > 1 or any(a["jobs"] > 1 for run in runs for a in run.attempts):
        notes.append("Trainings ran side by side, so training times carry the noise of what ran beside them.")
    seen = {tuple(sorted(a["versions"].items())) for run in runs for a in run.attempts}
    if len(seen) > 1:
        notes.append("Runs were trained with different versions of their packages, see below.")
    unequal = [run.name for run in runs if run.status == FINISHED and len(run.rows()) < run.epochs]
    if unequal:
        notes.append(f"Stopped before the last epoch by patience= or time=: {', '.join(unequal)}.")
    return notes


def _without_start(comparison: Comparison, name: str) -> str | None:
    """Return the arm that differs from another in its start alone, None if there is none."""
    arm = next(arm for arm in comparison.arms if arm.name == name)
    same = replace(arm.options, inherit=False)
    return next((other.name for other in comparison.arms if other.kind == arm.kind and other.options == same), None)


def runs_csv(summary: Mapping[str, Any]) -> str:
    """Return one line per run: arm, seed, status, cost and every metric of every split."""
    splits, sizes = summary["splits"], list(SIZES)
    columns = ["arm", "seed", "status", "epochs", "continued", "seconds"]
    columns += [f"{split}/{metric}" for split in splits for metric in METRICS]
    columns += [f"{split}/mAP50-95 {size}" for split in splits for size in sizes]
    columns += ["checkpoint", "sha256"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for run in summary["runs"]:
        row = {key: run[key] for key in columns if key in run}
        for split, result in run["splits"].items():
            row |= {f"{split}/{metric}": result["metrics"][metric] for metric in METRICS}
            row |= {f"{split}/mAP50-95 {size}": result["sizes"][size]["ap"] for size in sizes}
        writer.writerow({k: "" if v is None else v for k, v in row.items()})
    return text.getvalue()
