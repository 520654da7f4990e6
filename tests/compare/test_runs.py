"""Runs without trainings: which are planned, kept and refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from tests.support.comparison import fake_comparison, finish
from yolo_kd.compare.arms import parse_compare
from yolo_kd.compare.records import RunState
from yolo_kd.compare.runs import FINISHED, WAITING, Run, keys_of, locked, plan_runs
from yolo_kd.config.train_options import OWN_KEYS, TrainOptions, parse_train
from yolo_kd.errors import ConfigError


def test_runs_are_planned_seed_by_seed(tmp_path: Path) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 2))
    assert [r.name for r in runs] == ["baseline seed 0", "fgd seed 0", "baseline seed 1", "fgd seed 1"]
    assert [r.keys["seed"] for r in runs] == [0, 0, 1, 1]
    assert runs[1].keys["project"] == str(tmp_path / "fake" / "runs" / "fgd")
    assert runs[1].keys["plots"] is False
    assert runs[0].keys["kd"] == "none"
    assert "teacher" not in runs[0].keys


def test_upstream_gets_ultralytics_keys_only(tmp_path: Path) -> None:
    (tmp_path / "arms.yaml").write_text("baseline:\ntheirs: {kd: distill_model, dis: 3.0, lr0: 0.002}\n")
    comparison = fake_comparison(tmp_path, str(tmp_path / "arms.yaml"), 1, amp="bf16")
    keys = keys_of(comparison.arms[1])
    assert keys["distill_model"] == "teacher.pt"
    assert keys["model"] == "student.pt"
    assert (keys["dis"], keys["lr0"], keys["amp"]) == (3.0, 0.002, "bf16")
    assert not {"kd", "teacher", "student"} & set(keys)
    # everything else is what the baseline trains with
    baseline = keys_of(comparison.arms[0])
    own = {"model", "distill_model", "dis", "lr0", "kd", "student", "teacher"}
    assert {k: v for k, v in keys.items() if k not in own} == {k: v for k, v in baseline.items() if k not in own}


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("teacher.pt").write_bytes(b"x")
    keys = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[1].keys
    assert keys["teacher"] == str(tmp_path / "teacher.pt")
    assert keys["student"] == "student.pt"  # a name that Ultralytics may know


def saved(runs: list[Run]) -> None:
    for run in runs:
        run.save()


def test_what_was_finished_stays_finished(tmp_path: Path) -> None:
    runs = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))
    finish(runs[0], [0.1, 0.2])
    finish(runs[1], [0.1, 0.2])
    saved(runs)
    runs[0].best.parent.mkdir()
    runs[0].best.write_bytes(b"x")
    again = plan_runs(fake_comparison(tmp_path, "baseline,fgd,mgd", 2))
    found = {r.name: r.status for r in again}
    assert found["baseline seed 0"] == FINISHED
    assert found["fgd seed 0"] == WAITING  # its checkpoint is gone
    assert found["mgd seed 1"] == WAITING  # arms and seeds may be added


def test_other_settings_in_the_same_folder_are_refused(tmp_path: Path) -> None:
    saved(plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1)))
    with pytest.raises(ConfigError, match=r"baseline.seed0 was trained with other settings: epochs was 4, now 5; lr0"):
        plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, epochs=5, lr0=0.1))
    plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, jobs=2))  # how many at a time is no setting of a run


def test_another_teacher_under_the_same_name_is_refused(tmp_path: Path) -> None:
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(b"one")
    saved(plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, teacher=teacher)))
    teacher.write_bytes(b"two")
    with pytest.raises(ConfigError, match=r"fgd.seed0 was trained with other settings: the content of teacher= has"):
        plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, teacher=teacher))


def test_another_recipe_under_the_same_name_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("losses: {objectness: {weight: 1.0}}\n")
    saved(plan_runs(fake_comparison(tmp_path, f"baseline,{recipe}", 1)))
    recipe.write_text("losses: {objectness: {weight: 2.0}}\n")
    with pytest.raises(ConfigError, match=r"recipe losses objectness weight|weight was 1.0, now 2.0"):
        plan_runs(fake_comparison(tmp_path, f"baseline,{recipe}", 1))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda text: "{", "Invalid JSON"),
        (lambda text: text.replace('"status"', '"state"'), "status: Field required"),
        (lambda text: text.replace('"waiting"', '"asleep"'), "status: Input should be"),
        (lambda text: text.replace('"keys"', '"options"'), "identity.keys: Field required"),
        (lambda text: "[]", "Input should be an object"),
    ],
)
def test_a_damaged_or_old_state_is_one_sentence(tmp_path: Path, change: Callable[[str], str], reason: str) -> None:
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[0]
    run.save()
    run.state_file.write_text(change(run.state_file.read_text()))
    with pytest.raises(ConfigError, match="is damaged") as info:
        plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))
    (problem,) = info.value.problems
    assert "\n" not in problem
    assert f"{run.state_file} is damaged ({reason}" in problem
    assert problem.endswith("Delete it to train this run again.")


def test_a_state_survives_its_file(tmp_path: Path) -> None:
    words = {"class_map": "{car: vehicle}", "lr0": 1e-5, "cos_lr": "true", "time": 0.1}
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1, **words))[1]
    finish(run, [0.1])
    run.save()
    assert RunState.from_json(run.state_file.read_bytes()) == run.state()
    assert run.identity.recipe
    assert run.identity.keys["lr0"] == 1e-5


def test_one_comparison_per_folder(tmp_path: Path) -> None:
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(ConfigError, match="another comparison is at work"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_training_time_over_continuations(tmp_path: Path) -> None:
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[0]
    assert run.seconds() is None
    run.folder.mkdir(parents=True)
    # the clock begins anew after the second epoch
    (run.folder / "results.csv").write_text("epoch,time\n1,10\n2,21\n3,12\n4,20\n")
    assert run.seconds() == pytest.approx(21 + 20)


def test_an_epoch_that_was_repeated_counts_once(tmp_path: Path) -> None:
    run = plan_runs(fake_comparison(tmp_path, "baseline,fgd", 1))[0]
    run.folder.mkdir(parents=True)
    (run.folder / "results.csv").write_text("epoch,time\n1,10\n2,21\n2,12\n3,20\n")
    assert [row["epoch"] for row in run.rows()] == [1, 2, 3]
    assert run.seconds() == pytest.approx(10 + 12 + 8)


def test_unlabeled_images_and_keys_of_speed_reach_the_arms_that_take_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["teacher=t.pt", "student=s.pt", "data=d.yaml", "arms=baseline,distill_model,objectness", "threads=2"]
    arms = parse_compare([*words, "unlabeled=pool", "unlabeled_mode=both"]).arms
    baseline, upstream, distilled = (keys_of(arm) for arm in arms)
    assert not any(key.startswith("unlabeled") for key in {**baseline, **upstream})
    assert distilled["unlabeled"] == [str(tmp_path / "pool")]
    assert distilled["unlabeled_mode"] == "both"
    assert baseline["threads"] == distilled["threads"] == 2
    Path("arms.yaml").write_text("baseline:\nup: {kd: distill_model, unlabeled: pool}\n")
    with pytest.raises(ConfigError, match="unlabeled has no meaning for Ultralytics' own trainer"):
        parse_compare([*words[:3], "arms=arms.yaml"])


def ours(options: TrainOptions) -> dict[str, Any]:
    """Return the keys of a training that are not Ultralytics'."""
    return {key: value for key, value in options.to_keys().items() if key in OWN_KEYS or key.startswith("kd.")}


