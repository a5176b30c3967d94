"""`polyseg evaluate`."""

from typing import Annotated, Literal

import typer

from polyseg.cli.display import talking
from polyseg.cli.options import (
    HOW,
    WHERE,
    AsJson,
    Cache,
    Device,
    OtherData,
    Out,
    Overwrite,
    Part,
    Quiet,
    Sources,
    Trust,
    Verbose,
)
from polyseg.cli.printing import print_outcome
from polyseg.errors import PolysegError
from polyseg.system.process_group import rank_here


def evaluate(
    sources: Sources,
    data: OtherData = None,
    part: Part = None,
    out: Out = None,
    overwrite: Overwrite = False,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="Run, or arm, to compare the others with: paired differences, bootstrap "
            "intervals, Wilcoxon's test with Holm's correction (default: no comparison).",
            rich_help_panel=HOW,
        ),
    ] = None,
    group: Annotated[
        bool,
        typer.Option(
            "--group",
            help="Join runs that differ only by seed or fold into one arm.",
            rich_help_panel=HOW,
        ),
    ] = False,
    threshold: Annotated[
        str,
        typer.Option(
            metavar="P",
            help="Probability from which a pixel is foreground, between 0 and 1; or val: the one "
            "with the best Dice on the validation images.",
            rich_help_panel=HOW,
        ),
    ] = "0.5",
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Test the mean of the MC-Dropout passes as well, and whether D finds failures.",
            rich_help_panel=HOW,
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of MC-Dropout passes for --uncertainty (default: uncertainty.samples of "
            "the run).",
            rich_help_panel=HOW,
        ),
    ] = None,
    corrupt: Annotated[
        str | None,
        typer.Option(
            metavar="KIND,...",
            help="Test on corrupted images as well: noise, blur, contrast, gamma, bias, motion, "
            "speckle, resolution, jpeg, or all.",
            rich_help_panel=HOW,
        ),
    ] = None,
    tolerance: Annotated[
        float,
        typer.Option(
            help="Tolerance of the surface Dice, in mm where spacings are known, else in pixels.",
            rich_help_panel=HOW,
        ),
    ] = 2.0,
    failure: Annotated[
        float,
        typer.Option(help="Dice below which an image counts as failed.", rich_help_panel=HOW),
    ] = 0.7,
    figures: Annotated[
        bool,
        typer.Option("--figures/--no-figures", help="Draw the figures.", rich_help_panel=WHERE),
    ] = True,
    cache: Cache = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Test networks on the same images: tables by metric and by image, comparisons, figures.

    Example: polyseg evaluate runs/dice runs/adaptive --baseline runs/dice --out runs/comparison
    """
    with talking(quiet, verbose) as display:
        from polyseg.commands import evaluate
        from polyseg.evaluation.testing_networks import EvaluationSettings
        from polyseg.runs.trained_model import Inputs

        outcome = evaluate.evaluate_runs(
            sources,
            EvaluationSettings(
                threshold=_threshold(threshold),
                uncertainty=uncertainty,
                samples=samples,
                corruptions=evaluate.kinds_of_damage(corrupt),
                tolerance=tolerance,
                failure=failure,
            ),
            Inputs(data, part, cache, device, trust),
            baseline=baseline,
            group=group,
            out=out,
            overwrite=overwrite,
            figures=figures,
            progress=display,
        )
    if rank_here() == 0:
        print_outcome(outcome, as_json)


def _threshold(text: str) -> float | Literal["val"]:
    if text == "val":
        return "val"
    try:
        return float(text)
    except ValueError:
        raise PolysegError(f"--threshold {text}: a number above 0 and below 1, or val") from None
