"""`polyseg train`: data, split and run folder put together, and what a run ends with."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from polyseg import report, results
from polyseg.cache import read_schedule, write_schedule
from polyseg.config import POLYDICE_LOSSES, Config
from polyseg.data.dataset import ImageSet
from polyseg.data.loading import load_images
from polyseg.data.splits import PARTS, Split
from polyseg.errors import PolysegError
from polyseg.evaluate import Evaluation
from polyseg.jobs.models import new_split, split_of_run
from polyseg.jobs.testing import score
from polyseg.jobs.uncertainty import draw_extremes
from polyseg.memory import keep_freed_memory
from polyseg.records import Progress, Schedule, no_progress
from polyseg.replay import fit_schedule, replay_arm
from polyseg.report import Outcome
from polyseg.run import RunDirectory, new_run_path, read_checkpoint
from polyseg.train import Trainer

log = logging.getLogger(__name__)

_LIKELY_SAMPLES = 20
"""What a plan takes for N where the passes are to choose it."""
_FREE_TO_CHANGE = (
    "training.epochs",
    "training.device",
    "training.workers",
    "data.memory",
    "data.cache",
    "output.",
)


def train(config: Config, *, resume: bool = False, progress: Progress = no_progress) -> Outcome:
    """Train, test the best checkpoint, draw the figures.

    Raises:
        PolysegError: data, settings or folder are not in order.
        Interrupted: a signal ended the training; its last epoch is committed.
    """
    keep_freed_memory()
    run = RunDirectory(Path(config.output.path) if config.output.path else new_run_path())
    if resume:
        config = resumed_config(config, run)
    else:
        config = _settled(config, config.training.epochs)
        run.refuse_occupied()
    images = load_images(config.data, progress)
    split = split_of_run(run, images) if resume else new_split(config, images)
    # Before anything is written: what is wrong with the settings leaves no folder behind.
    replay = _schedule_to_replay(config, images, split, run.replay if resume else None)
    trainer = Trainer(config, images, split, run, progress, replay)
    with run.writing(resume=resume), _LogFile(run.log):
        if resume:
            trainer.resume()
            run.write_config(config)
        else:
            run.begin(config, split, images.hashes, trainer.device)
            if replay is not None:
                trainer.replay_sha256 = write_schedule(run.replay, replay)
        _log_start(trainer)
        trainer.fit()
        return _report(trainer, progress)


def plan(config: Config, *, progress: Progress = no_progress) -> dict[str, Any]:
    """Return what a training run would cost, without training: counts and the share of MC Dropout.

    A training image is counted as three passes, one forward and two for the gradients, and each of
    MC Dropout as a whole one, which it is where the network cannot be taken apart.

    Raises:
        PolysegError: data, settings or folder are not in order.
    """
    run = RunDirectory(Path(config.output.path) if config.output.path else new_run_path())
    run.refuse_occupied()
    images = load_images(config.data, progress)
    split = new_split(config, images)
    _schedule_to_replay(config, images, split)
    Trainer(config, images, split, run)  # which checks the network
    epochs = config.training.epochs
    moments = config.control.assessment_epochs(epochs) if config.assesses else []
    uncertainty = config.uncertainty
    samples = _LIKELY_SAMPLES if uncertainty.samples == "auto" else uncertainty.samples
    stochastic = len(moments) * len(split["train"]) * (samples if uncertainty.takes_passes else 1)
    plain = epochs * (3 * len(split["train"]) + len(split["val"]))
    return {
        "images": {part: len(ids) for part, ids in split.items()},
        "image sizes": sorted(f"{height} x {width}" for height, width in images.sizes()),
        "channels": images.channels,
        "epochs": epochs,
        "training steps": epochs * -(-len(split["train"]) // config.training.batch_size),
        "assessed after epochs": moments,
        "MC-Dropout passes of an image": stochastic,
        "share of MC Dropout, at most": round(stochastic / (stochastic + plain), 3),
    }


def _schedule_to_replay(
    config: Config, images: ImageSet, split: Split, copy: Path | None = None
) -> Schedule | None:
    """Return the epsilons that the settings ask for, or a resumed run's own copy of them.

    Raises:
        PolysegError: there is no such schedule, or it does not fit.
    """
    control = config.control
    if control.replay is None:
        return None
    path = Path(control.replay) if copy is None else copy
    path = RunDirectory(path).schedule if path.is_dir() else path
    schedule = read_schedule(path)
    terms = config.loss.terms if config.loss.name == "polydice" else 1
    # A run that is to stop early was perhaps recorded by one that did.
    epochs = 1 if config.training.early_stopping else config.training.epochs
    schedule = fit_schedule(schedule, split["train"], images.labels, epochs, terms, str(path))
    if copy is not None:
        return schedule
    return replay_arm(schedule, control.replay_arm, config.training.seed)


def resumed_config(config: Config, run: RunDirectory) -> Config:
    """Return the configuration to go on with: the run's, with what may change from `config`.

    Raises:
        PolysegError: a setting differs that would change the result, by name.
    """
    recorded = run.checkpoint_to_resume().config
    config = _settled(config, recorded.training.epochs)
    wanted, kept = _flat(config.model_dump()), _flat(recorded.model_dump())
    differing = [
        f"{key} {kept[key]} -> {wanted[key]}"
        for key in wanted
        # By how they are written, because mappings that differ in order alone are equal.
        if repr(wanted[key]) != repr(kept.get(key)) and not key.startswith(_FREE_TO_CHANGE)
    ]
    if differing:
        raise PolysegError(
            f"{run.path}: --resume cannot change {'; '.join(differing)}; start a new run instead"
        )
    return config


def _settled(config: Config, epochs: int) -> Config:
    """Return the settings as a run keeps them: what hangs on where and how long is settled.

    That is a data path that holds from anywhere, and the first assessment in whole epochs, so that
    a run which is resumed for longer keeps it.
    """
    changes: dict[str, Any] = {}
    given = {"path": config.data.path, "split_file": config.data.split_file}
    paths = {
        name: str(Path(path).resolve())
        for name, path in given.items()
        if path not in (None, "demo")
    }
    changes["data"] = config.data.model_copy(update=paths)
    if config.control.replay is not None:
        replay = str(Path(config.control.replay).resolve())
        changes["control"] = config.control.model_copy(update={"replay": replay})
    elif config.adaptive:
        start = float(config.control.assessment_epochs(epochs)[0])
        changes["control"] = config.control.model_copy(update={"start": start})
    return config.model_copy(update=changes)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not prefix
        flat |= _flat(value, f"{key}.") if nested else {prefix + key: value}
    return flat


class _LogFile:
    """Everything that the package logs, also into the run's log.txt."""

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_file():
            raise PolysegError(f"{path}: is no file to log to")
        self.handler = logging.FileHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        logging.getLogger("polyseg").addHandler(self.handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("polyseg").removeHandler(self.handler)
        self.handler.close()


def _log_start(trainer: Trainer) -> None:
    config, images, split = trainer.config, trainer.images, trainer.split
    counts = ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    what = "demo phantoms" if config.data.path == "demo" else config.data.path
    log.info("%s: %s images; run folder %s", what, counts, trainer.run.path)
    if config.control.replay is not None:
        arm = config.control.replay_arm
        log.info("epsilon is replayed from %s (%s): no MC Dropout", config.control.replay, arm)
    if trainer.epoch:
        log.info("resumed after epoch %d", trainer.epoch)
        if changes := trainer.run.changes_of_environment(trainer.device):
            log.warning("results may differ in their last digits: %s", "; ".join(changes))
    empty = sum(not images.item(identity).foreground for identity in split["train"])
    pushes = config.loss.bce_weight > 0 or config.loss.smooth >= 1
    if empty and config.loss.name in (*POLYDICE_LOSSES, "dice", "tvmf") and not pushes:
        log.warning(
            "%d of %d training masks are empty, and %s with smooth %g hardly learns from them; "
            "set loss.smooth=1, loss.bce_weight above 0, or data.training_slices=foreground",
            empty,
            len(split["train"]),
            config.loss.name,
            config.loss.smooth,
        )


def _report(trainer: Trainer, progress: Progress) -> Outcome:
    """Test the best checkpoint and draw what there is to see."""
    run, config, images = trainer.run, trainer.config, trainer.images
    files = [run.history]
    evaluation: Evaluation | None = None
    if trainer.split["test"]:
        best = read_checkpoint(run.best).build(trust=True).to(trainer.device)
        ids, size = trainer.split["test"], config.training.batch_size
        evaluation = Evaluation(score(run.path.name, best, images, ids, size, progress=progress))
        files += results.write_evaluation(evaluation, run.evaluation, figures=config.output.figures)
    correlations: list[dict[str, Any]] = []
    if trainer.assessments:
        assessments = report.read_assessments(run, trainer.assessments)
        correlations = report.difficulty_correlations(assessments[-1], images.known_difficulty)
        report.log_correlations(correlations)
        if config.output.figures:
            files += report.draw_assessment(assessments[-1], run.figures)
            files += report.draw_difficulties(assessments, run.figures)
            files += draw_extremes(trainer.network, config, images, assessments[-1], run.figures)
    if config.output.figures:
        files += report.draw_history(trainer.history, run.figures)
        files += report.draw_schedule(np.stack(trainer.epsilons), config, run.figures)
    return Outcome(run.path, files, evaluation, correlations)
