"""Reading and writing NIfTI volumes and DICOM files or series; alone in importing their libraries.

Slices of NIfTI are laid out as radiologists look at them, whatever the order of the voxels on
disk: axial ones from the feet up, rows to the back, columns to the patient's left; coronal ones
from front to back, rows downward, columns to the left; sagittal ones from right to left, rows
downward, columns to the back. A volume that is one slice thick is shown as that slice, whatever
plane is asked for. DICOM is taken as stored, and `plane` says nothing about it.
"""

import dataclasses
import gzip
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from polyseg.data.images import encoded_sides, one_channel
from polyseg.data.stacks import (
    MOST_CHANNELS,
    MOST_SLICES,
    Plane,
    Stack,
    guarded,
    image_pixels,
    label_pixels,
    refuse_if_large,
    refuse_if_no_file,
    whole_numbers,
)
from polyseg.errors import PolysegError
from polyseg.files import atomic_path

# What they would say of a damaged file is said once, in the error.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
logging.getLogger("pydicom").setLevel(logging.CRITICAL)

NIFTI_SUFFIXES = (".nii", ".nii.gz")

_CHUNK = 2**18
_COLUMNS = 16
_LARGEST_OFFSET = 2**24
_MILLIMETRES = {1: 1000.0, 3: 1e-3}
_MISSING = (
    "{path}: {kind} is read by {name}, which is not installed; pip install 'polyseg[medical]'"
)


# NIfTI.


def read_nifti(path: Path, plane: Plane = "axial", *, labels: bool = False) -> Stack:
    """Read a NIfTI volume, .nii or .nii.gz, of two or three axes and one of channels.

    Images are scaled by slope and intercept where the header has them. NaN, which some scanners'
    programs write where nothing was measured, becomes the smallest value.

    Raises:
        PolysegError: the file is damaged, too large or of a kind not read, or nibabel is missing.

    >>> import tempfile, nibabel
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.nii.gz"
    ...     volume = np.zeros((30, 20, 5), np.int16)
    ...     nibabel.save(nibabel.Nifti1Image(volume, np.diag([0.7, 0.8, 3, 1])), path)
    ...     stack = read_nifti(path)
    >>> stack.pixels.shape, [round(one, 2) for one in stack.spacing]
    ((5, 20, 30, 1), [0.8, 0.7])
    """
    nibabel = _library(path, "NIfTI", "nibabel")
    with guarded(path):
        refuse_if_no_file(path)
        with _unpacked(path) as stream:
            header = _nifti_header(path, stream, nibabel)
            shape = _nifti_shape(path, header)
            affine = _affine_of(path, header)
            scaling = _scaling(path, header)
            stored = _read_voxels(path, stream, header, shape, scaled=scaling is not None)
        view = _slices(stored, affine, _plane_of(shape, affine, plane))
        spacing = _nifti_spacing(header, affine, _plane_of(shape, affine, plane))
        pixels = _copied(view, scaling)
        del stored, view
        if labels:
            return Stack(label_pixels(path, one_channel(path, pixels)), spacing)
        return Stack(image_pixels(path, whole_numbers(_without_nan(pixels))), spacing)


def write_nifti(
    source: Path, values: NDArray[Any], path: Path, plane: Plane, *, description: str
) -> None:
    """Write slices, (N, H, W), as a NIfTI volume that lies where the source's does.

    The three axes, their lengths and orientation are the source's; so is its version.

    Raises:
        PolysegError: the source has other slices, is damaged, or the file cannot be written.
    """
    nibabel = _library(source, "NIfTI", "nibabel")
    with guarded(source):
        refuse_if_no_file(source)
        with _unpacked(source) as stream:
            header = _nifti_header(source, stream, nibabel)
        shape = _nifti_shape(source, header)[:3]
        affine = _affine_of(source, header)
        volume = np.zeros((*shape, 1), values.dtype, order="F")
        view = _slices(volume, affine, _plane_of(shape, affine, plane))[..., 0]
        _refuse_other_shape(source, view.shape, values)
        view[...] = values
        content = _nifti_bytes(header, volume[..., 0], affine, description, nibabel)
    with atomic_path(path) as temporary:
        temporary.write_bytes(
            gzip.compress(content, 6, mtime=0) if path.suffix == ".gz" else content
        )


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
                raise PolysegError(f"{path}: is cut short: its header is not whole")
            header = kind(block, check=False)
            if header["magic"].item()[:3] == magic:
                return header
    raise PolysegError(f"{path}: is no NIfTI file; expected a header and voxels in one file")


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
            f"{path}: has {channels} channels (its fourth axis); the most that is read is "
            f"{MOST_CHANNELS}"
        )
    return width, height, depth, channels


