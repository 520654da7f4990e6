"""Whatever is written, the answer is a result or an error that was meant: never an exception of something underneath.

Examples are drawn from a fixed seed, so that a run that passes passes again.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from tests.support.loss_contract import evaluate, leaves, make_inputs, make_loss, make_pair
from tests.support.models import narrow_checkpoint
from yolo_kd.config.command_line import parse_assignments
from yolo_kd.config.recipe import load_recipe, read_recipe, shipped_recipes
from yolo_kd.config.source import parse_yaml
from yolo_kd.config.train_options import parse_train
from yolo_kd.engine.resume import is_plain
from yolo_kd.errors import CheckpointError, ConfigError, DataError, YoloKDError
from yolo_kd.losses.base import registered
from yolo_kd.safe_loading.archive import inspect
from yolo_kd.safe_loading.checkpoint import load_checkpoint_file
from yolo_kd.safe_loading.dataset import check_size
from yolo_kd.safe_loading.pickle_scan import Refused


def quick(examples: int) -> Callable[[Any], Any]:
    """Return the settings of every test here."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=slow)


def are_sentences(error: ConfigError) -> None:
    assert error.problems
    for line in error.problems:
        assert "\n" not in line
        assert "Traceback" not in line
        assert len(line) < 2000
        # Ultralytics' own sentences about a value of the wrong type end in a bracket
        assert line.rstrip()[-1] in ".?')", line


# ----------------------------------------------------------------------------------------------------------- strategies
SHIPPED = [path.read_text(encoding="utf-8") for path in shipped_recipes().values()]
KEYS = ["losses", "plugins", "weight", "schedule", "kind", "start", "end", "warmup", "stop", "levels", *registered()]
plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(["cosine", "1e-3", "p3"])
)
names = st.one_of(st.sampled_from(KEYS), st.text(max_size=6))
trees = st.recursive(
    plain,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(names, inner, max_size=4)),
    max_leaves=12,
)


def no_plugins(tree: Any) -> bool:
    """Return whether a drawn recipe imports nothing: a module of any name could do anything."""
    return not isinstance(tree, dict) or not tree.get("plugins")


