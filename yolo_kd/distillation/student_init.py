"""Student initialisation: copies the teacher's neck and head, as FGD and MGD do, or thins the whole teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from yolo_kd.upstream.channel_groups import Thinning
from yolo_kd.upstream.heads import class_rows, neck_and_head

OTHER_CLASSES = "the classes are others, or in another order"


@dataclass(frozen=True)
class Inheritance:
    """The result of a student initialisation.

    Attributes:
        taken: Names of the tensors that were copied, in the student's numbering.
        kept: Names of the tensors that were not copied, with the reason.
        parameters: Number of elements that were copied.
        total: Number of elements in the layers considered.
        of: The layers considered, for the report.
        how: How they were copied, for the report.
    """

    taken: tuple[str, ...]
    kept: dict[str, str]
    parameters: int
    total: int
    of: str = "neck and head"
    how: str = ""

    @property
    def summary(self) -> str:
        """A line with the amount that was copied."""
        share = self.parameters / self.total if self.total else 0.0
        return (
            f"Inherited {len(self.taken)} of {len(self.taken) + len(self.kept)} tensors of {self.of} "
            f"({share:.0%} of their values) from the teacher{self.how}"
        )

    def report(self) -> str:
        """Return a few lines that list the copied and the other layers."""
        lines = [self.summary]
        for title, names in (("inherited", self.taken), ("unchanged", tuple(self.kept))):
            layers = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
            if layers:
                more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
                lines.append(f"  {title}: {', '.join(layers[:8])}{more}")
        if self.kept:
            name, reason = next(iter(self.kept.items()))
            lines.append(f"  for instance {name}: {reason}")
        return "\n".join(lines)


def inherit(student: nn.Module, teacher: nn.Module, same_classes: bool = True) -> Inheritance:
    """Copy the teacher's neck and head into the student's, where layer, name and shape of a tensor agree.

    Layers are paired by their distance from the head, so that the models of one family are paired at every scale. A
    layer that is paired with one of another type keeps all its tensors.

    Args:
        student: The student, changed in place.
        teacher: The teacher.
        same_classes: Whether class i is class i in both models; otherwise the rows of classes are not copied.

    Returns:
        What was copied and what was not.
    """
    partners = dict(neck_and_head(teacher))
    target: dict[str, Tensor] = {}
    source: dict[str, Tensor] = {}
    reasons: dict[str, str] = {}
    for place, (index, layer) in neck_and_head(student):
        _, partner = partners.get(place, (0, None))
        target |= {f"model.{index}.{name}": tensor for name, tensor in layer.state_dict().items()}
        if partner is not None and type(partner) is type(layer):
            source |= {f"model.{index}.{name}": tensor for name, tensor in partner.state_dict().items()}
        else:
            found = type(partner).__name__ if partner is not None else "nothing"
            reason = f"the layer is {type(layer).__name__} here and {found} in the teacher"
            reasons |= {f"model.{index}.{name}": reason for name in layer.state_dict()}
    if not same_classes:
        reasons = dict.fromkeys(class_rows(student), OTHER_CLASSES) | reasons

    def equal(_name: str, tensor: Tensor, value: Tensor) -> Tensor | None:
        return value if value.shape == tensor.shape else None

    return _copied(target, source, reasons.get, equal)


def thin(student: nn.Module, teacher: nn.Module, same_classes: bool = True, least: float = 0.0) -> Inheritance:
    """Initialise a student as a thinned copy of its teacher, with evenly spread channels of every layer.

    Xu et al., "Initializing Models with Larger Ones", ICLR 2024, arXiv 2311.18823: uniform selection, of the first
    blocks if the teacher is deeper. Departure from the paper: the input channels of a layer that reads several others
    are thinned for each of them separately, see `Thinning`. Models of one family agree in nearly every tensor; a tensor
    without a counterpart stays as it is.

    Args:
        student: The student, changed in place.
        teacher: The teacher.
        same_classes: Whether class i is class i in both models; otherwise the rows of classes are not copied.
        least: Share of the student's elements below which nothing is copied, since a few layers alone do not help.

    Returns:
        What was copied and what was not.
    """
    thinning, rows = Thinning(student, teacher), class_rows(student)

    def refusal(name: str) -> str | None:
        return OTHER_CLASSES if not same_classes and name in rows else thinning.refuses(name)

    found = _copied(student.state_dict(), teacher.state_dict(), refusal, thinning, least)
    return replace(found, of="the student", how=", thinned")


@torch.no_grad()
def _copied(
    target: Mapping[str, Tensor],
    source: Mapping[str, Tensor],
    refusal: Callable[[str], str | None],
    select: Callable[[str, Tensor, Tensor], Tensor | None],
    least: float = 0.0,
) -> Inheritance:
    """Copy tensors into the student's.

    Args:
        target: The student's tensors by name, changed in place.
        source: The teacher's tensors by the same names.
        refusal: Returns the reason why a tensor must not be copied; None or an empty string if there is none.
        select: Returns what to copy of a teacher's tensor, None if its shape does not fit.
        least: Share of the student's elements below which nothing is copied.
    """
    found: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for name, tensor in target.items():
        if reason := refusal(name):
            kept[name] = reason
        elif name not in source:
            kept[name] = "the teacher has no such tensor"
        elif (selected := select(name, tensor, source[name])) is None:
            kept[name] = f"shape {tuple(tensor.shape)} here, {tuple(source[name].shape)} in the teacher"
        else:
            found[name] = selected
    copied, total = (sum(t.numel() for t in tensors.values()) for tensors in (found, target))
    if copied < least * total:
        few = f"only {copied / total:.0%} of the student has a counterpart in the teacher"
        found, kept, copied = {}, kept | dict.fromkeys(found, few), 0
    for name, selected in found.items():
        target[name].copy_(selected)
    return Inheritance(tuple(found), kept, copied, total)
