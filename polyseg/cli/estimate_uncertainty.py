"""`polyseg estimate-uncertainty`."""

from typing import Annotated

import typer

from polyseg.choices import image_scores
from polyseg.cli.display import talking
from polyseg.cli.options import (
    HOW,
    AsJson,
    Cache,
    Device,
    OtherData,
    Out,
    Overwrite,
    Part,
    Quiet,
    Source,
    Trust,
    Verbose,
    help_of,
)
from polyseg.cli.printing import print_outcome
from polyseg.system.process_group import rank_here


def estimate_uncertainty(
    source: Source,
    data: OtherData = None,
    part: Part = None,
    samples: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of MC-Dropout passes (default: uncertainty.samples of the run).",
            rich_help_panel=HOW,
        ),
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Keep the pixel maps as well.", rich_help_panel=HOW)
    ] = False,
    score: Annotated[
        list[str] | None,
        typer.Option(
            "--score",
            metavar="NAME",
            help=f"Measure this score of the whole image too; repeatable: "
            f"{help_of(image_scores())}",
            rich_help_panel=HOW,
        ),
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    cache: Cache = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure by MC Dropout how uncertain a network is about images, with or without masks.

    Example: polyseg estimate-uncertainty runs/first --data new/images --samples 50
    """
    with talking(quiet, verbose) as display:
        from polyseg.commands import estimate_uncertainty
        from polyseg.runs.trained_model import Inputs

        outcome = estimate_uncertainty.estimate_uncertainty(
            source,
            Inputs(data, part, cache, device, trust),
            samples=samples,
            save_maps=maps,
            also=score or [],
            out=out,
            overwrite=overwrite,
            progress=display,
        )
    if rank_here() == 0:
        print_outcome(outcome, as_json)
