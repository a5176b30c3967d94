"""Adaptive epsilons in a training loop of the user's own."""

import io

import numpy as np
import pytest
import torch
from torch import nn

import polyseg
from polyseg import AdaptiveEpsilon
from polyseg.commands.train import train
from polyseg.config import ControlConfig, UncertaintyConfig
from polyseg.data.augmentation import changes_of
from polyseg.data.loading import load_images
from polyseg.data.new_split import new_split
from polyseg.data.training_batches import training_batches
from polyseg.records import Batch
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.run_folder import RunDirectory
from polyseg.runs.weights import new_network
from polyseg.system.seeds import derive_seed
from polyseg.training.optimizers import build_optimizer, learning_rate

from .test_docs import TOP, code_blocks


def small_network():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))


def batch_of(*ids, labels=("",)):
    noise = torch.Generator().manual_seed(len(ids))
    images = torch.rand(len(ids), 1, 8, 8, generator=noise)
    return Batch(list(ids), images, (images > 0.5).repeat(1, len(labels), 1, 1), labels)


@pytest.fixture
def assessed():
    """Return an AdaptiveEpsilon that has assessed four images, and the assessment."""
    adaptive = AdaptiveEpsilon(uncertainty=UncertaintyConfig(samples=4))
    return adaptive, adaptive.assess(small_network(), [batch_of("a", "b"), batch_of("c", "d")])


def equation_11_and_12(difficulty, percentile, sensitivity, low, high):
    normalised = (difficulty - np.percentile(difficulty, percentile)) / (difficulty.std() + 1e-9)
    return low + (high - low) / (1 + np.exp(-sensitivity * normalised))


@pytest.mark.slow
@pytest.mark.parametrize("statistics", ["batch", "dataset"])
def test_training_loop_of_docs_equals_polyseg_train(tiny, statistics):
    config = tiny(
        *("run", "training.epochs=5", "control.every=2", "loss.epsilon=0.1"),
        *("training.channels_last=false", f"control.statistics={statistics}"),
    )
    train(config)
    kept = read_checkpoint(RunDirectory(config.output.path).last)
    names: dict = {}
    exec(code_blocks(TOP / "docs" / "library.md")[-1], names)
    settings, images = config.training, load_images(config.data)
    ids = new_split(config, images)["train"]
    torch.manual_seed(derive_seed(settings.seed, "weights"))
    network = new_network(config, images.channels)
    optimizer = build_optimizer(settings, network)
    met = np.full((settings.epochs, len(ids)), np.nan, np.float32)

    def batches(epoch):
        optimizer.param_groups[0]["lr"] = learning_rate(settings, epoch)
        torch.manual_seed(derive_seed(settings.seed, epoch, "dropout"))
        for given in training_batches(
            *(images, ids),
            batch_size=settings.batch_size,
            seed=settings.seed,
            epoch=epoch,
            changes=changes_of(config.data),
        ):
            epsilon = adaptive.epsilon(given[0])
            met[epoch - 1, [ids.index(identity) for identity in given[0]]] = epsilon
            yield given

    adaptive = AdaptiveEpsilon(
        config.control, config.uncertainty, constant=config.loss.epsilon, seed=settings.seed
    )
    whole = list(images.batches(ids, settings.batch_size))
    names["fit"](network, optimizer, batches, whole, adaptive, settings.epochs)
    print("largest difference:", np.abs(met - kept.schedule.epsilon).max())
    assert np.array_equal(met, kept.schedule.epsilon)
    assert (met[0] == np.float32(0.1)).all() and np.ptp(met[1]) > 0.1
    for name, values in network.state_dict().items():
        assert torch.equal(values, kept.weights[name]), name


def test_batch_statistics_use_the_images_of_the_batch(assessed):
    adaptive, assessment = assessed
    difficulty = dict(zip(assessment.ids, assessment.difficulty, strict=True))
    for ids in (["d", "a", "b"], ["c", "b"]):
        found = adaptive.epsilon(ids)
        expected = equation_11_and_12(np.array([difficulty[i] for i in ids]), 50, 1, -0.4, 1)
        assert found.dtype == torch.float32
        assert found.numpy() == pytest.approx(expected, abs=1e-6)


def test_dataset_statistics_do_not_depend_on_the_batch():
    control = ControlConfig(statistics="dataset", percentile=30, sensitivity=2, epsilon_max=0.5)
    adaptive = AdaptiveEpsilon(control, UncertaintyConfig(samples=4))
    assessment = adaptive.assess(small_network(), [batch_of("a", "b", "c")])
    expected = equation_11_and_12(assessment.difficulty, 30, 2, -0.4, 0.5)
    assert adaptive.epsilon(["a", "b", "c"]).numpy() == pytest.approx(expected, abs=1e-6)
    assert adaptive.epsilon(["c"]).item() == pytest.approx(expected[2], abs=1e-6)


def test_each_label_has_a_column_of_epsilons():
    adaptive = AdaptiveEpsilon(uncertainty=UncertaintyConfig(samples=4))
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Dropout(0.5), nn.ConvTranspose2d(4, 2, 3))
    batch = batch_of("a", "b", "c", labels=("one", "two"))
    assessment = adaptive.assess(network, [batch])
    found = adaptive.epsilon(["a", "b", "c"]).numpy()
    assert found.shape == (3, 2)
    for k, label in enumerate(("one", "two")):
        difficulty = assessment.of_label(label).difficulty
        expected = equation_11_and_12(difficulty, 50, 1, -0.4, 1)
        assert found[:, k] == pytest.approx(expected, abs=1e-6)
    loss = polyseg.PolyDice1Loss(sigmoid=True, per_channel=True, reduction="none")
    assert loss(network(batch.images), batch.masks, adaptive.epsilon(batch.ids)).shape == (3, 2)


def test_state_dict_round_trip_restores_epsilons(assessed):
    adaptive, _ = assessed
    file = io.BytesIO()
    torch.save(adaptive.state_dict(), file)
    file.seek(0)
    other = AdaptiveEpsilon()
    other.load_state_dict(torch.load(file, weights_only=True))
    ids = ["b", "d", "a"]
    assert torch.equal(other.epsilon(ids), adaptive.epsilon(ids))
    other.load_state_dict(AdaptiveEpsilon().state_dict())
    assert other.epsilon(ids).tolist() == [0, 0, 0]


def test_invalid_arguments_raise_value_error(assessed):
    adaptive, _ = assessed
    with pytest.raises(ValueError, match="'x' was not assessed"):
        adaptive.epsilon(["a", "x"])
    with pytest.raises(ValueError, match="training_loss"):
        AdaptiveEpsilon(uncertainty=UncertaintyConfig(metric="training_loss"))
    with pytest.raises(ValueError, match=r"\(3, 1\) must be \(n, labels\) for 2 ids"):
        adaptive.load_state_dict({"ids": ["a", "b"], "difficulty": torch.zeros(3, 1)})
