"""Adds a data set's classes to those of the teacher.

The head has all classes, and the rows of old classes are initialised from the student's head. Labels are renumbered. In
a data set that labels new classes only, objects of old classes count as background; where the teacher detects an old
class, it is therefore hidden from the task loss.
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
    """The classes of a run that keeps its teacher's classes.

    Attributes:
        names: All class names, the teacher's first.
        old: Number of the teacher's classes.
        index_of: For each class of the data set, its index in `names`.
        confidence: Class probability of the teacher from which an old class counts as detected at a point.
    """

    names: tuple[str, ...]
    old: int
    index_of: tuple[int, ...]
    confidence: float

    @classmethod
    def of(cls, teacher: Mapping[int, str], data: Mapping[int, str], confidence: float) -> KeptClasses:
        """Append the data set's new classes to the teacher's.

        Raises:
            PairError: If names are meaningless or not unique, or there is no new class.
        """
        theirs, ours = ([str(names[i]) for i in sorted(names)] for names in (teacher, data))
        for side, names in (("teacher", theirs), ("data set", ours)):
            if placeholders := [n for n in names if is_placeholder(n)]:
                raise PairError(
                    f"keep_classes matches class names, but those of the {side} are meaningless "
                    f"({short(placeholders)}). Name the classes{' in the data YAML' if names is ours else ''}."
                )
            if len({normalised(n) for n in names}) < len(names):
                raise PairError(f"keep_classes matches class names, but the {side} has two classes of the same name.")
        old = {normalised(n) for n in theirs}
        names = [*theirs, *(n for n in ours if normalised(n) not in old)]
        if len(names) == len(theirs):
            raise PairError(
                f"the teacher already has every class of the data set ({short(ours)}). Remove keep_classes."
            )
        index = {normalised(n): i for i, n in enumerate(names)}
        return cls(tuple(names), len(theirs), tuple(index[normalised(n)] for n in ours), confidence)

    @property
    def by_index(self) -> dict[int, str]:
        """All names in Ultralytics' form."""
        return dict(enumerate(self.names))

    @property
    def classes(self) -> ClassMap:
        """The class map."""
        sources = tuple((i,) for i in range(self.old)) + ((),) * len(self.new)
        return ClassMap(self.names[: self.old], self.names, sources)

    @cached_property
    def unlabeled(self) -> tuple[int, ...]:
        """Indices of the old classes that the data set does not label."""
        return tuple(i for i in range(self.old) if i not in self.index_of)

    @property
    def new(self) -> tuple[int, ...]:
        """Indices of the new classes."""
        return tuple(range(self.old, len(self.names)))

    def renumber(self, labels: Sequence[dict[str, Any]]) -> None:
        """Convert the labels of a data set, one dictionary for each image, to the class indices of the run."""
        table = np.asarray(self.index_of, dtype=np.float32)
        for label in labels:
            label["cls"] = table[label["cls"].astype(int)].astype(label["cls"].dtype).reshape(label["cls"].shape)

    def shield(self, predictions: Any, teacher_logits: Tensor) -> Any:
        """Return the student's predictions for the task loss.

        Where the teacher detects an old class with the confidence or more, missing labels do not mean background. At
        these points, the scores of all old classes that the data set does not label are replaced by `ABSENT`: they have
        no loss, no gradient and no influence on the label assignment. Old classes that the data set labels do not
        change.

        Args:
            predictions: The raw outputs of the student's head; both branches of an end-to-end head are shielded.
            teacher_logits: The teacher's class logits, (B, A, old).
        """
        columns = _mask(self.unlabeled, len(self.names), teacher_logits.device)
        old = teacher_logits.masked_fill(~columns[: self.old], ABSENT)
        detected = old.amax(-1).float().sigmoid() >= self.confidence
        return without_classes(
            predictions, detected[:, None, :] & columns[None, :, None]
        )  # (B, classes, A) as in heads


@lru_cache(maxsize=8)
def _mask(indices: tuple[int, ...], count: int, device: torch.device) -> Tensor:
    """Return a mask of `count` classes, made once, so that a GPU does not wait for it in each step."""
    return torch.tensor([i in indices for i in range(count)], device=device)


