"""Broken installations and processors that cannot do what was asked are named before any work starts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torchvision

from tests.conftest import ROOT
from yolo_kd import environment
from yolo_kd.cli import main
from yolo_kd.environment import _of_libc, release_memory, reused_memory
from yolo_kd.errors import SetupError


def test_a_matching_pair_passes() -> None:
    environment.check_torchvision()


@pytest.mark.parametrize("error", [RuntimeError("operator torchvision::nms does not exist"), ImportError("no module")])
def test_torchvision_of_another_torch(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a CPU-only torch beside a torchvision built for CUDA looks like."""

    def broken(*_args: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    with pytest.raises(SetupError, match=r"torchvision \S+ does not work with torch .*pip install"):
        environment.check_torchvision()


def test_it_is_said_before_any_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shapes: object
) -> None:
    def broken(*_args: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", broken)
    assert main(["train", "kd=none", "student=yolov8n.yaml", f"data={shapes}"]) == 2
    assert "does not work with torch" in capsys.readouterr().err


def test_bfloat16_needs_a_processor_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
    assert not environment.cpu_has_bf16()
    with pytest.raises(SetupError, match=r"Use amp=False"):
        environment.check_cpu_bf16()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    environment.check_cpu_bf16()


FAULTS = """
import resource
import torch
from yolo_kd.environment import reused_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.ones(2**22)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

outside = faults()
with reused_memory():
    faults()
    inside = faults()
print(outside, inside, faults())
"""


@pytest.mark.skipif(_of_libc("mallopt") is None, reason="needs glibc")
@pytest.mark.e2e
def test_memory_is_used_again_for_the_duration() -> None:
    """A buffer that is freed and allocated again costs page faults, but not inside.

    In a process of its own: what other tests have freed is memory that is there already.
    """
    found = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    outside, inside, after = (int(word) for word in found.stdout.split())
    assert inside < outside / 5
    assert after > 5 * inside  # as it was


def test_memory_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_of_libc", lambda _: None)
    with reused_memory():
        release_memory()