def test_a_run_is_trained_with_what_its_arm_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("harmless_plugin.py").touch()
    Path("arms.yaml").write_text(
        "baseline:\n"
        "random: {kd: default, inherit: false, kd.cwd.weight: 2.0}\n"
        "thinned: {kd: objectness, inherit: thinned, unlabeled: [pool], unlabeled_ratio: 2}\n"
        "mapped: {kd: cwd, inherit: true, class_map: {car: vehicle}, teacher_precision: fp32, lr0: 0.002}\n"
    )
    words = ["teacher=t.pt", "student=s.yaml", "data=d.yaml", "arms=arms.yaml", "plugins=[harmless_plugin]", "seeds=1"]
    for run in plan_runs(parse_compare([*words, "epochs=3", "amp=bf16"])):
        run.experiment.parent.mkdir(parents=True, exist_ok=True)
        run.experiment.write_text(yaml.safe_dump(run.keys))
        folders = [f"{key}={run.keys[key]}" for key in ("project", "name")]
        trained = parse_train([f"cfg={run.experiment}", *folders])
        asked, pool = ours(run.arm.options), ours(trained).get("unlabeled")
        assert ours(trained) | ({"unlabeled": ["pool"]} if pool else {}) == asked
        assert pool in (None, [str(tmp_path / "pool")])
        assert trained.kd_overrides == run.arm.options.kd_overrides
        assert run.arm.options.ultralytics.items() <= trained.ultralytics.items()
