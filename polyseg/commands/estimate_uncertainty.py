"""`polyseg estimate-uncertainty`: what a trained network is unsure about."""

import contextlib
import dataclasses
import logging
from pathlib import Path

import numpy as np

from polyseg.choices import UNCERTAINTIES
from polyseg.config import MOST_SAMPLES, Config
from polyseg.data.dataset import ImageSet
from polyseg.errors import PolysegError
from polyseg.figures import run_figures
from polyseg.figures.run_figures import Outcome
from polyseg.montecarlo.assessment import assess, spread
from polyseg.networks.inference import choose_device
from polyseg.networks.networks_by_name import SegmentationNetwork, hash_weights
from polyseg.records import Assessment, Progress, no_progress
from polyseg.runs.assessment_text import describe, describe_order
from polyseg.runs.record_files import write_assessment
from polyseg.runs.run_folder import results_beside
from polyseg.runs.trained_model import (
    Inputs,
    Model,
    images_for,
    open_model,
    passes_of,
)
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
    out: Path | None = None,
    overwrite: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Measure the uncertainty of a checkpoint about any images, in the format of a run's record.

    Several processes share the images; the leading one writes.

    Raises:
        PolysegError: checkpoint, data or folder are not in order.
    """
    if samples is not None and not 2 <= samples <= MOST_SAMPLES:
        raise PolysegError(f"--samples {samples}: from 2 to {MOST_SAMPLES:,} passes")
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
                passes_of(model.config, save_maps=save_maps, samples=samples),
                seed=model.config.training.seed,
                epoch=model.checkpoint.epoch,
                progress=progress,
                total=len(ids),
                processes=processes,
            ).in_order(ids)
        if not processes.leads:
            return Outcome(place, [])
        files = _write(assessment, model, images, folder)
    correlations = run_figures.difficulty_correlations(assessment, images.known_difficulty)
    notes = describe_order(assessment)
    return Outcome(place, moved(files, folder, place), correlations=correlations, notes=notes)


def _write(assessment: Assessment, model: Model, images: ImageSet, folder: Path) -> list[Path]:
    """Write an assessment and what there is to see of it; return the files."""
    log.info("%s", describe(assessment))
    assessment = dataclasses.replace(assessment, config_yaml=model.config.to_yaml())
    write_assessment(folder / "assessment.h5", assessment)
    write_text(folder / "per_image.csv", run_figures.assessment_csv(assessment))
    files = [folder / "assessment.h5", folder / "per_image.csv"]
    figures = folder / "figures"
    files += run_figures.draw_assessment(assessment, figures)
    return files + draw_extremes(model.network, model.config, images, assessment, figures)


def draw_extremes(
    network: SegmentationNetwork,
    config: Config,
    images: ImageSet,
    assessment: Assessment,
    folder: Path,
) -> list[Path]:
    """Draw the images of largest and of smallest D of an assessment.

    Their maps are measured anew, with the network as it is now, which may have trained on since.
    """
    if assessment.metric not in UNCERTAINTIES:
        return []  # Without passes there are no maps.
    order = np.argsort(-assessment.difficulty, kind="stable")
    changes = {"samples": assessment.samples, "save_maps": True}
    settings = config.uncertainty.model_copy(update=changes)
    moved = hash_weights(network) != assessment.weights_sha256
    since = f" at epoch {assessment.epoch}, as the trained network sees them" if moved else ""
    shown = min(config.output.overlays, len(order))
    labels = assessment.labels or [""] * len(order)
    files = []
    for which, rows in (("largest", order[:shown]), ("smallest", order[::-1][:shown])):
        if len(rows) == 0:
            continue
        again = assess(
            network,
            images.batches(list(dict.fromkeys(assessment.ids[i] for i in rows)), 1),
            settings,
            seed=assessment.seed,
            epoch=assessment.epoch,
        )
        places = list(zip(again.ids, again.labels or [""] * len(again.ids), strict=True))
        chosen = [places.index((assessment.ids[i], labels[i])) for i in rows]
        # Measured anew, they may stand in another order, and the figure goes by what it shows.
        chosen.sort(key=lambda i: again.difficulty[i], reverse=which == "largest")
        path = folder / f"overlays_{which}_d"
        heading = f"The {len(rows)} images of {which} D{since}"
        files += run_figures.draw_overlays(again, chosen, images, path, heading)
    return files
