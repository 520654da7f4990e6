#!/usr/bin/env python3
"""Validate checkpoints on val and test, and print a Markdown row for each with its training time from results.csv.

python scripts/evaluate.py --data runs/bccd/data/data.yaml --imgsz 320 runs/bccd/*/weights/best.pt
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from ultralytics import YOLO


def training_time(best: Path) -> float | None:
    """Return the training time of a checkpoint in seconds, None if its results.csv is gone."""
    table = best.parents[1] / "results.csv"
    if not table.exists():
        return None
    with open(table, encoding="utf-8") as file:
        return float(list(csv.DictReader(file))[-1]["time"])


def main() -> None:
    """Print the table, and write it as JSON with --out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", type=Path, help="trained checkpoints")
    parser.add_argument("--data", required=True, help="data yaml")
    parser.add_argument("--imgsz", type=int, default=640, help="image size in pixels")
    parser.add_argument("--splits", nargs="*", default=["val", "test"], help="splits of the data yaml")
    parser.add_argument("--out", type=Path, help="JSON file for the numbers")
    args = parser.parse_args()
    result = {}
    for best in args.checkpoints:
        row: dict[str, float | None] = {"minutes": None}
        seconds = training_time(best)
        row["minutes"] = None if seconds is None else round(seconds / 60, 1)
        for split in args.splits:
            metrics = YOLO(best).val(
                data=args.data, imgsz=args.imgsz, split=split, plots=False, verbose=False, workers=0
            )
            row[f"{split} mAP50-95"] = round(float(metrics.box.map), 4)
            row[f"{split} mAP50"] = round(float(metrics.box.map50), 4)
        result[best.parents[1].name] = row
    columns = list(next(iter(result.values())))
    print("| run | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in result.items():
        print(f"| {name} | " + " | ".join("-" if v is None else f"{v:g}" for v in row.values()) + " |")
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
