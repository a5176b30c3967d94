"""Read and write NIfTI volumes; the only module that imports nibabel.

Slices are oriented as radiologists view them, and do not depend on the order of the voxels on disk:
axial ones from the feet up, rows to the back, columns to the patient's left; coronal ones from
front to back, rows downward, columns to the left; sagittal ones from right to left, rows downward,
columns to the back. A volume of a single slice is shown as that slice in every plane.
"""

import gzip
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from polyseg.data.formats.file_formats import suffix_of
from polyseg.data.formats.images import as_stack
from polyseg.data.formats.stacks import (
    MOST_CHANNELS,
    Plane,
    Stack,
    guarded,
    imported,
    refuse_if_large,
    refuse_other_shape,
    whole_numbers,
)
from polyseg.errors import PolysegError
from polyseg.system.files import atomic_path

# The error already reports problems of damaged files.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)

_CHUNK = 2**18
_COLUMNS = 16
_LARGEST_OFFSET = 2**24
_MILLIMETRES = {1: 1000.0, 3: 1e-3}
AS_STORED = np.diag([-1.0, -1.0, 1.0, 1.0])
"""Affine of a volume that is shown as it is stored: x to the left, y to the back, z up, 1 mm."""


def read_nifti(
    path: Path, plane: Plane = "axial", *, labels: bool = False, stored: bool = False
) -> Stack:
    """Read a NIfTI volume, .nii or .nii.gz, of two or three axes and optionally one of channels.

    Images are scaled by slope and intercept if the header has them. NaN, which some scanners'
    programs write for missing measurements, becomes the smallest value. With `stored` the voxels
    are shown in their order, and the orientation in the header is ignored.

    >>> import tempfile, nibabel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.nii.gz"
    ...     volume = np.zeros((30, 20, 5), np.int16)
    ...     nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.7, 0.8, 3, 1])), path)
    ...     stack = read_nifti(path)
    >>> stack.pixels.shape, [round(one, 2) for one in stack.spacing]
    ((5, 20, 30, 1), [0.8, 0.7])
    """
    nibabel = imported("nibabel", path, "NIfTI")
    with guarded(path):
        with _unpacked(path) as stream:
            header = _nifti_header(path, stream, nibabel)
            shape = _nifti_shape(path, header)
            affine = AS_STORED if stored else _affine_of(path, header)
            scaling = _scaling(path, header)
            voxels = _read_voxels(path, stream, header, shape, scaled=scaling is not None)
        shown = plane_of(shape, affine, plane)
        view = slices_of(voxels, affine, shown)
        unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
        spacing = spacing_of(affine, shown, unit)
        pixels = _copied(view, scaling)
        del voxels, view
        pixels = pixels if labels else whole_numbers(_without_nan(pixels))
        return as_stack(path, pixels, labels=labels, spacing=spacing)


def write_nifti(
    source: Path, values: NDArray[Any], path: Path, plane: Plane, description: str
) -> Path:
    """Write slices, (N, H, W), as a NIfTI volume with the geometry and version of the source."""
    nibabel = imported("nibabel", source, "NIfTI")
    with guarded(source):
        with _unpacked(source) as stream:
            header = _nifti_header(source, stream, nibabel)
        shape = _nifti_shape(source, header)[:3]
        affine = _affine_of(source, header)
        volume = np.zeros((*shape, 1), values.dtype, order="F")
        view = slices_of(volume, affine, plane_of(shape, affine, plane))[..., 0]
        refuse_other_shape(source, view.shape, values)
        view[...] = values
        content = _nifti_bytes(header, volume[..., 0], affine, description, nibabel)
    target = path.with_name(path.name + suffix_of(source))
    packed = gzip.compress(content, 6, mtime=0) if target.suffix == ".gz" else content
    with atomic_path(target) as temporary:
        temporary.write_bytes(packed)
    return target


