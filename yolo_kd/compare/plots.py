"""Plots of a report: SVG text that is the same for equal numbers, legible without colour and at a phone's width.

Arms differ by line style and marker as well as by colour. Figures are drawn about as wide as a phone shows them, so
that their letters keep their size there; a wide page puts several side by side.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 4.4  # inches
MAX_ROWS = 24  # of a dot plot
# colours that people with any colour vision tell apart, beside line style and marker
_STYLES: tuple[tuple[str, Any, str], ...] = (
    ("#000000", "-", "o"),
    ("#0072b2", (0, (5, 2)), "s"),
    ("#d55e00", (0, (1, 1.2)), "^"),
    ("#009e73", (0, (5, 1.5, 1, 1.5)), "D"),
    ("#cc79a7", (0, (8, 2)), "v"),
    ("#56b4e9", (0, (3, 1, 1, 1, 1, 1)), "P"),
    ("#e69f00", (0, (2, 2)), "X"),
    ("#666666", (0, (6, 1, 2, 1)), "*"),
)
_RC = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#d8d8d8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
}


def style_of(number: int) -> tuple[str, Any, str]:
    """Return colour, line style and marker of the arm with this number; the reference is number 0."""
    return _STYLES[number % len(_STYLES)]


def numbered(summary: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of each arm, the reference first."""
    names = [arm["name"] for arm in summary["arms"]]
    return {name: i for i, name in enumerate(sorted(names, key=lambda n: (n != summary["reference"], names.index(n))))}


@contextmanager
def _drawing(name: str, height: float) -> Iterator[tuple[Figure, Axes, io.StringIO]]:
    """Hand out a figure, then write it as SVG whose ids come from its name."""
    out = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        yield figure, axes, out
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})


def differences(summary: Mapping[str, Any], split: str) -> str:
    """Draw each arm's paired differences of mAP50-95, their mean and its interval."""
    metric, reference = summary["metric"], summary["reference"]
    arms = [arm for arm in summary["arms"] if arm["name"] != reference]
    numbers = numbered(summary)
    with _drawing(f"differences-{split}", 1.5 + 0.5 * len(arms)) as (_, axes, out):
        axes.axvline(0, color="black", linewidth=1)
        for row, arm in enumerate(arms):
            found = arm["difference"][split][metric]
            color, _, marker = style_of(numbers[arm["name"]])
            seeds = [d * 100 for d in found["differences"]]
            axes.scatter(seeds, [row + 0.22] * len(seeds), s=18, facecolors="white", edgecolors=color, zorder=3)
            if found["mean"] is None:
                continue
            if found["low"] is not None:
                axes.plot([found["low"] * 100, found["high"] * 100], [row, row], color=color, linewidth=2.2)
            axes.plot([found["mean"] * 100], [row], marker=marker, color=color, markersize=8, zorder=4)
        axes.set_yticks(range(len(arms)), [arm["name"] for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel(f"{metric} on {split}, points over {reference}")
        axes.set_title("filled: mean with 95 % interval; hollow: one seed each", fontsize=8, loc="left")
    return out.getvalue()


def learning_curves(summary: Mapping[str, Any]) -> str:
    """Draw mAP50-95 on val after each epoch: the mean over seeds, and the range between them."""
    numbers = numbered(summary)
    with _drawing("curves", 3.6) as (figure, axes, out):
        for arm in sorted(summary["arms"], key=lambda a: numbers[a["name"]]):
            curves = [run["curve"] for run in summary["runs"] if run["arm"] == arm["name"] and run["curve"]]
            if not curves:
                continue
            epochs, mean, low, high = _band([[value for _, value in curve] for curve in curves])
            color, line, marker = style_of(numbers[arm["name"]])
            axes.fill_between(epochs, low, high, color=color, alpha=0.12, linewidth=0)
            axes.plot(epochs, mean, color=color, linestyle=line, marker=marker, markersize=4,
                      markevery=(numbers[arm["name"]] * 2, max(1, len(epochs) // 6)), label=arm["name"])  # fmt: skip
        for teacher in summary["teachers"]:
            value = teacher["splits"]["val"]["metrics"][summary["metric"]] * 100
            axes.axhline(value, color="black", linewidth=1, linestyle=(0, (1, 3)), label="teacher")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("mAP50-95 on val")
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return out.getvalue()


def _band(curves: Sequence[Sequence[float]]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return epochs, mean, lowest and highest over curves, times 100, as far as all of them reach."""
    length = min(len(curve) for curve in curves)
    columns = [[curve[i] * 100 for curve in curves] for i in range(length)]
    mean = [sum(column) / len(column) for column in columns]
    return list(range(1, length + 1)), mean, [min(c) for c in columns], [max(c) for c in columns]


def loss_terms(summary: Mapping[str, Any], arm: str) -> str | None:
    """Draw an arm's distillation terms over its epochs, mean over seeds; None where it has none."""
    runs = [run for run in summary["runs"] if run["arm"] == arm and run["terms"]]
    if not runs:
        return None
    names = list(runs[0]["terms"])
    with _drawing(f"terms-{arm}", 2.9) as (figure, axes, out):
        values = []
        for number, name in enumerate(names):
            curves = [
                [v if v is not None else math.nan for v in run["terms"][name]] for run in runs if name in run["terms"]
            ]
            epochs, mean, _, _ = _band(curves)
            mean = [value / 100 for value in mean]
            values += mean
            color, line, marker = style_of(number)
            axes.plot(epochs, mean, color=color, linestyle=line, marker=marker, markersize=4,
                      markevery=max(1, len(epochs) // 6), label=name)  # fmt: skip
        positive = [v for v in values if v > 0]
        if positive and len(positive) == len(values) and max(positive) > 30 * min(positive):
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("weighted value per image")
        axes.set_title(arm, loc="left")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return out.getvalue()


def parts(summary: Mapping[str, Any], kind: str, split: str) -> str | None:
    """Draw the mean differences by class or size, one marker per arm; None where there is nothing to compare.

    Args:
        summary: The summary.
        kind: `classes` or `sizes`.
        split: The split.
    """
    arms = [arm for arm in summary["arms"] if arm["name"] != summary["reference"]]
    rows: dict[str, dict[str, float]] = {}
    for arm in arms:
        for name, part in arm[kind][split].items():
            if part["difference"] is not None:
                rows.setdefault(name, {})[arm["name"]] = part["difference"] * 100
    if not rows:
        return None
    names = list(rows)
    if len(names) > MAX_ROWS:
        names = sorted(names, key=lambda n: -max(abs(v) for v in rows[n].values()))[:MAX_ROWS]
    numbers = numbered(summary)
    with _drawing(f"{kind}-{split}", 1.4 + 0.3 * len(names)) as (figure, axes, out):
        axes.axvline(0, color="black", linewidth=1)
        for i, arm in enumerate(arms):
            color, _, marker = style_of(numbers[arm["name"]])
            shift = (i - (len(arms) - 1) / 2) * 0.6 / max(len(arms), 1)
            found = [(rows[n][arm["name"]], row + shift) for row, n in enumerate(names) if arm["name"] in rows[n]]
            axes.plot([x for x, _ in found], [y for _, y in found], linestyle="none", marker=marker, color=color,
                      markersize=6, label=arm["name"])  # fmt: skip
        axes.set_yticks(range(len(names)), [n if len(n) <= 22 else f"{n[:21]}…" for n in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlabel(f"{summary['metric']} on {split}, points over {summary['reference']}")
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return out.getvalue()
