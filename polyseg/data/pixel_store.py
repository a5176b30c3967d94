"""Keep decoded images in memory while they fit, else in a file on disk.

The file is named by the sha256 of all that its content follows from, so it is never stale. It is
written aside and renamed, its index after it, so that runs side by side may share it and none ever
sees half of one. Each image carries a checksum. Runs that use a file keep it open, so that both may
be removed at any time.
"""

import contextlib
import errno
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from polyseg.errors import PolysegError, reason
from polyseg.system.files import atomic_path, read_text, write_text

Image = NDArray[Any]
"""(H, W, C), of one of DTYPES."""
Masks = NDArray[np.uint8]
"""(K, H, W) in {0, 1}."""

DTYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class Shape:
    """Size and type of an image and its masks.

    >>> shape_of(np.zeros((4, 4, 3), np.uint16), np.zeros((1, 4, 4), np.uint8)).bytes
    112
    """

    height: int
    width: int
    channels: int
    dtype: str
    masks: int
    """K, or 0 where there are none."""

    @property
    def image_bytes(self) -> int:
        """Size of the image alone."""
        return self.height * self.width * self.channels * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Size of image and masks."""
        return self.image_bytes + self.height * self.width * self.masks


def shape_of(image: Image, masks: Masks | None) -> Shape:
    """Return what an image, (H, W, C), and its masks, (K, H, W), are like."""
    height, width, channels = image.shape
    return Shape(height, width, channels, image.dtype.name, 0 if masks is None else len(masks))


class Store(Protocol):
    """Images and masks by position."""

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i, (H, W, C), and its masks, (K, H, W), or None where there are none."""


@dataclass(frozen=True)
class MemoryStore:
    """Images held as they are.

    >>> MemoryStore([np.zeros((2, 2, 1))], [None]).get(0)[0].shape
    (2, 2, 1)
    """

    images: Sequence[Image]
    masks: Sequence[Masks | None]

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i, (H, W, C), and its masks, (K, H, W), or None where there are none."""
        return self.images[i], self.masks[i]


class DiskStore:
    """Images in a file, read one by one as they are asked for.

    What was read belongs to the system's page cache, not to this process. The file stays open, so
    that it may be removed meanwhile. Processes that were forked from this one read from it too;
    those that got the store sent open the file by its name when they first read.

    Raises:
        PolysegError: a file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            rows = json.loads(read_text(index_of(path)))
            self.shapes = [Shape(**row["shape"]) for row in rows]
            self.about: list[dict[str, Any]] = [dict(row["about"]) for row in rows]
            self._checksums = [int(row["checksum"]) for row in rows]
            if not all(_plausible(shape) for shape in self.shapes):
                raise ValueError("an image of such a shape is none")
            # By whole numbers of any size, which a lie cannot overflow.
            self._offsets = list(
                itertools.accumulate((one.bytes for one in self.shapes), initial=0)
            )
            if self.size != path.stat().st_size:
                raise ValueError("its size is not that of its images")
            self._file  # noqa: B018 - opened, now that it is there
        except OSError as error:
            raise self._unreadable(error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(" ".join(str(error).split())[:120]) from None

    @property
    def size(self) -> int:
        """Bytes of all images and masks."""
        return self._offsets[-1]

    @cached_property
    def _file(self) -> IO[bytes]:
        return self.path.open("rb")

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i, (H, W, C), and its masks, (K, H, W), or None where there are none.

        Raises:
            PolysegError: its bytes are not those that were written, or cannot be read.
        """
        shape = self.shapes[i]
        try:
            # pread has no position of its own, which processes would move under one another.
            values = os.pread(self._file.fileno(), shape.bytes, self._offsets[i])
        except OSError as error:
            raise self._unreadable(error) from None
        if zlib.crc32(values) != self._checksums[i]:
            raise self._damaged("a checksum differs")
        pixels = np.frombuffer(values, dtype=np.uint8, count=shape.image_bytes)
        image = pixels.view(shape.dtype).reshape(shape.height, shape.width, shape.channels)
        if shape.masks == 0:
            return image, None
        masks = np.frombuffer(values, dtype=np.uint8, offset=shape.image_bytes)
        return image, masks.reshape(shape.masks, shape.height, shape.width)

    def _unreadable(self, error: OSError) -> PolysegError:
        anew = "; it will be made anew at the next start"
        gone = error.errno in (errno.ENOENT, errno.ESTALE)
        return PolysegError(f"{self.path}: cannot be read: {reason(error)}{anew if gone else ''}")

    def _damaged(self, why: str) -> PolysegError:
        return PolysegError(
            f"{self.path}: is no file of decoded images ({why}); remove it and "
            f"{index_of(self.path).name}, they will be made anew"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_file"}


class StoreWriter:
    """Appends images to a file that `writing_store` has opened."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.rows: list[dict[str, Any]] = []

    def add(self, image: Image, masks: Masks | None, about: dict[str, Any]) -> None:
        """Append an image, its masks, and plain values that belong to it."""
        values = image.tobytes() + (b"" if masks is None else masks.tobytes())
        self._file.write(values)
        row = {"shape": vars(shape_of(image, masks)), "checksum": zlib.crc32(values)}
        self.rows.append(row | {"about": about})


@contextlib.contextmanager
def writing_store(path: Path) -> Iterator[StoreWriter]:
    """Write a file of decoded images, which is there, whole, when the block has ended well.

    Raises:
        PolysegError: the disk is full, or the folder cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with writing_store(Path(folder) / "a.images") as writer:
    ...         writer.add(np.ones((2, 2, 1), np.uint8), None, {"id": "a"})
    ...     store = DiskStore(Path(folder) / "a.images")
    ...     store.about, int(store.get(0)[0].sum())
    ([{'id': 'a'}], 4)
    """
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        writer = StoreWriter(file)
        yield writer
    write_text(index_of(path), json.dumps(writer.rows))


def index_of(path: Path) -> Path:
    """Return the path of the index of a file of images, without which that one is not whole."""
    return path.with_suffix(".json")


def _plausible(shape: Shape) -> bool:
    sides = (shape.height, shape.width, shape.channels, shape.masks)
    return shape.dtype in DTYPES and all(type(n) is int and n >= 0 for n in sides)
