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
        typer.Argument(metavar="IMAGE|DIR ...", help="Images, or folders of images or a series."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the masks, new.", rich_help_panel=WHERE)
    ],
    overwrite: Overwrite = False,
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write maps of the uncertainty too, and difficulties into the table.",
            rich_help_panel=HOW,
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(help="N, passes of MC Dropout for --uncertainty.", rich_help_panel=HOW),
    ] = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment images: a mask for each, of its size, spacing, orientation and format.

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
