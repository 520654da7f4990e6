"""Terms, adapters and weights put together: nothing is computed twice, and strengths multiply as they should."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from tests.support.loss_contract import make_inputs, make_pair
from yolo_kd.config.recipe import load_recipe, shipped_recipes
from yolo_kd.distillation.distiller import Distiller
from yolo_kd.errors import PairError
from yolo_kd.losses.base import COLUMN_WIDTH, registered
from yolo_kd.losses.kernels import boxes


def distil(losses: dict, **pair: object) -> tuple[Distiller, dict]:
    facts = make_pair(**pair)
    distiller = Distiller(load_recipe({"losses": losses}), facts)
    step = make_inputs(facts)
    return distiller, distiller.inputs(step.student, step.teacher, step.targets)


def count_calls(distiller: Distiller) -> Counter:
    calls: Counter = Counter()
    for name, module in distiller.adapters.named_modules():
        module.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


def test_terms_share_adapters_and_aligned_features() -> None:
    """A second and a third term that read the same features cost no second pass through an adapter."""
    for losses in ({"cwd": {}}, {"cwd": {}, "pkd": {}}, {"cwd": {}, "pkd": {}, "mimic": {}, "fgd": {}}):
        distiller, steps = distil(losses)
        calls = count_calls(distiller)
        distiller(steps)
        assert {name: n for name, n in calls.items() if name.count(".") == 1} == {
            f"conv1x1@neck.{level}": 1 for level in range(3)
        }


def test_terms_share_box_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks are painted once per level and step, however many terms ask for them."""
    calls: Counter = Counter()
    paint = boxes.paint
    for module in (boxes, __import__("yolo_kd.losses.fgd", fromlist=["paint"])):
        if hasattr(module, "paint"):
            monkeypatch.setattr(module, "paint", lambda *a, **k: (calls.update(["paint"]), paint(*a, **k))[1])
    distiller, steps = distil({"fgd": {}})
    distiller(steps)
    alone = calls["paint"]
    assert alone > 0
    distiller(steps)  # the same step again: everything is in its memo
    assert calls["paint"] == alone


def test_objectness_weights_are_shared_with_the_same_question() -> None:
    distiller, steps = distil({"objectness": {}})
    distiller(steps)
    assert ("objectness", True) in steps["objectness"]._memo


def test_weight_and_schedule_multiply() -> None:
    one, steps = distil({"objectness": {}})
    plain = one(steps)
    half, _ = distil({"objectness": {"weight": 0.5, "schedule": {"kind": "linear", "end": 0.0}}})
    steps["objectness"].progress = 0.5
    for name, value in half(steps).items():
        assert value.item() == pytest.approx(0.25 * plain[name].item())


def test_a_term_that_is_off_is_a_zero_in_its_column() -> None:
    distiller, steps = distil({"objectness": {"schedule": {"stop": 0.5}}, "at": {}})
    for step in steps.values():
        step.progress = 0.75
    values = distiller(steps)
    assert list(values) == ["kcls_loss", "kbox_loss", "at_loss"]
    assert values["kcls_loss"] == values["kbox_loss"] == 0
    assert values["at_loss"] > 0


def test_close_mosaic_stops_a_term() -> None:
    distiller, steps = distil({"at": {"schedule": {"stop": "close_mosaic"}}})
    steps["at"].progress = 0.9
    assert distiller(steps, close_mosaic=0.95)["at_loss"] > 0
    assert distiller(steps, close_mosaic=0.9)["at_loss"] == 0


def test_arithmetic_is_float32_under_autocast_and_adapters_are_not() -> None:
    distiller, _ = distil({"cwd": {}})
    step = make_inputs(distiller.pair)
    seen: list[torch.dtype] = []
    distiller.adapters["conv1x1@neck"][0].register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = distiller(distiller.inputs(step.student, step.teacher, step.targets))
    assert seen == [torch.bfloat16]
    assert values["cwd_loss"].dtype == torch.float32


