"""Winograd's algorithm against plain convolutions, alone and in a graph."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from polyseg.montecarlo.compiler import rewrite, winograd
from tests.test_compiler_rewrites import begin, check_unchanged, conv, drop, kinds, run, worst

WIDE = 64  # Channels; enough for maps of 6 x 8.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("size", [(16, 16), (5, 7), (1, 1), (2, 33), (4, 4)])
def test_winograd_equals_convolution(size, bias):
    images = torch.randn(3, 5, *size, dtype=torch.float64)
    weight = torch.randn(4, 5, 3, 3, dtype=torch.float64)
    shift = torch.randn(4, dtype=torch.float64) if bias else None
    expected = functional.conv2d(images, weight, shift, padding=1)
    found = winograd.convolve(images, winograd.transform_kernel(weight), shift)
    assert worst(found, expected) < 1e-12


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_winograd_in_float32_is_accurate_to_five_digits(layout):
    images, weight = torch.randn(2, 256, 16, 16), torch.randn(64, 256, 3, 3)
    expected = functional.conv2d(images.double(), weight.double(), padding=1)
    given = images.contiguous(memory_format=layout)
    found = winograd.convolve(given, winograd.transform_kernel(weight))
    assert worst(found.double(), expected) < 5e-5
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "layers",
    [
        lambda: (drop(), conv(WIDE, WIDE)),
        lambda: (drop(nn.Dropout), conv(WIDE, WIDE, bias=False)),
        lambda: (drop(), conv(WIDE, WIDE), nn.ReLU(), drop()),
    ],
    ids=["channels", "single values", "on both sides"],
)
def test_wide_convolutions_use_winograd(layers):
    core = nn.Sequential(conv(4, WIDE), nn.ReLU(), *layers(), conv(WIDE, 2))
    network, values = begin(core, shared=True)
    expected = run(network, values)
    rewrite.use_winograd(network)
    network.graph.lint()
    assert sum(node.target is winograd.convolve for node in network.graph.nodes) == 1
    assert worst(run(network, values), expected) < 1e-12


@pytest.mark.parametrize(
    "core",
    [
        nn.Sequential(conv(4, WIDE), conv(WIDE, WIDE), drop()),
        nn.Sequential(drop(), conv()),
        nn.Sequential(conv(4, WIDE), drop(), conv(WIDE, WIDE, stride=2)),
        nn.Sequential(conv(4, WIDE), drop(), conv(WIDE, WIDE, padding=2, dilation=2)),
        nn.Sequential(conv(4, WIDE), drop(), conv(WIDE, WIDE, groups=2)),
        nn.Sequential(conv(4, WIDE), drop(), conv(WIDE, WIDE, 5)),
        nn.Sequential(conv(4, WIDE), drop(), conv(WIDE, WIDE, padding=0)),
    ],
    ids=["before dropout", "thin", "stride", "dilation", "groups", "5 x 5", "not padded"],
)
def test_other_convolutions_are_kept(core):
    check_unchanged(core, rewrite.use_winograd, shared=True)
    assert "convolve" not in kinds(begin(core)[0])
