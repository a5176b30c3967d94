"""`polyseg predict`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli import options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_outcome


def predict(
    source: options.Source,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|DIR ...",
            help="Images, folders of images, or a folder of a DICOM series.",
        ),
    ],
    out: Annotated[Path, options.in_out(metavar="DIR", help="New folder for the masks.")],
    overwrite: options.Overwrite = False,
    uncertainty: Annotated[
        bool,
        options.setting(
            "--uncertainty",
            help="Also write uncertainty maps, and difficulties in the table.",
        ),
    ] = False,
    samples: options.Passes = None,
    device: options.Device = "auto",
    trust: options.Trust = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Segment images, and write masks with the size, spacing, orientation and format of the images.

    Example: polyseg predict runs/first new/images --out masks
    """
    with messages(quiet, verbose) as display:
        from polyseg.commands import predict

        outcome = predict.predict_images(
            source,
            paths,
            out=out,
            overwrite=overwrite,
            uncertainty=uncertainty,
            samples=samples,
            device=device,
            trust=trust,
            progress=display,
        )
    print_outcome(outcome, as_json)
