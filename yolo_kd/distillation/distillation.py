"""`Distillation`: one training step of a student with a teacher and a recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, distributed, nn
from ultralytics.cfg import get_cfg
from ultralytics.utils import LOGGER

from yolo_kd.classes.mapping import ClassMap
from yolo_kd.classes.match import match, nothing_matched
from yolo_kd.config.recipe import Recipe, load_recipe
from yolo_kd.config.speed import Speed
from yolo_kd.config.unlabeled import UnlabeledOptions
from yolo_kd.distillation.audit import AuditRow, audit, balance, measure, table
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.distillation.finite_guard import FiniteGuard
from yolo_kd.distillation.observer import TEACHER_OUTPUTS, Observation, Observer, taken
from yolo_kd.distillation.sub_batches import Shield, SubBatch, teacher_reads
from yolo_kd.distillation.teacher import Teacher
from yolo_kd.distillation.teacher_runner import Runner
from yolo_kd.errors import PairError
from yolo_kd.safe_loading.checkpoint import LoadedDetector, load_detector
from yolo_kd.upstream.heads import find_layers, head_tails
from yolo_kd.upstream.pairing import pair_spec
from yolo_kd.upstream.task_loss import loss_names_of


@dataclass
class Losses:
    """The result of a step.

    Attributes:
        vector: The task loss and the weighted terms, times the batch size as Ultralytics expects it.
        items: Logged scalars per image, without gradient, by column.
    """

    vector: Tensor
    items: dict[str, Tensor]

    @property
    def total(self) -> Tensor:
        """The scalar to call `backward` on."""
        return self.vector.sum()


class Distillation:
    """A frozen teacher, a student and a recipe.

    The student is never wrapped: this object only hooks the student while it trains, and `close` removes the hooks.
    A training loop without a trainer::

        distillation = Distillation.build(student, "yolov8s.pt", "default")
        optimizer = torch.optim.AdamW([*student.parameters(), *distillation.parameters()])
        for batch in loader:  # images in [0, 1] and the entries of Ultralytics' loader
            distillation.begin(batch)
            losses = distillation.loss(distillation.observe(student(batch["img"]), batch), progress=0.0)
            losses.total.backward()
            ...

    Attributes:
        student: The student.
        teacher: The frozen teacher.
        distiller: Terms and adapters.
        guard: Keeps batches with NaN or infinity out of the weights; None lets them in.
        close_mosaic: Progress at which mosaic augmentation closes, 1.0 for never.
        audits: Whether the next batch that can be audited is audited.
        audit_rows: The audit of the first batch, empty before it.
        log: Receives lines for the log.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | Runner,
        distiller: Distiller,
        unlabeled: UnlabeledOptions | None = None,
    ):
        """Combine existing objects; `build` makes them from a recipe."""
        self.student: Any = student
        self.teacher: Any = teacher
        self.distiller = distiller
        self.guard: FiniteGuard | None = None
        self.close_mosaic = 1.0
        self.audit_rows: list[AuditRow] = []
        self.log: Callable[[str], None] = LOGGER.info
        self._observer = Observer(student, distiller, unlabeled)
        self._head_attached = False
        self.audits = True

    @classmethod
    def build(
        cls,
        student: nn.Module,
        teacher: str | os.PathLike[str] | LoadedDetector,
        recipe: Recipe | str | os.PathLike[str] | Mapping[str, Any] = "default",
        *,
        classes: ClassMap | None = None,
        device: torch.device | str | None = None,
        speed: Speed | None = None,
        unlabeled: UnlabeledOptions | None = None,
    ) -> Distillation:
        """Build adapters, terms and the frozen teacher for a student.

        Args:
            student: An Ultralytics detection model on its device. It is not changed; hooks are added on the first
                `begin` where the recipe reads layers inside the student.
            teacher: A checkpoint's path, or what `load_detector` returned.
            recipe: A recipe, its name, its file, or a mapping.
            classes: The class map; None matches classes by name.
            device: Device of the teacher; None means that of the student.
            speed: How the teacher runs; None means the fastest verified way.
            unlabeled: How to use unlabeled images, which are last in a batch and marked by `UNLABELED_MARK`.

        Raises:
            CheckpointError: If the teacher cannot be loaded.
            ConfigError: If the recipe has mistakes, or names a layer that a model lacks.
            PairError: If a loss does not support this pair, or no class matches.
        """
        device = torch.device(device) if device is not None else next(student.parameters()).device
        detector = teacher if isinstance(teacher, LoadedDetector) else load_detector(str(teacher), role="teacher")
        recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
        if classes is None:
            classes = match(detector.model.names, student.names)  # type: ignore[arg-type]
            if not classes.matched:
                raise PairError(nothing_matched(classes, None, False))
        if not isinstance(getattr(student, "args", None), SimpleNamespace):
            student.args = get_cfg()  # the task loss reads its gains there
        student_layers = find_layers(student, recipe.student_layers, "student", recipe.head_split)
        teacher_layers = find_layers(detector.model, recipe.teacher_layers, "teacher", recipe.head_split)
        pair = pair_spec(student, detector.model, student_layers, teacher_layers, len(classes.matched))
        distiller = Distiller(recipe, pair, classes).to(device).train()
        if distributed.is_initialized():
            for tensor in distiller.state_dict().values():  # ranks draw different random numbers
                if isinstance(tensor, Tensor):
                    distributed.broadcast(tensor, 0)
        reads = teacher_reads(unlabeled, recipe.reads)
        frozen = Teacher(detector, device, speed or Speed(), recipe.teacher_layers, recipe.head_split, reads)
        distillation = cls(student, frozen, distiller, unlabeled)
        frozen.on_settled = lambda sentence: distillation.log(sentence)
        return distillation

    # ---------------------------------------------------------------------------------------------- one step

    def begin(self, batch: dict[str, Any]) -> None:
        """Start the teacher on the images of a batch; its outputs travel in the batch.

        Args:
            batch: Entries of Ultralytics' loader, images as (B, C, H, W) in [0, 1] on the device.

        Raises:
            NumbersError: If the teacher's outputs on the first batch are not finite and there is a guard.
        """
        self._observer.hook()
        batch[TEACHER_OUTPUTS] = outputs = self.teacher.begin(batch["img"])
        if not self._head_attached:
            self.distiller.attach_teacher_head(head_tails(self.teacher.model))
            self._head_attached = True
        if self.guard is not None and not self.guard.admitted:
            self.guard.admit(taken(outputs), str(self.teacher.path))

    def observe(self, predictions: Any, batch: Mapping[str, Any]) -> Observation:
        """Compute the task loss and the inputs of each term, see `Observer.observe`.

        Args:
            predictions: The student's raw outputs on the images of the batch.
            batch: The batch after `begin`.
        """
        return self._observer.observe(predictions, batch)

    def loss(self, observation: Observation, progress: float = 0.0) -> Losses:
        """Return the task loss and the weighted terms.

        A term is the mean over the images on which it acts: all images, or with `unlabeled_mode=pseudo` the labeled
        ones. So the share of unlabeled images does not change the weight of a step.

        Args:
            observation: The result of `observe`.
            progress: Fraction of the training that has passed, in [0, 1].

        Raises:
            AuditError: If a term has no gradient into the student on the first batch, or is not finite there.
        """
        acting = observation.acting
        for sub_batch in acting:
            for inputs in sub_batch.inputs.values():
                inputs.progress = progress
        if acting and torch.is_grad_enabled():
            self._follow_and_audit(observation)
        for sub_batch in acting:
            sub_batch.columns = self.distiller(sub_batch.inputs, self.close_mosaic)
        terms = torch.stack([_mean(acting, name) for name in self.distiller.columns])
        # the task loss is multiplied by the batch size, logged items are not: the factor is applied here only
        vector = torch.cat([observation.task_loss, terms.to(observation.task_loss.dtype) * observation.images])
        labeled, unlabeled = (self._items(observation, vector, kind) for kind in (False, True))
        if self.guard is not None and vector.requires_grad:
            vector, labeled = self.guard.screen(vector, labeled, observation.tensors, observation.teacher)
        items = {**labeled, **self.distiller.weights()}
        if observation.unlabeled is not None and (reader := self._observer.unlabeled) is not None:
            items |= reader.columns(unlabeled, observation.unlabeled, self.task_loss)
        return Losses(vector, items)

    def after_step(self) -> None:
        """Let losses train their modules, after the optimiser's step."""
        self.distiller.after_step()

    # ---------------------------------------------------------------------------------------------- state

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters of adapters and losses that the student's optimiser trains."""
        return self.distiller.trained_parameters()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of adapters, losses and automatic weights."""
        return self.distiller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state from `state_dict`."""
        self.distiller.load_state_dict(state)

    @property
    def task_loss(self) -> Any:
        """The student's task loss."""
        return self._observer.task_loss

    @task_loss.setter
    def task_loss(self, task_loss: Any) -> None:
        self._observer.task_loss = task_loss

    def protect(self, shield: Shield) -> None:
        """Hide classes that the labels may lack from the task loss; call it before the first `begin`."""
        self._observer.shield = shield
        self.teacher.also_read("scores")

    def measure(self, observation: Observation) -> tuple[list[AuditRow], dict[str, str]]:
        """Update automatic weights, then measure the loss and the gradient of each term, see `audit.measure`."""
        sub_batch = observation.acting[0]
        task = observation.task_loss_per_image(sub_batch)
        if self.distiller.auto is not None:
            balance(task, observation.student, self.distiller, sub_batch.inputs, self.close_mosaic)
        return measure(task, observation.student, self.distiller, sub_batch.inputs)

    def rehearsal(self) -> Distillation:
        """Return a copy for measuring memory, which shares the frozen teacher only."""
        teacher = self.teacher if isinstance(self.teacher, Runner) else self.teacher.rehearsal()
        copy = Distillation(deepcopy(self.student), teacher, deepcopy(self.distiller))
        copy.audits = False
        return copy

    def forget(self) -> None:
        """Discard the records of an interrupted step."""
        self._observer.forget()

    def detach(self) -> None:
        """Remove the hooks from the student and its task loss; the next step adds them again."""
        self._observer.detach()

    def close(self) -> None:
        """Leave a plain student, and a teacher without hooks."""
        self.detach()
        if self.guard is not None:
            self.guard.close()
        self.teacher.close()

    # ---------------------------------------------------------------------------------------------- details

    def _follow_and_audit(self, observation: Observation) -> None:
        """Update automatic weights, and audit the first batch that can be audited."""
        sub_batch, distiller = observation.acting[0], self.distiller
        task = observation.task_loss_per_image(sub_batch)
        if distiller.auto is not None and distiller.auto.tick():
            balance(task, observation.student, distiller, sub_batch.inputs, self.close_mosaic)
        # a term that acts near objects has no gradient on a batch without objects; then the next batch is audited
        objects = next(iter(sub_batch.inputs.values())).targets
        silent = objects is not None and not len(objects.boxes)
        if self.audits and not silent and task.isfinite():
            self.audit_rows = audit(task, observation.student, distiller, sub_batch.inputs)
            self.audits = False
            self.log(table(self.audit_rows))

    def _items(self, observation: Observation, like: Tensor, unlabeled: bool) -> dict[str, Tensor]:
        """Return all columns for the labeled or the unlabeled images, zero for those that have none."""
        found = next((s for s in observation.sub_batches if s.unlabeled == unlabeled), SubBatch(0))
        columns = (*loss_names_of(self.task_loss), *self.distiller.columns)
        items = dict.fromkeys(columns, like.new_zeros(()))
        return items | dict(found.items) | {name: column.detach() for name, column in found.columns.items()}


def _mean(acting: list[SubBatch], column: str) -> Tensor:
    """Return the mean of a column over sub-batches, weighted by their numbers of images."""
    if len(acting) == 1:
        return acting[0].columns[column]
    total = sum(s.images for s in acting)
    return torch.stack([s.columns[column] * (s.images / total) for s in acting]).sum()
