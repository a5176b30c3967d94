"""`polyseg evaluate`: networks tested side by side on the same images."""

from collections.abc import Sequence
from pathlib import Path

from polyseg import report
from polyseg.config import Config
from polyseg.data.dataset import ImageSet
from polyseg.errors import PolysegError
from polyseg.evaluate import ImageScores, RunScores, image_scores
from polyseg.inference import predict
from polyseg.jobs.models import fresh_folder, images_for, open_model, results_beside
from polyseg.networks import SegmentationNetwork
from polyseg.records import Progress, no_progress
from polyseg.report import Outcome


def evaluate_runs(
    sources: Sequence[Path],
    *,
    data: Path | None = None,
    part: str | None = None,
    out: Path | None = None,
    cache: Path | None = None,
    device: str = "auto",
    trust: bool = False,
    progress: Progress = no_progress,
) -> Outcome:
    """Test checkpoints side by side on the same images.

    Raises:
        PolysegError: checkpoint, data or folder are not in order, or the images differ.
    """
    scores: list[RunScores] = []
    tested: dict[Path, dict[str, str]] = {}
    for source, name in zip(sources, _names(sources), strict=True):
        model = open_model(source, device, trust)
        images, ids = images_for(model, data, part, "test", progress, cache)
        hashes = {identity: images.hashes[identity] for identity in ids}
        if tested and hashes != next(iter(tested.values())):
            raise PolysegError(
                f"{source}: would be tested on other images than {next(iter(tested))}; give runs "
                "of one split, or --data"
            )
        tested[source] = hashes
        scores += score(name, model.network, model.config, images, ids, progress=progress)
    with fresh_folder(out or results_beside(sources[0], "evaluation")) as folder:
        return Outcome(folder, report.write_scores(scores, folder, figures=True), scores)


def score(
    name: str,
    network: SegmentationNetwork,
    config: Config,
    images: ImageSet,
    ids: Sequence[str],
    *,
    progress: Progress = no_progress,
) -> list[RunScores]:
    """Return the metrics of a network on some images, image by image, a record a label.

    Raises:
        PolysegError: the images have no masks.
    """
    results: dict[str, list[ImageScores]] = {label: [] for label in images.labels}
    done = 0
    for batch, logits in predict(network, images.batches(ids, config.training.batch_size)):
        if batch.masks is None:
            raise PolysegError("evaluate: the images have no masks to compare with")
        for row, identity in enumerate(batch.ids):
            for k, label in enumerate(images.labels):
                probability = logits[row, k].double().sigmoid().numpy()
                mask = batch.masks[row, k].numpy()
                results[label].append(image_scores(identity, probability, mask))
        done += len(batch.ids)
        progress(f"testing {name}", done, len(ids))
    return [RunScores(name, scores, label) for label, scores in results.items()]


def _names(sources: Sequence[Path]) -> list[str]:
    """Return a short name for each source that tells it from the others."""
    parts = [source.resolve().parts for source in sources]
    length = next(
        n for n in range(1, 99) if n > 90 or len({part[-n:] for part in parts}) == len(set(parts))
    )
    return ["/".join(part[-length:]) for part in parts]
