"""Measure memory, report errors when it runs out, and retry with smaller batches."""

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
"""Names of settings in glibc's malloc.h."""
_SIGNS = (
    "can't allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "ALLOC_FAILED",
    "could not create a memory",
)
"""Parts of the messages of libraries that raise RuntimeError when memory runs out."""
_GROUPS_OF_PROCESS, _GROUPS = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Where Linux lists control groups, by which containers and queues limit memory."""
_GIGABYTE = 10**9


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for later tensors; do nothing with other C libraries.

    By default glibc returns large blocks to the system, which then clears fresh pages for the
    feature maps of each training step. The peak memory of the process does not grow.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 2**26)):
            mallopt(name, value)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the machine or a GPU ran out of memory."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


@contextlib.contextmanager
def explaining_memory(task: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error in the block into a PolysegError with advice."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise PolysegError(f"{task}: ran out of memory; {advice}") from None


def memory_of(device: "Device | None" = None) -> int:
    """Return the bytes that this process may use, or those of a CUDA device."""
    if device is not None and device.type == "cuda":
        import torch

        return int(torch.cuda.get_device_properties(device).total_memory)
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    bounds += [soft] if soft != resource.RLIM_INFINITY else []
    return min([*bounds, *_limits_of_groups()])


def _limits_of_groups() -> Iterator[int]:
    """Yield the memory limits of this process's control groups, version 1 and 2."""
    text = ""
    with contextlib.suppress(OSError):
        text = _GROUPS_OF_PROCESS.read_text()
    for line in text.splitlines():
        group = Path(line.split(":", maxsplit=2)[-1].lstrip("/"))
        for folder in (group, *group.parents):
            for place in (folder / "memory.max", "memory" / folder / "memory.limit_in_bytes"):
                with contextlib.suppress(OSError, ValueError):  # "max" means no limit.
                    yield int((_GROUPS / place).read_text())


def refuse_beyond_memory(
    needed: int, what: str, advice: str, device: "Device | None" = None
) -> None:
    """Raise if something needs more bytes than the machine, or a CUDA device, has in total.

    `what` names the data, such as "data.demo_images: 100 images"; `advice` says how to need less.
    """
    there = memory_of(device)
    if needed > there:
        where = "this GPU" if device is not None and device.type == "cuda" else "this machine"
        raise PolysegError(
            f"{what} take {needed / _GIGABYTE:,.1f} GB, and {where} has "
            f"{there / _GIGABYTE:,.1f} GB; {advice}"
        )


class Portions:
    """Work on many images at once; each time that memory runs out, halve the number.

    >>> def work(rows):
    ...     if rows.stop - rows.start > 2:
    ...         raise MemoryError
    ...     return rows.start, rows.stop
    >>> list(Portions("example", "use another machine").run(5, work, "an image"))
    [(0, 2), (2, 4), (4, 5)]
    """

    def __init__(self, task: str, advice: str) -> None:
        """Set the task, for the log and for errors, and the advice if one image does not fit."""
        self.task, self.advice = task, advice
        self.most = self.reported = sys.maxsize

    def run(self, count: int, work: Callable[[slice], Result], what: str) -> Iterator[Result]:
        """Yield the result for each part of `count` images in order.

        `work` takes a slice of the images and may be called again with a smaller one. `what`
        describes one image; if memory does not suffice for it, PolysegError is raised.
        """
        start = 0
        while start < count:
            rows = slice(start, min(count, start + self.most))
            results = _attempt(work, rows)
            if not results:
                self._divide(rows.stop - rows.start, what)
                continue
            if self.most < self.reported:
                self.reported = self.most
                log.warning("%s: memory suffices for only %d images at once", self.task, self.most)
            start = rows.stop
            yield from results

    def _divide(self, size: int, what: str) -> None:
        """Halve the number of images, and free the memory of the failed attempt."""
        if size == 1:
            raise PolysegError(f"{self.task}: ran out of memory on {what} alone; {self.advice}")
        self.most = size // 2
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _attempt(work: Callable[[slice], Result], rows: slice) -> list[Result]:
    """Return the result in a list, empty if memory runs out.

    When this returns, the error and the memory that its traceback refers to are gone.
    """
    try:
        return [work(rows)]
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        log.debug("%s", str(error))  # As text, because a handler may keep its arguments.
        return []
