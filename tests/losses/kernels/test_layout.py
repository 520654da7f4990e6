"""Operations on maps of either memory format."""

from __future__ import annotations

import pytest
import torch

from tests.losses.kernels.draws import draw
from yolo_kd.losses.kernels.layout import channel_norms, sum_cells


@pytest.mark.parametrize("innermost", [True, False])
def test_channel_norms(innermost: bool) -> None:
    maps = draw(2, 6, 5).mT if innermost else draw(2, 5, 6)
    torch.testing.assert_close(channel_norms(maps), maps.norm(dim=1, keepdim=True))


@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_over_cells(channels_last: bool) -> None:
    maps, weights = draw(2, 5, 6).requires_grad_(), draw(2, 6, seed=1).requires_grad_()
    lain = maps.mT.contiguous().mT if channels_last else maps
    found, expected = sum_cells(lain, weights), (maps * weights[:, None]).sum(2)
    torch.testing.assert_close(found, expected)
    for ours, plain in zip(
        *(torch.autograd.grad(x.square().sum(), (maps, weights)) for x in (found, expected)), strict=True
    ):
        torch.testing.assert_close(ours, plain)
