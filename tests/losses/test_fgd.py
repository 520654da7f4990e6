"""FGD against the authors' numbers and against loops."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.losses.kernels.test_boxes import flat, slow_weights
from tests.support.golden_vectors import assert_gradient, cases
from tests.support.loss_contract import BOXES, IMAGE, make_inputs, make_loss, make_pair
from yolo_kd.errors import PairError
from yolo_kd.losses.fgd import CELLS, CHANNELS, FGD, OBJECTS, ContextBlock, fgd_sums, focal_masks, normalise
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.ops import attention
from yolo_kd.structures import LossInputs

GOLDEN = pytest.mark.parametrize("golden", cases("fgd"), ids=lambda g: f"case {g.case}")


def masks_of(golden, level):
    boxes = [golden[f"gt_boxes_{i}"] for i in range(golden["s_feat_0"].shape[0])]
    index = torch.tensor([i for i, b in enumerate(boxes) for _ in b])
    size = tuple(golden["img_hw"].tolist())
    return focal_masks(torch.cat(boxes), index, len(boxes), size, tuple(golden[f"s_feat_{level}"].shape[-2:]))


def context_of(golden, level, side):
    channels = golden[f"t_feat_{level}"].shape[1]
    block = ContextBlock(channels)
    block.mask.load_state_dict(golden.state(f"p{level}.conv_mask_{side}."))
    block.add.load_state_dict(golden.state(f"p{level}.channel_add_conv_{side}."))
    return block


def sums_of(golden, level, student):
    aligned = F.conv2d(student, golden[f"p{level}.align.weight"], golden[f"p{level}.align.bias"])
    blocks = context_of(golden, level, "s"), context_of(golden, level, "t")
    return fgd_sums(aligned, golden[f"t_feat_{level}"], *masks_of(golden, level), *blocks, golden.hyper["temp"])


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_masks_are_the_authors(golden, level):
    fg, bg = masks_of(golden, level)
    assert torch.equal(fg, golden[f"mask_fg_{level}"])
    assert torch.equal(bg, golden[f"mask_bg_{level}"])


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_terms_are_the_authors(golden, level):
    h, student = golden.hyper, golden[f"s_feat_{level}"].requires_grad_()
    sums = sums_of(golden, level, student)
    ours = {"fg": sums.fg, "bg": sums.bg, "mask": sums.channel + sums.spatial, "rela": sums.rela}
    weights = dict(zip(ours, (h["alpha_fgd"], h["beta_fgd"], h["gamma_fgd"], h["lambda_fgd"]), strict=True))
    for name, value in ours.items():
        assert value.item() == pytest.approx(golden[f"out_{name}_{level}"].item(), rel=1e-5), name
    total = sum(weights[name] * value for name, value in ours.items())
    assert total.item() == pytest.approx(golden[f"out_total_{level}"].item(), rel=1e-5)
    total.backward()
    assert_gradient(student.grad, golden[f"grad_s_feat_{level}"])


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_attention_is_the_authors(golden, level):
    strength, temperature = golden[f"t_feat_{level}"].abs(), golden.hyper["temp"]
    spatial = attention(strength.mean(1).flatten(1), temperature).view_as(strength[:, 0])
    torch.testing.assert_close(spatial, golden[f"attn_spatial_t_{level}"])
    torch.testing.assert_close(attention(strength.mean((2, 3)), temperature), golden[f"attn_channel_t_{level}"])


@pytest.mark.parametrize("shape", [(16, 20), (4, 5)])
@pytest.mark.parametrize("name", BOXES)
def test_masks_equal_the_loop(name, shape):
    boxes, index = flat(BOXES[name])
    fg, bg = focal_masks(boxes, index, len(BOXES[name]), IMAGE, shape)
    slow = slow_weights(BOXES[name], IMAGE, shape)
    np.testing.assert_array_equal(fg.numpy(), slow)
    for ours, theirs in zip(bg.numpy(), slow, strict=True):
        count = (theirs == 0).sum()
        np.testing.assert_array_equal(ours, (theirs == 0) / np.float32(max(count, 1)))


def test_sums_equal_the_loop():
    rng = np.random.default_rng(3)
    s, t = rng.normal(size=(2, 3, 2, 4)), rng.normal(size=(2, 3, 2, 4))
    fg, bg = rng.uniform(size=(2, 2, 4)), rng.uniform(size=(2, 2, 4))
    blocks = [ContextBlock(3).double() for _ in range(2)]  # the identity at the start
    ours = fgd_sums(*(torch.from_numpy(a) for a in (s, t, fg, bg)), *blocks, 0.7)

    def attention(f):
        per_cell = [[math.exp(sum(abs(f[c, y, x]) for c in range(3)) / 3 / 0.7) for x in range(4)] for y in range(2)]
        per_channel = [math.exp(np.abs(f[c]).mean() / 0.7) for c in range(3)]
        return 8 * np.array(per_cell) / np.sum(per_cell), 3 * np.array(per_channel) / np.sum(per_channel)

    expected = dict.fromkeys(ours._fields, 0.0)
    for b in range(2):
        (space_s, channel_s), (space_t, channel_t) = attention(s[b]), attention(t[b])
        expected["channel"] += np.abs(channel_s - channel_t).sum() / 2
        expected["spatial"] += np.abs(space_s - space_t).sum() / 2
        for c, y, x in np.ndindex(3, 2, 4):
            error = (s[b, c, y, x] - t[b, c, y, x]) ** 2
            expected["rela"] += error / 2
            expected["fg"] += error * space_t[y, x] * channel_t[c] * fg[b, y, x] / 2
            expected["bg"] += error * space_t[y, x] * channel_t[c] * bg[b, y, x] / 2
    for name, value in ours._asdict().items():
        assert value.item() == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize("chunk", [1, 2**18])
def test_gradients_of_map_and_contexts_equal_autograd(chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    torch.manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, 6, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    blocks = [ContextBlock(4).double() for _ in range(2)]
    for block in blocks:
        torch.nn.init.normal_(block.add[-1].weight)
    fg, bg = torch.rand(3, 5, 6, dtype=torch.float64), torch.rand(3, 5, 6, dtype=torch.float64)

    def attentions(x):
        strength = x.abs()
        spatial, channel = strength.mean(1).flatten(1) / 0.5, strength.mean((2, 3)) / 0.5
        return 30 * spatial.softmax(-1).view(3, 5, 6), 4 * channel.softmax(-1)

    (s_spatial, s_channel), (t_spatial, t_channel) = attentions(student), attentions(teacher)
    error = ((student - teacher).square() * t_channel[:, :, None, None]).sum(1) * t_spatial
    plain = {
        "fg": (error * fg).sum() / 3,
        "bg": (error * bg).sum() / 3,
        "channel": (s_channel - t_channel).abs().sum() / 3,
        "spatial": (s_spatial - t_spatial).abs().sum() / 3,
        "rela": (blocks[0](student) - blocks[1](teacher)).square().sum() / 3,
    }
    ours = fgd_sums(student, teacher, fg, bg, *blocks, 0.5)._asdict()
    wanted = [student, *blocks[0].parameters(), *blocks[1].parameters()]
    for name, value in plain.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-9, msg=name)
    found, expected = (
        torch.autograd.grad(sum((i + 1) * v for i, v in enumerate(x.values())), wanted) for x in (ours, plain)
    )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def test_maps_in_half_precision_are_worked_on_in_float32():
    maps = [torch.randn(2, 4, 5, 6).bfloat16() for _ in range(2)]
    blocks = [ContextBlock(4) for _ in range(2)]
    weights = torch.rand(2, 2, 5, 6).unbind(0)
    half, single = maps[0].clone().requires_grad_(), maps[0].float().requires_grad_()
    sums = [sum(fgd_sums(s, t, *weights, *blocks)) for s, t in ((half, maps[1]), (single, maps[1].float()))]
    assert sums[0].item() == pytest.approx(sums[1].item(), rel=1e-6)
    for value in sums:
        value.backward()
    torch.testing.assert_close(half.grad, single.grad.bfloat16())


def test_the_context_block_starts_as_the_identity_and_sees_the_whole_map():
    torch.manual_seed(0)
    block, feature = ContextBlock(6), torch.randn(2, 6, 4, 5)
    assert torch.equal(block(feature), feature)
    torch.nn.init.normal_(block.add[-1].weight)
    added = block(feature) - feature
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added))
    p = torch.softmax(F.conv2d(feature, block.mask.weight, block.mask.bias).flatten(2), -1)
    context = (feature.flatten(2) * p).sum(-1)
    torch.testing.assert_close(added[:, :, 0, 0], block.add(context[..., None, None])[..., 0, 0])


def test_the_published_sum_is_kept_at_the_reference_setting():
    """At 256 channels, 2800 cells and 7 separate objects, the loss is its strength times the published sum."""
    shape = (40, 70)
    boxes = torch.tensor([[8.0 + 80 * i, 8, 40 + 80 * i, 60] for i in range(OBJECTS)])
    assert math.prod(shape) == CELLS
    fg, bg = focal_masks(boxes, torch.zeros(OBJECTS, dtype=torch.int64), 1, (320, 560), shape)
    torch.manual_seed(0)
    student, teacher = torch.randn(1, CHANNELS, *shape), torch.randn(1, CHANNELS, *shape)
    loss = FGD()
    blocks = ContextBlock(CHANNELS), ContextBlock(CHANNELS)
    sums = fgd_sums(student, teacher, fg, bg, *blocks)
    published = 1e-3 * sums.fg + 5e-4 * sums.bg + 5e-4 * (sums.channel + sums.spatial) + 5e-6 * sums.rela
    pair = make_pair((CHANNELS,), (CHANNELS,), (8,), equal=True)
    inputs = make_inputs(pair, equal=True, image=(320, 560), batch=1)
    targets = replace(inputs.targets, boxes=boxes, image_index=torch.zeros(OBJECTS, dtype=torch.int64))
    outputs = replace(inputs.student, features=(student,)), replace(inputs.teacher, features=(teacher,))
    loss.build(pair)
    ours = loss(LossInputs(*outputs, targets))["fgd_loss"]
    assert ours.item() == pytest.approx(FGD.strength * published.item(), rel=1e-4)


def test_strength_does_not_depend_on_size_width_or_number_of_boxes():
    torch.manual_seed(0)

    def means(channels, shape, boxes):
        size = (shape[0] * 8, shape[1] * 8)
        xyxy = torch.rand(boxes, 2).repeat(1, 2) * 0.8 * size[0]
        xyxy[:, 2:] += 0.15 * size[0]
        masks = focal_masks(xyxy, torch.arange(boxes) % 2, 2, size, shape)
        maps = [F.silu(torch.randn(2, channels, *shape)) for _ in range(2)]
        return normalise(fgd_sums(*maps, *masks, ContextBlock(channels), ContextBlock(channels)), *masks, channels)

    small, large = means(64, (20, 20), 6), means(128, (80, 80), 60)
    for name in ("fg", "bg", "rela"):  # of noise, attention itself flattens with more channels and cells
        assert getattr(large, name).item() == pytest.approx(getattr(small, name).item(), rel=0.25), name


def test_an_image_without_boxes_has_background_only():
    fg, bg = focal_masks(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 2, IMAGE, (4, 5))
    assert not fg.any()
    torch.testing.assert_close(bg, torch.full((2, 4, 5), 1 / 20))
    s, t = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(2, 3, 4, 5)
    sums = normalise(fgd_sums(s, t, fg, bg, ContextBlock(3), ContextBlock(3)), fg, bg, 3)
    assert sums.fg.item() == 0
    sums.fg.backward()
    assert not s.grad.any()


def test_masks_are_made_once_per_step():
    pair, made = make_pair(), []
    inputs = make_inputs(pair)
    loss = make_loss(FGD, pair)
    first = loss(inputs)
    inputs.once, once = lambda key, make: made.append(key) or once(key, make), inputs.once
    assert loss(inputs) == first
    assert ("focal_masks", 0) in made
    assert inputs._memo[("focal_masks", 0)][0].shape == (2, 16, 20)


def test_levels_that_are_not_there_are_refused():
    with pytest.raises(PairError, match="'p6'"):
        FGD(levels=["p6"]).build(make_pair())


@pytest.mark.parametrize(
    ("key", "value"), [("alpha", -1), ("beta", "x"), ("gamma", -1), ("lam", True), ("temperature", 0)]
)
def test_a_constant_out_of_range_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        FGD(**{key: value})


def test_masks_of_another_shape_are_refused():
    maps = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"fg \(1, 4, 5\)"):
        fgd_sums(*maps, torch.zeros(1, 4, 5), torch.zeros(1, 4, 5), ContextBlock(2), ContextBlock(2))


def test_inputs_without_targets_are_refused():
    pair = make_pair()
    inputs = make_inputs(pair)
    with pytest.raises(ValueError, match="targets"):
        make_loss(FGD, pair)(LossInputs(inputs.student, inputs.teacher, None, 0.0, inputs._align))
