"""Imports go down only. The table below is the architecture; this test reads the imports and holds the code to it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import ultralytics

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

PATCHED = ("torch", "torchvision", "ultralytics")
"""Packages whose functions only `patches.py` may replace."""

PRIVATE_READERS = ("upstream", "safe_loading", "engine.trainer", "engine.component")
"""Packages and modules that may read private names of Ultralytics; the last two override methods of its trainer."""

PRIVATE_READERS_LEFT = {"compare.evaluate"}
"""TO BE EMPTIED: modules that still read private names of Ultralytics and should leave it to those above."""

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
    for name, imported in graph.items():  # importing a module imports the packages around it
        around = {f"{i.rpartition('.')[0]}.__init__" for i in imported if "." in i}
        imported |= {i for i in around if i in MODULES and not name.startswith(i.removesuffix("__init__"))}
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


def test_nothing_but_tests_imports_unittest() -> None:
    found = {name for name in MODULES if any(top(i) == "unittest" for i in imports(name))}
    assert not found, "replace functions with yolo_kd.patches.replaced"


def changes_of(source: str) -> list[str]:
    """Return what a source text imports from Ultralytics or torch and then changes: sets or deletes an attribute of."""
    tree = ast.parse(source)
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if top(alias.name if isinstance(node, ast.Import) else node.module or "") in PATCHED
    }
    changed: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            changed.append(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            changed.append(node.args[0])
    return [ast.unparse(owner) for owner in changed if root_of(owner) in foreign]


def root_of(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else None


@pytest.mark.parametrize("name", [m for m in MODULES if m != "patches"])
def test_only_patches_changes_ultralytics_and_torch(name: str) -> None:
    found = changes_of(MODULES[name].read_text(encoding="utf-8"))
    assert not found, f"yolo_kd.{name} changes attributes of {found}; use yolo_kd.patches.replaced"


def test_every_kind_of_change_is_found() -> None:
    source = """
import torch
import ultralytics.utils as utils
from ultralytics.engine import trainer as engine
from yolo_kd import errors
engine.autocast = None
torch.backends.cudnn.benchmark += 1
del utils.LOGGER.name
setattr(engine, "autocast", None)
delattr(utils, "RANK")
for engine.epoch in range(3):
    pass
errors.mine = 1
local = engine.BaseTrainer()
local.epoch = 3
"""
    assert sorted(changes_of(source)) == ["engine"] * 3 + ["torch.backends.cudnn", "utils", "utils.LOGGER"]


@pytest.fixture(scope="module")
def private_names() -> set[str]:
    """Names with one leading underscore that Ultralytics defines as functions, classes or attributes."""
    root = Path(ultralytics.__file__).parent
    found: set[str] = set()
    for folder in ("data", "engine", "models/yolo/detect", "nn", "utils"):
        for file in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                    found.add(node.attr)
    return {name for name in found if name.startswith("_") and not name.startswith("__")}


def private_reads(source: str, private: set[str]) -> set[str]:
    """Return the private names of Ultralytics that a source text reads: as an attribute, an import or a text.

    A name that the source defines for itself is not counted, unless it is read from `super()`.
    """
    tree = ast.parse(source)
    defined = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    defined |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (node.attr not in defined or ast.unparse(node.value) == "super()"):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ultralytics"):
            found |= {alias.name for alias in node.names}
    return found & private


def test_private_names_of_ultralytics_are_read_in_few_places(private_names: set[str]) -> None:
    read = {name: private_reads(MODULES[name].read_text(encoding="utf-8"), private_names) for name in MODULES}
    found = {name for name in read if read[name] and not {name, top(name)} & {*PRIVATE_READERS}}
    assert found == PRIVATE_READERS_LEFT, {name: sorted(read[name]) for name in found ^ PRIVATE_READERS_LEFT}
    assert {"_SafeLoad"} <= read["safe_loading.restricted"], "the test would prove nothing"


def test_every_kind_of_private_read_is_found() -> None:
    source = """
from ultralytics.nn.tasks import _one
class Mine:
    def _two(self):
        super()._two()
    def _three(self):
        self._three(), trainer._four()
replaced(engine, "_five", None)
"""
    names = {"_one", "_two", "_three", "_four", "_five", "_six"}
    assert private_reads(source, names) == names - {"_three", "_six"}


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
