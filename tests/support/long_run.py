"""Train for 2,000 steps on 64 px images and note every 200 what the process holds, in FOLDER/samples.json.

    python tests/long_run.py TEACHER STUDENT DATA FOLDER

By step: resident bytes, live tensors, objects that the garbage collector knows. A process of its own, so that no other
test is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))
import psutil
import torch

import tests.conftest  # noqa: F401  (isolates Ultralytics before it is imported)
from yolo_kd.engine.trainer import DistillationTrainer

EPOCHS, BATCH, IMAGES = 250, 2, 16


def holding() -> tuple[int, int, int]:
    gc.collect()
    if hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps for later is not what the training holds
    known = gc.get_objects()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in known)
    return psutil.Process().memory_info().rss, tensors, len(known)


def main() -> None:
    teacher, student, data, folder = sys.argv[1:]
    recipe = {"losses": {"objectness": {}, "ultralytics": {}, "fgd": {}, "mgd": {}}}
    trainer = DistillationTrainer(
        overrides={
            "model": student,
            "teacher": teacher,
            "kd": recipe,
            "data": data,
            "project": folder,
            "imgsz": 64,
            "batch": BATCH,
            "nbs": BATCH,
            "epochs": EPOCHS,
            "workers": 0,
            "plots": False,
            "val": False,
            "save": False,
            "cache": "ram",
            "mosaic": 0.0,
            "optimizer": "AdamW",
        }
    )
    samples: dict[int, tuple[int, int, int]] = {}
    steps = [0]

    def count(_: Any) -> None:
        steps[0] += 1
        if steps[0] % 200 == 0:
            samples[steps[0]] = holding()

    trainer.add_callback("on_train_batch_end", count)
    trainer.train()
    assert steps[0] == EPOCHS * IMAGES // BATCH
    Path(folder, "samples.json").write_text(json.dumps(samples))


if __name__ == "__main__":
    main()
