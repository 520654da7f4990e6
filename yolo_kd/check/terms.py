"""What the terms do on real batches: how hard they pull, whether against the task, and what they cost."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.check.models import devices_of
from yolo_kd.check.report import Report, number
from yolo_kd.classes.mapping import ClassMap
from yolo_kd.config.recipe import Recipe
from yolo_kd.config.schedule import RATIO
from yolo_kd.config.terms import TermSpec
from yolo_kd.distillation.audit import AuditRow
from yolo_kd.distillation.distillation import Distillation
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.student_init import Inheritance
from yolo_kd.engine.components.distillation import DistillationComponent
from yolo_kd.engine.plan import Plan
from yolo_kd.engine.setup import Setup
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.errors import YoloKDError
from yolo_kd.losses.base import find
from yolo_kd.upstream.cpu_bf16 import cpu_bf16_autocast, is_cpu_bf16
from yolo_kd.upstream.heads import find_layers, head_of
from yolo_kd.upstream.pairing import pair_spec

BATCHES = 3
SECONDS = 20.0
"""Time for measuring gradients, and once more for measuring steps; at least one of each is measured."""
MOST_ON_CPU = 16
AGAINST = -0.2
"""Cosine below which a term works against the task."""
WEAKEST, STRONGEST = 0.01, 3.0
"""Shares of the task loss's gradient below which a term does nothing and above which it drowns the task loss."""


def usable_terms(report: Report, plan: Plan, student: Any, teacher: Any, classes: ClassMap) -> tuple[TermSpec, ...]:
    """Return the terms that this pair can serve; each of the others becomes a finding."""
    usable = []
    nc = len(classes.student)
    if head_of(student).nc != nc:  # training gives it a head for these classes
        student = DetectionModel(deepcopy(student.yaml), ch=teacher.yaml.get("channels", 3), nc=nc, verbose=False)
    for term in plan.recipe.terms:
        split = find(term.name).head_split
        try:
            s_taps = find_layers(student, term.student_layers, "student", split)
            t_taps = find_layers(teacher, term.teacher_layers, "teacher", split)
            pair = pair_spec(student, teacher, s_taps, t_taps, len(classes.matched))
            Distiller(Recipe(plan.recipe.name, (term,)), pair, classes)
        except YoloKDError as error:
            report.add("error", "terms", str(error), f"Change or remove the term '{term.name}'.")
        else:
            usable.append(term)
    return tuple(usable)


def check_terms(report: Report, setup: Setup, keys: Mapping[str, Any], folder: Path) -> None:
    """Set up a training as it would run, measure a few batches, and stop before its first step.

    Args:
        report: Receives findings, tables and numbers.
        setup: The training, with the terms to measure.
        keys: Ultralytics' keys of the training, `model` among them.
        folder: Where the trainer may write.
    """
    trainer = DistillationTrainer(overrides=_overrides(report, setup, keys, folder))
    host = trainer.component(DistillationComponent)
    try:
        with cpu_bf16_autocast() if is_cpu_bf16(vars(trainer.args), trainer.device.type) else nullcontext():
            trainer.prepare_to_train()
            if host.inheritance is not None:
                describe_start(report, host.inheritance)
            batches = _batches(trainer)
            rows, problems, count = _measure(trainer, batches)
            assert trainer.distillation is not None
            judge(report, trainer.distillation, rows, problems, count)
            _cost(report, trainer, next(batches), keys)
    except torch.OutOfMemoryError:
        text = f"a step with teacher and terms does not fit on the device at batch={trainer.args.batch}."
        report.add("error", "cost", text, f"Use batch={max(trainer.args.batch // 2, 1)} or a smaller imgsz.")
    finally:
        host.close()


def describe_start(report: Report, inheritance: Inheritance) -> None:
    """Report what the student takes over from its teacher before the first step."""
    start = f"{inheritance.summary[0].lower()}{inheritance.summary[1:]}"
    if inheritance.parameters:
        report.add("note", "start", f"{start}; inherit=false leaves the student as it is.")
        return
    reason = next(iter(inheritance.kept.values()), "nothing fits")
    advice = "A teacher of the student's own family, or a student with weights, is worth more than any loss."
    report.add("warning", "start", f"{start}, so the student starts as it is: {reason}.", advice)


