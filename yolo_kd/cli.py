"""The command `yolo-kd`: verbs with `key=value` arguments, as in Ultralytics."""

from __future__ import annotations

import inspect
import json
import re
import shutil
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from yolo_kd._version import __version__
from yolo_kd.engine.signals import Interrupted, Terminated
from yolo_kd.errors import ConfigError, YoloKDError, did_you_mean, listed

if TYPE_CHECKING:
    from yolo_kd.config.reference import Key
    from yolo_kd.losses.base import Loss


@dataclass(frozen=True)
class Verb:
    """A verb of the command line.

    Attributes:
        run: Does it, given the words after it; returns the exit code.
        usage: Example command lines, without the program's name.
        summary: What it does.
        keys: Returns its keys in groups by a heading, for its help.
    """

    run: Callable[[list[str]], int]
    usage: tuple[str, ...]
    summary: str
    keys: Callable[[], dict[str, list[Key]]] = dict


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code: 0 done, 1 the result is wrong, 2 the command is wrong, 130 and 143 stopped by SIGINT and SIGTERM.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [a for a in arguments if a != "--debug"]
    try:
        return _dispatch(arguments)
    except YoloKDError as error:
        if debug:
            raise
        for line in str(error).splitlines():
            # a name out of a stranger's file could hold commands for the terminal
            print("error:", "".join(c if c.isprintable() else "?" for c in line), file=sys.stderr)
        return error.exit_code
    except (Interrupted, Terminated) as stop:  # a training, which has said where it stopped and how to go on
        if debug:
            raise
        return stop.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    verb, rest = (arguments[0].lstrip("-"), arguments[1:]) if arguments else ("help", [])
    verbs = _verbs()
    if verb not in verbs:
        hint = did_you_mean(verb, verbs)
        if "=" in verb:
            hint = f" A verb comes first, such as: yolo-kd train {' '.join(arguments)}"
        raise ConfigError(f"unknown verb '{verb}'.{hint} Verbs: {listed(sorted(verbs))}.")
    if "--help" in rest or "-h" in rest:
        return _help_of(verb, verbs[verb])
    return verbs[verb].run(rest)


def _verbs() -> dict[str, Verb]:
    """Return the verbs; their keys are made from the models when help is asked for."""
    return {
        "train": Verb(
            _train,
            (
                "train teacher=yolov8s.pt student=yolov8n.pt data=coco8.yaml kd=objectness [any training key]",
                "train cfg=cfg/experiments/bccd.yaml",
                "train kd=none student=yolov8n.pt data=coco8.yaml",
                "train resume=runs/detect/train/weights/last.pt",
            ),
            "train a student under a teacher, or with kd=none alone",
            _train_keys,
        ),
        "check": Verb(
            _check,
            ("check teacher=yolov8s.pt student=yolov8n.pt data=coco8.yaml [--json]",),
            "will this training work? trains nothing, writes nothing",
            _train_keys,
        ),
        "compare": Verb(
            _compare,
            ("compare cfg=cfg/experiments/bccd.yaml arms=baseline,objectness seeds=3 [jobs=1]",),
            "did it help? paired trainings, a verdict, one page",
            _compare_keys,
        ),
        "export": Verb(
            _export,
            ("export model=runs/detect/train/weights/best.pt format=onnx [any export key]",),
            "write a file for deployment and compare it with its checkpoint",
            _export_keys,
        ),
        "losses": Verb(_losses, ("losses [name]",), "list the losses, or the keys of one"),
        "recipes": Verb(_recipes, ("recipes [name]",), "list the recipes that ship with the package, or print one"),
        "schema": Verb(
            _schema,
            ("schema recipe > recipe.schema.json", "schema experiment > experiment.schema.json"),
            "print the JSON Schema with which an editor completes and checks such a file",
        ),
        "version": Verb(_version, ("version",), "print the versions of yolo-kd, Ultralytics and torch"),
        "help": Verb(_help, ("help",), "print this text; yolo-kd <verb> --help has the keys of a verb"),
    }


