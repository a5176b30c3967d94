"""`polyseg report`: write one HTML page about runs and evaluations."""

import logging
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar

import numpy as np

from polyseg import __version__
from polyseg.choices import LOSSES
from polyseg.data.layouts.cases import counted
from polyseg.errors import PolysegError
from polyseg.evaluation.tables import DASH, size_of
from polyseg.figures.style import formatted
from polyseg.metrics.image_metrics import METRICS
from polyseg.metrics.significance import RankCorrelation, rank_correlation
from polyseg.records import Assessment, Progress, no_progress
from polyseg.report import tables
from polyseg.report.document import (
    Block,
    Folded,
    Gallery,
    Page,
    PageSection,
    Picture,
    Table,
    Text,
    render,
)
from polyseg.report.figures import (
    evaluation_pictures,
    extreme_pictures,
    run_pictures,
    validation_picture,
)
from polyseg.report.run_files import (
    EvaluationFiles,
    RunFiles,
    read_evaluation,
    read_run,
    sources_of,
)
from polyseg.runs.assessment_text import describe_order
from polyseg.system.files import short_names, write_text
from polyseg.system.output_folder import refuse_existing

log = logging.getLogger(__name__)

S = TypeVar("S", RunFiles, EvaluationFiles)

MOST_RUNS = 50
"""Largest number of runs and evaluations of a page."""

_WORST = 20
_TEXT_COLUMNS = ("id", "at", "group", "label", "arm", "run", "prediction", "seed", "fold")
"""Columns of per_image.csv that are text, or numbers that serve as names."""
_MOST_ROWS = 2000
_MOST_FACTS = 100
_OF_ASSESSMENTS = ("control.start", "control.every")
"""Settings that a run without assessments does not use."""
_QUANTILES = (5, 25, 50, 75, 95)


def make_page(
    sources: Sequence[Path],
    *,
    evaluations: Sequence[Path] = (),
    out: Path,
    overwrite: bool = False,
    title: str | None = None,
    progress: Progress = no_progress,
) -> Path:
    """Write one HTML file about one or several runs, and return its path.

    Args:
        sources: folders of runs.
        evaluations: folders of `polyseg evaluate` that compare runs; without any, the newest
            comparison of exactly these runs in a folder that contains all of them.
        out: the file, a new one unless `overwrite`.
    """
    _check_place(out, overwrite)
    if len(sources) + len(evaluations) > MOST_RUNS:
        raise PolysegError(
            f"report: {len(sources)} runs and {len(evaluations)} evaluations are more than the "
            f"{MOST_RUNS} that a page can have; give fewer"
        )
    evaluations = evaluations or comparison_of(sources)
    compared = [read_evaluation(*one) for one in _with_names(evaluations)]
    runs = []
    for k, (source, name) in enumerate(_with_names(sources), start=1):
        runs.append(read_run(source, name))
        progress("reading runs", k, len(sources))
    page = page_of(runs, compared, title)
    if page.warnings:
        remarks = counted(len(page.warnings), "remark")
        log.warning("the page begins with %s on files that are missing or unreadable", remarks)
    write_text(out, render(page))
    return out


def comparison_of(sources: Sequence[Path]) -> list[Path]:
    """Return the newest comparison of exactly these runs, in a folder that contains them all."""
    if len(sources) < 2:
        return []
    wanted = {one.resolve() for one in sources}
    shared = Path(os.path.commonpath([one.parent for one in wanted]))
    found = []
    for path in shared.glob("*/summary.json"):
        try:
            names = sources_of(path)
            if names and {(path.parent / name).resolve() for name in names} == wanted:
                found.append((path.stat().st_mtime, path.parent))
        except (OSError, ValueError, TypeError):
            continue
    if not found:
        runs = [str(one) for one in sources]
        asked = shlex.join(["polyseg", "evaluate", *runs, "--baseline", runs[0]])
        log.info("no comparison of exactly these runs was found; `%s` makes one", asked)
        return []
    newest = max(found)[1]
    log.info("the report includes the comparison in %s", newest)
    return [newest]


def page_of(
    runs: Sequence[RunFiles], evaluations: Sequence[EvaluationFiles] = (), title: str | None = None
) -> Page:
    """Return the page about runs and evaluations, with results first.

    >>> [section.title for section in page_of([RunFiles("a")]).sections]
    ['Summary']
    """
    parts: dict[str, Sequence[Block]] = {
        "Summary": _summary(runs, evaluations),
        "Comparison": _of_each(evaluations, _comparison),
        "Settings": _settings(runs),
        "Training": _training(runs),
        "Difficulty and ε": _of_each(runs, _difficulty),
        "Images of largest and smallest D": _of_each(
            runs, lambda run: _gallery(extreme_pictures(run))
        ),
        "Test images": _of_each(runs, _tests),
        "Versions and commands": [*_machines(runs), *_of_each(runs, _command)],
    }
    what = (
        f"Segmentation run {runs[0].name}" if len(runs) == 1 else f"{len(runs)} segmentation runs"
    )
    return Page(
        title=title or what,
        facts=_facts(runs, evaluations),
        warnings=[
            *(remark for one in evaluations for remark in one.remarks),
            *(remark for run in runs for remark in run.remarks),
        ],
        sections=[PageSection(name, blocks) for name, blocks in parts.items() if blocks],
    )


