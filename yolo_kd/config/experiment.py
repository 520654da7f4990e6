"""The keys of a command line and of the experiment file that it names, each with its place, before they are checked."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from yolo_kd.config.command_line import NO_RECIPE, assignments
from yolo_kd.config.source import Item, problem, read_yaml, shown, wrap

_FOLDERS = ("project", "name", "save_dir")  # they say where files are written


def is_override(key: str) -> bool:
    """Return whether a key changes a value of the recipe, such as `kd.objectness.weight`."""
    return key.startswith("kd.")


def read_items(arguments: Sequence[str], problems: list[str]) -> dict[str, Item]:
    """Return the keys of a command line and of the experiment file that it names, each with its place, unchecked.

    Args:
        arguments: `key=value` words.
        problems: Receives mistakes of form.
    """
    return with_experiment(command_line_items(arguments, problems), problems)[0]


def command_line_items(arguments: Sequence[str], problems: list[str]) -> dict[str, Item]:
    """Return the keys of a command line."""
    return {
        key: wrap(value, f"{key} on the command line", problems) if is_override(key) else Item(value)
        for key, value in assignments(arguments, problems).items()
    }


def with_experiment(items: dict[str, Item], problems: list[str]) -> tuple[dict[str, Item], bool]:
    """Put the keys of the experiment file under those that were given with it; False if it could not be read."""
    cfg = items.get("cfg")
    given = {key: item for key, item in items.items() if key != "cfg"}
    if cfg is None or cfg.value is None:
        return given, True
    if not isinstance(cfg.value, str | os.PathLike) or not os.fspath(cfg.value):
        problems.append(problem(cfg.where, f"cfg must be the path of an experiment file, received {shown(cfg)}."))
        return given, False
    root = read_yaml(cfg.value, problems)
    if root is None:
        return given, False
    if not isinstance(root.value, dict):
        received = "the experiment file is empty" if root.value is None else f"received {shown(root)}"
        problems.append(problem(root.where, f"an experiment must be a mapping of keys to values; {received}."))
        return given, False
    entries = dict(root.value)
    if "cfg" in entries:
        sentence = "an experiment file cannot name another one with cfg; write its keys here."
        problems.append(problem(entries.pop("cfg").where, sentence))
    kd = entries.get("kd")
    if kd is not None and kd.value is None:
        sentence = f"kd is empty. Write kd: {NO_RECIPE} for the student alone, or leave the line out."
        problems.append(problem(entries.pop("kd").where, sentence))
    _refuse_decisions_of_the_user(entries, given, problems)
    # as Ultralytics reads its files: None is what it writes for null
    entries = {k: Item(None, v.where) if v.value == "None" and k != "kd" else v for k, v in entries.items()}
    return {**entries, **given}, True


def _refuse_decisions_of_the_user(entries: dict[str, Item], given: Mapping[str, Item], problems: list[str]) -> None:
    """Refuse in an experiment file, which may come from somebody else, what only the user may decide."""
    trust = entries.get("trust_checkpoints")
    if trust is not None and trust.value is True and "trust_checkpoints" not in given:
        sentence = (
            "an experiment file cannot trust checkpoints for you. Write trust_checkpoints=true on the command line."
        )
        problems.append(problem(entries.pop("trust_checkpoints").where, sentence))
    for key in _FOLDERS:
        if key in given or not isinstance(text := entries.get(key, Item(None)).value, str) or _stays_here(text):
            continue
        sentence = (
            f"{key} {shown(text)} leads out of the current folder, which an experiment file cannot. Write "
            f"{key}={text} on the command line if that is what you want."
        )
        problems.append(problem(entries.pop(key).where, sentence))


def _stays_here(path: str) -> bool:
    """Return whether a path stays inside the current folder, or inside Ultralytics' folder for runs."""
    here, real = os.path.realpath(os.curdir), os.path.realpath(path)
    if ".." in path.replace("\\", "/").split("/") or os.path.splitdrive(here)[0] != os.path.splitdrive(real)[0]:
        return False
    return os.path.commonpath([here, real]) == here
