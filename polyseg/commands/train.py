"""`polyseg train`: prepare data, split and run folder, train, test and draw figures."""

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyseg.adaptive.recorded_schedule import arm_schedule, replay_seed
from polyseg.adaptive.replay import fit_schedule, replay_arm
from polyseg.choices import REPLAY_ARMS, loss_of
from polyseg.commands.outcome import Outcome
from polyseg.commands.resumed_settings import (
    recorded_config,
    refuse_changed_environment,
    resumed_config,
)
from polyseg.commands.schedule import read_record
from polyseg.config import Config, DataConfig
from polyseg.data.dataset import ImageSet, member_of
from polyseg.data.image_cache import MEGABYTE
from polyseg.data.layouts.cases import counted
from polyseg.data.loading import load_images, settled
from polyseg.data.new_split import new_split
from polyseg.data.pixel_store import MemoryStore
from polyseg.data.splits import PARTS, Split, groups_of_parts, split_json
from polyseg.errors import Interrupted, PolysegError
from polyseg.evaluation.scores import Evaluation
from polyseg.evaluation.testing_networks import ImageTest, patients_of, score
from polyseg.figures import evaluation_files, run_figures
from polyseg.figures.figures_by_name import RunRecords
from polyseg.networks.inference import choose_device
from polyseg.records import Assessment, Progress, Schedule, no_progress
from polyseg.runs.assessment_text import describe_order, difficulty_correlations
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.record_files import read_schedule, write_schedule
from polyseg.runs.run_folder import RunDirectory, environment, new_run_path, read_assessments
from polyseg.runs.trained_model import split_of_run
from polyseg.runs.weights import network_of
from polyseg.system.memory import keep_freed_memory
from polyseg.system.process_group import ALONE, PATIENCE, Processes, together
from polyseg.training.own_code import recorded_code
from polyseg.training.trainer import Trainer

log = logging.getLogger(__name__)

_LIKELY_SAMPLES = 20
"""Number N of passes that a plan assumes for uncertainty.samples auto."""