def _check_place(out: Path, overwrite: bool) -> None:
    if out.suffix.lower() not in (".html", ".htm"):
        raise PolysegError(
            f"--out {out}: the page is one HTML file; give a name that ends in .html"
        )
    refuse_existing(out, overwrite=overwrite)


def _with_names(sources: Sequence[Path]) -> list[tuple[Path, str]]:
    return list(zip(sources, short_names(sources), strict=True)) if sources else []


def _of_each(sources: Sequence[S], blocks_of: Callable[[S], Sequence[Block]]) -> Sequence[Block]:
    """Return the blocks of all sources, each under its name if there are several."""
    found: list[Block] = []
    for source in sources:
        if blocks := blocks_of(source):
            found += [Text(source.name, "h3")] if len(sources) > 1 else []
            found += blocks
    return found


def _facts(
    runs: Sequence[RunFiles], evaluations: Sequence[EvaluationFiles]
) -> list[tuple[str, str]]:
    days = (re.match(r"\d{4}-\d\d-\d\d", str(run.environment.get("started"))) for run in runs)
    begun = sorted(day.group() for day in days if day)
    versions = {tables.brief(run.environment.get("polyseg", __version__)) for run in runs}
    return [
        ("Runs" if len(runs) > 1 else "Run", ", ".join(run.name for run in runs)),
        *([("Comparison", ", ".join(one.name for one in evaluations))] if evaluations else []),
        ("Trained", " to ".join(dict.fromkeys((begun[0], begun[-1]))) if begun else DASH),
        ("polyseg", ", ".join(sorted(versions))),
    ]


def _summary(runs: Sequence[RunFiles], evaluations: Sequence[EvaluationFiles]) -> list[Block]:
    rows = []
    for run in runs:
        best = _best(run)
        rows.append(
            [
                run.name,
                _loss(run.settings),
                tables.number(run.history[-1]["epoch"] if run.history else None, 0),
                tables.number(best.get("epoch"), 0),
                tables.number(best.get("validation_dice")),
                tables.images_tested(run.evaluation),
                tables.dice_tested(run.evaluation),
            ]
        )
    head = ["run", "loss", "epochs", "best epoch", "validation Dice", "test images", "test Dice"]
    caption = (
        "The runs; the best epoch is that of the highest validation Dice. ± is the standard "
        "deviation over the patients if their number is given, otherwise over the images."
    )
    overview = Table(caption, head, rows)
    own = [run.evaluation for run in runs]
    if not evaluations:
        tables.refuse_other_sizes(own)
    kept = [one for one in own if one.summary]
    # Tests at different sizes cannot share a table; a comparison has one size.
    mixed = len({size_of(one.summary) for one in kept}) > 1
    metrics: list[Block] = [] if mixed else list(tables.metric_tables(own))
    if metrics and evaluations:
        metrics = [Folded("All metrics of the runs' own tests", metrics)]
    return [overview, *metrics]


def _loss(settings: Mapping[str, object]) -> str:
    """Return the name of the loss, and the source of its epsilon if it has one."""
    name, enabled = settings.get("loss.name", DASH), settings.get("control.enabled")
    row = LOSSES.get(name) if isinstance(name, str) else None
    if row is None or not row.has_epsilon:
        return tables.brief(name)
    if settings.get("control.replay"):
        return f"{name}, {tables.brief(settings.get('control.replay_arm') or 'replayed')} ε"
    kind = {True: ", adaptive ε", "auto": ", adaptive ε", False: ", constant ε"}
    return f"{name}{kind.get(enabled, '')}" if isinstance(enabled, bool | str) else str(name)


def _comparison(evaluation: EvaluationFiles) -> list[Block]:
    return [
        *_differences(evaluation),
        *tables.metric_tables([evaluation]),
        *_figures_and_tables(evaluation),
        *_each_image(evaluation),
    ]


def _tests(run: RunFiles) -> list[Block]:
    own = run.evaluation
    return [*_differences(own), *_figures_and_tables(own), *_worst_images(own)]


def _differences(evaluation: EvaluationFiles) -> list[Block]:
    """Return the paired comparisons; if there are several, in Dice, with the others folded."""
    overview = list(tables.dice_comparison(evaluation))
    single: list[Block] = list(tables.comparison_tables(evaluation))
    folded = Folded("All metrics, comparison by comparison", single)
    return [*tables.conclusions(evaluation), *([*overview, folded] if overview else single)]