def test_layers_of_unequal_stride_are_refused() -> None:
    pair = replace(
        make_pair(),
        student_layer_channels={"model.4": 8},
        teacher_layer_channels={"model.6": 16},
        student_layer_strides={"model.4": 8},
        teacher_layer_strides={"model.6": 16},
    )
    recipe = load_recipe({"losses": {"mimic": {"student_layers": ["model.4"], "teacher_layers": ["model.6"]}}})
    with pytest.raises(PairError, match=r"student maps of stride \[8\] with teacher maps of stride \[16\]"):
        Distiller(recipe, pair)


@pytest.mark.parametrize("loss", ["sea", "fgfi", "fgd"])
def test_terms_on_layers_see_the_strides_of_these_layers(loss: str) -> None:
    """Box masks are painted at the layer's stride, not at that of the head's first level."""
    torch.manual_seed(0)
    facts = make_pair()
    step = make_inputs(facts)
    layered = replace(
        facts,
        student_layer_channels={"model.6": facts.student_channels[1]},
        teacher_layer_channels={"model.6": facts.teacher_channels[1]},
        student_layer_strides={"model.6": 16},
        teacher_layer_strides={"model.6": 16},
    )
    layers = {"student_layers": ["model.6"], "teacher_layers": ["model.6"]}
    on_layer = Distiller(load_recipe({"losses": {loss: layers}}), layered)
    views = [replace(v, layers={"model.6": v.features[1]}) for v in (step.student, step.teacher)]
    seen = on_layer.inputs(*views, step.targets)[loss]
    assert seen.student.strides == seen.teacher.strides == (16,)
    values = on_layer.unweighted(loss, seen)
    assert all(torch.isfinite(v) and v.requires_grad for v in values.values())


def test_without_bins_the_error_names_what_serves() -> None:
    with pytest.raises(PairError, match=r"16 bins and the teacher's has 1.*Use 'bckd' instead"):
        distil({"ld": {}}, student_reg_max=16, teacher_reg_max=1)


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_distils(name: str) -> None:
    recipe = load_recipe(name)
    if any(registered()[term.name].head_split for term in recipe.terms):
        pytest.skip("reads inside the head: tests/engine/test_trainer.py trains it")
    distiller, steps = distil(recipe.to_dict()["losses"])
    values: dict = {}
    for term in distiller.terms:  # not through the schedule, which may begin with a warm-up from zero
        values.update(distiller.unweighted(term, steps[term]))
    assert all(torch.isfinite(v) and v.requires_grad for v in values.values())
    assert tuple(values) == distiller.columns == tuple(distiller(steps))


def test_a_weight_that_sets_itself_multiplies_with_its_schedule() -> None:
    plain, steps = distil({"cwd": {}})
    torch.manual_seed(0)
    auto, _ = distil({"cwd": {"weight": "auto", "schedule": {"kind": "linear", "end": 0.0}}})
    auto.load_state_dict({**auto.state_dict(), **plain.state_dict()})
    assert auto.auto is not None
    auto.auto.update(torch.tensor([4.0]), torch.tensor([2.0]))
    assert auto.weights() == {"cwd_w": pytest.approx(0.6)}
    steps["cwd"].progress = 0.5
    assert auto(steps)["cwd_loss"].item() == pytest.approx(0.3 * plain(steps)["cwd_loss"].item(), rel=1e-5)
    steps["cwd"].progress = 1.0
    assert auto(steps)["cwd_loss"] == 0


def test_weights_that_set_themselves_are_columns_but_no_terms() -> None:
    every = {name: {"weight": "auto"} for name in ("objectness", "fgd", "at")}
    distiller, steps = distil({**every, "mgd": {"weight": 2.0}})
    assert distiller.weight_columns == {"objectness": "kcls_w", "fgd": "fgd_w", "at": "at_w"}
    assert distiller.columns == tuple(distiller(steps)) == ("kcls_loss", "kbox_loss", "fgd_loss", "at_loss", "mgd_loss")
    assert distiller.weight("mgd") == 2.0
    fixed, _ = distil({"mgd": {}})
    assert fixed.auto is None
    assert fixed.weights() == fixed.weight_columns == {}


@pytest.mark.parametrize("name", registered())
def test_every_weight_column_fits_the_progress_bar(name: str) -> None:
    column = registered()[name].columns[0].removesuffix("_loss") + "_w"
    assert len(column) <= COLUMN_WIDTH
