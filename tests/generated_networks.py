"""Generate small random networks of operations that do or do not commute with cropping."""

import torch
from torch import nn
from torch.nn import functional

SIZES = ((32, 48), (48, 32), (32, 32), (40, 24))


class Apply(nn.Module):
    """Apply a function to one feature map."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, maps):
        return self.function(maps)


class PositionFactor(nn.Module):
    """Multiply each position by its own factor: a parameter, or a ramp computed from the size."""

    def __init__(self, pick):
        super().__init__()
        self.ramp = bool(pick(2))

    def forward(self, maps):
        width = maps.shape[3]
        if self.ramp:
            return maps * torch.linspace(0.5, 1.5, width)
        place = torch.arange(maps.shape[2] * width).view(1, 1, -1, width)
        return maps * (1 + 0.5 * torch.sin(place.to(maps)))


class ChannelGate(nn.Module):
    """Multiply each channel by a gate computed from its mean (squeeze and excitation)."""

    def __init__(self, channels):
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, maps):
        return maps * self.mix(maps.mean(dim=(2, 3))).sigmoid()[:, :, None, None]


class HardGate(nn.Module):
    """Set values below a threshold to zero."""

    def forward(self, maps):
        return maps * (maps.mean(dim=1, keepdim=True) > 0)


class PixelAttention(nn.Module):
    """Weight pixels by a softmax over all of them, through a reshape."""

    def forward(self, maps):
        rows = maps.flatten(2)
        return (rows * rows.softmax(dim=2) * rows.shape[2]).view_as(maps)


class Decoded(nn.Module):
    """Run an encoder and a decoder with skip connections."""

    def __init__(self, down, up, bottom, join, resize):
        super().__init__()
        self.down, self.up, self.bottom = nn.ModuleList(down), nn.ModuleList(up), bottom
        self.join, self.resize = join, resize

    def forward(self, images):
        kept, maps = [], images
        for block, shrink in self.down:
            maps = block(maps)
            kept.append(maps)
            maps = shrink(maps)
        maps = self.bottom(maps)
        for (grow, block), skip in zip(self.up, reversed(kept), strict=True):
            if self.resize:
                maps = functional.interpolate(maps, size=skip.shape[2:], mode="bilinear")
            else:
                maps = grow(maps)
            maps = torch.cat([maps, skip], dim=1) if self.join else maps + skip
            maps = block(maps)
        return maps


def exact(pick, channels):
    """Return a layer that commutes with cropping and keeps the shape."""
    kinds = [
        lambda: nn.Conv2d(channels, channels, 3, padding=1),
        lambda: nn.Conv2d(channels, channels, 3, padding=2, dilation=2),
        lambda: nn.Conv2d(channels, channels, (1, 5), padding=(0, 2), groups=2),
        lambda: nn.Conv2d(channels, channels, 1),
        lambda: nn.BatchNorm2d(channels),
        lambda: nn.ReLU(inplace=bool(pick(2))),
        lambda: nn.PReLU(channels if pick(2) else 1),
        nn.GELU,
        lambda: nn.LeakyReLU(0.1),
        lambda: nn.MaxPool2d(3, 1, 1),
        lambda: nn.AvgPool2d(3, 1, 1),
        lambda: nn.Dropout2d(0.3),
        lambda: nn.Dropout(0.2),
    ]
    return kinds[pick(len(kinds))]()


def other(pick, channels):
    """Return a layer that keeps the shape but does not commute with cropping or is not listed."""
    kinds = [
        lambda: Apply(lambda maps: maps.flip(3) + 0.5 * maps),
        lambda: Apply(lambda maps: torch.roll(maps, 3, dims=2)),
        lambda: PositionFactor(pick),
        lambda: ChannelGate(channels),
        HardGate,
        PixelAttention,
        lambda: nn.GroupNorm(2, channels),
        lambda: nn.InstanceNorm2d(channels),
        lambda: Apply(lambda maps: maps + functional.adaptive_avg_pool2d(maps, 1)),
        lambda: Apply(lambda maps: maps - maps.mean(dim=(2, 3), keepdim=True)),
        lambda: nn.Conv2d(channels, channels, 3, padding="same"),
        lambda: nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect"),
        lambda: nn.Conv2d(channels, channels, 3, padding=1, padding_mode="circular"),
        lambda: Apply(lambda maps: maps.cumsum(dim=3) / maps.shape[3]),
        lambda: Apply(lambda maps: maps.softmax(dim=1)),
        lambda: Apply(lambda maps: functional.pad(maps, (1, 0, 0, 2))[..., 2:, :-1]),
        lambda: Apply(lambda maps: torch.cat(maps.chunk(2, dim=1)[::-1], dim=1)),
        lambda: Apply(
            lambda maps: functional.interpolate(
                functional.avg_pool2d(maps, 2), scale_factor=2, mode="bilinear", align_corners=True
            )
        ),
        lambda: Apply(
            lambda maps: functional.interpolate(
                maps[..., ::2, ::2], scale_factor=2, mode="bicubic", align_corners=False
            )
        ),
        lambda: Apply(
            lambda maps: functional.pixel_unshuffle(functional.pixel_shuffle(maps, 2), 2)
        ),
        lambda: Apply(lambda maps: functional.unfold(maps, 1).view_as(maps) * 0.9),
    ]
    return kinds[pick(len(kinds))]()


def shrinking(pick, channels):
    """Return a layer that halves height and width."""
    return [
        lambda: nn.MaxPool2d(2),
        lambda: nn.AvgPool2d(2),
        lambda: nn.MaxPool2d(3, 2, 1),
        lambda: nn.Conv2d(channels, channels, 3, stride=2, padding=1),
        lambda: nn.Conv2d(channels, channels, 2, stride=2),
        lambda: nn.Conv2d(channels, channels, 4, stride=2, padding=1),
    ][pick(6)]()


def growing(pick, channels):
    """Return a layer that doubles height and width."""
    return [
        lambda: nn.ConvTranspose2d(channels, channels, 2, 2),
        lambda: nn.ConvTranspose2d(channels, channels, 3, 2, 1, output_padding=1),
        lambda: nn.ConvTranspose2d(channels, channels, 4, 2, 1),
        lambda: nn.Upsample(scale_factor=2),
        lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    ][pick(5)]()


def generate(pick, *, strange):
    """Return a network from 1 to 1 channel, in evaluation mode.

    Args:
        pick: function that returns a number below its argument.
        strange: number of layers that do not commute with cropping.
    """
    channels, levels, join = 4, 1 + pick(2), bool(pick(2))

    def block(inputs, length):
        layers = [nn.Conv2d(inputs, channels, 3, padding=1)]
        return nn.Sequential(*layers, *(exact(pick, channels) for _ in range(length)))

    down = [
        nn.ModuleList([block(1 if i == 0 else channels, 1 + pick(2)), shrinking(pick, channels)])
        for i in range(levels)
    ]
    bottom = nn.Sequential(block(channels, pick(3)), nn.Dropout2d(0.3))
    up = [
        nn.ModuleList([growing(pick, channels), block(2 * channels if join else channels, pick(4))])
        for _ in range(levels)
    ]
    core = Decoded(down, up, bottom, join, strange > 0 and pick(4) == 0)
    blocks = [one[0] for one in down] + [bottom] + [one[1] for one in up]
    for _ in range(strange):
        blocks[pick(len(blocks))].append(other(pick, channels))
    head = nn.Conv2d(channels, 1, 1 if pick(2) else 3, padding="valid")
    head.padding = ((head.kernel_size[0] - 1) // 2,) * 2
    return nn.Sequential(core, head).eval()
