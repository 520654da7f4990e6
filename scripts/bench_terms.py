#!/usr/bin/env python3
"""Time what each recipe adds to a training step of YOLOv8n under YOLOv8s, in one process, interleaved.

A step is: teacher's view, student forward, native loss, terms, backward. Rounds go through all recipes in turn, so that
a slow moment of the machine hits all of them; the figure is the median of the ratios, round by round, to the step
without terms (teacher included). Weights are random, boxes are drawn: speed does not depend on them.

    python scripts/bench_terms.py                                        every recipe, 320 px, batch 8
    python scripts/bench_terms.py --recipes fgd --imgsz 640 --batch 16 --boxes 40
    python scripts/bench_terms.py --memory                               peak memory too, a process for each recipe
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from ultralytics.cfg import get_cfg
from ultralytics.nn.tasks import DetectionModel

from yolo_kd.checkpoints import LoadedDetector
from yolo_kd.criterion import TEACHER_VIEW, DistillationCriterion
from yolo_kd.distiller import Distiller
from yolo_kd.losses.base import registered
from yolo_kd.recipe import load_recipe, shipped_recipes
from yolo_kd.taps import LayerTap, head_split_points, head_tails, pair_of
from yolo_kd.teacher import Teacher

BASE = "none"


class Step:
    """One student and one teacher, and a criterion for each recipe."""

    def __init__(self, args: argparse.Namespace, recipes: list[str]):
        torch.manual_seed(0)
        self.bf16 = args.bf16
        self.student = DetectionModel("yolov8n.yaml", nc=80, verbose=False).train()
        self.student.args = get_cfg()
        teacher = DetectionModel("yolov8s.yaml", nc=80, verbose=False)
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        self.teacher = Teacher(LoadedDetector(teacher, {}, Path("teacher"), ""), torch.device("cpu"), dtype)
        self.split = Teacher(
            LoadedDetector(teacher, {}, Path("teacher"), ""), torch.device("cpu"), dtype, head_split=True
        )
        pair = pair_of(self.student, teacher, head_split_points(self.student), head_split_points(teacher))
        self.distillers: dict[str, Distiller] = {}
        for name in recipes:
            self.distillers[name] = Distiller(load_recipe(name), pair).train()
            self.distillers[name].attach_teacher_head(head_tails(self.split.model))
        self.native = self.student.init_criterion()
        count = args.boxes * args.batch
        centre, size = torch.rand(count, 2) * 0.8 + 0.1, torch.rand(count, 2) * 0.2 + 0.02
        self.batch = {
            "img": torch.rand(args.batch, 3, args.imgsz, args.imgsz),
            "bboxes": torch.cat([centre, size], 1),
            "cls": torch.randint(0, 80, (count, 1)).float(),
            "batch_idx": torch.arange(args.batch).repeat_interleave(args.boxes).float(),
        }

    def __call__(self, name: str) -> float:
        """Run one step with a recipe, or with none, and return its seconds."""
        distiller = self.distillers.get(name)
        split = distiller is not None and any(t.loss.head_split for t in distiller.terms.values())
        self.student.criterion = self.native
        tap = LayerTap(head_split_points(self.student)) if split else None
        if distiller is not None:
            criterion = DistillationCriterion(self.student, distiller, native=self.native)
            criterion.layers, criterion.progress = tap, 0.1
            self.student.criterion = criterion
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            self.batch[TEACHER_VIEW] = (self.split if split else self.teacher)(self.batch["img"])
            loss, _ = self.student(self.batch)
        loss.sum().backward()
        seconds = time.perf_counter() - start
        self.student.zero_grad()
        if distiller is not None:
            distiller.zero_grad()
            criterion.close()
        return seconds


def peak_mb() -> int:
    """Return the most memory this process has held, in MB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says is inherited from the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", help="names of shipped recipes; all by default")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--boxes", type=int, default=12, help="boxes in each image")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--bf16", action="store_true", help="bfloat16 student and teacher")
    parser.add_argument("--memory", action="store_true", help="also the peak memory, in a process for each recipe")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--only-memory", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_memory:
        step = Step(args, [] if args.only_memory == BASE else [args.only_memory])
        for _ in range(2):
            step(args.only_memory)
        print(peak_mb())
        return
    recipes = args.recipes or [*shipped_recipes()]
    step = Step(args, recipes)
    names = [BASE, *recipes]
    for name in names:
        step(name)  # the first pass of each is slower
    rounds = [{name: step(name) for name in names} for _ in range(args.rounds)]
    result = {
        name: {
            "median_s": statistics.median(r[name] for r in rounds),
            "ratio": statistics.median(r[name] / r[BASE] for r in rounds),
        }
        for name in names
    }
    if args.memory:
        for name in names:
            words = [sys.executable, __file__, "--only-memory", name, "--imgsz", str(args.imgsz)]
            words += ["--batch", str(args.batch), "--boxes", str(args.boxes), *(["--bf16"] if args.bf16 else [])]
            result[name]["peak_mb"] = int(
                subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[-1]
            )
    precision = "bfloat16" if args.bf16 else "float32"
    print(
        f"YOLOv8s -> YOLOv8n, {args.imgsz} px, batch {args.batch}, {args.boxes} boxes per image, {precision}, "
        f"{torch.get_num_threads()} threads, {len(registered())} losses registered"
    )
    print(
        "| recipe | median step, s | ratio to the step without terms |" + (" peak memory, MB |" if args.memory else "")
    )
    print("|---|---|---|" + ("---|" if args.memory else ""))
    for name, row in result.items():
        tail = f" {row['peak_mb']:.0f} |" if args.memory else ""
        print(f"| {name} | {row['median_s']:.3f} | {row['ratio']:.3f} |{tail}")
    if args.json:
        args.json.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "rows": result}, indent=1)
        )


if __name__ == "__main__":
    main()
