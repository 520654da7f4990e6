"""Measures the terms on real batches: strength, direction against the task loss, and cost."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils.torch_utils import unwrap_model

from yolo_kd.check.models import devices_of
from yolo_kd.check.report import Report
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
"""Time for measuring gradients, and again for measuring steps; at least one of each is measured."""
MOST_ON_CPU = 16
AGAINST = -0.2
"""Cosine below which a term works against the task loss."""
WEAKEST, STRONGEST = 0.01, 3.0
"""Shares of the task loss's gradient below which a term is too weak and above which it is too strong."""


def usable_terms(report: Report, plan: Plan, student: Any, teacher: Any, classes: ClassMap) -> tuple[TermSpec, ...]:
    """Return the terms that this pair supports; each of the others becomes a finding."""
    usable = []
    nc = len(classes.student)
    if head_of(student).nc != nc:  # training gives it a head for these classes
        student = DetectionModel(deepcopy(student.yaml), ch=teacher.yaml.get("channels", 3), nc=nc, verbose=False)
    for term in plan.recipe.terms:
        split = find(term.name).head_split
        try:
            s_layers = find_layers(student, term.student_layers, "student", split)
            t_layers = find_layers(teacher, term.teacher_layers, "teacher", split)
            pair = pair_spec(student, teacher, s_layers, t_layers, len(classes.matched))
            Distiller(Recipe(plan.recipe.name, (term,)), pair, classes)
        except YoloKDError as error:
            report.add("error", "terms", str(error), f"Change or remove the term '{term.name}'.")
        else:
            usable.append(term)
    return tuple(usable)


def check_terms(report: Report, setup: Setup, keys: Mapping[str, Any], folder: Path) -> None:
    """Set up the real training, measure a few batches, and stop before the first step.

    Args:
        report: Receives findings, tables and numbers.
        setup: The training, with the terms to measure.
        keys: Ultralytics' keys of the training, including `model`.
        folder: The folder that the trainer may write to.
    """
    trainer = DistillationTrainer(overrides=_overrides(report, setup, keys, folder))
    host = trainer.component(DistillationComponent)
    try:
        with cpu_bf16_autocast() if is_cpu_bf16(vars(trainer.args), trainer.device.type) else nullcontext():
            trainer.prepare_to_train()
            if host.inheritance is not None:
                describe_start(report, host.inheritance)
            batches = _batches(trainer)
            rows, problems = _measure(trainer, batches)
            assert trainer.distillation is not None
            judge(report, trainer.distillation, rows, problems)
            _cost(report, trainer, next(batches), keys)
    except torch.OutOfMemoryError:
        text = (
            f"a step with teacher and terms does not fit into the memory of the device at batch={trainer.args.batch}."
        )
        report.add("error", "cost", text, f"Use batch={max(trainer.args.batch // 2, 1)} or a smaller imgsz.")
    finally:
        host.close()


def describe_start(report: Report, inheritance: Inheritance) -> None:
    """Report what the student copies from its teacher before the first step."""
    start = f"{inheritance.summary[0].lower()}{inheritance.summary[1:]}"
    if inheritance.parameters:
        report.add("note", "start", f"{start}; inherit=false leaves the student unchanged.")
        return
    reason = next(iter(inheritance.kept.values()), "nothing fits")
    advice = "Use a teacher of the student's family, or a student with weights: either helps more than any loss."
    report.add("warning", "start", f"{start}, so the student starts unchanged: {reason}.", advice)