def _train(arguments: list[str]) -> int:
    from yolo_kd.config.train_options import parse_train

    options = parse_train(arguments)  # all mistakes of the command line at once, before anything heavy is imported
    from ultralytics.utils import LOGGER

    from yolo_kd.engine.trainer import DistillationTrainer

    trainer = DistillationTrainer(overrides={"kd": options})
    trainer.train()
    if trainer.best.exists():
        LOGGER.info(f"Export it with: yolo-kd export model={trainer.best} format=onnx")
    return 0


def _check(arguments: list[str]) -> int:
    from yolo_kd.config.command_line import parse_assignments
    from yolo_kd.config.train_options import parse_train

    words = ["json=true" if a == "--json" else a for a in arguments]
    as_json = parse_assignments([w for w in words if w.startswith("json=")]).get("json", False)
    if not isinstance(as_json, bool):
        raise ConfigError(f"json must be true or false, received {as_json!r}.")
    options = parse_train([w for w in words if not w.startswith("json=")])
    from yolo_kd.check import check

    report = check(options)
    print(json.dumps(report.to_dict(), indent=1, ensure_ascii=False) if as_json else report.to_text())
    return 1 if report.verdict == "will not work" else 0


def _compare(arguments: list[str]) -> int:
    from yolo_kd.compare.pipeline import compare

    return compare(arguments)


def _export(arguments: list[str]) -> int:
    from yolo_kd.config.command_line import parse_assignments

    options = parse_assignments(arguments)
    if not options.get("model"):
        raise ConfigError("no model: add model=<checkpoint>, such as model=runs/detect/train/weights/best.pt.")
    from yolo_kd.export.export import export_model

    export_model(options.pop("model"), **options)
    return 0


def _train_keys() -> dict[str, list[Key]]:
    from yolo_kd.config.reference import train_keys

    return train_keys()


def _export_keys() -> dict[str, list[Key]]:
    from yolo_kd.config.reference import argument_keys
    from yolo_kd.export.export import export_model

    return {"Keys besides Ultralytics' export keys": argument_keys(export_model)}


def _compare_keys() -> dict[str, list[Key]]:
    from yolo_kd.compare.arms import COMPARE_KEYS
    from yolo_kd.config.reference import Key, train_keys

    return {"Comparison": [Key(name, "", "", meaning) for name, meaning in COMPARE_KEYS.items()], **train_keys()}


def _losses(arguments: list[str]) -> int:
    import yolo_kd.losses  # noqa: F401  (registers them)
    from yolo_kd.losses.base import find, registered
    from yolo_kd.losses.costs import format_cost, measured_costs

    _at_most_one(arguments, "losses")
    if arguments:
        return _loss(find(arguments[0]))
    setting, costs = measured_costs()
    rows = [("name", "reads", "trains", "boxes", "heads", "cost", "columns", "paper")]
    for name, loss in registered().items():
        reads = [*sorted(loss.reads), *(["head layers"] if loss.head_split else [])]
        boxes = "yes" if loss.reads & {"targets", "assignment"} else "no"
        heads = "equal bins" if loss.needs_bins else "all"
        rows.append(
            (
                name,
                ", ".join(reads),
                _modules(loss),
                boxes,
                heads,
                format_cost(costs.get(name)),
                " ".join(loss.columns),
                loss.paper,
            )
        )
    _print_table(rows)
    print(
        "\ntrains: modules in addition to the student's; cost: time added to a step of student and teacher, "
        f"measured with {setting}"
    )
    return 0


def _modules(loss: type[Loss]) -> str:
    """Return what a loss trains besides the student: the adapter that it shares, modules of its own, or nothing."""
    from yolo_kd.structures import PairSpec

    inside = {f"{branch}{i}": 64 for branch in ("cls", "box") for i in range(3)}
    wider = {name: 128 for name in inside}
    made = loss()
    made.build(PairSpec((64, 128, 256), (128, 256, 512), (8, 16, 32), 80, 16, 16, inside, wider))
    own = ["own"] if any(True for _ in made.parameters()) else []
    return " + ".join([*([loss.adapter] if loss.adapter else []), *own]) or "-"


