"""What is under version control: small text files, no weights, nothing that ties it to one machine."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAX_BYTES = 1_000_000
UNWANTED = {".pt", ".pth", ".onnx", ".engine", ".safetensors", ".jpg", ".jpeg", ".png", ".zip", ".whl"}

# Written in pieces, so that this file does not find itself.
MACHINE_PATHS = re.compile("|".join([r"(?<![\w.~-])/" + "work/", r"(?<![\w.~-])/" + r"(home|Users|root)/\w"]))
REGISTRY = re.compile(
    "|".join(
        ["index" + "-url", "extra-" + "index", r"--find" + "-links", r"https?://[^\s\"']*/" + r"(simple|packages)/"]
    )
)


def tracked() -> list[Path]:
    """Return every file under version control that exists, or skip where this is no clone (an unpacked release)."""
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git clone")
    return [
        ROOT / os.fsdecode(name) for name in done.stdout.split(b"\0") if name and (ROOT / os.fsdecode(name)).is_file()
    ]


def texts() -> list[tuple[Path, str]]:
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" not in content:
            found.append((path.relative_to(ROOT), content.decode("utf-8")))
    return found


def test_no_large_file() -> None:
    large = {str(p.relative_to(ROOT)): p.stat().st_size for p in tracked() if p.stat().st_size > MAX_BYTES}
    assert not large


def test_no_weights_exports_or_photographs() -> None:
    assert not [str(p.relative_to(ROOT)) for p in tracked() if p.suffix.lower() in UNWANTED]


@pytest.mark.parametrize(("what", "pattern"), [("a path of one machine", MACHINE_PATHS), ("a registry", REGISTRY)])
def test_nothing_ties_it_to_one_machine(what: str, pattern: re.Pattern[str]) -> None:
    hits = [
        f"{path}:{number}: {line.strip()[:100]}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if pattern.search(line)
    ]
    assert not hits, f"these lines name {what}: " + "; ".join(hits)


def test_every_text_file_ends_in_one_newline() -> None:
    wrong = [str(path) for path, text in texts() if text and (not text.endswith("\n") or text.endswith("\n\n"))]
    assert not wrong


def test_scripts_can_be_started() -> None:
    for name in ("scripts/test", "scripts/check", ".ci/run"):
        assert os.access(ROOT / name, os.X_OK), f"{name} is not executable"
