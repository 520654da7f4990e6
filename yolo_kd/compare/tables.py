"""The tables of a report as text, for the page and for Markdown."""

from __future__ import annotations

from dataclasses import dataclass

from yolo_kd.compare.notes import assigned
from yolo_kd.compare.records import METRICS, ArmSummary, Group, Paired, Spread, Summary, TeacherSummary
from yolo_kd.compare.runs import FINISHED
from yolo_kd.compare.statistics import GAIN, LOSS, NOISE, NOTHING, THIN, UNCERTAIN, points

NONE = "-"
# a sign for each verdict, for readers who see no colour
MARKS = {GAIN: "▲", LOSS: "▼", NOISE: "≈", UNCERTAIN: "?", THIN: "…", NOTHING: "×"}


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: Its title.
        head: Titles of the columns.
        rows: Cells by row; the first cell names the row.
    """

    title: str
    head: list[str]
    rows: list[list[str]]


def tables(summary: Summary) -> list[Table]:
    """Return the main tables: arms, accuracy by split, cost."""
    return [_arms(summary), *(_accuracy(summary, split) for split in summary.splits), _cost(summary)]


def marked(arm: ArmSummary) -> str:
    """Return the verdict on an arm in a word, with its sign."""
    return f"{MARKS[arm.verdict.word]} {arm.verdict.word}" if arm.verdict else ""


def _arms(summary: Summary) -> Table:
    rows = []
    for arm in summary.arms:
        total = [run for run in summary.runs if run.arm == arm.name]
        done = sum(run.status == FINISHED for run in total)
        keys = assigned(arm.differs)
        role = marked(arm) or "the reference"
        rows.append([arm.name, arm.about + (f"; also {keys}" if keys else ""), f"{done} of {len(total)}", role])
    return Table("What was trained", ["arm", "how it trains", "runs finished", "verdict"], rows)


def _accuracy(summary: Summary, split: str) -> Table:
    main = summary.metric
    head = ["arm", main, "difference", "95 % interval", "p (t / Holm / sign flip)", "gap closed", *METRICS[1:]]
    rows = []
    for arm in summary.arms:
        metrics = {name: _spread(found) for name, found in arm.metrics[split].items()}
        compared = [NONE] * 4
        if arm.name != summary.reference:
            compared = _compared(arm.difference[split][main], arm.gap_closed[split])
        rows.append([arm.name, metrics[main], *compared, *(metrics[name] for name in METRICS[1:])])
    for teacher in summary.teachers:
        plain = {name: f"{value * 100:.1f}" for name, value in teacher.splits[split].metrics.items()}
        rows.append([_teacher(summary, teacher), plain[main], *[NONE] * 4, *(plain[name] for name in METRICS[1:])])
    return Table(f"Accuracy on {split}", head, rows)


def _compared(found: Paired, gap: float | None) -> list[str]:
    """Return difference, interval, p values and gap closed."""
    p_values = " / ".join(NONE if p is None else f"{p:.2g}" for p in (found.p_t, found.p_holm, found.p_exact))
    return [
        NONE if found.mean is None else f"{points(found.mean)} ({found.n} pair{'s' if found.n != 1 else ''})",
        _interval(found.low, found.high) or NONE,
        p_values if found.n > 1 else NONE,
        NONE if gap is None else f"{gap * 100:.0f} %".replace("-", "−"),
    ]


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f"{points(low)} to {points(high)}"


def _teacher(summary: Summary, teacher: TeacherSummary) -> str:
    return "teacher" if len(summary.teachers) == 1 else f"teacher {teacher.path}"


def _spread(found: Spread, scale: float = 100.0) -> str:
    if found.mean is None:
        return NONE
    text = f"{found.mean * scale:.1f}"
    return text if found.sd is None else f"{text} ± {found.sd * scale:.1f}"


def _cost(summary: Summary) -> Table:
    def numbers(model: ArmSummary | TeacherSummary) -> list[str]:
        return [
            f"{model.parameters / 1e6:.2f} M" if model.parameters else NONE,
            f"{model.gflops:.2f}" if model.gflops else NONE,
            NONE if model.latency_ms is None else f"{model.latency_ms:.1f} ms",
        ]

    rows = []
    for arm in summary.arms:
        spent = NONE if arm.seconds.mean is None else f"{_spread(arm.seconds, 1 / 60)} min"
        ratio = NONE if arm.time_ratio is None else f"{arm.time_ratio:.2f}x"
        rows.append([arm.name, spent, ratio, *numbers(arm)])
    rows += [[_teacher(summary, teacher), NONE, NONE, *numbers(teacher)] for teacher in summary.teachers]
    head = ["arm", "training time", f"of {summary.reference}", "parameters", "GFLOPs", "ONNX latency"]
    return Table("Cost", head, rows)


def group_table(summary: Summary, kind: Group, split: str) -> Table:
    """Return the table by class or object size: the reference's mAP50-95 and each arm's difference."""
    reference, *others = (arm.group(kind, split) for arm in summary.by_reference)
    rows = []
    for name in dict.fromkeys(name for arm in summary.arms for name in arm.group(kind, split)):
        objects = next((group[name].objects for group in (reference, *others) if name in group), None)
        cells = [name if objects is None else f"{name} ({objects} objects)"]
        base = reference.get(name)
        cells.append(_spread(base) if base else NONE)
        for group in others:
            score = group.get(name)
            text = NONE
            if score is not None and score.difference is not None:
                interval = _interval(score.low, score.high)
                text = points(score.difference) + (f" ({interval})" if interval else "")
            cells.append(text)
        rows.append(cells)
    names = [arm.name for arm in summary.by_reference]
    return Table(f"On {split}", ["", names[0], *(f"{name}, difference" for name in names[1:])], rows)
