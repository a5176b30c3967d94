"""How good a segmentation is, image by image, and the tables of it.

The rule for empty cases: where mask and prediction are both empty they agree, which is the best
value; where only one of the two is empty, the worst (the distances are then the image's diagonal);
what the mask alone leaves undefined, sensitivity or AUC-ROC without foreground and specificity or
AUC-ROC without background, is NaN, left out of means and counted.
"""

import csv
import io
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Values = NDArray[np.float64]

RULE = (
    "Both empty: the best value. Only one empty: the worst, distances the image's diagonal. "
    "What the mask leaves undefined is left out."
)


@dataclass(frozen=True)
class MetricColumn:
    """A metric as tables show it."""

    key: str
    title: str
    decimals: int = 3
    best: float = 1.0


METRICS = (
    MetricColumn("accuracy", "Accuracy"),
    MetricColumn("sensitivity", "Sensitivity"),
    MetricColumn("specificity", "Specificity"),
    MetricColumn("auc", "AUC-ROC"),
    MetricColumn("dice", "Dice"),
    MetricColumn("iou", "IoU"),
    MetricColumn("precision", "Precision"),
    MetricColumn("hd95", "HD95 (px)", decimals=2, best=0.0),
    MetricColumn("asd", "ASD (px)", decimals=2, best=0.0),
)

# What MONAI calls the metrics that follow from the confusion matrix.
_MONAI_NAMES = {
    "accuracy": "accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "dice": "f1 score",
    "iou": "threat score",
    "precision": "precision",
}


@dataclass(frozen=True)
class ImageScores:
    """The metrics of one image."""

    id: str
    values: Mapping[str, float]
    """By the key of `METRICS`; NaN where the mask leaves it undefined."""
    mask_pixels: int
    predicted_pixels: int


@dataclass(frozen=True)
class RunScores:
    """The metrics of one network on some images.

    >>> mask = np.array([[1, 0], [0, 0]])
    >>> scores = image_scores("a", np.array([[0.9, 0.6], [0.1, 0.2]]), mask)
    >>> round(RunScores("one", [scores]).mean("dice"), 4)
    0.6667
    """

    name: str
    scores: Sequence[ImageScores]
    label: str = ""
    """Which of the network's labels, where it has several."""

    @property
    def title(self) -> str:
        """The name that tables and figures show."""
        return f"{self.name}: {self.label}" if self.label else self.name

    def column(self, key: str) -> Values:
        """Return a metric of every image, (n,)."""
        return np.array([image.values[key] for image in self.scores], dtype=np.float64)

    def defined(self, key: str) -> Values:
        """Return a metric of the images for which it is defined."""
        values = self.column(key)
        return values[~np.isnan(values)]

    def mean(self, key: str) -> float:
        """Return the mean over the images for which the metric is defined; NaN without any."""
        values = self.defined(key)
        return float(values.mean()) if values.size else math.nan

    def deviation(self, key: str) -> float:
        """Return the standard deviation over the images, divisor n - 1; NaN below two."""
        values = self.defined(key)
        return float(values.std(ddof=1)) if values.size > 1 else math.nan

    def counts(self) -> dict[str, int]:
        """Return how many images were empty in which way."""
        masks = np.array([image.mask_pixels > 0 for image in self.scores], dtype=bool)
        predictions = np.array([image.predicted_pixels > 0 for image in self.scores], dtype=bool)
        return {
            "images": len(self.scores),
            "both empty": int((~masks & ~predictions).sum()),
            "mask empty": int((~masks & predictions).sum()),
            "prediction empty": int((masks & ~predictions).sum()),
        }


def image_scores(identity: str, probability: Values, mask: NDArray[np.integer]) -> ImageScores:
    """Return the metrics of one image, the prediction being probability >= 0.5.

    Args:
        identity: the image's id.
        probability: (H, W) in [0, 1].
        mask: (H, W) in {0, 1}.

    >>> mask = np.array([[1, 1], [0, 0]])
    >>> image_scores("a", np.array([[0.9, 0.4], [0.1, 0.2]]), mask).values["sensitivity"]
    0.5
    """
    truth = np.asarray(mask) > 0
    predicted = np.asarray(probability) >= 0.5
    values = _overlap(predicted, truth) | _distances(predicted, truth)
    values["auc"] = area_under_roc(probability, truth)
    return ImageScores(
        id=identity,
        values={metric.key: values[metric.key] for metric in METRICS},
        mask_pixels=int(truth.sum()),
        predicted_pixels=int(predicted.sum()),
    )


