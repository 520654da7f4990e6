"""Computes the terms of a recipe, with adapters, weights and schedules, from the outputs of both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yolo_kd.classes.mapping import ClassMap, MappedTail
from yolo_kd.config.recipe import Recipe
from yolo_kd.config.schedule import Schedule
from yolo_kd.distillation.adapters import build_adapters
from yolo_kd.distillation.auto_weight import AutoWeights
from yolo_kd.errors import PairError
from yolo_kd.losses.base import Loss, find
from yolo_kd.structures import DetectorOutputs, LossInputs, PairSpec, Targets

NECK = "neck"


@dataclass(frozen=True)
class Term:
    """A loss with its weight and schedule, and the layers that it reads instead of the neck's features."""

    loss: Loss
    weight: float
    schedule: Schedule
    student_layers: tuple[str, ...] = ()
    teacher_layers: tuple[str, ...] = ()
    ratio: float | None = None  # the target of an automatic weight

    @property
    def site(self) -> str:
        """Name of the layers that the features are from; terms at the same site share adapters and aligned features."""
        if not self.student_layers and not self.teacher_layers:
            return NECK
        sides = ("-".join(names or (NECK,)) for names in (self.student_layers, self.teacher_layers))
        return "+".join(sides).replace(".", "_")


class Distiller(nn.Module):
    """The terms of a recipe, and the modules that only distillation trains.

    These modules are the adapters, which terms share if they need the same kind at the same site, and the modules of
    the losses. They are not part of the student.

    Args:
        recipe: What to distil.
        pair: Facts about both models; its classes are the matched ones.
        classes: The class map, None if all classes are the same.

    Raises:
        PairError: If a loss does not support this pair.
    """

    def __init__(self, recipe: Recipe, pair: PairSpec, classes: ClassMap | None = None):
        super().__init__()
        self.classes = classes
        self.pair = pair
        self.reads, self.head_split = recipe.reads, recipe.head_split
        self.student_layers = recipe.student_layers
        self.losses = nn.ModuleDict()
        self.terms: dict[str, Term] = {}
        for spec in recipe.terms:
            self.losses[spec.name] = loss = (
                deepcopy(spec.loss) if spec.loss is not None else find(spec.name)(**spec.arguments)
            )
            layers = spec.student_layers, spec.teacher_layers
            self.terms[spec.name] = Term(loss, spec.weight, spec.schedule, *layers, spec.ratio)
        ratios = {name: term.ratio for name, term in self.terms.items() if term.ratio is not None}
        self.auto = AutoWeights(ratios) if ratios else None
        pairs = {name: _pair_at(term, name, pair) for name, term in self.terms.items()}
        self._strides = {term.site: pairs[name].strides for name, term in self.terms.items()}
        # adapters first, in level order: a single `ultralytics` term then uses the same random numbers as Ultralytics
        self.adapters = nn.ModuleDict()
        for name, term in self.terms.items():
            key = f"{term.loss.adapter}@{term.site}"
            if term.loss.adapter is not None and key not in self.adapters:
                self.adapters[key] = build_adapters(term.loss.adapter, pairs[name])
        for name, term in self.terms.items():
            term.loss.build(pairs[name])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all scalars in the order of the recipe, the same in every step."""
        return tuple(column for term in self.terms.values() for column in term.loss.columns)

    @property
    def weight_columns(self) -> dict[str, str]:
        """Columns of the automatic weights, by term: `fgd_w` for the term that reports `fgd_loss`."""
        names = self.auto.names if self.auto else ()
        return {name: f"{self.terms[name].loss.columns[0].removesuffix('_loss')}_w" for name in names}

    def weight(self, name: str) -> float | Tensor:
        """Return the current weight of a term, without its schedule."""
        term = self.terms[name]
        return self.auto.weight(name) if self.auto is not None and term.ratio is not None else term.weight

    def weights(self) -> dict[str, Tensor]:
        """Return the automatic weights by column, for the log only."""
        return {column: self.weight(name) for name, column in self.weight_columns.items()}  # type: ignore[misc]

    def trained_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that the student's optimiser trains."""
        excluded = {id(p) for term in self.terms.values() for p in term.loss.self_trained()}
        return [p for p in self.parameters() if id(p) not in excluded]

    def attach_teacher_head(self, tails: Sequence[tuple[nn.Module, nn.Module]]) -> None:
        """Pass the last layers of the teacher's head to the losses that run them."""
        if self.classes is not None:
            tails = [(MappedTail(cls, self.classes), box) for cls, box in tails]
        for term in self.terms.values():
            if term.loss.head_split:
                term.loss.attach_teacher_head(tails)

    def inputs(
        self,
        student: DetectorOutputs,
        teacher: DetectorOutputs,
        targets: Targets | None = None,
        continues: bool = False,
    ) -> dict[str, LossInputs]:
        """Return the inputs of each term by name; terms at the same site share one object.

        Args:
            student: The student's outputs, all classes.
            teacher: The teacher's outputs, all classes.
            targets: Ground truth, None if no term reads it.
            continues: True for the second sub-batch of a batch.

        Returns:
            Inputs with the matched classes only.
        """
        if self.classes is not None:
            student, teacher = self.classes.student_outputs(student), self.classes.teacher_outputs(teacher)
            targets = None if targets is None else self.classes.targets(targets)
        made: dict[str, LossInputs] = {}
        for term in self.terms.values():
            if term.site not in made:
                made[term.site] = self._inputs_at(term, student, teacher, targets, continues)
        return {name: made[term.site] for name, term in self.terms.items()}

    def _inputs_at(
        self, term: Term, student: DetectorOutputs, teacher: DetectorOutputs, targets: Targets | None, continues: bool
    ) -> LossInputs:
        strides = self._strides[term.site]
        student = _outputs_at(student, term.student_layers, strides)
        teacher = _outputs_at(teacher, term.teacher_layers, strides)
        device = student.features[0].device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device)
        site = term.site

        def precision() -> torch.autocast:
            # an adapter runs in the precision of the student's forward pass, like any layer
            return torch.autocast(device, dtype=dtype, enabled=autocast)

        def align(kind: str, level: int) -> Tensor:
            with precision():
                return self.adapters[f"{kind}@{site}"][level](student.features[level])  # type: ignore[index]

        return LossInputs(student, teacher, targets, 0.0, align, precision, continues)

    def unweighted(self, name: str, inputs: LossInputs) -> dict[str, Tensor]:
        """Return the columns of one term without weight and schedule, computed in float32."""
        with torch.autocast(inputs.student.scores.device.type, enabled=False):
            return self.terms[name].loss(inputs)

    def forward(self, inputs: Mapping[str, LossInputs], close_mosaic: float = 1.0) -> dict[str, Tensor]:
        """Return all columns with weight and schedule, float32 scalars per image.

        Args:
            inputs: The inputs of each term, by its name.
            close_mosaic: Progress at which mosaic augmentation closes.
        """
        columns: dict[str, Tensor] = {}
        for name, term in self.terms.items():
            read = inputs[name]
            multiplier = term.schedule(read.progress, close_mosaic)
            if term.weight == 0 or multiplier == 0:
                zero = read.student.scores.new_zeros((), dtype=torch.float32)
                columns.update(dict.fromkeys(term.loss.columns, zero))
            else:
                strength = self.weight(name) * multiplier
                columns.update({c: v * strength for c, v in self.unweighted(name, read).items()})
        return columns

    def after_step(self) -> None:
        """Let losses train their modules."""
        for term in self.terms.values():
            term.loss.after_step()