def _figures_and_tables(evaluation: EvaluationFiles) -> list[Block]:
    """Return the figures, and the tables besides metrics and differences."""
    numbers, images = evaluation_pictures(evaluation)
    return [*_gallery(numbers), *tables.further_tables(evaluation), *_gallery(images)]


def _gallery(pictures: Sequence[Picture]) -> list[Block]:
    return [Gallery(pictures)] if pictures else []


def _best(run: RunFiles) -> Mapping[str, float]:
    """Return the row of the first epoch with the highest validation Dice, {} without any."""
    known = [row for row in run.history if math.isfinite(row.get("validation_dice", math.nan))]
    return max(known, key=lambda row: row["validation_dice"], default={})


def _settings(runs: Sequence[RunFiles]) -> list[Block]:
    known = [run for run in runs if run.settings]
    blocks: list[Block] = [_differing(known)] if len(known) > 1 else []
    return blocks + [
        Folded(f"All settings of {run.name}", [Text(run.config_text, "pre")])
        for run in runs
        if run.config_text
    ]


def _differing(runs: Sequence[RunFiles]) -> Block:
    """Return the settings in which runs differ, without output.path, and a dash for unused ones."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "output.path")
    values = {key: [_value(run, key) for run in runs] for key in keys}
    rows = [
        [key, *map(_without_folder, row)]
        for key, row in values.items()
        if len(set(row) - {DASH}) > 1
    ]
    if not rows:
        return Text("The runs have the same settings.")
    head = ["setting", *(run.name for run in runs)]
    return Table("The settings in which the runs differ.", head, rows)


def _value(run: RunFiles, key: str) -> str:
    value = run.settings.get(key, DASH)
    if key in _OF_ASSESSMENTS and not _may_assess(run.settings):
        value = DASH
    written = "null" if value is None else str(value).lower() if isinstance(value, bool) else value
    return tables.brief(written)


def _may_assess(settings: Mapping[str, object]) -> bool:
    name = settings.get("loss.name")
    row = LOSSES.get(name) if isinstance(name, str) else None
    off = settings.get("control.enabled") is False or settings.get("control.replay")
    return not off and (row is None or row.has_epsilon)


def _without_folder(value: str) -> str:
    """Return the last two parts of an absolute path; the others depend on the machine.

    >>> _without_folder("/home/me/runs/first/schedule.h5"), _without_folder("polydice1")
    ('…/first/schedule.h5', 'polydice1')
    """
    for kind in (PurePosixPath, PureWindowsPath):
        path = kind(value)
        if path.is_absolute() and len(path.parts) > 1:
            return "/".join(["…", *path.parts[1:][-2:]])
    return value


def _training(runs: Sequence[RunFiles]) -> list[Block]:
    trained = [run for run in runs if run.history]
    together = [validation_picture(trained)] if len(trained) > 1 else []
    return _gallery([*together, *(one for run in trained for one in run_pictures(run, "history"))])


def _difficulty(run: RunFiles) -> list[Block]:
    blocks = _gallery(run_pictures(run, "schedule", "assessments"))
    if not run.assessments:
        return blocks
    return [*blocks, _assessments(run), *map(Text, describe_order(run.assessments[-1]))]


def _assessments(run: RunFiles) -> Table:
    """Return a table with a row for each assessment and label."""
    labelled = any(one.labels is not None for one in run.assessments)
    metric = run.assessments[-1].metric.replace("_", " ")
    rows = [
        _assessment_row(run, one.of_label(label), label, labelled=labelled)
        for one in run.assessments
        for label in one.label_names
    ]
    head = ["epoch", *(["label"] if labelled else []), "passes", "images"]
    head += [f"D {q} %" for q in _QUANTILES] + [f"ε {q} %" for q in _QUANTILES[::2]]
    return Table(
        f"Assessments of {run.name}: percentiles of the difficulty D ({metric}) over the training "
        "images and of the ε of the epoch that followed, Spearman's correlation ρ of D with "
        "1 − Dice and its 95 % interval, and the expected rank correlation of D with D of "
        "infinitely many passes.",
        [*head, "ρ with 1 − Dice", "rank stability"],
        rows,
    )


def _assessment_row(run: RunFiles, one: Assessment, label: str, *, labelled: bool) -> list[str]:
    followed = np.empty(0)
    if run.schedule is not None:
        epsilon = run.schedule.of_label(label).epsilon
        followed = epsilon[run.schedule.epochs == one.epoch + 1].ravel()
    return [
        str(one.epoch),
        *([label] if labelled else []),
        str(one.samples),
        str(len(one.ids)),
        *_percentiles(one.difficulty, _QUANTILES, "#.3g"),
        *_percentiles(followed, _QUANTILES[::2], ".2f"),
        _with_interval(rank_correlation(one.difficulty, 1 - one.dice)),
        tables.number(one.rank_stability.get(one.metric), 2),
    ]


def _with_interval(found: RankCorrelation) -> str:
    value, *ends = (tables.number(one, 2) for one in (found.value, *found.interval))
    return value if DASH in ends else f"{value}\n{' to '.join(ends)}"


def _percentiles(values: Any, which: Sequence[int], form: str) -> list[str]:
    known = values[np.isfinite(values)]
    if known.size == 0:
        return [DASH] * len(which)
    return [formatted(value, form).rstrip(".") for value in np.percentile(known, which)]


def _worst_images(evaluation: EvaluationFiles) -> list[Block]:
    """Return the main metrics of the worst images, with all metrics of all images folded."""
    head, cells, order = _image_rows(evaluation)
    if not cells:
        return []
    rows = len(evaluation.per_image) - 1
    total = f"{rows:,} test images of {evaluation.name}"
    shown = rows if rows <= _WORST + 5 else _WORST
    some = f"The first {_MOST_ROWS:,} of " if rows > _MOST_ROWS else ""
    least = {metric.title for metric in METRICS.values() if not metric.in_figures}
    main = [k for k, name in enumerate(head) if name not in least]
    worst, *others = ([row[k] for k in main] for row in (head, *cells[:shown]))
    of_them = total if shown == rows else f"{shown} of {total}"
    all_images = Table(f"{some}{total} {order}.", head, cells, sortable=True)
    return [
        Table(f"Main metrics of {of_them} {order}.", worst, others, sortable=True),
        Folded(f"All metrics of {some.lower()}{total}", [all_images]),
    ]


def _each_image(evaluation: EvaluationFiles) -> list[Block]:
    """Return all images of all compared networks, folded."""
    head, cells, order = _image_rows(evaluation)
    if not cells:
        return []
    rows = len(evaluation.per_image) - 1
    some = f", the first {_MOST_ROWS:,} of {rows:,}" if rows > _MOST_ROWS else ""
    caption = f"{evaluation.name}: a row for each network and image, {order}{some}."
    return [
        Folded(f"All images of {evaluation.name}", [Table(caption, head, cells, sortable=True)])
    ]


def _image_rows(evaluation: EvaluationFiles) -> tuple[list[str], list[list[str]], str]:
    """Return the heads and the first rows of per_image.csv, and their order in words."""
    keys, *rows = _shown_columns(evaluation.per_image) or [[]]
    order = "in the order of the file"
    if "dice" in keys:
        rows.sort(key=lambda row: _sort_key(row[keys.index("dice")]))
        order = "by Dice, the worst first"
    cells = [[_cell(*pair) for pair in zip(row, keys, strict=True)] for row in rows[:_MOST_ROWS]]
    return [tables.heading(key) for key in keys], cells, order


def _shown_columns(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return per_image.csv with the id first, and without run and size if there is only one."""
    columns = list(zip(*table, strict=True))
    kept = [one for one in columns if one[0] not in ("run", "at") or len(set(one[1:])) > 1]
    kept.sort(key=lambda one: one[0] != "id")
    return [list(row) for row in zip(*kept, strict=True)]


