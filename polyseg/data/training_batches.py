"""Make the batches of an epoch, with shuffling, patches, augmentation and worker processes."""

import contextlib
import resource
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert

from polyseg.data.augmentation import Changes, augment
from polyseg.data.dataset import ImageSet
from polyseg.data.order import epoch_order
from polyseg.errors import PolysegError, reason
from polyseg.system.memory import explaining_memory
from polyseg.system.process_group import ALONE, Processes
from polyseg.system.seeds import derive_seed

_FILES_OF_A_WORKER, _FILES_BESIDES = 16, 32
"""Numbers of open files for pipes and batches of a worker, and for everything else."""
_OPEN_FILES = Path("/dev/fd")
_SIGNS_OF_WORKERS = ("DataLoader worker (pid", "Too many open files", "ancdata")
"""Phrases in torch's errors about workers that the system has ended or limited."""


def training_batches(
    images: ImageSet,
    ids: Sequence[str],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    changes: Changes | None = None,
    workers: int = 0,
    pinned: bool = False,
    processes: Processes = ALONE,
) -> Iterator[tuple[list[str], Tensor, Tensor]]:
    """Yield the batches of an epoch, shuffled, cropped and augmented by seed, epoch and id.

    Each has the ids of all its images, and this process's rows of the images and masks. The
    number of workers changes no batch, the batch size changes no sample, and torch's global random
    stream is not used. CUDA can copy pinned batches while it computes.

    Raises:
        PolysegError: an image cannot be read, or the system does not give the workers what they
            need.
    """
    order = epoch_order(ids, batch_size=batch_size, seed=seed, epoch=epoch)
    loader = DataLoader[Any](
        _Samples(images, seed, epoch, changes),
        # A process without rows of a batch reads one image, for its shape.
        batch_sampler=[_rows(names, processes) or names[:1] for names in order],
        # Separate, because workers' seeds would otherwise use torch's global generator.
        generator=torch.Generator().manual_seed(derive_seed(seed, epoch, "workers")),
        num_workers=workers,
        collate_fn=default_convert,  # `_Samples` returns whole batches.
        pin_memory=pinned,
    )
    with _explaining_workers():
        _raise_file_limit(workers)
        for names, batch in zip(order, loader, strict=True):
            if isinstance(batch, PolysegError):
                raise batch
            count = len(_rows(names, processes))
            yield names, *(part[:count] for part in batch)


def _rows(names: list[str], processes: Processes) -> list[str]:
    """Return the images of a batch that belong to this process."""
    return names[processes.rows(len(names))]


@dataclass(frozen=True)
class _Samples(Dataset[tuple[Tensor, Tensor]]):
    images: ImageSet
    seed: int
    epoch: int
    changes: Changes | None

    def __getitems__(self, ids: list[str]) -> tuple[Tensor, Tensor] | PolysegError:
        """Return the images and masks of a batch, or the error for the user.

        An error that is raised in a worker would arrive with its traceback.
        """
        try:
            with explaining_memory("reading and augmenting", "lower training.workers or data.size"):
                images, masks = zip(*(self._sample(identity) for identity in ids), strict=True)
                return torch.stack(images), torch.stack(masks)
        except PolysegError as error:
            return error

    def _sample(self, identity: str) -> tuple[Tensor, Tensor]:
        key = (self.seed, self.epoch)
        image, masks = self.images.patch(identity, derive_seed(*key, "patch", identity))
        if self.changes is None:
            return image, masks
        return augment(image, masks, self.changes, derive_seed(*key, "augmentation", identity))


def _raise_file_limit(workers: int) -> None:
    """Raise the limit of open files to the number that the workers need.

    A worker that cannot open a file cannot report it, and training would wait for it forever.
    """
    if workers == 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(list(_OPEN_FILES.iterdir())) + _FILES_OF_A_WORKER * workers + _FILES_BESIDES
    if soft == resource.RLIM_INFINITY or needed <= soft:
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise PolysegError(
            f"training.workers: {workers} need {needed:,} open files, and {hard:,} are allowed; "
            "lower it, or raise `ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _explaining_workers() -> Iterator[None]:
    """Turn errors of the system about workers into PolysegError."""
    try:
        yield
    except OSError as error:
        raise PolysegError(f"training.workers: {reason(error)}") from None
    except RuntimeError as error:
        said = " ".join(str(error).split())
        if not any(sign in said for sign in _SIGNS_OF_WORKERS):
            raise
        raise PolysegError(
            f"training.workers: {said:.200}; lower training.workers, or set it to 0"
        ) from None
