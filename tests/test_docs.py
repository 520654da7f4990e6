"""README and docs: every code block runs, every number of a claim is in a CSV file, and the site builds.

How a block runs, by weight:

- normal: `check`, `export`, `losses`, `recipes` and short scripts run in full on tiny data. `train` runs in full in the
  blocks of `TRAINED`; in the others up to the trainer that is ready to start: keys, recipe, files, models, classes and
  data are read and checked. `compare` runs up to the first training.
- long: every `train` in full, the scripts that train, and `compare` in the block of `COMPARED`. Other comparisons have
  other arms only, all of which the normal weight reads and checks.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, load_script
from tests.support.docs import (
    NAMED,
    Block,
    blocks,
    commands,
    fake_source,
    files_for,
    make_workspace,
    shrunk,
    zipped,
)

RUN = [block for block in blocks() if block.language in ("bash", "python") and block.reason is None]
SHELL = [block for block in RUN if block.language == "bash"]
PYTHON = [block for block in RUN if block.language == "python"]
TRAINED = ("README.md", "docs/how-to/unlabeled.md", "docs/how-to/add-classes.md", "docs/how-to/resume.md")
COMPARED = "docs/tutorial.md"
SLOW_SCRIPTS = ("bench_step.py", "measure_strength.py", "few_labels.py", "bccd.sh", "train_upstream.py")
MOST_NOT_RUN = 5
NO_PROGRAMS = ("#!/bin/bash",)  # blocks that are a script of their own, run by bash


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the documentation's commands run as written."""
    return make_workspace(tmp_path_factory.mktemp("docs"))


@pytest.fixture
def here(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The workspace as the current folder, as it was before any block ran."""
    keep = {path.name for path in (workspace / "runs" / "detect").iterdir() if path.name.endswith("teacher")}
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("ultralytics.cfg.TESTS_RUNNING", False)
    monkeypatch.setattr("ultralytics.cfg.SETTINGS", {"runs_dir": str(workspace / "runs")})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(workspace), str(ROOT)]))
    monkeypatch.syspath_prepend(str(workspace))
    yield workspace
    for path in (workspace / "runs" / "detect").iterdir():
        if path.name not in keep:
            shutil.rmtree(path)
    for name in ("compare", "few10", "few20", "bccd"):
        shutil.rmtree(workspace / "runs" / name, ignore_errors=True)
    from yolo_kd.losses import base

    sys.modules.pop("my_loss", None)
    base._REGISTRY.pop("my_smooth", None)


def write_files(block: Block, folder: Path) -> None:
    """Write the files that the block's page shows, and the run that it starts from."""
    for name, text in files_for(block).items():
        (folder / name).write_text(text, encoding="utf-8")


def needs_run(block: Block) -> bool:
    """Return whether a block starts from the result of a training that it does not make itself."""
    if block.language == "python":
        return "runs/detect/train/" in block.text
    for words in commands(block.text):
        if any("runs/detect/train/" in word for word in words):
            return True
        if words[:2] == ["yolo-kd", "train"] and not any(word.startswith("name=") for word in words):
            return False
    return False


def finished_run(folder: Path, *, interrupted: bool) -> None:
    """Put a trained runs/detect/train in place; with `interrupted` one that was stopped in its second epoch."""
    kept, run = folder / "kept" / ("interrupted" if interrupted else "finished"), folder / "runs" / "detect" / "train"
    if not kept.exists():
        train(folder, interrupted=interrupted)
        shutil.copytree(run, kept)
    elif not run.exists():
        shutil.copytree(kept, run)


def train(folder: Path, *, interrupted: bool) -> None:
    """Train runs/detect/train."""
    from yolo_kd.engine.trainer import DistillationTrainer

    keys = {"model": "yolov8n.pt", "teacher": "yolov8s.pt", "data": "my.yaml", "task": "detect", "mode": "train"}
    keys |= {"epochs": 2 if interrupted else 1, "imgsz": 64, "batch": 4, "workers": 0, "plots": False, "device": "cpu"}
    trainer = DistillationTrainer(overrides={**keys, "amp": False, "save_dir": str(folder / "runs/detect/train")})

    def stop(_: object) -> None:
        raise KeyboardInterrupt

    if interrupted:
        trainer.add_callback("on_model_save", stop)
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train()


class StartedError(Exception):
    """A comparison is about to train."""


def stop_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `train` end with the trainer that is ready, and `compare` before its first training."""
    from yolo_kd.compare import pipeline
    from yolo_kd.engine.trainer import DistillationTrainer

    def started(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(DistillationTrainer, "train", lambda self: None)
    monkeypatch.setattr(pipeline, "train_all", started)


def run_command(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run one command of a block inside this process.

    Raises:
        AssertionError: If it is of a kind that these tests do not know, or exits with an error.
    """
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # the fixture has set PYTHONPATH
    words = shrunk(words)
    if words[0] == "yolo-kd":
        from yolo_kd.cli import main

        try:
            code = main([*words[1:], "--debug"])
        except StartedError:
            code = 0
        assert code == 0 or (words[1] == "check" and code == 1)  # nothing is learnt from tiny random models
    elif words[0] == "python":
        monkeypatch.setattr(sys, "argv", words[1:])
        try:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        except SystemExit as ended:
            assert not ended.code  # noqa: PT017
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0].startswith("scripts/"):
        small = {"EPOCHS": "1", "IMGSZ": "64", "AMP": "False", "STUDENTS": "coco", "VENV": sys.prefix}
        folder = ROOT if words[0] == "scripts/test" else None
        subprocess.run(words, env={**os.environ, **small}, check=True, stdin=subprocess.DEVNULL, cwd=folder)
    else:
        raise AssertionError(f"no test knows how to run '{' '.join(words)}'; mark the block and say why")


