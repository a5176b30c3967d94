"""`polyseg report`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli.display import talking
from polyseg.cli.options import HOW, WHERE, Quiet, Verbose


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Run folders.")],
    out: Annotated[
        Path, typer.Option("--out", help="File to write, new.", rich_help_panel=WHERE)
    ] = Path("report.html"),
    title: Annotated[
        str | None, typer.Option(help="Title of the page.", rich_help_panel=HOW)
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Bind runs into one HTML file: results, settings, curves, images, how it was made.

    Example: polyseg report runs/dice runs/adaptive --out comparison.html
    """
    with talking(quiet, verbose) as display:
        from polyseg.jobs import page

        print(page.make_page(runs, out=out, title=title, progress=display))