def _nifti_bytes(
    source: Any, volume: NDArray[Any], affine: NDArray[Any], description: str, nibabel: Any
) -> bytes:
    header = source.copy()
    header.set_data_dtype(volume.dtype)
    header.set_data_shape(volume.shape)
    header.set_slope_inter(1, 0)
    header.set_intent("none")
    header["cal_min"] = header["cal_max"] = 0
    header["descrip"] = description
    header["vox_offset"] = 0
    version = 1 if int(header["sizeof_hdr"]) == 348 else 2
    kind = nibabel.Nifti1Image if version == 1 else nibabel.Nifti2Image
    return cast(bytes, kind(volume, affine, header).to_bytes())


def _unpacked(path: Path) -> IO[bytes]:
    with path.open("rb") as stream:
        packed = stream.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if packed else path.open("rb")


def _nifti_header(path: Path, stream: IO[bytes], nibabel: Any) -> Any:
    start = stream.read(4)
    sizes = {int.from_bytes(start, order) for order in ("little", "big")}
    kinds = {348: (nibabel.Nifti1Header, b"n+1"), 540: (nibabel.Nifti2Header, b"n+2")}
    for size, (kind, magic) in kinds.items():
        if size in sizes:
            block = start + stream.read(size - 4)
            if len(block) < size:
                raise PolysegError(f"{path}: is cut short: its header is incomplete")
            header = kind(block, check=False)
            if header["magic"].item()[:3] == magic:
                return header
    raise PolysegError(f"{path}: is not a NIfTI file; expected a header and voxels in one file")


def _nifti_shape(path: Path, header: Any) -> tuple[int, int, int, int]:
    """Return the lengths of three axes and the number of channels, all checked."""
    count = int(header["dim"][0])
    sides = [int(side) for side in header["dim"][1 : 1 + count]]
    while len(sides) > 3 and sides[-1] == 1:
        sides.pop()
    if len(sides) == 5 and sides[3] == 1:
        del sides[3]
    shown = " x ".join(map(str, sides))
    if not 1 <= count <= 7 or not 2 <= len(sides) <= 4 or min(sides) < 1:
        raise PolysegError(f"{path}: has {shown or 'no'} voxels; expected 3 axes, or 4 of channels")
    width, height, depth, channels = (*sides, 1, 1)[:4] if len(sides) < 4 else sides
    if channels > MOST_CHANNELS:
        raise PolysegError(
            f"{path}: has {channels} channels (its fourth axis); at most {MOST_CHANNELS}"
        )
    return width, height, depth, channels


def _read_voxels(
    path: Path, stream: IO[bytes], header: Any, shape: tuple[int, int, int, int], *, scaled: bool
) -> NDArray[Any]:
    kind = header.get_data_dtype()
    if kind.kind not in "biuf":
        raise PolysegError(f"{path}: holds {kind} voxels, such as colours; save integers or floats")
    *sides, channels = shape
    held = path.stat().st_size
    # The shortest axis counts the slices, because any axis may.
    depth, height, width = sorted(sides)
    each = channels * max(kind.itemsize, 4 if scaled else 1)
    refuse_if_large(path, (height, width), slices=depth, bytes_per_pixel=each)
    offset = int(header["vox_offset"]) or stream.tell()
    size = math.prod(shape) * kind.itemsize
    if not stream.tell() <= offset <= _LARGEST_OFFSET:
        raise PolysegError(f"{path}: is damaged: its voxels begin at {offset}")
    if not isinstance(stream, gzip.GzipFile) and offset + size > held:
        raise PolysegError(f"{path}: is cut short: it has {held:,} bytes of {offset + size:,}")
    stream.read(offset - stream.tell())
    voxels = np.zeros(math.prod(shape), kind)
    _fill(path, stream, voxels.view(np.uint8))
    return voxels.reshape(shape, order="F")


def _fill(path: Path, stream: IO[bytes], target: NDArray[np.uint8]) -> None:
    filled = 0
    while filled < target.size:
        chunk = stream.read(min(_CHUNK, target.size - filled))
        if not chunk:
            raise PolysegError(f"{path}: is cut short: it has {filled:,} bytes of {target.size:,}")
        part = np.frombuffer(chunk, np.uint8)
        # The target is 0 already; zeros, most of a volume of labels, need no memory if not written.
        if part.any():
            target[filled : filled + len(chunk)] = part
        filled += len(chunk)
    # At its end a gzip stream checks its checksum.
    stream.read(1)


