"""Compare metrics and statistics with independent references: python tests/benchmarks/agreement.py

Every value is computed on random images (any size, smooth and noisy, tied probabilities,
uneven spacing) and on degenerate ones (empty, full, one pixel, one row, constant). Prints the
largest absolute difference from each reference, and the time of all metrics of an image.
"""

import argparse
import itertools
import math
import time
import warnings

import monai
import numpy as np
import scipy
import sklearn
import torch
from monai import metrics as peers
from rich.console import Console
from rich.table import Table
from scipy.ndimage import binary_erosion, gaussian_filter
from scipy.spatial.distance import cdist
from sklearn import metrics as peer
from sklearn.calibration import calibration_curve

from polyseg.metrics.calibration import (
    Ranking,
    area_under_risk_coverage,
    area_under_roc,
    excess_area,
    risk_coverage,
)
from polyseg.metrics.image_metrics import METRICS, image_metrics
from polyseg.metrics.rank_stability import partial_spearman
from polyseg.metrics.significance import holm, mean_interval, paired_difference

TOLERANCE = 1.5


def random_images(count, seed):
    """Yield (probability, mask, spacing), every second one with ties."""
    generator = np.random.default_rng(seed)
    for i in range(count):
        size = generator.integers(1, 64, 2)
        field = gaussian_filter(generator.standard_normal(size), generator.uniform(0, 4))
        mask = field > np.quantile(field, generator.uniform(0.02, 0.98))
        noise = gaussian_filter(generator.standard_normal(size), generator.uniform(0, 4))
        logit = 2 * (2.0 * mask - 1) + 4 * noise / (noise.std() + 1e-9)
        probability = 1 / (1 + np.exp(-logit))
        yield (
            probability.round(1) if i % 2 else probability,
            mask,
            tuple(generator.uniform(0.2, 3.0, 2)),
        )


