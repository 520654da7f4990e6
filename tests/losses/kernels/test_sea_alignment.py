"""The hand-written gradient of `sea` against plain torch."""

from __future__ import annotations

import pytest
import torch

from tests.losses.kernels.draws import draw
from yolo_kd.losses.kernels import chunked
from yolo_kd.losses.kernels.sea_alignment import cell_alignment, cell_alignment_reference

B, C, H, W, P = 5, 6, 3, 4, 7


@pytest.mark.parametrize("chunk", [1, 2**18], ids=["many chunks", "one chunk"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("tau1", [0.01, 0.5, 5.0])  # at 0.01 the largest logit is subtracted first
def test_values_and_gradients_equal_the_reference(chunk, channels_last, tau1, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    student, teacher = (draw(B, C, H, W, seed=i).contiguous(memory_format=layout) for i in (0, 1))
    student[0, :, 1, 1] = 0  # a cell of zeros has the smallest norm
    anchors = draw(P, C, seed=2).requires_grad_(), draw(P, C, seed=3).requires_grad_()
    student.requires_grad_()
    present = torch.arange(P) != 2
    results = []
    for function in (cell_alignment, cell_alignment_reference):
        terms = function(student, teacher, anchors, present, tau1, 2.0)
        total = 0.3 * terms[0] - 0.8 * terms[1]
        results.append((*terms, *torch.autograd.grad(total, [student, anchors[0]])))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-7)


def test_the_teacher_receives_no_gradient():
    student, teacher = (draw(B, C, H, W, seed=i).requires_grad_() for i in (0, 1))
    anchors = draw(P, C, seed=2).requires_grad_(), draw(P, C, seed=3).requires_grad_()
    sum(cell_alignment(student, teacher, anchors, torch.ones(P, dtype=torch.bool), 0.5, 1.0)).backward()
    assert teacher.grad is None
    assert anchors[1].grad is None
    assert student.grad.any()
    assert anchors[0].grad.any()
