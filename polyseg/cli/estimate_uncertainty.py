"""`polyseg estimate-uncertainty`."""

from typing import Annotated

from polyseg.choices import image_scores
from polyseg.cli import options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_outcome


def estimate_uncertainty(
    source: options.Source,
    data: options.OtherData = None,
    part: Annotated[str | None, options.part("all")] = None,
    samples: Annotated[
        int | None,
        options.setting(
            metavar="N",
            help="Number of MC Dropout passes (default: uncertainty.samples of the run).",
        ),
    ] = None,
    maps: Annotated[bool, options.setting("--maps", help="Keep the pixel maps as well.")] = False,
    score: Annotated[
        list[str] | None,
        options.setting(
            metavar="NAME",
            help=f"Also compute this score of the whole image; repeatable: "
            f"{options.help_of(image_scores())}",
        ),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    cache: options.Cache = None,
    device: options.Device = "auto",
    trust: options.Trust = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
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