def area_under_roc(score: Values, truth: NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve; NaN unless both classes occur.

    It is the Mann-Whitney statistic over its largest value: the chance that a pixel of the
    foreground scores above one of the background, ties counting half.

    >>> area_under_roc(np.array([0.9, 0.4, 0.4]), np.array([True, True, False]))
    0.75
    """
    from scipy.stats import rankdata

    ranks = rankdata(np.ravel(score))
    chosen = np.ravel(truth)
    positive, negative = int(chosen.sum()), int((~chosen).sum())
    if positive == 0 or negative == 0:
        return math.nan
    statistic = ranks[chosen].sum() - positive * (positive + 1) / 2
    return float(statistic / (positive * negative))


def markdown_table(runs: Sequence[RunScores]) -> str:
    """Return means and standard deviations over the images as a Markdown table, a row a run.

    >>> print(markdown_table([]).splitlines()[0][:33])
    | run | images | Accuracy | Sensi
    """
    heads = ["run", "images", *(metric.title for metric in METRICS)]
    lines = [_row(heads), _row(["---"] + ["---:"] * (len(heads) - 1))]
    for run in runs:
        name = run.title.replace("\\", "\\\\").replace("|", "\\|")
        lines.append(_row([name, str(len(run.scores)), *table_cells(run)]))
    return "\n".join([*lines, "", _footnote(runs), ""])


def latex_table(runs: Sequence[RunScores]) -> str:
    """Return the same table for LaTeX with the package booktabs."""
    heads = ["Run", *(metric.title for metric in METRICS)]
    lines = [
        "% needs \\usepackage{booktabs}",
        "\\begin{tabular}{l" + "r" * len(METRICS) + "}",
        "\\toprule",
        " & ".join(heads) + r" \\",
        "\\midrule",
        *(
            " & ".join([_escape(run.title), *(_latex_cell(cell) for cell in table_cells(run))])
            + r" \\"
            for run in runs
        ),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"% {line}" for line in _footnote(runs).split("\n")),
    ]
    return "\n".join(lines) + "\n"


def per_image_csv(runs: Sequence[RunScores]) -> str:
    """Return every metric of every image of every run as CSV; an empty cell is undefined."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    labelled = any(run.label for run in runs)
    heads = ["run", *(["label"] if labelled else []), "id"]
    writer.writerow([*heads, *(one.key for one in METRICS), "mask_pixels", "predicted_pixels"])
    for run in runs:
        for image in run.scores:
            values = [image.values[metric.key] for metric in METRICS]
            cells = ["" if math.isnan(value) else f"{value:.9g}" for value in values]
            row = [run.name, *([run.label] if labelled else []), image.id]
            writer.writerow([*row, *cells, image.mask_pixels, image.predicted_pixels])
    return text.getvalue()


def summary(runs: Sequence[RunScores]) -> dict[str, object]:
    """Return the summary of an evaluation as plain values, None for what is undefined."""
    return {
        "schema": 1,
        "rule": RULE,
        "runs": [
            {
                "name": run.name,
                **({"label": run.label} if run.label else {}),
                "counts": run.counts(),
                "metrics": {metric.key: _statistics(run, metric.key) for metric in METRICS},
            }
            for run in runs
        ],
    }


def summary_json(runs: Sequence[RunScores]) -> str:
    """Return `summary` as JSON text."""
    return json.dumps(summary(runs), indent=2) + "\n"


def table_cells(run: RunScores) -> list[str]:
    """Return "mean ± deviation" of each metric, a dash where it is undefined."""
    cells = []
    for metric in METRICS:
        mean, deviation = run.mean(metric.key), run.deviation(metric.key)
        cell = "–" if math.isnan(mean) else f"{mean:.{metric.decimals}f}"
        if not math.isnan(deviation):
            cell += f" ± {deviation:.{metric.decimals}f}"
        cells.append(cell)
    return cells


def notes(runs: Sequence[RunScores]) -> list[str]:
    """Return a sentence for each run that has empty cases, and for each metric left undefined."""
    found = []
    for run in runs:
        empty = [
            f"{number} with {what}"
            for what, number in run.counts().items()
            if what != "images" and number
        ]
        left_out = [
            f"{metric.title} of {missing}"
            for metric in METRICS
            if (missing := len(run.scores) - run.defined(metric.key).size)
        ]
        if empty:
            found.append(f"{run.title}: of {len(run.scores)} images {', '.join(empty)}.")
        if left_out:
            found.append(f"{run.title}: left out as undefined: {', '.join(left_out)}.")
    return found


def _overlap(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
    import torch
    from monai.metrics import compute_confusion_matrix_metric, get_confusion_matrix

    matrix = get_confusion_matrix(
        torch.from_numpy(predicted)[None, None].double(), torch.from_numpy(truth)[None, None]
    )
    values = {
        key: float(compute_confusion_matrix_metric(name, matrix))
        for key, name in _MONAI_NAMES.items()
    }
    if not predicted.any():
        # 0/0 for the precision, and for all three where the mask is empty as well.
        agreed = not truth.any()
        values |= dict.fromkeys(("dice", "iou", "precision"), 1.0 if agreed else 0.0)
    return values


def _distances(predicted: NDArray[np.bool_], truth: NDArray[np.bool_]) -> dict[str, float]:
    """Return HD95 and the average symmetric surface distance in pixels."""
    import torch
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

    if not (predicted.any() and truth.any()):
        both_empty = not (predicted.any() or truth.any())
        worst = math.hypot(*truth.shape)
        return dict.fromkeys(("hd95", "asd"), 0.0 if both_empty else worst)
    surfaces = [torch.from_numpy(one)[None, None] for one in (predicted, truth)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hd95 = compute_hausdorff_distance(*surfaces, include_background=True, percentile=95)
        asd = compute_average_surface_distance(*surfaces, include_background=True, symmetric=True)
    return {"hd95": float(hd95), "asd": float(asd)}


def _statistics(run: RunScores, key: str) -> dict[str, float | int | None]:
    values = run.defined(key)
    found = {
        "mean": run.mean(key),
        "deviation": run.deviation(key),
        "median": float(np.median(values)) if values.size else math.nan,
    }
    plain = {name: None if math.isnan(value) else value for name, value in found.items()}
    return {**plain, "n": int(values.size)}


def _footnote(runs: Sequence[RunScores]) -> str:
    return "\n".join(["Mean ± standard deviation over the images. " + RULE, *notes(runs)])


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _latex_cell(cell: str) -> str:
    return cell.replace(" ± ", r" $\pm$ ").replace("–", "--")


def _escape(text: str) -> str:
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: "\\" + character for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)
