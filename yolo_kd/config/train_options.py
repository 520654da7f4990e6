"""Options of a training: `key=value` words, experiment files and Python mappings, checked before any work starts."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from yolo_kd.config.class_options import CLASS_KEYS, read_choice
from yolo_kd.config.command_line import NO_RECIPE, assignments
from yolo_kd.config.plugins import read_plugins, split_names
from yolo_kd.config.recipe import inherit_mistake, read_recipe
from yolo_kd.config.source import Item, problem, raise_if, read_yaml, shown, wrap
from yolo_kd.config.speed import SPEED_KEYS, mistake
from yolo_kd.config.ultralytics_keys import wrong_value
from yolo_kd.config.unlabeled import SOURCE_KEY, UNLABELED_KEYS, UnlabeledOptions, mistakes
from yolo_kd.errors import did_you_mean

DEFAULT_RECIPE = "default"
KEEPING_RECIPE = "objectness"  # the default with keep_classes, where terms on features would have nothing to train

OWN_KEYS: dict[str, str] = {
    "teacher": "checkpoint of the large model that is imitated",
    "student": "checkpoint or YAML file of the small model that is trained",
    "kd": f"what to distil: a recipe's name, its file, or '{NO_RECIPE}' for the student alone ('{DEFAULT_RECIPE}')",
    "kd.<loss>.<key>": "one value of the recipe, e.g. kd.objectness.weight=0.5",
    "plugins": "modules to import for losses of your own, e.g. plugins=[my_package.my_loss]; importing runs their code",
    "cfg": "experiment file: a YAML file of these same keys; the command line wins over it",
    "trust_checkpoints": "load checkpoints that hold more than tensors and known classes, which can run code (false)",
    "inherit": "start from the teacher: thinned (all of it), true (what fits of neck and head), false; else as kd says",
    "random_teacher": "allow a teacher that was never trained, to try things out (false)",
    **CLASS_KEYS,
    **SPEED_KEYS,
    **UNLABELED_KEYS,
}

_SWITCHES = ("trust_checkpoints", "random_teacher")
_PATHS = ("teacher", "student", "data")
# Ultralytics takes these two from Python although its list of keys lacks them
_PYTHON_KEYS = ("augmentations", "save_dir")
_REPLACED = {
    "model": "write student= for the model that is trained.",
    "distill_model": "write teacher= with kd=ultralytics, which is the same loss.",
    "dis": "write kd=ultralytics kd.ultralytics.dis=... (with teacher=), which is the same gain.",
}
_FIXED = {"task": "detect", "mode": "train"}
_FOLDERS = ("project", "name", "save_dir")  # they say where files are written


@dataclass(frozen=True)
class TrainOptions:
    """What a training was asked to do.

    Attributes:
        teacher: Checkpoint of the teacher, None for none, or on resume for the one that the run was started with.
        student: Checkpoint or YAML file of the student, None on resume.
        kd: Name or path of a recipe, a mapping as a recipe file holds, `none` for the student alone, None on resume.
        kd_overrides: Values that replace what the recipe says, by `loss.key`.
        plugins: Modules that were imported for their losses, besides those that the recipe names.
        resume: Checkpoint of the run to continue.
        trust_checkpoints: Load checkpoints that can run code.
        random_teacher: Allow a teacher that was never trained.
        inherit: What the student starts from, see `Recipe`; None for what the recipe says.
        speed: Keys of `yolo_kd.config.speed` that were given.
        classes: Keys of `yolo_kd.classes.mapping` that were given.
        pool: Keys of `yolo_kd.config.unlabeled` that were given.
        ultralytics: Every other key, as Ultralytics takes it. Never holds model, task, mode, resume or cfg.
    """

    teacher: str | None = None
    student: str | None = None
    kd: str | Mapping[str, Any] | None = None
    kd_overrides: dict[str, Any] = field(default_factory=dict)
    plugins: tuple[str, ...] = ()
    resume: str | None = None
    trust_checkpoints: bool = False
    random_teacher: bool = False
    inherit: bool | str | None = None
    speed: dict[str, Any] = field(default_factory=dict)
    classes: dict[str, Any] = field(default_factory=dict)
    pool: dict[str, Any] = field(default_factory=dict)
    ultralytics: dict[str, Any] = field(default_factory=dict)

    @property
    def pooled(self) -> bool:
        """Whether there are unlabelled images to train on."""
        return UnlabeledOptions.of(self.pool) is not None

    @property
    def own_keys(self) -> dict[str, Any]:
        """This package's keys that were given, as a training takes them, all but the student."""
        keys = {
            "teacher": self.teacher,
            "kd": self.kd,
            "plugins": list(self.plugins) or None,
            "inherit": self.inherit,
            **{key: getattr(self, key) or None for key in _SWITCHES},
        }
        changes = {f"kd.{key}": value for key, value in self.kd_overrides.items()}
        return {k: v for k, v in keys.items() if v is not None} | self.speed | self.classes | self.pool | changes