def _overrides(report: Report, setup: Setup, keys: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return the user's keys, changed for a short measurement without files."""
    kept = {k: v for k, v in keys.items() if k not in ("save_dir", "compile", "time", "save_period")}
    batch, share = _batches_of(keys)
    if batch is None:
        report.add("note", "cost", f"batch={keys['batch']} is chosen by the training; measured with 16.")
    elif share != batch:
        report.add("note", "cost", f"measured on one of {len(devices_of(keys))} devices with its share of the batch.")
    on_cpu = str(devices_of(keys)[0] or "").lower() == "cpu" or not torch.cuda.is_available()
    if on_cpu and share > MOST_ON_CPU:
        text = f"measured with batch={MOST_ON_CPU} instead of {share}; time and memory are scaled."
        report.add("note", "cost", text)
    kept |= {"batch": min(share, MOST_ON_CPU) if on_cpu else share, "device": devices_of(keys)[0], "workers": 0}
    kept |= {"project": str(folder), "name": "run", "exist_ok": True, "plots": False, "cache": False}
    return kept | {"task": "detect", "mode": "train", "kd": setup}


def _batches_of(keys: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the requested batch size, None if the training chooses it, and one device's share of it."""
    batch = keys.get("batch", 16)
    if not isinstance(batch, int) or batch < 1:
        return None, 16
    return batch, max(batch // len(devices_of(keys)), 1)


def _batches(trainer: DistillationTrainer) -> Iterator[dict]:
    """Yield training batches without end: those with boxes, or where no batch of an epoch has any, the last one."""
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
) -> tuple[dict[str, list[AuditRow]], dict[str, list[str]]]:
    """Return the audit's rows and the problems of each term over a few batches."""
    student, distillation = unwrap_model(trainer.model), trainer.distillation
    assert distillation is not None
    rows, problems = defaultdict(list), defaultdict(list)
    for _ in _rounds():
        with trainer.precision():
            batch = trainer.preprocess_batch(next(batches))
            found, wrong = distillation.measure(distillation.observe(student(batch["img"]), batch))
        for row in found:
            rows[row.term].append(row)
        for name, sentence in wrong.items():
            problems[name].append(sentence)
    return rows, problems


def _rounds() -> Iterator[int]:
    """Count `BATCHES` measurements, fewer if they take longer than `SECONDS`."""
    ends = time.perf_counter() + SECONDS
    for count in range(BATCHES):
        yield count
        if time.perf_counter() > ends:
            break


def judge(
    report: Report,
    distillation: Distillation,
    rows: Mapping[str, list[AuditRow]],
    problems: Mapping[str, list[str]],
) -> None:
    """Report the strength of each term, and terms that are too weak, too strong, or against the task loss.

    Args:
        report: Receives findings, a table and numbers.
        distillation: The measured step.
        rows: The audit of each measured batch, by term.
        problems: A sentence for each batch on which a term had no effect, by term.
    """
    distiller = distillation.distiller
    count = max(map(len, rows.values()), default=0)
    table = [("term", "weight", "value", "gradient", "to the task loss's", "cosine")]
    facts = []
    for name, term in distiller.terms.items():
        if name not in rows:
            report.add("note", "terms", f"the term '{name}' has weight 0 and is off.")
            continue
        numbers = ("value", "gradient", "share", "cosine")
        value, gradient, share, cosine = (statistics.median(getattr(r, k) for r in rows[name]) for k in numbers)
        weight = float(distiller.weight(name))
        shown = f"{weight:g}" if term.ratio is None else f"auto {weight:.3g}"
        table.append((name, shown, f"{value:.4g}", f"{gradient:.4g}", _times(share), f"{cosine:.2f}"))
        medians = dict(zip(numbers, (value, gradient, share, cosine), strict=True))
        facts.append({"term": name, "weight": weight, "auto": term.ratio is not None, **medians})
        if name in problems:
            always = len(problems[name]) == len(rows[name])
            sentence = problems[name][0].replace("on the first batch", f"on {len(problems[name])} of {count} batches")
            report.add("error" if always else "warning", "terms", sentence)
            continue
        if cosine < AGAINST:
            text = f"the term '{name}' works against the task loss: the cosine of their gradients is {cosine:.2f}."
            report.add("warning", "terms", text, f"Lower kd.{name}.weight, or let it fade with a schedule.")
        if term.ratio is None and not WEAKEST <= share <= STRONGEST:
            what = "too strong" if share > STRONGEST else "too weak"
            text = f"the term '{name}' is {what}: its gradient is {_times(share)} that of the task loss."
            sane = weight * RATIO / share if share else weight
            advice = f"Set kd.{name}.weight={sane:.2g}, which makes it {RATIO:.0%}, or kd.{name}.weight=auto."
            report.add("warning", "terms", text, advice)
    report.tables[f"gradients into the student's neck, median of {count} training batches, at full strength"] = table
    report.facts["terms"] = facts


def _times(share: float) -> str:
    """Return a ratio for a table."""
    return f"{share:.0f} x" if share >= 10 else f"{share:.2g} x"


def _cost(report: Report, trainer: DistillationTrainer, raw: dict, keys: Mapping[str, Any]) -> None:
    """Measure time and memory of a step, with and without teacher and terms."""
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
    for _ in _rounds():
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
    report.add("note", "cost", f"a step takes {ratio:.2f} times as long as without a teacher.")


def _seconds(trainer: DistillationTrainer, step: Callable[[], None]) -> float:
    """Return the time of a step that starts without gradients."""
    cuda = trainer.device.type == "cuda"
    unwrap_model(trainer.model).zero_grad()
    if cuda:
        torch.cuda.synchronize(trainer.device)
    began = time.perf_counter()
    step()
    if cuda:
        torch.cuda.synchronize(trainer.device)
    return time.perf_counter() - began


def _memory(trainer: DistillationTrainer, step: Callable[[], None]) -> float:
    """Return bytes: the peak on a GPU, elsewhere the storages that the graph keeps for the backward pass."""
    if trainer.device.type == "cuda":
        step()  # the first may only choose its kernels
        torch.cuda.reset_peak_memory_stats(trainer.device)
        step()
        return float(torch.cuda.max_memory_allocated(trainer.device))
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return float(sum(sizes.values()))
