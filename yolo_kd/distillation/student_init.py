"""Starts from the teacher: neck and head where shapes agree, as FGD and MGD do, or everything, thinned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolo_kd.upstream.channel_groups import Thinning
from yolo_kd.upstream.heads import class_rows, neck_and_head


@dataclass(frozen=True)
class Inheritance:
    """What a student took over from its teacher.

    Attributes:
        taken: Names of the tensors that were copied, in the student's numbering.
        kept: Names of the tensors of neck and head that were not, with the reason.
        parameters: Number of values that were copied.
        total: Number of values in the layers that were looked at.
        of: What was looked at.
        how: What was done to it, for the report.
    """

    taken: tuple[str, ...]
    kept: dict[str, str]
    parameters: int
    total: int
    of: str = "neck and head"
    how: str = ""

    @property
    def summary(self) -> str:
        """One line that says how much was inherited."""
        share = self.parameters / self.total if self.total else 0.0
        return (
            f"Inherited {len(self.taken)} of {len(self.taken) + len(self.kept)} tensors of {self.of} "
            f"({share:.0%} of their values) from the teacher{self.how}"
        )

    def report(self) -> str:
        """Say in a few lines what was inherited and what was not, by layer."""
        lines = [self.summary]
        for title, names in (("inherited", self.taken), ("kept its own", tuple(self.kept))):
            layers = list(dict.fromkeys(".".join(name.split(".")[:3]) for name in names))
            if layers:
                more = f" and {len(layers) - 8} more" if len(layers) > 8 else ""
                lines.append(f"  {title}: {', '.join(layers[:8])}{more}")
        if self.kept:
            name, reason = next(iter(self.kept.items()))
            lines.append(f"  for instance {name}: {reason}")
        return "\n".join(lines)


@torch.no_grad()
def inherit(student: nn.Module, teacher: nn.Module, same_classes: bool = True) -> Inheritance:
    """Copy the teacher's neck and head into the student's, tensor by tensor, where name, layer and shape agree.

    Layers are paired by their distance from the head, so that two models of one family agree whatever their scale;
    a layer of another class than its partner is left alone, with all its tensors.

    Args:
        student: The student, changed in place.
        teacher: The teacher.
        same_classes: Class i is class i on both sides; otherwise the rows of classes stay the student's.

    Returns:
        What was copied and what was not.
    """
    taken: list[str] = []
    kept: dict[str, str] = {}
    copied = total = 0
    theirs = dict(neck_and_head(teacher))
    rows = class_rows(student)
    for place, (index, layer) in neck_and_head(student):
        partner = theirs.get(place)
        same = partner is not None and type(partner[1]) is type(layer)
        state = partner[1].state_dict() if partner is not None and same else {}
        for name, tensor in layer.state_dict().items():
            full = f"model.{index}.{name}"
            total += tensor.numel()
            if not same:
                found = type(partner[1]).__name__ if partner is not None else "nothing"
                kept[full] = f"the layer is {type(layer).__name__} here and {found} in the teacher"
            elif not same_classes and full in rows:
                kept[full] = "the classes are others, or in another order"
            elif name not in state:
                kept[full] = "the teacher has no such tensor"
            elif state[name].shape != tensor.shape:
                kept[full] = f"shape {tuple(tensor.shape)} here, {tuple(state[name].shape)} in the teacher"
            else:
                tensor.copy_(state[name])
                taken.append(full)
                copied += tensor.numel()
    return Inheritance(tuple(taken), kept, copied, total)


@torch.no_grad()
def thin(student: nn.Module, teacher: nn.Module, same_classes: bool = True, least: float = 0.0) -> Inheritance:
    """Start a student as a thinned copy of its teacher: of every layer as many channels as it has, evenly spread.

    Xu et al., "Initializing Models with Larger Ones", ICLR 2024, arXiv 2311.18823: uniform selection, of the first
    blocks where the teacher is deeper. Where we depart: what a layer reads of several others is thinned for each of
    them by itself, see `Thinning`. Models of one family agree in nearly every tensor; what has no counterpart keeps the
    student's own numbers.

    Args:
        student: The student, changed in place.
        teacher: The teacher.
        same_classes: Class i is class i on both sides; otherwise the rows of classes stay the student's.
        least: Share of the student's values below which nothing is taken: single layers of another family are no start.

    Returns:
        What was copied and what was not.
    """
    thinning = Thinning(student, teacher)
    own, theirs, rows = student.state_dict(), teacher.state_dict(), class_rows(student)
    found: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for name, tensor in own.items():
        thinned = None
        if not same_classes and name in rows:
            kept[name] = "the classes are others, or in another order"
        elif reason := thinning.refuses(name):
            kept[name] = reason
        elif name not in theirs:
            kept[name] = "the teacher has no such tensor"
        elif (thinned := thinning(name, tensor, theirs[name])) is None:
            kept[name] = f"shape {tuple(tensor.shape)} here, {tuple(theirs[name].shape)} in the teacher"
        if thinned is not None:
            found[name] = thinned
    copied, total = (sum(t.numel() for t in tensors.values()) for tensors in (found, own))
    if copied < least * total:
        few = f"only {copied / total:.0%} of the student has a counterpart in the teacher"
        found, kept, copied = {}, kept | dict.fromkeys(found, few), 0
    for name, thinned in found.items():
        own[name].copy_(thinned)
    return Inheritance(tuple(found), kept, copied, total, "the student", ", thinned")
