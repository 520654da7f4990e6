"""Gradients of the terms into the student, measured: proof on the first batch, and what weights follow later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yolo_kd.distillation.distiller import Distiller
from yolo_kd.errors import AuditError
from yolo_kd.structures import DetectorOutputs, LossInputs

HALF_SCALE = 2.0**14


@dataclass(frozen=True)
class AuditRow:
    """What one term does on the first batch, at full strength whatever its schedule says.

    Attributes:
        term: Name of the loss.
        value: Its weighted value per image.
        gradient: Norm of its gradient into the student's neck features.
        share: That norm over the norm of the task loss's gradient.
        cosine: Cosine of the angle between both gradients: 1 pulls the same way, 0 at right angles, -1 against it.
    """

    term: str
    value: float
    gradient: float
    share: float
    cosine: float


def audit(
    task_loss: Tensor, student: DetectorOutputs, distiller: Distiller, inputs: Mapping[str, LossInputs]
) -> list[AuditRow]:
    """Measure each term as `measure` does, and stop where one does nothing.

    Raises:
        AuditError: Naming every term whose value is not finite or whose gradient into the student is zero.
    """
    rows, problems = measure(task_loss, student, distiller, inputs)
    if problems:
        raise AuditError("\n".join(problems.values()))
    return rows


def measure(
    task_loss: Tensor, student: DetectorOutputs, distiller: Distiller, inputs: Mapping[str, LossInputs]
) -> tuple[list[AuditRow], dict[str, str]]:
    """Measure each term's value and gradient into the student; costs about one pass through the head per term.

    Gradients are taken at the features that leave the student's neck, where all terms and the task loss meet. A term
    that reads layers before the neck meets the task loss there, so both its gradient and the share are measured there.

    Args:
        task_loss: The student's task loss per image, a scalar with its graph.
        student: The student's outputs, with gradient.
        distiller: Terms and adapters.
        inputs: What each term reads, by its name.

    Returns:
        One row per term that is not switched off, and a sentence for each term that does nothing, by its name.
    """
    rows, problems = [], {}
    places: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    for name, term in distiller.terms.items():
        if term.weight == 0:
            continue
        if term.site not in places:
            places[term.site] = _meeting_place(task_loss, student, term.student_layers)
        meeting, task = places[term.site]
        columns = distiller.unweighted(name, inputs[name])
        total = distiller.weight(name) * torch.stack(list(columns.values())).sum()
        gradients = _gradients(total, meeting)
        gradient, reference = _norm(gradients).item(), _norm(task).item()
        product = gradient * reference
        cosine = torch.stack([(a * b).sum() for a, b in zip(gradients, task, strict=True)]).sum().item()
        row = AuditRow(
            name,
            total.item(),
            gradient,
            gradient / reference if reference else float("inf"),
            cosine / product if product else 0.0,
        )
        rows.append(row)
        if unbound := next((c for c, v in columns.items() if not torch.isfinite(v)), None):
            problems[name] = (
                f"term '{name}' is not finite on the first batch ({unbound} = {columns[unbound].item()}). Check that "
                "the teacher's own predictions are finite on this data."
            )
        elif not gradient > 0:
            problems[name] = (
                f"term '{name}' has no gradient into the student on the first batch (value {row.value:.4g}), so it "
                "would train nothing. Check that teacher and student are not the same weights and that freeze= leaves "
                "the student something to learn."
            )
    return rows, problems


def balance(
    task_loss: Tensor,
    student: DetectorOutputs,
    distiller: Distiller,
    inputs: Mapping[str, LossInputs],
    close_mosaic: float = 1.0,
) -> None:
    """Measure the terms whose weights set themselves, as `measure` does, and let these weights follow.

    Nothing here waits for the device. A term that its schedule has switched off keeps its weight.

    Args:
        task_loss: The student's task loss per image, a scalar with its graph.
        student: The student's outputs, with gradient.
        distiller: Terms and adapters, with weights that set themselves.
        inputs: What each term reads, by its name.
        close_mosaic: Progress at which mosaic augmentation closes.
    """
    assert distiller.auto is not None
    places: dict[str, tuple[list[Tensor], list[Tensor]]] = {}
    norms = []
    for name in distiller.auto.names:
        term, read = distiller.terms[name], inputs[name]
        if read.progress > 0 and term.schedule(read.progress, close_mosaic) == 0:
            unmeasured = task_loss.new_full((), float("nan"), dtype=torch.float32)
            norms.append((unmeasured, unmeasured))
            continue
        if term.site not in places:
            places[term.site] = _meeting_place(task_loss, student, term.student_layers)
        meeting, task = places[term.site]
        total = torch.stack(list(distiller.unweighted(name, read).values())).sum()
        norms.append((_norm(task), _norm(_gradients(total, meeting))))
    distiller.auto.update(*(torch.stack(side) for side in zip(*norms, strict=True)))


def _meeting_place(
    task_loss: Tensor, student: DetectorOutputs, layers: Sequence[str]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors where terms and task loss meet, and the task loss's gradient there.

    They are the layers that the term reads, or the features. Where no gradient is seen to flow from the head's outputs
    into them, the outputs are taken in: alone where `freeze=` stops at the neck, beside the features where `compile=`
    made one node of neck and head.
    """
    inputs = [f for f in ([student.layers[n] for n in layers] or student.features) if f.requires_grad]
    task = _autograd(task_loss, inputs) if inputs else []
    if all(g is None for g in task):
        # the outputs are transposed views; the task loss was computed from their bases
        inputs += [x if x._base is None else x._base for x in (student.scores, student.boxes)]
        task = _autograd(task_loss, inputs)
    return inputs, _filled(task, inputs)


def _gradients(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a loss's gradient at each input, float32, zeros where it does not reach one."""
    return _filled(_autograd(loss, inputs), inputs)


def _filled(found: Sequence[Tensor | None], inputs: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x, dtype=torch.float32) if g is None else g for g, x in zip(found, inputs, strict=True)]


def _autograd(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    """Return a loss's gradient at each input, float32, None where it does not reach one."""
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
    """Format the audit for the log."""
    lines = ["Distillation is on: first batch, gradients into the student's neck"]
    lines.append(f"{'term':>16}{'value':>12}{'gradient':>12}{'of the task loss':>19}")
    lines += [f"{r.term:>16}{r.value:>12.4g}{r.gradient:>12.4g}{r.share:>18.1%}" for r in rows]
    return "\n".join(lines)
