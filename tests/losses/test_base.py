"""Registration, names of levels, ranges of arguments, and the sentences that users read."""

from __future__ import annotations

import math
import re
from typing import Annotated, ClassVar, Literal, get_type_hints

import pytest
import torch
from pydantic import Field

import yolo_kd.losses
from tests.support.loss_contract import make_inputs, make_loss, make_pair
from yolo_kd.errors import ConfigError, PairError
from yolo_kd.losses import base
from yolo_kd.losses.base import (
    READABLE,
    AboveZero,
    AtLeastZero,
    FeatureLoss,
    LevelNames,
    Loss,
    check_key,
    find,
    parameters,
    registered,
)
from yolo_kd.losses.objectness import Objectness


@pytest.fixture
def registry(monkeypatch):
    """A registry of its own, so that losses of a test are forgotten after it."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))


def define(base=Loss, **attributes):
    return type("Mine", (base,), {"name": "mine", "columns": ("mine_loss",), "__module__": __name__, **attributes})


@pytest.mark.usefixtures("registry")
class TestRegistration:
    def test_a_subclass_with_a_name_is_found(self):
        cls = define()
        assert find("mine") is cls
        assert registered()["mine"] is cls
        assert list(registered()) == sorted(registered())

    def test_a_helper_without_a_name_is_not(self):
        before = registered()
        define(name="", columns=())
        assert registered() == before

    def test_the_same_class_imported_again_replaces_itself(self):
        define()
        again = define()
        assert find("mine") is again

    def test_two_losses_of_one_name(self):
        define()
        with pytest.raises(TypeError, match=r"^two losses are named 'mine': tests\.losses\.test_base and plugin$"):
            define(__module__="plugin")

    def test_unknown_reads(self):
        with pytest.raises(TypeError, match=r"^loss 'mine' reads \['depth'\]; allowed are \['assignment', 'boxes'"):
            define(reads=frozenset({"depth", "scores"}))

    @pytest.mark.parametrize("column", ["mine", "far_too_long_loss", "lossy"])
    def test_columns_that_ultralytics_could_not_show(self, column):
        sentence = rf"^column '{column}' of loss 'mine' must end in '_loss' and have at most 10 characters$"
        with pytest.raises(TypeError, match=sentence):
            define(columns=("fine_loss", column))

    def test_no_columns(self):
        with pytest.raises(TypeError, match=r"^loss 'mine' declares no columns$"):
            define(columns=())

    def test_what_was_refused_is_not_registered(self):
        with pytest.raises(TypeError):
            define(columns=())
        assert "mine" not in registered()

    def test_registered_returns_a_copy(self):
        registered().clear()
        assert registered()


def test_every_module_of_the_package_is_imported():
    assert {"objectness", "objectness_l2", "ultralytics"} <= registered().keys()
    assert yolo_kd.losses.__doc__


def test_columns_are_distinct_across_losses():
    columns = [column for cls in registered().values() for column in cls.columns]
    assert sorted(columns) == sorted(set(columns))


@pytest.mark.parametrize("cls", registered().values(), ids=lambda c: c.name)
def test_every_loss_can_be_written_in_a_recipe(cls):
    assert cls.reads <= READABLE
    assert cls.paper
    assert cls.__doc__
    assert cls.instead == "" or cls.instead in registered()
    for key, parameter in parameters(cls).items():
        assert parameter.kind is parameter.KEYWORD_ONLY, key
        assert parameter.default is not parameter.empty, key
        assert f"{key}:" in cls.__doc__, f"the docstring does not explain '{key}'"
    cls()


def test_find_suggests():
    with pytest.raises(
        ConfigError, match=r"^unknown loss 'objectnes'\. Did you mean 'objectness'\? Known losses: .* or "
    ):
        find("objectnes")


def test_parameters_are_the_keys_of_a_recipe():
    assert list(parameters(Objectness)) == ["lam_cls", "lam_box", "fm_nms"]


def test_bins_that_do_not_match(registry):
    cls = define(needs_bins=True, instead="objectness")
    cls().build(make_pair(student_reg_max=8, teacher_reg_max=8))
    sentence = (
        r"^loss 'mine' compares distance distributions, but the student's head has 1 bins and the teacher's has 16; "
        r"both need the same number, more than 1\. Use 'objectness' instead\.$"
    )
    with pytest.raises(PairError, match=sentence):
        cls().build(make_pair(student_reg_max=1, teacher_reg_max=16))
    with pytest.raises(PairError, match="has 1 bins and the teacher's has 1;"):
        cls().build(make_pair(student_reg_max=1, teacher_reg_max=1))


def test_a_loss_must_say_what_it_computes(registry):
    with pytest.raises(NotImplementedError):
        define()()(None)


@pytest.mark.parametrize(
    ("levels", "indices"), [(None, (0, 1, 2)), (["p4"], (1,)), (["p5", "p3"], (0, 2)), (("p3", "p3"), (0,))]
)
def test_levels_are_in_stride_order(registry, levels, indices):
    loss = define(FeatureLoss)(levels=levels)
    loss.build(make_pair())
    assert loss.level_indices == indices


def test_a_level_that_the_pair_lacks(registry):
    loss = define(FeatureLoss)(levels=["p33"])
    sentence = r"^loss 'mine' names level 'p33', but this pair has p3, p4 or p5\. Did you mean 'p3'\?$"
    with pytest.raises(PairError, match=sentence):
        loss.build(make_pair())


def test_levels_of_other_strides(registry):
    loss = define(FeatureLoss)(levels=["p6"])
    loss.build(make_pair(student_channels=(8,) * 4, teacher_channels=(8,) * 4, strides=(8, 16, 32, 64)))
    assert loss.level_indices == (3,)


@pytest.mark.parametrize("adapter", [None, "conv1x1"])
@pytest.mark.parametrize("levels", [None, ["p3", "p5"]])
def test_a_feature_loss_adds_up_its_levels(registry, adapter, levels):
    def level_loss(self, inputs, level):
        student, teacher = self.maps(inputs, level)
        return torch.stack([student.mean() ** 2, teacher.mean()])

    pair = make_pair()
    loss = make_loss(define(FeatureLoss, adapter=adapter, level_loss=level_loss, strength=0.5), pair, levels=levels)
    inputs = make_inputs(pair)
    expected = 0.0
    for i in loss.level_indices:
        student = inputs.student.features[i] if adapter is None else inputs.aligned(adapter, i)
        expected += student.mean().item() ** 2 + inputs.teacher.features[i].mean().item()
    assert loss(inputs)["mine_loss"].item() == pytest.approx(0.5 * expected, rel=1e-5)


def test_a_feature_loss_must_implement_level_loss(registry):
    pair = make_pair()
    with pytest.raises(NotImplementedError):
        make_loss(define(FeatureLoss), pair)(make_inputs(pair))


def test_maps_in_float32_have_the_students_memory_format(registry):
    pair = make_pair()
    loss = make_loss(define(FeatureLoss, adapter="conv1x1"), pair)
    inputs = make_inputs(pair, dtype=torch.bfloat16)
    assert [x.dtype for x in loss.maps(inputs, 0)][1] == torch.bfloat16
    student, teacher = loss.maps(inputs, 0, as_is=False)
    assert student.dtype == teacher.dtype == torch.float32
    assert student.stride() == teacher.stride()


@pytest.mark.parametrize("choice", ["box", ["boxes"], None])
def test_a_choice_that_is_not_there(choice):
    masks = Literal["none", "boxes"]
    assert check_key("mask", "boxes", masks) == "boxes"
    hint = r"\. Did you mean 'boxes'\?" if choice == "box" else ""
    with pytest.raises(ValueError, match=rf"^mask must be none or boxes, received {re.escape(repr(choice))}.*{hint}$"):
        check_key("mask", choice, masks)


@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_switch_is_true_or_false(value):
    assert check_key("flag", True, bool) is True
    with pytest.raises(ValueError, match=rf"^flag must be true or false, received {value!r}$"):
        check_key("flag", value, bool)


@pytest.mark.parametrize("levels", ["p3", [], [3], ["p3", None], 3])
def test_levels_that_are_no_list_of_names(levels):
    assert check_key("levels", ("p3", "p4"), LevelNames) == ["p3", "p4"]
    sentence = r"^levels must be a list of level names such as \[p3, p4, p5\], received "
    with pytest.raises(ValueError, match=sentence + re.escape(repr(levels))):
        check_key("levels", levels, LevelNames | None)


UPTO_ONE = Annotated[float, Field(ge=0, le=1)]
IN_UNIT = Annotated[float, Field(gt=0, le=1)]
BELOW_ONE = Annotated[float, Field(ge=0, lt=1)]
COUNT = Annotated[int, Field(ge=2)]


@pytest.mark.parametrize(
    ("value", "annotation"),
    [(0, AtLeastZero), (1e9, AtLeastZero), (0.5, UPTO_ONE), (1, IN_UNIT), (1e-9, AboveZero), (2, COUNT)],
)
def test_values_in_range(value, annotation):
    assert check_key("x", value, annotation) == value


@pytest.mark.parametrize(
    ("value", "annotation", "allowed"),
    [
        (-1, AtLeastZero, "a number of at least 0"),
        (0, AboveZero, "a number of more than 0"),
        (1.5, UPTO_ONE, "a number of at least 0 and at most 1"),
        (0, IN_UNIT, "a number of more than 0 and at most 1"),
        (1, BELOW_ONE, "a number of at least 0 and less than 1"),
        (math.nan, AtLeastZero, "a number of at least 0"),
        (math.inf, AtLeastZero, "a number of at least 0"),
        ("1e-3", AtLeastZero, "a number of at least 0"),
        (True, AtLeastZero, "a number of at least 0"),
        (None, AtLeastZero, "a number of at least 0"),
        ([1], AtLeastZero, "a number of at least 0"),
        ("1", float, "a number"),
        (2.0, COUNT, "a whole number of at least 2"),
        (True, COUNT, "a whole number of at least 2"),
        ([1, -1], list[AtLeastZero], "a list, each entry a number of at least 0"),
    ],
)
def test_values_out_of_range(value, annotation, allowed):
    with pytest.raises(ValueError, match=r"^x must be ") as error:
        check_key("x", value, annotation)
    assert str(error.value) == f"x must be {allowed}, received {value!r}"


class TestKeys:
    """Annotated attributes of a loss are the arguments of its constructor."""

    class Keyed(Loss):
        """Two keys, and attributes that are none."""

        lam: AtLeastZero = 1.0
        mode: Literal["a", "b"] = "a"
        flag: ClassVar[bool] = True
        size: Unknown  # noqa: F821
        plain = 3

    class More(Keyed):
        """Another key, and another default."""

        lam: AtLeastZero = 2.0
        size: int = 4

    def test_a_key_has_a_type_and_a_default(self):
        keys = parameters(self.Keyed)
        assert {name: key.default for name, key in keys.items()} == {"lam": 1.0, "mode": "a"}
        assert get_type_hints(self.Keyed.__init__, include_extras=True) == {n: k.annotation for n, k in keys.items()}
        assert keys["lam"].annotation == AtLeastZero

    def test_a_subclass_adds_and_changes_keys(self):
        assert {name: key.default for name, key in parameters(self.More).items()} == {
            "lam": 2.0,
            "mode": "a",
            "size": 4,
        }
        loss = self.More(mode="b")
        assert (loss.lam, loss.mode, loss.size) == (2.0, "b", 4)

    def test_a_wrong_value(self):
        with pytest.raises(ValueError, match=r"^lam must be a number of at least 0, received -1$"):
            self.More(lam=-1)

    def test_an_argument_that_is_no_key(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'plain'"):
            self.Keyed(plain=4)
        with pytest.raises(TypeError, match="positional"):
            self.Keyed(1.0)

    def test_a_constructor_of_its_own(self):
        class Own(Loss):
            lam: AtLeastZero = 1.0

            def __init__(self, *, other: int = 2):
                super().__init__()
                self.other = other

        class Heir(Own):
            lam: AtLeastZero = 2.0

        for cls in (Own, Heir):
            assert list(parameters(cls)) == ["other"]
            assert cls(other=3).other == 3


def test_a_loss_without_modules_has_no_state():
    assert not Objectness().state_dict()
    assert not list(Objectness().parameters())
    assert Objectness().self_trained() == []
    assert isinstance(Objectness(), torch.nn.Module)
