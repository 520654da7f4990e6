"""Time that each loss adds to a training step, read from the benchmark's result in `costs.json`.

The benchmark writes that file; nobody edits it:

    python scripts/bench_step.py --teacher yolov8s.pt --rounds 5 --threads 2 --json yolo_kd/losses/costs.json
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files


@dataclass(frozen=True)
class Costs:
    """Measured costs of the losses.

    Attributes:
        setting: Models, image size, batch and precision of the measurement.
        losses: For each loss, the time of its terms and modules as a fraction of the time of student and teacher. It
            may be slightly negative because of noise.
    """

    setting: str
    losses: dict[str, float]

    def text(self, loss: str) -> str:
        """Return the cost of a loss for a table: `8 %`, `under 1 %`, or `-` for a loss that was not measured."""
        cost = self.losses.get(loss)
        if cost is None:
            return "-"
        return "under 1 %" if cost < 0.01 else f"{100 * cost:.0f} %"


@cache
def measured_costs() -> Costs:
    """Return the costs that come with the package."""
    stored = json.loads(files("yolo_kd.losses").joinpath("costs.json").read_text(encoding="utf-8"))
    return Costs(stored["setting"], {name: entry["cost"] for name, entry in stored["losses"].items()})
