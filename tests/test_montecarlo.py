"""MC Dropout (eq. 7): scores, chosen number of passes, and limited memory."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from polyseg.choices import NETWORKS, UNCERTAINTIES
from polyseg.config import UncertaintyConfig
from polyseg.difficulty import FALLBACKS, foreground_mean
from polyseg.errors import PolysegError
from polyseg.montecarlo import assessment, choose_samples, measurement, passes
from polyseg.montecarlo.assessment import assess
from polyseg.montecarlo.dropout_masks import MaskStreams
from polyseg.montecarlo.passes import stochastic_pass
from polyseg.networks.dropout import active_layers
from polyseg.networks.inference import images_of, predict
from polyseg.networks.networks_by_name import build_network
from polyseg.networks.segmentation_network import hash_weights
from polyseg.records import Batch
from polyseg.runs.assessment_text import describe, describe_order
from polyseg.training.log_lines import log_assessment
from polyseg.uncertainty import mutual_information, prediction_variance, predictive_entropy

SMALL = {"channels": [8, 16, 32], "strides": [2, 2], "num_res_units": 2}


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
        yield images_of(batch, slice(start, end))
        start = end


@pytest.fixture
def network():
    return build_network("unet", in_channels=1, dropout=0.3, settings=SMALL)


@pytest.fixture(params=[0, np.inf], ids=["program", "plain"])
def _compiled_or_plain(request, monkeypatch):
    """Compile networks even for the few small images of these tests, or never."""
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", request.param)


def thin(network, seed_of_pass, rate):
    """Return one pass with torch's own dropout in training mode, as an independent reference."""
    clone = copy.deepcopy(network).eval()
    for module in clone.modules():
        if isinstance(module, nn.Dropout2d):
            module.train()
    torch.manual_seed(seed_of_pass)
    return clone


@pytest.mark.slow
def test_passes_have_the_distribution_of_torch_dropout(network):
    """Mean and variance over many passes agree with training mode within their errors."""
    batch = make_batch(2)
    passes = 400
    ours = assess(
        network, [batch], UncertaintyConfig(samples=passes, masks="independent", save_maps=True)
    )
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


