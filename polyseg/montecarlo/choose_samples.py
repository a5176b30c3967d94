"""Choose the number N of passes from the rank stability of the first images."""

from collections.abc import Callable, Iterable, Iterator

from polyseg.metrics.rank_stability import passes_needed
from polyseg.montecarlo.measurement import Measurement, Results, join_halves, stability_of

FEWEST, MOST = 6, 100
"""Bounds of N."""
_IMAGES, _BYTES = 48, 2**28
"""Largest number of images from which N is chosen, and size of their records, in bytes."""

Extend = Callable[[Iterable[Measurement], int], Iterable[Measurement]]
"""Function that runs passes of measurements up to that number, and may divide their batches."""


def choose_samples(
    measurements: Iterator[Measurement], target: float, metric: int, extend: Extend
) -> tuple[int, list[Measurement]]:
    """Return the least N whose expected rank stability reaches the target, and first measurements.

    These are taken from `measurements` and get N passes by `extend`. `target` is in (0, 1), and
    `metric` the index in `Wanted.streamed` of the score that ranks the images.
    """
    pilot = _first_of(measurements)
    samples = FEWEST
    while pilot:
        pilot = list(extend(pilot, samples))
        parts = [Results(measurement).halves() for measurement in pilot]
        labels = len(pilot[0].batch.labels)
        stability = stability_of(join_halves(parts)[:, :, metric], labels)
        if not stability < target or samples >= MOST:  # NaN ends the search too.
            break
        more = passes_needed(stability, samples, target) if stability > 0 else 2 * samples
        samples = min(max(samples + 1, more), 2 * samples, MOST)
    return samples, pilot


def _first_of(measurements: Iterator[Measurement]) -> list[Measurement]:
    taken: list[Measurement] = []
    for measurement in measurements:
        taken.append(measurement)
        images = sum(len(one.batch.ids) for one in taken)
        if images >= _IMAGES or sum(one.held for one in taken) >= _BYTES:
            break
    return taken
