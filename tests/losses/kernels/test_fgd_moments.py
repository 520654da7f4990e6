"""The hand-written gradient of `fgd` against plain torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.losses.kernels.draws import draw
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.fgd_moments import Moments, context_weights, pair_moments, pair_moments_reference

B, C, N = 3, 4, 30


@pytest.mark.parametrize("chunk", [1, 2 * C * N, 2**18], ids=["one image", "two images", "all images"])
@pytest.mark.parametrize("channels_last", [(False, False), (True, True), (False, True), (True, False)])
def test_values_and_gradients_equal_the_reference(chunk, channels_last, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    student, teacher = (
        draw(B, N, C, seed=i).mT if last else draw(B, C, N, seed=i) for i, last in enumerate(channels_last)
    )
    masks = [(draw(C, seed=i, spread=1.0).requires_grad_(), draw(1, seed=i + 2).requires_grad_()) for i in (2, 3)]
    student.requires_grad_()
    found, expected = (f(student, teacher, 0.7, *masks) for f in (pair_moments, pair_moments_reference))
    for name, ours, plain in zip(Moments._fields, found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-10, msg=name)
    leaves = [student, *masks[0], *masks[1]]
    results = []
    for moments in (found, expected):
        total = sum((m * draw(*m.shape, seed=i)).sum() for i, m in enumerate(moments) if m.requires_grad)
        results.append(torch.autograd.grad(total, leaves))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-9)


def test_nothing_flows_to_the_teachers_magnitudes():
    student, teacher = draw(B, C, N).requires_grad_(), draw(B, C, N, seed=1)
    mask = draw(C, seed=2).requires_grad_(), draw(1, seed=3).requires_grad_()
    moments = pair_moments(student, teacher, 0.5, mask, mask)
    assert {n for n in Moments._fields if not getattr(moments, n).requires_grad} == {"t_spatial", "t_channel"}


def test_context_weights_are_a_softmax_of_a_convolution():
    maps, weight, bias = draw(B, C, N), draw(C, seed=1), draw(1, seed=2)
    expected = F.conv1d(maps, weight[None, :, None], bias).squeeze(1).softmax(-1)
    torch.testing.assert_close(context_weights(maps, weight, bias), expected)
