"""`results.csv` has every finished epoch once, whatever a kill has left in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars
import pytest

from yolo_kd.engine.results_csv import cut

HEADER = "epoch,time,train/box_loss,lr/pg0"
ROWS = {n: f"{n},{n}.5,0.{n}25,1e-05" for n in range(1, 6)}


def table(*rows: str) -> str:
    return "".join(f"{line}\n" for line in (HEADER, *rows))


def saved(*epochs: int) -> dict[str, Any]:
    """Return what Ultralytics puts into a checkpoint: the table as polars reads it."""
    return polars.read_csv(table(*(ROWS[n] for n in epochs)).encode(), infer_schema_length=None).to_dict(
        as_series=False
    )


@pytest.mark.parametrize(
    "text",
    [
        table(ROWS[1], ROWS[2]),
        table(ROWS[1], ROWS[2], ROWS[3]),
        table(ROWS[1], ROWS[2], ROWS[3], ROWS[4]),
        table(ROWS[1], ROWS[2]) + "3,3.5,0.",
        table(ROWS[1], ROWS[2]) + "3",
        table(ROWS[1]),
        table(ROWS[1]) + ROWS[2][:5],
        table(ROWS[1], ROWS[2], ROWS[2]),
        table(ROWS[2], ROWS[1]),
        table(),
        "epoch,ti",
        "",
        None,
        "another,header\n1,2\n",
        "\0" * 50,
    ],
)
def test_the_rows_up_to_the_checkpoint(tmp_path: Path, text: str | None) -> None:
    csv = tmp_path / "results.csv"
    if text is not None:
        csv.write_text(text)
    assert cut(csv, 2, saved(1, 2)) == 2.5
    assert csv.read_text() == table(ROWS[1], ROWS[2])


def test_without_a_table_in_the_checkpoint(tmp_path: Path) -> None:
    csv = tmp_path / "results.csv"
    csv.write_text(table(*ROWS.values()))
    assert cut(csv, 3, None) == 3.5
    assert csv.read_text() == table(ROWS[1], ROWS[2], ROWS[3])


def test_inside_the_first_epoch_there_are_no_rows(tmp_path: Path) -> None:
    csv = tmp_path / "results.csv"
    csv.write_text(table(ROWS[1]))
    assert cut(csv, 0, {}) == 0
    assert not csv.exists()  # Ultralytics writes the header where there is no file
    assert cut(csv, 0, {}) == 0


def test_text_and_gaps_of_a_saved_table(tmp_path: Path) -> None:
    cut(tmp_path / "results.csv", 1, {"epoch": [1], "time": [1.0], "note": ["x"], "gap": [None], "nan": [float("nan")]})
    assert (tmp_path / "results.csv").read_text() == "epoch,time,note,gap,nan\n1,1,x,,nan\n"
