"""Eq. 2, 3, 5 and 6 against closed forms, float64 NumPy and finite differences."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyseg.losses import (
    PolyDice1Loss,
    dice_loss,
    in_wrong_sign_region,
    polydice1_curve,
    polydice1_loss,
    polydice_loss,
    scale_and_angle,
    tvmf_dice_loss,
)


def make_case(seed: int, images: int = 4, pixels: int = 200, foreground: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(images, 1, pixels, generator=generator, dtype=torch.float64)
    y = (torch.rand(images, 1, pixels, generator=generator) < foreground).to(torch.float64)
    return p, y


def reference(p, y, epsilon, *, scale="norms", smooth=0.0, terms=1):
    """Return eq. 5 as printed in the paper, in float64 NumPy, for one image."""
    p, y = p.ravel(), y.ravel()
    q, a2, b2 = float(p @ y), float(p @ p), float(y @ y)
    ab = math.sqrt(a2) * math.sqrt(b2)
    s = ((2 * ab if scale == "norms" else 2 * q) + smooth) / (a2 + b2 + smooth)
    theta = math.acos(min(1.0, (2 * q + smooth) / (2 * ab + smooth)))
    total = (0.5 + epsilon) * theta**2
    for k in range(2, terms + 1):
        total += (-1) ** (k - 1) / math.factorial(2 * k) * theta ** (2 * k)
    return (1 - s) + s * total


@pytest.mark.parametrize("scale", ["norms", "printed"])
@pytest.mark.parametrize("smooth", [0.0, 1e-6, 1.0])
@pytest.mark.parametrize("terms", [1, 2, 5])
def test_polydice_equals_numpy_in_float64(scale, smooth, terms):
    p, y = make_case(1)
    epsilon = torch.tensor([-0.4, 0.0, 0.5, 2.0], dtype=torch.float64)
    ours = polydice_loss(p, y, epsilon, terms=terms, scale=scale, smooth=smooth)
    expected = [
        reference(pi.numpy(), yi.numpy(), e, scale=scale, smooth=smooth, terms=terms)
        for pi, yi, e in zip(p, y, epsilon.tolist(), strict=True)
    ]
    np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("smooth", [0.0, 1e-6, 1.0, 50.0])
def test_dice_is_one_minus_s_cosine_theta_at_any_smoothing(smooth):
    p, y = make_case(2)
    s, theta = scale_and_angle(p, y, smooth=smooth)
    torch.testing.assert_close(dice_loss(p, y, smooth=smooth), 1 - s * theta.cos())


def test_dice_equals_closed_form():
    p, y = make_case(3)
    expected = 1 - 2 * (p * y).sum((1, 2)) / ((p**2).sum((1, 2)) + (y**2).sum((1, 2)))
    torch.testing.assert_close(dice_loss(p, y, smooth=0.0), expected)


def test_printed_scale_breaks_the_dice_identity():
    p, y = make_case(2)
    s, theta = scale_and_angle(p, y, scale="printed", smooth=0.0)
    assert ((1 - s * theta.cos()) - dice_loss(p, y, smooth=0.0)).abs().min() > 0.01


def test_polydice_converges_to_dice_with_more_terms():
    p, y = make_case(4)
    errors = [
        float((polydice_loss(p, y, terms=k) - dice_loss(p, y)).abs().max()) for k in range(1, 9)
    ]
    assert all(b < a / 5 for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-10


@given(seed=st.integers(0, 10_000), foreground=st.floats(0.05, 0.9))
def test_polydice_at_epsilon_zero_is_at_least_dice(seed, foreground):
    p, y = make_case(seed, foreground=foreground)
    assert (polydice1_loss(p, y) - dice_loss(p, y)).min() >= -1e-12


@given(seed=st.integers(0, 10_000), low=st.floats(-0.5, 2), more=st.floats(0.001, 2))
def test_loss_increases_with_epsilon(seed, low, more):
    p, y = make_case(seed)
    assert (polydice1_loss(p, y, low + more) > polydice1_loss(p, y, low)).all()


@given(seed=st.integers(0, 10_000), scaling=st.floats(0.1, 1.0))
def test_angle_does_not_depend_on_the_norm_of_the_prediction(seed, scaling):
    p, y = make_case(seed)
    _, theta = scale_and_angle(p, y, smooth=0.0)
    _, scaled = scale_and_angle(p * scaling, y, smooth=0.0)
    torch.testing.assert_close(theta, scaled)


def test_each_image_uses_its_own_epsilon():
    p, y = make_case(5)
    epsilon = torch.tensor([-0.4, 0.0, 0.5, 2.0], dtype=torch.float64)
    together = polydice1_loss(p, y, epsilon)
    alone = [
        polydice1_loss(p[i : i + 1], y[i : i + 1], float(epsilon[i])) for i in range(len(epsilon))
    ]
    torch.testing.assert_close(together, torch.cat(alone))


def test_loss_does_not_depend_on_the_shape_of_an_image():
    p, y = make_case(6, pixels=240)
    maps = polydice1_loss(p.view(4, 1, 12, 20), y.view(4, 1, 12, 20).bool())
    torch.testing.assert_close(maps, polydice1_loss(p, y))


@pytest.mark.parametrize("scale", ["norms", "printed"])
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("smooth", [1e-6, 1.0])
def test_gradient_equals_finite_differences(scale, terms, smooth):
    p, y = make_case(7, images=2, pixels=12)
    p = (0.05 + 0.9 * p).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: polydice_loss(
            x, y, 0.7, terms=terms, scale=scale, scale_gradient="full", smooth=smooth
        ),
        (p,),
    )
    assert torch.autograd.gradcheck(lambda x: dice_loss(x, y, smooth=smooth), (p,))
    assert torch.autograd.gradcheck(lambda x: tvmf_dice_loss(x, y, smooth=smooth), (p,))


def gradient(p, y, epsilon=0.0, **settings):
    p = p.clone().requires_grad_()
    polydice1_loss(p, y, epsilon, **settings).sum().backward()
    assert p.grad is not None
    return p.grad


def test_detached_scale_gives_the_gradient_at_constant_s():
    p, y = make_case(8)
    s, _ = scale_and_angle(p, y)
    x = p.clone().requires_grad_()
    s_live, theta = scale_and_angle(x, y)
    ((1 - s_live) + s * 1.2 * theta.square()).sum().backward()
    torch.testing.assert_close(gradient(p, y, 0.7, scale_gradient="detached"), x.grad)


def test_guard_detaches_scale_only_in_the_wrong_sign_region():
    y = torch.zeros(2, 8, 8, dtype=torch.float64)
    y[:, 0] = 1
    p = torch.full((2, 8, 8), 0.3, dtype=torch.float64)
    p[0, 0] = 0.95  # close to the mask
    _, theta = scale_and_angle(p, y)
    assert in_wrong_sign_region(theta, 1.0).tolist() == [False, True]
    guarded = gradient(p, y, 1.0)
    torch.testing.assert_close(guarded[0], gradient(p, y, 1.0, scale_gradient="full")[0])
    torch.testing.assert_close(guarded[1], gradient(p, y, 1.0, scale_gradient="detached")[1])
    assert (guarded[1] - gradient(p, y, 1.0, scale_gradient="full")[1]).abs().max() > 1e-4


def test_guard_does_not_change_the_loss_value():
    p, y = make_case(9)
    values = [polydice1_loss(p, y, 3.0, scale_gradient=g) for g in ("guarded", "full", "detached")]
    torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)
    torch.testing.assert_close(values[0], values[2], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_perfect_prediction_has_zero_loss_and_finite_gradient(dtype):
    y = torch.tensor([[[1, 1, 0, 0]]], dtype=dtype)
    assert polydice1_loss(y, y, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert gradient(y, y, 1.0).isfinite().all()


@settings(max_examples=30)
@given(exponent=st.floats(-12, -1))
def test_float32_gradient_near_angle_zero_equals_float64(exponent):
    y = torch.zeros(1, 10, 10, dtype=torch.float64)
    y[:, :3] = 1
    p = (y * 0.8 + 10.0**exponent).clamp(0, 1)
    exact = gradient(p, y, 0.5)
    single = gradient(p.float(), y.float(), 0.5).double()
    assert (single - exact).abs().max() < 1e-4 * max(1e-3, float(exact.abs().max()))


def test_orthogonal_prediction_has_angle_pi_over_2():
    p, y = torch.tensor([[[0.0, 0.0, 0.7]]]), torch.tensor([[[1, 1, 0]]])
    _, theta = scale_and_angle(p, y, smooth=0.0)
    assert theta.item() == pytest.approx(math.pi / 2)
    s = 2 * 0.7 * math.sqrt(2) / (0.49 + 2)
    expected = (1 - s) + s * 0.5 * (math.pi / 2) ** 2
    assert polydice1_loss(p, y, smooth=0.0).item() == pytest.approx(expected, rel=1e-6)
    assert gradient(p, y).isfinite().all()


@pytest.mark.parametrize("smooth", [1e-6, 0.1, 1.0])
def test_loss_and_gradient_of_empty_mask_follow_the_stated_rule(smooth):
    p = torch.rand(1, 5, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = torch.zeros_like(p)
    a2 = float((p**2).sum())
    for epsilon in (-0.4, 0.0, 2.0):
        loss = polydice1_loss(p, y, epsilon, smooth=smooth)
        assert loss.item() == pytest.approx(a2 / (a2 + smooth))
        expected = 2 * p * smooth / (a2 + smooth) ** 2
        torch.testing.assert_close(gradient(p, y, epsilon, smooth=smooth), expected)


@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_zero_prediction_has_finite_gradient(mask):
    p, y = torch.zeros(1, 4, 4), torch.full((1, 4, 4), mask)
    assert gradient(p, y, 0.5).isfinite().all()
    assert polydice1_loss(p, y).item() == pytest.approx(mask, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    p, y = make_case(10, pixels=40_000)  # a^2 exceeds the range of float16
    half = p.to(dtype)
    loss = polydice1_loss(half, y, 0.5)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, polydice1_loss(half.double(), y, 0.5).float())
    assert gradient(half, y, 0.5).dtype == dtype


def test_losses_ignore_autocast():
    p, y = make_case(11, pixels=10_000)
    p, y = p.float(), y.float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = polydice1_loss(p, y, 0.5)
    assert torch.equal(inside, polydice1_loss(p, y, 0.5))


def test_float64_stays_float64():
    p, y = make_case(12)
    assert polydice1_loss(p, y.bool(), 0.5).dtype == torch.float64


def test_float32_is_close_to_float64_on_a_large_image():
    p, y = make_case(13, pixels=512 * 512)
    single = polydice1_loss(p.float(), y.float(), 0.5).double()
    torch.testing.assert_close(single, polydice1_loss(p, y, 0.5), rtol=2e-6, atol=0)


def test_curve_equals_the_loss_over_the_angle():
    p, y = make_case(14)
    s, theta = scale_and_angle(p, y, smooth=0.0)
    for i in range(len(p)):
        curve = polydice1_curve(theta[i : i + 1].numpy(), 0.5, float(s[i]))
        assert curve[0] == pytest.approx(
            polydice1_loss(p[i : i + 1], y[i : i + 1], 0.5, smooth=0.0).item()
        )


def test_wrong_sign_region_begins_at_the_stated_angles():
    """(1/2 + epsilon) theta^2 > 1 from 1.41 rad at epsilon 0 and from 0.82 rad at epsilon 1."""
    for epsilon, start in ((0.0, math.sqrt(2)), (1.0, math.sqrt(2 / 3))):
        angles = torch.tensor([start - 1e-3, start + 1e-3])
        assert in_wrong_sign_region(angles, epsilon).tolist() == [False, True]


@given(cosine=st.floats(0, 1), concentration=st.floats(0, 100))
def test_tvmf_equals_its_formula(cosine, concentration):
    y = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    p = torch.tensor([[[cosine, math.sqrt(1 - cosine**2)]]], dtype=torch.float64)
    phi = (1 + cosine) / (1 + concentration * (1 - cosine)) - 1
    assert tvmf_dice_loss(p, y, concentration, smooth=0.0).item() == pytest.approx(
        (1 - phi) ** 2, abs=1e-9
    )


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"terms": 0}, "at least one term"),
        ({"scale": "other"}, "scale"),
        ({"scale_gradient": "other"}, "scale_gradient"),
    ],
)
def test_unknown_settings_are_refused(settings, match):
    p, y = make_case(1)
    with pytest.raises(ValueError, match=match):
        polydice_loss(p, y, **settings)


def with_shape(*shape):
    return torch.full(shape, 0.5), torch.ones(shape)


@pytest.mark.parametrize(
    ("shape", "mask_shape", "per_channel", "match"),
    [
        ((2, 3, 4), (2, 3, 5), False, r"\(2, 3, 4\).*\(2, 3, 5\)"),
        ((2, 1, 3, 4), (2, 3, 4), False, r"\(2, 1, 3, 4\).*\(2, 3, 4\)"),
        ((2, 12), (2, 12), False, r"\(2, 12\).*must have one shape"),
        ((), (), False, r"\(\).*must have one shape"),
        ((2, 1, 1, 1, 3, 4), (2, 1, 1, 1, 3, 4), True, r"\(2, 1, 1, 1, 3, 4\).*one shape"),
        ((2, 3, 4, 4), (2, 3, 4, 4), False, r"\(2, 3, 4, 4\).*3 channels"),
        ((2, 3, 4, 4, 4), (2, 3, 4, 4, 4), False, r"\(2, 3, 4, 4, 4\).*3 channels"),
        ((2, 4, 4), (2, 4, 4), True, r"\(2, 4, 4\).*no channels"),
    ],
)
@pytest.mark.parametrize(
    "function", [dice_loss, scale_and_angle, polydice_loss, polydice1_loss, tvmf_dice_loss]
)
def test_invalid_shapes_are_refused(function, shape, mask_shape, per_channel, match):
    with pytest.raises(ValueError, match=match):
        function(torch.full(shape, 0.5), torch.ones(mask_shape), per_channel=per_channel)


@pytest.mark.parametrize(
    ("epsilon_shape", "per_channel"),
    [
        *((shape, False) for shape in ((4, 1), (5,), (1,), (4, 4), (1, 4), (4, 3))),
        *((shape, True) for shape in ((3,), (4, 1), (1, 3), (3, 4), (4, 3, 1))),
    ],
)
@pytest.mark.parametrize("function", [polydice_loss, polydice1_loss])
def test_epsilon_of_wrong_shape_is_refused(function, epsilon_shape, per_channel):
    p, y = with_shape(4, 3 if per_channel else 1, 2, 5)
    found = re.escape(str(epsilon_shape))
    with pytest.raises(ValueError, match=rf"epsilon {found} must be a number or of shape \(4,\)"):
        function(p, y, torch.zeros(epsilon_shape), per_channel=per_channel)


def test_curve_refuses_epsilon_of_another_shape_than_the_angles():
    with pytest.raises(ValueError, match=r"epsilon \(2, 1\)"):
        in_wrong_sign_region(torch.ones(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"epsilon \(3,\).*theta \(3, 1\)"):
        polydice1_curve(np.ones((3, 1)), np.zeros(3), 0.5)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64, torch.uint8, torch.bool])
def test_integer_probability_is_refused(dtype):
    with pytest.raises(ValueError, match=r"probability \(1, 2, 2\).*floating point.*" + str(dtype)):
        polydice1_loss(torch.ones(1, 2, 2, dtype=dtype), torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        *((dtype, value) for dtype in (torch.int16, torch.float32) for value in (255, 2, -1)),
        *((torch.uint8, value) for value in (2, 16, 255)),
        *((dtype, 0.5) for dtype in (torch.float32, torch.bfloat16)),
    ],
)
def test_mask_with_values_other_than_0_and_1_is_refused(dtype, value):
    mask = torch.zeros(2, 1, 3, 3, dtype=dtype)
    mask[1, 0, 2, 2] = value
    with pytest.raises(ValueError, match=r"mask \(2, 1, 3, 3\) must contain only 0 and 1"):
        dice_loss(torch.rand(2, 1, 3, 3), mask)


def test_mask_with_nan_is_refused():
    with pytest.raises(ValueError, match="only 0 and 1"):
        dice_loss(torch.rand(1, 2, 2), torch.full((1, 2, 2), math.nan))


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16])
def test_masks_of_any_dtype_give_the_same_loss(dtype):
    p, y = make_case(16)
    assert torch.equal(polydice1_loss(p, y.to(dtype)), polydice1_loss(p, y))


@pytest.mark.parametrize("size", [(12, 20), (3, 8, 10)])
@pytest.mark.parametrize("function", [dice_loss, polydice_loss, polydice1_loss, tvmf_dice_loss])
def test_each_channel_is_a_separate_task(function, size):
    p, y = (values.view(4, 3, *size) for values in make_case(17, images=12, pixels=240))
    found = function(p, y, per_channel=True)
    assert found.shape == (4, 3)
    for k in range(3):
        torch.testing.assert_close(found[:, k], function(p[:, k : k + 1], y[:, k : k + 1]))


@pytest.mark.parametrize("shape", [(), (4,), (4, 3)])
def test_epsilon_may_be_given_per_image_or_channel(shape):
    p, y = (values.view(4, 3, 12, 20) for values in make_case(18, images=12, pixels=240))
    epsilon = torch.rand(shape, dtype=torch.float64)
    found = polydice1_loss(p, y, epsilon, per_channel=True)
    s, theta = scale_and_angle(p, y, per_channel=True)
    each = epsilon[:, None].expand(4, 3) if shape == (4,) else epsilon.expand(4, 3)
    for i, k in itertools.product(range(4), range(3)):
        alone = polydice1_loss(p[i : i + 1, k], y[i : i + 1, k], float(each[i, k]))
        assert found[i, k].item() == pytest.approx(alone.item())
    torch.testing.assert_close(found, (1 - s) + s * (0.5 + each) * theta.square())
    wrong = in_wrong_sign_region(theta, epsilon)
    assert torch.equal(wrong, (0.5 + each) * theta.square() > 1)


def test_gradient_of_a_channel_does_not_depend_on_other_channels():
    p, y = (values.view(2, 3, 5, 4) for values in make_case(19, images=6, pixels=20))
    together = gradient(p, y, 0.7, per_channel=True)
    for k in range(3):
        alone = gradient(p[:, k : k + 1], y[:, k : k + 1], 0.7)
        torch.testing.assert_close(together[:, k : k + 1], alone)


@pytest.mark.parametrize(("angle", "epsilon"), [(1.3, 0.0), (1.5, 0.0), (0.7, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("terms", [1, 3])
def test_loss_increases_with_s_in_the_wrong_sign_region(angle, epsilon, terms):
    """The derivative is taken by autograd through the written-out curve at a constant angle."""
    s = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    steepness = [0.5 + epsilon, -1 / 24, 1 / 720][:terms]
    penalty = sum(alpha * angle ** (2 * k) for k, alpha in enumerate(steepness, start=1))
    loss = (1 - s) + s * penalty
    (slope,) = torch.autograd.grad(loss, s)
    theta = torch.tensor([angle], dtype=torch.float64)
    assert in_wrong_sign_region(theta, epsilon, terms=terms).item() == (slope.item() > 0)
    low, high = (
        polydice1_curve(theta.numpy(), epsilon, s.item() + step, terms=terms)
        for step in (-0.01, 0.01)
    )
    assert (high - low).item() == pytest.approx(0.02 * slope.item())


def test_full_gradient_rewards_small_s_in_the_wrong_sign_region_but_guarded_does_not():
    """Scaling down a prediction that is already too small changes s only, at a constant angle."""
    y = torch.zeros(1, 8, 8, dtype=torch.float64)
    y[:, 0] = 1
    p = torch.full_like(y, 0.1)
    s, theta = scale_and_angle(p, y)
    smaller, same = scale_and_angle(0.9 * p, y)
    assert smaller < s and in_wrong_sign_region(theta, 1.0)
    torch.testing.assert_close(same, theta)

    def slope(scale_gradient):
        return (gradient(p, y, 1.0, scale_gradient=scale_gradient) * p).sum()

    assert slope("full") > 0 > slope("guarded")


@pytest.mark.parametrize("smooth", [1e-6, 1.0])
@pytest.mark.parametrize("concentration", [0.0, 32.0])
def test_tvmf_of_an_empty_mask_is_the_dice_loss(smooth, concentration):
    p = torch.rand(2, 5, 5, dtype=torch.float64)
    y = torch.zeros_like(p)
    found = tvmf_dice_loss(p, y, concentration, smooth=smooth)
    torch.testing.assert_close(found, dice_loss(p, y, smooth=smooth))


class TestModule:
    logits = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(2)) > 0.5

    def test_module_applies_the_function_to_the_sigmoid(self):
        settings = {"scale": "printed", "scale_gradient": "full", "smooth": 0.5}
        epsilon = torch.tensor([[0.0, 0.5], [1.0, -0.4], [0.2, 0.3]])
        expected = polydice1_loss(
            self.logits.sigmoid(), self.masks, epsilon, per_channel=True, **settings
        )
        settings |= {"per_channel": True, "sigmoid": True}
        each = PolyDice1Loss(reduction="none", **settings)(self.logits, self.masks, epsilon)
        assert torch.equal(each, expected)
        mean = PolyDice1Loss(**settings)(self.logits, self.masks, epsilon)
        assert torch.equal(mean, expected.mean())

    def test_module_takes_probabilities_and_epsilon_zero_by_default(self):
        probability, mask = self.logits[:, 0].sigmoid(), self.masks[:, 0]
        found = PolyDice1Loss()(probability, mask)
        assert torch.equal(found, polydice1_loss(probability, mask).mean())

    def test_half_precision_logits_use_a_float32_sigmoid(self):
        logits, mask = torch.full((1, 4, 4), 9.0), torch.ones(1, 4, 4)
        module = PolyDice1Loss(sigmoid=True)
        assert torch.equal(module(logits.half(), mask), module(logits, mask))
        assert module(logits.double(), mask).dtype == torch.float64

    def test_unknown_reduction_is_refused(self):
        with pytest.raises(ValueError, match="reduction = 'sum'"):
            PolyDice1Loss(reduction="sum")
