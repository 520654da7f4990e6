"""The scripts that the documentation quotes still run: their help, and the short ones in earnest."""

from __future__ import annotations

import json
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
def test_cost_of_recipes(tmp_path: Path) -> None:
    recipes = ["objectness", "crosskd", "mgd"]
    words = ["--imgsz", "64", "--batch", "2", "--rounds", "1", "--json", str(tmp_path / "figures.json")]
    found = run("bench_step.py", "--recipes", *recipes, *words)
    assert found.returncode == 0, found.stderr
    rows = ["student alone", "teacher, plain", "teacher, fast", "Ultralytics distill_model=", *recipes]
    assert [line.split("|")[1].strip() for line in found.stdout.splitlines() if line.startswith("| ")][1:] == rows
    figures = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert figures["Ultralytics distill_model="]["of_ultralytics"] == 1
    assert figures["mgd"]["modules_s"] > figures["objectness"]["modules_s"]  # generators against nothing


@pytest.mark.e2e
def test_profile_of_a_step() -> None:
    found = run("bench_step.py", "--recipes", "fgd", "--imgsz", "64", "--batch", "2", "--profile")
    assert found.returncode == 0, found.stderr
    assert "PairMoments" in found.stdout


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
