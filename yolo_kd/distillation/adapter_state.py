"""Adapters in the student's optimiser: it trains them, and Ultralytics removes them when it strips a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from yolo_kd.distillation.distiller import Distiller
from yolo_kd.errors import AuditError


def check_trained(optimizer: torch.optim.Optimizer, distiller: Distiller) -> None:
    """Check that an optimiser trains a distiller's adapters, and remove what a loss trains itself.

    Args:
        optimizer: The student's optimiser, built over student and distiller.
        distiller: Terms and adapters.

    Raises:
        AuditError: If an adapter's parameter is not in the optimiser.
    """
    trained = {id(p) for p in distiller.trained_parameters()}
    elsewhere = {id(p) for p in distiller.parameters()} - trained
    for group in optimizer.param_groups:
        group["params"] = [p for p in group["params"] if id(p) not in elsewhere]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if missing := [n for n, p in distiller.named_parameters() if id(p) in trained - held]:
        raise AuditError(
            f"adapter parameters {', '.join(missing[:3])} are not in the optimiser and would never be trained."
        )


def to_cpu(state: Any) -> Any:
    """Copy a state dict to the CPU, independent of its modules."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {k: to_cpu(v) for k, v in state.items()}
    return state
