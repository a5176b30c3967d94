"""Scores of whole images against NumPy, in plain and compiled passes, and in whole runs."""

import csv
import itertools
import json

import numpy as np
import pytest
import torch
from torch import nn

from polyseg.commands import schedule as job
from polyseg.commands.train import train
from polyseg.config import UncertaintyConfig
from polyseg.errors import PolysegError
from polyseg.montecarlo import assessment as module
from polyseg.montecarlo.assessment import assess
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.montecarlo.passes import stochastic_pass
from polyseg.networks.dropout import active_layers
from polyseg.networks.networks_by_name import build_network
from polyseg.records import Batch
from polyseg.runs.record_files import read_assessment, read_schedule
from polyseg.uncertainty import PairwiseDice, UncertaintyAccumulator, dispersion

ALL = ("dispersion", "expected_error", "pairwise_dice", "size")
N = 6


def by_numpy(samples, masks):
    """Return the scores of (N, rows, H, W) samples by their definitions over pairs."""
    samples, masks = samples.astype(np.float64), masks.astype(np.float64)
    n, rows = samples.shape[:2]
    found = {name: np.zeros(rows) for name in ALL}
    for row in range(rows):
        p, y = samples[:, row], masks[row]
        pairs = list(itertools.combinations(range(n), 2))
        # Half the mean squared distance between two passes is N/(N-1) times the variance.
        distance = np.mean([((p[i] - p[j]) ** 2).sum() / 2 for i, j in pairs])
        found["dispersion"][row] = distance / (np.mean([(one**2).sum() for one in p]) + 1)
        found["expected_error"][row] = np.mean(
            [1 - (2 * (one * y).sum() + 1) / ((one**2).sum() + (y**2).sum() + 1) for one in p]
        )
        differences = []
        for i, j in pairs:
            a, b = p[i] >= 0.5, p[j] >= 0.5
            size = a.sum() + b.sum()
            differences.append(1 - 2 * (a & b).sum() / size if size else 0.0)
        found["pairwise_dice"][row] = np.mean(differences)
        found["size"][row] = -np.log(max(y.sum(), 1))
    return found


def scene(labels, seed=0):
    """Return a network with dropout, and a batch with small foregrounds and one empty mask."""
    torch.manual_seed(seed)
    small = {"channels": [4, 8, 16], "strides": [2, 2], "num_res_units": 1}
    network = build_network(
        "unet", in_channels=1, out_channels=labels, dropout=0.4, settings=small
    ).eval()
    masks = torch.zeros(4, labels, 64, 64, dtype=torch.uint8)
    for i in range(3):
        masks[i, :, 20 + 4 * i : 30 + 5 * i, 24:36] = 1
    names = tuple("abc"[:labels]) if labels > 1 else ("",)
    return network, Batch(list("wxyz"), torch.randn(4, 1, 64, 64), masks, names)


def samples_of(network, batch, count=N):
    """Return the probabilities of passes of the whole network, (N, rows, H, W)."""
    streams = MaskStreams("consistent", 0, 0).of(batch.ids, batch.images.shape[2:])
    with torch.inference_mode():
        layers = active_layers(network)
        each = [
            stochastic_pass(network, layers, batch.images, streams, range(i, i + 1))
            for i in range(count)
        ]
    return torch.stack(each).numpy()