def degenerate_images():
    """Yield all pairs of empty, full, one-pixel, border and half masks in several shapes."""
    for size in ((1, 1), (1, 7), (7, 1), (5, 6)):
        empty, pixel, border, half = (np.zeros(size) for _ in range(4))
        pixel[size[0] // 2, size[1] // 2] = border[0] = 1
        half[:, : (size[1] + 1) // 2] = 1
        regions = (empty, empty + 1, pixel, border, half)
        for predicted, mask in itertools.product(regions, regions):
            yield predicted, mask > 0, (0.5, 2.0)
            yield 0.1 + 0.8 * predicted, mask > 0, (1.0, 1.0)
        for mask in regions:
            yield np.full(size, 0.5), mask > 0, (2.0, 0.3)


def by_rule(function):
    """Return a reference that applies a function, or the rule if mask or prediction is empty.

    Args:
        function: function of (predicted, truth, spacing) that returns values by metric.
    """

    def reference(probability, truth, spacing):
        predicted = probability >= 0.5
        if predicted.any() and truth.any():
            return function(predicted, truth, spacing)
        agreed = not predicted.any() and not truth.any()
        diagonal = math.hypot(truth.shape[0] * spacing[0], truth.shape[1] * spacing[1])
        distance = 0.0 if agreed else diagonal
        return {"hd95": distance, "asd": distance, "nsd": float(agreed)}

    return reference


@by_rule
def brute_force(predicted, truth, spacing):
    """Return the surface metrics from all distances between two surfaces."""
    points = [np.argwhere(one & ~binary_erosion(one)) * spacing for one in (predicted, truth)]
    between = cdist(*points)
    there, back = between.min(axis=1), between.min(axis=0)
    both = np.concatenate([there, back])
    return {
        "hd95": max(np.percentile(there, 95), np.percentile(back, 95)),
        "asd": both.mean(),
        "nsd": (both <= TOLERANCE).mean(),
    }


@by_rule
def monai_surfaces(predicted, truth, spacing):
    """Return the surface metrics of MONAI."""
    pair = [torch.from_numpy(one)[None, None] for one in (predicted, truth)]
    settings = {"include_background": True, "spacing": list(spacing)}
    return {
        "hd95": float(peers.compute_hausdorff_distance(*pair, percentile=95, **settings)),
        "asd": float(peers.compute_average_surface_distance(*pair, symmetric=True, **settings)),
        "nsd": float(peers.compute_surface_dice(*pair, [TOLERANCE], **settings)),
    }


def scikit_learn(probability, truth, _):
    """Return the metrics of scikit-learn that the mask defines."""
    y, p, predicted = truth.ravel(), probability.ravel(), probability.ravel() >= 0.5
    agreed = float(not y.any() and not predicted.any())
    found = {
        "dice": peer.f1_score(y, predicted, zero_division=1),
        "iou": peer.jaccard_score(y, predicted, zero_division=1),
        "precision": peer.precision_score(y, predicted, zero_division=agreed),
        "accuracy": peer.accuracy_score(y, predicted),
        "brier": peer.brier_score_loss(y, p, pos_label=1),
        "nll": peer.log_loss(y, p, labels=[0, 1]),
    }
    if y.any():
        found["sensitivity"] = peer.recall_score(y, predicted)
        found["average_precision"] = peer.average_precision_score(y, p)
    if not y.all():
        found["specificity"] = peer.recall_score(y, predicted, pos_label=0)
    if y.any() and not y.all():
        found["auc"] = peer.roc_auc_score(y, p)
        observed, predicted = calibration_curve(y, p, n_bins=15)
        edges = np.searchsorted(np.linspace(0, 1, 16)[1:-1], p)
        weights = np.unique(edges, return_counts=True)[1] / p.size
        found["ece"] = weights @ np.abs(observed - predicted)
    return found


def by_hand(probability, truth, _):
    """Return the calibration errors by loops over bins."""
    p, y = probability.ravel(), truth.ravel().astype(float)
    ece, low = 0.0, -math.inf
    for high in np.linspace(0, 1, 16)[1:]:
        inside = (p > low) & (p <= high)
        ece += abs((y[inside] - p[inside]).sum()) / p.size
        low = high
    expected = {value: y[p == value].mean() for value in np.unique(p)}
    bins, ordered = min(15, p.size), np.sort(p)
    cuts = [k * p.size // bins for k in range(bins + 1)]
    gaps = [
        abs(np.mean([expected[value] - value for value in ordered[start:stop]]))
        for start, stop in itertools.pairwise(cuts)
    ]
    return {"ece": ece, "ace": np.mean(gaps)}


def compare_images(images, rows):
    """Add the differences of each image's metrics from each reference to the rows."""
    references = {
        f"scikit-learn {sklearn.__version__}": scikit_learn,
        "by hand, loop over bins": by_hand,
        f"SciPy {scipy.__version__}, all distances": brute_force,
        f"MONAI {monai.__version__}, whole functions": monai_surfaces,
    }
    for probability, truth, spacing in images:
        values = image_metrics(probability, truth, spacing=spacing, tolerance=TOLERANCE)
        for name, reference in references.items():
            for key, expected in reference(probability, truth, spacing).items():
                rows.setdefault((key, name), []).append(abs(values[key] - expected))


def compare_quantile_bins(count, rows):
    """Add the difference of the adaptive calibration error from scikit-learn's quantile bins.

    They agree for distinct probabilities whose number is a multiple of the number of bins.
    """
    generator = np.random.default_rng(1)
    for _ in range(count):
        p = generator.beta(*generator.uniform(0.3, 3, 2), 15 * generator.integers(1, 40))
        y = generator.random(p.size) < generator.random()
        observed, predicted = calibration_curve(y, p, n_bins=15, strategy="quantile")
        expected = np.abs(observed - predicted).mean()
        difference = abs(Ranking.of(p, y).calibration_error() - expected)
        rows.setdefault(("ace", f"scikit-learn {sklearn.__version__}, quantiles"), []).append(
            difference
        )


def all_orders(risk, uncertainty):
    """Return the mean selective risks over all orders that the uncertainties allow."""
    curves = [
        np.cumsum(risk[list(order)]) / np.arange(1, len(risk) + 1)
        for order in itertools.permutations(range(len(risk)))
        if all(uncertainty[a] <= uncertainty[b] for a, b in itertools.pairwise(order))
    ]
    return np.mean(curves, axis=0)


def compare_rankings(count, rows):
    """Add the differences of measures of up to six images, by enumeration of all orders."""
    generator = np.random.default_rng(2)
    for i in range(count):
        n = 1 + i % 6
        risk, uncertainty = generator.random(n), generator.integers(0, 1 + i % 4, n)
        expected, best = all_orders(risk, uncertainty), all_orders(risk, risk)
        area = area_under_risk_coverage(risk, uncertainty)
        differences = {
            "selective risk": np.abs(risk_coverage(risk, uncertainty)[1] - expected).max(),
            "AURC": abs(area - expected.mean()),
            "E-AURC": abs(excess_area(risk, uncertainty) - (expected.mean() - best.mean())),
        }
        for key, difference in differences.items():
            rows.setdefault((key, "by hand, all orders"), []).append(difference)
        failed = generator.random(60) < 0.3
        uncertainty = generator.integers(0, 2 + i, 60)
        expected = peer.roc_auc_score(failed, uncertainty)
        rows.setdefault(("failure AUROC", f"scikit-learn {sklearn.__version__}"), []).append(
            abs(area_under_roc(uncertainty, failed) - expected)
        )


def by_enumeration(differences):
    """Return the two-sided p of the signed-rank test by enumeration of all signs."""
    unequal = differences[differences != 0]
    ranks = scipy.stats.rankdata(np.abs(unequal))
    middle = ranks.sum() / 2
    observed = abs(ranks[unequal > 0].sum() - middle)
    signs = np.array(list(itertools.product((0, 1), repeat=ranks.size)))
    return float((np.abs(signs @ ranks - middle) >= observed - 1e-9).mean())


def by_residuals(first, second, given):
    """Return the correlation of the residuals of two rankings after regression on a third."""
    ranks = [scipy.stats.rankdata(values) for values in (first, second, given)]
    plane = np.column_stack([ranks[2], np.ones(len(first))])
    left = [one - plane @ np.linalg.lstsq(plane, one, rcond=None)[0] for one in ranks[:2]]
    return float(np.corrcoef(*left)[0, 1])


def compare_statistics(count, rows):
    """Add the differences of statistics of two networks on the same images."""
    generator = np.random.default_rng(4)
    for i in range(count):
        n = 2 + i % 9
        first, second = generator.random((2, n)).round(1 + i % 2)
        rows.setdefault(("Wilcoxon's p", "by hand, all signs"), []).append(
            abs(
                paired_difference(first, second, resamples=9).p_value
                - by_enumeration((second - first).round(9))
            )
        )
        first, second, given = generator.normal(size=(3, 20 + i))
        p = scipy.stats.wilcoxon(second - first).pvalue
        rows.setdefault(("Wilcoxon's p", f"SciPy {scipy.__version__}"), []).append(
            abs(paired_difference(first, second, resamples=9).p_value - p)
        )
        rows.setdefault(("partial Spearman", "by hand, residuals of ranks"), []).append(
            abs(partial_spearman(first, second, given) - by_residuals(first, second, given))
        )
        ascending = np.sort(generator.random(1 + i % 7))
        m = ascending.size
        stepped = [min(1, max((m - k) * ascending[k] for k in range(j + 1))) for j in range(m)]
        rows.setdefault(("Holm's p", "by hand"), []).append(np.abs(holm(ascending) - stepped).max())


def compare_intervals(count, rows):
    """Add the widths of bootstrap intervals relative to those of Student's t."""
    generator = np.random.default_rng(5)
    for _ in range(count):
        values = generator.normal(0.8, 0.1, 100)
        low, high = mean_interval(values)
        student = scipy.stats.t.interval(0.95, 99, values.mean(), scipy.stats.sem(values))
        rows.setdefault(("interval's width, share", "Student's t, 100 normal values"), []).append(
            abs((high - low) / (student[1] - student[0]) - 1)
        )


def milliseconds(side, repeats=15):
    """Return the median time of all metrics of an image with a smooth, shifted prediction."""
    generator = np.random.default_rng(3)
    mask = gaussian_filter(generator.standard_normal((side, side)), side / 12) > 0
    probability = 0.15 + 0.6 * np.roll(mask, 3, axis=1) + 0.2 * generator.random(mask.shape)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        image_metrics(probability, mask)
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


def main():
    """Compare and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # warnings of references on degenerate cases
    rows = {}
    compare_images(random_images(arguments.cases, arguments.seed), rows)
    compare_images(degenerate_images(), rows)
    compare_quantile_bins(arguments.cases, rows)
    compare_rankings(arguments.cases, rows)
    compare_statistics(arguments.cases, rows)
    compare_intervals(min(arguments.cases, 20), rows)
    table = Table("metric", "reference", "cases", "largest difference")
    order = list(METRICS) + [key for key, _ in rows]
    for (key, name), differences in sorted(rows.items(), key=lambda row: order.index(row[0][0])):
        table.add_row(key, name, str(len(differences)), f"{np.max(differences):.1e}")
    Console().print(table)
    print(f"all metrics of an image of 256 x 256: {milliseconds(256):.0f} ms (median)")


if __name__ == "__main__":
    main()
