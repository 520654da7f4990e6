"""Exports checkpoints to ONNX and measures their latency."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from ultralytics import YOLO

from yolo_kd.compare.runs import write_text
from yolo_kd.safe_loading.checkpoint import sha256
from yolo_kd.safe_loading.restricted import quiet, restricted_loading

# seconds for all files, rounds of one image per file
_BUDGET, _WARM_UP, _MIN_ROUNDS, _MAX_ROUNDS = 10.0, 5, 15, 500


def export_onnx(checkpoint: Path, file: Path, imgsz: int, trust: bool) -> Path:
    """Export a checkpoint to ONNX, unless an earlier call has done so.

    Args:
        checkpoint: The checkpoint.
        file: The ONNX file. A JSON file next to it holds the hash of its checkpoint.
        imgsz: Side of the input in pixels.
        trust: Load the checkpoint without restriction.
    """
    note = file.with_suffix(".json")
    made_from = {"checkpoint_sha256": sha256(checkpoint), "imgsz": imgsz}
    if file.exists() and note.exists() and json.loads(note.read_text(encoding="utf-8")) == made_from:
        return file
    file.parent.mkdir(parents=True, exist_ok=True)
    copy = file.with_suffix(".pt")  # Ultralytics writes next to the checkpoint
    shutil.copyfile(checkpoint, copy)
    try:
        with restricted_loading(trust), quiet():
            YOLO(str(copy), task="detect").export(format="onnx", imgsz=imgsz, device="cpu", verbose=False)
    finally:
        copy.unlink()
    write_text(note, json.dumps(made_from) + "\n")
    return file


def onnx_latency(
    files: Mapping[str, Path], budget: float = _BUDGET, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Return the median milliseconds that each ONNX file takes for one image on one thread of the CPU.

    The files take turns in an order that changes from round to round, so that other load on the machine, even a regular
    one, affects all of them alike.

    Args:
        files: ONNX files by name.
        budget: About how many seconds to spend; there are at least 15 rounds.
        clock: Returns seconds; replaced in tests.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    generator = np.random.default_rng(0)
    sessions = {}
    for name, file in files.items():
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        first = session.get_inputs()[0]
        shape = [d if isinstance(d, int) else 1 for d in first.shape]
        kind = np.float16 if "float16" in first.type else np.float32
        sessions[name] = (session, {first.name: generator.random(shape).astype(kind)})
    times: dict[str, list[float]] = {name: [] for name in sessions}

    def one_round() -> None:
        for name in generator.permutation(list(sessions)):
            session, feed = sessions[name]
            began = clock()
            session.run(None, feed)
            times[name].append(clock() - began)

    for _ in range(_WARM_UP):
        one_round()
    spent = sum(map(sum, times.values())) / _WARM_UP
    for found in times.values():
        found.clear()
    for _ in range(min(max(int(budget / max(spent, 1e-9)), _MIN_ROUNDS), _MAX_ROUNDS)):
        one_round()
    return {name: round(statistics.median(found) * 1000, 3) for name, found in times.items()}
