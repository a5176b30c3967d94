"""`polyseg train`."""

from pathlib import Path
from typing import Annotated

from polyseg.choices import DEVICES, LOSSES, REPLAY_ARMS
from polyseg.cli import options
from polyseg.cli.display import messages
from polyseg.cli.printing import print_mapping, print_outcome
from polyseg.errors import PolysegError
from polyseg.registry import not_among
from polyseg.system.process_group import rank_here

_OF_THE_MACHINE = ("data.memory", "data.cache", "training.workers", "training.device")
"""Settings of the machine, which are not taken over from a replayed run."""


def _refuse_data_set(config: Path | None) -> None:
    """Raise if CONFIG.yaml is a data set or a run, and name the right option."""
    if config is None or not (config.is_dir() or config.suffix.lower() == ".csv"):
        return
    option, what = ("--data", "a data set")
    if (config / "config.yaml").is_file():
        option, what = ("--resume --out", "a run")
    raise PolysegError(
        f"{config}: is {what}, not a file of settings; use polyseg train {option} {config}"
    )


def train(
    config: options.ConfigFile = None,
    data: Annotated[
        str | None,
        options.in_out(
            metavar="PATH",
            help="Data set: a folder, a CSV manifest, or `demo` for built-in images (default: "
            "demo).",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        options.in_out(
            metavar="DIR", help="New folder for the run (default: one in runs/, named by the time)."
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        options.setting(metavar="N", help="Passes over the training images (default: 30)."),
    ] = None,
    seed: Annotated[
        int | None,
        options.setting(
            metavar="N",
            help="Random seed for weights, data order, augmentation and dropout (default: 0).",
        ),
    ] = None,
    loss: Annotated[
        str | None,
        options.one_of(
            LOSSES.choices(), "polydice1", "Loss, with equations of the method (docs/method.md): "
        ),
    ] = None,
    device: Annotated[str | None, options.one_of(DEVICES, "auto")] = None,
    preset: options.PresetName = None,
    fold: Annotated[int | None, options.fold("data.folds or of the --split file")] = None,
    split: Annotated[
        Path | None,
        options.in_out(
            metavar="FILE",
            help="File of a split: split.json of a run or of `data split`, or nnU-Net's "
            "splits_final.json (default: split by data.split).",
        ),
    ] = None,
    replay: Annotated[
        Path | None,
        options.setting(
            metavar="RUN|SCHEDULE.h5",
            help="Use the epsilons that a run recorded, without MC Dropout, and the settings of "
            "that run unless CONFIG.yaml is given.",
        ),
    ] = None,
    replay_arm: Annotated[
        str | None,
        options.one_of(REPLAY_ARMS.choices(), "recorded", "Epsilon of an image in a --replay: "),
    ] = None,
    overrides: options.Overrides = None,
    resume: Annotated[
        bool,
        options.in_out(
            "--resume",
            help="Continue the run in --out from its last saved epoch. A larger --epochs extends "
            "the run, and the learning-rate schedule then uses the new number.",
        ),
    ] = False,
    accept_changes: Annotated[
        bool,
        options.in_out(
            "--accept-changes",
            help="With --resume: resume although versions, device, threads or learning rate "
            "differ; the result may then differ from an uninterrupted run.",
        ),
    ] = False,
    trust: options.Trust = False,
    dry_run: Annotated[
        bool,
        options.setting(
            "--dry-run", help="Check data and settings and print the plan, without training."
        ),
    ] = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Train a network with a steeper loss for images that it is uncertain about, then test it.

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
    if replay_arm is not None:
        if replay is None:
            raise PolysegError("--replay-arm needs --replay, which names the run")
        if replay_arm not in REPLAY_ARMS:
            wrong = not_among(replay_arm, REPLAY_ARMS, REPLAY_ARMS.kind)
            raise PolysegError(f"--replay-arm {wrong}")
    own: list[str] = []
    if replay is not None and config is None and (replay / "config.yaml").is_file():
        from_run = config = replay / "config.yaml"
        defaults = {one["key"]: one["default"] for one in settings_of()}
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
        "control.replay_arm": None if replay is None else replay_arm or "recorded",
    }
    settings = load_config(config, [*own, *(overrides or []), *options.as_overrides(flags)], preset)
    if from_run is not None and settings.own_code and not trust:
        key, name = next(iter(settings.own_code.items()))
        raise PolysegError(
            f"{from_run}: its {key} {name} is code outside polyseg; add --trust to import "
            "and run it, if you trust its author"
        )
    how = {"resume": resume, "accept_changes": accept_changes}
    with messages(quiet, verbose) as display:
        from polyseg.commands import train

        command = train.plan if dry_run else train.train
        found = command(settings, **how, progress=display)
    if rank_here():
        return
    if isinstance(found, dict):
        print_mapping("Plan", found, as_json)
    else:
        print_outcome(found, as_json)
