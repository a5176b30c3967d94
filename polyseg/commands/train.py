"""`polyseg train`: data, split and run folder put together, and what a run ends with."""

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from polyseg.adaptive.recorded_schedule import arm_schedule, replay_seed
from polyseg.adaptive.replay import fit_schedule, replay_arm
from polyseg.choices import REPLAY_ARMS, loss_of
from polyseg.commands.outcome import Outcome
from polyseg.commands.schedule import read_record
from polyseg.config import Config, DataConfig, TrainingConfig
from polyseg.data.dataset import ImageSet, member_of
from polyseg.data.layouts.cases import counted
from polyseg.data.loading import load_images, settled
from polyseg.data.new_split import new_split
from polyseg.data.splits import PARTS, Split, group_names, split_json
from polyseg.errors import Interrupted, PolysegError
from polyseg.evaluation.scores import Evaluation
from polyseg.evaluation.testing_networks import patients_of, score
from polyseg.figures import evaluation_files, run_figures
from polyseg.figures.figures_by_name import RunRecords
from polyseg.networks.inference import choose_device
from polyseg.records import Assessment, Progress, Schedule, no_progress
from polyseg.runs.assessment_text import (
    describe_order,
    difficulty_correlations,
    log_correlations,
)
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.record_files import read_schedule, write_schedule
from polyseg.runs.run_folder import (
    RunDirectory,
    environment,
    new_run_path,
    read_assessments,
)
from polyseg.runs.trained_model import refuse_gone, split_of_run
from polyseg.runs.weights import network_of
from polyseg.system.memory import keep_freed_memory
from polyseg.system.process_group import ALONE, PATIENCE, Processes, together
from polyseg.training.own_code import recorded_code
from polyseg.training.trainer import Trainer

log = logging.getLogger(__name__)

_LIKELY_SAMPLES = 20
"""What a plan takes for N where the passes are to choose it."""
_FREE_TO_CHANGE = (
    "training.epochs",
    "training.device",
    "training.workers",
    "training.on_nonfinite",
    "data.path",
    "data.memory",
    "data.cache",
    "output.",
)
"""Settings that say where and how long; that the images are the same is checked one by one."""
_CHANGED_WHEN_TOLD = (
    "training.learning_rate",
    "training.weight_decay",
    "training.scheduler",
    "training.early_stopping",
    "training.precision",
    "training.compile",
    "training.channels_last",
    "training.deterministic",
)
"""What a run can be given anew without its record telling something untrue of earlier epochs."""
_DECISIVE = (
    "polyseg",
    "torch",
    "numpy",
    "monai",
    "scipy",
    "processor",
    "device",
    "threads",
    "own_code",
)
"""What moves at least the last digits of all that follows."""