def _read_voxels(
    path: Path, stream: IO[bytes], header: Any, shape: tuple[int, int, int, int], *, scaled: bool
) -> NDArray[Any]:
    kind = header.get_data_dtype()
    if kind.kind not in "biuf":
        raise PolysegError(f"{path}: holds {kind} voxels, such as colours; save integers or floats")
    width, height, depth, channels = shape
    held = path.stat().st_size
    # The thinnest axis counts the slices, because any may.
    depth, height, width = sorted((width, height, depth))
    refuse_if_large(
        path,
        (height, width),
        slices=depth,
        bytes_per_pixel=channels * max(kind.itemsize, 4 if scaled else 1),
    )
    offset = int(header["vox_offset"]) or stream.tell()
    size = math.prod(shape) * kind.itemsize
    if not stream.tell() <= offset <= _LARGEST_OFFSET:
        raise PolysegError(f"{path}: is damaged: its voxels begin at {offset}")
    if not isinstance(stream, gzip.GzipFile) and offset + size > held:
        raise PolysegError(f"{path}: is cut short: it has {held:,} bytes of {offset + size:,}")
    stream.read(offset - stream.tell())
    voxels = np.empty(math.prod(shape), kind)
    _fill(path, stream, voxels.view(np.uint8))
    return voxels.reshape(shape, order="F")