def test_scores_follow_the_equations_from_the_passes(network):
    batch = make_batch(3)
    result = assess(network, [batch], UncertaintyConfig(samples=6, save_maps=True), seed=4, epoch=2)
    streams = MaskStreams("consistent", 4, 2, batch.ids)
    network.eval()
    with torch.no_grad():
        samples = torch.stack(
            [
                stochastic_pass(
                    network, active_layers(network), batch.images, streams, range(n, n + 1)
                )
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


@pytest.mark.slow
@pytest.mark.usefixtures("_compiled_or_plain")
@pytest.mark.parametrize(
    ("_compiled_or_plain", "name"),
    [*((0, name) for name in NETWORKS), (np.inf, "unet")],
    indirect=["_compiled_or_plain"],
)
def test_assessment_changes_neither_network_nor_random_state(name):
    network = build_network(name, in_channels=1).train()
    for i, module in enumerate(network.modules()):
        module.training = i % 3 != 0
    modes = [module.training for module in network.modules()]
    before, stream = hash_weights(network), torch.random.get_rng_state()
    numpy_before = np.random.get_state()[1].tolist()  # noqa: NPY002
    assess(network, [make_batch(2)], UncertaintyConfig(samples=2))
    assert hash_weights(network) == before
    assert [module.training for module in network.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), stream)
    assert np.random.get_state()[1].tolist() == numpy_before  # noqa: NPY002
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.usefixtures("_compiled_or_plain")
@pytest.mark.parametrize(
    ("_compiled_or_plain", "kind", "masks"),
    [
        (0, "channel", "consistent"),
        (0, "element", "independent"),
        (np.inf, "channel", "independent"),
        (np.inf, "element", "consistent"),
    ],
    indirect=["_compiled_or_plain"],
)
def test_difficulty_does_not_depend_on_batches_or_order(masks, kind):
    network = build_network("unet", in_channels=1, dropout=0.3, dropout_kind=kind, settings=SMALL)
    batch = make_batch(6)
    whole = assess(network, [batch], UncertaintyConfig(samples=3, masks=masks))
    parts = assess(network, split(batch, [1, 3, 2]), UncertaintyConfig(samples=3, masks=masks))
    np.testing.assert_allclose(whole.difficulty, parts.difficulty, rtol=1e-5)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = Batch([batch.ids[i] for i in order], batch.images[order], batch.masks[order])
    again = assess(network, [shuffled], UncertaintyConfig(samples=3, masks=masks))
    np.testing.assert_allclose(whole.difficulty[order], again.difficulty, rtol=1e-5)


def test_equal_images_have_equal_scores_only_with_consistent_masks(network):
    batch = make_batch(1)
    twins = Batch(["a", "b"], batch.images.repeat(2, 1, 1, 1), batch.masks.repeat(2, 1, 1, 1))
    consistent = assess(network, [twins], UncertaintyConfig(samples=4)).difficulty
    independent = assess(
        network, [twins], UncertaintyConfig(samples=4, masks="independent")
    ).difficulty
    assert consistent[0] == pytest.approx(consistent[1], rel=1e-6)
    assert abs(independent[0] - independent[1]) > 1e-3 * independent[0]


def test_seed_and_epoch_determine_the_masks(network):
    batch = make_batch(2)
    settings = UncertaintyConfig(samples=3)
    first = assess(network, [batch], settings, seed=1, epoch=1).difficulty
    assert np.array_equal(first, assess(network, [batch], settings, seed=1, epoch=1).difficulty)
    for other in ({"seed": 2, "epoch": 1}, {"seed": 1, "epoch": 2}):
        assert not np.array_equal(first, assess(network, [batch], settings, **other).difficulty)


def test_normalisation_stays_in_evaluation_mode(network):
    """The difficulty of an image does not depend on the others in its batch."""
    batch = make_batch(2)
    alone = assess(network, split(batch, [1]), UncertaintyConfig(samples=3)).difficulty
    strange = Batch(batch.ids, torch.stack([batch.images[0], batch.images[1] * 100]), batch.masks)
    assert assess(network, [strange], UncertaintyConfig(samples=3)).difficulty[0] == pytest.approx(
        alone[0], rel=1e-5
    )


def test_fallbacks_and_dice_are_recorded(network):
    batch = make_batch(2)
    batch.masks[1] = 0
    result = assess(network, [batch], UncertaintyConfig(samples=4))
    assert FALLBACKS[result.fallback[0]] == "none"
    assert FALLBACKS[result.fallback[1]] in ("prediction", "empty")
    assert np.isfinite(result.scores_se["entropy"][0])
    without = assess(network, [Batch(batch.ids, batch.images, None)], UncertaintyConfig(samples=2))
    assert np.isnan(without.dice).all()


@pytest.mark.parametrize("save_maps", [False, True])
@pytest.mark.parametrize("region", ["mask", "prediction", "union", "boundary", "image"])
def test_mask_size_is_recorded_for_every_region(network, region, save_maps):
    batch = make_batch(3)
    batch.masks[1, 0, 2:5, 25:] = 1
    batch.masks[2] = 0
    result = assess(
        network, [batch], UncertaintyConfig(samples=2, region=region, save_maps=save_maps)
    )
    assert result.mask_pixels.tolist() == [144, 144 + 21, 0]
    assert result.mask_pixels.dtype == np.int64
    if region == "image":
        assert (result.foreground_pixels == 32 * 32).all()


def test_mask_size_is_recorded_for_each_label():
    network = build_network("unet", in_channels=1, out_channels=2, settings=SMALL)
    images, masks = make_batch(2).images, torch.zeros(2, 2, 32, 32, dtype=torch.uint8)
    masks[0, 0, :2, :3], masks[0, 1, :5, :7], masks[1, 1, 9:, 9:] = 1, 1, 1
    batch = Batch(["b", "a"], images, masks, ("organ", "tumour"))
    result = assess(network, [batch], UncertaintyConfig(samples=2, region="prediction"))
    assert result.mask_pixels.tolist() == [6, 35, 0, 23 * 23]
    assert result.of_label("tumour").in_order(["a", "b"]).mask_pixels.tolist() == [23 * 23, 35]


def test_mask_sizes_are_missing_if_any_image_has_no_mask(network):
    batch = make_batch(2)
    without = Batch(["c", "d"], batch.images, None)
    for batches in ([without], [batch, without], [without, batch]):
        result = assess(network, batches, UncertaintyConfig(samples=2))
        assert result.mask_pixels is None
        assert result.in_order(result.ids[::-1]).mask_pixels is None


@pytest.mark.slow
@pytest.mark.parametrize("save_maps", [False, True])
@pytest.mark.parametrize("with_masks", [False, True])
@pytest.mark.parametrize("samples", [2, 3, 4, 5])
def test_errors_and_stability_are_missing_below_4_passes_and_never_0(
    network, samples, with_masks, save_maps
):
    """Half of 2 or 3 passes is a single pass, which has no disagreement."""
    batch, how = varied_batch(6), {"samples": samples, "save_maps": save_maps}
    if not with_masks:
        batch, how = batch._replace(masks=None), how | {"region": "image"}
    result = assess(network, split(batch, [4, 2]), UncertaintyConfig(**how))
    line = describe(result)
    for name in UNCERTAINTIES:
        errors, stability = result.scores_se[name], result.rank_stability[name]
        assert errors.shape == (6,)
        if samples < 4:
            assert np.isnan(errors).all() and np.isnan(stability)
        else:
            assert (errors > 1e-7).all() and 0 <= stability <= 1
    known = "standard error and rank stability unknown below 4 passes"
    assert (known in line) == (samples < 4)


def test_undefined_rank_stability_is_shown_as_unknown(network):
    """Two images have no rank correlation."""
    assert describe(assess(network, [make_batch(2)], UncertaintyConfig(samples=4))).endswith(
        "expected rank correlation with many passes unknown"
    )


def test_full_mask_is_not_the_easiest_by_its_boundary(network):
    batch = make_batch(3)
    batch.masks[1] = 1
    result = assess(network, [batch], UncertaintyConfig(samples=4, region="boundary"))
    assert FALLBACKS[result.fallback[0]] == FALLBACKS[result.fallback[2]] == "none"
    if (result.foreground_pixels > 0).all():
        assert FALLBACKS[result.fallback[1]] == "prediction" and result.difficulty[1] > 0
    else:
        assert FALLBACKS[result.fallback[1]] == "empty"
    alone = assess(network, [make_batch(3)], UncertaintyConfig(samples=4, region="boundary"))
    np.testing.assert_allclose(result.difficulty[[0, 2]], alone.difficulty[[0, 2]], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "save_maps"), [(0.51, False), (0.9, True), (0.999, False)])
