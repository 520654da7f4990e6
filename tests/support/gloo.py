"""Work for processes that talk over gloo: `python -m tests.support.gloo JOB FILE ...`, with RANK and WORLD_SIZE set."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch import distributed as dist
from ultralytics.utils.torch_utils import unwrap_model

import tests.conftest  # noqa: F401  (isolates Ultralytics before it is imported)
import yolo_kd.losses  # noqa: F401  (registers the losses that ship with the package)
from tests.support.loss_contract import BOXES, Align, duplicated, in_float64, leaves, make_inputs, make_loss, make_pair
from yolo_kd.engine.trainer import DistillationTrainer
from yolo_kd.losses.base import Loss, parameters, registered
from yolo_kd.structures import Assignment, DetectorOutputs, LossInputs, PairSpec, Targets

WORLD = 2
IMAGES = 4
# the halves differ in the number of boxes and positives, as they do in a training
BATCH = (*BOXES["typical"], BOXES["overlapping"][0][:1], BOXES["tiny"][1])


# ------------------------------------------------------------------------------------------------- parts of a step
def part_of(step: LossInputs, images: range) -> tuple[DetectorOutputs, DetectorOutputs, Targets]:
    """Return both views and the targets of some of a step's images."""
    chosen = slice(images.start, images.stop)

    def cut(view: DetectorOutputs) -> DetectorOutputs:
        return replace(
            view,
            features=tuple(f[chosen] for f in view.features),
            scores=view.scores[chosen],
            boxes=view.boxes[chosen],
            layers={name: layer[chosen] for name, layer in view.layers.items()},
        )

    t = step.targets
    assert t is not None
    assert t.assignment is not None
    a, here = t.assignment, (t.image_index >= images.start) & (t.image_index < images.stop)
    assignment = Assignment(a.foreground[chosen], a.scores[chosen], a.boxes[chosen])
    index = t.image_index[here] - images.start
    targets = Targets(t.boxes[here], t.labels[here], index, t.image_size, len(images), assignment)
    return cut(step.student), cut(step.teacher), targets


@contextmanager
def drawn_for(images: range) -> Iterator[None]:
    """Let `torch.rand` draw for all images of the batch and hand out those of this process."""
    calls = [0]

    def rand(*size: Any, **keys: Any) -> Tensor:
        _, *rest = size[0] if len(size) == 1 else size
        calls[0] += 1
        rng = torch.Generator().manual_seed(calls[0])
        whole = torch.empty(IMAGES, *rest, **keys).uniform_(generator=rng)
        return whole[images.start : images.stop]

    with patch.object(torch, "rand", rand):
        yield


class Student(nn.Module):
    """Scales each value of a given view, and ends in its loss as Ultralytics' models do, times the batch size."""

    def __init__(self, view: DetectorOutputs, pair: PairSpec, loss: Loss):
        super().__init__()
        self.scales = nn.ParameterDict()
        for name, tensor in leaves(view).items():
            self.scales[name.replace(" ", "_")] = nn.Parameter(torch.ones(tensor.shape[1:]))
        object.__setattr__(self, "beside", (pair, loss))  # not part of the model, as in a training
        self.columns: dict[str, Tensor] = {}
        self.align: Align | None = None

    def trained_beside(self) -> dict[str, nn.Parameter]:
        """Return the parameters of adapters and loss, by name."""
        assert self.align is not None
        loss = self.beside[1]
        own = {id(p) for p in loss.self_trained()}
        modules = {**self.align.adapters, "loss": loss}
        named = {f"{k}.{n}": p for k, m in modules.items() for n, p in m.named_parameters()}
        return {n: p for n, p in named.items() if id(p) not in own}

    def forward(self, given: tuple[DetectorOutputs, DetectorOutputs, Targets]) -> Tensor:
        view, teacher, targets = given
        s = dict(self.scales.items())
        view = replace(
            view,
            features=tuple(f * s[f"features_of_level_{i}"] for i, f in enumerate(view.features)),
            scores=view.scores * s["scores"],
            boxes=view.boxes * s["boxes"],
            layers={name: layer * s[name] for name, layer in view.layers.items()},
        )
        pair, loss = self.beside
        self.align = Align(pair, view)
        self.columns = loss(LossInputs(view, teacher, targets, 0.3, self.align))
        return torch.stack(list(self.columns.values())).sum() * len(view.scores)