@st.composite
def spoilt(draw: Any, texts: list[str]) -> str:
    """Return a text that was right, with a few characters replaced, dropped or doubled."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        text = text[:at] + draw(st.text(alphabet="{}[]:,-&*!|>'\"#%@`\n\t 0é\x00", max_size=3)) + text[at + 1 :]
    return text


schedules = st.fixed_dictionaries(
    {"kind": st.sampled_from(["linear", "cosine"])},
    optional={
        "start": st.floats(0, 10),
        "end": st.floats(0, 10),
        "warmup": st.floats(0, 0.4),
        "stop": st.one_of(st.just("close_mosaic"), st.floats(0.5, 1)),
    },
)
terms = st.fixed_dictionaries({"weight": st.floats(0.01, 100)}, optional={"schedule": schedules})
recipes = st.dictionaries(st.sampled_from(sorted(registered())), terms, min_size=1, max_size=4)


# -------------------------------------------------------------------------------------------------------------- recipes
@quick(150)
@given(st.one_of(trees, st.dictionaries(st.just("losses"), trees)))
def test_any_mapping_is_a_recipe_or_a_config_error(tree: Any) -> None:
    assume(no_plugins(tree))
    try:
        recipe = load_recipe(tree)
    except ConfigError as error:
        are_sentences(error)
    else:
        assert recipe.terms


@quick(200)
@given(st.one_of(st.text(max_size=60), spoilt(SHIPPED), trees.filter(no_plugins).map(lambda t: yaml.safe_dump(t))))
@example("losses: " + "[" * 3000)
@example("a: &a [" + "*a, " * 1000 + "]")
@example("losses:\n  objectness: {weight: 1e400}")
@example("losses:\n  objectness: {weight: 0x" + "f" * 5000 + "}")
@example("? [losses]\n: x")
@example("\ud800")
def test_any_text_is_a_recipe_or_a_config_error(text: str) -> None:
    problems: list[str] = []
    root = parse_yaml(text, "x.yaml", problems)
    if root is not None:
        assume(not isinstance(root.value, dict) or "plugins" not in root.value)
        read_recipe(root, {}, problems) if isinstance(root.value, dict) else None
    if problems:
        are_sentences(ConfigError(problems))
        assert all(line.startswith(("x.yaml", "losses")) for line in problems), problems


@quick(100)
@given(recipes)
def test_a_recipe_that_is_written_out_is_read_back(losses: dict[str, Any]) -> None:
    columns = [column for name in losses for column in registered()[name].columns]
    assume(len(columns) == len(set(columns)))
    once = load_recipe({"losses": losses})
    again = load_recipe(yaml.safe_load(yaml.safe_dump(once.to_dict(), sort_keys=False)))
    assert again.to_dict() == once.to_dict()
    assert [term.name for term in again.terms] == list(losses)
    assert [term.weight for term in again.terms] == [term["weight"] for term in losses.values()]


# ------------------------------------------------------------------------------------------------------------ key=value
values = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.lists(st.integers(), max_size=4),
    st.dictionaries(st.text("abc", max_size=2), st.integers(), max_size=2),
    st.from_regex(r"[a-z][a-z0-9_./-]{0,12}", fullmatch=True).filter(lambda t: t not in ("none", "true", "false")),
)


@quick(200)
@given(st.dictionaries(st.from_regex(r"[a-z][a-z_.]{0,8}", fullmatch=True), values, max_size=5))
def test_assignments_that_are_written_out_are_read_back(given_values: dict[str, Any]) -> None:
    verbatim = {"teacher", "student", "kd", "cfg", "data", "name", "project", "plugins"}
    assume(not verbatim & set(given_values))
    words = [f"{key}={value}" for key, value in given_values.items()]
    assert parse_assignments(words) == given_values
    assert parse_assignments([part for word in words for part in word.split(" ")]) == given_values


OPTION_KEYS = [
    "teacher", "student", "data", "kd", "kd.objectness.weight", "resume", "epochs", "imgsz", "scale", "name", "cfg",
    "batch", "device", "optimizer", "freeze", "trust_checkpoints", "save_dir", "amp", "fraction", "classes",
]  # fmt: skip
words = st.one_of(
    st.text(max_size=10),
    st.builds(
        "{}={}".format, st.sampled_from(OPTION_KEYS), st.one_of(st.text(max_size=8), plain.map(str), trees.map(str))
    ),
)


@quick(200)
@given(st.lists(words, max_size=6))
@example(["imgsz=[" * 500])
@example(["batch=1e999", "student=a", "data=b"])
@example(["cfg=\x00"])
def test_any_words_are_options_or_a_config_error(arguments: list[str]) -> None:
    for parse in (parse_assignments, parse_train):
        try:
            parse(arguments)
        except ConfigError as error:
            are_sentences(error)


@quick(150)
@given(
    st.one_of(
        st.text(max_size=60),
        st.dictionaries(st.sampled_from(OPTION_KEYS), trees, max_size=5).map(lambda t: yaml.safe_dump(t)),
        spoilt([f"teacher: a.pt\nstudent: b.pt\ndata: c.yaml\nkd:\n  {text}" for text in ("losses: {}", "fgd: 1")]),
    )
)
def test_any_experiment_file_is_options_or_a_config_error(tmp_path: Path, text: str) -> None:
    assume("plugins" not in text)
    file = tmp_path / "e.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        parse_train([f"cfg={file}"])
    except ConfigError as error:
        are_sentences(error)


# ---------------------------------------------------------------------------------------------------- strangers' files
@quick(150)
@given(
    st.one_of(st.binary(max_size=80), st.text(max_size=80).map(str.encode), trees.map(yaml.safe_dump).map(str.encode))
)
def test_any_data_file_is_small_or_a_data_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "data.yaml"
    file.write_bytes(content)
    with suppress(DataError):
        check_size(file)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return narrow_checkpoint("yolov8n", tmp_path_factory.mktemp("fuzz"), width=0.0625).read_bytes()


@quick(150)
@given(
    st.lists(st.tuples(st.integers(0, 2**31), st.binary(min_size=1, max_size=6)), min_size=1, max_size=5),
    st.sampled_from(["start", "pickle", "anywhere", "end"]),
)
def test_a_spoilt_checkpoint_is_loaded_or_refused(
    tmp_path: Path, checkpoint: bytes, patches: list[tuple[int, bytes]], where: str
) -> None:
    data = bytearray(checkpoint)
    begin = data.index(b"data.pkl") if where == "pickle" else len(data) - 20_000 if where == "end" else 0
    length = {"start": 200, "pickle": 60_000, "anywhere": len(data), "end": 20_000}[where]
    for at, patch in patches:
        place = begin + at % length
        data[place : place + len(patch)] = patch
    file = tmp_path / "x.pt"
    file.write_bytes(data[: len(checkpoint)])
    with suppress(CheckpointError):
        load_checkpoint_file(file)


@quick(300)
@given(st.one_of(st.binary(max_size=200), st.binary(max_size=200).map(lambda b: b"\x80\x02" + b + b".")))
def test_any_pickle_is_followed_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    from tests.support.hostile import archive

    file = archive(tmp_path_factory.getbasetemp() / "fuzz.pt", content)
    with suppress(Refused):
        inspect(file)


@quick(100)
@given(trees)
def test_plain_values_are_plain(tree: Any) -> None:
    assert is_plain(tree)
    assert not is_plain([tree, object()])


# --------------------------------------------------------------------------------------------------------------- losses
sides = st.sampled_from([32, 64, 96, 160])
corners = st.floats(-40, 200, width=32)
box = st.tuples(corners, corners, st.floats(0, 180, width=32), st.floats(0, 180, width=32)).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
batches = st.lists(st.lists(box, max_size=4).map(tuple), min_size=1, max_size=3)
bins = st.sampled_from([1, 4, 16])
widths = st.sampled_from([1, 4, 8, 16])


@pytest.mark.parametrize("name", sorted(registered()))
@quick(8)
@given(
    boxes=batches,
    image=st.tuples(sides, sides),
    nc=st.integers(1, 9),
    channels=st.tuples(st.tuples(widths, widths, widths), st.tuples(widths, widths, widths)),
    bins=st.tuples(bins, bins),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    progress=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_losses_are_finite_or_name_what_is_wrong(name: str, **drawn: Any) -> None:
    student, teacher = drawn["channels"]
    pair = make_pair(
        student, teacher, nc=drawn["nc"], student_reg_max=drawn["bins"][0], teacher_reg_max=drawn["bins"][1]
    )
    shape = {"boxes": drawn["boxes"], "image": drawn["image"], "dtype": drawn["dtype"]}
    step = make_inputs(pair, spread=drawn["spread"], progress=drawn["progress"], seed=drawn["seed"], **shape)
    try:
        loss = make_loss(registered()[name], pair)
        columns = evaluate(loss, step, drawn["seed"])
    except YoloKDError as error:
        named = str(error)
    else:
        named = ""
    if named:
        assert name in named
        return
    assert set(columns) == set(loss.columns)
    for column, value in columns.items():
        assert value.shape == ()
        assert torch.isfinite(value), f"{column} is {value}"
    total = torch.stack(list(columns.values())).sum()
    if total.requires_grad:
        inputs = leaves(step.student)
        gradients = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
        for key, gradient in zip(inputs, gradients, strict=True):
            assert gradient is None or torch.isfinite(gradient).all(), f"gradient of {key}"
