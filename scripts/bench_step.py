#!/usr/bin/env python3
"""Time a distillation step against its parts and against Ultralytics' own, in one process, interleaved.

A step is: teacher's view, student forward, native loss, terms, backward, and what a term trains by itself. Rounds go
through all rows in turn, so that a slow moment of the machine hits all of them, and a ratio is the median over rounds
of that round's ratio. Weights are random and boxes are drawn. One thing depends on the teacher's weights: on a CPU,
terms weighted by objectness leave out points that weigh nothing, and a random teacher has none of those. `--teacher`
takes a trained one.

    python scripts/bench_step.py                                        yolov8s -> yolov8n, float32 student
    python scripts/bench_step.py --amp bf16 --pair 11 --imgsz 640
    python scripts/bench_step.py --recipes fgd mgd --batch 16 --boxes 40 --memory
    python scripts/bench_step.py --teacher yolov8s.pt --unlabeled both  half of each batch is unlabeled
    python scripts/bench_step.py --recipes fgd --profile                where one step's time goes
    python scripts/bench_step.py --teacher yolov8s.pt --rounds 5 --threads 2 --json yolo_kd/losses/costs.json
                                                                        the costs that `yolo-kd losses` shows

Columns: the bound of a row is student + teacher (only what that recipe reads of it) + the bare forward and backward of
the modules that the recipe trains besides the student or passes the student's features through, all of the same round.
Bare means: without any arithmetic of the loss, with gradients for the same parameters and inputs as in the step, and
backward twice where the step differentiates a gradient (the gradient penalty of `holistic`).
Ultralytics' step runs in float32 on a CPU, since it refuses bfloat16 there.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# oneDNN keeps the kernels of 1024 shapes, enough for a training, but not for all rows of a table in turn
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")

import torch
from torch import Tensor, nn
from ultralytics.cfg import get_cfg
from ultralytics.nn.distill_model import DistillationModel
from ultralytics.nn.tasks import DetectionModel

from yolo_kd.config.recipe import load_recipe, shipped_recipes
from yolo_kd.config.speed import SPEED_KEYS, Speed
from yolo_kd.config.unlabeled import MODES, UnlabeledOptions
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.sub_batches import teacher_reads
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.environment import release_memory, reused_memory
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector
from yolo_kd.unlabeled.dataset import UNLABELED_MARK
from yolo_kd.upstream.heads import head_split_points
from yolo_kd.upstream.pairing import pair_spec

PAIRS = {"8": ("yolov8s", "yolov8n"), "11": ("yolo11l", "yolo11n"), "26": ("yolo26s", "yolo26n")}
STUDENT, PLAIN, FAST, UPSTREAM = "student alone", "teacher, plain", "teacher, fast", "Ultralytics distill_model="


@dataclass
class Call:
    """One call of a module in a step, to be repeated on its own.

    Attributes:
        module: What was called.
        inputs: Its arguments.
        trained: For each of its parameters, whether it took part in the graph.
        autocast: Whether it ran under autocast.
        graph: Whether it ran with gradient.
        twice: Whether the gradient with respect to its inputs was differentiated in turn.
    """

    module: nn.Module
    inputs: tuple[Any, ...]
    trained: tuple[bool, ...]
    autocast: bool
    graph: bool
    twice: bool = False

    def __call__(self, dtype: torch.dtype) -> None:
        """Forward, and backward where the step goes backward."""
        device = self.inputs[0].device.type
        parameters = list(self.module.parameters())
        before = [p.requires_grad for p in parameters]
        self._train(self.trained)
        with torch.autocast(device, dtype=dtype, enabled=self.autocast), torch.set_grad_enabled(self.graph):
            output = self.module(*self.inputs)
        self._train(before)
        tensors = [t for t in (output if isinstance(output, tuple) else (output,)) if t.requires_grad]
        ones = [torch.ones_like(t) for t in tensors]
        if self.twice:
            inputs = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
            tensors = list(torch.autograd.grad(tensors, inputs, ones, create_graph=True))
            chosen = [p for p, yes in zip(parameters, self.trained, strict=True) if yes]
            torch.autograd.backward(tensors, [torch.ones_like(t) for t in tensors], inputs=chosen)
        elif tensors:
            torch.autograd.backward(tensors, ones)

    def _train(self, flags: Sequence[bool]) -> None:
        for parameter, flag in zip(self.module.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)


class Bench:
    """One student, one teacher, and what each row needs."""

    def __init__(self, args: argparse.Namespace, rows: list[str]):
        torch.manual_seed(0)
        self.device = torch.device(args.device)
        self.clock = time.process_time if args.cpu_time else time.perf_counter
        self.autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.amp)
        teacher_name, student_name = PAIRS[args.pair]
        detector = load_detector(args.teacher, role="teacher") if args.teacher else None
        nc = 80 if detector is None else len(detector.model.names)
        student = DetectionModel(f"{student_name}.yaml", nc=nc, verbose=False)
        student.args = get_cfg(overrides={"imgsz": args.imgsz})
        if detector is None:
            detector = LoadedDetector(DetectionModel(f"{teacher_name}.yaml", nc=nc, verbose=False), {}, Path(), "")
        teacher = detector.model.eval().requires_grad_(False)
        contiguous = self.device.type == "cpu" and self.autocast is None  # as in a training
        layout = torch.contiguous_format if contiguous else torch.channels_last
        self.student = student.to(self.device).to(memory_format=layout).train()
        self.upstream = None
        if UPSTREAM in rows:
            whole = DistillationModel(teacher_model=copy.deepcopy(teacher), student_model=copy.deepcopy(self.student))
            # Ultralytics lays the student out for a GPU only, and the teacher not at all
            layout = torch.contiguous_format if self.device.type == "cpu" else torch.preserve_format
            self.upstream = whole.to(self.device).to(memory_format=layout).train()
        if args.compile:
            self.student.compile()
        self.native = self.student.init_criterion()
        self.plain = copy.deepcopy(teacher).to(self.device) if PLAIN in rows else None
        self.speed = Speed.of({k: getattr(args, k.replace(".", "_"), None) for k in SPEED_KEYS})
        # unlabeled images come last
        self.unlabeled = UnlabeledOptions(("drawn",), mode=args.unlabeled) if args.unlabeled else None
        count = args.boxes * args.batch
        centre, size = torch.rand(count, 2) * 0.8 + 0.1, torch.rand(count, 2) * 0.2 + 0.02
        self.batch = {
            "img": torch.rand(args.batch, 3, args.imgsz, args.imgsz),
            "bboxes": torch.cat([centre, size], 1),
            "cls": torch.randint(0, nc, (count, 1)).float(),
            "batch_idx": torch.arange(args.batch).repeat_interleave(args.boxes).float(),
        }
        self.batch = {k: v.to(self.device) for k, v in self.batch.items()}
        labelled = self.batch["batch_idx"] < args.batch - args.batch // 2
        self.mixed = {k: v if k == "img" else v[labelled] for k, v in self.batch.items()}
        self.mixed[UNLABELED_MARK] = torch.arange(args.batch) >= args.batch - args.batch // 2
        self.distillations: dict[str, Distillation] = {}
        self.teachers: dict[tuple[frozenset[str], bool], Teacher] = {}
        self.calls: dict[str, list[Call]] = {}
        self.report = ""
        everything = frozenset({"scores", "boxes", "one2one"})
        pair = pair_spec(student, teacher, head_split_points(student), head_split_points(teacher))
        for name in rows:
            if name in (STUDENT, PLAIN, UPSTREAM):
                continue
            distiller = None if name == FAST else Distiller(load_recipe(name), pair).to(self.device).train()
            key = reads, split = (everything, False) if distiller is None else self._reading(distiller)
            if key not in self.teachers:
                frozen = Teacher(detector, self.device, self.speed, (), split, reads)
                frozen.on_settled = self._keep
                frozen(self.batch["img"])
                self.teachers[key] = frozen
            if distiller is None:
                self.fast = self.teachers[key]
                continue
            self.distillations[name] = distillation = Distillation(
                self.student, self.teachers[key], distiller, self.unlabeled
            )
            distillation.task_loss = self.native
            distillation.audits = False
            if not args.only_memory:
                self.calls[name] = self._record(name)

    def _keep(self, sentence: str) -> None:
        self.report = self.report or sentence

    def _reading(self, distiller: Distiller) -> tuple[frozenset[str], bool]:
        """Return what a recipe reads of the teacher's head, and whether it reads layers inside."""
        return teacher_reads(self.unlabeled, distiller.reads) & {"scores", "boxes", "one2one"}, distiller.head_split

    def _record(self, name: str) -> list[Call]:
        """Run one step of a recipe and note which modules besides student and teacher it calls, outermost ones only."""
        calls: list[Call] = []
        depth = 0
        distiller = self.distillations[name].distiller
        modules = [m for m in distiller.modules() if m is not distiller and not isinstance(m, nn.ModuleList)]
        modules = [m for m in modules if m not in [t.loss for t in distiller.terms.values()]]
        modules += [
            tail for term in distiller.terms.values() for pair in getattr(term.loss, "tails", ()) for tail in pair
        ]

        def enter(_module: nn.Module, _inputs: Any) -> None:
            nonlocal depth
            depth += 1

        def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal depth
            depth -= 1
            if depth == 0:
                copies = tuple(
                    x.detach().clone().requires_grad_(x.requires_grad) if isinstance(x, Tensor) else x for x in inputs
                )
                autocast = torch.is_autocast_enabled(self.device.type)
                trained = tuple(p.requires_grad for p in module.parameters())
                call = Call(module, copies, trained, autocast, torch.is_grad_enabled())
                calls.append(call)
                for tensor in output if isinstance(output, tuple) else (output,):
                    if tensor.requires_grad:
                        tensor.register_hook(lambda _: setattr(call, "twice", call.twice or torch.is_grad_enabled()))

        handles = [m.register_forward_pre_hook(enter) for m in modules]
        handles += [m.register_forward_hook(leave) for m in modules]
        self.step(name)
        for handle in handles:
            handle.remove()
        return calls

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def step(self, name: str) -> None:
        """Run one row."""
        batch = dict(self.batch)
        if name == PLAIN and self.plain is not None:
            with torch.no_grad():
                self.plain(batch["img"])
            return
        if name == FAST:
            self.fast(batch["img"])
            return
        if name == UPSTREAM and self.upstream is not None:
            with self._precision() if self.device.type == "cuda" else torch.autocast("cpu", enabled=False):
                loss, _ = self.upstream(batch)
            loss.sum().backward()
            return
        distillation = self.distillations.get(name)
        if distillation is None:
            with self._precision():
                loss, _ = self.native(self.student(batch["img"]), batch)
            loss.sum().backward()
            return
        batch = dict(self.mixed) if self.unlabeled else batch
        with self._precision():
            distillation.begin(batch)
            losses = distillation.loss(distillation.observe(self.student(batch["img"]), batch), progress=0.1)
        losses.total.backward()
        distillation.after_step()
        distillation.detach()

    def seconds(self, run: Callable[[], None]) -> float:
        """Time one run, from a quiet device to a quiet device."""
        self._wait()
        start = self.clock()
        run()
        self._wait()
        seconds = self.clock() - start
        for module in (self.student, self.upstream, *(d.distiller for d in self.distillations.values())):
            if module is not None:
                module.zero_grad()
        return seconds

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def round(self, rows: list[str]) -> dict[str, float]:
        """Time every row once, and the parts of the recipes' bounds."""
        times = {name: self.seconds(lambda name=name: self.step(name)) for name in rows}
        for key, teacher in self.teachers.items():
            times[f"teacher {label(*key)}"] = self.seconds(lambda teacher=teacher: teacher(self.batch["img"]) and None)
        dtype = self.autocast or torch.bfloat16
        for name, calls in self.calls.items():
            times[f"modules {name}"] = self.seconds(lambda calls=calls: [call(dtype) for call in calls] and None)
        return times

    def bound(self, name: str, times: dict[str, float]) -> float:
        """Return the lower bound of a recipe's step from one round's times."""
        teacher = label(*self._reading(self.distillations[name].distiller))
        return times[STUDENT] + times[f"teacher {teacher}"] + times[f"modules {name}"]


