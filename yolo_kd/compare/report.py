"""The four files of a comparison: `report.html`, `report.md`, `summary.json`, `runs.csv`."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from yolo_kd.compare import examples, plots
from yolo_kd.compare.evaluate import METRICS, load_predictions, predictions_file
from yolo_kd.compare.runs import write_text
from yolo_kd.compare.statistics import GAIN, LOSS, NOISE, NOTHING, THIN, UNCERTAIN, points
from yolo_kd.compare.summary import assigned, runs_csv

TEMPLATE = "report.html.j2"
NONE = "-"
# what a verdict's word looks like beside it, for readers who see no colour
MARKS = {GAIN: "▲", LOSS: "▼", NOISE: "≈", UNCERTAIN: "?", THIN: "…", NOTHING: "×"}

Tables = list[tuple[str, list[str], list[list[str]]]]


def write_report(folder: Path, summary: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Path]:
    """Write all four files.

    Args:
        folder: Where to write.
        summary: What `results.summarise` returned.
        parts: What pictures are drawn from: `settings`, `evaluations` and `checkpoints` by run, `teachers` by path,
            `cache` and `names` of the classes.

    Returns:
        The files by their ending.
    """
    contents = {
        "json": ("summary.json", json.dumps(_finite(summary), indent=1, allow_nan=False) + "\n"),
        "csv": ("runs.csv", runs_csv(summary)),
        "md": ("report.md", markdown(summary)),
        "html": ("report.html", html(summary, draw(summary, parts))),
    }
    for name, text in contents.values():
        write_text(folder / name, text)
    return {ending: folder / name for ending, (name, _) in contents.items()}


def _finite(value: Any) -> Any:
    """Return plain data without numbers that JSON does not know."""
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ------------------------------------------------------------------------------------------------ tables


def tables(summary: Mapping[str, Any]) -> Tables:
    """Return the tables of the report: title, head and rows, all as text."""
    made: Tables = [_arms(summary)]
    made += [_accuracy(summary, split) for split in summary["splits"]]
    return [*made, _cost(summary)]


def _arms(summary: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    rows = []
    for arm in summary["arms"]:
        total = [run for run in summary["runs"] if run["arm"] == arm["name"]]
        done = sum(run["status"] == "finished" for run in total)
        keys = assigned(arm["differs"])
        role = "what the others are compared with" if arm["name"] == summary["reference"] else _word(arm)
        rows.append([arm["name"], arm["about"] + (f"; also {keys}" if keys else ""), f"{done} of {len(total)}", role])
    return "What was trained", ["arm", "how it trains", "runs finished", "verdict"], rows


def _word(arm: Mapping[str, Any]) -> str:
    word = arm["verdict"]["word"]
    return f"{MARKS.get(word, '')} {word}".strip()


def _accuracy(summary: Mapping[str, Any], split: str) -> tuple[str, list[str], list[list[str]]]:
    main = summary["metric"]
    head = ["arm", main, "difference", "95 % interval", "p (t / Holm / sign flip)", "gap closed", *METRICS[1:]]
    rows = []
    for arm in summary["arms"]:
        values, found = arm["metrics"][split], arm["difference"][split][main]
        if arm["name"] == summary["reference"]:
            compared = [NONE] * 4
        else:
            gap = arm["gap_closed"][split]
            p_values = [found["p_t"], found["p_holm"], found["p_exact"]]
            compared = [
                _points(found["mean"], found["n"]),
                NONE if found["low"] is None else f"{points(found['low'])} to {points(found['high'])}",
                " / ".join(NONE if p is None else f"{p:.2g}" for p in p_values) if found["n"] > 1 else NONE,
                NONE if gap is None else f"{gap * 100:.0f} %".replace("-", "−"),
            ]
        rows.append([arm["name"], _spread(values[main]), *compared, *(_spread(values[m]) for m in METRICS[1:])])
    for teacher in summary["teachers"]:
        values = teacher["splits"][split]["metrics"]
        rows.append(
            [
                _teacher_name(summary, teacher),
                f"{values[main] * 100:.1f}",
                *[NONE] * 4,
                *(f"{values[m] * 100:.1f}" for m in METRICS[1:]),
            ]
        )
    return f"Accuracy on {split}", head, rows


def _teacher_name(summary: Mapping[str, Any], teacher: Mapping[str, Any]) -> str:
    return "teacher" if len(summary["teachers"]) == 1 else f"teacher {teacher['path']}"


def _points(mean: float | None, n: int) -> str:
    return NONE if mean is None else f"{points(mean)} ({n} pair{'s' if n != 1 else ''})"


def _spread(value: Mapping[str, Any], scale: float = 100.0, digits: int = 1) -> str:
    if value["mean"] is None:
        return NONE
    text = f"{value['mean'] * scale:.{digits}f}"
    return text if value["sd"] is None else f"{text} ± {value['sd'] * scale:.{digits}f}"


def _cost(summary: Mapping[str, Any]) -> tuple[str, list[str], list[list[str]]]:
    def numbers(owner: Mapping[str, Any]) -> list[str]:
        size, work, delay = owner["parameters"], owner["gflops"], owner["latency_ms"]
        return [
            NONE if not size else f"{size / 1e6:.2f} M",
            NONE if not work else f"{work:.2f}",
            NONE if delay is None else f"{delay:.1f} ms",
        ]

    rows = []
    for arm in summary["arms"]:
        seconds = arm["seconds"]
        spent = NONE if seconds["mean"] is None else _spread(seconds, 1 / 60) + " min"
        ratio = NONE if arm["time_ratio"] is None else f"{arm['time_ratio']:.2f}x"
        rows.append([arm["name"], spent, ratio, *numbers(arm)])
    rows += [[_teacher_name(summary, teacher), NONE, NONE, *numbers(teacher)] for teacher in summary["teachers"]]
    return "Cost", ["arm", "training time", f"of {summary['reference']}", "parameters", "GFLOPs", "ONNX latency"], rows


def part_table(summary: Mapping[str, Any], kind: str, split: str) -> tuple[list[str], list[list[str]]]:
    """Return head and rows of the table by class or by size."""
    arms = summary["arms"]
    reference = next(arm for arm in arms if arm["name"] == summary["reference"])
    others = [arm for arm in arms if arm is not reference]
    names = list(dict.fromkeys(name for arm in arms for name in arm[kind][split]))
    rows = []
    for name in names:
        shown = name
        objects = next((a[kind][split][name].get("objects") for a in arms if name in a[kind][split]), None)
        if objects is not None:
            shown = f"{name} ({objects} objects)"
        cells = [_spread(reference[kind][split][name]) if name in reference[kind][split] else NONE]
        for arm in others:
            part = arm[kind][split].get(name)
            mean = None if part is None else part["difference"]
            text = NONE if mean is None else points(mean)
            if mean is not None and part["low"] is not None:
                text += f" ({points(part['low'])} to {points(part['high'])})"
            cells.append(text)
        rows.append([shown, *cells])
    return ["", reference["name"], *(f"{arm['name']}, difference" for arm in others)], rows


# ------------------------------------------------------------------------------------------------ Markdown


def markdown(summary: Mapping[str, Any]) -> str:
    """Return the report without its pictures, for pasting into an issue."""
    lines = [f"**{summary['verdict']}**", ""]
    if len(summary["verdicts"]) > 1:
        lines += [*(f"- {sentence}" for sentence in summary["verdicts"]), ""]
    for title, head, rows in tables(summary):
        lines += [f"### {title}", "", *_markdown_table(head, rows), ""]
    if summary["problems"]:
        lines += ["### Failed", ""]
        lines += [f"- {_cell(problem.splitlines()[0])}" for problem in summary["problems"]] + [""]
    lines += ["### How to read it", "", *(f"- {note}" for note in summary["notes"]), ""]
    lines += ["### Record", "", "```", summary["commands"]["comparison"]]
    lines += [f"{name} {version}" for name, version in summary["versions"].items()]
    lines += [f"teacher sha256 {teacher['sha256']}" for teacher in summary["teachers"]]
    return "\n".join([*lines, "```"]) + "\n"


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(_cell, head)) + " |", "|---" * len(head) + "|"]
    return lines + ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


# ------------------------------------------------------------------------------------------------ pictures


def draw(summary: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Draw everything; a picture that cannot be drawn is replaced by the reason."""
    drawn: dict[str, Any] = {"problems": []}

    def attempt(name: str, work: Callable[[], Any], empty: Any) -> None:
        try:
            drawn[name] = work()
        except Exception as error:
            drawn[name] = empty
            drawn["problems"].append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())}")

    splits = summary["splits"]
    attempt("differences", lambda: {s: svg_uri(plots.differences(summary, s)) for s in splits}, {})
    attempt("curves", lambda: svg_uri(plots.learning_curves(summary)), None)
    attempt("terms", lambda: _terms(summary), [])
    for kind in ("classes", "sizes"):
        attempt(kind, partial(_parts, summary, kind), {})
    none = {"scenes": [], "attention": [], "why": "They could not be drawn."}
    attempt("scenes", lambda: _scenes(summary, parts), none)
    return drawn


