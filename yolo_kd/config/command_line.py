"""The words of a command line, `key=value`, read as Ultralytics reads them."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence
from typing import Any

from yolo_kd.config.source import problem, raise_if, shown
from yolo_kd.config.unlabeled import SOURCE_KEY

NO_RECIPE = "none"  # of the values of kd: the student alone
# text as it stands: a run named 007 is not run 7
_VERBATIM = frozenset(
    {"teacher", "student", "kd", "cfg", "data", "name", "project", "plugins", "class_map", SOURCE_KEY}
)
_BRACKETS = {"[": "]", "(": ")", "{": "}"}


def parse_assignments(arguments: Sequence[str]) -> dict[str, Any]:
    """Turn `key=value` words into values: None, true/false, numbers, lists, otherwise text.

    Spaces around `=` and inside brackets may have split a word, as in Ultralytics' own command line.

    Raises:
        ConfigError: With one line for every word that is not key=value, has no key or no value, or repeats a key.
    """
    problems: list[str] = []
    values = assignments(arguments, problems)
    raise_if(problems)
    return values


def assignments(arguments: Sequence[str], problems: list[str]) -> dict[str, Any]:
    """Do the work of `parse_assignments`; `problems` receives one line per mistake."""
    values: dict[str, Any] = {}
    words: dict[str, str] = {}
    for word in _merged(arguments):
        key, sign, text = (part.strip() for part in word.partition("="))
        if not sign:
            dashed = key.lstrip("-")
            fix = f"Write {dashed}=<value>, without dashes." if dashed != key else f"Write {key}=<value>."
            problems.append(problem("", f"{shown(word)} is not key=value. {fix}"))
        elif not key:
            problems.append(problem("", f"{shown(word)} has no key before '='."))
        elif key in words:
            problems.append(problem("", f"key '{key}' is given twice: {words[key]} and {word}. Keep one."))
        else:
            words[key] = word
            if not text:
                problems.append(problem("", f"'{key}=' has no value. Write {key}=<value>, or leave it out."))
            elif text[0] in _BRACKETS and _open_brackets(text) > 0:
                problems.append(problem("", f"{shown(word)} opens a bracket that is never closed."))
            else:
                values[key] = _value(key, text)
    return values


def _merged(arguments: Sequence[str]) -> list[str]:
    """Join words that spaces around '=' or inside brackets have split."""
    words: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word.startswith("=") and words and "=" not in words[-1]:
            word = words.pop() + word
        if word.endswith("=") and word.count("=") == 1 and rest and "=" not in rest[0]:
            word += rest.pop(0)
        text = word.partition("=")[2].strip()
        if text and text[0] in _BRACKETS:
            joined, ahead = text, 0
            while _open_brackets(joined) > 0 and ahead < len(rest) and "=" not in rest[ahead]:
                joined = f"{joined} {rest[ahead]}"
                ahead += 1
            if _open_brackets(joined) <= 0:
                word, rest = f"{word.partition('=')[0]}={joined}", rest[ahead:]
        words.append(word)
    return words


def _open_brackets(text: str) -> int:
    return sum(text.count(left) - text.count(right) for left, right in _BRACKETS.items())


def _value(key: str, text: str) -> Any:
    if key == "kd" and text.lower() == NO_RECIPE:
        return NO_RECIPE
    constants = {"none": None, "true": True, "false": False}
    if key in _VERBATIM:
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return None if text.lower() == "none" else text[1:-1] if quoted else text
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        with warnings.catch_warnings():  # '\d' and '1if' are only worth a warning in code
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except Exception:  # anything else is text, as in Ultralytics' parser
        return text
