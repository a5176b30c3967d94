"""Rate of p < 0.05 for two equal networks if slices of a patient are correlated.

    python -m tests.benchmarks.correlated_slices

Each repetition draws differences between two networks with true mean 0, of 20 patients with 10
slices each. A part of the variance (the intraclass correlation) is shared by all slices of a
patient. The program counts p < 0.05 of Wilcoxon's signed-rank test (normal approximation) and 95 %
bootstrap intervals of the mean (percentiles, 999 draws) without 0. It takes a few seconds.
"""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

PATIENTS, SLICES, REPETITIONS, DRAWS = 20, 10, 2000, 999
CORRELATIONS = (0.0, 0.2, 0.5, 0.8)

Values = NDArray[np.float64]


def differences(correlation: float, generator: np.random.Generator) -> Values:
    """Return the differences of all repetitions, (repetitions, patients, slices), of variance 1."""
    shared = generator.normal(size=(REPETITIONS, PATIENTS, 1))
    own = generator.normal(size=(REPETITIONS, PATIENTS, SLICES))
    return math.sqrt(correlation) * shared + math.sqrt(1 - correlation) * own


def rejected_by_wilcoxon(values: Values) -> NDArray[np.bool_]:
    """Return whether each row of (repetitions, n) has a two-sided p < 0.05."""
    n = values.shape[1]
    ranks = np.abs(values).argsort(axis=1).argsort(axis=1) + 1
    positive = (ranks * (values > 0)).sum(axis=1)
    deviation = math.sqrt(n * (n + 1) * (2 * n + 1) / 24)
    return np.asarray(np.abs(positive - n * (n + 1) / 4) / deviation > 1.959964)


def rejected_by_bootstrap(values: Values, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Return whether each row of (repetitions, n) has an interval of the mean without 0."""
    n = values.shape[1]
    shares = generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n
    low, high = np.percentile(values @ shares.T, (2.5, 97.5), axis=1)
    return np.asarray((low > 0) | (high < 0))


def with_interval(rejected: NDArray[np.bool_]) -> str:
    """Return a rate in percent with its 95 % interval (Wilson)."""
    n, rate, z2 = rejected.size, float(rejected.mean()), 1.959964**2
    middle = (rate + z2 / (2 * n)) / (1 + z2 / n)
    half = math.sqrt(z2 * (rate * (1 - rate) / n + z2 / (4 * n * n))) / (1 + z2 / n)
    return f"{100 * rate:.1f} ({100 * (middle - half):.1f} to {100 * (middle + half):.1f})"


def rows() -> Iterator[list[str]]:
    """Yield the correlation and the error rates of test and interval, by image and by patient."""
    generator = np.random.default_rng(0)
    for correlation in CORRELATIONS:
        found = differences(correlation, generator)
        by_image, by_patient = found.reshape(REPETITIONS, -1), found.mean(axis=2)
        yield [
            f"{correlation:g}",
            *(with_interval(rejected_by_wilcoxon(one)) for one in (by_image, by_patient)),
            *(
                with_interval(rejected_by_bootstrap(one, generator))
                for one in (by_image, by_patient)
            ),
        ]


if __name__ == "__main__":
    kinds = [f"{what} by {case}" for what in ("test", "interval") for case in ("image", "patient")]
    print(f"| correlation | {' | '.join(kinds)} |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    for row in rows():
        print(f"| {' | '.join(row)} |")
