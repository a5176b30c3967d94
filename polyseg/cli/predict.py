"""`polyseg predict`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.cli.display import talking
from polyseg.cli.options import HOW, WHERE, AsJson, Device, Overwrite, Quiet, Source, Trust, Verbose
from polyseg.cli.printing import print_outcome
from polyseg.system.process_group import rank_here


def predict(
    source: Source,
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="IMAGE|DIR ...",
            help="Images, folders of images, or a folder of a DICOM series.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="DIR", help="New folder for the masks.", rich_help_panel=WHERE
        ),
    ],
    overwrite: Overwrite = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write maps of the uncertainty as well, and difficulties into the table.",
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
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment images: write a mask of the size, spacing, orientation and format of each.

    Example: polyseg predict runs/first new/images --out masks
    """
    with talking(quiet, verbose) as display:
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
    if rank_here() == 0:
        print_outcome(outcome, as_json)
