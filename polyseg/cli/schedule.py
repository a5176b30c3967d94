"""`polyseg schedule`."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from polyseg.cli import completion, options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_outcome
from polyseg.errors import PolysegError
from polyseg.system.files import without_nan

if TYPE_CHECKING:
    from polyseg.commands.schedule import TableWithNotes

schedule_app = options.App(
    help="Show, draw, export and recompute the difficulty and epsilon of a run."
)

Run = Annotated[
    Path, typer.Argument(metavar="RUN", help="Folder of a run, which may still be training.")
]
AsCsv = Annotated[bool, options.printed("--csv", help="Print the results as CSV.")]
Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]
"""Heading of a column, and a function that returns its cell of a row."""
_NO_WRAPPING = 100_000
"""Width in characters at which no line is wrapped."""
_WORDS = ("score", "largest D", "smallest D", "fallback")


@schedule_app.command("show")
def schedule_show(
    run: Run,
    image: Annotated[
        str | None,
        options.in_out(
            metavar="ID",
            help="Show how the epsilons of this image follow from its difficulty (default: all "
            "images).",
        ),
    ] = None,
    as_json: options.AsJson = False,
    as_csv: AsCsv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Print difficulty and epsilon at each assessment, or those of one image.

    Example: polyseg schedule show runs/first --image phantom_0007
    """
    _refuse_both(as_json, as_csv)
    with messages(quiet, verbose):
        from polyseg.commands import schedule

        found = schedule.show(run, image)
    if as_json or as_csv:
        _print_rows(found.rows, as_json)
    elif image is None:
        _print_overview(run, found)
    else:
        _print_image(f"{image} in {run}", found)


