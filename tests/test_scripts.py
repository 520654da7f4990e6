"""The scripts that the documentation quotes still run: their help, and the short ones in earnest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.models import narrow_checkpoint

SCRIPTS = sorted(p.name for p in (ROOT / "scripts").glob("*.py"))


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "scripts" / words[0]), *words[1:]]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.e2e
@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str) -> None:
    found = run(name, "--help")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()


@pytest.mark.e2e
def test_cost_of_recipes() -> None:
    found = run("bench_step.py", "--recipes", "objectness", "fgd", "--imgsz", "64", "--batch", "2", "--rounds", "1")
    assert found.returncode == 0, found.stderr
    assert [line.split("|")[1].strip() for line in found.stdout.splitlines()[3:]] == ["none", "objectness", "fgd"]


@pytest.mark.e2e
def test_strength_of_losses(shapes: Path, tmp_path: Path) -> None:
    teacher = narrow_checkpoint("yolov8n", tmp_path)
    words = ["--teacher", str(teacher), "--student", str(teacher), "--data", str(shapes), "--steps", "1"]
    found = run("measure_strength.py", *words, "--measure", "1", "--settings", "64x4", "--losses", "at", "crosskd")
    assert found.returncode == 0, found.stderr
    assert "| crosskd |" in found.stdout


@pytest.mark.e2e
def test_picture_of_masks(shapes: Path, tmp_path: Path) -> None:
    teacher, out = narrow_checkpoint("yolov8n", tmp_path), tmp_path / "masks.svg"
    found = run("gallery.py", "--teacher", str(teacher), "--data", str(shapes.parent), "--out", str(out))
    assert found.returncode == 0, found.stderr
    assert out.read_text().startswith("<?xml")
