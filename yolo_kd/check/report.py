"""The report of a check, as text and as JSON."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LEVELS = ("error", "warning", "note")
READY, WARNED, BROKEN = "ready", "ready with warnings", "will not work"
WIDTH = 100


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        level: `error` (training would fail or be useless), `warning`, or `note`.
        topic: What was checked: files, pair, classes, data, quality, unlabeled, terms, cost, setup.
        text: The finding, a sentence.
        advice: The remedy, empty if none is needed.
    """

    level: str
    topic: str
    text: str
    advice: str = ""


@dataclass
class Report:
    """The results of a check.

    Attributes:
        command: What was checked: teacher, student, data, recipe.
        findings: The findings, in the order in which they were made.
        tables: Tables by title; the first row of each has the headings.
        facts: The same numbers for programs.
    """

    command: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    tables: dict[str, Sequence[Sequence[str]]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, level: str, topic: str, text: str, advice: str = "") -> None:
        """Add a finding, unless it is already there."""
        assert level in LEVELS
        finding = Finding(level, topic, " ".join(text.split()), " ".join(advice.split()))
        if finding not in self.findings:
            self.findings.append(finding)

    @property
    def verdict(self) -> str:
        """`ready`, `ready with warnings` or `will not work`."""
        levels = {f.level for f in self.findings}
        return BROKEN if "error" in levels else WARNED if "warning" in levels else READY

    def to_dict(self) -> dict[str, Any]:
        """Return the whole report in types that JSON has."""
        return {
            "verdict": self.verdict,
            "command": self.command,
            "findings": [vars(f) for f in self.sorted_findings()],
            **self.facts,
        }

    def sorted_findings(self) -> list[Finding]:
        """Return errors first, then warnings, then notes."""
        return sorted(self.findings, key=lambda f: LEVELS.index(f.level))

    def to_text(self) -> str:
        """Return the report for printing: tables, findings, and the verdict in the last line."""
        lines = []
        for title, rows in self.tables.items():
            lines += [title, *(f"  {row}" for row in _aligned(rows)), ""]
        findings = self.sorted_findings()
        margin = " " * 11
        for finding in findings:
            head = f"  {finding.level:<9}{finding.topic}: "
            lines += textwrap.wrap(head + finding.text, WIDTH, subsequent_indent=margin)
            if finding.advice:
                lines += textwrap.wrap(f"{margin}-> {finding.advice}", WIDTH, subsequent_indent=margin + "   ")
        counts = {level: sum(f.level == level for f in findings) for level in LEVELS[:2]}
        tally = ", ".join(f"{n} {level}{'s' if n > 1 else ''}" for level, n in counts.items() if n)
        return "\n".join([*lines, "", f"verdict: {self.verdict}{f' ({tally})' if tally else ''}"])


def number(value: float | None, digits: int = 3) -> str:
    """Return a number for a table, `-` for None."""
    return "-" if value is None else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]


def some(values: Sequence[object], limit: int = 3) -> str:
    """Return the first few values and the number of others, for a sentence."""
    more = f" and {len(values) - limit} more" if len(values) > limit else ""
    return ", ".join(str(v) for v in values[:limit]) + more


def percent(part: float, whole: float) -> str:
    """Return a share in per cent, with a decimal if it is small."""
    share = part / whole if whole else 0.0
    return f"{share:.0%}" if share >= 0.1 or not share else f"{share:.1%}"


def plain(value: Any) -> Any:
    """Return a value in JSON's types; NaN and infinity become None."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
