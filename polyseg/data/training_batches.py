"""Make the batches of an epoch: shuffled, cut, augmented, and read by workers."""

import contextlib
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from polyseg.data.augmentation import Changes, augment
from polyseg.data.dataset import ImageSet
from polyseg.data.order import epoch_order
from polyseg.errors import PolysegError, reason
from polyseg.system.memory import explaining_memory
from polyseg.system.process_group import ALONE, Processes
from polyseg.system.seeds import derive_seed

_FILES_OF_A_WORKER, _FILES_BESIDES = 16, 32
"""Open at once: of pipes and of the batches on their way, and what else may be opened meanwhile."""
_OPEN_FILES = Path("/dev/fd")
_SIGNS_OF_WORKERS = ("DataLoader worker (pid", "Too many open files", "ancdata")
"""In what torch says where the system has ended a worker, or not let it work."""


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
    """Yield the batches of an epoch: shuffled by (seed, epoch), cut and changed by id as well.

    Each is the names of all of its images, and the images and masks that are this process's rows
    of it. The number of workers changes nothing in them, nor does the batch size in a sample, and
    torch's global random stream is not used. Pinned ones lie where CUDA copies from while it
    computes.

    Raises:
        PolysegError: an image cannot be read, or the system does not give the workers what they
            need.
    """
    places = {identity: i for i, identity in enumerate(ids)}
    order = epoch_order(ids, batch_size=batch_size, seed=seed, epoch=epoch)
    loader = DataLoader[Any](
        _Augmented(images, list(ids), seed, epoch, changes),
        # A process without rows of a batch reads one all the same, for its shape.
        batch_sampler=[
            [places[one] for one in _rows(names, processes) or names[:1]] for names in order
        ],
        # Of its own, because workers' seeds would else be drawn from torch's global stream.
        generator=torch.Generator().manual_seed(derive_seed(seed, epoch, "workers")),
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pinned,
    )
    with _explaining_workers():
        _make_room_for_files(workers)
        for names, batch in zip(order, loader, strict=True):
            if isinstance(batch, PolysegError):
                raise batch
            count = len(_rows(names, processes))
            yield names, *(part[:count] for part in batch[1:])


def _rows(names: list[str], processes: Processes) -> list[str]:
    """Return which images of a batch are this process's."""
    return names[processes.rows(len(names))]


class _Augmented(Dataset[tuple[str, Tensor, Tensor]]):
    def __init__(
        self, images: ImageSet, ids: list[str], seed: int, epoch: int, changes: Changes | None
    ) -> None:
        self.images, self.ids = images, ids
        self.seed, self.epoch, self.changes = seed, epoch, changes

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor]:
        identity = self.ids[i]
        key = (self.seed, self.epoch)
        image, masks = self.images.patch(identity, derive_seed(*key, "patch", identity))
        if self.changes is not None:
            seed = derive_seed(*key, "augmentation", identity)
            image, masks = augment(image, masks, self.changes, seed)
        return identity, image, masks

    def __getitems__(self, places: list[int]) -> "_Samples | PolysegError":
        """Return the samples of a batch, or what a user is to know of why there are none.

        What is raised in a worker arrives with the whole way that it came; what is returned, not.
        """
        try:
            with explaining_memory("reading and augmenting", "lower training.workers or data.size"):
                return [self[i] for i in places]
        except PolysegError as error:
            return error


_Samples = list[tuple[str, Tensor, Tensor]]


def _collate(
    samples: _Samples | PolysegError,
) -> tuple[list[str], Tensor, Tensor] | PolysegError:
    if isinstance(samples, PolysegError):
        return samples
    ids, images, masks = zip(*samples, strict=True)
    return list(ids), torch.stack(images), torch.stack(masks)


def _make_room_for_files(workers: int) -> None:
    """Raise the number of files that may be open at once to what the workers need.

    A worker that cannot open another can tell nobody, and would be waited for in vain.
    """
    if workers == 0:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(list(_OPEN_FILES.iterdir())) + _FILES_OF_A_WORKER * workers + _FILES_BESIDES
    bounds = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if needed <= min(bounds, default=needed):
        return
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise PolysegError(
            f"training.workers: {workers} need {needed:,} open files, and {hard:,} are allowed; "
            "lower it, or raise `ulimit -n`"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


@contextlib.contextmanager
def _explaining_workers() -> Iterator[None]:
    """Make one line of what the system refuses to workers, or does to them."""
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
