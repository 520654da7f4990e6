"""The summary: verdicts, pairs, gaps, notes, and runs that failed."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest

from tests.support.comparison import fail, fake_summary, finish, measurements
from yolo_kd.compare.arms import parse_compare
from yolo_kd.compare.records import ArmSummary, Summary
from yolo_kd.compare.runs import plan_runs
from yolo_kd.compare.summary import runs_csv, summarise

CLEAR, VAGUE, BAD = (0.030, 0.031, 0.032), (0.02, -0.03, 0.01), (-0.02, -0.021, -0.022)


def arm_of(summary: Summary, name: str) -> ArmSummary:
    return next(arm for arm in summary.arms if arm.name == name)


def word_of(summary: Summary, name: str) -> str:
    verdict = arm_of(summary, name).verdict
    assert verdict is not None
    return verdict.word


def test_a_clear_gain(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(tmp_path, {"objectness": CLEAR})
    arm = arm_of(summary, "objectness")
    share = round(arm.gap_closed["test"] * 100)
    assert summary.verdict == (
        "objectness: +3.1 mAP50-95 (test) over baseline, 95 % interval +2.9 to +3.3, 3 paired seeds, closes "
        f"{share} % of the gap to the teacher, costs 1.33x the training time."
    )
    assert arm.verdict
    assert arm.verdict.words == {"val": "better", "test": "better"}
    # teacher 0.55 on test, baseline 0.5 - 0.01 + the mean of its noise
    base = arm_of(summary, "baseline").metrics["test"]["mAP50-95"].mean
    assert arm.gap_closed["test"] == pytest.approx(0.031 / (0.55 - base), rel=1e-6)
    assert arm.time_ratio == pytest.approx(2.0 / 1.5)


def test_several_arms_are_ranked_and_corrected(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(tmp_path, {"fgd": VAGUE, "objectness": CLEAR, "mgd": BAD})
    assert summary.ranking == ("objectness", "fgd", "mgd")
    assert [word_of(summary, n) for n in summary.ranking] == [
        "better",
        "inside the noise",
        "worse",
    ]
    assert summary.verdict.startswith("objectness: +3.1")
    found = arm_of(summary, "objectness").difference["test"]["mAP50-95"]
    assert found.p_holm is not None
    assert found.p_t is not None
    assert found.p_holm > found.p_t
    assert any("3 arms are compared with one baseline" in note for note in summary.notes)


def test_nothing_but_noise_is_called_that(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(tmp_path, {"fgd": VAGUE, "mgd": (0.0, 0.02, -0.01)})
    assert summary.verdict.startswith("No arm is better than baseline beyond doubt.")
    assert "inside the noise" in summary.verdict


def test_two_seeds_are_not_enough(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(tmp_path, {"fgd": (0.03, 0.031)}, splits=("val",))
    assert "not enough evidence (2 paired seeds, at least 3 are needed" in summary.verdict
    assert summary.headline_split == "val"
    assert any("no test split" in note for note in summary.notes)


def test_failed_runs_drop_out_in_pairs(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(
        tmp_path, {"fgd": CLEAR, "mgd": CLEAR}, broken=("baseline seed 1", "mgd seed 0", "mgd seed 1", "mgd seed 2")
    )
    found = arm_of(summary, "fgd").difference["test"]["mAP50-95"]
    assert (found.seeds, found.dropped) == ((0, 2), (1,))
    assert any("fgd: seed 1 has no partner" in note for note in summary.notes)
    assert word_of(summary, "mgd") == "no result"
    assert any(sentence.startswith("mgd: no result") for sentence in summary.verdicts)
    assert len(summary.problems) == 4
    assert "out> of memory" in summary.problems[0]


def test_everything_failed(tmp_path: Path) -> None:
    names = [f"{arm} seed {seed}" for arm in ("baseline", "fgd") for seed in range(3)]
    summary, _, _ = fake_summary(tmp_path, {"fgd": CLEAR}, broken=names)
    assert summary.verdict.startswith("fgd: no result")
    assert Summary.from_json(summary.to_json()) == summary


def test_a_comparison_without_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("arms.yaml").write_text("plain: {kd: none}\nslow: {kd: none, lr0: 0.001}\n")
    comparison = parse_compare(["student=s.pt", "data=d.yaml", "arms=arms.yaml", "seeds=1"])
    runs = plan_runs(comparison)
    finish(runs[0], [0.1, 0.2])
    fail(runs[1])
    summary = summarise(comparison, runs, measurements(tmp_path))
    assert summary.teachers == ()
    assert any("slow also differs in lr0=0.001" in note for note in summary.notes)


def test_a_start_from_the_teacher_is_separated_from_distillation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arms = "baseline:\ndefault:\nrandom: {kd: default, inherit: false}\nhalf: {kd: objectness, inherit: true}\n"
    Path("arms.yaml").write_text(arms)
    comparison = parse_compare(["teacher=t.pt", "student=s.yaml", "data=d.yaml", "arms=arms.yaml", "seeds=1"])
    runs = plan_runs(comparison)
    for run in runs:
        fail(run)
    notes = summarise(comparison, runs, measurements(tmp_path)).notes
    assert [note for note in notes if "inherit" in note] == [
        "default starts from its teacher (inherit=thinned), so part of its difference is due to that start: random "
        "does the same without it.",
        "half starts from its teacher (inherit=true), so part of its difference is due to that start: an arm "
        "with inherit: false separates the two.",
    ]


def test_runs_csv(tmp_path: Path) -> None:
    summary, _, _ = fake_summary(tmp_path, {"fgd": CLEAR}, broken=("fgd seed 2",))
    rows = list(csv.DictReader(io.StringIO(runs_csv(summary))))
    assert [(r["arm"], r["seed"], r["status"]) for r in rows][-1] == ("fgd", "2", "failed")
    assert float(rows[1]["test/mAP50-95"]) == pytest.approx(0.5 + 0.03 - 0.01)
    assert rows[-1]["test/mAP50-95"] == ""