def _overrides(report: Report, setup: Setup, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the keys of a training that is measured: as the user's, but it writes nothing and fits a short look."""
    kept = {k: v for k, v in keys.items() if k not in ("save_dir", "compile", "time", "save_period")}
    batch, share = _batches_of(keys)
    if batch is None:
        report.add("note", "cost", f"batch={keys['batch']} is found by the training itself; 16 was used here.")
    elif share != batch:
        report.add("note", "cost", f"measured on one of {len(devices_of(keys))} devices, with its share of the batch.")
    on_cpu = str(devices_of(keys)[0] or "").lower() == "cpu" or not torch.cuda.is_available()
    if on_cpu and share > MOST_ON_CPU:
        report.add(
            "note", "cost", f"measured with batch={MOST_ON_CPU} in place of {share}; time and memory are scaled."
        )
    return kept | {
        "batch": min(share, MOST_ON_CPU) if on_cpu else share,
        "device": devices_of(keys)[0],
        "project": str(folder),
        "name": "run",
        "exist_ok": True,
        "plots": False,
        "cache": False,
        "workers": 0,
        "task": "detect",
        "mode": "train",
        "kd": setup,
    }


def _batches_of(keys: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the batch size that was asked for, None where the training finds it, and one device's share of it."""
    batch = keys.get("batch", 16)
    if not isinstance(batch, int) or batch < 1:
        return None, 16
    return batch, max(batch // len(devices_of(keys)), 1)


def _batches(trainer: DistillationTrainer) -> Iterator[dict]:
    """Yield training batches that hold boxes, without end; the last resort is one without."""
    while True:
        found = False
        for batch in trainer.train_loader:
            if len(batch["bboxes"]):
                found = True
                yield batch
        if not found:
            yield batch


def _measure(
    trainer: DistillationTrainer, batches: Iterator[dict]
) -> tuple[dict[str, list[AuditRow]], dict[str, list[str]], int]:
    """Return the audit's rows by term over a few batches, and what is wrong with terms."""
    student, distillation = unwrap_model(trainer.model), trainer.distillation
    assert distillation is not None
    rows, problems = defaultdict(list), defaultdict(list)
    began, count = time.perf_counter(), 0
    while count < BATCHES and (not count or time.perf_counter() - began < SECONDS):
        with trainer.precision():
            batch = trainer.preprocess_batch(next(batches))
            found, wrong = distillation.measure(distillation.observe(student(batch["img"]), batch))
        for row in found:
            rows[row.term].append(row)
        for name, sentence in wrong.items():
            problems[name].append(sentence)
        count += 1
    return rows, problems, count


def judge(
    report: Report,
    distillation: Distillation,
    rows: Mapping[str, list[AuditRow]],
    problems: Mapping[str, list[str]],
    count: int,
) -> None:
    """Report what the terms do, and which of them do nothing, too much, or the opposite of the task.

    Args:
        report: Receives findings, a table and numbers.
        distillation: The step that was measured.
        rows: The audit of each measured batch, by term.
        problems: Sentences of the batches on which a term did nothing, by term.
        count: Number of batches.
    """
    distiller = distillation.distiller
    table = [("term", "weight", "value", "gradient", "to the task's", "cosine")]
    facts = []
    for name, term in distiller.terms.items():
        if name not in rows:
            report.add("note", "terms", f"the term '{name}' has weight 0 and is off.")
            continue
        middle = {
            k: statistics.median(getattr(r, k) for r in rows[name]) for k in ("value", "gradient", "share", "cosine")
        }
        weight = float(distiller.weight(name))
        shown = f"{weight:g}" if term.ratio is None else f"auto {weight:.3g}"
        table.append(
            (
                name,
                shown,
                f"{middle['value']:.4g}",
                f"{middle['gradient']:.4g}",
                _times(middle["share"]),
                number(middle["cosine"], 2),
            )
        )
        facts.append({"term": name, "weight": weight, "auto": term.ratio is not None, **middle})
        if name in problems:
            always = len(problems[name]) == len(rows[name])
            sentence = problems[name][0].replace("on the first batch", f"on {len(problems[name])} of {count} batches")
            report.add("error" if always else "warning", "terms", sentence)
            continue
        if middle["cosine"] < AGAINST:
            text = f"the term '{name}' pulls against the task: cosine {middle['cosine']:.2f} between their gradients."
            report.add("warning", "terms", text, f"Lower kd.{name}.weight, or let it fade with a schedule.")
        if term.ratio is None and not WEAKEST <= middle["share"] <= STRONGEST:
            what = "drowns the task" if middle["share"] > STRONGEST else "hardly pulls"
            text = f"the term '{name}' {what}: its gradient is {_times(middle['share'])} the task's."
            sane = weight * RATIO / middle["share"] if middle["share"] else weight
            advice = f"Set kd.{name}.weight={sane:.2g}, which makes it {RATIO:.0%}, or kd.{name}.weight=auto."
            report.add("warning", "terms", text, advice)
    report.tables[f"gradients into the student's neck, median of {count} training batches, at full strength"] = table
    report.facts["terms"] = facts


def _times(share: float) -> str:
    """Return a ratio of gradients, with as many digits as a person reads."""
    return f"{share:.0f} x" if share >= 10 else f"{share:.2g} x"


def _cost(report: Report, trainer: DistillationTrainer, raw: dict, keys: Mapping[str, Any]) -> None:
    """Time a step and weigh its memory, with and without teacher and terms."""
    student, distillation = unwrap_model(trainer.model), trainer.distillation
    assert distillation is not None
    distillation.audits = False

    def alone() -> None:
        with trainer.precision():
            batch = trainer.plain_batch(dict(raw))
            loss, _ = distillation.task_loss(student(batch["img"]), batch)
        loss.sum().backward()

    def distilled() -> None:
        with trainer.precision():
            batch = trainer.preprocess_batch(dict(raw))
            student.criterion.progress = 0.25  # past a warm-up
            loss, _ = student(batch)
        loss.sum().backward()

    ways = {"student alone": alone, "with teacher and terms": distilled}
    memory = {name: _memory(trainer, step) for name, step in ways.items()}  # warms up as well
    seconds: dict[str, list[float]] = defaultdict(list)
    began = time.perf_counter()
    while len(seconds["student alone"]) < 3 and (not seconds["student alone"] or time.perf_counter() - began < SECONDS):
        for name, step in ways.items():
            seconds[name].append(_seconds(trainer, step))
    weights = sum(t.numel() * t.element_size() for t in distillation.teacher.model.state_dict().values())
    cuda = trainer.device.type == "cuda"
    memory["student alone"] -= weights if cuda else 0
    memory["with teacher and terms"] += 0 if cuda else weights
    batch, share = _batches_of(keys)
    scale = share / trainer.args.batch
    time_of = {name: statistics.median(values) * scale for name, values in seconds.items()}
    size_of = {name: size * scale / 1e6 for name, size in memory.items()}
    steps = -(-len(trainer.train_loader.dataset) // (batch or share))
    minutes = {name: value * steps * trainer.epochs / 60 for name, value in time_of.items()}
    ratio = time_of["with teacher and terms"] / time_of["student alone"]
    kept = "peak memory" if cuda else "kept for backward"
    rows = [("", "step", kept, f"{trainer.epochs} epochs")]
    rows += [(n, f"{time_of[n] * 1e3:.0f} ms", f"{size_of[n]:.0f} MB", f"{minutes[n]:.0f} min") for n in ways]
    report.tables["cost, without data loading, optimiser and validation"] = rows
    report.facts["cost"] = {
        "batch": batch or share,
        "steps_per_epoch": steps,
        "step_ratio": ratio,
        **{n.replace(" ", "_"): {"seconds": time_of[n], "megabytes": size_of[n], "minutes": minutes[n]} for n in ways},
    }
    report.add("note", "cost", f"a step takes {ratio:.2f} times as long as without teacher.")


def _seconds(trainer: DistillationTrainer, step: Callable[[], None]) -> float:
    _settle(trainer)
    began = time.perf_counter()
    step()
    _settle(trainer)
    return time.perf_counter() - began


def _settle(trainer: DistillationTrainer) -> None:
    unwrap_model(trainer.model).zero_grad()
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)


def _memory(trainer: DistillationTrainer, step: Callable[[], None]) -> float:
    """Return bytes: the peak on a GPU, elsewhere what the graph keeps for the backward pass."""
    if trainer.device.type == "cuda":
        step()  # the first may only choose its kernels
        torch.cuda.reset_peak_memory_stats(trainer.device)
        step()
        return float(torch.cuda.max_memory_allocated(trainer.device))
    with _kept() as sizes:
        step()
    return float(sum(sizes.values()))


@contextmanager
def _kept() -> Iterator[dict[int, int]]:
    """Collect the storages that are kept for a backward pass, each once, by address."""
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes
