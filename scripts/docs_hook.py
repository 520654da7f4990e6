"""Hook of the documentation's build: tables out of CSV files, and reference pages out of the code.

A line that holds nothing but a link to a CSV file, such as `[runs](results/thinned.csv)`, becomes that file's table.
A line `<!-- generated: keys -->` becomes what the function of that name in `GENERATED` returns.
"""

from __future__ import annotations

import csv
import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import griffe

CSV_LINK = re.compile(r"^\[([^\]]+)\]\(([^)]+\.csv)\)$", re.MULTILINE)
MARKER = re.compile(r"^<!-- generated: ([a-z_]+) -->$", re.MULTILINE)
RUN_COLUMNS = ["setting", "data", "arm", "seeds", "split", "map", "sd", "versus", "difference", "low", "high", "note"]
CLAIM_COLUMNS = ["claim", "file", "setting", "data", "split", "arm", "versus", "seeds", "section"]
DATA_NAMES = {"bccd": "BCCD", "raccoon": "raccoon", "drawn": "drawn images"}

Row = dict[str, str]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Expand a page; MkDocs calls this for each of them."""
    return expand(markdown, Path(page.file.abs_src_path).parent)


def expand(markdown: str, folder: Path) -> str:
    """Return a page with its CSV links and markers replaced.

    Args:
        markdown: Text of the page.
        folder: Folder of the page, to which its links are relative.

    Raises:
        KeyError: If a marker names nothing that can be generated.
        OSError: If a CSV file is missing.
    """
    text = MARKER.sub(lambda found: GENERATED[found[1]](), markdown)
    return CSV_LINK.sub(lambda found: csv_table(folder / found[2]) + f"\n\n[Download {found[1]}]({found[2]})", text)


# ------------------------------------------------------------------------------------------------ CSV files


def read(path: Path) -> tuple[list[str], list[Row]]:
    """Return the columns and the rows of a CSV file."""
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        return list(reader.fieldnames or ()), list(reader)


def csv_table(path: Path) -> str:
    """Return a CSV file as Markdown: runs with a column for each split, claims looked up, anything else as it is."""
    columns, rows = read(path)
    if columns == RUN_COLUMNS:
        return runs_tables(rows)
    if columns == CLAIM_COLUMNS:
        return claims_table(rows, path.parent)
    return markdown_table(columns, [[row[column] for column in columns] for row in rows])


def markdown_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def runs_tables(rows: list[Row]) -> str:
    """Return a table for each setting: a row for each arm, columns for each data set and split."""
    return "\n\n".join(
        (f"*{setting}*\n\n" if setting else "") + runs_table([row for row in rows if row["setting"] == setting])
        for setting in dict.fromkeys(row["setting"] for row in rows)
    )


def runs_table(rows: list[Row]) -> str:
    """Return the runs of one setting: mAP50-95 with its deviation, differences in points with their intervals."""
    splits = list(dict.fromkeys((row["data"], row["split"]) for row in rows))
    several = len({data for data, _ in splits}) > 1
    columns: list[tuple[str, str, str]] = []  # data, split, and what it is compared with: nothing for mAP itself
    for data, split in splits:
        here = [row for row in rows if (row["data"], row["split"]) == (data, split)]
        columns += [(data, split, "")] if any(row["map"] for row in here) else []
        columns += [(data, split, versus) for versus in dict.fromkeys(r["versus"] for r in here if r["versus"])]
    titles = ["arm", "seeds"]
    for data, split, versus in columns:
        where = f"{DATA_NAMES[data]}, {split}" if several else split
        titles.append(f"{where}, over {plain_arm(versus)}" if versus else where)
    notes = any(row["note"] for row in rows)
    lines = []
    for arm, seeds in dict.fromkeys((row["arm"], row["seeds"]) for row in rows):
        mine = [row for row in rows if (row["arm"], row["seeds"]) == (arm, seeds)]
        cells = [f"`{arm}`", seeds]
        for data, split, versus in columns:
            here = [row for row in mine if (row["data"], row["split"]) == (data, split)]
            if versus:
                cells.append(next((difference(row) for row in here if row["versus"] == versus), ""))
            else:
                cells.append(next((value(row) for row in here if row["map"]), ""))
        lines.append(cells + ([", ".join(dict.fromkeys(row["note"] for row in mine if row["note"]))] if notes else []))
    return markdown_table(titles + (["note"] if notes else []), lines)


def plain_arm(arm: str) -> str:
    """Return an arm as it stands in a column's title."""
    return "the student alone" if arm == "alone" else f"`{arm}`"


def value(row: Row) -> str:
    """Return mAP with its deviation over seeds, such as 0.629 ± 0.004."""
    return row["map"] + (f" ± {row['sd']}" if row["sd"] else "")


def difference(row: Row) -> str:
    """Return a difference in points with its 95 % interval, such as +7.6 (+5.9 to +9.4)."""
    interval = f" ({signed(row['low'])} to {signed(row['high'])})" if row["low"] else ""
    return signed(row["difference"]) + interval


def signed(number: str) -> str:
    """Return a number with a printed sign; zero has ±."""
    return f"±{number}" if float(number) == 0 else number.replace("-", "−") if number[0] == "-" else f"+{number}"


