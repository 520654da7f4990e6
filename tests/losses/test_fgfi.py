"""Fine-grained feature imitation against the authors' numbers and against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.golden_vectors import Golden, assert_gradient, cases
from tests.support.loss_contract import BOXES, Facts, make_inputs, make_loss, make_pair
from yolo_kd.errors import PairError
from yolo_kd.losses.fgfi import (
    FGFI,
    Anchors,
    anchor_overlaps,
    grid_anchors,
    imitation_hits,
    imitation_loss,
)

FACTS = {
    "fgfi": Facts(
        exempt={"minimum": "its adapter is trained, so the student's features are not the teacher's at the start"},
        values={"anchor_ratios": [1.0, 3.0]},
    )
}

GOLDEN = pytest.mark.parametrize("golden", cases("fgfi"), ids=lambda g: f"case {g.case}")


def hits_of(golden: Golden, level: int) -> Tensor:
    h, w = golden[f"s_feat_{level}"].shape[-2:]
    anchors = golden[f"anchors_{level}"].view(h, w, -1, 4)
    grid = Anchors(anchors[0, :, :, [0, 2]], anchors[:, 0, :, [1, 3]])
    assert grid.x.shape == (w, int(golden[f"num_anchors_{level}"]), 2)
    boxes = [golden[f"gt_boxes_{i}"] for i in range(len(golden["s_feat_0"]))]
    index = torch.tensor([i for i, b in enumerate(boxes) for _ in b])
    return imitation_hits([grid], torch.cat(boxes), index, len(boxes), golden.hyper["psi"], legacy=True)[0]


@GOLDEN
@pytest.mark.parametrize("level", range(3))
def test_masks_are_the_authors(golden, level):
    hits = hits_of(golden, level)
    assert torch.equal(hits, golden[f"mask_count_{level}"])
    assert 2 * (hits > 0).sum() == golden[f"out_norm_{level}"]


@GOLDEN
def test_loss_and_gradient_are_the_authors(golden):
    students = [golden[f"s_feat_{i}"].requires_grad_() for i in range(3)]
    values = []
    for i, student in enumerate(students):
        adapted = F.conv2d(student, golden[f"p{i}.0.weight"], golden[f"p{i}.0.bias"], padding=1).relu()
        values.append(imitation_loss(adapted, golden[f"t_feat_{i}"], hits_of(golden, i) > 0))
        ours = golden.hyper["imitation_loss_weight"] * values[-1].item()
        assert ours == pytest.approx(golden[f"out_total_{i}"].item(), rel=1e-5)
    total = golden.hyper["imitation_loss_weight"] * torch.stack(values).sum()
    assert total.item() == pytest.approx(golden["out_total"].item(), rel=1e-5)
    total.backward()
    for i, student in enumerate(students):
        assert_gradient(student.grad, golden[f"grad_s_feat_{i}"])


def slow_masks(shapes, strides, boxes, image_index, batch, size, psi, scale, ratios):
    """Mark cells by loops over boxes, levels, cells and anchors."""
    masks = [np.zeros((batch, h, w), bool) for h, w in shapes]
    for box, image in zip(boxes.numpy().astype(np.float64), image_index.tolist(), strict=True):
        bx1, bx2 = np.clip(box[[0, 2]], 0, size[1])
        by1, by2 = np.clip(box[[1, 3]], 0, size[0])
        fits = {}
        for level, ((h, w), stride) in enumerate(zip(shapes, strides, strict=True)):
            for y in range(h):
                for x in range(w):
                    for ratio in ratios:
                        aw, ah = scale * stride / ratio**0.5, scale * stride * ratio**0.5
                        cx, cy = (x + 0.5) * stride, (y + 0.5) * stride
                        ow = max(min(cx + aw / 2, bx2) - max(cx - aw / 2, bx1), 0)
                        oh = max(min(cy + ah / 2, by2) - max(cy - ah / 2, by1), 0)
                        fit = ow * oh / (aw * ah + (bx2 - bx1) * (by2 - by1) - ow * oh)
                        fits[level, y, x] = max(fit, fits.get((level, y, x), 0))
        best = max(fits.values())
        for (level, y, x), fit in fits.items():
            masks[level][image, y, x] |= fit > psi * best
    return masks


# boxes with numbers that put no anchor exactly on the threshold, where float32 and float64 may disagree
UNEVEN = (((10.3, 12.1, 70.7, 91.2), (-20.2, 88.4, 30.9, 140.1)), ((33.3, 5.2, 49.1, 28.6),))


def test_masks_equal_loops():
    inputs, psi = make_inputs(boxes=UNEVEN), 0.6
    masks = make_loss(FGFI, make_pair(), psi=psi)._masks(inputs)
    t = inputs.targets
    expected = slow_masks(
        inputs.teacher.shapes, (8, 16, 32), t.boxes, t.image_index, 2, t.image_size, psi, 4.0, (0.5, 1.0, 2.0)
    )
    for mask, slow in zip(masks, expected, strict=True):
        np.testing.assert_array_equal(mask.numpy(), slow)
        assert mask.dtype == torch.bool


def test_loss_is_the_published_one_over_channels():
    """On one level the relation that the docstring states holds."""
    pair, inputs = make_pair(), make_inputs()
    loss = make_loss(FGFI, pair, levels=["p4"])
    mask = loss._masks(inputs)[1]
    published = imitation_loss(loss.adapters[0](inputs.student.features[1]), inputs.teacher.features[1], mask)
    assert loss(inputs)["fgfi_loss"].item() == pytest.approx(FGFI.strength * published.item() / 24, rel=1e-5)


def test_a_box_is_imitated_on_levels_of_its_scale():
    loss = make_loss(FGFI, make_pair())
    small = loss._masks(make_inputs(boxes=(((40, 40, 56, 56),),)))
    large = loss._masks(make_inputs(boxes=(((0, 0, 128, 128),),)))
    assert [bool(m.any()) for m in small] == [True, False, False]
    assert [bool(m.any()) for m in large] == [False, False, True]


@pytest.mark.parametrize("boxes", ["none", "wholly outside", "no area"])
def test_without_objects_value_and_gradient_are_zero(boxes):
    loss, inputs = make_loss(FGFI, make_pair()), make_inputs(boxes=BOXES[boxes])
    value = loss(inputs)["fgfi_loss"]
    value.backward()
    assert value.item() == 0
    assert all(not f.grad.any() for f in inputs.student.features)


def test_boxes_are_clipped_to_the_image():
    loss = make_loss(FGFI, make_pair())
    outside = loss._masks(make_inputs(boxes=(((-40, -30, 50, 60), (120, 90, 220, 190)),)))
    clipped = loss._masks(make_inputs(boxes=(((0, 0, 50, 60), (120, 90, 160, 128)),)))
    assert all(torch.equal(a, b) for a, b in zip(outside, clipped, strict=True))


def test_chunks_do_not_matter():
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(0)) * 60
    boxes[:, 2:] += boxes[:, :2]
    index = torch.arange(40) % 3
    grids = [grid_anchors((16, 20), 8, 4.0, (0.5, 1.0)), grid_anchors((8, 10), 16, 4.0, (0.5, 1.0))]
    whole = imitation_hits(grids, boxes, index, 3)
    pieces = imitation_hits(grids, boxes, index, 3, chunk=2000)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))


def test_anchors_have_the_area_and_ratio_asked_for():
    grid = grid_anchors((2, 3), 8, 4.0, (0.5, 2.0))
    width, height = (grid.x[..., 1] - grid.x[..., 0])[0], (grid.y[..., 1] - grid.y[..., 0])[0]
    torch.testing.assert_close(width * height, torch.tensor([1024.0, 1024.0]))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(grid.x.mean(-1)[:, 0], torch.tensor([4.0, 12.0, 20.0]))
    own = torch.stack([grid.x[1, 0, 0], grid.y[1, 0, 0], grid.x[1, 0, 1], grid.y[1, 0, 1]])[None]
    assert anchor_overlaps(grid, own)[0, 1, 1, 0].item() == pytest.approx(1)


def test_masks_are_shared_between_terms():
    inputs, pair = make_inputs(), make_pair()
    make_loss(FGFI, pair)(inputs)
    make_loss(FGFI, pair, levels=["p3"])(inputs)
    assert sum(key[0] == "imitation" for key in inputs._memo) == 1


def test_adapters_exist_for_the_levels_in_use_only():
    loss = make_loss(FGFI, make_pair(), levels=["p3", "p5"])
    assert [a[0].weight.shape for a in loss.adapters] == [(16, 8, 3, 3), (32, 16, 3, 3)]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"psi": 1.0}, "psi must be a number of at least 0 and less than 1, received 1.0"),
        ({"psi": -0.1}, "psi must be a number of at least 0"),
        ({"anchor_scale": 0}, "anchor_scale must be a number of more than 0"),
        ({"anchor_ratios": 2.0}, "anchor_ratios must be a list"),
        ({"anchor_ratios": []}, "anchor_ratios must be a list"),
        ({"anchor_ratios": [0.5, -1]}, "anchor_ratios must be a list, each entry a number of more than 0"),
        ({"levels": "p3"}, "levels must be a list"),
    ],
)
def test_wrong_keys(keys, message):
    with pytest.raises(ValueError, match=message):
        FGFI(**keys)


def test_unknown_level():
    with pytest.raises(PairError, match="'p7'"):
        FGFI(levels=["p7"]).build(make_pair())


def test_shapes_must_agree():
    a, b = torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"student \(1, 2, 3, 3\), teacher \(1, 2, 3, 4\)"):
        imitation_loss(a, b, torch.ones(1, 3, 3))
    with pytest.raises(ValueError, match=r"mask \(1, 3, 4\), cells \(1, 3, 3\)"):
        imitation_loss(a, a, torch.ones(1, 3, 4))
