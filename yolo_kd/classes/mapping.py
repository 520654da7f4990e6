"""What it makes of scores and targets which class of the student is which of the teacher.

Where several classes of the teacher are one of the student, the teacher's probability for it is that any of them is
there,

    p = 1 - (1 - p_1) (1 - p_2) ...

In odds, 1 + o = (1 + o_1) (1 + o_2) ..., so the logit of a merger of two is log(e^a + e^b + e^(a + b)), which neither
overflows nor loses small probabilities; more are merged one after another. A class that is not merged keeps its logit,
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn

from yolo_kd.classes.names import short
from yolo_kd.errors import CheckpointError
from yolo_kd.structures import Assignment, DetectorOutputs, Targets

INDEX = "index"
_SHOWN = 12  # rows of a table that only repeat what names say


@dataclass(frozen=True)
class ClassMap:
    """Which classes of the teacher each class of the student is.

    The losses see the matched classes only, those of the student that have a class of the teacher, in the student's
    order. Where all match in order, nothing is touched.

    Attributes:
        teacher: The teacher's class names, by index.
        student: The student's.
        sources: For each student class, the indices of the teacher's that it stands for; several are merged, none
            leaves it unmatched.
        by: How they were paired: name, index, or placeholder for two equal lists of names that say nothing.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    by: str = "name"

    def to_dict(self) -> dict[str, Any]:
        """Return plain types only."""
        return {
            "teacher": list(self.teacher),
            "student": list(self.student),
            "sources": [list(s) for s in self.sources],
            "by": self.by,
        }

    @classmethod
    def from_dict(cls, state: Any) -> ClassMap:
        """Rebuild a mapping from `to_dict`.

        Raises:
            CheckpointError: If it was not made by `to_dict`.
        """
        try:
            sources = tuple(tuple(int(i) for i in s) for s in state["sources"])
            teacher, student = (tuple(str(n) for n in state[side]) for side in ("teacher", "student"))
            if len(sources) != len(student) or any(not 0 <= i < len(teacher) for s in sources for i in s):
                raise ValueError("classes do not fit")
            return cls(teacher, student, sources, str(state["by"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint's record of its distillation is damaged: its class map.") from error

    @cached_property
    def matched(self) -> tuple[int, ...]:
        """Indices of the student's classes that have a class of the teacher."""
        return tuple(i for i, s in enumerate(self.sources) if s)

    @cached_property
    def is_identity(self) -> bool:
        """True where class i is class i on both sides, and there are no others."""
        return len(self.teacher) == len(self.student) and all(s == (i,) for i, s in enumerate(self.sources))

    # -------------------------------------------------------------------------------------------- tensors

    def teacher_logits(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the teacher's logits for the matched classes.

        Args:
            logits: Class logits with the teacher's classes along `dim`; what has no classes was not read and stays.
            dim: The dimension of the classes.
        """
        if self.is_identity or logits.shape[dim] == 0:
            return logits
        sources = [self.sources[i] for i in self.matched]
        if all(len(s) == 1 for s in sources):
            return logits.index_select(dim, _index(tuple(s[0] for s in sources), logits.device))
        columns = logits.unbind(dim)
        merged = [columns[s[0]] if len(s) == 1 else reduce(_either, [columns[i].float() for i in s]) for s in sources]
        return torch.stack([column.to(logits.dtype) for column in merged], dim)

    def student_logits(self, logits: Tensor) -> Tensor:
        """Return the student's (..., classes) logits or class targets for the matched classes."""
        if len(self.matched) == len(self.student):
            return logits
        return logits.index_select(-1, _index(self.matched, logits.device))

    def student_labels(self, labels: Tensor) -> Tensor:
        """Return the student's numbers of classes that count the matched ones, of any shape."""
        if len(self.matched) == len(self.student):
            return labels
        return _index(self.matched, labels.device)[labels]

    def student_mask(self, mask: Tensor) -> Tensor:
        """Return a (B, matched, A) mask for all classes of the student, (B, classes, A), true where none matches."""
        if len(self.matched) == len(self.student):
            return mask
        whole = mask.new_ones(len(mask), len(self.student), mask.shape[-1])
        whole[:, _index(self.matched, mask.device)] = mask
        return whole

    def student_view(self, view: DetectorOutputs) -> DetectorOutputs:
        """Return the student's view with the matched classes only."""
        if len(self.matched) == len(self.student):
            return view
        return _with_scores(view, self.student_logits)

    def teacher_view(self, view: DetectorOutputs) -> DetectorOutputs:
        """Return the teacher's view with its classes as the student has them."""
        if self.is_identity:
            return view
        return _with_scores(view, self.teacher_logits)

    def targets(self, targets: Targets) -> Targets:
        """Return the targets of matched classes, with labels that count them; others are background."""
        if len(self.matched) == len(self.student):
            return targets
        number = {c: i for i, c in enumerate(self.matched)}
        renumbered = _index(tuple(number.get(c, -1) for c in range(len(self.student))), targets.labels.device)
        labels = renumbered[targets.labels]
        known = labels >= 0
        assignment = targets.assignment
        if assignment is not None:
            scores = self.student_logits(assignment.scores)
            # a foreground point has a class target above zero in its object's class and in no other
            foreground = assignment.foreground & (scores > 0).any(-1)
            assignment = Assignment(foreground, scores, assignment.boxes)
        return replace(
            targets,
            boxes=targets.boxes[known],
            labels=labels[known],
            image_index=targets.image_index[known],
            assignment=assignment,
        )

    # -------------------------------------------------------------------------------------------- words

    def table(self) -> str:
        """Show which class is which, for the log."""
        if self.is_identity:
            return f"Classes: all {len(self.student)} of teacher and student agree"
        rows = self.rows()
        width = max(len(left) for left, _ in rows)
        lines = [f"Classes: {len(self.matched)} of the student's {len(self.student)} have a class of the teacher"]
        return "\n".join([*lines, *(f"  {left.ljust(width)}  {right}" for left, right in rows)])

    def rows(self) -> list[tuple[str, str]]:
        """Return the table's rows, headings first: a class of the student, and what it is of the teacher."""
        sources = [" + ".join(f"{i} {self.teacher[i]}" for i in s) or "-" for s in self.sources]
        plain = [i for i, s in enumerate(self.sources) if s == (i,) and self.teacher[i] == self.student[i]]
        hidden = set(plain[_SHOWN:]) if len(plain) > _SHOWN + 1 else set()
        cells = [(f"{i} {self.student[i]}", sources[i]) for i in range(len(self.student)) if i not in hidden]
        rows = [("student", "teacher"), *cells]
        if hidden:
            rows.append((f"{len(hidden)} more", "of the same name and index"))
        used = {i for s in self.sources for i in s}
        if unused := [name for i, name in enumerate(self.teacher) if i not in used]:
            rows.append(("(not learned)", short(unused)))
        return rows


class MappedTail(nn.Module):
    """The end of the teacher's class branch, followed by the mapping of its classes.

    Args:
        tail: A frozen module that returns (B, classes, H, W).
        classes: The mapping.
    """

    def __init__(self, tail: nn.Module, classes: ClassMap):
        super().__init__()
        self.tail = tail
        self.classes = classes
        self.eval()

    def forward(self, feature: Tensor) -> Tensor:
        """Return the logits of the matched classes, (B, matched, H, W)."""
        return self.classes.teacher_logits(self.tail(feature), dim=1)


def _with_scores(view: DetectorOutputs, mapping: Callable[[Tensor], Tensor]) -> DetectorOutputs:
    """Return a view with the scores of both branches mapped."""
    second = view.one2one_scores
    return replace(view, scores=mapping(view.scores), one2one_scores=None if second is None else mapping(second))


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of the probability that at least one of two independent classes is there."""
    return torch.logaddexp(torch.logaddexp(a, b), a + b)


@lru_cache(maxsize=64)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)
