"""`polyseg report`."""

from pathlib import Path
from typing import Annotated

from polyseg.cli.display import messages
from polyseg.cli.options import Overwrite, Quiet, Runs, Verbose, in_out, setting


def report(
    runs: Runs,
    evaluations: Annotated[
        list[Path] | None,
        in_out(
            "--evaluation",
            metavar="DIR",
            help="Folder that `polyseg evaluate` wrote; repeatable (default: the newest comparison "
            "of exactly these runs, if it lies beside them).",
        ),
    ] = None,
    out: Annotated[Path, in_out("--out", metavar="FILE", help="HTML file to write.")] = Path(
        "report.html"
    ),
    overwrite: Overwrite = False,
    title: Annotated[
        str | None, setting(help="Title of the page (default: names of the runs).")
    ] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write one HTML file on runs: results, comparisons, settings, curves, images, provenance.

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