def test_automatic_samples_reach_the_rank_target(network, target, save_maps):
    batches = list(split(make_batch(9), [4, 5]))
    how = {"save_maps": save_maps, "metric": "entropy"}
    ours = assess(
        network, iter(batches), UncertaintyConfig(samples="auto", rank_target=target, **how)
    )
    stability = ours.rank_stability["entropy"]
    assert ours.samples == choose_samples.MOST or (
        ours.samples >= choose_samples.FEWEST and stability >= target
    )
    if ours.samples > choose_samples.FEWEST:
        fewer = assess(network, batches, UncertaintyConfig(samples=choose_samples.FEWEST, **how))
        assert fewer.rank_stability["entropy"] < target
    # The passes used for the choice count towards the total.
    same = assess(network, batches, UncertaintyConfig(samples=ours.samples, **how))
    np.testing.assert_equal(dataclasses.asdict(ours), dataclasses.asdict(same))


def test_higher_rank_target_takes_more_passes(network):
    counts = [
        assess(
            network, [make_batch(9)], UncertaintyConfig(samples="auto", rank_target=target)
        ).samples
        for target in (0.51, 0.9, 0.9999)
    ]
    assert counts == sorted(counts)
    assert counts[0] == choose_samples.FEWEST and counts[-1] == choose_samples.MOST


def test_number_of_passes_depends_on_the_first_images_only(network, monkeypatch):
    monkeypatch.setattr(choose_samples, "_IMAGES", 5)
    batches = list(split(make_batch(9), [3, 3, 3]))
    how = {"samples": "auto", "rank_target": 0.97}
    first = assess(network, batches[:2], UncertaintyConfig(**how)).samples
    changed = batches[2]._replace(images=-3 * batches[2].images)
    for last in (batches[2], changed):
        assert assess(network, [*batches[:2], last], UncertaintyConfig(**how)).samples == first


