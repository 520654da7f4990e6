"""`yolo_kd.losses` exports every public class and function that a loss file defines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import yolo_kd.losses

FOLDER = Path(yolo_kd.losses.__file__).parent
FILES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def public_names(source: str) -> list[str]:
    """Return the public classes and functions that a source text defines."""
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")]


@pytest.mark.parametrize("file", FILES)
def test_every_public_name_is_exported(file):
    names = public_names((FOLDER / f"{file}.py").read_text(encoding="utf-8"))
    assert names
    for name in names:
        exported = getattr(yolo_kd.losses, name, None)
        assert exported is not None, f"yolo_kd.losses must import {name} from yolo_kd.losses.{file}"
        # `cwd` and its like are a function and a module of the same name; the function wins
        assert exported.__module__ == f"yolo_kd.losses.{file}", f"yolo_kd.losses.{name} is something else"


def test_the_reader_finds_public_names_only():
    assert public_names("import a\nB = 1\ndef c(): ...\nclass D:\n    def e(self): ...\ndef _f(): ...") == ["c", "D"]
