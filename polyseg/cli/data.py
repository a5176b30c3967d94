"""`polyseg data`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.choices import MODALITIES
from polyseg.cli.display import messages
from polyseg.cli.options import (
    App,
    AsJson,
    DataPath,
    FigureFile,
    Fold,
    Overrides,
    Overwrite,
    Quiet,
    Verbose,
    as_overrides,
    in_out,
    one_of,
    setting,
)
from polyseg.cli.printing import print_mapping

data_app = App(help="Check, divide, preview and make data sets.")


@data_app.command("check")
def data_check(
    path: DataPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read every image and mask of a data set, and print what was found and what is wrong.

    Example: polyseg data check my/images
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *as_overrides({"data.path": path})])
    with messages(quiet, verbose) as display:
        from polyseg.commands import data

        found = data.check_data(settings, display)
    print_mapping(path, found, as_json)


@data_app.command("split")
def data_split(
    path: DataPath,
    out: Annotated[Path, in_out(metavar="FILE", help="File to write.")] = Path("split.json"),
    overwrite: Overwrite = False,
    fold: Fold = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Divide a data set into training, validation and test images, for `train --split`.

    Example: polyseg data split my/images --fold 0 --out fold_0.json --set data.folds=10
    """
    from polyseg.config import load_config

    flags = as_overrides({"data.path": path, "data.fold": fold})
    settings = load_config(None, [*(overrides or []), *flags])
    with messages(quiet, verbose) as display:
        from polyseg.commands import data

        found = data.make_split(settings, out, display, overwrite=overwrite)
    print_mapping(path, found, as_json)


@data_app.command("preview")
def data_preview(
    path: DataPath = "demo",
    out: FigureFile = Path("preview"),
    overwrite: Overwrite = False,
    images: Annotated[int, setting(help="Number of images, each in its own row.")] = 4,
    samples: Annotated[int, setting(help="Number of augmented samples of each.")] = 5,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw training images with their masks, plain and as augmented in the first epochs.

    Example: polyseg data preview my/images --set data.augmentation=strong --out strong.png
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *as_overrides({"data.path": path})])
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
    path: DataPath,
    out: Annotated[Path, in_out(help="CSV file to write.")] = Path("set.csv"),
    overwrite: Overwrite = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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
    images: Annotated[int, setting(help="Number of images.")] = 160,
    size: Annotated[int, setting(help="Height and width in pixels.")] = 128,
    modality: Annotated[str, one_of(MODALITIES)] = "ultrasound",
    seed: Annotated[int, setting(help="Random seed for the phantoms.")] = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the images of the demo, phantoms of lesions of known difficulty, as PNG files.

    Example: polyseg data demo phantoms --images 20 --modality endoscopy
    """
    with messages(quiet, verbose):
        from polyseg.commands import data

        data.write_demo(path, count=images, size=size, modality=modality, seed=seed)
        print(path)
