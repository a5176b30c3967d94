"""`polyseg schedule`: show, export and recompute the difficulties and epsilons of a run."""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polyseg.adaptive import recorded_schedule, schedule_tables, score_correlations
from polyseg.adaptive.recorded_schedule import Row, RunRecord
from polyseg.choices import REDUCTIONS, map_of
from polyseg.commands.donors import unseen_errors
from polyseg.config import Config, ControlConfig, settings_of
from polyseg.errors import PolysegError
from polyseg.records import Schedule
from polyseg.registry import is_own
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint
from polyseg.runs.record_files import write_schedule
from polyseg.runs.run_folder import RunDirectory, read_assessments
from polyseg.system.files import write_text
from polyseg.system.output_folder import refuse_existing

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TableWithNotes:
    """The rows of a table, and the notes below it."""

    rows: list[Row]
    notes: Sequence[str] = ()


def read_record(path: str | Path) -> RunRecord:
    """Return the committed record of a run, which may still be training.

    Raises:
        PolysegError: it is not a run, has no assessments, or a file is damaged.
    """
    path = Path(path)
    run = RunDirectory(path)
    if not run.last.is_file():
        owner = next((p for p in path.parents if RunDirectory(p).last.is_file()), None)
        hint = "give the folder of a run" if owner is None else f"give the run, {owner}"
        raise PolysegError(f"{path}: is not a run (it has no {run.last.relative_to(path)}); {hint}")
    # Read the checkpoint first: all files that it names exist, even while the run continues.
    checkpoint = read_checkpoint(run.last, with_weights=False)
    if not checkpoint.assessments:
        raise PolysegError(f"{path}: {_why_not_assessed(checkpoint.config)}")
    assessments = read_assessments(run, checkpoint.assessments)
    ids, labels = assessments[0].ids, assessments[0].labels
    schedule = _committed_schedule(run, checkpoint, ids, labels)
    found = [(one.ids, one.labels) for one in assessments] + [(schedule.ids, schedule.labels)]
    if any(rows != (ids, labels) for rows in found):
        raise PolysegError(f"{run.last}: schedule and assessments are of different images")
    history = checkpoint.history
    wrong_sign = np.array([row.get("wrong_sign_images", np.nan) for row in history]) / len(ids)
    return RunRecord(str(path), checkpoint.config, assessments, schedule, wrong_sign)


def show(path: Path, image: str | None = None) -> TableWithNotes:
    """Return a row for each assessment, or the history of D and epsilon of one image."""
    record = read_record(path)
    if image is not None:
        rows = schedule_tables.image_history(record, image)
        return TableWithNotes(rows, _notes_on_equations(record))
    notes = []
    if record.config.control.statistics == "batch":
        notes.append(
            "D_pct and sigma: over all training images; images are normalised within each batch "
            "(control.statistics=batch), whose D_pct and sigma --image shows"
        )
    if len(record.labels) > 1:
        notes.append("wrong sign: over all labels together")
    return TableWithNotes(schedule_tables.overview(record), notes)


def export(path: Path, out: Path | None = None, *, overwrite: bool = False) -> str:
    """Return a row for each assessment and image as CSV, and write it to `out` if given."""
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    text = schedule_tables.csv_text(schedule_tables.tidy(read_record(path)))
    if out is not None:
        write_text(out, text)
    return text


def recompute(
    path: Path,
    overrides: Sequence[str] = (),
    out: Path | None = None,
    *,
    overwrite: bool = False,
    trust: bool = False,
) -> TableWithNotes:
    """Return how other settings would change the schedule, and write it to `out` if given."""
    if out is not None:
        refuse_existing(out, overwrite=overwrite)
    _refuse_unknown(overrides)
    record = read_record(path)
    if len(record.schedule.epochs) == 0:
        raise PolysegError(f"{path}: has no schedule before its first epoch")
    if is_own(record.config.control.map) and not trust:
        raise PolysegError(
            f"{path}: its control.map {record.config.control.map} is code outside polyseg; give "
            "--trust to import and run it, if you know its origin"
        )
    recomputed = recorded_schedule.recompute(
        record, recorded_schedule.changed_settings(record.config, overrides)
    )
    if out is not None:
        write_schedule(out, recomputed)
    _warn_of_another_origin(record)
    notes = []
    if overrides:
        notes.append(
            "from the recorded D: a training with these settings would measure other difficulties"
        )
    return TableWithNotes(schedule_tables.compare(record, recomputed), notes)


