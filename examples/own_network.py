"""A network of one's own for `network.name=own_network:build`."""

from typing import Any

from torch import nn


def build(in_channels: int, out_channels: int, width: int = 24, rate: float = 0.2) -> nn.Module:
    """Return a plain stack of convolutions; MC Dropout needs dropout layers, not functions."""
    layers: list[nn.Module] = []
    channels = in_channels
    for dilation in (1, 2, 4, 8):
        convolution: dict[str, Any] = {"padding": dilation, "dilation": dilation}
        layers += [nn.Conv2d(channels, width, 3, **convolution), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.Dropout2d(rate)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, out_channels, 1))
