"""`polyseg train`."""

from pathlib import Path
from typing import Annotated

import typer

from polyseg.choices import DEVICES, LOSSES, REPLAY_ARMS
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


def train(
    config: ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of a data set, CSV manifest, or 'demo'.", rich_help_panel=WHERE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, new.", rich_help_panel=WHERE)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images.", rich_help_panel=HOW)
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Random seed for weights, data order, augmentation and dropout.",
            rich_help_panel=HOW,
        ),
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help=help_of(LOSSES.choices()),
            rich_help_panel=HOW,
        ),
    ] = None,
    preset: PresetName = None,
    device: Annotated[str | None, typer.Option(help=help_of(DEVICES), rich_help_panel=HOW)] = None,
    fold: Fold = None,
    split: Annotated[
        Path | None,
        typer.Option(
            "--split",
            metavar="FILE",
            help="split.json of a run or of `data split`, or nnU-Net's splits_final.json.",
            rich_help_panel=WHERE,
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN|SCHEDULE.h5",
            help="Use the epsilons that a run recorded, without MC Dropout; without CONFIG.yaml "
            "with that run's settings too.",
            rich_help_panel=HOW,
        ),
    ] = None,
    replay_arm: Annotated[
        str | None,
        typer.Option(
            help=f"Which image gets which of the replayed epsilons: "
            f"{help_of(REPLAY_ARMS.choices())}",
            rich_help_panel=HOW,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out; with --epochs for longer, the learning rate then "
            "following the new number.",
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
            "--dry-run", help="Check all, print the plan, train nothing.", rich_help_panel=HOW
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network, measure its uncertainty as it learns, test it, draw the figures.

    Example: polyseg train --data my/images --out runs/first --set data.size=256
    """
    from polyseg.config import load_config, settings_of

    if resume and out is None:
        raise PolysegError("--resume: name the run by --out")
    if accept_changes and not resume:
        raise PolysegError("--accept-changes needs --resume")
    from_run = None
    if resume and config is None and out is not None and (out / "checkpoints").is_dir():
        from_run = config = out / "config.yaml"
    if replay_arm is not None and replay is None:
        raise PolysegError("--replay-arm: of what? name the run by --replay")
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
