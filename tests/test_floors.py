"""Imports go down only. The table below is the architecture; this test reads the imports and holds the code to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "yolo_kd"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "views"),
    ("losses",),
    (
        *("adapters", "archive", "class_names", "detections", "guards", "pool", "position", "saving"),
        *("schedules", "signals", "speed", "values", "view_cache", "yaml_lines"),
    ),
    ("history", "classes", "assignments"),
    ("class_choice", "class_match"),
    ("taps", "checkpoints", "cpu_precision", "plugins", "datafiles", "environment", "folders", "parallel"),
    ("teacher", "blend", "inherit", "keep", "recipe", "recipe_terms", "options", "distiller", "pool_files"),
    ("adapter_state", "audit", "batch_probe", "criterion", "durable", "matching", "plan", "pool_data"),
    ("pool_criterion", "pool_trainer", "resume"),
    ("keep_trainer",),
    ("trainer", "parity"),
    ("checks", "compare", "export"),
    ("cli",),
    ("__init__", "__main__"),
)
"""Lowest first. A name stands for a module and, where it is a package, for everything inside it."""

FIRST_WITH_ULTRALYTICS = "taps"
"""Everything on a lower floor than this module knows tensors only."""

SAME_FLOOR: frozenset[tuple[str, str]] = frozenset(
    {
        ("distiller", "recipe"),
        ("options", "recipe"),
        ("recipe", "recipe_terms"),
        ("distiller", "recipe_terms"),
        ("criterion", "audit"),
        ("losses.parts", "losses.channels"),
        ("losses.parts", "losses.ops"),
        ("batch_probe", "criterion"),
        ("checkpoints", "datafiles"),
        ("plan", "matching"),
    }
)
"""Pairs (importer, imported) of one floor that may know each other. Keep it small."""

LOSS_GROUND = ("losses.base", "losses.ops", "losses.boxes", "losses.channels", "losses.parts")
"""What every loss may import, and what imports nothing from `losses` itself. What losses share lives here."""


def modules() -> dict[str, Path]:
    """Return every module of the package by its name without `yolo_kd.`: `errors`, `losses.base`, `losses.__init__`."""
    files = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}


MODULES = modules()


def imports(name: str) -> set[str]:
    """Return what a module imports, absolute names, those inside functions and `if TYPE_CHECKING` included."""
    return imports_of(MODULES[name].read_text(encoding="utf-8"), name)


def imports_of(source: str, name: str) -> set[str]:
    """Return the imports of a source text that stands for the module `name`."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = ["yolo_kd", *name.split(".")]
                base = ".".join([*parents[: len(parents) - node.level], *([base] if base else [])])
            names = [a.name for a in node.names]
            # The version stands first in the package's __init__, so it can be read from anywhere.
            if base == "yolo_kd" and names == ["__version__"]:
                continue
            # `from yolo_kd import losses` imports a module, `from yolo_kd.views import View` a name inside one.
            found |= {f"{base}.{n}" if is_module(f"{base}.{n}") else base for n in names}
    return found


def is_module(name: str) -> bool:
    own = name.removeprefix("yolo_kd.")
    return own in MODULES or f"{own}.__init__" in MODULES


def own_imports(name: str) -> set[str]:
    """Return the package's own modules that `name` imports, without `yolo_kd.`; the package itself is `__init__`."""
    found = {i for i in imports(name) if i == "yolo_kd" or i.startswith("yolo_kd.")}
    return {"__init__" if i == "yolo_kd" else i.removeprefix("yolo_kd.") for i in found}


def top(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if top(name) in names:
            return number
    pytest.fail(
        f"yolo_kd/{name.replace('.', '/')}.py stands on no floor. Add '{top(name)}' to FLOORS in tests/test_floors.py "
        "at the lowest place from which it reaches what it needs."
    )


@pytest.mark.parametrize("name", MODULES)
def test_every_module_stands_on_a_floor(name: str) -> None:
    assert floor(name) >= 0


def test_the_design_shows_the_same_floors() -> None:
    text = (PACKAGE.parent / "docs" / "design.md").read_text(encoding="utf-8")
    block = text.partition("## Floors")[2].partition("```text\n")[2].partition("```")[0]
    shown = [re.split(" {2,}", line)[0].split(", ") for line in block.strip().replace(",\n", ", ").splitlines()]
    assert [sorted(names) for names in shown] == [sorted(names) for names in FLOORS[:-1]]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    wrong = []
    for imported in sorted(own_imports(name)):
        same = floor(imported) == floor(name)
        inside = top(imported) == top(name)
        if floor(imported) > floor(name) or (same and not inside and (top(name), top(imported)) not in SAME_FLOOR):
            where = "on the same floor" if same else "above it"
            wrong.append(f"yolo_kd.{name} imports yolo_kd.{imported}, which stands {where}")
    assert not wrong, "; ".join(wrong)


@pytest.mark.parametrize("name", [m for m in MODULES if top(m) == "losses"])
def test_a_loss_imports_no_other_loss(name: str) -> None:
    # The package's __init__ is left out: finding every loss is its job.
    if name == "losses.__init__":
        return
    inside = {i for i in own_imports(name) if top(i) == "losses"}
    allowed = {b for a, b in SAME_FLOOR if a == name} | (set() if name in LOSS_GROUND else set(LOSS_GROUND))
    assert inside <= allowed, f"yolo_kd.{name} imports {sorted(inside - allowed)}, move what they share to losses.ops"


@pytest.mark.parametrize("name", MODULES)
def test_low_floors_know_tensors_only(name: str) -> None:
    if floor(name) >= floor(FIRST_WITH_ULTRALYTICS):
        return
    found = {i for i in imports(name) if top(i) == "ultralytics"}
    assert not found, f"yolo_kd.{name} imports {sorted(found)}; what Ultralytics knows comes up through yolo_kd.taps"


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import torch.nn as nn
from yolo_kd import __version__
from yolo_kd.views import View, Step
from yolo_kd import errors
from . import base
from .ops import EPS
def later():
    from ultralytics.nn import tasks
"""
    assert imports_of(source, "losses.fgd") == {
        "torch.nn",
        "yolo_kd.views",
        "yolo_kd.errors",
        "yolo_kd.losses.base",
        "yolo_kd.losses.ops",
        "ultralytics.nn",
    }


@pytest.mark.parametrize("pair", sorted(SAME_FLOOR))
def test_no_exception_is_left_over(pair: tuple[str, str]) -> None:
    importer, imported = pair
    assert importer in MODULES
    assert imported in own_imports(importer), (
        f"{importer} no longer imports {imported}: take the pair out of SAME_FLOOR"
    )


def test_the_table_names_a_module_once() -> None:
    names = [name for names in FLOORS for name in names]
    assert len(names) == len(set(names))
