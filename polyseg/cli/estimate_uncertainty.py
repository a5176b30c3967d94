"""`polyseg estimate-uncertainty`."""

from typing import Annotated

from polyseg.choices import image_scores
from polyseg.cli.display import messages
from polyseg.cli.options import (
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
    setting,
)
from polyseg.cli.printing import print_outcome


def estimate_uncertainty(
    source: Source,
    data: OtherData = None,
    part: Part = None,
    samples: Annotated[
        int | None,
        setting(
            metavar="N",
            help="Number of MC-Dropout passes (default: uncertainty.samples of the run).",
        ),
    ] = None,
    maps: Annotated[bool, setting("--maps", help="Keep the pixel maps as well.")] = False,
    score: Annotated[
        list[str] | None,
        setting(
            "--score",
            metavar="NAME",
            help=f"Measure this score of the whole image too; repeatable: "
            f"{help_of(image_scores())}",
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
    with messages(quiet, verbose) as display:
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
    print_outcome(outcome, as_json)
