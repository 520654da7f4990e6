"""Adapters bring the student to the teacher's width and leave the map's size alone."""

from __future__ import annotations

import pytest
import torch

from tests.support.loss_contract import make_inputs, make_pair
from yolo_kd.distillation.adapters import ADAPTERS, build_adapters

every_kind = pytest.mark.parametrize("kind", ADAPTERS)


@every_kind
@pytest.mark.parametrize("equal", [False, True], ids=["other widths", "equal widths"])
def test_shapes(kind, equal):
    pair = make_pair(equal=equal)
    step = make_inputs(pair, image=(64, 96))
    adapters = build_adapters(kind, pair)
    assert len(adapters) == 3
    for adapter, s, t in zip(adapters, step.student.features, step.teacher.features, strict=True):
        assert adapter(s).shape == t.shape


@every_kind
def test_equal_widths_get_an_adapter_all_the_same(kind):
    assert all(list(adapter.parameters()) for adapter in build_adapters(kind, make_pair(equal=True)))


@every_kind
def test_gradient_reaches_the_student_and_every_parameter(kind):
    pair = make_pair()
    step = make_inputs(pair)
    adapters = build_adapters(kind, pair)
    for adapter, feature in zip(adapters, step.student.features, strict=True):
        adapter(feature).square().sum().backward()
        assert feature.grad.abs().sum() > 0
    assert all(p.grad is not None for p in adapters.parameters())


@every_kind
def test_the_student_is_not_written_to(kind):
    pair = make_pair()
    feature = make_inputs(pair).student.features[0].detach()
    before = feature.clone()
    build_adapters(kind, pair)[0](feature)
    assert torch.equal(feature, before)


def test_conv1x1_is_a_matrix_at_each_cell():
    adapter = ADAPTERS["conv1x1"](3, 5)
    x = torch.randn(2, 3, 4, 6)
    expected = torch.einsum("oc,bchw->bohw", adapter.weight[:, :, 0, 0], x) + adapter.bias.view(1, 5, 1, 1)
    torch.testing.assert_close(adapter(x), expected)


def test_mlp_is_two_matrices_with_a_rectifier_between():
    adapter = ADAPTERS["mlp"](3, 5)
    state = adapter.state_dict()
    assert list(state) == ["0.weight", "0.bias", "2.weight", "2.bias"]  # as upstream's projector names them
    x = torch.randn(7, 3)
    hidden = (x @ state["0.weight"][:, :, 0, 0].T + state["0.bias"]).clamp(min=0)
    expected = hidden @ state["2.weight"][:, :, 0, 0].T + state["2.bias"]
    torch.testing.assert_close(adapter(x[:, :, None, None])[:, :, 0, 0], expected)


def test_levels_must_pair_up():
    with pytest.raises(ValueError, match="shorter"):
        build_adapters("conv1x1", make_pair(student_channels=(8, 8, 8), teacher_channels=(8, 8), strides=(8, 16)))
