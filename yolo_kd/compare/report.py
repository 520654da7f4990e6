"""The four files of a comparison: `report.html`, `report.md`, `summary.json`, `runs.csv`."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from yolo_kd.compare import examples, plots
from yolo_kd.compare.evaluate import load_predictions, predictions_file
from yolo_kd.compare.records import GROUPS, Evaluation, Group, Summary, run_name
from yolo_kd.compare.runs import attempting, write_text
from yolo_kd.compare.size_metrics import ImageResult
from yolo_kd.compare.summary import Measurements, runs_csv
from yolo_kd.compare.tables import group_table, marked, tables


@dataclass
class Drawings:
    """Everything on the page that is drawn; pictures are data URIs.

    Attributes:
        differences: Paired differences by split.
        curves: Learning curves.
        terms: For each arm with distillation terms its name, the plot, and the share of each term in the gradient on
            the first batch as text.
        groups: Differences by class and by object size, by split.
        examples: Images in which the best arm and the reference differ most.
        no_examples: Why there are none.
        problems: What could not be drawn, a line each.
    """

    differences: dict[str, str] = field(default_factory=dict)
    curves: str = ""
    terms: list[tuple[str, str, list[str]]] = field(default_factory=list)
    groups: dict[Group, dict[str, str]] = field(default_factory=lambda: {kind: {} for kind in GROUPS})
    examples: list[examples.Example] = field(default_factory=list)
    no_examples: str = "They could not be drawn."
    problems: list[str] = field(default_factory=list)


def write_report(folder: Path, summary: Summary, measured: Measurements) -> dict[str, Path]:
    """Write all four files.

    Args:
        folder: Where to write.
        summary: Result of `summarise`.
        measured: What the summary was made from; holds the predictions that example images are drawn from.

    Returns:
        The files by their ending.
    """
    contents = {
        "summary.json": summary.to_json(),
        "runs.csv": runs_csv(summary),
        "report.md": markdown(summary),
        "report.html": html(summary, draw(summary, measured)),
    }
    for name, text in contents.items():
        write_text(folder / name, text)
    return {name.rpartition(".")[2]: folder / name for name in contents}


# ------------------------------------------------------------------------------------------------ Markdown


def markdown(summary: Summary) -> str:
    """Return the report without its pictures, for pasting into an issue."""
    return _rendered("report.md.j2", summary=summary, tables=tables(summary))


# ------------------------------------------------------------------------------------------------ pictures


def draw(summary: Summary, measured: Measurements) -> Drawings:
    """Draw everything; a picture that cannot be drawn is replaced by the reason."""
    drawn = Drawings()
    attempt = partial(attempting, drawn.problems)
    with attempt("differences"):
        drawn.differences = {split: svg_uri(plots.differences(summary, split)) for split in summary.splits}
    with attempt("curves"):
        drawn.curves = svg_uri(plots.learning_curves(summary))
    with attempt("terms"):
        drawn.terms = _terms(summary)
    for kind in GROUPS:
        with attempt(kind):
            drawings = {split: plots.groups(summary, kind, split) for split in summary.splits}
            drawn.groups[kind] = {split: svg_uri(svg) for split, svg in drawings.items() if svg is not None}
    with attempt("examples"):
        drawn.examples, drawn.no_examples = _examples(summary, measured)
    return drawn


def svg_uri(svg: str) -> str:
    """Return SVG text as a data URI: an image of its own, so that its ids cannot clash with those of other plots."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _terms(summary: Summary) -> list[tuple[str, str, list[str]]]:
    drawn = []
    for arm in summary.arms:
        svg = plots.loss_terms(summary, arm.name)
        if svg is not None:
            rows = [(row.term, row.share) for row in arm.audit if row.share is not None]
            shares = [f"{term}: {share * 100:.0f} % of the task loss's gradient" for term, share in rows]
            drawn.append((arm.name, svg_uri(svg), shares))
    return drawn


def _examples(summary: Summary, measured: Measurements) -> tuple[list[examples.Example], str]:
    """Draw the images in which the best arm and the reference differ most; without any, return why."""
    evaluations, reference = measured.evaluations, summary.reference
    best = next(iter(summary.ranking), "")
    seeds = [s for s in summary.seeds if {run_name(best, s), run_name(reference, s)} <= evaluations.keys()]
    if not seeds:
        return [], f"No seed was finished by both {reference} and another arm."

    def results(evaluation: Evaluation) -> list[ImageResult]:
        return load_predictions(predictions_file(measured.cache, evaluation.key, "val"))

    runs = {name: [results(evaluations[run_name(name, seed)]) for seed in seeds] for name in (reference, best)}
    teacher = next(iter(measured.teachers.values()), None)
    fixed = {"teacher": results(teacher)} if teacher else {}
    drawn = []
    for choice in examples.choose(runs[reference], runs[best]):
        shown = {**fixed, **{name: runs[name][choice.run] for name in (reference, best)}}
        example = examples.draw(choice, shown, measured.names, seeds[choice.run])
        drawn += [example] if example is not None else []
    return drawn, "" if drawn else "There is no image of val in which the two differ."


# ------------------------------------------------------------------------------------------------ the page


def html(summary: Summary, drawn: Drawings) -> str:
    """Return the page: one file that loads nothing."""
    best = next(iter(summary.ranking), "")
    return _rendered(
        "report.html.j2",
        summary=summary,
        drawn=drawn,
        tables=tables(summary),
        groups={kind: [group_table(summary, kind, split) for split in summary.splits] for kind in GROUPS},
        mark=next((marked(arm) for arm in summary.arms if arm.name == best), ""),
        best=best,
        confidence=examples.CONFIDENCE,
        iou=examples.IOU,
    )


def _rendered(template: str, **content: Any) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=template.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(content)
