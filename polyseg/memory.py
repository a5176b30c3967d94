"""What the process does with memory that it has freed."""

import contextlib
import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Names of the settings in glibc's malloc.h."""


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