def _affine_of(path: Path, header: Any) -> NDArray[Any]:
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise PolysegError(
            f"{path}: does not define the directions of its axes; correct its sform or qform"
        )
    return affine


def _axes_of(affine: NDArray[Any]) -> NDArray[Any]:
    """Return how stored axes become left, posterior, superior: the position and sign of each."""
    from nibabel import orientations

    return cast(
        NDArray[Any],
        orientations.ornt_transform(
            orientations.io_orientation(affine), orientations.axcodes2ornt("LPS")
        ),
    )


def slices_of(stored: NDArray[Any], affine: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """Return a view, (N, H, W, C), of a volume as it is stored, (X, Y, Z, C)."""
    from nibabel import orientations

    volume = orientations.apply_orientation(stored, _axes_of(affine))
    if plane == "axial":
        return cast(NDArray[Any], volume.transpose(2, 1, 0, 3))
    downward = volume[:, :, ::-1]
    return cast(
        NDArray[Any], downward.transpose((1, 2, 0, 3) if plane == "coronal" else (0, 2, 1, 3))
    )


def plane_of(shape: Sequence[int], affine: NDArray[Any], plane: Plane) -> Plane:
    """Return the requested plane, or that of the only slice there is."""
    thin = [int(_axes_of(affine)[axis, 0]) for axis in range(3) if shape[axis] == 1]
    planes: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
    return planes[thin[0]] if len(thin) == 1 else plane


def spacing_of(affine: NDArray[Any], plane: Plane, millimetres: float = 1.0) -> tuple[float, float]:
    """Return millimetres between rows and columns; the affine is in units of `millimetres`.

    >>> spacing_of(np.diag([0.7, 0.8, 3.0, 1.0]), "axial")
    (0.8, 0.7)
    """
    sizes = np.zeros(3)
    sizes[_axes_of(affine)[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    rows = 1 if plane == "axial" else 2
    columns = 1 if plane == "sagittal" else 0
    return float(sizes[rows] * millimetres), float(sizes[columns] * millimetres)


def _scaling(path: Path, header: Any) -> tuple[float, float] | None:
    slope, intercept = (float(header[name]) for name in ("scl_slope", "scl_inter"))
    if slope == 0 or math.isnan(slope) or (slope, intercept) == (1, 0):
        return None
    if not math.isfinite(slope) or not math.isfinite(intercept):
        raise PolysegError(f"{path}: is damaged: it scales voxels by {slope} and {intercept}")
    return slope, intercept


def _copied(view: NDArray[Any], scaling: tuple[float, float] | None) -> NDArray[Any]:
    """Copy slices in order, scaled to float32 or in native byte order."""
    kind = view.dtype.newbyteorder("=") if scaling is None else np.dtype(np.float32)
    copied = np.zeros(view.shape, kind)
    # If rows are not contiguous in the file, copying few columns at a time is ten times as fast.
    fastest = min(range(3), key=lambda axis: (view.shape[axis] == 1, abs(view.strides[axis])))
    step = view.shape[2] if fastest == 2 else _COLUMNS
    other = 1 if fastest == 0 else 0
    planes = zip(np.moveaxis(view, other, 0), np.moveaxis(copied, other, 0), strict=True)
    for source, target in planes:
        for start in range(0, view.shape[2], step):
            part = source[:, start : start + step]
            scaled = part if scaling is None else part * scaling[0] + scaling[1]
            if scaled.any():
                target[:, start : start + step] = scaled
    return copied


def _without_nan(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "f" and np.isnan(pixels.min()):
        lowest = np.fmin.reduce(pixels, axis=None)
        for one in pixels:
            one[np.isnan(one)] = lowest
    return pixels
