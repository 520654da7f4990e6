"""Keeps `results.csv` complete across interruptions: one row for each epoch, in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yolo_kd.engine.run_files import write_atomically


def cut(csv: Path, epochs: int, saved: Mapping[str, Sequence[Any]] | None) -> float:
    """Cut or complete `results.csv` so that its last row is the epoch that a run resumes from.

    A row is written before its checkpoint, so a run that was killed between the two has an extra row, possibly an
    incomplete one. Missing rows are restored from the checkpoint, which contains the table.

    Args:
        csv: The file, which need not exist.
        epochs: Number of finished epochs.
        saved: The checkpoint's table, by column.

    Returns:
        The training time of the last remaining row in seconds, 0 without rows.
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
    """Return the header and the rows by epoch of a checkpoint's table, in Ultralytics' format."""
    if not table or "epoch" not in table:
        return "", {}
    columns = list(table)
    lines = {}
    for row in zip(*table.values(), strict=False):
        cells = [f"{v:.6g}" if isinstance(v, int | float) else str(v or "") for v in row]
        lines[int(row[columns.index("epoch")])] = ",".join(cells)
    return ",".join(columns), lines


def _epoch(line: str) -> int:
    cell = line.split(",")[0].strip()
    return int(cell) if cell.isdecimal() else 0
