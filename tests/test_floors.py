"""Imports go down only. The table below is the architecture; this test reads the imports and holds the code to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "yolo_kd"

FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "errors", "patches", "structures"),
    ("classes", "environment", "losses", "safe_loading", "upstream"),
    ("config", "unlabeled"),
    ("distillation",),
    ("engine",),
    ("check", "compare", "export"),
    ("__init__", "__main__", "cli"),
)
"""Lowest first. A name is a module beside the packages, or a package with everything inside it."""

MOST_MODULES = 9
"""Modules that may stand beside the packages."""

TENSORS_ONLY = ("classes", "losses", "structures")
"""What must not import Ultralytics."""

LOSS_GROUND = ("losses.base", "losses.kernels")
"""What every loss may import; code that two losses share belongs there."""


def modules() -> dict[str, Path]:
    """Return every module of the package by its name without `yolo_kd.`: `errors`, `losses.base`, `losses.__init__`."""
    files = sorted(p for p in PACKAGE.rglob("*.py") if "__pycache__" not in p.parts)
    return {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in files}


MODULES = modules()


def imports(name: str) -> set[str]:
    """Return what a module imports, absolute names, imports inside functions and under `if TYPE_CHECKING` included."""
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
            # `from yolo_kd import losses` imports a module, `from yolo_kd.errors import listed` a name inside one.
            found |= {f"{base}.{a.name}" if is_module(f"{base}.{a.name}") else base for a in node.names}
    return found


def is_module(name: str) -> bool:
    inner = name.removeprefix("yolo_kd.")
    return inner in MODULES or f"{inner}.__init__" in MODULES


def package_imports(name: str) -> set[str]:
    """Return the modules of this package that `name` imports, without `yolo_kd.`; the package itself is `__init__`."""
    found = {i for i in imports(name) if i == "yolo_kd" or i.startswith("yolo_kd.")}
    return {"__init__" if i == "yolo_kd" else i.removeprefix("yolo_kd.") for i in found}


def top(name: str) -> str:
    return name.split(".")[0]


def floor(name: str) -> int:
    for number, names in enumerate(FLOORS):
        if top(name) in names:
            return number
    pytest.fail(
        f"yolo_kd/{name.replace('.', '/')}.py is on no floor. Put it into a package, or add '{top(name)}' to FLOORS in "
        "tests/test_floors.py and to the floors in docs/design.md."
    )


def test_every_module_is_on_a_floor() -> None:
    assert all(floor(name) >= 0 for name in MODULES)


def test_the_table_names_what_exists_once() -> None:
    names = [name for names in FLOORS for name in names]
    assert sorted(names) == sorted({top(name) for name in MODULES})


def test_the_design_shows_the_same_floors() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    block = text.partition("## Floors")[2].partition("```text\n")[2].partition("```")[0]
    shown = [re.split(r" {2,}", line.strip())[1].split(", ") for line in block.strip().splitlines()]
    assert [sorted(names) for names in reversed(shown)] == [sorted(names) for names in FLOORS]


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_down(name: str) -> None:
    wrong = [
        f"yolo_kd.{name} imports yolo_kd.{imported}"
        for imported in sorted(package_imports(name))
        if top(imported) != top(name)
        and floor(imported) >= floor(name)
        and not (floor(imported) == floor(name) == len(FLOORS) - 1)  # the command and the public face
    ]
    assert not wrong, "; ".join(wrong)


def test_no_circle_inside_a_package() -> None:
    graph = {name: {i if i in MODULES else f"{i}.__init__" for i in package_imports(name)} for name in MODULES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_few_modules_stand_beside_the_packages() -> None:
    assert len([name for name in MODULES if "." not in name]) <= MOST_MODULES


@pytest.mark.parametrize("name", [m for m in MODULES if top(m) == "losses"])
def test_a_loss_imports_no_other_loss(name: str) -> None:
    if name == "losses.__init__":  # which gathers all of them
        return
    inside = {i for i in package_imports(name) if top(i) == "losses"}
    allowed = {i for i in inside if i.startswith(LOSS_GROUND)}
    if name.startswith("losses.kernels"):
        allowed = {i for i in allowed if i.startswith("losses.kernels")}
    assert inside <= allowed, f"yolo_kd.{name} imports {sorted(inside - allowed)}; move what they share to kernels"


@pytest.mark.parametrize("name", [m for m in MODULES if top(m) in TENSORS_ONLY])
def test_low_floors_know_tensors_only(name: str) -> None:
    found = {i for i in imports(name) if top(i) == "ultralytics"}
    assert not found, f"yolo_kd.{name} imports {sorted(found)}; upstream/ reads Ultralytics' models for it"


def test_the_reader_finds_every_kind_of_import() -> None:
    source = """
import torch.nn as nn
from yolo_kd._version import __version__
from yolo_kd.structures import DetectorOutputs, LossInputs
from yolo_kd import errors
from . import base
from .kernels.ops import EPS
def later():
    from ultralytics.nn import tasks
"""
    assert imports_of(source, "losses.fgd") == {
        "torch.nn",
        "yolo_kd._version",
        "yolo_kd.structures",
        "yolo_kd.errors",
        "yolo_kd.losses.base",
        "yolo_kd.losses.kernels.ops",
        "ultralytics.nn",
    }
