"""Eq. 7: what MC Dropout computes, and that it leaves everything else as it was."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from polyseg.difficulty import FALLBACKS, foreground_mean
from polyseg.dropout import active_layers
from polyseg.errors import PolysegError
from polyseg.montecarlo import assess
from polyseg.networks import build_network, hash_weights, network_names
from polyseg.records import Batch
from polyseg.uncertainty import mutual_information, prediction_variance, predictive_entropy


def make_batch(n=5, size=(32, 32), channels=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, channels, *size, generator=generator)
    masks = torch.zeros(n, 1, *size, dtype=torch.uint8)
    masks[..., 8:20, 8:20] = 1
    return Batch([f"image{i}" for i in range(n)], images, masks)


def split(batch, sizes):
    start = 0
    for size in sizes:
        end = start + size
        yield Batch(batch.ids[start:end], batch.images[start:end], batch.masks[start:end])
        start = end


@pytest.fixture
def network():
    return build_network("unet", in_channels=1, dropout=0.3)


def thin(network, seed_of_pass, rate):
    """Draw masks by torch's own train-mode dropout: the independent way to make one pass."""
    clone = copy.deepcopy(network).eval()
    for module in clone.modules():
        if isinstance(module, nn.Dropout2d):
            module.train()
    torch.manual_seed(seed_of_pass)
    return clone


def test_the_distribution_is_that_of_torchs_own_dropout(network):
    """Mean and variance over many passes agree with modules in train mode, within their errors."""
    batch = make_batch(2)
    passes = 400
    ours = assess(network, [batch], samples=passes, masks="independent", save_maps=True)
    with torch.no_grad():
        clone = thin(network, 1, 0.3)
        samples = torch.stack([clone(batch.images).sigmoid()[:, 0] for _ in range(passes)])
    spread = samples.std(0).mean()
    difference = torch.from_numpy(np.stack(ours.maps["mean"]).astype(np.float32)) - samples.mean(0)
    assert difference.abs().mean() < 4 * spread / passes**0.5
    np.testing.assert_allclose(
        ours.scores["variance"],
        foreground_mean(prediction_variance(samples), batch.masks[:, 0]),
        rtol=0.25,
    )


def test_scores_are_the_equations_of_the_passes(network):
    batch = make_batch(3)
    result = assess(network, [batch], samples=6, seed=4, epoch=2, save_maps=True)
    from polyseg.montecarlo import _MaskStreams, stochastic_pass

    streams = _MaskStreams("consistent", 4, 2, batch.ids)
    network.eval()
    with torch.no_grad():
        samples = torch.stack(
            [
                stochastic_pass(network, active_layers(network), batch.images, streams, n)
                for n in range(6)
            ]
        )
    for name, function in (
        ("mutual_information", mutual_information),
        ("entropy", predictive_entropy),
        ("variance", prediction_variance),
    ):
        expected = foreground_mean(function(samples.double()), batch.masks[:, 0])
        np.testing.assert_allclose(result.scores[name], expected, atol=1e-6)
        np.testing.assert_allclose(result.maps[name], function(samples), atol=1e-3)
    assert len({tuple(sample.flatten()[:5].tolist()) for sample in samples}) == 6
    assert (result.foreground_pixels == 144).all()


@pytest.mark.parametrize("name", network_names())
def test_nothing_of_the_network_or_the_random_stream_moves(name):
    network = build_network(name, in_channels=1).train()
    for i, module in enumerate(network.modules()):
        module.training = i % 3 != 0
    modes = [module.training for module in network.modules()]
    before, stream = hash_weights(network), torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assess(network, [make_batch(2)], samples=2)
    assert hash_weights(network) == before
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("masks", ["consistent", "independent"])
@pytest.mark.parametrize("kind", ["channel", "element"])
def test_difficulty_does_not_depend_on_batches_or_order(masks, kind):
    network = build_network("unet", in_channels=1, dropout=0.3, dropout_kind=kind)
    batch = make_batch(6)
    whole = assess(network, [batch], samples=3, masks=masks)
    parts = assess(network, split(batch, [1, 3, 2]), samples=3, masks=masks)
    np.testing.assert_allclose(whole.difficulty, parts.difficulty, rtol=1e-5)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = Batch([batch.ids[i] for i in order], batch.images[order], batch.masks[order])
    again = assess(network, [shuffled], samples=3, masks=masks)
    np.testing.assert_allclose(whole.difficulty[order], again.difficulty, rtol=1e-5)


def test_the_same_image_twice_is_judged_alike_only_with_consistent_masks(network):
    batch = make_batch(1)
    twins = Batch(["a", "b"], batch.images.repeat(2, 1, 1, 1), batch.masks.repeat(2, 1, 1, 1))
    consistent = assess(network, [twins], samples=4).difficulty
    independent = assess(network, [twins], samples=4, masks="independent").difficulty
    assert consistent[0] == pytest.approx(consistent[1], rel=1e-6)
    assert abs(independent[0] - independent[1]) > 1e-3 * independent[0]


def test_seed_and_epoch_choose_the_masks(network):
    batch = make_batch(2)
    first = assess(network, [batch], samples=3, seed=1, epoch=1).difficulty
    assert np.array_equal(first, assess(network, [batch], samples=3, seed=1, epoch=1).difficulty)
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert not np.array_equal(first, assess(network, [batch], samples=3, **other).difficulty)


def test_normalisation_stays_in_evaluation_mode(network):
    """An image's difficulty does not depend on the others in its batch."""
    batch = make_batch(2)
    alone = assess(network, split(batch, [1]), samples=3).difficulty
    strange = Batch(batch.ids, torch.stack([batch.images[0], batch.images[1] * 100]), batch.masks)
    assert assess(network, [strange], samples=3).difficulty[0] == pytest.approx(alone[0], rel=1e-5)


def test_fallbacks_and_dice_are_recorded(network):
    batch = make_batch(2)
    batch.masks[1] = 0
    result = assess(network, [batch], samples=2)
    assert FALLBACKS[result.fallback[0]] == "none"
    assert FALLBACKS[result.fallback[1]] in ("prediction", "empty")
    assert np.isfinite(result.scores_se["entropy"][0])
    without = assess(network, [Batch(batch.ids, batch.images, None)], samples=2)
    assert np.isnan(without.dice).all()


def test_no_dropout_is_an_error():
    bare = build_network("unet", in_channels=1, dropout=0.0)
    with pytest.raises(PolysegError, match="no active dropout layer"):
        assess(bare, [make_batch(1)])


def test_a_rate_of_one_is_an_error():
    with pytest.raises(PolysegError, match="drops everything"):
        assess(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(1.0)), [make_batch(1)])


def test_one_pass_is_an_error(network):
    with pytest.raises(PolysegError, match="at least 2"):
        assess(network, [make_batch(1)], samples=1)


def test_no_images_is_an_error(network):
    with pytest.raises(PolysegError, match="no images"):
        assess(network, [])


def test_weights_that_diverged_are_named_by_image(network):
    for weights in network.parameters():
        weights.data.fill_(float("nan"))
    with pytest.raises(PolysegError, match=r"image image0: its .* is not finite"):
        assess(network, [make_batch(2)], samples=2)


def test_hooks_are_gone_after_an_error(network):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        assess(network, [make_batch(1)], samples=2, progress=stop)
    assert not any(module._forward_hooks for module in network.modules())