def gradients_of(
    cls: type[Loss], keys: dict[str, Any], images: range, world: int, twins: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return columns and gradients that a training over `world` processes ends up with, averaged over them."""
    pair = make_pair()
    step = duplicated(make_inputs(pair, seed=4), pair) if twins else make_inputs(pair, boxes=BATCH, seed=4)
    model = Student(step.student, pair, make_loss(cls, pair, **keys).train())
    student, teacher, targets = part_of(step, images)
    given = (replace_detached(student), teacher, targets)
    with drawn_for(images):
        if world == 1:
            model(given).backward()
        else:
            wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
            (wrapped(given) * world).backward()  # Ultralytics' factor against the average that follows
    beside = model.trained_beside()
    columns = torch.stack(list(model.columns.values())).detach()
    if world > 1:
        for p in beside.values():  # as in DistillationTrainer.optimizer_step
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= world
    grads = {n: p.grad for n, p in (*model.named_parameters(), *beside.items()) if p.grad is not None}
    return columns, grads


def replace_detached(view: DetectorOutputs) -> DetectorOutputs:
    return DetectorOutputs(
        tuple(f.detach() for f in view.features),
        view.scores.detach(),
        view.boxes.detach(),
        view.strides,
        view.reg_max,
        layers={name: layer.detach() for name, layer in view.layers.items()},
    )


def apart(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest value."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))


def losses(rank: int, file: str, halves: str) -> None:
    """Compare two halves with the whole for every registered loss, and `standardise` both ways.

    Args:
        rank: Of this process.
        file: Receives the relative differences, by loss.
        halves: `different`, or `equal`: then both processes see the same images.
    """
    twins = halves == "equal"
    found: dict[str, dict[str, float]] = {}
    for name, cls in registered().items():
        variants: dict[str, dict[str, Any]] = {name: {}}
        if "standardise" in parameters(cls):
            variants = {f"{name} standardise={v}".lower(): {"standardise": v} for v in (False, True)}
        for label, keys in variants.items():
            half = range(rank * IMAGES // WORLD, (rank + 1) * IMAGES // WORLD)
            with in_float64() if twins else nullcontext():  # rounding turns a kink of the critic's here and there
                columns, ours = gradients_of(cls, keys, half, WORLD, twins)
                whole, theirs = gradients_of(cls, keys, range(IMAGES), 1, twins)
            smallest = columns.abs().min()
            dist.all_reduce(smallest, dist.ReduceOp.MIN)
            dist.all_reduce(columns)
            assert ours.keys() == theirs.keys()
            parts = {"student": [n for n in theirs if n.startswith("scales.")]}
            parts["beside"] = [n for n in theirs if n not in parts["student"]]
            found[label] = {"value": apart(columns / WORLD, whole), "smallest": float(smallest)}
            for part, names in parts.items():
                joined = [torch.cat([torch.zeros(1), *(g[n].flatten() for n in names)]) for g in (ours, theirs)]
                found[label][part] = apart(*joined)
    if rank == 0:
        Path(file).write_text(json.dumps(found))


# ------------------------------------------------------------------------------------------------ a whole training
class OnCPU(nn.parallel.DistributedDataParallel):
    """Without the index of a GPU, which a CPU does not have."""

    def __init__(self, module: nn.Module, device_ids: Any = None, **keys: Any):
        super().__init__(module, **keys)


class GlooTrainer(DistillationTrainer):
    """Ultralytics trains on several GPUs only; this says where it takes a GPU for granted, and nothing else."""

    def __init__(self, *args: Any, **keys: Any):
        super().__init__(*args, **keys)
        self.world_size = WORLD

    def _setup_ddp(self) -> None:
        """Leave out the choice of a GPU; `main` has set up the processes."""

    def validate(self) -> tuple[dict, float]:
        return {}, 0.0

    def final_eval(self) -> None:
        """Leave out the validation of the finished file, which asks for the GPU's name."""


def total(tensors: dict[str, Tensor]) -> float:
    """Return a number that changes with any of the values."""
    return sum(float((t.double() * torch.arange(1, t.numel() + 1).view(t.shape).cos()).sum()) for t in tensors.values())


def train(rank: int, file: str, data: str, student: str, teacher: str) -> None:
    """Train for a few epochs, with one bad batch on the second process, and note what each process holds."""
    seen: dict[str, Any] = {"broadcast": [], "reduced": [], "steps": [], "columns": []}
    broadcast, all_reduce = dist.broadcast, dist.all_reduce

    def record_broadcast(tensor: Tensor, *args: Any, **keys: Any) -> None:
        before = float(tensor.detach().double().sum())
        broadcast(tensor, *args, **keys)
        seen["broadcast"].append((before, float(tensor.detach().double().sum())))

    def record_reduce(tensor: Tensor, *args: Any, **keys: Any) -> None:
        before = float(tensor.double().sum())
        all_reduce(tensor, *args, **keys)
        seen["reduced"].append((before, float(tensor.double().sum())))

    def note(t: Any) -> None:
        named = {
            "student": unwrap_model(t.model).named_parameters(),
            "distiller": t.distillation.distiller.state_dict().items(),
        }
        seen["steps"].append({k: total({n: p for n, p in v if p.is_floating_point()}) for k, v in named.items()})
        seen["columns"].append({k: float(v) for k, v in t.loss_items.items() if k in t.distillation.distiller.columns})

    def poison(t: Any) -> None:
        term = t.distillation.distiller.losses["ultralytics"]
        forward, calls = term.forward, [0]

        def poisoned(step: Any) -> dict:
            calls[0] += 1
            return {k: v * (torch.nan if calls[0] == 4 else 1.0) for k, v in forward(step).items()}

        term.forward = poisoned

    recipe = {"losses": {"objectness": {}, "ultralytics": {}, "fgd": {}, "holistic": {}}}
    keys = {"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 3, "workers": 0, "plots": False, "optimizer": "AdamW"}
    folder = Path(file).parent / "run"
    trainer = GlooTrainer(
        overrides={
            **keys,
            "data": data,
            "model": student,
            "teacher": teacher,
            "kd": recipe,
            "save_dir": str(folder),
            "device": "cpu",
        }
    )
    trainer.add_callback("on_train_start", lambda t: seen.update(start=total(t.distillation.distiller.state_dict())))

    def without_objects(t: Any) -> None:
        preprocess, calls = t.preprocess_batch, [0]

        def emptied(batch: dict) -> dict:
            calls[0] += 1
            if calls[0] == 3:
                batch |= {k: batch[k][:0] for k in ("bboxes", "cls", "batch_idx")}
            return preprocess(batch)

        t.preprocess_batch = emptied

    if rank == 0:
        trainer.add_callback("on_train_start", without_objects)
    trainer.add_callback("on_train_batch_end", note)
    if rank == 1:
        trainer.add_callback("on_train_start", poison)
    with (
        patch.object(nn.parallel, "DistributedDataParallel", OnCPU),
        patch.object(dist, "broadcast", record_broadcast),
        patch.object(dist, "all_reduce", record_reduce),
    ):
        trainer.train()
    seen |= {
        "skipped": trainer.distillation.guard.skipped,
        "audit": [row.term for row in trainer.distillation.audit_rows],
    }
    Path(f"{file}.{rank}").write_text(json.dumps(seen))


def pool(rank: int, file: str, data: str, student: str, teacher: str, images: str) -> None:
    """Train with images that nobody labelled, and note which ones each process sees."""
    seen: dict[str, Any] = {"images": {}}
    keys = {"imgsz": 64, "batch": 8, "nbs": 8, "epochs": 2, "workers": 0, "plots": False, "optimizer": "AdamW"}
    own = {"teacher": teacher, "kd": "objectness", "unlabeled": images, "unlabeled_mode": "both"}
    place = {"save_dir": str(Path(file).parent / "run"), "device": "cpu", "data": data, "model": student}
    trainer = GlooTrainer(overrides={**keys, **own, **place})
    preprocess = trainer.preprocess_batch

    def noted(batch: dict) -> dict:
        seen["images"].setdefault(str(trainer.epoch), []).extend(Path(f).name for f in batch["im_file"])
        return preprocess(batch)

    trainer.preprocess_batch = noted  # type: ignore[method-assign]
    with patch.object(nn.parallel, "DistributedDataParallel", OnCPU):
        trainer.train()
    seen["weights"] = total(dict(unwrap_model(trainer.model).named_parameters()))
    Path(f"{file}.{rank}").write_text(json.dumps(seen))


JOBS: dict[str, Callable[..., None]] = {"losses": losses, "train": train, "pool": pool}


def main() -> None:
    """Do the job in this process of two."""
    job, *arguments = sys.argv[1:]
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(minutes=5))
    JOBS[job](rank, *arguments)
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads are at times still running when the interpreter takes the group down, which aborts the process
    os._exit(0)


if __name__ == "__main__":
    main()
