"""Losses selected by name against formulas in NumPy."""

import numpy as np
import pytest
import torch

from polyseg import losses
from polyseg.choices import LOSSES
from polyseg.config import LossConfig
from polyseg.training.losses_by_name import build_objective, take_note


@pytest.fixture
def case():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 1, 7, 9, generator=generator)
    mask = (torch.rand(3, 1, 7, 9, generator=generator) < 0.3).float()
    return logits, mask


def flat(tensor):
    return tensor.double().numpy().reshape(len(tensor), -1)


def cross_entropy(p, y):
    return -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean(1)


def reference(name, p, y, config):
    product, size = (p * y).sum(1), (p + y).sum(1)
    if name == "bce":
        return cross_entropy(p, y)
    if name == "dice":
        return 1 - 2 * product / (p**2 + y**2).sum(1)
    if name == "dice_bce":
        # The usual compound loss uses Dice with plain sums, as MONAI and nnU-Net do.
        return 1 - (2 * product + 1e-5) / (size + 1e-5) + cross_entropy(p, y)
    if name == "tversky":
        false_positives, false_negatives = (p * (1 - y)).sum(1), ((1 - p) * y).sum(1)
        weighted = config.tversky_alpha * false_positives + config.tversky_beta * false_negatives
        return 1 - (product + 1e-5) / (product + weighted + 1e-5)
    if name == "focal":
        right = np.where(y == 1, p, 1 - p)
        return -((1 - right) ** config.focal_gamma * np.log(right)).mean(1)
    cosine = product / np.sqrt((p**2).sum(1) * y.sum(1))
    return (1 - ((1 + cosine) / (1 + config.tvmf_concentration * (1 - cosine)) - 1)) ** 2


@pytest.mark.parametrize("name", ["dice", "dice_bce", "bce", "tversky", "focal", "tvmf"])
@pytest.mark.parametrize("bce_weight", [0.0, 0.7])
def test_each_loss_equals_its_formula_for_each_image(case, name, bce_weight):
    logits, mask = case
    config = LossConfig(name=name, bce_weight=bce_weight)
    found = build_objective(config)(logits, mask, torch.zeros(3))
    p, y = 1 / (1 + np.exp(-flat(logits))), flat(mask)
    expected = reference(name, p, y, config) + bce_weight * cross_entropy(p, y)
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5)


@pytest.mark.parametrize(("name", "terms"), [("polydice1", 1), ("polydice", 4)])
def test_each_image_has_its_own_epsilon(case, name, terms):
    logits, mask = case
    epsilon = torch.tensor([-0.4, 0.0, 1.5])
    found = build_objective(LossConfig(name=name, terms=4))(logits, mask, epsilon)
    for i in range(3):
        alone = losses.polydice_loss(
            logits[i : i + 1].sigmoid(), mask[i : i + 1], float(epsilon[i]), terms=terms
        )
        assert found[i].item() == pytest.approx(alone.item())


@pytest.mark.parametrize("scale", ["norms", "printed"])
@pytest.mark.parametrize("name", list(LOSSES))
def test_loss_of_empty_mask_grows_with_the_prediction(name, scale):
    """Its gradient is positive at every pixel."""
    objective = build_objective(LossConfig(name=name, scale=scale))
    logits = torch.tensor([-8.0, -5.0, -2.0]).repeat_interleave(64).reshape(3, 1, 8, 8)
    logits.requires_grad_()
    for epsilon in (-0.4, 0.0, 2.0):
        values = objective(logits, torch.zeros(3, 1, 8, 8), torch.full((3,), epsilon))
        (gradient,) = torch.autograd.grad(values.sum(), logits)
        assert values[0] < values[1] < values[2]
        assert (gradient > 0).all()


def note_of(config, logits, mask, epsilon):
    return take_note(config, build_objective(config)(logits, mask, epsilon), logits, mask, epsilon)


def test_wrong_sign_share_is_reported_for_polydice_losses():
    mask = torch.tensor([[[[0.0, 1.0]]], [[[0.0, 1.0]]]])
    logits = torch.tensor([[[[9.0, -9.0]]], [[[-9.0, 9.0]]]])
    epsilon = torch.zeros(2)

    def reported(config, epsilon):
        return note_of(config, logits, mask, epsilon).wrong_sign.tolist()

    assert reported(LossConfig(), epsilon) == [True, False]
    assert reported(LossConfig(), epsilon - 0.5) == [False, False]
    assert reported(LossConfig(name="dice"), epsilon) == [False, False]


@pytest.mark.parametrize(
    "settings",
    [
        {"name": "polydice1"},
        {"name": "polydice", "terms": 4},
        {"name": "polydice1", "scale": "printed"},
        {"name": "polydice1", "bce_weight": 0.7},
        {"name": "tvmf"},
    ],
)
def test_step_reports_the_loss_at_the_constant_epsilon(case, settings):
    logits, mask = case
    logits.requires_grad_()
    config = LossConfig(epsilon=0.3, **settings)
    constant = torch.full((3,), 0.3)
    expected = build_objective(config)(logits, mask, constant).detach()
    found = note_of(config, logits, mask, torch.tensor([-0.4, 0.3, 1.5])).at_constant
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    assert torch.equal(note_of(config, logits, mask, constant).at_constant, expected)
