"""A recipe is either right or every mistake in it is reported, with its line."""

from __future__ import annotations

import copy
import pickle
import re
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import Field

from yolo_kd.config.recipe import Recipe, describe, load_recipe, shipped_recipes
from yolo_kd.config.schedule import Schedule
from yolo_kd.config.terms import TermSpec
from yolo_kd.errors import ConfigError
from yolo_kd.losses import base
from yolo_kd.losses.base import AtLeastZero, LevelNames, Loss, check_key
from yolo_kd.structures import LossInputs


@pytest.fixture
def probe(monkeypatch):
    """Two losses that claim the same column and take every type of argument."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    class Probe(Loss):
        name = "probe"
        columns = ("kprb_loss",)

        def __init__(
            self,
            *,
            alpha: float = 1,
            size: int = 3,
            flag: bool = False,
            mode: str = "a",
            levels: list[str] | None = None,
            sizes: tuple[int, ...] = (1, 2),
            limit: float | None = 0.5,
        ):
            super().__init__()
            check_key("alpha", alpha, AtLeastZero)
            check_key("size", size, Annotated[int, Field(ge=1)])
            check_key("levels", levels, LevelNames | None)
            if mode == "bad":
                raise ValueError("two things do not fit")
            if mode == "worse":
                raise KeyError("x")

        def forward(self, step: LossInputs) -> dict[str, Any]:
            return {}

    class Needy(Loss):
        name = "needy"
        columns = ("kprb_loss",)

        def __init__(self, *, lam: float):
            super().__init__()
            check_key("lam", lam, AtLeastZero)

    class Bare(Loss):
        name = "bare"
        columns = ("bare_loss",)

    class Taken(Loss):
        name = "taken"
        columns = ("take_loss",)

        def __init__(self, *, weight: float = 1.0):
            super().__init__()

    return Probe, Needy, Bare, Taken


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def _write(text: str, name: str = "x.yaml") -> str:
        Path(name).write_text(textwrap.dedent(text), encoding="utf-8")
        return name

    return _write


def mistakes(source: Any, overrides: dict[str, Any] | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as info:
        load_recipe(source, overrides)
    return info.value.problems


def test_a_recipe_is_read(write):
    file = write(
        """
        # what it is for
        losses:
          objectness:
            weight: 2
            lam_cls: 3
            schedule: {kind: cosine, start: 1, end: 0.1, warmup: 0.03, stop: close_mosaic}
          ultralytics:
        """
    )
    schedule = Schedule("cosine", 1.0, 0.1, 0.03, "close_mosaic")
    assert load_recipe(file) == Recipe(
        "x",
        (TermSpec("objectness", 2.0, schedule, {"lam_cls": 3.0}), TermSpec("ultralytics", 1.0, Schedule(), {})),
    )
    assert load_recipe(Path(file)) == load_recipe(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml:1: a recipe must be a mapping with the key 'losses'; it is empty."),
        ("# only a comment\n", "x.yaml:1: a recipe must be a mapping with the key 'losses'; it is empty."),
        ("- a", "x.yaml:1: a recipe must be a mapping with the key 'losses'; received ['a']."),
        ("text", "x.yaml:1: a recipe must be a mapping with the key 'losses'; received 'text'."),
        (
            "plugins: []",
            "x.yaml:1: a recipe needs the key 'losses', a mapping from names of losses to their keys such as",
        ),
        ("losses:", "x.yaml:1: losses of a recipe must be a mapping from names of losses to their keys such as "),
        ("losses: {}", "to their keys such as {objectness: {weight: 1.0}}, received {}."),
        (
            "losses: [objectness]",
            "x.yaml:1: losses of a recipe must be a mapping from names of losses to their keys such as",
        ),
        (
            "lossses:\n  objectness:",
            "x.yaml:1: unknown key 'lossses' of a recipe. Did you mean 'losses'? Allowed: plugins, inherit, losses.",
        ),
        ("losses:\n  objectnes:", "x.yaml:2: unknown loss 'objectnes'. Did you mean 'objectness'? Known losses: "),
        (
            "losses:\n  objectness: 1",
            "x.yaml:2: losses: 'objectness' of a recipe must be a mapping of its keys such as {weight: 1.0}, "
            "received 1.",
        ),
        (
            "losses:\n  probe:\n    wieght: 1",
            "x.yaml:3: unknown key 'wieght' of loss 'probe'. Did you mean 'weight'? Allowed: weight, ratio, schedule, "
            "student_layers, teacher_layers, alpha, "
            "size, flag, mode, levels, sizes, limit.",
        ),
        (
            "losses:\n  bare:\n    args: 1",
            "x.yaml:3: unknown key 'args' of loss 'bare'. Allowed: weight, ratio, schedule, student_layers, "
            "teacher_layers.",
        ),
        (
            "losses:\n  mimic:\n    student_layers: model.4",
            "x.yaml:3: student_layers of loss 'mimic' must be a list of different layer names such as ",
        ),
        (
            "losses:\n  ultralytics:\n    teacher_layers: [model.4]",
            "x.yaml:3: loss 'ultralytics' reads scores, which belong to the head's levels; it cannot take layers.",
        ),
        ("losses:\n  probe:\n    alpha: 1\n    alpha: 2", "x.yaml:4: key 'alpha' is given twice, first in line 3."),
        ("losses:\n  probe:\n  probe:", "x.yaml:3: key 'probe' is given twice, first in line 2."),
        (
            "losses:\n  probe:\n    schedule:\n      end: 1\n      end: 1",
            "x.yaml:5: key 'end' is given twice, first in line 4.",
        ),
        ("losses:\n  probe:\n    weight: 1e-3", "x.yaml:3: 1e-3 is read as text; write 1.0e-3."),
        (
            "losses:\n  probe: {weight: -1}",
            "x.yaml:2: weight of loss 'probe' must be a number of at least 0 or auto, received -1.",
        ),
        (
            "losses:\n  probe:\n    weight: aut",
            "x.yaml:3: weight of loss 'probe' must be a number of at least 0 or auto, received 'aut'.",
        ),
        (
            "losses:\n  probe:\n    ratio: 0.3",
            "x.yaml:3: ratio of loss 'probe' has no effect without weight: auto. Write that, or leave ratio out.",
        ),
        ("losses:\n  probe:\n    weight: 1\n    ratio: 0.3", "x.yaml:4: ratio of loss 'probe' has no effect without"),
        (
            "losses:\n  probe:\n    weight: auto\n    ratio: 0",
            "x.yaml:4: ratio of loss 'probe' must be a number above 0 and at most 10, received 0.",
        ),
        ("losses:\n  probe: {weight: auto, ratio: auto}", "must be a number above 0 and at most 10, received 'auto'."),
        ("losses:\n  probe: {weight: auto, ratio: true}", "must be a number above 0 and at most 10, received True."),
        ("losses:\n  probe: {weight: auto, ratio: 11}", "must be a number above 0 and at most 10, received 11."),
        ("losses:\n  probe: {weight: .nan}", "must be a number of at least 0 or auto, received nan."),
        ("losses:\n  probe: {weight: .inf}", "must be a number of at least 0 or auto, received inf."),
        ("losses:\n  probe: {weight: true}", "must be a number of at least 0 or auto, received True."),
        ("losses:\n  probe: {weight: '1'}", "must be a number of at least 0 or auto, received '1'."),
        ("losses:\n  probe: {weight: }", "must be a number of at least 0 or auto, received nothing."),
        (f"losses:\n  probe: {{weight: {'9' * 400}}}", "must be a number of at least 0 or auto, received 999"),
        ("losses:\n  probe: {weight: 0}", "x.yaml:1: every weight is 0: nothing would be distilled."),
        ("losses:\n  probe: {alpha: true}", "x.yaml:2: alpha of loss 'probe' must be a number, received True."),
        ("losses:\n  probe: {alpha: .nan}", "x.yaml:2: alpha of loss 'probe' must be a number, received nan."),
        ("losses:\n  probe: {size: 2.5}", "x.yaml:2: size of loss 'probe' must be a whole number, received 2.5."),
        ("losses:\n  probe: {flag: 1}", "x.yaml:2: flag of loss 'probe' must be true or false, received 1."),
        ("losses:\n  probe: {mode: 1}", "x.yaml:2: mode of loss 'probe' must be text, received 1."),
        (
            "losses:\n  probe: {sizes: 1}",
            "x.yaml:2: sizes of loss 'probe' must be a list, each entry a whole number, received 1.",
        ),
        (
            "losses:\n  probe: {levels: .inf}",
            "x.yaml:2: levels of loss 'probe' must be a list, each entry text, received inf.",
        ),
        ("losses:\n  probe: {mode: }", "x.yaml:2: mode of loss 'probe' must be text, received nothing."),
        (
            "losses:\n  probe:\n    alpha: -1",
            "x.yaml:3: loss 'probe': alpha must be a number of at least 0, received -1.",
        ),
        (
            "losses:\n  probe:\n    levels: p3",
            "x.yaml:3: levels of loss 'probe' must be a list, each entry text, received 'p3'.",
        ),
        ("losses:\n  probe:\n    mode: bad", "x.yaml:3: loss 'probe': two things do not fit."),
        ("losses:\n  probe:\n    mode: worse", "x.yaml:3: loss 'probe': KeyError: 'x'."),
        ("losses:\n  needy:", "x.yaml:2: loss 'needy' needs the key 'lam', a number."),
        ("losses:\n  needy: {lam: -1}", "x.yaml:2: loss 'needy': lam must be a number of at least 0, received -1."),
        ("losses:\n  taken:", "x.yaml:2: loss 'taken' has a constructor argument 'weight', a name that recipes use"),
        (
            "losses:\n  probe:\n  needy: {lam: 1}",
            "x.yaml:3: losses 'probe' and 'needy' both report the column 'kprb_loss'; use one of them.",
        ),
        (
            "losses:\n  probe:\n    schedule: cosine",
            "x.yaml:3: schedule of loss 'probe' must be a mapping such as {kind: cosine, start: 1.0, end: 0.1}, "
            "received 'cosine'.",
        ),
        (
            "losses:\n  probe:\n    schedule:\n      kynd: cosine",
            "x.yaml:4: unknown key 'kynd' of the schedule of loss 'probe'. Did you mean 'kind'? Allowed: kind, start, "
            "end, warmup, stop.",
        ),
        (
            "losses:\n  probe:\n    schedule:\n      kind: cosin",
            "x.yaml:4: kind of the schedule of loss 'probe' must be constant, linear or cosine, received 'cosin'. "
            "Did you mean 'cosine'?",
        ),
        (
            "losses:\n  probe:\n    schedule:\n      start: x",
            "x.yaml:4: start of the schedule of loss 'probe' must be a number of at least 0, received 'x'.",
        ),
        (
            "losses:\n  probe:\n    schedule:\n      stop: 2",
            "x.yaml:4: stop of the schedule of loss 'probe' must be a number of at least 0 and at most 1 or "
            "close_mosaic, received 2.",
        ),
        (
            "losses:\n  probe:\n    schedule:\n      end: 0.5",
            "x.yaml:4: end of the schedule of loss 'probe' has no effect with kind: constant. Write kind: linear or "
            "cosine, or leave it out.",
        ),
        (
            "plugins: mine\nlosses: {probe: }",
            "x.yaml:1: plugins of a recipe must be a list of names of modules such as",
        ),
        (
            "plugins: [1]\nlosses: {probe: }",
            "x.yaml:1: plugins[0] of a recipe must be the name of a module, received 1.",
        ),
        (
            "plugins: [no_such.module]\nlosses: {probe: }",
            "x.yaml:1: plugin 'no_such.module' cannot be imported: ModuleNotFoundError: No module named 'no_such'. Is "
            "it installed, or its folder in PYTHONPATH?",
        ),
        (
            "plugins: [.x]\nlosses: {probe: }",
            "x.yaml:1: plugins[0] of a recipe must be the name of a module, received '.x'",
        ),
        (
            "losses: {probe: !!python/object:os.system {}}",
            "x.yaml:1: the tag '!!python/object:os.system' is not allowed",
        ),
        ("losses: &a {probe: }", "x.yaml:1: '&a': no anchors and no aliases here; write the values out."),
        ("losses:\n  probe: [", "x.yaml:2: not valid YAML: "),
    ],
)
@pytest.mark.usefixtures("probe")
def test_mistakes(write, text: str, message: str):
    with pytest.raises(ConfigError, match=re.escape(message)) as info:
        load_recipe(write(text))
    assert all("\n" not in line for line in info.value.problems)


@pytest.mark.usefixtures("probe")
def test_one_mistake_is_one_line(write):
    assert len(mistakes(write("losses:\n  probe: {alpha: -1, size: 2, mode: b}"))) == 1
    assert len(mistakes(write("losses:\n  needy: {lam: -1}"))) == 1
    assert len(mistakes(write("losses:\n  needy: {lam: x}"))) == 1


@pytest.mark.usefixtures("probe")
def test_several_mistakes_are_reported_together(write):
    file = write(
        """\
        loses: 1
        losses:
          probe:
            weight: -1
            alpha: -1
            size: 0
            levels: p3
            flag: 1
            schedule: {kind: x, stop: 2, warmup: true}
          fgdd: {weight: .nan}
        """
    )
    lines = [line.split(": ")[0] for line in mistakes(file)]
    assert sorted(lines) == sorted(f"x.yaml:{n}" for n in (1, 4, 5, 6, 7, 8, 9, 9, 9, 10, 10))


@pytest.mark.usefixtures("probe")
def test_values_that_are_allowed(write):
    file = write("losses: {probe: {alpha: 2, levels: null, limit: null, sizes: [1], weight: 0}, bare: }")
    (probe, bare) = load_recipe(file).terms
    assert probe.weight == 0
    assert probe.arguments == {"alpha": 2, "levels": None, "limit": None, "sizes": (1,)}
    assert bare.arguments == {}


@pytest.mark.parametrize("name", ["missing.yaml", "a/b/missing.yml"])
def test_a_missing_file(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert mistakes(name) == (f"{name}: no such file.",)
    assert mistakes(Path(name)) == (f"{name}: no such file.",)


def test_other_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("folder.yaml").mkdir()
    assert mistakes("folder.yaml") == ("folder.yaml: is a folder, not a file.",)
    Path("latin.yaml").write_bytes(b"\xff")
    assert mistakes("latin.yaml") == ("latin.yaml:1: not UTF-8 text. Save the file in that encoding.",)
    assert mistakes("objectness.yaml") == (
        "no file 'objectness.yaml' in the current folder. Write kd=objectness for the recipe of that name.",
    )
    (line,) = mistakes("objectnes")
    assert line.startswith("unknown recipe 'objectnes'. Did you mean 'objectness'? Recipes: ")
    assert "objectness_l2" in line
    assert line.endswith("or the path of a .yaml file.")
    for source in ("", 3, None):
        (line,) = mistakes(source)
        assert line.startswith("a recipe is a name, a path to a YAML file or a mapping, received ")


def test_mapping_mistakes_are_named_by_their_path():
    assert mistakes({"losses": {"objectness": {"weight": -1, "lam_cls": -1}}}) == (
        "kd.losses.objectness.weight: weight of loss 'objectness' must be a number of at least 0 or auto, received -1.",
        "kd.losses.objectness.lam_cls: lam_cls of loss 'objectness' must be a number of at least 0, received -1.",
    )
    (line,) = mistakes({})
    assert line.startswith("kd: a recipe needs the key 'losses', a mapping from names of losses to their keys")


def test_overrides():
    recipe = load_recipe(
        {"losses": {"objectness": {"lam_box": -5}, "ultralytics": None}},
        {
            "objectness.weight": 0.5,
            "objectness.lam_box": 2,
            "ultralytics.schedule.kind": "cosine",
            "ultralytics.schedule.end": 0.1,
        },
    )
    assert recipe.terms == (
        TermSpec("objectness", 0.5, Schedule(), {"lam_box": 2.0}),
        TermSpec("ultralytics", 1.0, Schedule(kind="cosine", end=0.1), {}),
    )


def test_overrides_leave_the_source_alone():
    source = {"losses": {"objectness": {"schedule": {"kind": "cosine", "end": 0.1}}}}
    before = copy.deepcopy(source)
    # the recipe's end is then without effect, and left out
    recipe = load_recipe(source, {"objectness.schedule.kind": "constant", "objectness.weight": 3})
    assert recipe.terms[0].schedule == Schedule()
    assert load_recipe(recipe.to_dict()).terms[0].schedule == Schedule()
    assert source == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "objectness.weight",
            -1,
            "kd.objectness.weight on the command line: weight of loss 'objectness' must be a number of at least 0 or "
            "auto, received -1.",
        ),
        (
            "objectness.lam",
            1,
            "kd.objectness.lam on the command line: unknown key 'lam' of loss 'objectness'. Did you mean 'lam_cls'? ",
        ),
        ("objectness.lam_cls", "x", "kd.objectness.lam_cls on the command line: lam_cls of loss 'objectness' must be"),
        (
            "fgd.weight",
            1,
            "kd.fgd.weight on the command line: recipe 'objectness' has no loss 'fgd'. It has objectness.",
        ),
        ("objectnes.weight", 1, "has no loss 'objectnes'. Did you mean 'objectness'? It has objectness."),
        (
            "objectness",
            1,
            "kd.objectness on the command line: an override is written kd.objectness.<key>=value or "
            "kd.objectness.schedule.<key>=value.",
        ),
        ("objectness.weight.x", 1, "an override is written kd.objectness.<key>=value"),
        ("objectness.schedule.", 1, "an override is written kd.objectness.<key>=value"),
        (
            "objectness.schedule.kind",
            "cosin",
            "kd.objectness.schedule.kind on the command line: kind of the schedule of loss 'objectness' must be",
        ),
        ("objectness.schedule.x", 1, "kd.objectness.schedule.x on the command line: unknown key 'x' of the schedule"),
        ("objectness.schedule", 1, "kd.objectness.schedule on the command line: schedule of loss 'objectness' must be"),
        ("", 1, "kd. on the command line: recipe 'objectness' has no loss ''."),
    ],
)
def test_mistakes_in_overrides(key, value, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_recipe("objectness", {key: value})


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes(name, tmp_path):
    file = shipped_recipes()[name]
    recipe = load_recipe(name)
    assert recipe.name == name
    assert all(term.weight == 1.0 for term in recipe.terms), "a shipped recipe has the documented strength"
    assert load_recipe(file) == recipe
    assert 20 < len(describe(file)) <= 400
    head = [line for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("yolo-kd train teacher=" in line and f" kd={name}" in line for line in head), "no launch command"

    full = recipe.to_dict()
    assert load_recipe(full).to_dict() == full
    assert load_recipe(full, name=name).name == name
    saved = tmp_path / "kd.yaml"
    saved.write_text(yaml.safe_dump(full, sort_keys=False), encoding="utf-8")
    assert load_recipe(saved).to_dict() == full


def test_the_first_recipes_are_there():
    assert {"objectness", "objectness_l2", "ultralytics"} <= set(shipped_recipes())


@pytest.mark.usefixtures("probe")
def test_to_dict_is_complete_and_plain():
    source = {"losses": {"probe": {"alpha": 1e-7, "schedule": {"start": 0.5}}}}
    full = load_recipe(source).to_dict()
    assert full == {
        "losses": {
            "probe": {
                "weight": 1.0,
                "schedule": {"kind": "constant", "start": 0.5, "end": 1.0, "warmup": 0.0, "stop": 1.0},
                "alpha": 1e-7,
                "size": 3,
                "flag": False,
                "mode": "a",
                "levels": None,
                "sizes": [1, 2],
                "limit": 0.5,
            }
        },
        "plugins": [],
        "inherit": False,
    }
    assert load_recipe(full).to_dict() == full
    assert yaml.safe_load(yaml.safe_dump(full)) == full


def test_recipes_travel_between_processes():
    recipe = load_recipe("objectness")
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert copy.deepcopy(recipe) == recipe


def test_plugins_are_imported_before_losses_are_looked_up(write, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.syspath_prepend(str(tmp_path))
    write(
        """
        from yolo_kd.losses.base import Loss

        class Own(Loss):
            name = "own"
            columns = ("own_loss",)
        """,
        "own_plugin.py",
    )
    try:
        recipe = load_recipe(write("plugins: [own_plugin]\nlosses: {own: }"))
    finally:
        sys.modules.pop("own_plugin", None)
    assert recipe.plugins == ("own_plugin",)
    assert [term.name for term in recipe.terms] == ["own"]


def test_a_plugin_that_fails(write, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    write("1 / 0", "broken_plugin.py")
    (line,) = mistakes(write("plugins:\n  - broken_plugin\nlosses: {objectness: }"))
    assert line == "x.yaml:2: plugin 'broken_plugin' cannot be imported: ZeroDivisionError: division by zero."


def test_describe_stops_at_the_first_paragraph(write):
    assert describe(write("# One line\n# and another.\n#\n# not this\nlosses:\n")) == "One line and another."
    assert describe(write("losses: # not this\n")) == ""


_WORDS = ["losses", "plugins", "objectness", "weight", "schedule", "kind", "cosine", "lam_cls", "fm_nms", "1", "-1"]
_PARTS = st.one_of(
    st.sampled_from([*_WORDS, ": ", "\n", "\n  ", "\n    ", "{", "}", "[", "]", "- ", ", ", "1e-3"]),
    st.text(max_size=5),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(_PARTS, max_size=15).map("".join))
@example("losses: {objectness: {weight: 1}}")
@example("{null: null}")
def test_any_text_is_a_recipe_or_a_config_error(tmp_path_factory, text):
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    with suppress(ConfigError):
        assert load_recipe(file).terms


_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.sampled_from(_WORDS)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(_WORDS), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40, deadline=None)
@given(_VALUES, st.dictionaries(st.sampled_from(["objectness.weight", "objectness", "x.y", "."]), _VALUES, max_size=2))
def test_any_value_is_a_recipe_or_a_config_error(value, overrides):
    for source in (value, {"losses": {"objectness": value}}):
        with suppress(ConfigError):
            assert load_recipe(source, overrides).terms


def test_layers_are_part_of_a_recipe_and_survive_a_round_trip():
    recipe = load_recipe({"losses": {"mimic": {"student_layers": ["model.4"], "teacher_layers": ["model.5"]}}})
    assert recipe.terms[0].student_layers == ("model.4",)
    assert load_recipe(recipe.to_dict()).terms[0].teacher_layers == ("model.5",)


def test_what_all_terms_need_together():
    layers = {"student_layers": ["model.4", "model.6"], "teacher_layers": ["model.4", "model.6"]}
    more = {"student_layers": ["model.6", "model.9"]}
    recipe = load_recipe({"losses": {"mimic": layers, "pkd": more, "objectness": {}}})
    assert recipe.student_layers == ["model.4", "model.6", "model.9"]
    assert recipe.teacher_layers == ["model.4", "model.6"]
    assert recipe.reads == {"features", "targets", "scores", "boxes"}
    assert not recipe.head_split
    assert load_recipe({"losses": {"objectness": {}, "crosskd": {}}}).head_split


def test_a_weight_that_sets_itself(tmp_path: Path):
    recipe = load_recipe({"losses": {"fgd": {"weight": "auto"}, "mgd": {"weight": "auto", "ratio": 1}, "at": {}}})
    assert [(t.weight, t.ratio) for t in recipe.terms] == [(1.0, 0.3), (1.0, 1.0), (1.0, None)]
    resolved = recipe.to_dict()
    assert [resolved["losses"][n].get("weight") for n in ("fgd", "mgd", "at")] == ["auto", "auto", 1.0]
    assert "ratio" not in resolved["losses"]["at"]
    again = load_recipe(resolved)
    assert again.to_dict() == resolved
    assert [t.ratio for t in again.terms] == [0.3, 1.0, None]


def test_a_weight_on_the_command_line_switches_auto_on_and_off():
    assert load_recipe("fgd", {"fgd.weight": "auto"}).terms[0].ratio == 0.3
    assert load_recipe("fgd", {"fgd.weight": "auto", "fgd.ratio": 0.5}).terms[0].ratio == 0.5
    source = {"losses": {"fgd": {"weight": "auto", "ratio": 0.5}}}
    assert load_recipe(source, {"fgd.ratio": 0.2}).terms[0].ratio == 0.2
    off = load_recipe(source, {"fgd.weight": 2}).terms[0]
    assert (off.weight, off.ratio) == (2.0, None)
    with pytest.raises(ConfigError, match=r"kd.fgd.ratio on the command line: ratio of loss 'fgd' has no effect"):
        load_recipe("fgd", {"fgd.ratio": 0.5})


def test_the_default_is_what_was_measured():
    """docs/results.md has the numbers of `objectness_cwd`; whoever changes one of the two has to measure again."""
    assert load_recipe("default").terms == load_recipe("objectness_cwd").terms
