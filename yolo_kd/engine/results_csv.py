"""`results.csv` across interruptions: one row for every epoch, in order, none twice, none missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_kd.engine.run_files import write_atomically


def cut(csv: Path, epochs: int, saved: Mapping[str, Sequence[Any]] | None) -> float:
    """Make `results.csv` end with the epoch that a run resumes from.

    A row is written before its checkpoint, so a run that was killed between the two has a row too many, possibly half
    of it. Rows that are missing come back from the checkpoint, which holds the table as it was.

    Args:
        csv: The file; it need not exist.
        epochs: Number of epochs that are finished.
        saved: The table of the checkpoint, by column.

    Returns:
        The training time of the last row that stays, in seconds; 0 without rows.
    """
    text = csv.read_text(encoding="utf-8", errors="replace") if csv.exists() else ""
    header, rows = _saved(saved)
    lines = text.splitlines()
    if lines and (not header or lines[0] == header):
        header = lines[0]
        for line in lines[1:]:
            if (epoch := _epoch(line)) and line.count(",") == header.count(","):
                rows[epoch] = line
    kept = [rows[epoch] for epoch in sorted(rows) if epoch <= epochs]
    new = "".join(f"{line}\n" for line in [header, *kept]) if kept else ""
    if new and new != text:
        write_atomically(csv, new.encode())
    elif not new:
        csv.unlink(missing_ok=True)  # the header is written with the first row
    return float(kept[-1].split(",")[1]) if kept else 0.0


def _saved(table: Mapping[str, Sequence[Any]] | None) -> tuple[str, dict[int, str]]:
    """Return header and rows of a checkpoint's table, formatted as Ultralytics does."""
    if not table or "epoch" not in table:
        return "", {}
    columns = list(table)
    rows = zip(*(table[c] for c in columns), strict=False)
    lines = {int(row[columns.index("epoch")]): ",".join(_cell(value) for value in row) for row in rows}
    return ",".join(columns), lines


def _cell(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, (int, float)) else str(value or "")


def _epoch(line: str) -> int:
    cell = line.split(",")[0].strip()
    return int(cell) if cell.isdecimal() else 0
