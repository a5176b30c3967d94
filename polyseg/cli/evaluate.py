"""`polyseg evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

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
    Overrides,
    Overwrite,
    Part,
    Quiet,
    Trust,
    Verbose,
)
from polyseg.cli.printing import print_outcome
from polyseg.errors import PolysegError
from polyseg.system.process_group import rank_here

if TYPE_CHECKING:
    from polyseg.evaluation.testing_masks import OtherMasks


def evaluate(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CHECKPOINT|RUN ...", help="Checkpoints, or run folders."),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="DIR",
            help="Folder of masks that any tool has written, named as the images; repeatable.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            help="Name of the masks in tables, one for each --predictions.", rich_help_panel=WHERE
        ),
    ] = None,
    overrides: Overrides = None,
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
    at: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="original (compare masks at the size of their files) or network (at data.size, "
            "as version 0.1 did).",
            rich_help_panel=HOW,
        ),
    ] = "original",
    by: Annotated[
        str,
        typer.Option(
            metavar="CASE",
            help="patient (means, intervals and tests over patients, where the data or data.group "
            "tell them) or image (every image is a case).",
            rich_help_panel=HOW,
        ),
    ] = "patient",
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
    """Test networks, and masks of other tools, on the same images: tables, tests, figures.

    Example: polyseg evaluate runs/dice runs/adaptive --baseline runs/dice --out runs/comparison
    """
    with talking(quiet, verbose) as display:
        from polyseg.commands import evaluate
        from polyseg.evaluation.testing_networks import EvaluationSettings
        from polyseg.runs.trained_model import Inputs

        sources = sources or []
        outcome = evaluate.evaluate_runs(
            sources,
            EvaluationSettings(
                threshold=_threshold(threshold),
                by=_one_of("--by", by, "patient", "image"),
                at=_one_of("--at", at, "original", "network"),
                uncertainty=uncertainty,
                samples=samples,
                corruptions=evaluate.kinds_of_damage(corrupt),
                tolerance=tolerance,
                failure=failure,
            ),
            Inputs(data, part, cache, device, trust),
            masks=_masks(sources, predictions or [], name or [], data, overrides or []),
            baseline=baseline,
            group=group,
            out=out,
            overwrite=overwrite,
            figures=figures,
            progress=display,
        )
    if rank_here() == 0:
        print_outcome(outcome, as_json)


def _masks(
    sources: Sequence[Path],
    folders: Sequence[Path],
    names: Sequence[str],
    data: Path | None,
    overrides: Sequence[str],
) -> "OtherMasks | None":
    """Return the folders of --predictions by name; None without any."""
    from polyseg.config import load_config
    from polyseg.evaluation.testing_masks import OtherMasks
    from polyseg.system.files import short_names

    if not folders:
        if not sources:
            raise PolysegError("Missing argument: give runs, or --predictions with --data")
        if names or overrides:
            raise PolysegError("--name and --set: go with --predictions")
        return None
    if not sources and data is None:
        raise PolysegError("--predictions: give --data, the images with their true masks, or runs")
    if sources and overrides:
        raise PolysegError("--set: the runs say how masks are read; leave it out")
    if names and len(set(names)) != len(folders):
        raise PolysegError("--name: give a name of its own for each --predictions, or none")
    # At data.size null nothing is resized, since no network sees these images.
    settings = ["data.size=null", *overrides, *([f"data.path={data}"] if data else [])]
    config = load_config(overrides=settings).data
    return OtherMasks(dict(zip(names or short_names(folders), folders, strict=True)), config)


def _one_of(option: str, value: str, *choices: str) -> Any:
    if value not in choices:
        raise PolysegError(f"{option} {value}: choose {' or '.join(choices)}")
    return value


def _threshold(text: str) -> float | Literal["val"]:
    if text == "val":
        return "val"
    try:
        return float(text)
    except ValueError:
        raise PolysegError(f"--threshold {text}: a number above 0 and below 1, or val") from None
