"""`polyseg plot-loss`."""

from pathlib import Path
from typing import Annotated

from polyseg.cli import options
from polyseg.cli.display import messages
from polyseg.errors import PolysegError


def plot_loss(
    s: Annotated[float, options.setting("--s", help="Scale s, above 0 and up to 1.")] = 0.1,
    epsilon: Annotated[
        str, options.setting(metavar="E,...", help="Values of epsilon, separated by commas.")
    ] = "-0.4,0,0.5,1",
    terms: Annotated[int, options.setting(help="Number of terms K of PolyDice.")] = 1,
    gradient: Annotated[
        bool, options.setting("--gradient", help="Draw the derivative with respect to theta.")
    ] = False,
    out: options.FigureFile = Path("polydice"),
    overwrite: options.Overwrite = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw the loss over the angle between prediction and mask, for several values of epsilon.

    Example: polyseg plot-loss --epsilon=-0.4,0,1 --out fig2.pdf
    """
    with messages(quiet, verbose):
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
