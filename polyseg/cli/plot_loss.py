"""`polyseg plot-loss`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli.display import talking
from polyseg.cli.options import HOW, WHERE, Overwrite, Quiet, Verbose
from polyseg.errors import PolysegError


def plot_loss(
    s: Annotated[
        float, typer.Option("--s", help="Scale s, above 0 and up to 1.", rich_help_panel=HOW)
    ] = 0.1,
    epsilon: Annotated[
        str,
        typer.Option(
            metavar="E,...", help="Values of epsilon, separated by commas.", rich_help_panel=HOW
        ),
    ] = "-0.4,0,0.5,1",
    terms: Annotated[
        int, typer.Option(help="Number of terms K of PolyDice.", rich_help_panel=HOW)
    ] = 1,
    gradient: Annotated[
        bool,
        typer.Option(
            "--gradient", help="Draw the derivative with respect to theta.", rich_help_panel=HOW
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="Figure to write: .png, .pdf or .svg; without suffix both PNG and PDF.",
            rich_help_panel=WHERE,
        ),
    ] = Path("polydice"),
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw the loss over the angle between prediction and mask, for several epsilon.

    Example: polyseg plot-loss --epsilon=-0.4,0,1 --out fig2.pdf
    """
    with talking(quiet, verbose):
        from polyseg.commands import plot_loss

        for path in plot_loss.plot_loss(
            s=s,
            epsilons=_numbers(epsilon),
            terms=terms,
            gradient=gradient,
            out=out,
            overwrite=overwrite,
        ):
            print(path)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PolysegError(f"--epsilon {text}: give numbers separated by commas") from None