def parse_train(arguments: Sequence[str]) -> TrainOptions:
    """Return the options that a command line asks for; `cfg=` reads an experiment file, over which its words win.

    Raises:
        ConfigError: With one line for every mistake on the command line, in the experiment file and in the recipe.
    """
    problems: list[str] = []
    return _resolve(_items(arguments, problems), problems)


def read_items(arguments: Sequence[str], problems: list[str]) -> dict[str, Item]:
    """Return the keys of a command line and of the experiment file that it names, each with its place, unchecked.

    This is the first half of `parse_train`, for a verb with keys of its own; `resolve_items` is the second.

    Args:
        arguments: `key=value` words.
        problems: Receives mistakes of form.
    """
    return _with_experiment(_items(arguments, problems), problems)[0]


def resolve_items(items: Mapping[str, Item]) -> TrainOptions:
    """Return the options that such keys ask for.

    Raises:
        ConfigError: With one line for every mistake.
    """
    return _resolve(dict(items), [])


def _items(arguments: Sequence[str], problems: list[str]) -> dict[str, Item]:
    items = {}
    for key, value in assignments(arguments, problems).items():
        override = key.startswith("kd.") and key not in SPEED_KEYS
        items[key] = wrap(value, f"{key} on the command line", problems) if override else Item(value)
    return items


def default_recipe(keeps_classes: bool) -> str:
    """Return what is distilled where nobody says it; a student that keeps classes is trained behind its features."""
    return KEEPING_RECIPE if keeps_classes else DEFAULT_RECIPE


def train_options(mapping: Mapping[str, Any]) -> TrainOptions:
    """Return the options of a mapping of the same keys; None stands for a key of ours that was not given.

    Raises:
        ConfigError: With one line for every mistake.
    """
    problems: list[str] = []
    items = {}
    for key, value in mapping.items():
        if not isinstance(key, str):
            problems.append(f"keys must be text, received {shown(key)}.")
        elif key == "kd" or (key.startswith("kd.") and key not in SPEED_KEYS):
            items[key] = wrap(value, key if isinstance(value, Mapping) or key != "kd" else "", problems)
        else:
            items[key] = Item(value)  # Ultralytics' values are handed on as they are
    return _resolve(items, problems)


