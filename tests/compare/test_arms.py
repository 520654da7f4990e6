"""The command line of compare: what it means, and a sentence for every mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolo_kd.compare.arms import parse_compare
from yolo_kd.errors import ConfigError

WORDS = ["teacher=t.pt", "student=s.pt", "data=d.yaml"]


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def mistakes(*words: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as info:
        parse_compare(words)
    return info.value.problems


def write(name: str, text: str) -> str:
    Path(name).write_text(text)
    return name


def test_arms_of_all_kinds() -> None:
    found = parse_compare([*WORDS, "arms=baseline,distill_model,objectness", "seeds=2", "seed=5", "jobs=2", "epochs=7"])
    assert [(a.name, a.kind) for a in found.arms] == [
        ("baseline", "alone"),
        ("distill_model", "distill_model"),
        ("objectness", "distilled"),
    ]
    assert (found.seeds, found.jobs, found.reference) == ((5, 6), 2, "baseline")
    baseline, upstream, distilled = (a.options for a in found.arms)
    assert (baseline.teacher, baseline.kd) == (None, "none")
    assert (upstream.teacher, distilled.teacher) == ("t.pt", "t.pt")
    assert all(a.options.ultralytics["epochs"] == 7 for a in found.arms)
    assert found.folder == Path("runs/compare/compare").absolute()


def test_defaults_compare_the_recipe_of_the_experiment_with_the_baseline() -> None:
    write("blood.yaml", "teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nkd: fgd\nkd.fgd.weight: 0.5\nepochs: 9\n")
    found = parse_compare(["cfg=blood.yaml"])
    assert [a.name for a in found.arms] == ["baseline", "fgd"]
    assert found.arms[1].options.kd_overrides == {"fgd.weight": 0.5}
    assert found.folder.name == "blood"
    assert found.seeds == (0, 1, 2)
    # with arms, the experiment's own recipe steps back, but a change of it would be lost
    assert any("changes the recipe of one arm" in line for line in mistakes("cfg=blood.yaml", "arms=baseline,mgd"))
    write("plain.yaml", "teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nkd: fgd\n")
    found = parse_compare(["cfg=plain.yaml", "arms=[baseline, mgd]"])
    assert [a.name for a in found.arms] == ["baseline", "mgd"]


def test_arms_of_an_experiment_file() -> None:
    write(
        "e.yaml",
        "teacher: t.pt\nstudent: s.pt\ndata: d.yaml\nseeds: 4\njobs: 2\n"
        "arms:\n  baseline:\n  strong: {kd: objectness, kd.objectness.weight: 4.0}\n  slow: {kd: none, lr0: 0.001}\n"
        "  theirs: {kd: distill_model, dis: 3.0}\n",
    )
    found = parse_compare(["cfg=e.yaml", "name=x", "project=out"])
    assert [a.name for a in found.arms] == ["baseline", "strong", "slow", "theirs"]
    assert found.arms[1].options.kd_overrides == {"objectness.weight": 4.0}
    assert found.arms[2].differs == {"lr0": 0.001}
    assert found.arms[3].extra == {"dis": 3.0}
    assert found.arms[3].kind == "distill_model"
    assert (len(found.seeds), found.jobs) == (4, 2)
    assert found.folder == Path("out/x").absolute()


def test_files_of_arms_and_of_recipes() -> None:
    write("arms.yaml", "baseline:\nheavy: {kd: fgd, kd.fgd.weight: 2.0}\n")
    write("mine.yaml", "losses: {objectness: {weight: 0.5}}\n")
    write("list.yaml", "[baseline, fgd]\n")
    assert [a.name for a in parse_compare([*WORDS, "arms=arms.yaml"]).arms] == ["baseline", "heavy"]
    assert [a.name for a in parse_compare([*WORDS, "arms=list.yaml"]).arms] == ["baseline", "fgd"]
    found = parse_compare([*WORDS, "arms=arms.yaml,mine.yaml"]).arms
    assert [a.name for a in found] == ["baseline", "heavy", "mine"]
    assert found[2].options.kd == str(Path("mine.yaml").absolute())


def test_without_a_baseline_the_first_arm_is_the_reference() -> None:
    assert parse_compare([*WORDS, "arms=ultralytics,objectness"]).reference == "ultralytics"
    write("arms.yaml", "a: {kd: fgd}\nplain: {kd: none}\n")
    assert parse_compare([*WORDS, "arms=arms.yaml"]).reference == "plain"


BAD = [
    (["arms=baseline,objectnes"], "unknown arm 'objectnes'. Did you mean 'objectness'?"),
    (["arms=baseline,distil_model"], "Did you mean 'distill_model'?"),
    (["arms=,"], "arms is empty"),
    (["arms=[]"], "arms is empty"),
    (["arms=baseline"], "at least two arms, received 'baseline' only"),
    (["arms=baseline,fgd,fgd"], "arm 'fgd' is given 2 times"),
    (["arms=7"], "an arm is a name or a YAML file, received 7"),
    (["arms=no.yaml"], "no.yaml: no such file"),
    (["seeds=0"], "seeds must be a whole number of at least 1, received 0."),
    (["seeds=-1"], "seeds must be a whole number of at least 1, received -1."),
    (["seeds=2.5"], "received 2.5."),
    (["seeds=true"], "received True."),
    (["jobs=0"], "jobs must be a whole number of at least 1, received 0."),
    (["jobs=many"], "received 'many'."),
    (["seed=-1"], "seed must be a whole number of at least 0"),
    (["epoch=3"], "unknown key 'epoch'. Did you mean 'epochs'?"),
    (["sedes=3"], "Did you mean 'seeds'?"),
    (["arm=baseline,fgd"], "unknown key 'arm'. Did you mean 'arms'?"),
    (["techer=x.pt"], "Did you mean 'teacher'?"),
    (["resume=last.pt"], "resume cannot be given to compare"),
    (["save_dir=x"], "write project= and name="),
    (["exist_ok=true"], "the same command in the same folder continues"),
    (["save=false"], "needs the checkpoints"),
    (["arms=baseline,fgd", "kd=fgd"], "kd is what the arms differ in"),
    (["arms=baseline,fgd", "kd.fgd.weight=2"], "changes the recipe of one arm"),
    (["kd=none"], "kd=none is the baseline itself"),
    (["epochs=x"], "'epochs' must be an int"),
    (["distill_model=x.pt"], "kd=ultralytics"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_mistakes(words: list[str], message: str) -> None:
    problems = mistakes(*WORDS, *words)
    assert any(message in line for line in problems), problems


def test_all_mistakes_at_once_and_each_only_once() -> None:
    problems = mistakes("arms=baseline,fgd,objectnes", "seeds=0", "jobs=0", "epoch=3")
    assert len(problems) == len(set(problems))
    text = "\n".join(problems)
    for part in ("'objectnes'", "seeds must", "jobs must", "'epoch'", "student is missing", "data is missing"):
        assert text.count(part) == 1, text
    assert "arm 'fgd': kd is given but no teacher" in text


FILES = [
    ("a: {kd: fgd}\nb: {kd: fgd, seed: 3}\n", "arm 'b' cannot set seed"),
    ("a: {kd: fgd}\nb: {kd: fgd, data: x.yaml}\n", "arm 'b' cannot set data"),
    ("a: {kd: fgd}\nb: {lr0: 0.1}\n", "arm 'b' names no recipe"),
    ("a: {kd: fgd}\nb: {kd: fgdd}\n", "arm 'b': "),
    ("a: {kd: fgd}\nb: {kd: fgd, lr00: 1}\n", "Did you mean 'lr0'?"),
    ("a: {kd: fgd}\nb: 3\n", "arm 'b' must be a mapping"),
    ("a: {kd: fgd}\nb c: {kd: fgd}\n", "must be named with letters"),
    ("a: {kd: fgd}\nfgg:\n", "unknown arm 'fgg'"),
    ("a: {kd: fgd}\nb: {kd: distill_model, dis: -1}\n", "dis must be a number above 0"),
    ("a: {kd: fgd}\nb: {kd: distill_model, kd.ultralytics.dis: 2}\n", "no meaning for Ultralytics' own trainer"),
    ("a: {kd: fgd}\nb: {kd: none, teacher: t.pt}\n", "trains the student alone"),
    ("", "it is empty"),
    ("7\n", "received 7"),
]


@pytest.mark.parametrize(("text", "message"), FILES)
def test_mistakes_in_a_file_of_arms(text: str, message: str) -> None:
    write("arms.yaml", text)
    problems = mistakes(*WORDS, "arms=arms.yaml")
    assert any(message in line for line in problems), problems


def test_a_start_from_the_teacher_is_a_difference() -> None:
    write("arms.yaml", "baseline:\ndefault:\nrandom: {kd: default, inherit: false}\nobjectness:\n")
    words = ["teacher=t.pt", "data=d.yaml", "arms=arms.yaml"]
    found = parse_compare([*words, "student=s.yaml"])
    assert [a.differs for a in found.arms] == [{}, {"inherit": "thinned"}, {"inherit": False}, {}]
    # a student with weights keeps them
    assert parse_compare([*words, "student=s.pt", "pretrained=False"]).arms[1].differs == {"inherit": "thinned"}
    for own in (["student=s.pt"], ["student=s.yaml", "pretrained=s.pt"]):
        assert parse_compare([*words, *own]).arms[1].differs == {}
    # and a teacher that was never trained is no start
    words[0] = "teacher=t.yaml"
    assert parse_compare([*words, "student=s.yaml", "random_teacher=true"]).arms[1].differs == {}
