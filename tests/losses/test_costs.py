"""The costs that `yolo-kd losses` shows come from the benchmark's result and from nowhere else."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path

import pytest

import yolo_kd.losses  # noqa: F401  (registers the losses that ship with the package)
from yolo_kd.cli import main
from yolo_kd.config.recipe import load_recipe, shipped_recipes
from yolo_kd.losses import base
from yolo_kd.losses.at import AT
from yolo_kd.losses.base import registered
from yolo_kd.losses.costs import format_cost, measured_costs

PACKAGE = Path(__file__).resolve().parents[2] / "yolo_kd"
STORED = json.loads(files("yolo_kd.losses").joinpath("costs.json").read_text(encoding="utf-8"))


def shipped() -> list[str]:
    return [name for name, cls in registered().items() if cls.__module__.startswith("yolo_kd.")]


def test_nothing_but_a_loss_has_an_entry():
    """A new loss shows "-" until the benchmark is run again."""
    assert set(measured_costs()[1]) <= set(shipped())


def test_an_entry_is_the_row_of_a_recipe_that_contains_the_loss():
    from scripts.bench_step import recipes_of_losses

    expected = recipes_of_losses([*shipped_recipes()])
    assert {loss: entry["recipe"] for loss, entry in STORED["losses"].items()}.items() <= expected.items()
    for loss, entry in STORED["losses"].items():
        assert loss in [term.name for term in load_recipe(entry["recipe"]).terms]
        assert entry["cost"] == pytest.approx(STORED["rows"][entry["recipe"]]["of_parts"] - 1, abs=1e-3)


def test_the_setting_of_the_measurement_is_stored():
    assert re.match(r"yolov8s \(trained\) -> yolov8n, \d+ px, batch \d+, .*, \d+ rounds$", measured_costs()[0])


@pytest.mark.parametrize("cls", registered().values(), ids=lambda c: c.name)
def test_no_loss_writes_its_cost_by_hand(cls):
    assert not hasattr(cls, "cost")


def test_no_source_file_holds_a_percentage_of_a_step():
    by_hand = re.compile(r"^\s+cost\w*( *:.*)? = [\"'\d]", re.MULTILINE)
    assert not [p.name for p in PACKAGE.rglob("*.py") if by_hand.search(p.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(
    ("cost", "text"),
    [(0.076, "8 %"), (1.626, "163 %"), (0.01, "1 %"), (0.009, "under 1 %"), (-0.02, "under 1 %"), (None, "-")],
)
def test_format(cost, text):
    assert format_cost(cost) == text


def test_the_command_shows_a_dash_for_a_plugins_loss(monkeypatch, capsys):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    type("Mine", (AT,), {"name": "mine", "columns": ("mine_loss",)})
    assert main(["losses"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert re.search(r"  all +-  +mine_loss", rows["mine"])
    assert re.search(r"  all +8 %  +fgd_loss", rows["fgd"])