def test_network_without_dropout_is_refused():
    bare = build_network("unet", in_channels=1, dropout=0.0)
    with pytest.raises(PolysegError, match="no active dropout layer"):
        assess(bare, [make_batch(1)])


def test_dropout_rate_of_one_is_refused():
    with pytest.raises(PolysegError, match="drops everything"):
        assess(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(1.0)), [make_batch(1)])


def test_empty_set_of_images_is_refused(network):
    with pytest.raises(PolysegError, match="no images"):
        assess(network, [])


def test_non_finite_prediction_names_the_image(network):
    for weights in network.parameters():
        weights.data.fill_(float("nan"))
    with pytest.raises(PolysegError, match=r"image image0: its .* is not finite"):
        assess(network, [make_batch(2)], UncertaintyConfig(samples=2))


def test_hooks_are_removed_after_an_error(network):
    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    with pytest.raises(Stop):
        assess(network, [make_batch(1)], UncertaintyConfig(samples=2), progress=stop)
    assert not any(module._forward_hooks for module in network.modules())


# ---- limited memory


def refuse_more(network, most):
    """Make a network run out of memory for more than `most` images."""

    def refuse(_, inputs):
        if len(inputs[0]) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")

    return network.register_forward_pre_hook(refuse)


def varied_batch(n):
    """Return images of clearly different difficulty, so that rounding changes no rank."""
    batch = make_batch(n)
    return batch._replace(images=batch.images * torch.linspace(0.2, 4, n)[:, None, None, None])


