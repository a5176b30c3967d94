"""Print the results of a command to stdout, as tables or as JSON."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyseg.system.files import without_nan
from polyseg.system.process_group import rank_here

if TYPE_CHECKING:
    from polyseg.commands.outcome import Outcome
    from polyseg.evaluation.tables import Cell, Sheet

_MOST_FILES = 24
"""Largest number of files that are listed; --json lists all."""
_LONG = 24
"""Length of a value above which each value of a list has its own line."""


def print_outcome(outcome: "Outcome", as_json: bool) -> None:
    """Print tables and paths, or all results as JSON, to stdout, in the leading process only."""
    if rank_here():
        return
    from polyseg.evaluation import export, tables

    if as_json:
        found = outcome.evaluation
        record = {
            "folder": str(outcome.folder),
            "files": [str(path) for path in outcome.files],
            "evaluation": None if found is None else export.summary(found),
            "correlations": list(outcome.correlations),
            "notes": list(outcome.notes),
        }
        print(json.dumps(without_nan(record), indent=2))
        return
    console = Console(emoji=False)
    if outcome.evaluation is not None:
        for sheet in tables.sheets(export.summary(outcome.evaluation), brief=True):
            print_sheet(console, sheet)
    if outcome.correlations:
        print_correlations(console, outcome.correlations)
    for note in outcome.notes:
        console.print(note, highlight=False, markup=False)
    suffixes: dict[Path, list[str]] = {}
    for path in outcome.files:
        shown = path.relative_to(outcome.folder) if path.is_relative_to(outcome.folder) else path
        suffixes.setdefault(shown.with_suffix(""), []).append(shown.suffix)
    print(f"\nin {outcome.folder}:")
    for stem, endings in list(suffixes.items())[:_MOST_FILES]:
        print(f"  {stem}{', '.join(endings)}")
    if len(suffixes) > _MOST_FILES:
        print(f"  and {len(suffixes) - _MOST_FILES} more")


def print_sheet(console: Console, sheet: "Sheet") -> None:
    """Print a table of an evaluation, the best of each row in bold, in parts if it is too wide."""
    console.print(sheet.title, style="italic", highlight=False, markup=False)
    for number, columns in enumerate(_parts(sheet, console.width)):
        if number:
            console.print(
                f"{sheet.title}, continued", style="italic", highlight=False, markup=False
            )
        table = Table()
        for column in columns:
            side: Literal["left", "right"] = "right" if column else "left"
            table.add_column(escape(sheet.heads[column]), justify=side)
        for row in sheet.rows:
            table.add_row(*(_shown(row[column]) for column in columns))
        console.print(table)
    for note in sheet.notes:
        console.print(note, highlight=False, markup=False)


def _parts(sheet: "Sheet", width: int) -> list[list[int]]:
    """Return the columns of each part; all parts include the first column, and no cell is cut."""
    words = [
        [*head.split(), *(row[column].text + row[column].marks for row in sheet.rows)]
        for column, head in enumerate(sheet.heads)
    ]
    wide = [max(map(len, of_column)) for of_column in words]
    parts: list[list[int]] = [[0]]
    for column in range(1, len(wide)):
        taken = sum(wide[one] + 3 for one in [*parts[-1], column]) + 1
        if taken > width and len(parts[-1]) > 1:
            parts.append([0])
        parts[-1].append(column)
    return parts


def _shown(cell: "Cell") -> str:
    text = escape(cell.text) + cell.marks
    return f"[bold]{text}[/bold]" if cell.best else text


def print_correlations(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of correlations with a row for each metric; a dash is an undefined value."""
    table = Table(title="Spearman's correlation of the difficulty D", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in rows:
        table.add_row(*map(_correlation, row.values()))
    console.print(table)


def _correlation(value: Any) -> str:
    """Return a name, a correlation or its interval as a cell."""
    if isinstance(value, str):
        return escape(value.replace("_", " "))
    ends = value if isinstance(value, list) else [value]
    known = all(math.isfinite(end) for end in ends)
    return " to ".join(f"{end:.3f}" for end in ends) if known else "-"


def print_mapping(title: str, values: Mapping[str, Any], as_json: bool) -> None:
    """Print named values below a title, or as JSON, to stdout."""
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table(title=escape(title), title_justify="left", show_header=False)
    for name, value in values.items():
        shown = str(value)
        if isinstance(value, list):
            texts = list(map(str, value))
            # Sentences and names have a line each; numbers and sizes are on one line.
            shown = ("\n" if max(map(len, texts), default=0) > _LONG else ", ").join(texts)
        elif isinstance(value, dict):
            shown = ", ".join(f"{count} {part}" for part, count in value.items())
        table.add_row(escape(name), escape(shown))
    Console(emoji=False).print(table)
