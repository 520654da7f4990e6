r"""Measure how hard each loss pulls on the student: its gradient into the neck over the task loss's.

This is where the STRENGTH constant in each file of `yolo_kd/losses` comes from. Student and adapters train together for
`--steps` steps, each loss with adapters of its own on detached student features, so that losses do not disturb each
other or the student. Then, with adapters settled, the gradient of every term at weight 1.0 is compared with the task
loss's gradient at the features that leave the neck, at each image size and batch size.

    python scripts/measure_strength.py --teacher runs/bccd/teacher/weights/best.pt --student yolov8n.pt \\
        --data runs/bccd/data/data.yaml --out strength.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import LOGGER

from yolo_kd.config.recipe import load_recipe
from yolo_kd.config.speed import Speed
from yolo_kd.distillation.audit import audit
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.observer import Observation
from yolo_kd.losses.base import registered
from yolo_kd.safe_loading.checkpoint import load_detector
from yolo_kd.structures import DetectorOutputs, LossInputs
from yolo_kd.upstream.heads import head_tails


def main() -> None:
    """Run the measurement that the command line describes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="checkpoint trained on the data set")
    parser.add_argument("--student", default="yolov8n.pt", help="checkpoint or model YAML")
    parser.add_argument("--data", required=True, help="data yaml")
    parser.add_argument("--losses", nargs="*", help="names of losses; all by default")
    parser.add_argument("--steps", type=int, default=100, help="steps in which adapters settle")
    parser.add_argument("--measure", type=int, default=4, help="batches measured per setting")
    parser.add_argument("--settings", nargs="*", default=["320x4", "320x16", "640x4", "640x16"], help="pixels x batch")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast for both models")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    args = parser.parse_args()
    torch.manual_seed(0)
    bench = Bench(args)
    bench.settle(args.steps)
    result = {}
    for setting in args.settings:
        size, batch = (int(x) for x in setting.split("x"))
        result[setting] = bench.measure(size, batch, args.measure)
    names = list(result[args.settings[0]])
    print("| loss | " + " | ".join(f"{s.replace('x', ' px, batch ')}" for s in args.settings) + " |")
    print("|---" * (len(args.settings) + 1) + "|")
    for name in names:
        print(f"| {name} | " + " | ".join(f"{result[s][name]['share']:.2f}" for s in args.settings) + " |")
    if args.out:
        args.out.write_text(
            json.dumps({"arguments": {k: str(v) for k, v in vars(args).items()}, "shares": result}, indent=1)
        )


class Bench:
    """One student, one teacher, and one distiller for each loss."""

    def __init__(self, args: argparse.Namespace):
        self.data = check_det_dataset(args.data)
        self.bf16 = args.bf16
        teacher = load_detector(args.teacher, role="teacher")
        start = load_detector(args.student, role="student", nc=self.data["nc"])
        self.student = DetectionModel(start.model.yaml, nc=self.data["nc"], verbose=False)
        self.student.load(start.model, verbose=False)
        from ultralytics.cfg import get_cfg

        self.student.args = get_cfg()
        self.student.names = self.data["names"]
        for name, p in self.student.named_parameters():
            p.requires_grad = ".dfl" not in name
        speed = Speed(teacher_precision="bf16" if args.bf16 else "fp32")
        # these two read all that any loss reads: layers inside the head, and the label assignment
        self.distillation = Distillation.build(
            self.student, teacher, {"losses": {"crosskd": {}, "bckd": {}, "ultralytics": {}}}, speed=speed
        )
        pair = self.distillation.distiller.pair
        self.distillers: dict[str, Distiller] = {}
        for name, loss in registered().items():
            if (args.losses and name not in args.losses) or (loss.needs_bins and not pair.same_bins):
                continue
            distiller = Distiller(load_recipe({"losses": {name: {}}}), pair).train()
            distiller.attach_teacher_head(head_tails(teacher.model))
            self.distillers[name] = distiller

    def batches(self, size: int, batch: int) -> Iterator[dict]:
        """Yield training batches as Ultralytics would, mosaic and all, without end."""
        from ultralytics.cfg import get_cfg

        cfg = get_cfg(overrides={"imgsz": size, "cache": False, "task": "detect"})
        dataset = build_yolo_dataset(cfg, self.data["train"], batch, self.data, mode="train", stride=32)
        loader = build_dataloader(dataset, batch, 0, shuffle=True, rank=-1)
        while True:
            for item in loader:
                item["img"] = item["img"].float() / 255
                yield item

    def observe(self, batch: dict) -> Observation:
        """Run both models and the task loss on one batch."""
        self.distillation.begin(batch)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            predictions = self.student(batch["img"])
        return self.distillation.observe(predictions, batch)

    def inputs(self, distiller: Distiller, seen: Observation, student: DetectorOutputs) -> dict[str, LossInputs]:
        """Return what the loss of a distiller reads of an observation, with the student's outputs as given."""
        targets = next(iter(seen.acting[0].inputs.values())).targets
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.bf16):
            return distiller.inputs(student, seen.teacher, targets)

    def settle(self, steps: int) -> None:
        """Train the student on its own loss and every adapter on its own term."""
        self.student.train()
        groups = [{"params": [p for p in self.student.parameters() if p.requires_grad], "lr": 1e-3}]
        groups += [{"params": d.trained_parameters(), "lr": 1e-3} for d in self.distillers.values()]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]])
        began = time.time()
        for step, batch in zip(range(steps), self.batches(320, 4), strict=False):
            seen = self.observe(batch)
            student = detached(seen.student)
            task = seen.task_loss.sum() / seen.images
            total = task * 4
            for distiller in self.distillers.values():
                if distiller.trained_parameters():  # terms without modules have nothing to settle
                    total = total + sum(distiller(self.inputs(distiller, seen, student)).values())
            optimizer.zero_grad()
            total.backward()
            for group in optimizer.param_groups:
                torch.nn.utils.clip_grad_norm_(group["params"], 10.0)
            optimizer.step()
            if step % 20 == 0:
                LOGGER.info(f"step {step}: task loss {task.item():.3f}, {time.time() - began:.0f} s")

    def measure(self, size: int, batch: int, count: int) -> dict[str, dict[str, float]]:
        """Return median value, gradient and share of each loss over a few batches."""
        rows: dict[str, list] = {name: [] for name in self.distillers}
        for _, item in zip(range(count), self.batches(size, batch), strict=False):
            seen = self.observe(item)
            task = seen.task_loss.sum() / seen.images
            for name, distiller in self.distillers.items():
                rows[name] += audit(task, seen.student, distiller, self.inputs(distiller, seen, seen.student))
        LOGGER.info(f"measured {size} px, batch {batch}")
        return {
            name: {key: statistics.median(getattr(r, key) for r in found) for key in ("value", "gradient", "share")}
            for name, found in rows.items()
        }


def detached(outputs: DetectorOutputs) -> DetectorOutputs:
    """Return outputs without gradient, so that no loss trains the student."""
    return replace(
        outputs,
        features=tuple(f.detach() for f in outputs.features),
        scores=outputs.scores.detach(),
        boxes=outputs.boxes.detach(),
        layers={name: layer.detach() for name, layer in outputs.layers.items()},
    )


if __name__ == "__main__":
    main()
