"""How many passes: N where it is chosen by the passes themselves, over the first images."""

from collections.abc import Callable, Iterable, Iterator

from polyseg.metrics.rank_stability import passes_needed
from polyseg.montecarlo.scores import Measurement, join_halves, stability_of

FEWEST, MOST = 6, 100
"""Bounds of N."""
_IMAGES, _BYTES = 48, 2**28
"""So many images judge the ranking of all; fewer, where their records would be larger."""


Extend = Callable[[Iterable[Measurement], int], Iterable[Measurement]]
"""Runs the passes of measurements up to so many; perhaps of fewer images each."""


def choose_samples(
    measurements: Iterator[Measurement], target: float, metric: int, extend: Extend
) -> tuple[int, list[Measurement]]:
    """Return the least N whose expected rank stability reaches the target.

    Args:
        measurements: of which the first are taken and extended to N passes.
        target: the rank stability, in (0, 1).
        metric: which of `Wanted.streamed` ranks them.
        extend: runs their passes.

    Returns:
        N, and the measurements that were taken.
    """
    pilot = _first_of(measurements)
    samples = FEWEST
    while pilot:
        pilot = list(extend(pilot, samples))
        parts = [measurement.results().halves() for measurement in pilot]
        labels = len(pilot[0].batch.labels)
        stability = stability_of(join_halves(parts)[:, :, metric], labels)
        if not stability < target or samples >= MOST:  # No number is not below either.
            break
        more = passes_needed(stability, samples, target) if stability > 0 else 2 * samples
        samples = min(max(samples + 1, more), 2 * samples, MOST)
    return samples, pilot


def _first_of(measurements: Iterator[Measurement]) -> list[Measurement]:
    """Take the first of the measurements, as many as judge the ranking of all."""
    taken: list[Measurement] = []
    for measurement in measurements:
        taken.append(measurement)
        images = sum(len(one.batch.ids) for one in taken)
        if images >= _IMAGES or sum(one.held for one in taken) >= _BYTES:
            break
    return taken
