"""Latency: files are exported once and take turns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.models import narrow_checkpoint
from yolo_kd.compare.latency import export_onnx, onnx_latency


@pytest.mark.slow
def test_latency_is_taken_in_turns(tmp_path: Path) -> None:
    model = narrow_checkpoint("yolov8n", tmp_path)
    file = export_onnx(model, tmp_path / "onnx" / "a.onnx", 64, trust=False)
    written = file.stat().st_mtime_ns
    assert export_onnx(model, file, 64, trust=False).stat().st_mtime_ns == written
    assert sorted(p.name for p in file.parent.iterdir()) == ["a.json", "a.onnx"]
    ticks = iter(range(100_000))
    found = onnx_latency({"a": file, "b": file}, clock=lambda: next(ticks) * 0.25)
    assert found == {"a": 250.0, "b": 250.0}
    assert onnx_latency({}) == {}
