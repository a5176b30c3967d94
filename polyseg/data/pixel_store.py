"""Store decoded images in memory if they fit, else in a file.

The name of the file is the sha256 of everything that its content depends on, so it is never
outdated. The file and then its index are written under temporary names and renamed, so that
parallel runs can share them and never read an incomplete file. Each image has a checksum. Runs keep
the file open, so that it may be removed at any time.
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
"""Pixels, (H, W, C), of one of DTYPES."""
Masks = NDArray[np.uint8]
"""Masks, (K, H, W) in {0, 1}."""

DTYPES = ("uint8", "uint16", "int16", "float32")


@dataclass(frozen=True)
class Shape:
    """Size and type of an image and its masks."""

    height: int
    width: int
    channels: int
    dtype: str
    masks: int
    """Number K of masks, 0 without masks."""

    @property
    def image_bytes(self) -> int:
        """Size of the image alone."""
        return self.height * self.width * self.channels * np.dtype(self.dtype).itemsize

    @property
    def bytes(self) -> int:
        """Size of image and masks."""
        return self.image_bytes + self.height * self.width * self.masks


def shape_of(image: Image, masks: Masks | None) -> Shape:
    """Return the shape and type of an image, (H, W, C), and its masks, (K, H, W)."""
    height, width, channels = image.shape
    return Shape(height, width, channels, image.dtype.name, 0 if masks is None else len(masks))


class Store(Protocol):
    """Images and masks by position."""

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i, (H, W, C), and its masks, (K, H, W), or None where there are none."""


@dataclass(frozen=True)
class MemoryStore:
    """Images in memory."""

    images: Sequence[Image]
    masks: Sequence[Masks | None]

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i, (H, W, C), and its masks, (K, H, W), or None where there are none."""
        return self.images[i], self.masks[i]


class DiskStore:
    """Images in a file, read one by one at access.

    Pixels stay in the system's page cache, not in this process. The file stays open, so that it may
    be removed. Forked processes read the same open file; processes that receive a pickled store
    open the file when they first read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            rows = json.loads(read_text(index_of(path)))
            self.shapes = [Shape(**row["shape"]) for row in rows]
            self.about: list[dict[str, Any]] = [dict(row["about"]) for row in rows]
            self._checksums = [int(row["checksum"]) for row in rows]
            if not all(_plausible(shape) for shape in self.shapes):
                raise ValueError("the shape of an image is not valid")
            # Python integers, because wrong sizes in the index could overflow NumPy's.
            self._offsets = list(
                itertools.accumulate((one.bytes for one in self.shapes), initial=0)
            )
            if self._offsets[-1] != path.stat().st_size:
                raise ValueError("its size is not that of its images")
            self._file  # noqa: B018 - opened, now that it is there
        except OSError as error:
            raise self._unreadable(error) from None
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._damaged(" ".join(str(error).split())[:120]) from None

    @cached_property
    def _file(self) -> IO[bytes]:
        return self.path.open("rb")

    def get(self, i: int) -> tuple[Image, Masks | None]:
        """Return image i and its masks after checking their checksum."""
        shape = self.shapes[i]
        try:
            # pread uses no file position, which forked processes would share.
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
        remedy = "; the next start writes it again"
        gone = error.errno in (errno.ENOENT, errno.ESTALE)
        return PolysegError(f"{self.path}: cannot be read: {reason(error)}{remedy if gone else ''}")

    def _damaged(self, why: str) -> PolysegError:
        return PolysegError(
            f"{self.path}: is not a file of decoded images ({why}); remove it and "
            f"{index_of(self.path).name}; the next start writes them again"
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
    """Write a file of decoded images, which appears complete at the end of the block.

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
    """Return the path of the index of a file of images, which is written after the images."""
    return path.with_suffix(".json")


def _plausible(shape: Shape) -> bool:
    sides = (shape.height, shape.width, shape.channels, shape.masks)
    return shape.dtype in DTYPES and all(type(n) is int and n >= 0 for n in sides)