def _resolve(items: dict[str, Item], problems: list[str]) -> TrainOptions:
    """Add what the experiment file says and check everything together."""
    items, complete = _with_experiment(items, problems)
    if "kd" in items and str(items["kd"].value).lower() == NO_RECIPE and items["kd"].value is not None:
        items["kd"] = Item(NO_RECIPE, items["kd"].where)
    overrides, ultralytics = _sort_out(items, problems)
    resume = _resume(items.get("resume"), problems)
    resuming = _given(items, "resume") and items["resume"].value is not False
    paths = {key: _path(key, items.get(key), problems) for key in _PATHS}
    switches = {key: _switch(key, items.get(key), problems) for key in _SWITCHES}
    inherit = items["inherit"] if _given(items, "inherit") else Item(None)
    if sentence := inherit_mistake(inherit.value):
        problems.append(problem(inherit.where, sentence))
    speed = {key: items[key] for key in SPEED_KEYS if _given(items, key)}
    problems += [problem(item.where, text) for key, item in speed.items() if (text := mistake(key, item.value))]
    classes = {key: items[key] for key in CLASS_KEYS if _given(items, key)}
    choice = read_choice(
        {key: item.plain() for key, item in classes.items()},
        problems,
        {key: item.where for key, item in classes.items()},
    ).to_keys()
    pool = {key: items[key].plain() for key in UNLABELED_KEYS if _given(items, key)}
    if str(pool.get(SOURCE_KEY, "")).startswith("["):  # a list on the command line; a path may hold commas
        pool[SOURCE_KEY] = [name.strip("'\"") for name in split_names(pool[SOURCE_KEY])]
    if not resuming:
        where = items[next(iter(pool))].where if pool else ""
        problems += [problem(where, text) for text in mistakes(pool)]
    kd = items.get("kd")
    if _given(items, "kd") and resuming:
        kd = items["kd"] if items["kd"].value == NO_RECIPE else None
    elif not _given(items, "kd"):
        default = Item(default_recipe(bool(choice.get("keep_classes"))))
        kd = default if _given(items, "teacher") and not resuming else None
    plugins = items.get("plugins")
    if plugins is not None:
        plugins = wrap(split_names(plugins.plain()), plugins.where or "plugins", problems)
    modules = read_plugins(plugins, problems)
    if complete:  # otherwise what is missing may stand in the file
        _check_together(items, overrides, resuming, problems)
    if kd is not None and kd.value != NO_RECIPE:
        read_recipe(kd, overrides, problems)
    if paths["data"] is not None:
        ultralytics["data"] = paths["data"]
    raise_if(problems)
    source = None if kd is None else os.fspath(kd.value) if isinstance(kd.value, os.PathLike) else kd.plain()
    if source is None and not resuming:
        source = NO_RECIPE
    return TrainOptions(
        teacher=paths["teacher"],
        student=paths["student"],
        kd=source,
        kd_overrides={key: item.plain() for key, item in overrides.items()},
        plugins=modules,
        resume=resume,
        inherit=inherit.value,
        speed={key: item.value for key, item in speed.items()},
        classes=choice,
        pool=pool,
        ultralytics=ultralytics,
        **switches,
    )


def _with_experiment(items: dict[str, Item], problems: list[str]) -> tuple[dict[str, Item], bool]:
    """Put the keys of the experiment file under those that were given beside it; False if it could not be read."""
    cfg = items.get("cfg")
    own = {key: item for key, item in items.items() if key != "cfg"}
    if cfg is None or cfg.value is None:
        return own, True
    if not isinstance(cfg.value, str | os.PathLike) or not os.fspath(cfg.value):
        sentence = f"cfg must be the path of an experiment file, received {shown(cfg)}."
        problems.append(problem(cfg.where, sentence))
        return own, False
    root = read_yaml(cfg.value, problems)
    if root is None:
        return own, False
    if not isinstance(root.value, dict):
        received = "the experiment file is empty" if root.value is None else f"received {shown(root)}"
        problems.append(problem(root.where, f"an experiment must be a mapping of keys to values; {received}."))
        return own, False
    entries = dict(root.value)
    if "cfg" in entries:
        sentence = "an experiment file cannot name another one with cfg; write its keys here."
        problems.append(problem(entries.pop("cfg").where, sentence))
    kd = entries.get("kd")
    if kd is not None and kd.value is None:
        sentence = f"kd is empty. Write kd: {NO_RECIPE} for the student alone, or leave the line out."
        problems.append(problem(entries.pop("kd").where, sentence))
    _check_file_keys(entries, own, problems)
    # as Ultralytics reads its files: None is what it writes for null
    entries = {k: Item(None, v.where) if v.value == "None" and k != "kd" else v for k, v in entries.items()}
    return {**entries, **own}, True


