"""The inheriting strategy of FGD and MGD: the student's neck and head start from the teacher's where shapes agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from yolo_kd.taps import class_rows, neck_and_head


@dataclass(frozen=True)
class Inheritance:
    """What a student took over from its teacher.

    Attributes:
        taken: Names of the tensors that were copied, in the student's numbering.
        kept: Names of the tensors of neck and head that were not, with the reason.
        parameters: Number of values that were copied.
        total: Number of values in the student's neck and head.
    """

    taken: tuple[str, ...]
    kept: dict[str, str]
    parameters: int
    total: int

    def report(self) -> str:
        """Say in a few lines what was inherited and what was not, by layer."""
        share = self.parameters / self.total if self.total else 0.0
        lines = [
            f"Inherited {len(self.taken)} of {len(self.taken) + len(self.kept)} tensors of neck and head "
            f"({share:.0%} of their values) from the teacher"
        ]
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
