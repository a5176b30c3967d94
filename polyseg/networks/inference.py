"""Running a trained network as it is: no dropout, no gradient, nothing changed by it."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from polyseg.errors import PolysegError
from polyseg.records import Batch
from polyseg.system.memory import Portions

LESS_MEMORY = "use smaller images (data.size), a smaller network, or the CPU (training.device=cpu)"
"""What to do where one image is too much."""


def choose_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the best at hand.

    Raises:
        PolysegError: this machine has no such device.

    >>> choose_device("cpu")
    device(type='cpu')
    """
    at_hand = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        return torch.device(next(kind for kind, here in at_hand.items() if here))
    if not at_hand.get(name, False):
        here = ", ".join(kind for kind, present in at_hand.items() if present)
        raise PolysegError(f"device {name}: is not at hand; this machine has {here}")
    return torch.device(name)


def choose_algorithms(device: torch.device, *, deterministic: bool) -> None:
    """Let a GPU compute by algorithms that give the same bits each time, or by the fastest ones.

    The fastest are found by trial, which may end otherwise the next time. All that this process
    computes from here on goes by it; it comes before anything is computed there, since cuBLAS looks
    only once. Other devices have no such choice, and nothing is changed for them.

    >>> choose_algorithms(torch.device("cpu"), deterministic=False)
    """
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # What knows no such algorithm warns; memory that is written to anyway need not be filled first.
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def device_of(network: nn.Module) -> torch.device:
    """Return where the network's weights lie.

    >>> device_of(nn.Linear(1, 1))
    device(type='cpu')
    """
    return next((weights.device for weights in network.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def held_in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Hold a network in training or evaluation mode, then give each module its own mode back.

    >>> layer = nn.Dropout(0.5)
    >>> with held_in_mode(layer, training=False):
    ...     layer.training
    False
    >>> layer.training
    True
    """
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def predict(network: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the images in order with their logits, (B, K, H, W) float32 on the CPU.

    They come batch by batch, and in smaller ones from where memory does not do for a whole batch.

    Raises:
        PolysegError: there is too little memory for one image.

    >>> batch = Batch(["a"], torch.zeros(1, 1, 4, 4), None)
    >>> [logits.shape for _, logits in predict(nn.Conv2d(1, 1, 1), [batch])]
    [torch.Size([1, 1, 4, 4])]
    """
    portions = Portions("prediction", LESS_MEMORY)
    for batch in batches:
        yield from portions.run(len(batch.ids), partial(_predict, network, batch), shown(batch))


def _predict(network: nn.Module, batch: Batch, rows: slice) -> tuple[Batch, Tensor]:
    part = images_of(batch, rows)
    with held_in_mode(network, training=False), torch.inference_mode():
        return part, network(part.images.to(device_of(network))).float().cpu()


def images_of(batch: Batch, rows: slice | list[int]) -> Batch:
    """Return some of the images of a batch.

    >>> images_of(Batch(["a", "b"], torch.zeros(2, 1, 4, 4), None), slice(1, 2)).ids
    ['b']
    """
    ids = batch.ids[rows] if isinstance(rows, slice) else [batch.ids[i] for i in rows]
    masks = None if batch.masks is None else batch.masks[rows]
    return batch._replace(ids=ids, images=batch.images[rows], masks=masks)


def shown(batch: Batch) -> str:
    """Return what an image of a batch is called in errors.

    >>> shown(Batch(["a"], torch.zeros(1, 1, 4, 6), None))
    'an image of 4 x 6'
    """
    return "an image of {} x {}".format(*batch.images.shape[2:])
