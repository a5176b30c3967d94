"""`polyseg data`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.choices import MODALITIES
from polyseg.cli import options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_mapping

data_app = options.App(help="Check, split, preview and create data sets.")


@data_app.command("check")
def data_check(
    path: options.DataPath,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Read every image and mask of a data set, and print a summary and all problems.

    Example: polyseg data check my/images
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *options.as_overrides({"data.path": path})])
    with messages(quiet, verbose) as display:
        from polyseg.commands import data

        found = data.check_data(settings, display)
    print_mapping(path, found, as_json)


@data_app.command("split")
def data_split(
    path: options.DataPath,
    out: Annotated[Path, options.in_out(metavar="FILE", help="File to write.")] = Path(
        "split.json"
    ),
    overwrite: options.Overwrite = False,
    fold: Annotated[int | None, options.fold("data.folds")] = None,
    overrides: options.Overrides = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Split a data set into training, validation and test images, for `train --split`.

    Example: polyseg data split my/images --fold 0 --out fold_0.json --set data.folds=10
    """
    from polyseg.config import load_config

    flags = options.as_overrides({"data.path": path, "data.fold": fold})
    settings = load_config(None, [*(overrides or []), *flags])
    with messages(quiet, verbose) as display:
        from polyseg.commands import data

        found = data.make_split(settings, out, display, overwrite=overwrite)
    print_mapping(path, found, as_json)


@data_app.command("preview")
def data_preview(
    path: options.DataPath = "demo",
    out: options.FigureFile = Path("preview"),
    overwrite: options.Overwrite = False,
    images: Annotated[int, options.setting(help="Number of images, each in its own row.")] = 4,
    samples: Annotated[int, options.setting(help="Number of augmented samples per image.")] = 5,
    overrides: options.Overrides = None,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw training images with their masks, before and after augmentation in the first epochs.

    Example: polyseg data preview my/images --set data.augmentation=strong --out strong.png
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *options.as_overrides({"data.path": path})])
    with messages(quiet, verbose) as display:
        from polyseg.commands import data_preview

        for file in data_preview.preview(
            settings,
            out=out,
            count=images,
            samples=samples,
            overwrite=overwrite,
            progress=display,
        ):
            print(file)


@data_app.command("manifest")
def data_manifest(
    path: options.DataPath,
    out: Annotated[Path, options.in_out(metavar="FILE", help="CSV file to write.")] = Path(
        "set.csv"
    ),
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write a draft of a manifest of images and masks, to edit and give as --data.

    Example: polyseg data manifest my/images --out set.csv
    """
    with messages(quiet, verbose):
        from polyseg.commands import data

        found = data.write_manifest(Path(path), out, overwrite=overwrite)
    print_mapping(path, found, as_json)


@data_app.command("demo")
def data_demo(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="New folder.")],
    images: Annotated[int, options.setting(help="Number of images.")] = 160,
    size: Annotated[int, options.setting(help="Height and width in pixels.")] = 128,
    modality: Annotated[str, options.one_of(MODALITIES)] = "ultrasound",
    seed: Annotated[int, options.setting(help="Random seed for the phantoms.")] = 0,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Write the images of the demo, phantoms of lesions of known difficulty, as PNG files.

    Example: polyseg data demo phantoms --images 20 --modality endoscopy
    """
    with messages(quiet, verbose):
        from polyseg.commands import data

        data.write_demo(path, count=images, size=size, modality=modality, seed=seed)
        print(path)
