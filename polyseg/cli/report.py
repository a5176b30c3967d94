"""`polyseg report`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli.display import talking
from polyseg.cli.options import HOW, WHERE, Overwrite, Quiet, Verbose


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="Folders of runs.")],
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--evaluation",
            metavar="DIR",
            help="Results of `polyseg evaluate` that compare the runs; repeatable (default: none).",
            rich_help_panel=WHERE,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="HTML file to write.", rich_help_panel=WHERE),
    ] = Path("report.html"),
    overwrite: Overwrite = False,
    title: Annotated[
        str | None,
        typer.Option(help="Title of the page (default: names of the runs).", rich_help_panel=HOW),
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one HTML file on runs: results, comparisons, settings, curves, images, provenance.

    Example: polyseg report runs/dice runs/adaptive --evaluation results --out report.html
    """
    with talking(quiet, verbose) as display:
        from polyseg.commands import report

        written = report.make_page(
            runs,
            evaluations=evaluations or [],
            out=out,
            overwrite=overwrite,
            title=title,
            progress=display,
        )
        print(written)
