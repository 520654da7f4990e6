"""New classes beside old ones: a student that learns what a data set labels and keeps what its teacher knows.

Three things make that: a head for all classes in which the old rows start from the student's own; labels that count in
the classes of the run; and a task loss in which nobody denies an old class that the teacher sees, since a data set that
labels only new classes calls everything else background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from ultralytics.nn.modules.head import Detect

from yolo_kd.classes.mapping import ClassMap
from yolo_kd.classes.names import is_placeholder, normalised, short
from yolo_kd.errors import PairError
from yolo_kd.upstream.heads import CLASS_BRANCHES, head_of
from yolo_kd.upstream.task_loss import ABSENT, without_classes


@dataclass(frozen=True)
class KeptClasses:
    """The classes of a run that keeps its teacher's.

    Attributes:
        names: All class names, the teacher's first.
        old: Number of the teacher's classes.
        index_of: For each class of the data set, its index in `names`.
        confidence: Class probability of the teacher from which an old class counts as seen at a point.
    """

    names: tuple[str, ...]
    old: int
    index_of: tuple[int, ...]
    confidence: float

    @classmethod
    def of(cls, teacher: Mapping[int, str], data: Mapping[int, str], confidence: float) -> KeptClasses:
        """Put the data set's classes beside the teacher's; a class that both have stays the teacher's.

        Raises:
            PairError: If names say nothing, name a class twice, or there is no new class.
        """
        theirs, ours = ([str(names[i]) for i in sorted(names)] for names in (teacher, data))
        for side, names in (("teacher", theirs), ("data set", ours)):
            if nothing := [n for n in names if is_placeholder(n)]:
                raise PairError(
                    f"keep_classes goes by class names, but those of the {side} say nothing ({short(nothing)}). Give "
                    f"the classes names{' in the data YAML' if names is ours else ''}."
                )
            if len({normalised(n) for n in names}) < len(names):
                raise PairError(f"keep_classes goes by class names, but the {side} has two classes of one name.")
        known = {normalised(n): i for i, n in enumerate(theirs)}
        names, index_of = [*theirs], []
        for name in ours:
            if (found := known.get(normalised(name))) is None:
                found = len(names)
                names.append(name)
            index_of.append(found)
        if len(names) == len(theirs):
            raise PairError(
                f"the data set has no class that the teacher does not know ({short(ours)}), so there is nothing to "
                "add. Leave keep_classes out."
            )
        return cls(tuple(names), len(theirs), tuple(index_of), confidence)

    @property
    def by_index(self) -> dict[int, str]:
        """All names as Ultralytics holds them."""
        return dict(enumerate(self.names))

    @property
    def classes(self) -> ClassMap:
        """Which class of the student is which of the teacher."""
        sources = tuple((i,) for i in range(self.old)) + ((),) * len(self.new)
        return ClassMap(self.names[: self.old], self.names, sources)

    @cached_property
    def unlabeled(self) -> tuple[int, ...]:
        """The old classes that the data set does not label, so that its labels say nothing about them."""
        return tuple(i for i in range(self.old) if i not in self.index_of)

    @property
    def new(self) -> tuple[int, ...]:
        """The classes that the teacher does not have."""
        return tuple(range(self.old, len(self.names)))

    def renumber(self, labels: Sequence[dict[str, Any]]) -> None:
        """Let the labels of a data set, one dictionary for each image, count in the classes of the run."""
        table = np.asarray(self.index_of, dtype=np.float32)
        for label in labels:
            label["cls"] = table[label["cls"].astype(int)].astype(label["cls"].dtype).reshape(label["cls"].shape)

    def shield(self, predictions: Any, teacher_logits: Tensor) -> Any:
        """Return the student's predictions as the task loss is to see them.

        Where the teacher sees an old class, with the confidence or more, the labels are no proof that there is none. At
        these points the scores of all old classes that the data set does not label are replaced by `ABSENT`: they add
        nothing to the loss, get no gradient, and no object is assigned by them. An old class that the data set labels
        is left alone everywhere.

        Args:
            predictions: What the student's head returned; both branches of an end-to-end head are shielded.
            teacher_logits: The teacher's own class logits, (B, A, old).
        """
        columns = _mask(self.unlabeled, len(self.names), teacher_logits.device)
        old = teacher_logits.masked_fill(~columns[: self.old], ABSENT)
        seen = old.amax(-1).float().sigmoid() >= self.confidence
        return without_classes(
            predictions, seen[:, None, :] & columns[None, :, None]
        )  # (B, classes, A), as heads put it


@lru_cache(maxsize=8)
def _mask(indices: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Return a mask of `count` classes, made once: a GPU is not to wait for it in every step."""
    return torch.tensor([i in indices for i in range(count)], device=device)