def _loss(loss: type[Loss]) -> int:
    """Print the keys of one loss."""
    from yolo_kd.config.reference import loss_keys, recipe_keys

    text = (inspect.getdoc(loss) or "").partition("\nArgs:\n")[0].rstrip()
    print(f"{loss.name}: {loss.paper}\n\n{text}\n")
    _print_keys({"Keys": loss_keys(loss), **{k: keys for k, keys in recipe_keys().items() if k != "Recipe"}})
    return 0


def _recipes(arguments: list[str]) -> int:
    from yolo_kd.config.recipe import describe, shipped_recipes

    _at_most_one(arguments, "recipes")
    recipes = shipped_recipes()
    if arguments:
        name = arguments[0]
        if name not in recipes:
            raise ConfigError(
                f"unknown recipe '{name}'.{did_you_mean(name, recipes)} Recipes: {listed(sorted(recipes))}."
            )
        print(recipes[name].read_text(encoding="utf-8"), end="")
        return 0
    _print_table(
        [("recipe", "what it distils")] + [(n, re.split(r"(?<=\.)\s", describe(p))[0]) for n, p in recipes.items()]
    )
    return 0


def _version(_arguments: list[str]) -> int:
    import torch
    from ultralytics import __version__ as ultralytics_version

    print(f"yolo-kd {__version__}, ultralytics {ultralytics_version}, torch {torch.__version__}")
    return 0


def _schema(arguments: list[str]) -> int:
    from yolo_kd.config.json_schemas import SCHEMAS

    if len(arguments) != 1 or arguments[0] not in SCHEMAS:
        raise ConfigError(f"write yolo-kd schema {listed(list(SCHEMAS))}, received {' '.join(arguments) or 'nothing'}.")
    schema = SCHEMAS[arguments[0]]()
    if arguments[0] == "experiment":  # which may be that of a comparison
        from yolo_kd.compare.arms import COMPARE_KEYS

        schema["properties"] |= {key: {"description": meaning} for key, meaning in COMPARE_KEYS.items()}
    print(json.dumps(schema, indent=1, ensure_ascii=False))
    return 0


def help_text() -> str:
    """Return what `yolo-kd help` prints."""
    verbs = _verbs()
    lines = [f"yolo-kd {__version__}: knowledge distillation for Ultralytics YOLO detectors", ""]
    lines += [f"  {name:<8}  {verb.summary}" for name, verb in verbs.items()]
    lines += ["", "For example:", "", *(f"  yolo-kd {verb.usage[0]}" for verb in verbs.values())]
    lines += ["", "yolo-kd <verb> --help explains its keys. --debug shows the traceback of an error."]
    return "\n".join(lines)


def _help(_arguments: list[str]) -> int:
    print(help_text())
    return 0


def _help_of(name: str, verb: Verb) -> int:
    print(f"yolo-kd {name}: {verb.summary}\n")
    for line in verb.usage:
        print(f"  yolo-kd {line}")
    if groups := verb.keys():
        print()
        _print_keys(groups)
        print("\nAll other keys are Ultralytics': docs.ultralytics.com/usage/cfg")
    return 0


def _print_keys(groups: Mapping[str, Sequence[Key]]) -> None:
    indent = " " * 26
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    for number, (heading, keys) in enumerate(groups.items()):
        print(f"{chr(10) * bool(number)}{heading}:")
        for key in keys:
            text = key.meaning + (f" (default {key.default})" if key.default else "")
            print(textwrap.fill(text, width, initial_indent=f"  {f'{key.name}=':<24}", subsequent_indent=indent))
            if key.allowed:
                print(textwrap.fill(key.allowed, width, initial_indent=indent, subsequent_indent=indent))


def _at_most_one(arguments: Sequence[str], verb: str) -> None:
    if len(arguments) > 1:
        raise ConfigError(f"yolo-kd {verb} takes at most one name, received {' '.join(arguments)}.")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