@schedule_app.command("plot")
def schedule_plot(
    runs: options.Runs,
    out: Annotated[Path | None, options.out_in("the folder of the first run")] = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw epsilon over the epochs (quantiles and each image), Dice over D, and rank stability.

    Example: polyseg schedule plot runs/first runs/second --out figures
    """
    with messages(quiet, verbose):
        from polyseg.commands import schedule_figures

        outcome = schedule_figures.plot(runs, out, overwrite=overwrite)
    print_outcome(outcome, as_json)


@schedule_app.command("recompute")
def schedule_recompute(
    run: Run,
    overrides: Annotated[
        list[str] | None,
        options.setting(
            "--set",
            metavar="KEY=VALUE",
            help="A setting of control, uncertainty.metric or loss.epsilon; repeatable (default: "
            "those of the run).",
            autocompletion=completion.setting,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        options.in_out(
            metavar="FILE",
            help="HDF5 file for the new schedule (default: none is written).",
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    trust: options.Trust = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Compute the epsilons that other settings would give for the recorded difficulties.

    Example: polyseg schedule recompute runs/first --set control.sensitivity=2 --out new.h5
    """
    with messages(quiet, verbose):
        from polyseg.commands import schedule

        found = schedule.recompute(run, overrides or [], out, overwrite=overwrite, trust=trust)
    if as_json:
        _print_rows(found.rows, as_json)
        return
    columns = [
        ("epochs", lambda row: _epoch_range(row["from_epoch"], row["to_epoch"])),
        _quantiles("recorded", ".2f", "recorded ε\n5/50/95 %"),
        _quantiles("recomputed", ".2f", "recomputed ε\n5/50/95 %"),
        _number("largest_change", ".3f", "largest\nchange"),
        _number("spearman", ".3f", "Spearman"),
        ("went\nup", lambda row: _shown(100 * row["raised_share"], ".0f", " %")),
    ]
    _print_table(f"{run}: epsilon between assessments", columns, found.rows, found.notes)
    if out is not None:
        print(out)


@schedule_app.command("export")
def schedule_export(
    run: Run,
    out: Annotated[
        Path | None,
        options.in_out(metavar="FILE", help="CSV file to write (default: stdout)."),
    ] = None,
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write difficulty, epsilon and Dice as CSV, a row for each assessment and image.

    Example: polyseg schedule export runs/first --out first.csv
    """
    with messages(quiet, verbose):
        from polyseg.commands import schedule

        text = schedule.export(run, out, overwrite=overwrite)
    print(text if out is None else out, end="" if out is None else "\n")


@schedule_app.command("validity")
def schedule_validity(
    run: Run,
    donors: Annotated[
        tuple[Path, Path] | None,
        options.in_out(
            metavar="RUN RUN",
            help="Two runs, each trained on half of RUN's training images; also correlate scores "
            "with the error of the run that was not trained on the image.",
        ),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    as_csv: AsCsv = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Show whether D measures difficulty: its rank correlation with 1 - Dice and with size.

    Example: polyseg schedule validity runs/first --out validity
    """
    _refuse_both(as_json, as_csv)
    with messages(quiet, verbose):
        from polyseg.commands import schedule

        found = schedule.validity(run, donors or ())
        outcome = None
        if out is not None or not (as_json or as_csv):
            from polyseg.commands import schedule_figures

            outcome = schedule_figures.draw_validity(found.rows, run, out, overwrite=overwrite)
    if as_json or as_csv:
        _print_rows(found.rows, as_json)
        return
    from polyseg.adaptive.score_correlations import validity_summary

    summary = validity_summary(found.rows)
    columns = [
        ("score", lambda row: row["score"].replace("_", " ")),
        _last_and_mean("with_error", "1 - Dice"),
        _last_and_mean("with_size", "size of\nthe mask"),
        _last_and_mean("with_error_given_size", "1 - Dice at\nequal size"),
        _last_and_mean("with_previous", "assessment\nbefore"),
    ]
    title = f"{run}: Spearman's correlations, in the last assessment and mean of all"
    _print_table(title, columns, summary, found.notes)
    if donors:
        _print_unseen(run, found.rows)
    if outcome is not None:
        print_outcome(outcome, as_json=False)


def _print_unseen(run: Path, rows: Sequence[Row]) -> None:
    """Print how the scores of the last assessment correlate with errors on unseen images."""
    last = [row for row in rows if row["epoch"] == rows[-1]["epoch"]]
    columns = [
        ("score", lambda row: row["score"].replace("_", " ")),
        _number("with_unseen_error", ".2f", "1 - Dice"),
        ("95 % interval", _interval_of_unseen),
        _number("with_unseen_error_given_size", ".2f", "at equal\nsize"),
    ]
    title = f"{run}: Spearman's correlation with 1 - Dice on unseen images"
    note = (
        f"after epoch {last[0]['epoch']}; 1 - Dice of the run that was not trained on the image; "
        "interval over the images"
    )
    _print_table(title, columns, last, [note])


def _interval_of_unseen(row: Row) -> str:
    low, high = row["with_unseen_error_low"], row["with_unseen_error_high"]
    return f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "-"


def _print_overview(run: Path, found: "TableWithNotes") -> None:
    """Print several tables, because one would be wider than a terminal."""
    spread = [
        _integer("epoch"),
        _quantiles("difficulty", ".4f", "D at 5/50/95 %"),
        _number("difficulty_percentile", ".4f", "D_pct"),
        _number("sigma", ".4f"),
        _quantiles("epsilon", ".2f", "ε at 5/50/95 %"),
    ]
    lasting = [
        _integer("epoch"),
        _number("spearman_previous", ".2f", "Spearman\n(previous)"),
        _number("rank_stability", ".2f", "rank\nstability"),
        _integer("fallbacks", "fallbacks"),
        ("wrong\nsign", lambda row: _shown(100 * row["wrong_sign_share"], ".1f", " %")),
    ]
    extreme = [
        _integer("epoch"),
        ("largest D", lambda row: str(row["largest_1"])),
        ("smallest D", lambda row: str(row["smallest_1"])),
    ]
    last = found.rows[-1]
    notes = []
    if not math.isfinite(last["epsilon_q50"]):
        notes = [f"The assessment after epoch {last['epoch']} is a record only: no epoch used it."]
    _print_table(f"{run}: difficulty D, and ε in the next epoch", spread, found.rows, notes)
    _print_table(f"{run}: stability of the order of the images", lasting, found.rows)
    title = f"{run}: images with the largest and smallest D"
    _print_table(title, extreme, found.rows, found.notes, whole=True)


def _print_image(title: str, found: "TableWithNotes") -> None:
    """Print the assessments of an image, and the numbers of eq. 11 and 12."""
    assessed = [
        _integer("epoch"),
        (
            "D ± standard error",
            lambda row: _value_and_error(row["difficulty"], row["difficulty_se"]),
        ),
        *(_integer("rank"), _number("percentile", ".1f"), _number("dice", ".3f", "Dice")),
        ("fallback", lambda row: str(row["fallback"])),
    ]
    followed = [
        ("epochs", lambda row: _epoch_range(row["from_epoch"], row["to_epoch"])),
        *(_number("difficulty", "#.6g", "D"), _number("difficulty_percentile", "#.6g", "D_pct")),
        *(_number("sigma", "#.6g"), _number("normalised", ".4f", "D_norm")),
        _number("epsilon", ".4f"),
    ]
    rows = {(row["epoch"], row.get("label")): row for row in found.rows}
    _print_table(f"{title}: assessments", assessed, list(rows.values()))
    met = [row for row in found.rows if math.isfinite(row["from_epoch"])]
    _print_table(f"{title}: epsilon from D", followed, met, found.notes)


def _print_table(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    notes: Sequence[str] = (),
    *,
    whole: bool = False,
) -> None:
    """Print a table for each label, because another column would be too wide for a terminal.

    With `whole` no cell is wrapped in a narrow terminal, and ids can be copied.
    """
    console = Console(emoji=False)
    canvas = Console(width=_NO_WRAPPING, emoji=False) if whole else console
    for label in dict.fromkeys(row.get("label", "") for row in rows):
        named = ", ".join(filter(None, (title, label)))
        table = Table()
        for head, _ in columns:
            table.add_column(head, justify="left" if head in _WORDS else "right", overflow="fold")
        for row in rows:
            if row.get("label", "") == label:
                table.add_row(*(escape(cell(row)) for _, cell in columns))
        console.print(named, style="italic", highlight=False, markup=False, soft_wrap=True)
        canvas.print(table)
    for note in notes:
        console.print(note, highlight=False, markup=False)


def _print_rows(rows: Sequence[Row], as_json: bool) -> None:
    from polyseg.adaptive.schedule_tables import csv_text

    if as_json:
        print(json.dumps(without_nan(list(rows)), indent=2))
    else:
        print(csv_text(rows), end="")


def _refuse_both(as_json: bool, as_csv: bool) -> None:
    if as_json and as_csv:
        raise PolysegError("--json --csv: choose one of them")


def _integer(key: str, head: str = "") -> Column:
    return head or key, lambda row: str(row[key])


def _number(key: str, form: str, head: str = "") -> Column:
    return head or key, lambda row: _shown(row[key], form)


def _quantiles(key: str, form: str, head: str) -> Column:
    keys = [f"{key}_q{q:02d}" for q in (5, 50, 95)]

    def cell(row: Row) -> str:
        known = math.isfinite(row[keys[0]])
        return "/".join(_shown(row[one], form) for one in keys) if known else "-"

    return head, cell


def _last_and_mean(key: str, head: str) -> Column:
    return head, lambda row: f"{_shown(row[f'{key}_last'])}, {_shown(row[f'{key}_mean'])}"


def _epoch_range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _value_and_error(value: float, error: float) -> str:
    return _shown(value, ".4f") + (f" ± {error:.4f}" if math.isfinite(error) else "")


def _shown(value: float, form: str = ".2f", unit: str = "") -> str:
    return f"{value:{form}}{unit}" if math.isfinite(value) else "-"
