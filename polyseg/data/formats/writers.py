"""Write predictions as files of the kind and with the geometry of their images."""

from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from polyseg.data.formats.file_formats import format_of, suffix_of
from polyseg.data.formats.stacks import Plane
from polyseg.data.formats.tiff import tiff_resolution
from polyseg.errors import PolysegError
from polyseg.registry import resolve
from polyseg.system.files import atomic_path

_LABELS = "polyseg: predicted mask"
_MAP = "polyseg: uncertainty map"


def write_labels(
    source: Path,
    labels: NDArray[np.uint8 | np.uint16],
    folder: Path,
    *,
    name: str,
    plane: Plane = "axial",
) -> Path:
    """Write labels, (N, H, W), as a file of the kind and geometry of their source; return its path.

    PNG, TIFF, NIfTI and DICOM keep their format (a DICOM series becomes a folder of files of the
    same names), and so does BMP if 8 bit suffice; others become PNG. Compression is lossless.

    Args:
        source: the image's file, or the folder of its series.
        labels: slices in the order in which `source` is read.
        folder: folder of the new file.
        name: name of the file, without suffix.
        plane: how `source` was sliced.

    Raises:
        PolysegError: the source has other slices, or the file cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     image = Path(folder) / "a.jpg"
    ...     Image.new("L", (3, 2)).save(image)
    ...     write_labels(image, np.ones((1, 2, 3), np.uint8), Path(folder), name="b").name
    'b.png'
    """
    if labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"labels are {labels.dtype}; expected uint8 or uint16")
    kind = format_of(source)
    if kind is not None and kind.write:
        written: Path = resolve(kind.write)(source, labels, folder / name, plane, _LABELS)
        return written
    keeps = suffix_of(source) == ".bmp" and labels.dtype == np.uint8
    path = folder / f"{name}{'.bmp' if keeps else '.png'}"
    if len(labels) != 1:
        raise PolysegError(f"{source}: is one picture, not {len(labels)} slices")
    with atomic_path(path) as temporary:
        Image.fromarray(labels[0]).save(temporary, format=path.suffix[1:].upper())
    return path


def write_map(
    source: Path, values: NDArray[np.float32], folder: Path, *, name: str, plane: Plane = "axial"
) -> Path:
    """Write maps, (N, H, W) float32, in the format of their source if it can hold them, or TIFF.

    All else is as in `write_labels`.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = write_map(Path("a.png"), np.ones((1, 2, 3)), Path(folder), name="entropy")
    ...     tifffile.imread(path)
    array([[1., 1., 1.],
           [1., 1., 1.]], dtype=float32)
    """
    values = np.asarray(values, np.float32)
    kind = format_of(source)
    if kind is not None and kind.holds_maps:
        written: Path = resolve(kind.write)(source, values, folder / name, plane, _MAP)
        return written
    path = folder / f"{name}.tif"
    _write_tiff(path, values, None)
    return path


def write_tiff_like(source: Path, values: NDArray[Any], path: Path, _: Plane, __: str) -> Path:
    """Write a page for each slice, with the resolution of the source; maps end in .tif."""
    suffix = suffix_of(source)
    kept = suffix.endswith((".tif", ".tiff")) and values.dtype != np.float32
    path = path.with_name(path.name + (suffix if kept else ".tif"))
    _write_tiff(path, values, source)
    return path


def _write_tiff(path: Path, values: NDArray[Any], source: Path | None) -> None:
    """Write a page for each slice, with the resolution of the source."""
    resolution = None if source is None else tiff_resolution(source)
    scale, unit = (None, None) if resolution is None else resolution
    with atomic_path(path) as temporary, tifffile.TiffWriter(temporary) as writer:
        for one in values:
            writer.write(
                one,
                photometric="minisblack",
                compression="zlib",
                resolution=scale,
                resolutionunit=unit,
                software="polyseg",
                metadata=None,
            )
