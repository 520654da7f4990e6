"""Adapters in the student's optimiser: who trains what, and what its state dict carries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.loss_contract import make_pair
from yolo_kd.config.recipe import load_recipe
from yolo_kd.distillation.adapter_state import check_trained, to_cpu
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.errors import AuditError


def distiller_of(*names: str, seed: int = 0) -> Distiller:
    torch.manual_seed(seed)
    return Distiller(load_recipe({"losses": {name: {} for name in names}}), make_pair())


def optimizer_of(*modules: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for module in modules for p in module.parameters()], lr=0.1)


def train_a_step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


def test_adapters_are_trained_with_the_student() -> None:
    student, distiller = nn.Linear(2, 2), distiller_of("cwd", "mgd")
    optimizer = optimizer_of(student, distiller)
    check_trained(optimizer, distiller)
    before = {n: p.detach().clone() for n, p in [*student.named_parameters(), *distiller.named_parameters()]}
    train_a_step(optimizer)
    after = dict([*student.named_parameters(), *distiller.named_parameters()])
    assert len(before) > 8
    assert all(not torch.equal(before[n], after[n]) for n in before)


def test_what_a_loss_trains_by_itself_is_left_to_it() -> None:
    distiller = distiller_of("holistic", "cwd")
    critic = {id(p) for p in distiller.terms["holistic"].loss.self_trained()}
    optimizer = optimizer_of(distiller)
    check_trained(optimizer, distiller)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert critic
    assert not critic & held
    assert held == {id(p) for p in distiller.trained_parameters()}


def test_adapters_that_nobody_trains_are_an_error() -> None:
    student, distiller = nn.Linear(2, 2), distiller_of("cwd")
    with pytest.raises(AuditError, match=r"^adapter parameters adapters\.\S+, .* are not in the optimiser and would"):
        check_trained(optimizer_of(student), distiller)


def test_a_copy_on_the_cpu_is_not_the_modules_memory() -> None:
    distiller = distiller_of("cwd", "mgd")
    saved = to_cpu(distiller.state_dict())
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    train_a_step(optimizer_of(distiller))
    assert all(torch.equal(saved[name], tensor) for name, tensor in kept.items())
    assert set(saved) == set(distiller.state_dict())
