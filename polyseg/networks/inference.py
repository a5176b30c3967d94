"""Run a network without dropout and gradients."""

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
"""Advice for the error that one image does not fit into memory."""


def choose_device(name: str) -> torch.device:
    """Return a device by name; "auto" is the first available of cuda, mps and cpu."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    names = [kind for kind, here in available.items() if here]
    if name == "auto":
        return torch.device(names[0])
    if name not in names:
        raise PolysegError(f"device {name}: is not available; this machine has {', '.join(names)}")
    return torch.device(name)


def choose_algorithms(device: torch.device, *, deterministic: bool) -> None:
    """Let a GPU use deterministic algorithms, or measure which are the fastest.

    Call it before anything is computed on the GPU, because cuBLAS reads its setting once. Nothing
    changes for other devices.
    """
    if device.type != "cuda":
        return
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # Operations without a deterministic algorithm warn; filling new memory is not needed.
    torch.use_deterministic_algorithms(deterministic, warn_only=deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic


def device_of(network: nn.Module) -> torch.device:
    """Return the device of a network's weights."""
    return next((weights.device for weights in network.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def held_in_mode(network: nn.Module, *, training: bool) -> Iterator[None]:
    """Hold a network in training or evaluation mode, then restore the mode of each module."""
    modes = [(module, module.training) for module in network.modules()]
    network.train(training)
    try:
        yield
    finally:
        for module, before in modes:
            module.training = before


def predict(network: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the batches with their logits, (B, K, H, W) float32 on the CPU.

    Batches that do not fit into memory are divided.

    >>> batch = Batch(["a"], torch.zeros(1, 1, 4, 4), None)
    >>> [logits.shape for _, logits in predict(nn.Conv2d(1, 1, 1), [batch])]
    [torch.Size([1, 1, 4, 4])]
    """
    portions = Portions("prediction", LESS_MEMORY)
    for batch in batches:
        yield from portions.run(len(batch.ids), partial(_predict, network, batch), size_text(batch))


def _predict(network: nn.Module, batch: Batch, rows: slice) -> tuple[Batch, Tensor]:
    part = images_of(batch, rows)
    with held_in_mode(network, training=False), torch.inference_mode():
        return part, network(part.images.to(device_of(network))).float().cpu()


def images_of(batch: Batch, rows: slice | list[int]) -> Batch:
    """Return some of the images of a batch."""
    ids = batch.ids[rows] if isinstance(rows, slice) else [batch.ids[i] for i in rows]
    masks = None if batch.masks is None else batch.masks[rows]
    return batch._replace(ids=ids, images=batch.images[rows], masks=masks)


def size_text(batch: Batch) -> str:
    """Return the size of the images of a batch as text for errors."""
    return "an image of {} x {}".format(*batch.images.shape[2:])
