"""Adapters in the student's optimiser: who trains what, and what its state dict carries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.support.loss_contract import make_pair
from yolo_kd.config.recipe import load_recipe
from yolo_kd.distillation.adapter_state import ADAPTER_STATE, hold_adapters
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
    hold_adapters(optimizer, distiller)
    before = {n: p.detach().clone() for n, p in [*student.named_parameters(), *distiller.named_parameters()]}
    train_a_step(optimizer)
    after = dict([*student.named_parameters(), *distiller.named_parameters()])
    assert len(before) > 8
    assert all(not torch.equal(before[n], after[n]) for n in before)


def test_what_a_loss_trains_by_itself_is_left_to_it() -> None:
    distiller = distiller_of("holistic", "cwd")
    critic = {id(p) for p in distiller.terms["holistic"].loss.self_trained()}
    optimizer = optimizer_of(distiller)
    hold_adapters(optimizer, distiller)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert critic
    assert not critic & held
    assert held == {id(p) for p in distiller.trained_parameters()}
    assert {f"losses.holistic.{n}" for n in distiller.losses["holistic"].state_dict()} <= set(
        optimizer.state_dict()[ADAPTER_STATE]
    )


def test_adapters_that_nobody_trains_are_an_error() -> None:
    student, distiller = nn.Linear(2, 2), distiller_of("cwd")
    with pytest.raises(AuditError, match=r"^adapter parameters adapters\.\S+, .* are not in the optimiser and would"):
        hold_adapters(optimizer_of(student), distiller)


def test_state_returns_to_another_run() -> None:
    runs = []
    for seed in (0, 1):
        student, distiller = nn.Linear(2, 2), distiller_of("cwd", "mgd", seed=seed)
        optimizer = optimizer_of(student, distiller)
        hold_adapters(optimizer, distiller)
        runs.append((optimizer, distiller))
    (first, trained), (second, fresh) = runs
    train_a_step(first)
    saved = first.state_dict()
    kept = {n: t.clone() for n, t in saved[ADAPTER_STATE].items()}
    train_a_step(first)  # the copy is not the module's own memory
    assert all(torch.equal(saved[ADAPTER_STATE][n], t) for n, t in kept.items())
    second.load_state_dict(saved)
    assert set(kept) == set(fresh.state_dict())
    assert all(torch.equal(t, kept[n]) for n, t in fresh.state_dict().items())
    assert ADAPTER_STATE in saved  # what was handed in stays whole
    assert not torch.equal(next(trained.parameters()), next(fresh.parameters()))


def test_an_optimiser_without_that_state_is_loaded_as_ever() -> None:
    distiller = distiller_of("cwd")
    optimizer = optimizer_of(distiller)
    plain = optimizer.state_dict()
    hold_adapters(optimizer, distiller)
    before = {n: t.clone() for n, t in distiller.state_dict().items()}
    optimizer.load_state_dict(plain)
    assert all(torch.equal(t, before[n]) for n, t in distiller.state_dict().items())