def recipes_ahead() -> str:
    """Return how often each recipe is ahead of the student alone in `every_recipe.csv`."""
    _, rows = read(Path(__file__).resolve().parents[1] / "docs" / "results" / "every_recipe.csv")
    ahead: dict[str, list[bool]] = {}
    for row in rows:
        if row["setting"] in ("scratch", "coco", "few", "few, machine 5") and row["versus"] == "alone":
            ahead.setdefault(row["arm"], []).append(float(row["difference"]) > 0)
    counted = sorted(((sum(wins), arm) for arm, wins in ahead.items() if len(wins) == 9), key=lambda x: (-x[0], x[1]))
    return markdown_table(["recipe", "ahead in"], [[f"`{arm}`", f"{wins} of 9"] for wins, arm in counted])


def claims_table(rows: list[Row], folder: Path) -> str:
    """Return the claims, each with the figures of the run that it names.

    Raises:
        ValueError: If a claim names no run or several.
    """
    lines = []
    for claim in rows:
        found = claimed(claim, folder)
        interval = f"{signed(found['low'])} to {signed(found['high'])}" if found["low"] else "one seed"
        where = f"{DATA_NAMES[claim['data']]}, {claim['split']}"
        link = f"[command and runs](results/experiments.md#{claim['section']})"
        lines.append([claim["claim"], where, signed(found["difference"]), interval, found["seeds"], link])
    return markdown_table(["claim", "data", "effect, points", "95 % interval", "seeds", "how"], lines)


def claimed(claim: Row, folder: Path) -> Row:
    """Return the one row of runs that a claim names.

    Raises:
        ValueError: If there is none, or several.
    """
    keys = ("setting", "data", "split", "arm", "versus", "seeds")
    found = [row for row in read(folder / claim["file"])[1] if all(row[key] == claim[key] for key in keys)]
    if len(found) != 1 or not found[0]["difference"]:
        raise ValueError(f"claim '{claim['claim']}' names {len(found)} rows of {claim['file']}")
    return found[0]


# ------------------------------------------------------------------------------------------------ reference pages


def documented_keys() -> dict[str, list[Any]]:
    """Return our keys in groups. The one place that knows where the code keeps them."""
    from yolo_kd.compare.arms import COMPARE_KEYS
    from yolo_kd.config.reference import Key, recipe_keys, train_keys

    compare = [Key(name, "", "", meaning) for name, meaning in COMPARE_KEYS.items()]
    training = {f"Keys of train and check: {name.lower()}": keys for name, keys in train_keys().items()}
    recipes = {f"Keys of a recipe: {name.lower()}": keys for name, keys in recipe_keys().items()}
    return {**training, "Keys of compare, with those of train": compare, **recipes}


def keys() -> str:
    """Return a table of keys for each group."""
    return "\n\n".join(f"## {heading}\n\n{key_table(group)}" for heading, group in documented_keys().items())


def key_table(group: Sequence[Any]) -> str:
    """Return a table of keys."""
    rows = [[f"`{key.name}`", key.allowed, f"`{key.default}`" if key.default else "", key.meaning] for key in group]
    return markdown_table(["key", "allowed", "default", "meaning"], rows)


def usage() -> str:
    """Return the output of `yolo-kd help`."""
    from yolo_kd.cli import help_text

    return f"```text\n{help_text()}\n```"


def recipes() -> str:
    """Return every shipped recipe in full."""
    from yolo_kd.config.recipe import shipped_recipes

    return "\n\n".join(
        f"## {name}\n\n```yaml\n{path.read_text(encoding='utf-8')}```" for name, path in shipped_recipes().items()
    )


def losses() -> str:
    """Return every registered loss: what it reads, trains and costs, its docstring and its keys."""
    import yolo_kd.losses  # noqa: F401  registers them
    from yolo_kd.losses.base import registered

    return "\n\n".join(loss_section(name, loss) for name, loss in registered().items())


def loss_section(name: str, loss: Any) -> str:
    """Return the section of one loss."""
    from yolo_kd.config.reference import loss_keys
    from yolo_kd.losses.costs import format_cost, measured_costs

    setting, costs = measured_costs()
    parts = griffe.Docstring(inspect.getdoc(loss) or "").parse("google", warnings=False)
    text = "".join(part.value + "\n\n" for part in parts if part.kind is griffe.DocstringSectionKind.text)
    facts = [
        ["reads", ", ".join(f"`{item}`" for item in sorted(loss.reads))],
        ["adapter", f"`{loss.adapter}`" if loss.adapter else "none"],
        ["heads", "equal numbers of bins, more than one" if loss.needs_bins else "all"],
        ["cost", f"{format_cost(costs.get(name))} of the time of student and teacher ({setting})"],
        ["columns", ", ".join(f"`{column}`" for column in loss.columns)],
        ["paper", loss.paper],
    ]
    keys = loss_keys(loss)
    table = key_table(keys) if keys else "It takes no keys of its own."
    return f"## {name}\n\n{text}{markdown_table(['', ''], facts)}\n\n{table}"


def exit_codes() -> str:
    """Return every error of the package with its exit code."""
    from yolo_kd import errors

    found = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, errors.YoloKDError)]
    rows = [
        [f"`{item.__name__}`", str(item.exit_code), (inspect.getdoc(item) or "").splitlines()[0]]
        for item in found
        if item is not errors.YoloKDError
    ]
    return markdown_table(["error", "exit code", "meaning"], rows)


GENERATED: dict[str, Callable[[], str]] = {
    function.__name__: function for function in (keys, usage, recipes, losses, exit_codes, recipes_ahead)
}
