"""`polyseg estimate-uncertainty`: measure the uncertainty of a trained network about images."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

from polyseg.choices import image_scores
from polyseg.commands.outcome import Outcome
from polyseg.config import MOST_SAMPLES
from polyseg.data.dataset import ImageSet
from polyseg.errors import PolysegError
from polyseg.figures import run_figures
from polyseg.figures.figures_by_name import RunRecords
from polyseg.montecarlo.assessment import assess, spread
from polyseg.networks.inference import choose_device
from polyseg.records import Assessment, Progress, no_progress
from polyseg.registry import not_among
from polyseg.runs.assessment_text import (
    assessment_csv,
    describe,
    describe_order,
    difficulty_correlations,
)
from polyseg.runs.record_files import write_assessment
from polyseg.runs.run_folder import results_beside
from polyseg.runs.trained_model import Inputs, Model, images_for, open_model, passes_of
from polyseg.system.files import write_text
from polyseg.system.output_folder import moved, whole_folder
from polyseg.system.process_group import PATIENCE, together

log = logging.getLogger(__name__)

_KNOWN_BY = ("assessment.h5",)


def estimate_uncertainty(
    source: Path,
    inputs: Inputs = Inputs(),  # noqa: B008 - it is frozen
    *,
    samples: int | None = None,
    save_maps: bool = False,
    also: Sequence[str] = (),
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Measure how uncertain a network is about any images, and write an assessment file.

    Several processes share the images; the leading one writes. `also` names further scores.
    """
    _check_options(samples, also)
    place = out or results_beside(source, "uncertainty-estimate")
    with contextlib.ExitStack() as stack:
        with together(choose_device(inputs.device), PATIENCE) as processes:
            model = open_model(source, inputs.device, inputs.trust)
            images, ids = images_for(model, inputs, "all", progress)
            held = whole_folder(place, overwrite=overwrite, known_by=_KNOWN_BY)
            folder = processes.entered_by_leader(stack, held)
            assessment = assess(
                model.network,
                images.batches(spread(ids), model.config.training.batch_size),
                passes_of(
                    model.config, masks=images.has_masks, save_maps=save_maps, samples=samples
                ),
                seed=model.config.training.seed,
                epoch=model.checkpoint.epoch,
                progress=progress,
                total=len(ids),
                processes=processes,
                also=also,
            ).in_order(ids)
        if not processes.leads:
            return Outcome(place, [])
        files = _write(assessment, model, images, folder)
    correlations = difficulty_correlations(assessment, images.known_difficulty)
    notes = describe_order(assessment)
    return Outcome(place, moved(files, folder, place), correlations=correlations, notes=notes)


def _check_options(samples: int | None, also: Sequence[str]) -> None:
    if samples is not None and not 2 <= samples <= MOST_SAMPLES:
        raise PolysegError(f"--samples {samples}: must be from 2 to {MOST_SAMPLES:,}")
    for name in also:
        if name not in image_scores():
            wrong = not_among(name, image_scores(), "score of the whole image")
            raise PolysegError(f"--score {wrong}")


def _write(assessment: Assessment, model: Model, images: ImageSet, folder: Path) -> list[Path]:
    """Write an assessment with its table and figures, and return the files."""
    log.info("%s", describe(assessment))
    assessment = dataclasses.replace(assessment, config_yaml=model.config.to_yaml())
    write_assessment(folder / "assessment.h5", assessment)
    write_text(folder / "per_image.csv", assessment_csv(assessment))
    files = [folder / "assessment.h5", folder / "per_image.csv"]
    figures = folder / "figures"
    files += run_figures.draw_run(
        RunRecords(assessments=[assessment]), figures, ["difficulty_dice"]
    )
    return files + run_figures.draw_extremes(
        model.network, model.config, images, assessment, figures
    )