def train(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Train, test the best checkpoint, and draw the figures.

    Args:
        config: the settings.
        resume: continue the run in the folder.
        accept_changes: resume although versions, device or some settings differ, so that the result
            may differ from an uninterrupted run.
        progress: called with the progress of each task.

    Raises:
        Interrupted: a signal ended the training; its last epoch is committed.
    """
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        with together(choose_device(config.training.device), PATIENCE) as processes:
            # All processes use the leader's name, which may contain the time.
            name = processes.from_leader(config.output.path or str(new_run_path()))
            how = _RunContext(RunDirectory(Path(name)), processes, accept_changes, progress)
            trainer = (_resume if resume else _start)(config, how, stack)
            trainer.fit()
        if not processes.leads:
            return Outcome(trainer.run.path, [])
        try:
            return _report(trainer, progress)
        except Interrupted as end:
            hint = f"`polyseg train --resume --out {trainer.run.path}` tests and draws figures"
            raise Interrupted(end.number, f"{end} after the last epoch; {hint}") from None


class _RunContext(NamedTuple):
    """The surroundings in which a run is started or resumed."""

    run: RunDirectory
    processes: Processes
    accept_changes: bool
    progress: Progress


def _start(config: Config, how: _RunContext, stack: contextlib.ExitStack) -> Trainer:
    """Return the trainer of a new run; the leading process locks and writes its folder."""
    run = how.run
    # Check everything before the first file is written, so that an error leaves no folder.
    trainer, replay = _new(recorded_config(config, config.training.epochs), how)
    if how.processes.leads:
        stack.enter_context(run.writing(resume=False))
        now = environment(trainer.device, how.processes.count) | recorded_code(trainer.config)
        split = split_json(trainer.split, trainer.images.hashes)
        recorded = run.begin(trainer.config, split, now)
        stack.enter_context(_log_file(run.log))
        copied = "" if replay is None else write_schedule(run.replay, replay)
        trainer.record_hashes(replay=copied, split=recorded)
        _log_start(trainer)
    return trainer


def _new(config: Config, how: _RunContext) -> tuple[Trainer, Schedule | None]:
    """Return the trainer of a new run, and the schedule that it replays, without writing a file."""
    config = config.model_copy(update={"data": settled(config.data)})
    if how.processes.leads:
        how.run.refuse_occupied()
    images = load_images(config.data, how.progress)
    split = new_split(config, images)
    replay = _schedule_to_replay(config, images, split)
    trainer = Trainer(config, images, split, how.run, how.progress, replay, how.processes)
    return trainer, replay


def _resume(config: Config, how: _RunContext, stack: contextlib.ExitStack) -> Trainer:
    """Return the trainer of a resumed run; the leading process locks its folder."""
    run = how.run
    if how.processes.leads:
        run.refuse_missing()
        # Lock the folder first, so that no other process writes while it is read.
        stack.enter_context(run.writing(resume=True))
        stack.enter_context(_log_file(run.log))
    trainer, checkpoint, changes = _restored(config, how)
    trainer.resume(checkpoint)
    if how.processes.leads:
        run.write_config(trainer.config)
        log.info("resumed after epoch %d", trainer.epoch)
        place, former = trainer.config.data.path, checkpoint.config.data.path
        if place != former:
            log.info("images are read from %s instead of %s", place, former)
        if changes:
            log.warning("changed since the run was started: %s", "; ".join(changes))
            now = environment(trainer.device, how.processes.count) | recorded_code(trainer.config)
            run.note_resumption(trainer.epoch, now)
        _log_start(trainer)
    return trainer


def _restored(config: Config, how: _RunContext) -> tuple[Trainer, Checkpoint, list[str]]:
    """Return trainer, checkpoint and changes of the environment for a run to resume.

    All processes read the run's folder, and only the leading one writes to it.
    """
    run, processes = how.run, how.processes
    checkpoint = processes.from_leader(run.checkpoint_to_resume() if processes.leads else None)
    config = resumed_config(config, run, checkpoint, how.accept_changes)
    now = environment(choose_device(config.training.device), processes.count)
    now |= recorded_code(config)
    changes = run.changes_of_environment(now) if processes.leads else []
    refuse_changed_environment(run, changes, config.training, how.accept_changes)
    images = load_images(config.data, how.progress)
    split = split_of_run(run, images, checkpoint.split)
    replay = _schedule_to_replay(config, images, split, run, checkpoint.replay)
    trainer = Trainer(config, images, split, run, how.progress, replay, processes)
    return trainer, checkpoint, changes


def plan(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return the amount of work of a training run, or of the rest of a run to resume.

    A training image counts as three passes, one forward and two for the gradients, and each pass of
    MC Dropout as one, as without compilation.
    """
    run = RunDirectory(Path(config.output.path) if config.output.path else new_run_path())
    how = _RunContext(run, ALONE, accept_changes, progress)
    if resume:
        run.refuse_missing()
        trainer, checkpoint, _ = _restored(config, how)
        done = checkpoint.epoch
    else:
        trainer, done = _new(config, how)[0], -1
    return _amount_of_work(trainer, done, _cost_of_size(config.data, trainer))


def _amount_of_work(trainer: Trainer, done: int, size: str) -> dict[str, Any]:
    """Return the work that is left after `done` epochs; -1 for a new run."""
    config, split = trainer.config, trainer.split
    members = [member_of(item) for item in trainer.images.items]
    groups = groups_of_parts(split, members, config.data)
    epochs = config.training.epochs - max(done, 0)
    moments = config.control.assessment_epochs(config.training.epochs) if config.assesses else []
    moments = [epoch for epoch in moments if epoch > done]
    idle = moments[-1:] == [config.training.epochs]
    uncertainty = config.uncertainty
    samples = _LIKELY_SAMPLES if uncertainty.samples == "auto" else uncertainty.samples
    stochastic = len(moments) * len(split["train"]) * (samples if uncertainty.takes_passes else 1)
    plain = epochs * (3 * len(split["train"]) + len(split["val"]))
    return {
        "images": {part: len(ids) for part, ids in split.items()},
        **({"groups": groups} if groups else {}),
        "size of the network's input": size,
        "channels": trainer.images.channels,
        **({"epochs done": done} if done >= 0 else {}),
        "epochs": epochs,
        "training steps": epochs * -(-len(split["train"]) // config.training.batch_size),
        "assessed after epochs": moments,
        **({"recorded only, because no epoch follows": moments[-1:]} if idle else {}),
        "MC Dropout passes, all images together": stochastic,
        "share of the computing that is MC Dropout, at most": round(
            stochastic / (stochastic + plain), 3
        ),
    }


def _cost_of_size(asked: DataConfig, trainer: Trainer) -> str:
    """Return one line with the size of the network's input, its origin and its cost."""
    images = trainer.images
    if images.tiling is not None:
        size = f"tiles of {_range_of([images.tiling.size])}"
    else:
        size = _range_of(list(images.sizes()))
    if asked.size == "auto":
        rule = "the demo's size" if asked.path == "demo" else "the images' median, at most 256"
        size += f" (data.size=auto: {rule})"
    stored = sum(item.bytes for item in images.items) / MEGABYTE
    pixels = sum(math.prod(images.item(identity).size) for identity in trainer.split["train"])
    place = "memory" if isinstance(images.store, MemoryStore) else "a file"
    return (
        f"{size}; images and masks take {stored:.1f} MB in {place}; a pass "
        f"over the training images has {pixels / 1e6:.2g} million pixels"
    )


def _schedule_to_replay(
    config: Config,
    images: ImageSet,
    split: Split,
    run: RunDirectory | None = None,
    sha256: str | None = None,
) -> Schedule | None:
    """Return the schedule of control.replay, or its copy in a resumed run; None without replay."""
    control = config.control
    if control.replay is None:
        return None
    path = Path(control.replay) if run is None else run.replay
    schedule = _recorded(path) if path.is_dir() else read_schedule(path, sha256=sha256)
    terms = config.loss.polydice_terms or 1
    # With early stopping, the recorded run may have fewer epochs.
    epochs = 1 if config.training.early_stopping else config.training.epochs
    fitted = fit_schedule(schedule, split["train"], images.labels, epochs, terms, str(path))
    if run is not None:
        return fitted
    if REPLAY_ARMS[control.replay_arm].of_difficulty:
        schedule = _arm_of_difficulty(config, images, split, path)
        return fit_schedule(schedule, split["train"], images.labels, epochs, terms, str(path))
    return replay_arm(fitted, control.replay_arm, replay_seed(config))


def _arm_of_difficulty(config: Config, images: ImageSet, split: Split, path: Path) -> Schedule:
    """Return the schedule from the D of an arm, with the settings and batches of the new run."""
    arm = config.control.replay_arm
    if not path.is_dir():
        raise PolysegError(
            f"{path}: control.replay_arm {arm} needs the assessments of a run; name its folder"
        )
    record = read_record(path)
    if len(record.labels) > 1 and record.labels != list(images.labels):
        raise PolysegError(
            f"{path}: control.replay_arm {arm} needs the labels of the recorded run in the same "
            f"order, {', '.join(record.labels)} (data.foreground)"
        )
    return arm_schedule(record, config, arm, split["train"])


def _recorded(run: Path) -> Schedule:
    """Return the committed schedule of a run, or its file if there is no checkpoint."""
    folder = RunDirectory(run)
    schedule = read_checkpoint(folder.last).schedule if folder.last.is_file() else None
    return read_schedule(folder.schedule) if schedule is None else schedule


class _LogHandler(logging.FileHandler):
    """Ignores errors of writing; a full disk is reported when a necessary file is written."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Drop the line."""


@contextlib.contextmanager
def _log_file(path: Path) -> Iterator[None]:
    """Write the messages of the package to the run's log.txt as well."""
    # In a folder from a stranger a link may point to any file.
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise PolysegError(f"{path}: is not a regular file, so no log can be written; remove it")
    handler, logger = _LogHandler(path, encoding="utf-8"), logging.getLogger("polyseg")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        with contextlib.suppress(OSError):
            handler.close()


def _log_start(trainer: Trainer) -> None:
    config, images, split = trainer.config, trainer.images, trainer.split
    log.info("%s", _describe_data(images, split, config.data))
    log.info("run folder %s", trainer.run.path)
    if config.control.replay is not None:
        arm = config.control.replay_arm
        if arm in ("shuffled", "permuted"):
            arm += f", seed {replay_seed(config)}"
        log.info("epsilon is replayed from %s (%s): no MC Dropout", config.control.replay, arm)
    empty = sum(not images.item(identity).foreground for identity in split["train"])
    learns_empty = config.loss.bce_weight > 0 or config.loss.smooth >= 1
    if empty and "smooth" in loss_of(config.loss.name).parameters and not learns_empty:
        log.warning(
            "%d of %d training masks are empty, and %s with smooth %g hardly learns from them; "
            "set loss.smooth=1, loss.bce_weight above 0, or data.training_slices=foreground",
            empty,
            len(split["train"]),
            config.loss.name,
            config.loss.smooth,
        )


def _describe_data(images: ImageSet, split: Split, config: DataConfig) -> str:
    """Return one line about the data: number and sizes of images, parts of the split, groups."""
    items = [images.item(identity) for part in PARTS for identity in split[part]]
    what = counted(len(items), "phantom" if config.path == "demo" else "image")
    size = _range_of([item.original_size for item in items])
    if images.tiling is not None:
        size += f" -> tiles of {_range_of([images.tiling.size])}"
    elif any(item.size != item.original_size for item in items):
        size += f" -> {_range_of([item.size for item in items])}"
    counts = ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    groups = groups_of_parts(split, [member_of(item) for item in items], config)
    shares = ", ".join(f"{number} {part}" for part, number in groups.items())
    return f"{what} of {size}: {counts}" + (f"; groups: {shares}" if groups else "")


def _range_of(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest size by area.

    >>> _range_of([(96, 64), (512, 640), (96, 64)])
    '96 x 64 to 512 x 640'
    """
    ends = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return " to ".join(dict.fromkeys(f"{h} x {w}" for h, w in (ends[0], ends[-1])))


def _best_of(trainer: Trainer) -> Checkpoint:
    """Return the best checkpoint; PolysegError if it belongs to another network."""
    best = read_checkpoint(trainer.run.best)
    if best.config.network != trainer.config.network:
        raise PolysegError(f"{trainer.run.best}: belongs to another network than this run")
    if best.epoch != trainer.best_epoch:
        log.warning(
            "%s is from epoch %d; the checkpoint of the best epoch %d is lost",
            *(trainer.run.best, best.epoch, trainer.best_epoch),
        )
    return best


def _report(trainer: Trainer, progress: Progress) -> Outcome:
    """Test the best checkpoint and draw the figures."""
    run, config, images = trainer.run, trainer.config, trainer.images
    files = [run.history]
    evaluation: Evaluation | None = None
    part = next((one for one in ("test", "val") if trainer.split[one]), None)
    if part is not None:
        if part == "val":
            log.warning(
                "there is no test set: the metrics are those of the validation images, on which "
                "the best epoch was chosen"
            )
        checkpoint = _best_of(trainer)
        log.info("testing the weights of epoch %d on the %s images", checkpoint.epoch, part)
        best = network_of(checkpoint, trust=True).to(trainer.device)
        ids, size = trainer.split[part], config.training.batch_size
        groups = patients_of(images, config.data)
        test = ImageTest(run.path.name, images, ids, size, progress=progress, groups=groups)
        evaluation = Evaluation(score(best, test), part=part)
        files += evaluation_files.write_evaluation(
            evaluation, run.evaluation, figures=config.output.figures
        )
    correlations: list[dict[str, Any]] = []
    notes: list[str] = []
    assessments: list[Assessment] = []
    if trainer.assessments:
        assessments = read_assessments(run, trainer.assessments)
        correlations = difficulty_correlations(assessments[-1], images.known_difficulty)
        notes = describe_order(assessments[-1])
    if config.output.figures:
        progress("drawing figures", 0, 1)
        limits = (config.control.epsilon_min, config.control.epsilon_max)
        schedule = read_schedule(run.schedule)
        records = RunRecords(trainer.history, schedule, assessments, limits)
        files += run_figures.draw_run(records, run.figures)
        if assessments:
            files += run_figures.draw_extremes(
                trainer.network, config, images, assessments[-1], run.figures
            )
        progress("drawing figures", 1, 1)
    return Outcome(run.path, files, evaluation, correlations, notes)