def weight(block: Block) -> list[pytest.MarkDecorator]:
    """Return the marks of a block that runs in full."""
    words = block.text
    trains = any(word in words for word in ("yolo-kd train", "yolo-kd compare", *SLOW_SCRIPTS, *NO_PROGRAMS))
    slow = trains and (block.page not in TRAINED or any(word in words for word in ("compare", *NO_PROGRAMS)))
    return [pytest.mark.e2e, *([pytest.mark.long] if slow else [])]


def shell_cases(*, full: bool) -> list[object]:
    """Return the shell blocks, as parameters: all of them in full, or those that stop before the training."""
    if full:
        whole = [b for b in SHELL if "yolo-kd compare" not in b.text or b.page == COMPARED]
        return [pytest.param(block, id=str(block), marks=weight(block)) for block in whole]
    early = [b for b in SHELL if any(m.name == "long" for m in weight(b)) and "yolo-kd " in b.text]
    return [pytest.param(b, id=str(b), marks=pytest.mark.e2e) for b in early if not b.text.startswith(NO_PROGRAMS)]


@pytest.mark.parametrize("block", shell_cases(full=True))
def test_shell_block(block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(block, here)
    if needs_run(block) and not block.text.startswith(NO_PROGRAMS):
        finished_run(here, interrupted="resume=" in block.text)
    offline(here, monkeypatch)
    if block.text.startswith(NO_PROGRAMS):
        run_script(block, here)
        return
    for words in commands(block.text):
        run_command(words, monkeypatch)


@pytest.mark.parametrize("block", shell_cases(full=False))
def test_shell_block_up_to_the_training(block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(block, here)
    stop_before_training(monkeypatch)
    for words in commands(block.text):
        line = " ".join(words)
        if words[:2] in (["yolo-kd", "check"], ["yolo-kd", "export"]) or "runs/detect/train/" in line:
            continue  # these run in full in the test above
        if not any(name in line for name in SLOW_SCRIPTS):
            run_command(words, monkeypatch)


def offline(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer downloads of public data with small copies of it."""
    module = load_script("get_data")
    files = {module.SOURCES[name].url: here / "sources" / name for name in module.SOURCES}

    def answer(url: str, timeout: float) -> io.BytesIO:
        return io.BytesIO(zipped(files[url], here / "answer.zip").read_bytes())

    monkeypatch.setattr("urllib.request.urlopen", answer)


def run_script(block: Block, here: Path) -> None:
    """Run a batch script twice, as a queue does: from the start, and from the checkpoint that the first one left."""
    programs = here / "programs"
    programs.mkdir(exist_ok=True)
    shim = f'#!/bin/bash\nexec {sys.executable} -m tests.support.docs_command "$@"\n'
    for name, text in (("srun", '#!/bin/bash\nexec "$@"\n'), ("yolo-kd", shim)):
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    (here / "job.sh").write_text(block.text)
    environment = {**os.environ, "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "DOCS_RUNS": str(here / "runs")}
    for found in (False, True):
        if found:
            finished_run(here, interrupted=True)
        done = subprocess.run(
            ["bash", "-e", "job.sh"],
            env=environment,
            check=False,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert (here / "runs/detect/train/weights/best.pt").exists()
        shutil.rmtree(here / "runs/detect/train")


@pytest.mark.e2e
@pytest.mark.parametrize("block", [pytest.param(block, id=str(block)) for block in PYTHON])
def test_python_block(block: Block, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ultralytics import YOLO

    if needs_run(block):
        finished_run(here, interrupted=False)
    train = YOLO.train

    def tiny(self: YOLO, **keys: object) -> object:
        small = {"epochs": 1, "imgsz": 64, "batch": 4, "workers": 0, "plots": False, "amp": False, "device": "cpu"}
        return train(self, **{**keys, **small})

    monkeypatch.setattr(YOLO, "train", tiny)
    name = NAMED.match(block.text)
    code = block.text.replace('format="onnx"', 'format="onnx", imgsz=64')
    exec(compile(code, str(block), "exec"), {"__name__": name[1].removesuffix(".py") if name else "__main__"})


def test_recipes_in_the_docs_are_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every YAML block names its file, and what looks like a recipe is one."""
    from yolo_kd.config.recipe import load_recipe

    found = 0
    for block in blocks():
        if block.language != "yaml":
            continue
        assert NAMED.match(block.text), f"{block} does not name its file in its first line"
        if "\nlosses:" in block.text and "plugins:" not in block.text:
            path = tmp_path / "recipe.yaml"
            path.write_text(block.text, encoding="utf-8")
            assert load_recipe(path).terms
            found += 1
    assert found >= 2


def test_few_blocks_are_not_run() -> None:
    marked = [block for block in blocks() if block.reason is not None]
    assert len(marked) <= MOST_NOT_RUN, [str(block) for block in marked]
    assert all(len(block.reason or "") > 20 for block in marked)
    unknown = [str(block) for block in blocks() if block.language not in ("bash", "python", "yaml", "text")]
    assert not unknown, f"these blocks have no language that a test knows: {unknown}"


def test_readme_is_short_and_begins_with_a_number() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(re.search(r"[+−]\d+\.\d", line) for line in lines[:30])


def test_figures_of_the_readme_are_measured() -> None:
    """Every difference with an interval in README is one of the CSV files."""
    hook = load_script("docs_hook")
    files = sorted((ROOT / "docs" / "results").glob("*.csv"))
    measured = "".join(hook.csv_table(file) for file in files if file.name != "claims.csv")
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("*", "")
    found = re.findall(r"([+−]\d+\.\d) \(([+−]\d+\.\d) to ([+−]\d+\.\d)\)", text)
    assert len(found) >= 8
    assert not [figure for figure in found if "{} ({} to {})".format(*figure) not in measured]


def test_every_claim_has_its_run_and_its_section() -> None:
    hook = load_script("docs_hook")
    folder = ROOT / "docs" / "results"
    headings = re.findall(r"^## (.+)$", (folder / "experiments.md").read_text(encoding="utf-8"), re.MULTILINE)
    sections = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    _, claims = hook.read(folder / "claims.csv")
    assert len(claims) >= 15
    for claim in claims:
        assert hook.claimed(claim, folder)["difference"]
        assert claim["section"] in sections


def test_csv_files_hold_numbers() -> None:
    hook = load_script("docs_hook")
    for file in sorted((ROOT / "docs" / "results").glob("*.csv")):
        columns, rows = hook.read(file)
        assert rows, file.name
        if columns != hook.RUN_COLUMNS:
            continue
        for row in rows:
            assert row["map"] or row["difference"], row
            assert not row["map"] or 0 < float(row["map"]) < 1, row
            assert not row["low"] or float(row["low"]) <= float(row["difference"]) <= float(row["high"]), row


def test_every_csv_file_is_shown() -> None:
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))
    files = [path for folder in ("results", "benchmarks") for path in (ROOT / "docs" / folder).glob("*.csv")]
    assert files
    assert not [path.name for path in files if f"/{path.name})" not in text and f"]({path.name})" not in text]


def test_figures_are_up_to_date() -> None:
    assert (ROOT / "docs" / "gains.svg").read_text(encoding="utf-8") == load_script("draw_results").draw()
    assert (ROOT / "docs" / "explanation" / "step.svg").read_text(encoding="utf-8") == load_script("draw_step").draw()


@pytest.mark.parametrize("name", ["bccd", "raccoon"])
def test_public_data_is_converted(name: str, tmp_path: Path) -> None:
    """A small copy of the original repository becomes a data set in YOLO format, from a folder and from a zip file."""
    script = load_script("get_data")
    source = fake_source(name, tmp_path / "source")
    archive = zipped(source, tmp_path / "source.zip")
    for out, place in ((tmp_path / "a", source), (tmp_path / "b", archive)):
        assert script.main([name, str(out), "--source", str(place)]) == 0
        splits = script.SOURCES[name].splits
        assert sorted(p.name for p in (out / "images").iterdir()) == sorted(splits)
        label = next((out / "labels" / "val").iterdir()).read_text().splitlines()
        # the second box is cut off at the border, the third has no area
        assert label == [
            "0 0.300000 0.300000 0.400000 0.400000",
            f"{int(name == 'bccd')} 0.875000 0.833333 0.250000 0.333333",
        ]
    assert (tmp_path / "a" / "data.yaml").read_text() == (tmp_path / "b" / "data.yaml").read_text()


def test_data_of_another_layout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("get_data")
    (tmp_path / "empty").mkdir()
    assert script.main(["bccd", str(tmp_path / "out"), "--source", str(tmp_path / "empty")]) == 2
    assert "has no BCCD/Annotations" in capsys.readouterr().err
    source = fake_source("raccoon", tmp_path / "source")
    next((source / "annotations").iterdir()).write_text(
        "<annotation><size><width>8</width><height>8</height></size><object><name>cat</name></object></annotation>"
    )
    assert script.main(["raccoon", str(tmp_path / "out"), "--source", str(source)]) == 2
    assert "names class 'cat'; known classes: raccoon" in capsys.readouterr().err


@pytest.mark.e2e
def test_the_site_builds(tmp_path: Path) -> None:
    """Strictly, and without anything that a browser would fetch from elsewhere."""
    pytest.importorskip("material")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tmp_path / "site" / "results.html").read_text(encoding="utf-8")
    assert "+2.4 to +12.8" in page
    fetched = re.compile(
        r"<(?:script|link|img)[^>]*(?:src|href)=\"https?://(?!docs\.ultralytics)[^\"]+\.(?:js|css|woff2?)"
    )
    for file in (tmp_path / "site").rglob("*.html"):
        assert not fetched.search(file.read_text(encoding="utf-8")), file