def _sort_key(cell: str) -> float:
    """Return a cell's number, or infinity for other text, which is sorted last."""
    try:
        value = float(cell)
    except ValueError:
        return math.inf
    return math.inf if math.isnan(value) else value


def _cell(cell: str, key: str) -> str:
    if key in _TEXT_COLUMNS:
        return tables.brief(cell)
    return tables.number(_sort_key(cell), 0 if key.endswith("_pixels") else tables.decimals_of(key))


def _machines(runs: Sequence[RunFiles]) -> list[Block]:
    known = [run for run in runs if run.environment]
    keys = dict.fromkeys(key for run in known for key in run.environment if key != "command")
    if not keys:
        return []
    rows = [
        [tables.brief(key), *(tables.brief(run.environment.get(key, DASH)) for run in known)]
        for key in list(keys)[:_MOST_FACTS]
    ]
    return [
        Table("Versions and machine.", ["item", *(run.name for run in known)], rows),
        Text(
            "The command of a run, with its settings above, repeats it: with equal results on the "
            "same CPU with the same versions and number of threads."
        ),
    ]


def _command(run: RunFiles) -> list[Block]:
    """Return the command that started a run, quoted for a shell, with the name of the program."""
    words = run.environment.get("command")
    if not isinstance(words, list) or not words:
        return []
    first, *others = map(str, words)
    program = "polyseg" if Path(first).name in ("polyseg", "__main__.py") else first
    return [Text(shlex.join([program, *others]), "pre")]
