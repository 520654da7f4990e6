"""JSON Schemas for editors accept what ships and refuse what is misspelt; the files in the package are up to date."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT
from yolo_kd.cli import main
from yolo_kd.config import json_schemas
from yolo_kd.config.json_schemas import SCHEMAS
from yolo_kd.config.recipe import load_recipe, shipped_recipes
from yolo_kd.config.terms import TermKeys, constructor
from yolo_kd.losses.base import registered

FILES = Path(json_schemas.__file__).parent / "schemas"
EXPERIMENTS = sorted((ROOT / "cfg" / "experiments").glob("*.yaml"))


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    return {name: jsonschema.Draft202012Validator(make()) for name, make in SCHEMAS.items()}


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_file_in_the_package_is_what_the_models_say(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", name]) == 0
    assert (FILES / f"{name}.json").read_text(encoding="utf-8") == capsys.readouterr().out, "run: make schemas"


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name]())


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_valid(name: str, validators: dict[str, Any]) -> None:
    validators["recipe"].validate(yaml.safe_load(shipped_recipes()[name].read_text(encoding="utf-8")))
    validators["recipe"].validate(load_recipe(name).to_dict())


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda path: path.stem)
def test_shipped_experiments_are_valid(file: Path, validators: dict[str, Any]) -> None:
    validators["experiment"].validate(yaml.safe_load(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    ("schema", "text", "key"),
    [
        ("recipe", "loses: {objectness: }", "loses"),
        ("recipe", "losses: {objectnes: }", "objectnes"),
        ("recipe", "losses: {objectness: {wieght: 1}}", "wieght"),
        ("recipe", "losses: {objectness: {weight: -1}}", "-1"),
        ("recipe", "losses: {objectness: {weight: aut}}", "aut"),
        ("recipe", "losses: {objectness: {lam_cls: -1}}", "-1"),
        ("recipe", "losses: {mgd: {mask: spacial}}", "spacial"),
        ("recipe", "losses: {fgd: {schedule: {kind: cosin}}}", "cosin"),
        ("recipe", "losses: {fgd: {levels: p3}}", "p3"),
        ("recipe", "losses: {fgd: {student_layers: [model.4, model.4]}}", "model.4"),
        ("recipe", "losses: {}", "{}"),
        ("recipe", "plugins: [a/b]\nlosses: {fgd: }", "a/b"),
        ("recipe", "inherit: thin\nlosses: {fgd: }", "thin"),
        ("experiment", "techer: a.pt", "techer"),
        ("experiment", "epoch: 3", "epoch"),
        ("experiment", "epochs: many", "many"),
        ("experiment", "epochs: 0", "0"),
        ("experiment", "mosaic: 1.5", "1.5"),
        ("experiment", "task: segment", "segment"),
        ("experiment", "threads: 0", "0"),
        ("experiment", "unlabeled: 3", "3"),
        ("experiment", "class_map: {}", "{}"),
        ("experiment", "kd: {losses: {fgd: {alpah: 1}}}", "alpah"),
        ("experiment", "kd.fgd.alpah: 1", "alpah"),
        ("experiment", "kd.fgd.schedule.kind: cosin", "cosin"),
        ("experiment", "model: a.pt", "model"),
    ],
)
def test_mistakes_are_found(schema: str, text: str, key: str, validators: dict[str, Any]) -> None:
    found = [*validators[schema].iter_errors(yaml.safe_load(text))]
    assert any(key in str(error.message) or key in str(error.instance) for error in found), found


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("recipe", "losses: {fgd: {weight: auto, ratio: 0.5, levels: [p3]}}"),
        ("recipe", "plugins: [my.loss]\nlosses: {mine: {alpha: 1}, fgd: }"),
        ("experiment", "kd.fgd.weight: auto\nkd.fgd.schedule.stop: close_mosaic\nkd.mine.alpha: 1"),
        ("experiment", "kd: {losses: {fgd: {alpha: 1}}}\nunlabeled: [a, b]\nclass_map: {car: 0}\ntime: null"),
        ("experiment", "kd: none\nclass_map: index\nfraction: [1.0, 0.2]\ncache: ram\nimgsz: [320, 640]\nscale: 0.5"),
    ],
)
def test_what_is_allowed_is_valid(schema: str, text: str, validators: dict[str, Any]) -> None:
    validators[schema].validate(yaml.safe_load(text))


def test_every_key_of_every_loss_is_described_with_its_default() -> None:
    definitions = SCHEMAS["recipe"]()["$defs"]
    for name, loss in registered().items():
        entries = definitions[f"loss_{name}"]["properties"]
        assert [*entries] == [*TermKeys.model_fields, *constructor(loss)]
        for key, parameter in constructor(loss).items():
            default = parameter.default
            assert entries[key]["description"], (name, key)
            assert entries[key]["default"] == (list(default) if isinstance(default, tuple) else default), (name, key)
    assert all(definitions[f"every_{key}"]["description"] for key in TermKeys.model_fields)


@pytest.mark.slow
def test_another_program_reads_the_files(tmp_path: Path) -> None:
    """check-jsonschema reads YAML and schema as the language server of an editor does."""
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("losses:\n  fgd: {weight: auto}\n")
    bad.write_text("losses:\n  fgd: {wieght: auto}\n")

    def check(*files: Path, schema: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "check_jsonschema", "--schemafile", str(FILES / f"{schema}.json")]
        return subprocess.run([*command, *map(str, files)], capture_output=True, text=True, check=False)

    assert check(good, *shipped_recipes().values(), schema="recipe").returncode == 0
    assert check(*EXPERIMENTS, schema="experiment").returncode == 0
    refused = check(bad, schema="recipe")
    assert refused.returncode == 1
    assert "wieght" in refused.stdout
