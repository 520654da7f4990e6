"""Maps teacher classes onto student classes, in scores, outputs and targets.

If several teacher classes map onto one student class, its probability is that at least one of them is present:

    p = 1 - (1 - p_1) (1 - p_2) ...

In odds, 1 + o = (1 + o_1) (1 + o_2) ..., so two logits a and b merge to log(e^a + e^b + e^(a + b)), which neither
overflows nor loses small probabilities. Further classes are merged one after another. The logit of a class that is not
merged stays the same bit for bit.
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
_SHOWN = 12  # rows of the table for classes with the same name and index


@dataclass(frozen=True)
class ClassMap:
    """Maps teacher classes onto student classes.

    The losses get only the matched classes: the student classes that have a teacher class, in the student's order. If
    all classes match in order, every method returns its argument.

    Attributes:
        teacher: The teacher's class names, by index.
        student: The student's class names, by index.
        sources: For each student class, the indices of its teacher classes: several are merged, none means that the
            class is unmatched.
        by: How the classes were paired: name, index, or placeholder for two equal lists of meaningless names.
    """

    teacher: tuple[str, ...]
    student: tuple[str, ...]
    sources: tuple[tuple[int, ...], ...]
    by: str = "name"

    def to_dict(self) -> dict[str, Any]:
        """Return the mapping as plain types."""
        sources = [list(s) for s in self.sources]
        return {"teacher": list(self.teacher), "student": list(self.student), "sources": sources, "by": self.by}

    @classmethod
    def from_dict(cls, state: Any) -> ClassMap:
        """Rebuild a mapping from `to_dict`.

        Raises:
            CheckpointError: If `state` is not a result of `to_dict`.
        """
        try:
            sources = tuple(tuple(int(i) for i in s) for s in state["sources"])
            teacher, student = (tuple(str(n) for n in state[side]) for side in ("teacher", "student"))
            if len(sources) != len(student) or any(not 0 <= i < len(teacher) for s in sources for i in s):
                raise ValueError("the classes are inconsistent")
            return cls(teacher, student, sources, str(state["by"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError("the checkpoint's record of its distillation is damaged: its class map.") from error

    @cached_property
    def matched(self) -> tuple[int, ...]:
        """Indices of the student classes that have a teacher class."""
        return tuple(i for i, s in enumerate(self.sources) if s)

    @cached_property
    def is_identity(self) -> bool:
        """True if class i of the teacher is class i of the student for all classes of both."""
        return len(self.teacher) == len(self.student) and all(s == (i,) for i, s in enumerate(self.sources))

    # -------------------------------------------------------------------------------------------- tensors

    def teacher_logits(self, logits: Tensor, dim: int = -1) -> Tensor:
        """Return the teacher's logits for the matched classes.

        Args:
            logits: Class logits with the teacher's classes along `dim`. Without classes, they are returned unchanged.
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
        """Convert indices of matched classes, of any shape, to the student's class indices."""
        if len(self.matched) == len(self.student):
            return labels
        return _index(self.matched, labels.device)[labels]

    def student_mask(self, mask: Tensor) -> Tensor:
        """Extend a (B, matched, A) mask to all student classes, (B, classes, A), true for unmatched classes."""
        if len(self.matched) == len(self.student):
            return mask
        whole = mask.new_ones(len(mask), len(self.student), mask.shape[-1])
        whole[:, _index(self.matched, mask.device)] = mask
        return whole

    def student_outputs(self, outputs: DetectorOutputs) -> DetectorOutputs:
        """Return the student's outputs with the matched classes only."""
        return _with_scores(outputs, self.student_logits)

    def teacher_outputs(self, outputs: DetectorOutputs) -> DetectorOutputs:
        """Return the teacher's outputs with the matched classes only."""
        return _with_scores(outputs, self.teacher_logits)

    def targets(self, targets: Targets) -> Targets:
        """Return the targets of matched classes, with indices of matched classes as labels; others are background."""
        if len(self.matched) == len(self.student):
            return targets
        number = {c: i for i, c in enumerate(self.matched)}
        renumbered = _index(tuple(number.get(c, -1) for c in range(len(self.student))), targets.labels.device)
        labels = renumbered[targets.labels]
        matched = labels >= 0
        assignment = targets.assignment
        if assignment is not None:
            scores = self.student_logits(assignment.scores)
            # the class targets of a foreground point are zero except in the class of its object
            foreground = assignment.foreground & (scores > 0).any(-1)
            assignment = Assignment(foreground, scores, assignment.boxes)
        return replace(
            targets,
            boxes=targets.boxes[matched],
            labels=labels[matched],
            image_index=targets.image_index[matched],
            assignment=assignment,
        )

    # -------------------------------------------------------------------------------------------- text

    def table(self) -> str:
        """Return the mapping as a table for the log."""
        if self.is_identity:
            return f"Classes: teacher and student have the same {len(self.student)}"
        rows = self.rows()
        width = max(len(left) for left, _ in rows)
        lines = [f"Classes: {len(self.matched)} of the student's {len(self.student)} have a class of the teacher"]
        return "\n".join([*lines, *(f"  {left.ljust(width)}  {right}" for left, right in rows)])

    def rows(self) -> list[tuple[str, str]]:
        """Return the rows of the table, headings first; a row is a student class and its teacher classes."""
        sources = [" + ".join(f"{i} {self.teacher[i]}" for i in s) or "-" for s in self.sources]
        same = [i for i, s in enumerate(self.sources) if s == (i,) and self.teacher[i] == self.student[i]]
        hidden = set(same[_SHOWN:]) if len(same) > _SHOWN + 1 else set()
        cells = [(f"{i} {self.student[i]}", sources[i]) for i in range(len(self.student)) if i not in hidden]
        rows = [("student", "teacher"), *cells]
        if hidden:
            rows.append((f"{len(hidden)} more", "with the same name and index"))
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


def _with_scores(outputs: DetectorOutputs, mapping: Callable[[Tensor], Tensor]) -> DetectorOutputs:
    """Map the scores of both branches."""
    scores, second = mapping(outputs.scores), outputs.one2one_scores
    if scores is outputs.scores:
        return outputs
    return replace(outputs, scores=scores, one2one_scores=None if second is None else mapping(second))


def _either(a: Tensor, b: Tensor) -> Tensor:
    """Return the logit of the probability that at least one of two independent classes is present."""
    return torch.logaddexp(torch.logaddexp(a, b), a + b)


@lru_cache(maxsize=64)
def _index(indices: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(indices, dtype=torch.int64, device=device)