def _check_file_keys(entries: dict[str, Item], own: Mapping[str, Item], problems: list[str]) -> None:
    """Refuse in an experiment file, which may come from somebody else, what only the user may decide."""
    trust = entries.get("trust_checkpoints")
    if trust is not None and trust.value is True and "trust_checkpoints" not in own:
        sentence = (
            "an experiment file cannot trust checkpoints for you. Write trust_checkpoints=true on the command line."
        )
        problems.append(problem(entries.pop("trust_checkpoints").where, sentence))
    here = os.path.realpath(os.curdir)
    for key in _FOLDERS:
        if key not in entries or key in own or not isinstance(text := entries[key].value, str):
            continue
        # a relative one lies below Ultralytics' folder for runs, unless it climbs out of it
        climbs = ".." in text.replace("\\", "/").split("/")
        real = os.path.realpath(text)
        inside = (
            os.path.commonpath([here, real]) == here
            if os.path.splitdrive(here)[0] == os.path.splitdrive(real)[0]
            else False
        )
        if climbs or not inside:
            sentence = (
                f"{key} {shown(text)} leads out of the current folder, which an experiment file cannot. Write "
                f"{key}={text} on the command line if that is what you want."
            )
            problems.append(problem(entries.pop(key).where, sentence))


def _sort_out(items: dict[str, Item], problems: list[str]) -> tuple[dict[str, Item], dict[str, Any]]:
    """Separate overrides of the recipe and keys of Ultralytics from our own, refusing what is neither."""
    from ultralytics.cfg import check_cfg
    from ultralytics.utils import DEFAULT_CFG_DICT

    allowed = [key for key in (*DEFAULT_CFG_DICT, *OWN_KEYS) if key not in _REPLACED and "<" not in key]
    overrides, ultralytics = {}, {}
    for key, item in items.items():
        if key in OWN_KEYS or key in ("resume", "data"):
            continue
        elif key.startswith("kd."):
            overrides[key.removeprefix("kd.")] = item
        elif key in _REPLACED:
            if item.value is not None:
                problems.append(problem(item.where, f"key '{key}' is not used here: {_REPLACED[key]}"))
        elif key in _FIXED:
            if item.value not in (None, _FIXED[key]):
                sentence = (
                    f"{key}={item.value} is not possible: this program does {key}={_FIXED[key]} only. Leave it out."
                )
                problems.append(problem(item.where, sentence))
        elif key in DEFAULT_CFG_DICT or key in _PYTHON_KEYS:
            checked = {key: item.plain()}
            try:
                check_cfg(checked)
            except Exception as error:  # it checks some values with comparisons that raise errors of their own
                sentence = " ".join(str(error).split())
                problems.append(problem(item.where, f"{sentence}." if sentence[-1:].isalnum() else sentence))
            else:
                if (wrong := wrong_value(key, checked[key])) is not None:
                    problems.append(problem(item.where, wrong))
            ultralytics[key] = checked[key]
        else:
            close = did_you_mean(key[:60], allowed)
            hint = close or " See 'yolo-kd help' for ours and docs.ultralytics.com/usage/cfg for the others."
            problems.append(problem(item.where, f"unknown key '{key}'.{hint}"))
    return overrides, ultralytics


