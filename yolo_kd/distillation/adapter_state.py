"""Adapters in the student's optimiser: trained there, saved there, and gone once Ultralytics strips it from a file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from yolo_kd.distillation.distiller import Distiller
from yolo_kd.errors import AuditError

ADAPTER_STATE = "yolo_kd"  # key of the distiller's state inside the optimiser's state dict


def hold_adapters(optimizer: torch.optim.Optimizer, distiller: Distiller) -> None:
    """Make an optimiser train a distiller's adapters and carry the distiller's state in its own state dict.

    There the state rides in every checkpoint that can be resumed, and is restored by resume and by the recovery from
    NaN alike. What a loss trains by itself is taken out of the optimiser and still carried.

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

    def save(_optimizer: Any, state: dict) -> dict:
        return {**state, ADAPTER_STATE: _to_cpu(distiller.state_dict())}

    def load(_optimizer: Any, state: dict) -> dict:
        state = dict(state)
        if (adapters := state.pop(ADAPTER_STATE, None)) is not None:
            distiller.load_state_dict(adapters)
        return state

    optimizer.register_state_dict_post_hook(save)
    optimizer.register_load_state_dict_pre_hook(load)


def _to_cpu(state: Any) -> Any:
    """Copy a state dict to the CPU, so that it outlives the modules it came from."""
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {k: _to_cpu(v) for k, v in state.items()}
    return state
