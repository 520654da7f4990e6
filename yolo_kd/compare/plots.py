"""Plots of a report as SVG text: the same text for the same numbers, legible without colour and on a phone.

Arms differ by line style and marker as well as by colour. Figures are about as wide as a phone, so that letters keep
their size there; a wide page shows several side by side.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from yolo_kd.compare.records import Group, Summary

WIDTH = 4.4  # inches
MAX_ROWS = 24  # of a dot plot
# colours that differ for any colour vision, with line style and marker
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
    """Return colour, line style and marker of an arm by its index in `Summary.by_reference`."""
    return _STYLES[number % len(_STYLES)]


@contextmanager
def _drawing(name: str, height: float) -> Iterator[tuple[Figure, Axes, io.StringIO]]:
    """Yield a figure, then write it as SVG. The ids in the SVG are derived from the name."""
    out = io.StringIO()
    with mpl.rc_context({**_RC, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.add_subplot()
        yield figure, axes, out
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None})


def _label(figure: Figure, axes: Axes, x: str, y: str = "") -> None:
    """Label the axes and add a legend; epochs are whole numbers."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x == "epoch":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)


def differences(summary: Summary, split: str) -> str:
    """Draw each arm's paired differences of mAP50-95, their mean and its interval."""
    arms = summary.others
    with _drawing(f"differences-{split}", 1.5 + 0.5 * len(arms)) as (_, axes, out):
        axes.axvline(0, color="black", linewidth=1)
        for row, arm in enumerate(arms):
            found = arm.difference[split][summary.metric]
            color, _, marker = style_of(row + 1)
            seeds = [d * 100 for d in found.differences]
            axes.scatter(seeds, [row + 0.22] * len(seeds), s=18, facecolors="white", edgecolors=color, zorder=3)
            if found.mean is None:
                continue
            if found.low is not None and found.high is not None:
                axes.plot([found.low * 100, found.high * 100], [row, row], color=color, linewidth=2.2)
            axes.plot([found.mean * 100], [row], marker=marker, color=color, markersize=8, zorder=4)
        axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
        axes.set_ylim(len(arms) - 0.4, -0.6)
        axes.set_xlabel(f"{summary.metric} on {split}, points over {summary.reference}")
        axes.set_title("filled: mean with 95 % interval; hollow: one seed each", fontsize=8, loc="left")
    return out.getvalue()


def learning_curves(summary: Summary) -> str:
    """Draw mAP50-95 on val after each epoch: the mean over seeds, and the range between them."""
    with _drawing("curves", 3.6) as (figure, axes, out):
        for number, arm in enumerate(summary.by_reference):
            curves = [run.curve for run in summary.runs if run.arm == arm.name and run.curve]
            if not curves:
                continue
            epochs, mean, low, high = _band([[value for _, value in curve] for curve in curves], 100)
            axes.fill_between(epochs, low, high, color=style_of(number)[0], alpha=0.12, linewidth=0)
            _curve(axes, number, epochs, mean, arm.name, first=number * 2)
        for teacher in summary.teachers:
            value = teacher.splits["val"].metrics[summary.metric] * 100
            axes.axhline(value, color="black", linewidth=1, linestyle=(0, (1, 3)), label="teacher")
        _label(figure, axes, "epoch", "mAP50-95 on val")
    return out.getvalue()


def _curve(axes: Axes, number: int, epochs: Sequence[int], mean: Sequence[float], label: str, first: int = 0) -> None:
    """Draw one line in the style of a number, with about six markers from the index `first` on."""
    color, line, marker = style_of(number)
    every = (first, max(1, len(epochs) // 6))
    axes.plot(epochs, mean, color=color, linestyle=line, marker=marker, markersize=4, markevery=every, label=label)


def _band(
    curves: Sequence[Sequence[float | None]], scale: float = 1.0
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Return epochs and the mean, minimum and maximum over curves, cut to the shortest curve."""
    length = min(len(curve) for curve in curves)
    table = np.array([curve[:length] for curve in curves], float) * scale  # None becomes NaN
    ends = (table.mean(0), table.min(0), table.max(0))
    mean, low, high = (column.tolist() for column in ends)
    return list(range(1, length + 1)), mean, low, high


def loss_terms(summary: Summary, arm: str) -> str | None:
    """Draw an arm's distillation terms over its epochs, mean over seeds; None where it has none."""
    runs = [run for run in summary.runs if run.arm == arm and run.terms]
    if not runs:
        return None
    with _drawing(f"terms-{arm}", 2.9) as (figure, axes, out):
        drawn: list[float] = []
        for number, name in enumerate(runs[0].terms):
            epochs, mean, _, _ = _band([run.terms[name] for run in runs if name in run.terms])
            drawn += mean
            _curve(axes, number, epochs, mean, name)
        if drawn and all(v > 0 for v in drawn) and max(drawn) > 30 * min(drawn):
            axes.set_yscale("log")
        axes.set_title(arm, loc="left")
        _label(figure, axes, "epoch", "weighted loss per image")
    return out.getvalue()


def groups(summary: Summary, kind: Group, split: str) -> str | None:
    """Draw the mean differences by class or object size, one marker per arm; None where there is nothing to compare."""
    arms = summary.others
    rows: dict[str, dict[str, float]] = {}
    for arm in arms:
        for name, score in arm.group(kind, split).items():
            if score.difference is not None:
                rows.setdefault(name, {})[arm.name] = score.difference * 100
    if not rows:
        return None
    names = list(rows)
    if len(names) > MAX_ROWS:
        names = sorted(names, key=lambda n: -max(abs(v) for v in rows[n].values()))[:MAX_ROWS]
    with _drawing(f"{kind}-{split}", 1.4 + 0.3 * len(names)) as (figure, axes, out):
        axes.axvline(0, color="black", linewidth=1)
        for i, arm in enumerate(arms):
            color, _, marker = style_of(i + 1)
            shift = (i - (len(arms) - 1) / 2) * 0.6 / max(len(arms), 1)
            found = [(rows[n][arm.name], row + shift) for row, n in enumerate(names) if arm.name in rows[n]]
            axes.plot([x for x, _ in found], [y for _, y in found], linestyle="none", marker=marker, color=color,
                      markersize=6, label=arm.name)  # fmt: skip
        axes.set_yticks(range(len(names)), [n if len(n) <= 22 else f"{n[:21]}…" for n in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        _label(figure, axes, f"{summary.metric} on {split}, points over {summary.reference}")
    return out.getvalue()