def label(reads: frozenset[str], split: bool) -> str:
    """Name what is read of a teacher; equal sets may list their members in different orders."""
    return " and ".join([*(sorted(reads) or ["features only"]), *(["head layers"] if split else [])])


def recipes_of_losses(recipes: Sequence[str]) -> dict[str, str]:
    """Return for each loss the recipe whose row gives its cost: the recipe of its name, or the first that has it."""
    terms = {recipe: [term.name for term in load_recipe(recipe).terms] for recipe in recipes}
    losses = sorted({name for names in terms.values() for name in names})
    return {loss: loss if loss in terms else next(r for r, names in terms.items() if loss in names) for loss in losses}


def peak_mb(device: str) -> int:
    """Return the most memory this process has held on the device, in MB."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated() // 2**20)
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says is inherited from the parent process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Use that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    yield
    torch.set_num_threads(before)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="*", help="names of shipped recipes; all by default")
    parser.add_argument("--pair", choices=PAIRS, default="8", help="family: 8 is yolov8s -> n, 11 is yolo11l -> n")
    parser.add_argument("--teacher", help="a trained teacher in place of the pair's random one")
    parser.add_argument("--unlabeled", choices=MODES, help="half of each batch is unlabeled, used in that mode")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--boxes", type=int, default=12, help="boxes in each image")
    parser.add_argument("--amp", choices=("fp32", "bf16", "fp16"), default="fp32", help="precision of the student")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="on a CPU; what torch takes by default")
    parser.add_argument("--compile", action="store_true", help="compile the student")
    for key in SPEED_KEYS:
        if key.startswith("teacher_"):
            parser.add_argument(f"--{key}", type=lambda t: {"true": True, "false": False}.get(t, t), help="as in train")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, where other work shares the cores")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--memory", action="store_true", help="also the peak memory, in a process for each row")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--profile", action="store_true", help="a torch.profiler table of one step of each recipe")
    parser.add_argument("--only-memory", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    args = parse()
    with reused_memory() if args.device == "cpu" else nullcontext(), threads(args.threads):
        if args.only_memory:
            bench = Bench(args, [args.only_memory])
            release_memory()  # what the models were made from is gone, as it is in a training before its first step
            for _ in range(2):
                bench.step(args.only_memory)
            print(peak_mb(args.device))
            return
        recipes = [*shipped_recipes()] if args.recipes is None else args.recipes
        if args.profile:
            profile(Bench(args, [STUDENT, FAST, *recipes]), recipes)
            return
        result = measure(args, recipes)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


def profile(bench: Bench, recipes: list[str]) -> None:
    """Print where the time of one step of each recipe goes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for name in recipes:
        bench.step(name)
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.device.type == "cuda" else [])
        with profiler(activities=activities) as record:
            bench.step(name)
        order = "self_cuda_time_total" if bench.device.type == "cuda" else "self_cpu_time_total"
        print(f"{name}\n{record.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)}")


