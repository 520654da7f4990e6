"""Measures the gradients of the terms into the student, for the audit and for automatic weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_kd.distillation.distiller import Distiller, Term
from yolo_kd.errors import AuditError
from yolo_kd.structures import DetectorOutputs, LossInputs

HALF_SCALE = 2.0**14


@dataclass(frozen=True)
class AuditRow:
    """The measurement of one term on one batch, without its schedule.

    Attributes:
        term: Name of the loss.
        value: Its weighted loss per image.
        gradient: Norm of its gradient into the student's neck features.
        share: That norm divided by the norm of the task loss's gradient.
        cosine: Cosine of the angle between both gradients: 1 same direction, 0 orthogonal, -1 opposite.
    """

    term: str
    value: float
    gradient: float
    share: float
    cosine: float


def audit(
    task_loss: Tensor, student: DetectorOutputs, distiller: Distiller, inputs: Mapping[str, LossInputs]
) -> list[AuditRow]:
    """Measure each term as `measure` does, and raise an error if one has no effect.

    Raises:
        AuditError: If the loss of a term is not finite, or its gradient into the student is zero.
    """
    rows, problems = measure(task_loss, student, distiller, inputs)
    if problems:
        raise AuditError("\n".join(problems.values()))
    return rows


def measure(
    task_loss: Tensor, student: DetectorOutputs, distiller: Distiller, inputs: Mapping[str, LossInputs]
) -> tuple[list[AuditRow], dict[str, str]]:
    """Measure each term's loss and its gradient into the student. A term costs about one pass through the head.

    Gradients are measured at the student's neck features, which all terms and the task loss depend on. For a term that
    reads layers before the neck, both gradients are measured at these layers.

    Args:
        task_loss: The student's task loss per image, a scalar with its graph.
        student: The student's outputs, with gradient.
        distiller: Terms and adapters.
        inputs: What each term reads, by its name.

    Returns:
        One row per term that is not switched off, and a sentence for each term that has no effect, by its name.
    """
    rows, problems = [], {}
    sites = _Sites(task_loss, student)
    for name, term in distiller.terms.items():
        if term.weight == 0:
            continue
        tensors, task = sites.at(term)
        columns = distiller.unweighted(name, inputs[name])
        total = distiller.weight(name) * torch.stack(list(columns.values())).sum()
        gradients = _gradients(total, tensors)
        gradient, reference = _norm(gradients).item(), _norm(task).item()
        product = gradient * reference
        dot = torch.stack([(a * b).sum() for a, b in zip(gradients, task, strict=True)]).sum().item()
        share, cosine = gradient / reference if reference else float("inf"), dot / product if product else 0.0
        rows.append(AuditRow(name, total.item(), gradient, share, cosine))
        if infinite := [f"{c} = {v.item()}" for c, v in columns.items() if not torch.isfinite(v)]:
            problems[name] = (
                f"term '{name}' is not finite on the first batch ({infinite[0]}). Check that the teacher's predictions "
                "are finite on this data."
            )
        elif not gradient > 0:
            problems[name] = (
                f"term '{name}' has no gradient into the student on the first batch (value {total.item():.4g}), so it "
                "would train nothing. Check that teacher and student do not have the same weights, and that freeze= "
                "leaves layers of the student to train."
            )
    return rows, problems


def balance(
    task_loss: Tensor,
    student: DetectorOutputs,
    distiller: Distiller,
    inputs: Mapping[str, LossInputs],
    close_mosaic: float = 1.0,
) -> None:
    """Measure the terms with automatic weights, as `measure` does, and update these weights.

    The host does not wait for the device. A term that its schedule has switched off keeps its weight.

    Args:
        task_loss: The student's task loss per image, a scalar with its graph.
        student: The student's outputs, with gradient.
        distiller: Terms and adapters, with automatic weights.
        inputs: What each term reads, by its name.
        close_mosaic: Progress at which mosaic augmentation closes.
    """
    assert distiller.auto is not None
    sites, norms = _Sites(task_loss, student), []
    for name in distiller.auto.names:
        term, read = distiller.terms[name], inputs[name]
        if read.progress > 0 and term.schedule(read.progress, close_mosaic) == 0:
            unmeasured = task_loss.new_full((), float("nan"), dtype=torch.float32)
            norms.append((unmeasured, unmeasured))
            continue
        tensors, task = sites.at(term)
        total = torch.stack(list(distiller.unweighted(name, read).values())).sum()
        norms.append((_norm(task), _norm(_gradients(total, tensors))))
    distiller.auto.update(*(torch.stack(side) for side in zip(*norms, strict=True)))


class _Sites:
    """The tensors at which gradients are measured, and the task loss's gradients there, once per site."""

    def __init__(self, task_loss: Tensor, student: DetectorOutputs):
        self._task_loss, self._student = task_loss, student
        self._found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def at(self, term: Term) -> tuple[list[Tensor], list[Tensor]]:
        """Return the tensors for a term: the layers that it reads, or the features.

        The head's outputs are added if the task loss has no gradient into these: without the features if `freeze=` ends
        at the neck, with them if `compile=` made one node of neck and head.
        """
        if term.site not in self._found:
            student, layers = self._student, term.student_layers
            inputs = [f for f in ([student.layers[n] for n in layers] or student.features) if f.requires_grad]
            task = _autograd(self._task_loss, inputs) if inputs else []
            if all(g is None for g in task):
                # the outputs are transposed views; the task loss was computed from their bases
                inputs += [x if x._base is None else x._base for x in (student.scores, student.boxes)]
                task = _autograd(self._task_loss, inputs)
            self._found[term.site] = inputs, _filled(task, inputs)
        return self._found[term.site]


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a loss's gradient at each input, float32, zeros where there is none."""
    return _filled(_autograd(loss, inputs), inputs)


def _filled(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=torch.float32) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _autograd(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return a loss's gradient at each input, float32, None where there is none."""
    if not loss.requires_grad:
        return [None for _ in inputs]
    # float16 needs a scale, as training has one, or small gradients vanish
    scale = HALF_SCALE if any(x.dtype == torch.float16 for x in inputs) else 1.0
    # as in training, where the backward pass runs outside autocast
    with torch.autocast(inputs[0].device.type, enabled=False):
        found = torch.autograd.grad(loss * scale, inputs, retain_graph=True, allow_unused=True)
    return [None if g is None else g.float() / scale for g in found]


def _norm(gradients: Sequence[Tensor]) -> Tensor:
    """Return the Euclidean norm over all tensors, a scalar on their device."""
    return torch.stack([g.square().sum() for g in gradients]).sum().sqrt()


def table(rows: Sequence[AuditRow]) -> str:
    """Return the audit as a table for the log."""
    lines = ["Distillation is on: first batch, gradients into the student's neck"]
    lines.append(f"{'term':>16}{'value':>12}{'gradient':>12}{'of the task loss':>19}")
    lines += [f"{r.term:>16}{r.value:>12.4g}{r.gradient:>12.4g}{r.share:>18.1%}" for r in rows]
    return "\n".join(lines)
