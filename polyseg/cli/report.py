"""`polyseg report`."""

from pathlib import Path
from typing import Annotated

from polyseg.cli import options
from polyseg.cli.display import messages


def report(
    runs: options.Runs,
    evaluations: Annotated[
        list[Path] | None,
        options.in_out(
            "--evaluation",
            metavar="DIR",
            help="Folder that `polyseg evaluate` wrote; repeatable (default: the newest comparison "
            "of exactly these runs, if it lies beside them).",
        ),
    ] = None,
    out: Annotated[Path, options.in_out(metavar="FILE", help="HTML file to write.")] = Path(
        "report.html"
    ),
    overwrite: options.Overwrite = False,
    title: Annotated[
        str | None,
        options.setting(metavar="TEXT", help="Title of the page (default: names of the runs)."),
    ] = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write one HTML file on runs: results, comparisons, settings, curves, images, versions.

    Example: polyseg report runs/dice runs/adaptive --evaluation results --out report.html
    """
    with messages(quiet, verbose) as display:
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