def _parts(summary: Mapping[str, Any], kind: str) -> dict[str, str]:
    drawn = {split: plots.parts(summary, kind, split) for split in summary["splits"]}
    return {split: svg_uri(picture) for split, picture in drawn.items() if picture is not None}


def svg_uri(svg: str) -> str:
    """Return SVG text as a data URI: as a picture of its own, so that ids of several cannot meet in one page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _terms(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = []
    for arm in summary["arms"]:
        picture = plots.loss_terms(summary, arm["name"])
        if picture is None:
            continue
        rows = [
            f"{row['term']}: {row['share'] * 100:.0f} % of the task loss's gradient"
            for row in arm["audit"]
            if row["share"] is not None
        ]
        found.append({"arm": arm["name"], "picture": svg_uri(picture), "shares": rows})
    return found


def _scenes(summary: Mapping[str, Any], parts: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the pictures in which the best arm and the reference differ most, and their attention."""
    best: str = next(iter(summary["ranking"]), "")
    reference, settings = summary["reference"], parts["settings"]
    evaluations: Mapping[str, Any] = parts["evaluations"]
    seeds = [
        s for s in summary["seeds"] if f"{best} seed {s}" in evaluations and f"{reference} seed {s}" in evaluations
    ]
    if not seeds:
        return {"scenes": [], "attention": [], "why": f"No seed was finished by both {reference} and another arm."}

    def results(evaluation: Mapping[str, Any]) -> list[Any]:
        return load_predictions(predictions_file(parts["cache"], evaluation["key"], "val"))

    runs = {name: [results(evaluations[f"{name} seed {s}"]) for s in seeds] for name in (reference, best)}
    chosen = examples.choose(runs[reference], runs[best])
    teacher: str | None = next(iter(parts["teachers"]), None)
    fixed: dict[str, Any] = {"teacher": results(parts["teachers"][teacher])} if teacher else {}
    made = []
    for choice in chosen:
        shown = {**fixed, **{name: runs[name][choice.run] for name in (reference, best)}}
        drawn = examples.scene(choice, shown, parts["names"], seeds[choice.run])
        made += [drawn] if drawn is not None else []
    models: dict[str, Path] = {name: parts["checkpoints"][f"{name} seed {seeds[0]}"] for name in (reference, best)}
    if teacher:
        models = {"teacher": Path(teacher), **models}
    order = sorted(chosen, key=lambda c: -abs(c.arm - c.reference)) or [examples.Choice(0, 0, 0.0, 0.0)]
    pictures_of = runs[reference][0]
    files = [pictures_of[c.index].name for c in order[: examples.ATTENTION]] if pictures_of else []
    looked = [(Path(f).name, p) for f in files if (p := examples.read_picture(f)) is not None]
    maps = {
        name: examples.attention(path, [p for _, p in looked], settings.imgsz, settings.trust)
        for name, path in models.items()
    }
    attention = [
        {"name": name, "rows": [(model, panels[i]) for model, panels in maps.items() if panels]}
        for i, (name, _) in enumerate(looked)
    ]
    why = "" if made else "There is no picture of val in which the two differ."
    return {"scenes": made, "attention": attention, "why": why, "arm": best}


# ------------------------------------------------------------------------------------------------ the page


def html(summary: Mapping[str, Any], drawn: Mapping[str, Any]) -> str:
    """Return the page: one file that loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    by_part = {
        kind: {split: part_table(summary, kind, split) for split in summary["splits"]} for kind in ("classes", "sizes")
    }
    return environment.get_template(TEMPLATE).render(
        summary=summary,
        drawn=drawn,
        tables=tables(summary),
        by_part=by_part,
        mark=next((_word(a) for a in summary["arms"] if a["name"] in summary["ranking"][:1]), ""),
        confidence=examples.CONFIDENCE,
        iou=examples.IOU,
    )