def _check_together(
    items: Mapping[str, Item], overrides: Mapping[str, Item], resuming: bool, problems: list[str]
) -> None:
    """Report keys that contradict or need each other."""
    if resuming:
        for key in ("student", "kd", *UNLABELED_KEYS):
            if _given(items, key) and items[key].value != NO_RECIPE:  # kd=none: the run that goes on has no teacher
                sentence = f"{key} cannot be given with resume: the checkpoint knows it. Leave out {key}."
                problems.append(problem(items[key].where, sentence))
        for key in CLASS_KEYS:
            if _given(items, key):
                sentence = f"{key} cannot be given with resume: the checkpoint knows the classes. Leave out {key}."
                problems.append(problem(items[key].where, sentence))
        for key, item in overrides.items():
            sentence = f"kd.{key} cannot be given with resume: the checkpoint knows the recipe. Leave it out."
            problems.append(problem("" if item.where.startswith("kd.") else item.where, sentence))
        return
    for key, example in (("student", "yolov8n.pt"), ("data", "coco8.yaml")):
        if not _given(items, key):
            problems.append(f"{key} is missing. Add {key}={example}, or resume=<last.pt> to continue a run.")
    teacher, kd = items.get("teacher"), items.get("kd")
    alone = _given(items, "kd") and kd is not None and kd.value == NO_RECIPE
    if _given(items, "teacher") and teacher is not None and alone:
        sentence = f"kd={NO_RECIPE} trains the student alone, but teacher={teacher.value} is given"
        place = f" ({teacher.where})" if teacher.where else ""
        problems.append(problem(kd.where if kd else "", f"{sentence}{place}. Leave one out, or write teacher=none."))
    elif not _given(items, "teacher") and _given(items, "kd") and not alone:
        problems.append(
            problem(
                kd.where if kd and not isinstance(kd.value, dict) else "",
                f"kd is given but no teacher. Add teacher=<model.pt>, or write kd={NO_RECIPE} for the student alone.",
            )
        )
    if not _given(items, "teacher") and (about := [key for key in CLASS_KEYS if _given(items, key)]):
        sentence = (
            f"{about[0]} is about a teacher's classes, but none is given. Add teacher=<model.pt>, or leave it out."
        )
        problems.append(problem(items[about[0]].where, sentence))
    if alone and _given(items, SOURCE_KEY) and not (_given(items, "teacher")):
        sentence = f"{SOURCE_KEY} needs a teacher that says what is on the images, but kd={NO_RECIPE} has none"
        fix = f"Add teacher=<model.pt> and a recipe, or leave out {SOURCE_KEY}."
        problems.append(problem(items[SOURCE_KEY].where, f"{sentence}. {fix}"))
    if overrides and not alone and not _given(items, "teacher") and not _given(items, "kd"):
        sentence = f"kd.{next(iter(overrides))} is given but no teacher. Add teacher=<model.pt>, or leave it out."
        problems.append(sentence)
    elif overrides and alone:
        problems.append(f"kd.{next(iter(overrides))} is given, but kd={NO_RECIPE} distils nothing. Leave one out.")


def _given(items: Mapping[str, Item], key: str) -> bool:
    return key in items and items[key].value is not None


def _path(key: str, item: Item | None, problems: list[str]) -> str | None:
    if item is None or item.value is None:
        return None
    if isinstance(item.value, str | os.PathLike):
        text = os.fspath(item.value)
        if isinstance(text, str) and text.strip():
            return text
    problems.append(problem(item.where, f"{key} must be the path of a file, received {shown(item)}."))
    return None


def _switch(key: str, item: Item | None, problems: list[str]) -> bool:
    if item is None or item.value is None:
        return False
    if isinstance(item.value, bool):
        return item.value
    problems.append(problem(item.where, f"{key} must be true or false, received {shown(item)}."))
    return False


def _resume(item: Item | None, problems: list[str]) -> str | None:
    if item is None or item.value is None or item.value is False:
        return None
    if item.value is True:
        # the newest run of the machine, which is what Ultralytics would take, may be anybody's
        sentence = "name the checkpoint to continue: resume=runs/detect/train/weights/last.pt."
        problems.append(problem(item.where, sentence))
        return None
    return _path("resume", item, problems)