def _pair_at(term: Term, name: str, pair: PairSpec) -> PairSpec:
    """Return the pair for a term, with the term's layers instead of the neck's features.

    Raises:
        PairError: If the layers of the two models differ in number or strides.
    """
    if term.site == NECK:
        return pair
    s_strides = tuple(pair.student_layer_strides[n] for n in term.student_layers) or pair.strides
    t_strides = tuple(pair.teacher_layer_strides[n] for n in term.teacher_layers) or pair.strides
    if s_strides != t_strides:
        raise PairError(
            f"loss '{name}' pairs student maps of stride {list(s_strides)} with teacher maps of stride "
            f"{list(t_strides)}; student_layers and teacher_layers need the same strides in the same order, and a side "
            f"without layers is the neck with {list(pair.strides)}."
        )
    return replace(
        pair,
        student_channels=tuple(pair.student_layer_channels[n] for n in term.student_layers) or pair.student_channels,
        teacher_channels=tuple(pair.teacher_layer_channels[n] for n in term.teacher_layers) or pair.teacher_channels,
        strides=s_strides,
    )


def _outputs_at(outputs: DetectorOutputs, layers: tuple[str, ...], strides: tuple[int, ...]) -> DetectorOutputs:
    """Return outputs whose features are the outputs of the layers, at the given strides."""
    return replace(outputs, features=tuple(outputs.layers[n] for n in layers), strides=strides) if layers else outputs
