"""What memory holds: how much there is, what is too much for it, and what follows where it ends."""

import contextlib
import ctypes
import errno
import gc
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from polyseg.errors import PolysegError

if TYPE_CHECKING:
    from torch import device as Device  # noqa: N812

log = logging.getLogger(__name__)

Result = TypeVar("Result")

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Names of the settings in glibc's malloc.h."""
_SIGNS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "could not create a memory",
)
"""Of its end, in what libraries say that have no error of their own for it."""
_GROUPS_OF_PROCESS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux tells of control groups, by which containers and queues bound what jobs may hold."""
_GIGABYTE = 10**9


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next tensor of its size.

    By default glibc gives large blocks back at once, and a training step gets all of its feature
    maps as fresh pages that the system has to clear first. Elsewhere than with glibc, nothing is
    done. What the process holds grows no higher than the most that it needs at once.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(name, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether an error means that there was too little memory, of the machine or of a GPU.

    >>> is_out_of_memory(RuntimeError("CUDA out of memory")), is_out_of_memory(MemoryError())
    (True, True)
    >>> is_out_of_memory(RuntimeError("sizes do not match"))
    False
    """
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explaining_memory(task: str, advice: str) -> Iterator[None]:
    """Turn the end of memory in a block into one line that says what to do.

    Raises:
        PolysegError: there was too little memory for the block.

    >>> with explaining_memory("training", "lower training.batch_size"):
    ...     raise MemoryError
    Traceback (most recent call last):
    polyseg.errors.PolysegError: training: ran out of memory; lower training.batch_size
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PolysegError(f"{task}: ran out of memory; {advice}") from None


def memory_of(device: "Device | None" = None) -> int:
    """Return how many bytes this process may hold, or a GPU with memory of its own.

    >>> memory_of() > 2**20
    True
    """
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    bounds += [soft] if soft != resource.RLIM_INFINITY else []
    return min([*bounds, *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    """Yield the limits of the control groups that this process is in, of either version."""
    text = ""
    with contextlib.suppress(OSError):
        text = _GROUPS_OF_PROCESS.read_text()
    for line in text.splitlines():
        group = Path(line.split(":", maxsplit=2)[-1].lstrip("/"))
        for folder in (group, *group.parents):
            for place in (folder / "memory.max", "memory" / folder / "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number, and no limit.
                    yield int((_GROUPS / place).read_text())


def refuse_beyond_memory(
    needed: int, what: str, advice: str, device: "Device | None" = None
) -> None:
    """Raise where so many bytes are more than a machine, or a GPU, can ever hold.

    Args:
        needed: bytes.
        what: takes them, such as "data.demo_images: 100 images".
        advice: how to need fewer.
        device: that is to hold them; None for the machine.

    Raises:
        PolysegError: they are more.

    >>> refuse_beyond_memory(2**20, "data.demo_images: 100 images", "lower it")
    """
    there = memory_of(device)
    if needed > there:
        where = "this GPU" if device is not None and device.type == "cuda" else "this machine"
        raise PolysegError(
            f"{what} take {needed / _GIGABYTE:,.1f} GB, and {where} has "
            f"{there / _GIGABYTE:,.1f} GB; {advice}"
        )


class Portions:
    """How many images are worked on at once: all that come together, or as memory allows.

    Whenever it runs out, what was being worked on is begun anew with half of the images, and no
    more come together from then on.

    >>> def work(rows):
    ...     if rows.stop - rows.start > 2:
    ...         raise MemoryError
    ...     return rows.start, rows.stop
    >>> list(Portions("example", "use another machine").run(5, work, "an image"))
    [(0, 2), (2, 4), (4, 5)]
    """

    def __init__(self, task: str, advice: str) -> None:
        """Begin without a bound.

        Args:
            task: what is done, for the log and for errors.
            advice: what to do where memory does not do for a single image.
        """
        self.task, self.advice = task, advice
        self.most = self.told = sys.maxsize

    def run(self, count: int, work: Callable[[slice], Result], what: str) -> Iterator[Result]:
        """Yield what work gives for one part of so many images after another, in order.

        Args:
            count: of the images.
            work: takes which of them, and may be called again for fewer.
            what: one of them is, such as "an image of 32 x 32".

        Raises:
            PolysegError: there is too little memory for one image.
        """
        start = 0
        while start < count:
            rows = slice(start, min(count, start + self.most))
            results = _attempt(work, rows)
            if not results:
                self._divide(rows.stop - rows.start, what)
                continue
            self._tell()
            start = rows.stop
            yield from results

    def _divide(self, size: int, what: str) -> None:
        """Halve the bound, and free what a failed attempt has left."""
        if size == 1:
            raise PolysegError(f"{self.task}: ran out of memory on {what} alone; {self.advice}")
        self.most = size // 2
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _tell(self) -> None:
        """Log a new bound, once it is known to do."""
        if self.most < self.told:
            self.told = self.most
            log.warning("%s: memory does for %d images at once only", self.task, self.most)


def _attempt(work: Callable[[slice], Result], rows: slice) -> list[Result]:
    """Return what work gives, or nothing where memory runs out.

    On the way back the error is gone, and with it the hold on what the attempt has made.
    """
    try:
        return [work(rows)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.debug("%s", str(error))  # Of which a log may keep the text, and nothing else.
        return []
