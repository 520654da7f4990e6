"""Holistic distillation: the authors' numbers for both adversarial losses, and a critic that really is one."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support.golden_vectors import cases
from tests.support.loss_contract import Facts, evaluate, make_inputs, make_loss, make_pair
from yolo_kd.losses.holistic import (
    STRENGTH,
    Critic,
    Holistic,
    SpectralConv2d,
    adversarial_loss,
    critic_loss,
    gradient_penalty,
    score_maps,
)

FACTS = {
    "holistic": Facts(
        exempt={
            "minimum": "the critic decides; tests/losses/test_holistic.py says what holds for equal models",
            "key": "critic_lr and form act in after_step; tests/losses/test_holistic.py tries every key",
        }
    )
}

GOLDEN = pytest.mark.parametrize("golden", cases("structured"), ids=lambda g: f"case {g.case}")


@GOLDEN
@pytest.mark.parametrize("form", ["wgan-gp", "hinge"])
def test_losses_are_the_authors(golden, form):
    student, teacher, name = golden["d_out_s"], golden["d_out_t"], form.replace("-", "_")
    assert critic_loss(student, teacher, form).item() == pytest.approx(golden[f"out_advD_{name}"].item(), rel=1e-5)
    assert adversarial_loss(student).item() == pytest.approx(golden[f"out_advG_{name}"].item(), rel=1e-5)


def test_penalty_of_a_linear_critic_is_known():
    """Its gradient is its weight everywhere, so the penalty is (‖w‖ − 1)²."""
    critic = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    student, teacher = torch.randn(2, 4, 3, 2, 2)
    value = gradient_penalty(critic, student, teacher, torch.rand(4, 1, 1, 1))
    weight = critic[1].weight
    assert value.item() == pytest.approx((weight.norm().item() - 1) ** 2, rel=1e-4)
    value.backward()
    assert weight.grad is not None


def test_spectral_norm_is_one():
    torch.manual_seed(0)
    conv = SpectralConv2d(6, 8, 3, padding=1)
    for _ in range(100):
        conv(torch.randn(1, 6, 4, 4))
    before = conv.u.clone()
    conv.eval()
    conv(torch.randn(1, 6, 4, 4))
    assert torch.equal(conv.u, before), "power iteration belongs to training"
    largest = torch.linalg.svdvals(conv.weight.flatten(1).detach())[0]
    unit = torch.zeros(1, 6, 3, 3)
    unit[0, 2, 1, 1] = 1
    bias = conv.bias.detach()[:, None, None]
    scaled = (conv(unit)[0] - bias).flip(1, 2)  # the convolution's answer to an impulse is its weight
    torch.testing.assert_close(scaled, conv.weight[:, 2].detach() / largest, rtol=1e-3, atol=1e-5)


def test_critic_gives_one_answer_to_each_map():
    assert Critic(5)(torch.randn(3, 5, 64, 64)).shape == (3, 1, 1, 1)


def test_maps_are_pooled_level_by_level():
    inputs = make_inputs()
    pooled = [
        F.adaptive_avg_pool2d(scores.transpose(1, 2).unflatten(-1, shape), 64)
        for scores, shape in zip(inputs.teacher.per_level(inputs.teacher.scores), inputs.teacher.shapes, strict=True)
    ]
    torch.testing.assert_close(score_maps(inputs.teacher, (0, 1, 2)), torch.cat(pooled, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("image", [(128, 160), (64, 288), (640, 640)])
def test_maps_of_any_size_are_judged(image):
    inputs = make_inputs(image=image, batch=1)
    maps = score_maps(inputs.teacher, (0, 2))
    assert maps.shape == (1, 6, 64, 64)
    fine = inputs.teacher.scores[:, : image[0] * image[1] // 64]
    torch.testing.assert_close(maps[:, :3].mean((2, 3)), fine.mean(1), rtol=0.1, atol=0.0)


def test_equal_models_are_worth_zero():
    pair = make_pair(equal=True)
    assert make_loss(Holistic, pair)(make_inputs(pair, equal=True))["kholi_loss"].item() == 0


@pytest.mark.parametrize("form", ["wgan-gp", "hinge"])
def test_critic_learns_to_tell_them_apart(form):
    """A student that stays as it is becomes ever easier to recognise."""
    pair, inputs = make_pair(), make_inputs()
    loss = make_loss(Holistic, pair, critic_lr=0.05, form=form)
    before = loss(inputs)["kholi_loss"].item()
    for _ in range(6):
        loss(inputs)
        loss.after_step()
    assert loss(inputs)["kholi_loss"].item() > before + 0.1 * STRENGTH


def test_student_follows_the_critic_and_the_critic_gets_no_gradient_from_it():
    pair, inputs = make_pair(), make_inputs(teacher_grad=True)
    loss = make_loss(Holistic, pair)
    loss(inputs)["kholi_loss"].backward()
    assert inputs.student.scores.grad.abs().max() > 0
    assert inputs.teacher.scores.grad is None
    assert all(p.grad is None and p.requires_grad for p in loss.self_trained())


def test_critic_steps_once_for_each_batch_with_gradient():
    loss = make_loss(Holistic, make_pair())

    def weights():
        return torch.cat([p.detach().flatten() for p in loss.self_trained()])

    first = weights()
    loss.after_step()
    assert torch.equal(weights(), first), "nothing has been seen yet"
    with torch.no_grad():
        loss(make_inputs())
    loss.after_step()
    assert torch.equal(weights(), first), "validation is not training"
    loss(make_inputs())
    loss.after_step()
    second = weights()
    assert not torch.equal(second, first)
    loss.after_step()
    assert torch.equal(weights(), second), "a batch counts once"
    loss(make_inputs(progress=1.0))
    loss.after_step()
    assert torch.equal(weights(), second), "the learning rate ends at zero"


def test_overflowed_logits_do_not_poison_the_critic():
    loss, inputs = make_loss(Holistic, make_pair()), make_inputs()
    inputs.student.scores.data[0, 0, 0] = torch.inf
    loss(inputs)
    loss.after_step()
    assert all(p.isfinite().all() for p in loss.self_trained())


def test_resume_continues_bit_for_bit():
    """Weights, momenta and power iteration come back from the state dict."""
    pair = make_pair()
    straight = make_loss(Holistic, pair, critic_lr=0.01)

    def train(loss, seeds):
        for seed in seeds:
            evaluate(loss, make_inputs(pair, seed=seed), seed)
            loss.after_step()

    train(straight, range(1))
    state = copy.deepcopy(straight.state_dict())
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    train(straight, range(1, 3))
    resumed = make_loss(Holistic, pair, critic_lr=0.01)
    resumed.load_state_dict(state)
    train(resumed, range(1, 3))
    for name, value in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    rewound = straight
    rewound.load_state_dict(state)  # as after a NaN, into an optimiser that has been running
    train(rewound, range(1, 3))
    for name, value in resumed.state_dict().items():
        assert torch.equal(rewound.state_dict()[name], value), name


def test_momentum_is_that_of_sgd():
    """Momenta in buffers, zero at first, are what SGD would have made by itself."""
    pair = make_pair()
    ours, plain = make_loss(Holistic, pair, critic_lr=0.01), make_loss(Holistic, pair, critic_lr=0.01)
    plain.adversary._optimiser = torch.optim.SGD(plain.self_trained(), 0.01, momentum=0.9, weight_decay=1e-4)
    for loss in (ours, plain):
        for seed in range(2):
            evaluate(loss, make_inputs(pair, seed=seed), seed)
            loss.after_step()
    for a, b in zip(ours.self_trained(), plain.self_trained(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("key", [{"critic_lr": 0.01}, {"form": "hinge"}, {"levels": ["p3"]}])
def test_every_key_changes_what_the_student_gets(key):
    pair, values = make_pair(), []
    for keys in ({}, key):
        loss = make_loss(Holistic, pair, **keys)
        for seed in range(2):
            evaluate(loss, make_inputs(pair, seed=seed), seed)
            loss.after_step()
        values.append(loss(make_inputs(pair))["kholi_loss"].item())
    assert values[0] != pytest.approx(values[1], rel=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"critic_lr": 0}, "critic_lr must be a number of more than 0"),
        ({"form": "wgan"}, "form must be wgan-gp or hinge, received 'wgan'. Did you mean 'wgan-gp'"),
    ],
)
def test_wrong_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        Holistic(**keys)


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"student \(2, 1, 1, 1\), teacher \(3, 1, 1, 1\)"):
        critic_loss(torch.zeros(2, 1, 1, 1), torch.zeros(3, 1, 1, 1))