# ------------------------------------------------------------------------------------------------ the student's head


@torch.no_grad()
def extend_head(model: nn.Module, source: nn.Module, names: Sequence[str]) -> None:
    """Initialise the class branches of a head for more classes from those of a trained head.

    Each tensor of the trained branches is copied to the leading channels of its larger counterpart, and the rows of the
    last convolution to the classes of the same name. The weights of old outputs on new channels are zero, so the logits
    of old classes do not change. The rest keeps its random initialisation and the usual bias.

    Args:
        model: A detector of the same architecture, made for `names`, changed in place.
        source: The trained detector.
        names: Class names of `model`.

    Raises:
        PairError: If a tensor has no place in the new head.
    """
    head, trained = head_of(model), head_of(source)
    old = {normalised(str(name)): i for i, name in source.names.items()}  # type: ignore[operator, union-attr]
    rows = [i for i, name in enumerate(names) if normalised(name) in old]
    origins = [old[normalised(names[i])] for i in rows]
    for attribute in CLASS_BRANCHES:
        for branch, start in zip(
            getattr(head, attribute, None) or (), getattr(trained, attribute, None) or (), strict=True
        ):
            state = start.state_dict()
            for name, tensor in branch.state_dict().items():
                if name.startswith(f"{len(branch) - 1}."):
                    _place(tensor, state[name][origins], rows)
                elif tensor.ndim == 0:
                    tensor.copy_(state[name])
                else:
                    _place(tensor, state[name], range(len(state[name])))


def _place(tensor: Tensor, block: Tensor, rows: Sequence[int]) -> None:
    """Copy a block to the leading columns of some rows of a tensor; the other columns of these rows become zero."""
    padded = tensor.new_zeros(len(rows), *tensor.shape[1:])
    leading = (slice(None), *(slice(0, n) for n in block.shape[1:]))
    padded[leading] = block.to(tensor.dtype)
    tensor[list(rows)] = padded


def check_extendable(model: nn.Module, source: nn.Module, teacher: Sequence[str], file: Any) -> None:
    """Check that `extend_head` supports a student.

    Args:
        model: A detector of the student's architecture for all classes, as the trainer builds it.
        source: The trained student.
        teacher: The teacher's class names.
        file: The student's file, for messages.

    Raises:
        PairError: If the student lacks a class of the teacher, or its head cannot be extended.
    """
    names = {normalised(str(name)) for name in source.names.values()}  # type: ignore[operator]
    if lacking := [name for name in teacher if normalised(name) not in names]:
        raise PairError(
            f"keep_classes=teacher needs a student with the teacher's classes, but student={file} lacks "
            f"{short(lacking)}. Name a student that was trained on these classes."
        )
    refused = f"the head of student={file} cannot be extended by classes"
    head, trained = head_of(model), head_of(source)
    if not isinstance(trained, Detect) or getattr(trained, "cv3", None) is None:
        raise PairError(f"{refused}: it is {type(trained).__name__} without class branches; a Detect head is needed.")
    for attribute in CLASS_BRANCHES:
        branches, trained_branches = getattr(head, attribute, None), getattr(trained, attribute, None)
        if branches is None and trained_branches is None:
            continue
        if branches is None or trained_branches is None:
            raise PairError(f"{refused}: its branch {attribute} was removed. Name the checkpoint of its training.")
        new, old = branches.state_dict(), trained_branches.state_dict()
        if new.keys() != old.keys():
            raise PairError(f"{refused}: its layers are fused or of another kind. Name the checkpoint of its training.")
        classes = {f"{i}.{len(branch) - 1}" for i, branch in enumerate(branches)}
        for name, tensor in old.items():
            # the rows of the last convolution are matched by class name, so only its columns are compared
            skip = int(name.rpartition(".")[0] in classes)
            if any(a > b for a, b in zip(tensor.shape[skip:], new[name].shape[skip:], strict=True)):
                raise PairError(
                    f"{refused}: {attribute}.{name} is {tuple(tensor.shape)} and would become {tuple(new[name].shape)}."
                )