def validity(path: Path, donors: Sequence[Path] = ()) -> TableWithNotes:
    """Return the correlations of each score with error and size, for each assessment.

    `donors` are two runs, each trained on half of the run's training images, which give errors of
    networks that were not trained on the image.
    """
    record = read_record(path)
    last = record.assessments[-1]
    note = f"last assessment: after epoch {last.epoch}; mean over {len(record.assessments)}"
    ids = list(dict.fromkeys(last.ids))
    unseen = unseen_errors(path, donors, ids, record.labels) if donors else None
    return TableWithNotes(score_correlations.validity(record, unseen), [note])


def _committed_schedule(
    run: RunDirectory, checkpoint: Checkpoint, ids: list[str], labels: list[str] | None
) -> Schedule:
    """Return the schedule of the committed epochs; the run's file may be an epoch ahead."""
    n, epoch = len(ids), checkpoint.epoch
    if epoch == 0:
        return Schedule(ids, np.empty(0, np.int64), np.empty((0, n), np.float32), labels)
    if checkpoint.schedule is None:
        raise PolysegError(f"{run.last}: has no schedule for its {epoch} epochs")
    return checkpoint.schedule


def _notes_on_equations(record: RunRecord) -> list[str]:
    """Return eq. 11 and 12 with the settings of a run, and which statistics they used."""
    control = record.config.control
    reduction = REDUCTIONS[control.reduction]
    statistics, numbers = reduction.statistics, ""
    if "D_pct" in statistics:
        numbers = f", pct = {control.percentile:g}, delta = {control.delta:g}"
    notes = [
        f"D_norm: {reduction.help} (control.reduction={reduction.name}{numbers})",
        _map_note(control),
        f"{statistics}: of the batch of the image (control.statistics=batch), so epsilon differs "
        "from epoch to epoch"
        if control.statistics == "batch"
        else f"{statistics}: of all training images (control.statistics=dataset)",
    ]
    schedule = record.schedule
    known = np.isfinite(schedule.percentile_and_sigma()).all(axis=(1, 2))
    lacking = schedule.epochs[~known & (schedule.epochs > record.assessments[0].epoch)]
    if lacking.size:
        notes.append(
            f"D_pct and sigma were not recorded from epoch {lacking[0]} to {lacking[-1]}, by an "
            "older polyseg; epsilon there is that of the first epoch of the row"
        )
    return notes


def _map_note(control: ControlConfig) -> str:
    """Return a sentence about the map from D_norm to epsilon."""
    low, high, rate = control.epsilon_min, control.epsilon_max, control.sensitivity
    if control.map == "sigmoid":
        return f"eq. 12: epsilon = {low:g} + {high - low:g} / (1 + exp(-{rate:g} D_norm))"
    return (
        f"epsilon: {map_of(control.map).help} (control.map={control.map}, lambda = {rate:g}, "
        f"{low:g} to {high:g})"
    )


def _warn_of_another_origin(record: RunRecord) -> None:
    """Log a warning if a run's own settings do not reproduce its recorded epsilons."""
    own = recorded_schedule.recompute(record, record.config).epsilon
    if not np.array_equal(own, record.schedule.epsilon):
        log.warning(
            "%s: its own settings give epsilons that differ from the recorded ones by up to %.2g; "
            "it was recorded by another version of polyseg or on another machine",
            record.name,
            np.abs(own - record.schedule.epsilon).max(),
        )


def _why_not_assessed(config: Config) -> str:
    if config.control.replay is not None:
        return (
            "has no assessments, because it replayed another run; give that run; the epsilons that "
            "this one used are in its schedule.h5, their percentiles in its history.csv"
        )
    if not config.adaptive:
        return f"has no assessments, because its loss ({config.loss.name}) had no adaptive epsilon"
    first = config.control.assessment_epochs(config.training.epochs)[0]
    return f"has no assessment yet; the first follows epoch {first}"


def _refuse_unknown(overrides: Sequence[str]) -> None:
    """Raise PolysegError for unknown settings, with the nearest known one."""
    known = [setting["key"] for setting in settings_of()]
    for key in (override.partition("=")[0].strip() for override in overrides):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`polyseg config show` lists them"
            raise PolysegError(f"--set {key}: there is no such setting; {hint}")
