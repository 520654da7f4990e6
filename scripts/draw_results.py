#!/usr/bin/env python3
"""Draw the picture of the README: what distillation adds to the student alone, with 95 % intervals, from the CSV files.

python scripts/draw_results.py --out docs/gains.svg
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results"
INK, GRID, OTHER, OURS = "#37474f", "#cfd8dc", "#90a4ae", "#1e88e5"
LEFT, SCALE, ROW = 330, 10.0, 62  # x of zero, pixels of a point, height of a group
# title, and file, setting, data, split, arm and seeds of each row
GROUPS = [
    (
        "blood cells, student from scratch",
        ("thinned.csv", "scratch", "bccd", "test", "distill_model", "3"),
        ("thinned.csv", "scratch", "bccd", "test", "kd=default", "3"),
    ),
    (
        "raccoon, student from scratch",
        ("thinned.csv", "scratch", "raccoon", "val", "distill_model", "3"),
        ("thinned.csv", "scratch", "raccoon", "val", "kd=default", "3"),
    ),
    (
        "blood cells, a fifth of the labels",
        ("other_starts.csv", "few", "bccd", "test", "distill_model", "5"),
        ("combined.csv", "few", "bccd", "test", "objectness_cwd", "13"),
    ),
    (
        "raccoon, a fifth of the labels",
        ("combined.csv", "few", "raccoon", "val", "distill_model", "10"),
        ("combined.csv", "few", "raccoon", "val", "objectness_cwd", "10"),
    ),
]


def difference(file: str, *wanted: str) -> tuple[float, float, float]:
    """Return a run's difference to the student alone and its interval, in points."""
    keys = ("setting", "data", "split", "arm", "seeds")
    with open(RESULTS / file, encoding="utf-8", newline="") as lines:
        (row,) = [r for r in csv.DictReader(lines) if tuple(r[k] for k in keys) == wanted and r["versus"] == "alone"]
    return float(row["difference"]), float(row["low"]), float(row["high"])


def text(x: float, y: float, words: str, *, size: int = 13, anchor: str = "start", fill: str = INK) -> str:
    """Return a line of text."""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}">{words}</text>'


def draw() -> str:
    """Return the picture as SVG."""
    height = 70 + ROW * len(GROUPS)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height + 30}" font-family="sans-serif">',
        f'<rect width="900" height="{height + 30}" fill="#ffffff"/>',
        text(20, 28, "mAP50-95 over the student alone, points, 95 % interval (YOLOv8s teaches YOLOv8n)", size=15),
    ]
    for points in range(-10, 51, 10):
        x = LEFT + points * SCALE
        parts.append(f'<path d="M{x:g} 44V{height}" stroke="{INK if points == 0 else GRID}" stroke-width="1"/>')
        parts.append(text(x, height + 18, f"{points:+d}" if points else "0", size=12, anchor="middle"))
    for i, (title, theirs, ours) in enumerate(GROUPS):
        top = 66 + ROW * i
        parts.append(text(20, top + 14, title))
        for y, row, color, name in ((top, theirs, OTHER, "distill_model="), (top + 22, ours, OURS, "yolo_kd")):
            mean, low, high = difference(*row)
            x, x1, x2 = (LEFT + v * SCALE for v in (mean, low, high))
            parts.append(f'<path d="M{x1:g} {y:g}H{x2:g}" stroke="{color}" stroke-width="3"/>')
            parts.append(f'<circle cx="{x:g}" cy="{y:g}" r="6" fill="{color}"/>')
            parts.append(text(x2 + 10, y + 4, f"{name} {mean:+.1f}", size=12))
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/gains.svg"), help="file to write")
    args = parser.parse_args()
    args.out.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
