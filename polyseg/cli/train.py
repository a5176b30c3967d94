"""`polyseg train`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.choices import DEVICES, LOSSES, REPLAY_ARMS
from polyseg.cli import completion
from polyseg.cli.display import talking
from polyseg.cli.options import (
    HOW,
    WHERE,
    AsJson,
    ConfigFile,
    Fold,
    Overrides,
    PresetName,
    Quiet,
    Trust,
    Verbose,
    as_overrides,
    help_of,
)
from polyseg.cli.printing import print_mapping, print_outcome
from polyseg.errors import PolysegError
from polyseg.registry import not_among
from polyseg.system.process_group import rank_here

_OF_THE_MACHINE = ("data.memory", "data.cache", "training.workers", "training.device")
"""Settings that say where and how, not what, so that those of another run are not taken over."""


def _refuse_data_set(config: Path | None) -> None:
    """Refuse a data set, or a run, that is given in place of CONFIG.yaml, and name the option."""
    if config is None or not (config.is_dir() or config.suffix.lower() == ".csv"):
        return
    option, what = ("--data", "a data set")
    if (config / "config.yaml").is_file():
        option, what = ("--resume --out", "a run")
    raise PolysegError(
        f"{config}: is {what}, not a file of settings; use polyseg train {option} {config}"
    )


def train(
    config: ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Data set: a folder, a CSV manifest or demo, built-in images (default: demo).",
            rich_help_panel=WHERE,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="New folder for the run (default: one in runs/, named by the time).",
            rich_help_panel=WHERE,
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Passes over the training images (default: 30).", rich_help_panel=HOW
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Random seed for weights, data order, augmentation and dropout (default: 0).",
            rich_help_panel=HOW,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{help_of(LOSSES.choices())}; default: polydice1.",
            autocompletion=completion.names(LOSSES.choices()),
            rich_help_panel=HOW,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"{help_of(DEVICES)}; default: auto.",
            autocompletion=completion.names(DEVICES),
            rich_help_panel=HOW,
        ),
    ] = None,
    preset: PresetName = None,
    fold: Fold = None,
    split: Annotated[
        Path | None,
        typer.Option(
            "--split",
            metavar="FILE",
            help="File of a split: split.json of a run or of `data split`, or nnU-Net's "
            "splits_final.json (default: split by data.split).",
            rich_help_panel=WHERE,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|SCHEDULE.h5",
            help="Use the epsilons that a run recorded, without MC Dropout, and the settings of "
            "that run unless CONFIG.yaml is given.",
            rich_help_panel=HOW,
        ),
    ] = None,
    replay_arm: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Which image gets which of the replayed epsilons: "
            f"{help_of(REPLAY_ARMS.choices())}; default: recorded.",
            autocompletion=completion.names(REPLAY_ARMS.choices()),
            rich_help_panel=HOW,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Continue the run in --out from its last committed epoch. With more --epochs it "
            "is continued for longer, and the learning rate follows the new number.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    accept_changes: Annotated[
        bool,
        typer.Option(
            "--accept-changes",
            help="Resume although versions, device, threads or learning rate differ; the result "
            "may then differ from an uninterrupted run.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    trust: Trust = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check data and settings and print the plan, without training.",
            rich_help_panel=HOW,
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network with a steeper loss for images that it is uncertain about; test it.

    Example: polyseg train --data my/images --out runs/first --set data.size=256
    """
    from polyseg.config import load_config, settings_of

    if resume and out is None:
        raise PolysegError("--resume needs --out, which names the run")
    if accept_changes and not resume:
        raise PolysegError("--accept-changes needs --resume")
    _refuse_data_set(config)
    from_run = None
    if resume and config is None and out is not None and (out / "checkpoints").is_dir():
        from_run = config = out / "config.yaml"
    if replay_arm is not None and replay is None:
        raise PolysegError("--replay-arm needs --replay, which names the run")
    if replay_arm is not None and replay_arm not in REPLAY_ARMS:
        raise PolysegError(f"--replay-arm {not_among(replay_arm, REPLAY_ARMS, REPLAY_ARMS.kind)}")
    own: list[str] = []
    if replay is not None and config is None and (replay / "config.yaml").is_file():
        from_run = config = replay / "config.yaml"
        defaults = {setting["key"]: setting["default"] for setting in settings_of()}
        own = ["output.path=null", *(f"{key}={defaults[key]}" for key in _OF_THE_MACHINE)]
    flags = {
        "data.path": data,
        "output.path": None if out is None else str(out),
        "training.epochs": epochs,
        "training.seed": seed,
        "training.device": device,
        "loss.name": loss,
        "data.fold": fold,
        "data.split_file": None if split is None else str(split),
        "control.replay": None if replay is None else str(replay),
        "control.replay_arm": None
        if replay is None
        else "recorded"
        if replay_arm is None
        else replay_arm,
    }
    settings = load_config(config, [*own, *(overrides or []), *as_overrides(flags)], preset)
    if from_run is not None and settings.own_code and not trust:
        setting, name = next(iter(settings.own_code.items()))
        raise PolysegError(
            f"{from_run}: its {setting} {name} is code outside polyseg; --trust imports and runs "
            "it, if you know where it is from"
        )
    how = {"resume": resume, "accept_changes": accept_changes}
    with talking(quiet, verbose) as display:
        from polyseg.commands import train

        found = (
            train.plan(settings, **how, progress=display)
            if dry_run
            else train.train(settings, **how, progress=display)
        )
    if rank_here():
        return
    if isinstance(found, dict):
        print_mapping("Plan", found, as_json)
    else:
        print_outcome(found, as_json)