def assert_alike(found, expected):
    np.testing.assert_allclose(found.difficulty, expected.difficulty, rtol=1e-5)
    found, expected = dataclasses.asdict(found), dataclasses.asdict(expected)
    assert found["ids"] == expected["ids"] and found["samples"] == expected["samples"]
    np.testing.assert_allclose(found["scores"]["entropy"], expected["scores"]["entropy"], rtol=1e-6)
    for name in ("scores", "scores_se", "maps"):
        for key, values in expected[name].items():
            np.testing.assert_allclose(found[name][key], values, rtol=1e-4, atol=1e-7)
    for name in ("foreground_pixels", "mask_pixels", "fallback"):
        np.testing.assert_array_equal(found[name], expected[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("samples", "masks", "most"),
    [
        (4, "consistent", 2),
        (4, "independent", 5),
        ("auto", "consistent", 5),
        ("auto", "independent", 3),
    ],
)
def test_out_of_memory_divides_batches_and_keeps_scores(network, samples, masks, most):
    batches = list(split(varied_batch(13), [7, 6]))
    batches[0].masks[3] = 0
    how = {"samples": samples, "masks": masks, "rank_target": 0.97}
    expected = assess(network, batches, UncertaintyConfig(**how))
    hook = refuse_more(network, most)
    found = assess(network, batches, UncertaintyConfig(**how))
    hook.remove()
    assert_alike(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("save_maps", [False, True])
def test_out_of_memory_runs_the_program_on_parts(network, monkeypatch, save_maps):
    monkeypatch.setattr(assessment, "_FEWEST_COMPILED", 0)
    batch, how = varied_batch(6), {"samples": 3, "save_maps": save_maps}
    expected = assess(network, [batch], UncertaintyConfig(**how))
    whole, sizes = passes.PreparedBatch, []

    def tight(program, images, *arguments, **more):
        sizes.append(len(images))
        if len(images) > 2:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return whole(program, images, *arguments, **more)

    monkeypatch.setattr(passes, "PreparedBatch", tight)
    assert_alike(assess(network, [batch], UncertaintyConfig(**how)), expected)
    # After the halves, a third of the batch at a time, and never plain passes.
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1]


def test_out_of_memory_after_the_first_passes_keeps_scores(network, monkeypatch):
    """Images that already had passes are measured again in parts."""
    batches = list(split(varied_batch(9), [4, 5]))
    how = {"samples": "auto", "rank_target": 0.9999}
    expected = assess(network, batches, UncertaintyConfig(**how))
    assert expected.samples > choose_samples.FEWEST
    extend = measurement.Measurement.extend

    def later(self, samples, tell):
        if samples > choose_samples.FEWEST and len(self.batch.ids) > 2:
            raise MemoryError
        extend(self, samples, tell)

    monkeypatch.setattr(measurement.Measurement, "extend", later)
    found = assess(network, batches, UncertaintyConfig(**how))
    assert_alike(found, expected)


def test_out_of_memory_for_one_image_states_its_size(network, monkeypatch):
    monkeypatch.setattr(passes, "_TRIAL_SIDE", 16)

    def refuse(_, inputs):
        if inputs[0].shape[-1] > 16:
            raise torch.OutOfMemoryError("CUDA out of memory.\nOf the allocated memory")

    network.register_forward_pre_hook(refuse)
    with pytest.raises(PolysegError, match=r"^MC Dropout: .* image of 32 x 32 alone; use .*$"):
        assess(network, [make_batch(3)], UncertaintyConfig(samples=2))


def test_out_of_memory_before_any_pass_is_one_line(network):
    refuse_more(network, 0)
    with pytest.raises(PolysegError, match=r"^MC Dropout: ran out of memory; use smaller .*$"):
        assess(network, [make_batch(3)], UncertaintyConfig(samples=2))


def test_out_of_memory_divides_predictions(network):
    batches = list(split(make_batch(9), [5, 4]))
    expected = torch.cat([logits for _, logits in predict(network, batches)])
    refuse_more(network, 2)
    found = list(predict(network, batches))
    assert [len(batch.ids) for batch, _ in found] == [2, 2, 1, 2, 2]
    assert [name for batch, _ in found for name in batch.ids] == make_batch(9).ids
    torch.testing.assert_close(torch.cat([logits for _, logits in found]), expected)
    assert torch.equal(torch.cat([batch.masks for batch, _ in found]), make_batch(9).masks)


def test_out_of_memory_for_one_prediction_is_one_line(network):
    refuse_more(network, 0)
    with pytest.raises(PolysegError, match="prediction: ran out of memory on an image of 32 x 32"):
        list(predict(network, [make_batch(2)]))


@pytest.mark.parametrize(("dice", "warned"), [(0.05, True), (0.5, False), (np.nan, False)])
def test_difficulty_of_a_network_that_hardly_segments_is_warned_of(network, dice, warned, caplog):
    found = assess(network, [make_batch(4)], UncertaintyConfig(samples=2))
    log_assessment(dataclasses.replace(found, dice=np.full(4, dice)), is_last=False)
    assert ("raise control.start" in caplog.text) == warned


def test_correlation_with_error_is_described_for_each_label(network):
    found = assess(network, [make_batch(n=6)], UncertaintyConfig(samples=2))
    ordered = np.arange(6.0)
    given = {"scores": {"mutual_information": ordered}}
    (line,) = describe_order(dataclasses.replace(found, **given, dice=1 - ordered / 10))
    assert line == (
        "Spearman's correlation of D with 1 - Dice: 1.00 (95 % interval 1.00 to 1.00, 6 images)"
    )
    dice = np.array([0.1, 0.3, 0.2, 0.5, 0.4, 0.6])
    (line,) = describe_order(dataclasses.replace(found, **given, dice=dice))
    assert line.endswith("D falls as the error rises; see `polyseg schedule validity`")
    # The difficulty of one label increases with its error, the other decreases.
    both = dataclasses.replace(
        found,
        ids=[name for name in found.ids for _ in range(2)],
        labels=["x", "y"] * 6,
        scores={"mutual_information": np.repeat(ordered, 2)},
        scores_se={},
        foreground_pixels=np.ones(12, np.int64),
        mask_pixels=None,
        fallback=np.zeros(12, np.int8),
        dice=np.ravel([1 - ordered / 10, dice], order="F"),
    )
    first, second = describe_order(both)
    assert first.startswith("Spearman's correlation of D of x") and "see" not in first
    assert "D of y falls as the error rises" in second
    assert describe_order(dataclasses.replace(found, dice=np.full(6, np.nan))) == []
