#!/usr/bin/env python3
"""Draw one training step for docs/explanation/one-step.md.

python scripts/draw_step.py --out docs/explanation/step.svg
"""

from __future__ import annotations

import argparse
from pathlib import Path

INK, TEACHER, STUDENT, LOSS = "#37474f", "#e3f2fd", "#e8f5e9", "#fff3e0"
BOXES = {  # name: x, y, width, height, fill, lines
    "batch": (20, 130, 110, 60, "#eceff1", ["batch"]),
    "teacher": (190, 30, 190, 76, TEACHER, ["teacher", "frozen, eval, no gradient"]),
    "student": (190, 214, 190, 76, STUDENT, ["student", "plain DetectionModel"]),
    "adapters": (440, 130, 130, 60, STUDENT, ["adapters", "1×1 convolutions"]),
    "terms": (630, 68, 150, 76, LOSS, ["terms of the recipe", "weight × schedule"]),
    "task": (630, 214, 150, 76, LOSS, ["task loss", "label assignment"]),
    "sum": (830, 140, 90, 60, LOSS, ["loss"]),
}
ARROWS = [  # points, label and its place
    ([(130, 150), (160, 150), (160, 68), (190, 68)], "", (0, 0)),
    ([(130, 170), (160, 170), (160, 252), (190, 252)], "", (0, 0)),
    ([(380, 68), (600, 68), (600, 90), (630, 90)], "features, scores, boxes", (490, 58)),
    ([(380, 240), (505, 240), (505, 190)], "features", (440, 231)),
    ([(570, 160), (600, 160), (600, 125), (630, 125)], "", (0, 0)),
    ([(380, 268), (630, 268)], "scores, boxes", (490, 284)),
    ([(705, 214), (705, 144)], "assignment, scores, boxes", (620, 206)),
    ([(780, 106), (875, 106), (875, 140)], "", (0, 0)),
    ([(780, 252), (875, 252), (875, 200)], "", (0, 0)),
]


def draw() -> str:
    """Return the figure as SVG."""
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 940 330" font-family="sans-serif" font-size="14">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        '<rect width="940" height="330" fill="#ffffff"/>',
    ]
    for points, label, (x, y) in ARROWS:
        path = " ".join(f"{px},{py}" for px, py in points)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.5" marker-end="url(#tip)"/>'
        )
        if label:
            parts.append(f'<text x="{x}" y="{y}" text-anchor="middle" font-size="12" fill="{INK}">{label}</text>')
    for x, y, width, height, fill, lines in BOXES.values():
        parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>')
        top = y + height / 2 + 5 - 9 * (len(lines) - 1)
        for i, line in enumerate(lines):
            style = ' font-weight="bold"' if i == 0 else ' font-size="12"'
            place = f'x="{x + width / 2:g}" y="{top + 18 * i:g}"'
            parts.append(f'<text {place} text-anchor="middle"{style} fill="{INK}">{line}</text>')
    parts.append(
        f'<text x="470" y="318" text-anchor="middle" font-size="12" fill="{INK}">'
        "gradients flow into the green boxes only; checkpoints hold the student as a plain model</text>"
    )
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Write the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/explanation/step.svg"), help="file to write")
    args = parser.parse_args()
    args.out.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