def train(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Train, test the best checkpoint, draw the figures.

    Args:
        config: the settings.
        resume: go on with the run that is in the folder.
        accept_changes: go on although versions, machine or some settings are others, so that the
            result is not the one that the run would have had.
        progress: of all this.

    Raises:
        PolysegError: data, settings or folder are not in order.
        Interrupted: a signal ended the training; its last epoch is committed.
    """
    keep_freed_memory()
    with contextlib.ExitStack() as stack:
        with together(choose_device(config.training.device), PATIENCE) as processes:
            # A name made of the time is that of one moment.
            name = processes.from_leader(config.output.path or str(new_run_path()))
            how = _How(RunDirectory(Path(name)), processes, accept_changes, progress)
            trainer = (_resume if resume else _begin)(config, how, stack)
            trainer.fit()
        if not processes.leads:
            return Outcome(trainer.run.path, [])
        return _test_and_draw(trainer, progress)


class _How(NamedTuple):
    """How a run is begun or gone on with."""

    run: RunDirectory
    processes: Processes
    accept_changes: bool
    progress: Progress


def _begin(config: Config, how: _How, stack: contextlib.ExitStack) -> Trainer:
    """Return what trains a new run, whose folder is held and begun by the leading process."""
    run = how.run
    config = _settled(config, config.training.epochs)
    config = config.model_copy(update={"data": settled(config.data)})
    if how.processes.leads:
        run.refuse_occupied()
    images = load_images(config.data, how.progress)
    split = new_split(config, images)
    # Before anything is written: what is wrong with the settings leaves no folder behind.
    replay = _schedule_to_replay(config, images, split)
    trainer = Trainer(config, images, split, run, how.progress, replay, how.processes)
    if how.processes.leads:
        stack.enter_context(run.writing(resume=False))
        now = environment(trainer.device, how.processes.count) | recorded_code(config)
        recorded = run.begin(config, split_json(split, images.hashes), now)
        stack.enter_context(_LogFile(run.log))
        copied = "" if replay is None else write_schedule(run.replay, replay)
        trainer.relies_on(replay=copied, split=recorded)
        _log_start(trainer)
    return trainer


def _resume(config: Config, how: _How, stack: contextlib.ExitStack) -> Trainer:
    """Return what goes on with a run, whose folder is held by the leading process."""
    run = how.run
    if how.processes.leads:
        run.refuse_missing()
        # From the start, so that what is read here is not written meanwhile.
        stack.enter_context(run.writing(resume=True))
        stack.enter_context(_LogFile(run.log))
    trainer, checkpoint, changes = _taken_up(config, how)
    trainer.resume(checkpoint)
    if how.processes.leads:
        run.write_config(trainer.config)
        log.info("resumed after epoch %d", trainer.epoch)
        place, former = trainer.config.data.path, checkpoint.config.data.path
        if place != former:
            log.info("the images are read from %s, in place of %s", place, former)
        if changes:
            log.warning("not as it was before: %s", "; ".join(changes))
            now = environment(trainer.device, how.processes.count) | recorded_code(trainer.config)
            run.note_resumption(trainer.epoch, now)
        _log_start(trainer)
    return trainer


def _taken_up(config: Config, how: _How) -> tuple[Trainer, Checkpoint, list[str]]:
    """Return what goes on with a run, from where, and what has changed, which does not matter.

    All processes see the run's folder, and only the leading one changes it.
    """
    run, processes = how.run, how.processes
    checkpoint = processes.from_leader(run.checkpoint_to_resume() if processes.leads else None)
    config = resumed_config(config, run, checkpoint, how.accept_changes)
    now = environment(choose_device(config.training.device), processes.count)
    now |= recorded_code(config)
    changes = run.changes_of_environment(now) if processes.leads else []
    _refuse_changes(run, changes, config.training, how.accept_changes)
    refuse_gone(config.data, run.path)
    images = load_images(config.data, how.progress)
    split = split_of_run(run, images, checkpoint.split)
    replay = _schedule_to_replay(config, images, split, run, checkpoint.replay)
    trainer = Trainer(config, images, split, run, how.progress, replay, processes)
    return trainer, checkpoint, changes


def _test_and_draw(trainer: Trainer, progress: Progress) -> Outcome:
    try:
        return _report(trainer, progress)
    except Interrupted as end:
        how = f"`polyseg train --resume --out {trainer.run.path}` tests and draws"
        raise Interrupted(end.number, f"{end} after the last epoch; {how}") from None


def _refuse_changes(
    run: RunDirectory, changes: Sequence[str], training: TrainingConfig, accepted: bool
) -> None:
    """Raise where a run would go on with what gives other numbers.

    Raises:
        PolysegError: names what has changed.
    """
    names = {change.partition(" ")[0]: change for change in changes}
    # With another number of processes results are equal to rounding only, as with other threads.
    exact = training.sync_batch_norm and training.accumulate == 1
    decide = {*_DECISIVE, "processes"}
    if "processes" in names and exact:
        decide -= {"processes", "threads"}
    decisive = [change for name, change in names.items() if name in decide]
    if decisive and not accepted:
        threads = " (OMP_NUM_THREADS sets the threads)" if "threads" in decisive[-1] else ""
        raise PolysegError(
            f"{run.path}: would not go on as it began, because something has changed: "
            f"{'; '.join(decisive)}{threads}; --accept-changes goes on nevertheless"
        )


def plan(
    config: Config,
    *,
    resume: bool = False,
    accept_changes: bool = False,
    progress: Progress = no_progress,
) -> dict[str, Any]:
    """Return what a training run would cost, without training: counts and the share of MC Dropout.

    Of a run to be resumed that is what is left of it.

    A training image is counted as three passes, one forward and two for the gradients, and each of
    MC Dropout as a whole one, which it is where the network cannot be taken apart.

    Raises:
        PolysegError: data, settings or folder are not in order.
    """
    run = RunDirectory(Path(config.output.path) if config.output.path else new_run_path())
    done = -1
    if resume:
        run.refuse_missing()
        trainer, checkpoint, _ = _taken_up(config, _How(run, ALONE, accept_changes, progress))
        config, images, split, done = (
            *(trainer.config, trainer.images, trainer.split),
            checkpoint.epoch,
        )
    else:
        run.refuse_occupied()
        config = config.model_copy(update={"data": settled(config.data)})
        images = load_images(config.data, progress)
        split = new_split(config, images)
        _schedule_to_replay(config, images, split)
        Trainer(config, images, split, run)  # which checks the network
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
        "image sizes": sorted(f"{height} x {width}" for height, width in images.sizes()),
        "channels": images.channels,
        **({"epochs done": done} if resume else {}),
        "epochs": epochs,
        "training steps": epochs * -(-len(split["train"]) // config.training.batch_size),
        "assessed after epochs": moments,
        **({"only for the record, as no epoch follows": moments[-1:]} if idle else {}),
        "MC-Dropout passes, all images together": stochastic,
        "share of MC Dropout, at most": round(stochastic / (stochastic + plain), 3),
    }


def _schedule_to_replay(
    config: Config,
    images: ImageSet,
    split: Split,
    run: RunDirectory | None = None,
    sha256: str | None = None,
) -> Schedule | None:
    """Return the epsilons that the settings ask for, or the copy of them that `run` goes on with.

    Raises:
        PolysegError: there is no such schedule, or it does not fit.
    """
    control = config.control
    if control.replay is None:
        return None
    path = Path(control.replay) if run is None else run.replay
    schedule = _recorded(path) if path.is_dir() else read_schedule(path, sha256=sha256)
    terms = config.loss.polydice_terms or 1
    # A run that is to stop early was perhaps recorded by one that did.
    epochs = 1 if config.training.early_stopping else config.training.epochs
    fitted = fit_schedule(schedule, split["train"], images.labels, epochs, terms, str(path))
    if run is not None:
        return fitted
    if REPLAY_ARMS[control.replay_arm].of_difficulty:
        schedule = _arm_of_difficulty(config, images, split, path)
        return fit_schedule(schedule, split["train"], images.labels, epochs, terms, str(path))
    return replay_arm(fitted, control.replay_arm, replay_seed(config))


def _arm_of_difficulty(config: Config, images: ImageSet, split: Split, path: Path) -> Schedule:
    """Return the schedule by the D of an arm, with the settings and batches of the new run.

    Raises:
        PolysegError: the recorded run has no assessments, or others than the settings need.
    """
    arm = config.control.replay_arm
    if not path.is_dir():
        raise PolysegError(
            f"{path}: control.replay_arm {arm} needs the assessments of a run; name its folder"
        )
    record = read_record(path)
    if len(record.labels) > 1 and record.labels != list(images.labels):
        raise PolysegError(
            f"{path}: control.replay_arm {arm} needs the labels of that run in its order, "
            f"{', '.join(record.labels)} (data.foreground)"
        )
    return arm_schedule(record, config, arm, split["train"])


def _recorded(run: Path) -> Schedule:
    """Return the schedule of a run: what it has committed, or the file if that is all there is."""
    folder = RunDirectory(run)
    schedule = read_checkpoint(folder.last).schedule if folder.last.is_file() else None
    return read_schedule(folder.schedule) if schedule is None else schedule


def resumed_config(
    config: Config, run: RunDirectory, checkpoint: Checkpoint, accept_changes: bool = False
) -> Config:
    """Return the configuration to go on with: the run's, with what may change from `config`.

    Raises:
        PolysegError: settings differ that would change the result, by name.
    """
    recorded = checkpoint.config
    free = _FREE_TO_CHANGE + (_CHANGED_WHEN_TOLD if accept_changes else ())
    config = _settled(config, recorded.training.epochs)
    found = {
        name: getattr(recorded.data, name)
        for name, default in (("size", "auto"), ("foreground", None))
        if getattr(config.data, name) == default
    }
    config = config.model_copy(update={"data": config.data.model_copy(update=found)})
    wanted, kept = _flat(config.model_dump()), _flat(recorded.model_dump())
    differing = [
        f"{key} {kept[key]} -> {wanted[key]}"
        for key in wanted
        # By how they are written, because mappings that differ in order alone are equal.
        if repr(wanted[key]) != repr(kept.get(key)) and not key.startswith(free)
    ]
    if differing:
        told = all(change.startswith(_CHANGED_WHEN_TOLD) for change in differing)
        raise PolysegError(
            f"{run.path}: --resume cannot change {'; '.join(differing)}; "
            + ("--accept-changes allows it" if told else "start a new run instead")
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
    for setting, name in config.own_code.items():
        module, _, attribute = name.rpartition(":")
        if module.endswith(".py"):
            section, _, key = setting.partition(".")
            held = changes.get(section, getattr(config, section))
            place = f"{Path(module).resolve()}:{attribute}"
            changes[section] = held.model_copy(update={key: place})
    config = config.model_copy(update=changes)
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


class _LogHandler(logging.FileHandler):
    """Leaves a full disk to be told by what must be written; a log is only nice to have."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """Do without the line."""


class _LogFile:
    """Everything that the package logs, also into the run's log.txt."""

    def __init__(self, path: Path) -> None:
        # A link may lead anywhere, if the folder is somebody else's.
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise PolysegError(f"{path}: is no file to log to; remove it")
        self.handler = _LogHandler(path, encoding="utf-8")
        self.handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))

    def __enter__(self) -> None:
        logging.getLogger("polyseg").addHandler(self.handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("polyseg").removeHandler(self.handler)
        with contextlib.suppress(OSError):
            self.handler.close()


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
    pushes = config.loss.bce_weight > 0 or config.loss.smooth >= 1
    if empty and "smooth" in loss_of(config.loss.name).parameters and not pushes:
        log.warning(
            "%d of %d training masks are empty, and %s with smooth %g hardly learns from them; "
            "set loss.smooth=1, loss.bce_weight above 0, or data.training_slices=foreground",
            empty,
            len(split["train"]),
            config.loss.name,
            config.loss.smooth,
        )


def _describe_data(images: ImageSet, split: Split, config: DataConfig) -> str:
    """Return in a line what became of the data: sizes, images of each part, groups."""
    items = [images.item(identity) for part in PARTS for identity in split[part]]
    what = counted(len(items), "phantom" if config.path == "demo" else "image")
    size = _range_of([item.original_size for item in items])
    if images.tiling is not None:
        size += f" -> tiles of {_range_of([images.tiling.size])}"
    elif any(item.size != item.original_size for item in items):
        size += f" -> {_range_of([item.size for item in items])}"
    counts = ", ".join(f"{len(split[part])} {part}" for part in PARTS)
    groups = len(group_names([member_of(item) for item in items], config))
    return f"{what} of {size}: {counts}" + (f"; {counted(groups, 'group')}" if groups else "")


def _range_of(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the smallest and the largest size by area.

    >>> _range_of([(96, 64), (512, 640), (96, 64)])
    '96 x 64 to 512 x 640'
    """
    ends = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    return " to ".join(dict.fromkeys(f"{h} x {w}" for h, w in (ends[0], ends[-1])))


def _best_of(trainer: Trainer) -> Checkpoint:
    """Return the best checkpoint, if it is one of this run.

    Raises:
        PolysegError: it is of another network.
    """
    best = read_checkpoint(trainer.run.best)
    if best.config.network != trainer.config.network:
        raise PolysegError(f"{trainer.run.best}: is of another network than this run")
    if best.epoch != trainer.best_epoch:
        log.warning(
            "%s is of epoch %d, and the best was %d: that one is lost",
            *(trainer.run.best, best.epoch, trainer.best_epoch),
        )
    return best


def _report(trainer: Trainer, progress: Progress) -> Outcome:
    """Test the best checkpoint and draw what there is to see."""
    run, config, images = trainer.run, trainer.config, trainer.images
    files = [run.history]
    evaluation: Evaluation | None = None
    part = next((one for one in ("test", "val") if trainer.split[one]), None)
    if part is not None:
        if part == "val":
            log.warning(
                "there is no test set: the metrics are of the validation images, by which the "
                "best epoch was chosen"
            )
        best = network_of(_best_of(trainer), trust=True).to(trainer.device)
        ids, size = trainer.split[part], config.training.batch_size
        groups = patients_of(images, config.data)
        scores = score(run.path.name, best, images, ids, size, groups=groups, progress=progress)
        evaluation = Evaluation(scores, part=part)
        files += evaluation_files.write_evaluation(
            evaluation, run.evaluation, figures=config.output.figures
        )
    correlations: list[dict[str, Any]] = []
    notes: list[str] = []
    assessments: Sequence[Assessment] = ()
    if trainer.assessments:
        assessments = read_assessments(run, trainer.assessments)
        correlations = difficulty_correlations(assessments[-1], images.known_difficulty)
        log_correlations(correlations)
        notes = describe_order(assessments[-1])
    if config.output.figures:
        limits = (config.control.epsilon_min, config.control.epsilon_max)
        schedule = read_schedule(run.schedule)
        records = RunRecords(trainer.history, schedule, assessments, limits)
        files += run_figures.draw_run(records, run.figures)
        if assessments:
            files += run_figures.draw_extremes(
                trainer.network, config, images, assessments[-1], run.figures
            )
    return Outcome(run.path, files, evaluation, correlations, notes)