# ------------------------------------------------------------------------------------------------ the student's head


@torch.no_grad()
def extend_head(model: nn.Module, source: nn.Module, names: Sequence[str]) -> None:
    """Let the class branches of a head for more classes start from those of a trained one.

    Each tensor of the trained branches is placed in the leading channels of its larger counterpart, and the rows of the
    last convolution at the classes of the same name. What old outputs would read of new channels is zero, so every old
    class has the logits that it had. The rest stays as it was made: random, with the usual bias.

    Args:
        model: A detector of the same architecture, made for `names`, changed in place.
        source: The trained one.
        names: Class names of `model`.

    Raises:
        PairError: If a tensor has no place in the new head.
    """
    head, trained = head_of(model), head_of(source)
    theirs = {normalised(str(name)): i for i, name in source.names.items()}  # type: ignore[operator, union-attr]
    pairs = [(i, theirs[normalised(name)]) for i, name in enumerate(names) if normalised(name) in theirs]
    rows, origins = ([pair[k] for pair in pairs] for k in (0, 1))
    for attribute in CLASS_BRANCHES:
        if getattr(head, attribute, None) is None:
            continue
        for branch, old in zip(getattr(head, attribute), getattr(trained, attribute), strict=True):
            last = f"{len(branch) - 1}."
            state = old.state_dict()
            for name, tensor in branch.state_dict().items():
                values = state[name]
                if name.startswith(last):
                    _place(tensor, values[origins], rows)
                elif tensor.ndim == 0:
                    tensor.copy_(values)
                else:
                    _place(tensor, values, range(len(values)))


def _place(tensor: Tensor, values: Tensor, rows: Sequence[int]) -> None:
    """Write values into rows of a tensor, into the leading columns of these; their other columns become zero."""
    block = tensor.new_zeros(len(rows), *tensor.shape[1:])
    leading = (slice(None), *(slice(0, n) for n in values.shape[1:]))
    block[leading] = values.to(tensor.dtype)
    tensor[list(rows)] = block


def check_extendable(model: nn.Module, source: nn.Module, teacher: Sequence[str], file: Any) -> None:
    """Check that `extend_head` can be done.

    Args:
        model: A detector of the student's architecture for all classes, as the trainer will build it.
        source: The trained student.
        teacher: The teacher's class names.
        file: The student's file, for messages.

    Raises:
        PairError: If the student lacks a class of the teacher, or its head cannot be extended.
    """
    own = {normalised(str(name)) for name in source.names.values()}  # type: ignore[operator]
    if lacking := [name for name in teacher if normalised(name) not in own]:
        raise PairError(
            f"keep_classes=teacher keeps the classes that the student knows, but student={file} does not know "
            f"{short(lacking)}. Name a student that was trained on the teacher's classes."
        )
    refused = f"the head of student={file} cannot be extended by classes"
    head, trained = head_of(model), head_of(source)
    if not isinstance(trained, Detect) or getattr(trained, "cv3", None) is None:
        raise PairError(f"{refused}: it is {type(trained).__name__} without class branches; a Detect head is needed.")
    for attribute in CLASS_BRANCHES:
        if (getattr(head, attribute, None) is None) != (getattr(trained, attribute, None) is None):
            raise PairError(f"{refused}: its branch {attribute} was removed. Name the checkpoint that training wrote.")
        if getattr(head, attribute, None) is None:
            continue
        new, old = (getattr(h, attribute).state_dict() for h in (head, trained))
        if new.keys() != old.keys():
            raise PairError(f"{refused}: its layers are fused or of another kind. Name the checkpoint of its training.")
        classes = {f"{i}.{len(branch) - 1}" for i, branch in enumerate(getattr(head, attribute))}
        for name, tensor in old.items():
            # the rows of the last convolution are classes and are placed by name, so only its columns count
            skip = 1 if name.rpartition(".")[0] in classes else 0
            if any(a > b for a, b in zip(tensor.shape[skip:], new[name].shape[skip:], strict=True)):
                raise PairError(
                    f"{refused}: {attribute}.{name} is {tuple(tensor.shape)} and would become {tuple(new[name].shape)}."
                )