def _fill(path: Path, stream: IO[bytes], target: NDArray[np.uint8]) -> None:
    filled = 0
    while filled < target.size:
        chunk = stream.read(min(_CHUNK, target.size - filled))
        if not chunk:
            raise PolysegError(f"{path}: is cut short: it has {filled:,} bytes of {target.size:,}")
        target[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
        filled += len(chunk)
    # At its end a gzip stream says whether all was as it was packed.
    stream.read(1)


def _affine_of(path: Path, header: Any) -> NDArray[Any]:
    affine = np.asarray(header.get_best_affine(), np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise PolysegError(f"{path}: says not where its axes point; mend its sform or qform")
    return affine


def _axes_of(affine: NDArray[Any]) -> NDArray[Any]:
    """Return how stored axes become left, posterior, superior: for each its place and sign."""
    from nibabel import orientations

    return cast(
        NDArray[Any],
        orientations.ornt_transform(
            orientations.io_orientation(affine), orientations.axcodes2ornt("LPS")
        ),
    )


def _slices(stored: NDArray[Any], affine: NDArray[Any], plane: Plane) -> NDArray[Any]:
    """Return a view, (N, H, W, C), of a volume as it is stored, (X, Y, Z, C)."""
    from nibabel import orientations

    volume = orientations.apply_orientation(stored, _axes_of(affine))
    if plane == "axial":
        return cast(NDArray[Any], volume.transpose(2, 1, 0, 3))
    downward = volume[:, :, ::-1]
    return cast(
        NDArray[Any], downward.transpose((1, 2, 0, 3) if plane == "coronal" else (0, 2, 1, 3))
    )


def _plane_of(shape: Sequence[int], affine: NDArray[Any], plane: Plane) -> Plane:
    """Return the plane asked for, or that of the only slice there is."""
    thin = [int(_axes_of(affine)[axis, 0]) for axis in range(3) if shape[axis] == 1]
    planes: tuple[Plane, ...] = ("sagittal", "coronal", "axial")
    return planes[thin[0]] if len(thin) == 1 else plane


def _nifti_spacing(header: Any, affine: NDArray[Any], plane: Plane) -> tuple[float, float] | None:
    sizes = np.zeros(3)
    sizes[_axes_of(affine)[:, 0].astype(int)] = np.linalg.norm(affine[:3, :3], axis=0)
    unit = _MILLIMETRES.get(int(header["xyzt_units"]) & 7, 1.0)
    rows = 1 if plane == "axial" else 2
    columns = 1 if plane == "sagittal" else 0
    return float(sizes[rows] * unit), float(sizes[columns] * unit)


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
    copied = np.empty(view.shape, kind)
    # Where rows run across the order on disk, a few columns at a time: ten times as fast.
    fastest = min(range(3), key=lambda axis: (view.shape[axis] == 1, abs(view.strides[axis])))
    step = view.shape[2] if fastest == 2 else _COLUMNS
    other = 1 if fastest == 0 else 0
    planes = zip(np.moveaxis(view, other, 0), np.moveaxis(copied, other, 0), strict=True)
    for source, target in planes:
        for start in range(0, view.shape[2], step):
            part = source[:, start : start + step]
            scaled = part if scaling is None else part * scaling[0] + scaling[1]
            target[:, start : start + step] = scaled
    return copied


def _without_nan(pixels: NDArray[Any]) -> NDArray[Any]:
    if pixels.dtype.kind == "f" and np.isnan(pixels.min()):
        lowest = np.fmin.reduce(pixels, axis=None)
        for one in pixels:
            one[np.isnan(one)] = lowest
    return pixels


# DICOM.


@dataclasses.dataclass(frozen=True)
class _Part:
    """A file of a series, without its pixels."""

    path: Path
    header: Any


_DERIVED = (
    "PatientName PatientID PatientBirthDate PatientSex PatientAge StudyInstanceUID StudyID "
    "StudyDate StudyTime StudyDescription AccessionNumber ReferringPhysicianName Modality "
    "InstanceNumber FrameOfReferenceUID PositionReferenceIndicator ImagePositionPatient "
    "ImageOrientationPatient PixelSpacing ImagerPixelSpacing SliceThickness SpacingBetweenSlices "
    "SliceLocation PatientPosition Laterality BodyPartExamined SpecificCharacterSet"
)
_FRAME_GEOMETRY = ("PixelMeasuresSequence", "PlaneOrientationSequence", "PlanePositionSequence")
_SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
_SECONDARY_FRAMES = {8: f"{_SECONDARY}.2", 16: f"{_SECONDARY}.3"}


def read_dicom(path: Path, *, labels: bool = False) -> Stack:
    """Read a DICOM file, of one or many frames, or a folder that holds one series of files.

    The files of a series lie in order along the normal of their slices, else by InstanceNumber,
    else by name. Rescale slope and intercept are applied; MONOCHROME1, where 0 is white, is
    inverted first, so that pixels are as displayed; colours become RGB.

    Raises:
        PolysegError: something is damaged, too large, of several series or of a kind not read, or
            pydicom is missing.

    >>> read_dicom(Path("/dev/null"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: /dev/null: is no file; expected an image
    """
    _library(path, "DICOM", "pydicom")
    with guarded(path):
        parts = _parts(path)
        _refuse_large_series(path, parts)
        stacks = [_read_part(part, labels=labels) for part in parts]
        pixels = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
        del stacks
        spacing = _dicom_spacing(parts[0].header)
        if labels:
            return Stack(label_pixels(path, one_channel(path, pixels)), spacing)
        return Stack(image_pixels(path, whole_numbers(pixels)), spacing)


def is_dicom(path: Path) -> bool:
    """Say whether a file begins as DICOM does.

    >>> is_dicom(Path("/dev/null"))
    False
    """
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(132)[128:] == b"DICM"
    except OSError:
        return False


def write_dicom(source: Path, labels: NDArray[Any], target: Path, *, description: str) -> None:
    """Write labels, (N, H, W) of 8 or 16 bit, as DICOM of the same patient, study and geometry.

    Args:
        source: the file or folder that the labels belong to.
        labels: slices in the order in which `source` is read.
        target: the file, or for a folder the folder of as many files of the same names.
        description: what the new series is.

    Raises:
        PolysegError: the source has other slices, or a file cannot be written.
    """
    _library(source, "DICOM", "pydicom")
    with guarded(source):
        parts = _parts(source)
        sides = (int(parts[0].header.Rows), int(parts[0].header.Columns))
        frames = sum(_frames_of(part.header) for part in parts)
        _refuse_other_shape(source, (frames, *sides), labels)
        series = _new_identity(parts[0].header, "SeriesInstanceUID", labels, target.name)
    for k, part in enumerate(parts):
        with guarded(part.path):
            mask = labels[k : k + 1] if len(parts) > 1 else labels
            derived = _derived(part, mask, series, description)
        name = target / part.path.name if source.is_dir() else target
        with atomic_path(name) as temporary, temporary.open("wb") as stream:
            derived.save_as(stream, enforce_file_format=True)


def _parts(path: Path) -> list[_Part]:
    if not path.is_dir():
        refuse_if_no_file(path)
        return [_Part(path, _dicom_header(path))]
    files = [one for one in sorted(path.iterdir()) if not one.name.startswith(".")]
    found = [one for one in files if one.suffix.lower() == ".dcm" or is_dicom(one)]
    if not 0 < len(found) <= MOST_SLICES:
        raise PolysegError(
            f"{path}: holds {len(found)} DICOM files; expected a series of 1 to {MOST_SLICES:,}"
        )
    parts = []
    for one in found:
        with guarded(one):
            parts.append(_Part(one, _dicom_header(one)))
    _refuse_mixture(path, parts)
    return _in_order(parts)


def _dicom_header(path: Path) -> Any:
    import pydicom
    from pydicom.filereader import read_file_meta_info

    if not is_dicom(path):
        path.open("rb").close()
        raise PolysegError(f"{path}: is no DICOM file; expected DICM at its byte 128")
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise PolysegError(f"{path}: is deflated DICOM; save it as explicit little endian")
    header = pydicom.dcmread(path, stop_before_pixels=True)
    if not all(header.get(name) for name in ("Rows", "Columns", "BitsAllocated")):
        raise PolysegError(f"{path}: is a DICOM file without an image")
    return header


def _refuse_mixture(path: Path, parts: Sequence[_Part]) -> None:
    series = sorted({str(part.header.get("SeriesInstanceUID", "none")) for part in parts})
    if len(series) > 1:
        shown = ", ".join(series[:4]) + (", ..." if len(series) > 4 else "")
        raise PolysegError(
            f"{path}: holds {len(series)} DICOM series ({shown}); keep each in a folder of its own"
        )
    sizes = sorted({f"{part.header.Rows} x {part.header.Columns}" for part in parts})
    if len(sizes) > 1:
        raise PolysegError(
            f"{path}: its slices differ in size ({', '.join(sizes[:4])}); keep one size a folder"
        )
    if len(parts) > 1 and any(_frames_of(part.header) > 1 for part in parts):
        raise PolysegError(f"{path}: holds files of many frames; keep each in a folder of its own")


def _in_order(parts: list[_Part]) -> list[_Part]:
    """Sort by position along the normal, else by number, else leave the order of names."""
    numbers = [part.header.get("InstanceNumber") for part in parts]
    ranks: list[Any] = [0 if number is None else int(number) for number in numbers]
    positions = _positions(parts)
    if positions is not None:
        ranks = list(zip(positions, ranks, strict=True))
    elif None in numbers:
        return parts
    order = sorted(range(len(parts)), key=lambda i: (ranks[i], parts[i].path.name))
    return [parts[i] for i in order]


def _positions(parts: Sequence[_Part]) -> list[float] | None:
    """Return millimetres along the normal of the slices, if all are parallel and say so."""
    found = [
        (part.header.get("ImageOrientationPatient"), part.header.get("ImagePositionPatient"))
        for part in parts
    ]
    if not all(turn and place and len(turn) == 6 and len(place) == 3 for turn, place in found):
        return None
    turns = np.array([turn for turn, _ in found], float)
    places = np.array([place for _, place in found], float)
    if not np.allclose(turns, turns[0], atol=1e-2) or not np.isfinite(places).all():
        return None
    normal = np.cross(turns[0, :3], turns[0, 3:])
    return [round(float(position), 3) for position in places @ normal]


def _frames_of(header: Any) -> int:
    return int(header.get("NumberOfFrames") or 1)


def _bytes_per_pixel(header: Any) -> int:
    bits, samples = int(header.BitsAllocated), int(header.get("SamplesPerPixel") or 1)
    return max(1, bits // 8) * samples


def _refuse_large_series(path: Path, parts: Sequence[_Part]) -> None:
    header = parts[0].header
    refuse_if_large(
        path,
        (int(header.Rows), int(header.Columns)),
        slices=len(parts) if len(parts) > 1 else _frames_of(header),
        bytes_per_pixel=max(_bytes_per_pixel(part.header) for part in parts),
        held=sum(part.path.stat().st_size for part in parts),
    )


def _read_part(part: _Part, *, labels: bool) -> NDArray[Any]:
    """Decode the pixels of a file, (N, H, W, C)."""
    with guarded(part.path):
        _refuse_undecodable(part)
        dataset = _whole(part)
        kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        pixels = _decoded(part, dataset)
        if kind == "MONOCHROME1":
            pixels = _inverted(pixels, dataset)
        if kind == "PALETTE COLOR" and not labels:
            from pydicom.pixels import apply_color_lut

            return np.asarray(apply_color_lut(pixels[..., 0], dataset))[..., :3]
        return _rescaled(pixels, dataset)


def _refuse_undecodable(part: _Part) -> None:
    from pydicom.pixels import get_decoder

    syntax = part.header.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        header = part.header
        bits = int(header.BitsAllocated) * int(header.get("SamplesPerPixel") or 1)
        size = int(header.Rows) * int(header.Columns) * _frames_of(header) * bits // 8
        # Chroma of half the width is the least that is stored uncompressed.
        if part.path.stat().st_size < size * 2 // 3:
            raise PolysegError(f"{part.path}: is cut short: it says to hold {size:,} bytes")
        return
    try:
        usable = get_decoder(syntax).is_available
    except NotImplementedError:
        usable = False
    if not usable:
        raise PolysegError(
            f"{part.path}: is compressed as {syntax.name}, which needs another package: "
            "pip install python-gdcm, or pylibjpeg with pylibjpeg-libjpeg"
        )


def _whole(part: _Part) -> Any:
    import pydicom

    dataset = pydicom.dcmread(part.path)
    if dataset.file_meta.TransferSyntaxUID.is_compressed:
        _refuse_outgrown_frames(part, dataset)
    return dataset


def _refuse_outgrown_frames(part: _Part, dataset: Any) -> None:
    """Raise where a frame would decode to more than its rows and columns."""
    from pydicom.encaps import generate_frames

    rows, columns = int(dataset.Rows), int(dataset.Columns)
    most = 2 * rows * columns * _bytes_per_pixel(dataset) + 1024
    is_runs = dataset.file_meta.TransferSyntaxUID.name == "RLE Lossless"
    for frame in generate_frames(dataset.PixelData, number_of_frames=_frames_of(dataset)):
        sides = None if is_runs else encoded_sides(frame)
        if (is_runs and len(frame) > most) or sides not in (None, (rows, columns)):
            raise PolysegError(
                f"{part.path}: is damaged: a frame holds more than {rows} x {columns} pixels"
            )


def _decoded(part: _Part, dataset: Any) -> NDArray[Any]:
    from pydicom.pixels import pixel_array

    rows, columns, frames = int(dataset.Rows), int(dataset.Columns), _frames_of(dataset)
    samples = int(dataset.get("SamplesPerPixel") or 1)
    pixels = np.asarray(pixel_array(dataset))
    if pixels.size != frames * rows * columns * samples:
        raise PolysegError(f"{part.path}: is damaged: it holds pixels of shape {pixels.shape}")
    return pixels.reshape(frames, rows, columns, samples)


def _inverted(pixels: NDArray[Any], dataset: Any) -> NDArray[Any]:
    if pixels.dtype.kind == "i":
        return ~pixels
    if pixels.dtype.kind == "f":
        return np.asarray(pixels.max() - pixels)
    most = pixels.dtype.type(2 ** int(dataset.get("BitsStored", dataset.BitsAllocated)) - 1)
    return cast(NDArray[Any], most - np.minimum(pixels, most))


def _rescaled(pixels: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Apply slope and intercept, or the table that stands for them."""
    if dataset.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(pixels, dataset))
    factors = [_rescale_of(dataset, frame) for frame in range(len(pixels))]
    if all(one == (1.0, 0.0) for one in factors):
        return pixels
    if not np.isfinite(factors).all():
        raise ValueError("its rescale slope or intercept is no number")
    if all(one.is_integer() for pair in factors for one in pair) and pixels.dtype.kind in "iu":
        return _rescaled_whole(pixels, factors)
    scaled = np.empty(pixels.shape, np.float32)
    for k, (slope, intercept) in enumerate(factors):
        scaled[k] = pixels[k] * slope + intercept
    return scaled


def _rescaled_whole(pixels: NDArray[Any], factors: Sequence[tuple[float, float]]) -> NDArray[Any]:
    """Keep 16 bit where the results fit, as those of computed tomography do."""
    low, high = float(pixels.min()), float(pixels.max())
    ends = [slope * value + shift for slope, shift in factors for value in (low, high)]
    fits = min(ends) >= -(2**15) and max(ends) < 2**15
    scaled = np.empty(pixels.shape, np.int16 if fits else np.float32)
    for k, (slope, intercept) in enumerate(factors):
        scaled[k] = pixels[k] * slope + intercept
    return scaled


def _rescale_of(dataset: Any, frame: int) -> tuple[float, float]:
    group = _group(dataset, "PixelValueTransformationSequence", frame) or dataset
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    return (
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )


def _group(dataset: Any, name: str, frame: int) -> Any:
    """Return a functional group of a frame, or the one that all frames share, or None."""
    each = dataset.get("PerFrameFunctionalGroupsSequence") or []
    shared = dataset.get("SharedFunctionalGroupsSequence") or []
    for holder in (*each[frame : frame + 1], *shared[:1]):
        if holder.get(name):
            return holder[name].value[0]
    return None


def _dicom_spacing(header: Any) -> tuple[float, float] | None:
    group = _group(header, "PixelMeasuresSequence", 0) or header
    found = group.get("PixelSpacing") or header.get("ImagerPixelSpacing")
    if not found or len(found) != 2:
        return None
    rows, columns = float(found[0]), float(found[1])
    return (rows, columns) if 0 < rows < math.inf and 0 < columns < math.inf else None


def _derived(part: _Part, labels: NDArray[Any], series: str, description: str) -> Any:
    """Make a secondary capture of labels, (N, H, W), with the patient and place of the source."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian

    source = part.header
    bits: Literal[8, 16] = 8 if labels.dtype == np.uint8 else 16
    derived = Dataset()
    for name in _DERIVED.split():
        if name in source:
            derived[name] = source[name]
    derived.SOPClassUID = _SECONDARY if len(labels) == 1 else _SECONDARY_FRAMES[bits]
    derived.SOPInstanceUID = _new_identity(
        source, "SOPInstanceUID", labels, f"{series} {part.path.name}"
    )
    derived.SeriesInstanceUID = series
    derived.SeriesDescription = description
    derived.ImageType = ["DERIVED", "SECONDARY"]
    derived.ConversionType = "WSD"
    derived.SamplesPerPixel = 1
    derived.PhotometricInterpretation = "MONOCHROME2"
    derived.Rows, derived.Columns = labels.shape[1:]
    derived.BitsAllocated = derived.BitsStored = bits
    derived.HighBit, derived.PixelRepresentation = bits - 1, 0
    if len(labels) > 1:
        _add_frames(derived, source, len(labels))
    content = np.ascontiguousarray(labels, f"<u{bits // 8}").tobytes()
    # Values have even length.
    derived.PixelData = content + b"\0" * (len(content) % 2)
    derived["PixelData"].VR = "OB" if bits == 8 else "OW"
    derived.file_meta = FileMetaDataset()
    derived.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    derived.file_meta.MediaStorageSOPClassUID = derived.SOPClassUID
    derived.file_meta.MediaStorageSOPInstanceUID = derived.SOPInstanceUID
    return derived


def _add_frames(derived: Any, source: Any, count: int) -> None:
    derived.NumberOfFrames = count
    derived.PageNumberVector = list(range(1, count + 1))
    derived.FrameIncrementPointer = 0x00182001  # the pages' numbers
    shared = source.get("SharedFunctionalGroupsSequence")
    if shared:
        derived.SharedFunctionalGroupsSequence = list(_geometry_of(shared[:1]))
    each = source.get("PerFrameFunctionalGroupsSequence")
    if each:
        derived.PerFrameFunctionalGroupsSequence = list(_geometry_of(each[:count]))


def _geometry_of(groups: Any) -> Iterator[Any]:
    from pydicom.dataset import Dataset

    for group in groups:
        kept = Dataset()
        for name in _FRAME_GEOMETRY:
            if name in group:
                kept[name] = group[name]
        yield kept


def _new_identity(source: Any, name: str, labels: NDArray[Any], purpose: str) -> str:
    """Return an identifier that hangs on the source's, the labels and their purpose alone."""
    from pydicom.uid import generate_uid

    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    return str(generate_uid(entropy_srcs=[str(source.get(name, "")), digest, purpose]))


# Both.


def _library(path: Path, kind: str, name: Literal["nibabel", "pydicom"]) -> Any:
    try:
        if name == "nibabel":
            import nibabel

            return nibabel
        import pydicom

        return pydicom
    except ImportError:
        raise PolysegError(_MISSING.format(path=path, kind=kind, name=name)) from None


def _refuse_other_shape(path: Path, expected: Sequence[int], values: NDArray[Any]) -> None:
    if tuple(expected) != values.shape:
        shown, found = (" x ".join(map(str, shape)) for shape in (expected, values.shape))
        raise PolysegError(f"{path}: has slices of {shown}; what was made of it has {found}")
