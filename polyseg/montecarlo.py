"""MC Dropout: N passes with only the active dropout layers on, and what they say of each image.

This is the plain implementation: every pass runs the whole network. Layers stay in evaluation mode
and a hook multiplies the output of each active one by its mask, drawn from a generator of its own,
so normalisation statistics do not move and torch's random stream is not advanced.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from polyseg.difficulty import Region, foreground_mean, select_region
from polyseg.dropout import active_layers, refuse_hidden_dropout, stochastic_layers
from polyseg.errors import PolysegError
from polyseg.inference import device_of, held_in_mode
from polyseg.networks import hash_weights
from polyseg.overlap import dice_coefficient
from polyseg.records import (
    MAPS,
    METRICS,
    Assessment,
    Batch,
    Metric,
    Progress,
    no_progress,
)
from polyseg.seeds import derive_seed
from polyseg.uncertainty import UncertaintyAccumulator, binary_entropy

__all__ = ["assess", "stochastic_layers", "stochastic_pass"]

Masks = Literal["consistent", "independent"]

_TRIAL_SIDE = 512


def assess(
    network: nn.Module,
    batches: Iterable[Batch],
    *,
    samples: int = 20,
    metric: Metric = "mutual_information",
    region: Region = "mask",
    boundary_width: int = 3,
    masks: Masks = "consistent",
    seed: int = 0,
    epoch: int = 0,
    save_maps: bool = False,
    progress: Progress = no_progress,
    total: int = 0,
) -> Assessment:
    """Measure by MC Dropout how unsure the network is about each image.

    The network, its modes and torch's random stream are afterwards as they were before. With
    "consistent" masks pass n drops the same for every image, so the result does not depend on
    batch size or order; "independent" masks differ from image to image, by its id.

    Args:
        network: maps (B, C, H, W) to logits (B, K, H, W); has active dropout layers.
        batches: images, on any device, of one size within a batch.
        samples: N, at least 2 (what a single pass disagrees with, nobody knows).
        metric: the score that is the difficulty; all three are kept.
        region: the pixels that count, see `select_region`.
        boundary_width: pixels, for region "boundary".
        masks: "consistent" or "independent".
        seed: of the masks, together with epoch, pass and layer.
        epoch: the epochs the network was trained for.
        save_maps: keep the pixel maps as well.
        progress: told before each pass and after each batch how many images are done.
        total: the number of images, for progress.

    Raises:
        PolysegError: no active dropout, dropout that cannot be steered, no images, or a result
            that is not finite.

    >>> batch = Batch(["a", "b"], torch.rand(2, 1, 8, 8), torch.ones(2, 1, 8, 8))
    >>> network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Dropout(0.5), nn.Conv2d(4, 1, 1))
    >>> assess(network, [batch], samples=3).difficulty.shape
    (2,)
    """
    if samples < 2:
        raise PolysegError(f"uncertainty.samples = {samples}: MC Dropout takes at least 2 passes")
    layers = active_layers(network)
    device = device_of(network)
    table = _Table(save_maps)
    done = 0
    with held_in_mode(network, training=False), torch.inference_mode():
        for batch in batches:
            images = batch.images.to(device)
            if not table.ids:
                window = getattr(network, "window", None)
                height, width = window.size if window else (_TRIAL_SIDE, _TRIAL_SIDE)
                part = images[:1, :, :height, :width]
                refuse_hidden_dropout(network, part.repeat(2, 1, 1, 1))
            streams = _MaskStreams(masks, seed, epoch, batch.ids)
            # Told before each pass too, so that who listens can end it between any two.
            tell = functools.partial(progress, "MC Dropout", done, total)
            passes = _passes(network, layers, images, streams, samples, tell)
            table.add(batch, passes, region, boundary_width)
            done += len(batch.ids)
            progress("MC Dropout", done, total)
    if not table.ids:
        raise PolysegError("MC Dropout: there are no images to assess")
    return Assessment(
        weights_sha256=hash_weights(network),
        epoch=epoch,
        samples=samples,
        rate=max(layer.p for layer in layers.values()),
        metric=metric,
        region=region,
        masks=masks,
        seed=seed,
        **table.columns(),
    )


def stochastic_pass(
    network: nn.Module, layers: dict[str, Any], images: Tensor, streams: "_MaskStreams", index: int
) -> Tensor:
    """Return the probabilities of one thinned network, p_n = f(x; z_n) (eq. 7).

    z_n is Bernoulli(1 - rate) and what is kept is divided by 1 - rate, so means are preserved. The
    result is (B K, H, W), the K labels of an image one after another.
    """
    calls = dict.fromkeys(layers, 0)

    def begin(*_: Any) -> None:
        # Window by window, a large image meets one thinned network, not one a window.
        calls.update(dict.fromkeys(layers, 0))

    def drop(name: str, layer: Any, features: Tensor) -> Tensor:
        calls[name] += 1
        shape = features.shape[1:]
        if not isinstance(layer, nn.Dropout):
            shape = torch.Size((shape[0], *(1 for _ in shape[1:])))
        kept = streams.uniform((index, name, calls[name]), shape) >= layer.p
        thinned: Tensor = features * (kept.to(features) / (1 - layer.p))
        return thinned

    hooks = [
        layer.register_forward_hook(
            lambda _module, _inputs, output, name=name, layer=layer: drop(name, layer, output)
        )
        for name, layer in layers.items()
    ]
    hooks.append(getattr(network, "core", network).register_forward_pre_hook(begin))
    try:
        probability: Tensor = network(images).float().sigmoid().flatten(0, 1)
        return probability
    finally:
        for hook in hooks:
            hook.remove()


def _passes(
    network: nn.Module,
    layers: dict[str, Any],
    images: Tensor,
    streams: "_MaskStreams",
    samples: int,
    tell: Callable[[], None],
) -> Iterator[Tensor]:
    for index in range(samples):
        tell()
        yield stochastic_pass(network, layers, images, streams, index).cpu()


@dataclass(frozen=True)
class _MaskStreams:
    """Uniform numbers that belong to (seed, epoch, pass, layer), and to the image if independent.

    They are drawn on the CPU, so every device sees the same masks.
    """

    masks: Masks
    seed: int
    epoch: int
    ids: list[str]

    def uniform(self, key: tuple[int, str, int], shape: torch.Size) -> Tensor:
        """Return (1, *shape) for all images alike, or (B, *shape)."""
        owners: list[tuple[str, ...]] = (
            [()] if self.masks == "consistent" else [(identity,) for identity in self.ids]
        )
        return torch.stack([self._draw((*key, *owner), shape) for owner in owners])

    def _draw(self, key: tuple[int | str, ...], shape: torch.Size) -> Tensor:
        seed = derive_seed(self.seed, self.epoch, "mc-dropout", *key)
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class _Table:
    """The columns of an assessment, filled batch by batch."""

    save_maps: bool
    ids: list[str] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    parts: dict[str, list[NDArray[Any]]] = field(default_factory=dict)
    maps: dict[str, list[NDArray[np.float16]]] = field(default_factory=dict)

    def add(
        self, batch: Batch, passes: Iterable[Tensor], region: Region, boundary_width: int
    ) -> None:
        """Take in the passes of a batch, each (B K, H, W)."""
        truth = None if batch.masks is None else batch.masks.cpu().flatten(0, 1)
        record = UncertaintyAccumulator()
        entropies = []
        for sample in passes:
            record.update(sample)
            if record.count == 1:
                early, _ = select_region(region, truth, sample, boundary_width=boundary_width)
            entropies.append(foreground_mean(binary_entropy(sample), early))
        chosen, fallback = select_region(region, truth, record.mean, boundary_width=boundary_width)
        # Where the region hangs on the prediction, the passes have no region in common.
        settled = (chosen == early).flatten(1).all(dim=1) & (fallback == 0)
        spread = torch.stack(entropies).std(dim=0, correction=1)
        self.ids.extend(identity for identity in batch.ids for _ in batch.labels)
        self.labels.extend(batch.labels * len(batch.ids))
        self._append(
            entropy_sd=spread.where(settled, torch.nan),
            foreground_pixels=chosen.flatten(1).sum(dim=1),
            fallback=fallback,
            dice=torch.full((len(fallback),), torch.nan, dtype=torch.float64)
            if truth is None
            else dice_coefficient(record.mean >= 0.5, truth),
            **{name: foreground_mean(getattr(record, name), chosen) for name in METRICS},
        )
        self._refuse_what_is_not_finite(len(fallback))
        if self.save_maps:
            for name in MAPS:
                values = getattr(record, name).numpy().astype(np.float16)
                self.maps.setdefault(name, []).extend(values)

    def columns(self) -> dict[str, Any]:
        """Return the fields of the assessment that are one value an image."""
        joined = {name: np.concatenate(parts) for name, parts in self.parts.items()}
        entropy_sd = joined.pop("entropy_sd")
        return {
            "ids": self.ids,
            "labels": self.labels if any(self.labels) else None,
            "scores": {name: joined.pop(name) for name in METRICS},
            # Mutual information and entropy of a pass differ by a constant, so they share the
            # spread; one pass alone has no variance.
            "scores_sd": {"mutual_information": entropy_sd, "entropy": entropy_sd},
            "maps": self.maps,
            **joined,
        }

    def _append(self, **columns: Tensor) -> None:
        for name, values in columns.items():
            self.parts.setdefault(name, []).append(values.numpy())

    def _refuse_what_is_not_finite(self, count: int) -> None:
        for name in METRICS:
            finite = np.isfinite(self.parts[name][-1])
            if not finite.all():
                raise PolysegError(
                    f"image {self.ids[-count:][int(finite.argmin())]}: its {name} is not finite; "
                    "the weights have probably diverged, train with a lower training.learning_rate"
                )
