"""Proof, on the first batch, that every term of the recipe pulls on the student."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_kd.distiller import Distiller
from yolo_kd.errors import AuditError
from yolo_kd.views import Step, View


@dataclass(frozen=True)
class AuditRow:
    """What one term does on the first batch, at full strength whatever its schedule says.

    Attributes:
        term: Name of the loss.
        value: Its weighted value per image.
        gradient: Norm of its gradient into the student's neck features.
        share: That norm over the norm of the task loss's gradient.
    """

    term: str
    value: float
    gradient: float
    share: float


def audit(task_loss: Tensor, view: View, distiller: Distiller, steps: Mapping[str, Step]) -> list[AuditRow]:
    """Measure each term's value and gradient into the student; costs about one pass through the head per term.

    Gradients are taken at the features that leave the student's neck, where all terms and the task loss meet. A term
    that reads layers before the neck meets the task loss there, so both its gradient and the share are measured there.

    Args:
        task_loss: The student's own loss per image, a scalar with its graph.
        view: The student's view, with gradient.
        distiller: Terms and adapters.
        steps: The first step, by term.

    Returns:
        One row per term.

    Raises:
        AuditError: Naming the term whose value is not finite or whose gradient into the student is zero.
    """
    neck = _inputs(view)
    neck_norm = _norm_of(task_loss, neck)
    rows = []
    for name, term in distiller.terms.items():
        if term.weight == 0:
            continue
        inputs, task_norm = neck, neck_norm
        if term.student_layers:
            inputs = _inputs(steps[name].student)
            task_norm = _norm_of(task_loss, inputs)
        columns = distiller.unweighted(name, steps[name])
        for column, value in columns.items():
            if not torch.isfinite(value):
                raise AuditError(
                    f"term '{name}' is not finite on the first batch ({column} = {value.item()}). Check that the "
                    "teacher's own predictions are finite on this data."
                )
        total = term.weight * torch.stack(list(columns.values())).sum()
        gradient = _norm_of(total, inputs)
        if not gradient > 0:
            raise AuditError(
                f"term '{name}' has no gradient into the student on the first batch (value {total.item():.4g}), so it "
                "would train nothing. Check that teacher and student are not the same weights and that freeze= leaves "
                "the student something to learn."
            )
        rows.append(AuditRow(name, total.item(), gradient, gradient / task_norm if task_norm else float("inf")))
    return rows


def _inputs(view: View) -> list[Tensor]:
    """Return where gradients are measured: the features, or the head's outputs where `freeze=` stops at the neck."""
    return [f for f in view.features if f.requires_grad] or [view.scores, view.boxes]


def _norm_of(loss: Tensor, inputs: Sequence[Tensor]) -> float:
    """Return the Euclidean norm of a loss's gradient over all inputs, 0 where it reaches none."""
    if not loss.requires_grad:
        return 0.0
    # as in training, where the backward pass runs outside autocast
    with torch.autocast(inputs[0].device.type, enabled=False):
        gradients = torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)
    squares = [g.double().square().sum() for g in gradients if g is not None]
    return torch.stack(squares).sum().sqrt().item() if squares else 0.0


def table(rows: Sequence[AuditRow]) -> str:
    """Format the audit for the log."""
    lines = ["Distillation is on: first batch, gradients into the student's neck"]
    lines.append(f"{'term':>16}{'value':>12}{'gradient':>12}{'of the task loss':>19}")
    lines += [f"{r.term:>16}{r.value:>12.4g}{r.gradient:>12.4g}{r.share:>18.1%}" for r in rows]
    return "\n".join(lines)
