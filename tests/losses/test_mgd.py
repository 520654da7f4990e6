"""MGD against the authors' numbers and against a loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import Facts, evaluate, make_inputs, make_loss, make_pair
from yolo_kd.losses.kernels.channel_stats import standardise
from yolo_kd.losses.mgd import MGD, generator, keep_mask, mgd_sum

FACTS = {
    "mgd": Facts(
        exempt={"minimum": "the generator is trained: at the start it does not restore the teacher's map"},
        duplication=0.1,  # what is hidden is drawn for each image anew
        values={"mask": "channel"},
    )
}

METHODS = {"mgd": "spatial", "mgd_channelmask": "channel"}
GOLDEN = pytest.mark.parametrize(
    "golden", [g for method in METHODS for g in cases(method)], ids=lambda g: f"{g.method} case {g.case}"
)


def generator_of(golden, prefix, channels):
    module = generator(channels)
    module.load_state_dict(golden.state(prefix))
    return module


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_masks_are_the_authors(golden, level):
    ours = keep_mask(golden[f"rand_{level}"], golden.hyper["lambda_mgd"], METHODS[golden.method])
    assert torch.equal(ours, golden[f"mask_{level}"])


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_sum_is_the_authors(golden, level):
    student, teacher = golden[f"s_feat_{level}"].requires_grad_(), golden[f"t_feat_{level}"]
    aligned = F.conv2d(student, golden[f"p{level}.align.weight"], golden[f"p{level}.align.bias"])
    generate = generator_of(golden, f"p{level}.generation.", teacher.shape[1])
    value = mgd_sum(aligned, teacher, golden[f"mask_{level}"], generate)
    assert value.item() == pytest.approx(golden[f"out_dis_{level}"].item(), rel=1e-5)
    total = golden.hyper["alpha_mgd"] * value
    assert total.item() == pytest.approx(golden[f"out_total_{level}"].item(), rel=1e-5)
    total.backward()
    assert_gradient(student.grad, golden[f"grad_s_feat_{level}"])


@pytest.mark.parametrize("golden", cases("damo"), ids=lambda g: f"case {g.case}")
def test_standardised_sum_is_damo_yolos(golden):
    """DAMO-YOLO standardises both maps first; so do we by default."""
    if "mgd_mask_0" not in golden:
        pytest.skip("the trimmed copy does not hold this part")
    students, total = [golden[f"s_feat_{i}"].requires_grad_() for i in range(3)], 0.0
    for i, student in enumerate(students):
        align = golden[f"p.align_module.{i}.weight"], golden[f"p.align_module.{i}.bias"]
        maps = standardise(F.conv2d(student, *align)), standardise(golden[f"t_feat_{i}"])
        generate = generator_of(golden, f"gen{i}.", maps[1].shape[1])
        total = total + golden.hyper["alpha_mgd"] * mgd_sum(*maps, golden[f"mgd_mask_{i}"], generate)
    assert total.item() == pytest.approx(golden["out_mgd"].item(), rel=1e-5)
    total.backward()
    for i, student in enumerate(students):
        assert_gradient(student.grad, golden[f"grad_mgd_s_feat_{i}"])


def test_sum_equals_the_loop():
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 2, 3, 4)), rng.normal(size=(2, 2, 3, 4))
    keep = (rng.uniform(size=(2, 1, 3, 4)) > 0.5).astype(float)
    generate = generator(2).double()

    def conv3x3(x, conv):
        w, b = conv.weight.detach().numpy(), conv.bias.detach().numpy()
        out = np.zeros_like(x)
        for o, y, z in np.ndindex(x.shape):
            out[o, y, z] = b[o]
            for c, dy, dz in np.ndindex(2, 3, 3):
                if 0 <= y + dy - 1 < x.shape[1] and 0 <= z + dz - 1 < x.shape[2]:
                    out[o, y, z] += w[o, c, dy, dz] * x[c, y + dy - 1, z + dz - 1]
        return out

    expected = 0.0
    for b in range(2):
        restored = conv3x3(np.maximum(conv3x3(s[b] * keep[b], generate[0]), 0), generate[2])
        expected += ((restored - t[b]) ** 2).sum() / 2
    assert mgd_sum(*(torch.from_numpy(a) for a in (s, t, keep)), generate).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mask", ["spatial", "channel"])
def test_the_ratio_is_what_is_hidden(mask):
    torch.manual_seed(0)
    loss = MGD(lam=0.65, mask=mask)
    keep = loss._keep(torch.empty(8, 256, 40, 40))
    assert keep.shape == ((8, 1, 40, 40) if mask == "spatial" else (8, 256, 1, 1))
    assert keep.mean().item() == pytest.approx(0.35, abs=0.03)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert MGD(lam=0.0, mask=mask)._keep(torch.empty(2, 3, 4, 4)).all()


def test_draws_differ_by_step_and_stop_in_eval_mode():
    pair = make_pair()
    loss = make_loss(MGD, pair)
    assert evaluate(loss, make_inputs(pair), 1) != evaluate(loss, make_inputs(pair), 2)
    loss.eval()
    assert evaluate(loss, make_inputs(pair), 1) == evaluate(loss, make_inputs(pair), 2)


def test_the_strength_is_a_mean_per_level():
    """Without standardisation the loss is the published sum without alpha, over channels and cells."""
    pair = make_pair()
    loss, inputs = make_loss(MGD, pair, standardise=False).eval(), make_inputs(pair)
    expected = 0.0
    for i, generate in enumerate(loss.generators):
        teacher = inputs.teacher_feature(i)
        value = mgd_sum(inputs.aligned("conv1x1", i), teacher, torch.ones(1), generate)
        expected += value.item() / (teacher.shape[1] * teacher.shape[2] * teacher.shape[3])
    assert loss(inputs)["mgd_loss"].item() == pytest.approx(MGD.strength * expected, rel=1e-5)


def test_standardised_maps_make_the_scale_of_the_teacher_irrelevant():
    pair = make_pair()
    loss, inputs = make_loss(MGD, pair).eval(), make_inputs(pair)
    before = loss(inputs)["mgd_loss"].item()
    scaled = make_inputs(pair)
    for feature in scaled.teacher.features:
        feature.mul_(100)
    assert loss(scaled)["mgd_loss"].item() == pytest.approx(before, rel=1e-2)


def test_a_generator_that_restores_the_teacher_has_no_loss():
    teacher = torch.randn(2, 3, 4, 5)
    keep = keep_mask(torch.rand(2, 1, 4, 5), 0.5)
    assert mgd_sum(torch.randn(2, 3, 4, 5), teacher, keep, lambda _: teacher).item() == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lam": 1}, "lam must be a number of at least 0 and less than 1, received 1"),
        ({"lam": -0.1}, "lam"),
        ({"mask": "spacial"}, "Did you mean 'spatial'"),
        ({"mask": None}, "mask must be spatial or channel"),
        ({"standardise": "yes"}, "standardise must be true or false"),
    ],
)
def test_a_key_out_of_range_is_named(keys, message):
    with pytest.raises(ValueError, match=message):
        MGD(**keys)