@pytest.mark.slow
@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("program", ["plain", "auto"])
def test_scores_equal_numpy(monkeypatch, labels, program):
    monkeypatch.setattr(module, "_FEWEST_COMPILED", 0)
    network, batch = scene(labels)
    settings = UncertaintyConfig(samples=N, program=program)
    found = assess(network, [batch], settings, also=ALL)
    expected = by_numpy(samples_of(network, batch), batch.masks.flatten(0, 1).numpy())
    for name in ALL:
        np.testing.assert_allclose(found.scores[name], expected[name], rtol=1e-5, atol=1e-7)
        assert np.ptp(found.scores[name]) > 0
    # Measuring whole scores does not change the scores over the region.
    alone = assess(network, [batch], settings)
    for name, values in alone.scores.items():
        np.testing.assert_allclose(found.scores[name], values, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("metric", ["dispersion", "expected_error"])
def test_whole_scores_have_errors_and_stability(metric):
    network, batch = scene(1)
    found = assess(network, [batch], UncertaintyConfig(samples=8, metric=metric))
    samples = samples_of(network, batch, 8)
    masks = batch.masks.flatten(0, 1).numpy()
    groups = [np.arange(8) % 4 != k for k in range(4)]
    left_out = np.stack([by_numpy(samples[kept], masks)[metric] for kept in groups])
    jackknife = np.sqrt(3 / 4 * ((left_out - left_out.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(found.scores_se[metric], jackknife, rtol=1e-4)
    assert 0 <= found.rank_stability[metric] <= 1
    chosen = assess(network, [batch], UncertaintyConfig(samples="auto", metric=metric))
    assert 6 <= chosen.samples <= 100


def test_scores_do_not_depend_on_the_batches():
    network, batch = scene(2)
    one_by_one = [
        Batch([identity], batch.images[i : i + 1], batch.masks[i : i + 1], batch.labels)
        for i, identity in enumerate(batch.ids)
    ]
    whole, parts = (assess(network, each, samples=N, also=ALL) for each in ([batch], one_by_one))
    for name in ALL:
        np.testing.assert_allclose(whole.scores[name], parts.scores[name], rtol=1e-5, atol=1e-7)


def test_accumulated_samples_take_the_memory_of_one():
    record = UncertaintyAccumulator()
    for sample in torch.rand(50, 2, 8, 8):
        record.update(sample)
    assert record.moments.mean.shape == (2, 8, 8) and record.moments.samples == 50
    pairs = PairwiseDice()
    for sample in torch.rand(50, 2, 8, 8):
        pairs.update(sample)
    # Eight pixels per byte.
    assert sum(mask.nbytes for mask in pairs.masks) == 50 * 2 * 8


def test_equal_passes_have_no_dispersion_and_no_pairwise_difference():
    record, pairs = UncertaintyAccumulator(), PairwiseDice()
    for sample in torch.rand(1, 3, 8, 8).repeat(4, 1, 1, 1) * 0.4:
        record.update(sample)
        pairs.update(sample)
    np.testing.assert_allclose(dispersion(record.moments), 0, atol=1e-15)
    assert pairs.value.tolist() == [0, 0, 0]


def test_scores_of_too_few_samples_are_refused():
    record = UncertaintyAccumulator()
    record.update(torch.rand(2, 8, 8))
    with pytest.raises(ValueError, match=r"moments \(2, 8, 8\) of 1 samples"):
        dispersion(record.moments)
    with pytest.raises(ValueError, match="0 samples have no pairs"):
        _ = PairwiseDice().value


def test_score_against_the_mask_needs_a_mask():
    network, batch = scene(1)
    with pytest.raises(PolysegError, match="expected_error: needs masks, and im"):
        assess(network, [batch._replace(masks=None)], samples=N, also=["expected_error"])
    found = assess(network, [batch._replace(masks=None)], samples=N, also=["dispersion"])
    assert np.isfinite(found.scores["dispersion"]).all()


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dispersion", "expected_error", "size"])
def test_run_adapts_to_a_whole_score_and_can_be_recomputed(tiny, tmp_path, metric):
    train(tiny("run", f"uncertainty.metric={metric}", "uncertainty.samples=4"))
    found = read_assessment(tmp_path / "run" / "uncertainty" / "epoch_0003.h5")
    assert found.metric == metric and np.ptp(found.difficulty) > 0
    if metric != "size":
        assert set(ALL) - {"pairwise_dice"} <= found.scores.keys()
        assert np.isfinite(found.scores_se[metric]).all()
    np.testing.assert_allclose(
        found.scores["size"], -np.log(np.maximum(found.mask_pixels, 1)), rtol=1e-12
    )
    job.recompute(tmp_path / "run", out=tmp_path / "again.h5")
    again, own = (
        read_schedule(path) for path in (tmp_path / "again.h5", tmp_path / "run" / "schedule.h5")
    )
    np.testing.assert_array_equal(again.epsilon, own.epsilon)
    assert metric in {row["score"] for row in job.validity(tmp_path / "run").rows}


def test_training_refuses_pairwise_dice_and_names_the_command(tiny):
    with pytest.raises(PolysegError, match="estimate-uncertainty --score pairwise_dice"):
        tiny("run", "uncertainty.metric=pairwise_dice")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_commands_measure_whole_scores(polyseg, finished, tmp_path):
    run = finished("run")
    answer = polyseg(
        *("estimate-uncertainty", run.path, "--out", tmp_path / "estimate"),
        *(word for name in ALL for word in ("--score", name)),
    )
    assert answer.code == 0, answer.err
    found = read_assessment(tmp_path / "estimate" / "assessment.h5")
    assert set(ALL) <= found.scores.keys() and found.metric == "mutual_information"
    answer = polyseg(
        "estimate-uncertainty", run.path, "--score", "pairwise", "--out", tmp_path / "x"
    )
    assert answer.code == 2 and "did you mean pairwise_dice?" in answer.err.replace("\n", " ")


@pytest.mark.slow
def test_evaluate_reports_failure_detection_of_whole_scores(polyseg, finished, tmp_path):
    run = finished("run")
    answer = polyseg(
        *("evaluate", run.path, "--uncertainty", "--split", "all", "--no-figures"),
        *("--out", tmp_path / "evaluation"),
    )
    assert answer.code == 0, answer.err
    with (tmp_path / "evaluation" / "per_image.csv").open() as stream:
        (*_, last) = csv.DictReader(stream)
    assert {"dispersion", "pairwise_dice"} <= {
        column.removeprefix("uncertainty_") for column in last
    }
    assert "pairwise_dice" in json.dumps((tmp_path / "evaluation" / "summary.json").read_text())


def test_assess_needs_only_a_network():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout2d(0.5), nn.Conv2d(4, 1, 1))
    batch = Batch(["a"], torch.rand(1, 1, 8, 8), torch.ones(1, 1, 8, 8))
    assert assess(network, [batch], samples=3, metric="dispersion").difficulty.shape == (1,)
