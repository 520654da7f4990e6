"""Time that each loss adds to a training step, read from the benchmark's result in `costs.json`.

The benchmark writes that file; nobody edits it:

    python scripts/bench_step.py --teacher yolov8s.pt --rounds 5 --threads 2 --json yolo_kd/losses/costs.json
"""

from __future__ import annotations

import json
from importlib.resources import files


def measured_costs() -> tuple[str, dict[str, float]]:
    """Return the setting of the measurement and the cost of each loss.

    A cost is the time of the loss's terms and modules as a fraction of the time of student and teacher. It may be
    slightly negative because of noise.
    """
    stored = json.loads(files("yolo_kd.losses").joinpath("costs.json").read_text(encoding="utf-8"))
    return stored["setting"], {name: entry["cost"] for name, entry in stored["losses"].items()}


def format_cost(cost: float | None) -> str:
    """Return a cost for a table: `8 %`, `under 1 %`, or `-` for a loss that was not measured."""
    if cost is None:
        return "-"
    return "under 1 %" if cost < 0.01 else f"{100 * cost:.0f} %"
