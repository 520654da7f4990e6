#!/usr/bin/env python3
r"""Compare the cost of a training step between two checkouts, in processor time.

    python scripts/compare_checkouts.py BEFORE AFTER --material DIR
    python scripts/compare_checkouts.py BEFORE AFTER --material DIR --case unlabeled_both

Each pair starts one training process for each checkout. The two take turns: one trains a step while the other waits,
so that both meet the same load of the machine. The first steps of each process are not counted. The ratio of a pair is
the median over its rounds. The result is the mean ratio of the pairs and its 95 % interval. Compare a checkout with
itself to see how precise the method is.

The measured time is processor time in one thread, from the end of one step to the end of the next: loading, teacher,
student, losses, backward, optimiser.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record_steps import SETTINGS, keys_of, make_material

UNCOUNTED = 3  # steps of each process


class Worker:
    """A process that trains with one checkout and waits after each step."""

    def __init__(self, checkout: Path, args: argparse.Namespace):
        words = [sys.executable, __file__, "--worker", args.case, "--material", str(args.material)]
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process: Any = subprocess.Popen([*words, "--imgsz", str(args.imgsz)], env=environment, **pipes)

    def step(self) -> float:
        """Train one step and return its processor time in seconds."""
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"the training process ended with exit code {self.process.wait()}")

    def close(self) -> None:
        """End the training, which stops when its standard input is closed."""
        self.process.communicate()


def work(args: argparse.Namespace) -> None:
    """Train without end, one step for each line of the standard input."""
    from yolo_kd import DistillationTrainer

    endless = {"epochs": 10**6, "save": False, "patience": 0, "imgsz": args.imgsz, "cache": "ram", "mosaic": 0.0}
    started = 0.0

    def wait(_: Any) -> None:
        nonlocal started
        if not sys.stdin.readline():
            sys.exit()
        started = time.process_time()

    def report(trainer: Any) -> None:
        print(f"\nseconds {time.process_time() - started}", flush=True)
        wait(trainer)

    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(overrides={**keys_of(args.worker, args.material), **endless, "project": folder})
        trainer.add_callback("on_train_start", wait)
        trainer.add_callback("on_train_batch_end", report)
        trainer.train()


def pair(args: argparse.Namespace) -> tuple[float, float]:
    """Return the median seconds of a step before, and the median ratio of after to before, of two new processes."""
    workers = [Worker(checkout, args) for checkout in args.checkouts]
    try:
        for _ in range(UNCOUNTED):
            for worker in workers:
                worker.step()
        before, ratios = [], []
        for number in range(args.rounds):
            order = workers if number % 2 == 0 else workers[::-1]
            spent = {id(worker): worker.step() for worker in order}
            before.append(spent[id(workers[0])])
            ratios.append(spent[id(workers[1])] / before[-1])
    finally:
        for worker in workers:
            worker.close()
    return statistics.median(before), statistics.median(ratios)


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Return the geometric mean of at least two ratios and its 95 % interval by Student's t."""
    logs = [math.log(r) for r in ratios]
    free, z = len(logs) - 1, 1.959964
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)  # expansion in 1 / free
    mean, half = statistics.mean(logs), t * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", type=Path, nargs="*", metavar="CHECKOUT", help="before and after")
    parser.add_argument("--material", type=Path, required=True, help="folder of images and models, made if missing")
    parser.add_argument("--case", default="default", help="case of record_steps.py")
    parser.add_argument("--imgsz", type=int, default=160, help="height and width of the images in pixels")
    parser.add_argument("--pairs", type=int, default=20, help="pairs of processes")
    parser.add_argument("--rounds", type=int, default=20, help="counted rounds of a pair")
    parser.add_argument("--json", type=Path, help="file for the ratios")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker is None and (len(args.checkouts) != 2 or args.pairs < 2):
        parser.error("needs two checkouts and at least two pairs")
    args.material = args.material.resolve()
    args.checkouts = [checkout.resolve() for checkout in args.checkouts]
    return args


def main() -> None:
    """Print the ratio."""
    args = parse()
    if args.worker is not None:
        work(args)
        return
    from demo import offline

    with tempfile.TemporaryDirectory() as settings:
        os.environ["YOLO_VERBOSE"] = "false"
        offline(Path(settings))
        make_material(args.material, teacher_width=0.5, student_width=0.25, imgsz=args.imgsz)
        found = []
        for number in range(args.pairs):
            found.append(pair(args))
            print(f"pair {number + 1}: {found[-1][0]:.3f} s before, ratio {found[-1][1]:.4f}", flush=True)
    seconds, ratios = statistics.median(s for s, _ in found), [r for _, r in found]
    mean, low, high = interval(ratios)
    setting = f"{args.case}, {args.imgsz} px, {SETTINGS['optimizer']}, {args.pairs} pairs of {args.rounds} rounds"
    print(f"{setting}: step {seconds:.3f} s before; after / before {mean:.4f}, 95 % interval {low:.4f} to {high:.4f}")
    if args.json:
        args.json.write_text(json.dumps({"setting": setting, "ratios": ratios, "interval": [low, high]}, indent=1))


if __name__ == "__main__":
    main()