def measure(args: argparse.Namespace, recipes: list[str]) -> dict[str, Any]:
    """Time all rows and print the table."""
    rows = [STUDENT, PLAIN, FAST, UPSTREAM, *recipes]
    bench = Bench(args, rows)
    bench.round(rows)  # the first pass of each is slower
    rounds = [bench.round(rows) for _ in range(args.rounds)]
    table = {}
    for name in rows:
        table[name] = {
            "median_s": statistics.median(r[name] for r in rounds),
            "of_parts": statistics.median(r[name] / (r[STUDENT] + r[FAST]) for r in rounds),
            "of_ultralytics": statistics.median(r[name] / r[UPSTREAM] for r in rounds),
        }
        if name in recipes:
            table[name]["of_bound"] = statistics.median(r[name] / bench.bound(name, r) for r in rounds)
            table[name]["modules_s"] = statistics.median(r[f"modules {name}"] for r in rounds)
    if args.memory:
        shared = [w for w in sys.argv[1:] if w != "--memory"]
        for name in rows:
            words = [sys.executable, __file__, *shared, "--only-memory", name]
            output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            table[name]["peak_mb"] = int(output.split()[-1])
    device = torch.cuda.get_device_name() if bench.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    teacher, student = PAIRS[args.pair]
    teacher = f"{Path(args.teacher).stem} (trained)" if args.teacher else teacher
    setting = (
        f"{teacher} -> {student}, {args.imgsz} px, batch {args.batch}"
        f"{f', half of it unlabeled ({args.unlabeled})' if args.unlabeled else ''}, {args.boxes} boxes per image, "
        f"student {args.amp}{' compiled' if args.compile else ''}, {device}, torch {torch.__version__}, "
        f"{args.rounds} rounds"
        f"{', processor time' if args.cpu_time else ''}"
    )
    print(f"{setting}\n{bench.report}\n")
    columns = ["row", "step, s", "of student + teacher", "of its bound", "of Ultralytics'"] + ["peak, MB"] * args.memory
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for name, row in table.items():
        bound = f"{row['of_bound']:.3f}" if "of_bound" in row else "-"
        cells = [name, f"{row['median_s']:.3f}", f"{row['of_parts']:.3f}", bound, f"{row['of_ultralytics']:.3f}"]
        print(f"| {' | '.join(cells + [str(row.get('peak_mb'))] * args.memory)} |", flush=True)
    reading = {}
    for key in bench.teachers:
        reading[label(*key)] = statistics.median(r[f"teacher {label(*key)}"] / r[FAST] for r in rounds)
    print("\nteacher by what is read of it: " + ", ".join(f"{k} {v:.2f}" for k, v in sorted(reading.items())))
    return {
        "setting": setting,
        "reading": reading,
        "machine": platform.processor(),
        "teacher": bench.report,
        "losses": {
            loss: {"recipe": recipe, "cost": round(table[recipe]["of_parts"] - 1, 3)}
            for loss, recipe in recipes_of_losses(recipes).items()
        },
        "rows": table,
    }


if __name__ == "__main__":
    main()
