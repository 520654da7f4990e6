"""The command `yolo-kd`: verbs with `key=value` arguments, as in Ultralytics."""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from yolo_kd._version import __version__
from yolo_kd.engine.signals import Interrupted, Terminated
from yolo_kd.errors import ConfigError, YoloKDError, did_you_mean, listed

if TYPE_CHECKING:
    from yolo_kd.losses.base import Loss

HELP = f"""yolo-kd {__version__}: knowledge distillation for Ultralytics YOLO detectors

  yolo-kd train   teacher=yolov8s.pt student=yolov8n.pt data=coco8.yaml kd=objectness [any Ultralytics training key]
  yolo-kd train   cfg=cfg/experiments/bccd.yaml                  keys of the command line win over the file's
  yolo-kd train   kd=none student=yolov8n.pt data=coco8.yaml     the student alone: the baseline, or a teacher
  yolo-kd train   resume=runs/detect/train/weights/last.pt
  yolo-kd check   the same keys as train: will this pair work? Trains nothing, writes nothing; --json for programs
  yolo-kd compare cfg=... arms=baseline,objectness seeds=3 [jobs=1]   did it help? paired runs, verdict, one page
  yolo-kd export  model=runs/detect/train/weights/best.pt format=onnx [any Ultralytics export key]
  yolo-kd losses  [name]      the losses there are, or the parameters of one
  yolo-kd recipes [name]      the recipes that ship with this package, or one of them in full
  yolo-kd version
  yolo-kd help

Keys of train besides Ultralytics' own:
  teacher=                 checkpoint of the large, trained detector
  student=                 checkpoint or model YAML of the small one
  kd=                      recipe: a name (yolo-kd recipes) or a YAML file; none for the student alone
  kd.<loss>.<key>=         changes the recipe, such as kd.objectness.weight=0.5
  plugins=                 modules with losses of your own to import, as [my_package.my_loss]; importing runs their code
  cfg=                     experiment file: any of these keys in YAML
  inherit=thinned          start as a thinned copy of the teacher; true: what fits of neck and head; false: neither
  trust_checkpoints=true   load files that ask for more than weights; they can run code
  class_map=               which teacher class is which of the student: '{{car: vehicle, truck: vehicle}}', or index
  keep_classes=teacher     keep the teacher's classes beside the data set's; keep_conf= (0.05), keep_blend= (0.65)
  random_teacher=true      allow a model YAML as teacher
  teacher_precision=       auto, fp32, bf16 or fp16
  teacher_channels_last=   auto, true or false; so are teacher_compile= and teacher_stream=
  threads=                 auto or a number, on a CPU
  kd.cache=disk            keep the teacher's outputs, for trainings without random augmentation
  unlabeled=               images without labels: a folder, a glob, a .txt of paths, a data YAML, or a list of those
  unlabeled_ratio=         how many of them in a batch for each labelled image (1)
  unlabeled_mode=          distill (the terms act on them), pseudo (the task loss does, on the teacher's boxes) or both
  unlabeled_conf=          class probability above which such a detection is an object (0.4)
  unlabeled_low=           between this and unlabeled_conf it is neither object nor background (0.1)
  unlabeled_iou=           overlap above which two of them are one (0.7)
  --debug                  show the traceback of an error

Keys of compare besides those of train; project= and name= say where it writes (runs/compare/<cfg's name>):
  arms=                    recipes, baseline (the student alone), distill_model (Ultralytics' own), or a YAML of arms
  seeds=                   trainings per arm, with seeds seed, seed + 1, ... (3)
  jobs=                    trainings at a time (1)
"""

EVERY_LOSS_TAKES = """\
Every loss also takes weight (a number, or auto: the weight follows the gradients), ratio (with weight: auto, the
gradient over the task loss's that it aims at, 0.3), schedule (kind, start, end, warmup, stop), student_layers and
teacher_layers."""


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
    verbs: dict[str, Callable[[list[str]], int]] = {
        "train": _train,
        "check": _check,
        "compare": _compare,
        "export": _export,
        "losses": _losses,
        "recipes": _recipes,
        "version": _version,
        "help": _help,
    }
    if verb not in verbs:
        hint = did_you_mean(verb, verbs)
        if "=" in verb:
            hint = f" A verb comes first, such as: yolo-kd train {' '.join(arguments)}"
        raise ConfigError(f"unknown verb '{verb}'.{hint} Verbs: {listed(sorted(verbs))}.")
    return verbs[verb](rest)


def _train(arguments: list[str]) -> int:
    from yolo_kd.config.train_options import parse_train

    options = parse_train(arguments)  # all mistakes of the command line at once, before anything heavy is imported
    from ultralytics.utils import LOGGER

    from yolo_kd.engine.trainer import DistillationTrainer

    overrides: dict[str, Any] = {**options.ultralytics, "task": "detect", "mode": "train"}
    overrides |= {k: v for k, v in (("model", options.student), ("resume", options.resume)) if v is not None}
    overrides |= options.own_keys
    trainer = DistillationTrainer(overrides=overrides)
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


def _losses(arguments: list[str]) -> int:
    import yolo_kd.losses  # noqa: F401  (registers them)
    from yolo_kd.losses.base import find, registered
    from yolo_kd.losses.costs import format_cost, measured_costs

    _at_most_one(arguments, "losses")
    if arguments:
        loss = find(arguments[0])
        text, meanings = _split_docstring(inspect.getdoc(loss) or "")
        print(f"{loss.name}: {loss.paper}\n\n{text}\n")
        parameters = inspect.signature(loss).parameters.values()
        _print_table(
            [("key", "default", "meaning"), *((p.name, repr(p.default), meanings[p.name]) for p in parameters)]
        )
        print(f"\n{EVERY_LOSS_TAKES}")
        return 0
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


def _split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """Split a Google docstring into what stands before its arguments and the meaning of each argument."""
    before, _, arguments = text.partition("\nArgs:\n")
    meanings: dict[str, str] = {}
    name = ""
    for line in inspect.cleandoc(arguments).splitlines():
        if not line:
            break
        if line[0].isspace():
            meanings[name] += f" {line.strip()}"
        else:
            name, _, meaning = line.partition(": ")
            meanings[name] = meaning
    return before.rstrip(), meanings


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


def _help(_arguments: list[str]) -> int:
    print(HELP, end="")
    return 0


def _at_most_one(arguments: Sequence[str], verb: str) -> None:
    if len(arguments) > 1:
        raise ConfigError(f"yolo-kd {verb} takes at most one name, received {' '.join(arguments)}.")


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
