"""`polyseg evaluate`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from polyseg.cli import completion, options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_outcome
from polyseg.errors import PolysegError

if TYPE_CHECKING:
    from polyseg.evaluation.testing_masks import OtherMasks


def evaluate(
    sources: Annotated[
        list[Path] | None,
        typer.Argument(metavar="CHECKPOINT|RUN ...", help="Checkpoints or folders of runs."),
    ] = None,
    predictions: Annotated[
        list[Path] | None,
        options.in_out(
            metavar="DIR",
            help="Folder of masks from any tool, each named like its image; repeatable.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        options.in_out(metavar="NAME", help="Name in tables for each --predictions; repeatable."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        options.setting(
            "--set",
            metavar="KEY=VALUE",
            help="How to read --predictions if no run is given, such as data.foreground=2; "
            "repeatable.",
            autocompletion=completion.setting,
        ),
    ] = None,
    data: options.OtherData = None,
    part: Annotated[str | None, options.part("test, or all of other images")] = None,
    out: Annotated[
        Path | None,
        options.out_in("the folder of the run, or in the folder that several runs share"),
    ] = None,
    overwrite: options.Overwrite = False,
    baseline: Annotated[
        str | None,
        options.setting(
            metavar="RUN",
            help="Run, or arm, to compare the others with: paired differences, bootstrap "
            "intervals, Wilcoxon's test with Holm's correction, and, with an adaptive arm, a "
            "sentence on whether adapting helped (default: no comparison).",
        ),
    ] = None,
    group: Annotated[
        bool,
        options.setting(
            "--group", help="Combine runs that differ only by seed or fold into one arm."
        ),
    ] = False,
    threshold: Annotated[
        str,
        options.setting(
            metavar="P",
            help="Probability from which a pixel is foreground, between 0 and 1; or val: the one "
            "with the best Dice on the validation images.",
        ),
    ] = "0.5",
    at: Annotated[
        str,
        options.setting(
            metavar="SIZE",
            help="Size at which masks are compared: original (that of their files) or network "
            "(data.size, as in version 0.1).",
        ),
    ] = "original",
    by: Annotated[
        str,
        options.setting(
            metavar="CASE",
            help="What counts as one case in means, intervals and tests: patient (all of its "
            "images together; each image where patients are unknown) or image.",
        ),
    ] = "patient",
    uncertainty: Annotated[
        bool,
        options.setting(
            "--uncertainty",
            help="Test the mean of the MC Dropout passes as well, and whether D finds failures.",
        ),
    ] = False,
    samples: options.Passes = None,
    corrupt: Annotated[
        str | None,
        options.setting(
            metavar="KIND,...",
            help="Test on corrupted images as well: noise, blur, contrast, gamma, bias, motion, "
            "speckle, resolution, jpeg, or all.",
        ),
    ] = None,
    tolerance: Annotated[
        float,
        options.setting(
            metavar="MM",
            help="Tolerance of the surface Dice, in mm where spacings are known, else in pixels.",
        ),
    ] = 2.0,
    failure: Annotated[
        float, options.setting(metavar="DICE", help="Dice below which an image counts as failed.")
    ] = 0.7,
    figures: Annotated[
        bool, options.in_out("--figures/--no-figures", help="Draw the figures.")
    ] = True,
    cache: options.Cache = None,
    device: options.Device = "auto",
    trust: options.Trust = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Test networks, and masks of other tools, on the same images: tables, tests, figures.

    Example: polyseg evaluate runs/dice runs/adaptive --baseline runs/dice --out runs/comparison
    """
    with messages(quiet, verbose) as display:
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
                corruptions=evaluate.corruption_names(corrupt),
                tolerance=tolerance,
                failure=failure,
            ),
            Inputs(data, part, cache, device, trust),
            evaluate.ComparisonSettings(baseline, group, out, overwrite, figures),
            masks=_masks(sources, predictions or [], name or [], data, overrides or []),
            progress=display,
        )
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
            raise PolysegError("--name and --set need --predictions")
        return None
    if not sources and data is None:
        raise PolysegError("--predictions needs runs, or --data with images and true masks")
    if sources and overrides:
        raise PolysegError("--set: leave it out, because the runs define how masks are read")
    if names and len(set(names)) != len(folders):
        raise PolysegError("--name: give each --predictions its own name, or none")
    # With data.size null nothing is resized, since no network uses these images.
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
        raise PolysegError(
            f"--threshold {text}: choose a number above 0 and below 1, or val"
        ) from None
