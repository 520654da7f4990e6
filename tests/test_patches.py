"""Temporary replacements: they nest, may end in any order, and leave the owner as it was."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import permutations
from threading import Barrier
from types import ModuleType

import pytest
from torch import nn

from yolo_kd.patches import original, replaced


def plain() -> str:
    return "plain"


def new() -> str:
    return "new"


@pytest.fixture
def module() -> ModuleType:
    made = ModuleType("made")
    made.function = plain
    return made


class Base:
    value = 1

    def method(self) -> str:
        return f"base {self.value}"

    @staticmethod
    def static() -> str:
        return "static"

    @classmethod
    def of_class(cls) -> str:
        return cls.__name__


class Child(Base):
    pass


def test_the_newest_is_in_force_and_the_original_comes_back(module: ModuleType) -> None:
    with replaced(module, "function", new) as before:
        assert before is plain
        assert module.function is new
        with replaced(module, "function", len) as first:
            assert first is plain
            assert module.function is len
            assert original(module, "function") is plain
        assert module.function is new
    assert module.function is plain
    assert original(module, "function") is plain


def test_a_replacement_can_call_the_one_before(module: ModuleType) -> None:
    with replaced(module, "function", lambda: original(module, "function")() + "!"):
        older = module.function
        with replaced(module, "function", lambda: older() + "?"):
            assert module.function() == "plain!?"


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_holders_leave_in_any_order(order: tuple[int, ...], module: ModuleType) -> None:
    functions: list[Callable] = [len, new, len]  # the first and the last share a replacement
    stacks = [ExitStack() for _ in functions]
    for stack, function in zip(stacks, functions, strict=True):
        stack.enter_context(replaced(module, "function", function))
    left = list(range(3))
    for holder in order:
        stacks[holder].close()
        left.remove(holder)
        assert module.function is (functions[left[-1]] if left else plain)


def test_the_same_replacement_held_twice(module: ModuleType) -> None:
    with replaced(module, "function", new):
        with replaced(module, "function", new):
            pass
        assert module.function is new
    assert module.function is plain


class Equal:
    """Equal to everything: holders must be told apart by identity."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = None  # type: ignore[assignment]


def test_replacements_that_compare_equal_are_different(module: ModuleType) -> None:
    first, second = Equal(), Equal()
    older = ExitStack()
    older.enter_context(replaced(module, "function", first))
    with replaced(module, "function", second):
        older.close()
        assert module.function is second
    assert module.function is plain


def test_an_exception_ends_it(module: ModuleType) -> None:
    with pytest.raises(ZeroDivisionError), replaced(module, "function", new):
        raise ZeroDivisionError
    assert module.function is plain


def test_a_missing_attribute_is_an_error_and_changes_nothing(module: ModuleType) -> None:
    with pytest.raises(AttributeError, match="absent"), replaced(module, "absent", new):
        pytest.fail("there is nothing to replace")
    with pytest.raises(AttributeError, match="absent"):
        original(module, "absent")
    assert not hasattr(module, "absent")


def test_an_attribute_that_cannot_be_set_is_not_remembered() -> None:
    for _ in range(2):
        with pytest.raises(TypeError), replaced(int, "real", 3):
            pytest.fail("int is immutable")
    assert original(int, "real") is int.real


def test_two_threads_that_overlap(module: ModuleType) -> None:
    """Each thread leaves while the other is inside, and neither sees the original before both are out."""
    rounds, barrier = 200, Barrier(4)

    def work(me: int) -> list[bool]:
        seen = []
        for i in range(rounds):
            barrier.wait()
            with replaced(module, "function", new if (me + i) % 2 else len):
                seen.append(module.function is not plain)
                if me % 2:
                    seen.append(original(module, "function") is plain)
        return seen

    with ThreadPoolExecutor(4) as threads:
        assert all(all(seen) for seen in threads.map(work, range(4)))
    assert module.function is plain


def test_an_inherited_method_is_inherited_again() -> None:
    thing = Child()
    with replaced(thing, "method", lambda: "other"):
        assert thing.method() == "other"
        assert Child().method() == "base 1"
    assert vars(thing) == {}
    with replaced(Child, "method", lambda self: "other"):
        assert thing.method() == "other"
        assert Base().method() == "base 1"
    assert "method" not in vars(Child)
    assert thing.method() == "base 1"


def test_static_and_class_methods_come_back_as_such() -> None:
    before = dict(vars(Base))
    with replaced(Base, "static", plain), replaced(Base, "of_class", plain):
        assert Base.static() == Base.of_class() == "plain"
    assert dict(vars(Base)) == before
    assert Child().static() == "static"
    assert Child.of_class() == "Child"


def test_a_layer_of_a_model_comes_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layer, other = model[0], nn.Identity()
    with replaced(model, "0", other):
        assert model[0] is other
    assert model[0] is layer
    with replaced(model, "forward", len):
        assert model.forward is len
    assert "forward" not in vars(model)
