"""Read and write DICOM files and series; the only module that imports pydicom."""

import dataclasses
import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from polyseg.data.formats.file_formats import is_dicom
from polyseg.data.formats.images import as_stack, encoded_sides
from polyseg.data.formats.stacks import (
    MOST_SLICES,
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
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


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

    The files of a series are sorted along the normal of their slices, else by InstanceNumber, else
    by name. Rescale slope and intercept are applied; images of MONOCHROME1, where 0 is white,
    are inverted first, so that pixels are as displayed; labels are not. Colours become RGB.
    """
    imported("pydicom", path, "DICOM")
    with guarded(path):
        parts = _parts(path)
        _refuse_large_series(path, parts)
        stacks = [_read_part(part, labels=labels) for part in parts]
        pixels = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
        del stacks
        spacing = _dicom_spacing(parts[0].header)
        pixels = pixels if labels else whole_numbers(pixels)
        return as_stack(path, pixels, labels=labels, spacing=spacing)


def write_dicom(source: Path, labels: NDArray[Any], path: Path, _: Plane, description: str) -> Path:
    """Write labels, (N, H, W) of 8 or 16 bit, as DICOM of the same patient, study and geometry.

    For a folder of files the result is a folder of files with the same names.
    """
    imported("pydicom", source, "DICOM")
    target = path if source.is_dir() else path.with_name(f"{path.name}.dcm")
    with guarded(source):
        parts = _parts(source)
        sides = (int(parts[0].header.Rows), int(parts[0].header.Columns))
        frames = sum(_frames_of(part.header) for part in parts)
        refuse_other_shape(source, (frames, *sides), labels)
        series = _new_uid(parts[0].header, "SeriesInstanceUID", labels, target.name)
    for k, part in enumerate(parts):
        with guarded(part.path):
            mask = labels[k : k + 1] if len(parts) > 1 else labels
            derived = _derived(part, mask, series, description)
        name = target / part.path.name if source.is_dir() else target
        with atomic_path(name) as temporary, temporary.open("wb") as stream:
            derived.save_as(stream, enforce_file_format=True)
    return target


def _parts(path: Path) -> list[_Part]:
    if not path.is_dir():
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
    _refuse_mixed_series(path, parts)
    return _in_order(parts)


def _dicom_header(path: Path) -> Any:
    import pydicom
    from pydicom.filereader import read_file_meta_info

    if not is_dicom(path):
        path.open("rb").close()
        raise PolysegError(f"{path}: is not a DICOM file; expected DICM at its byte 128")
    syntax = read_file_meta_info(path).get("TransferSyntaxUID")
    if syntax == pydicom.uid.DeflatedExplicitVRLittleEndian:
        raise PolysegError(f"{path}: is deflated DICOM; save it as explicit little endian")
    header = pydicom.dcmread(path, stop_before_pixels=True)
    if not all(header.get(name) for name in ("Rows", "Columns", "BitsAllocated")):
        raise PolysegError(f"{path}: is a DICOM file without an image")
    return header


def _refuse_mixed_series(path: Path, parts: Sequence[_Part]) -> None:
    series = sorted({str(part.header.get("SeriesInstanceUID", "none")) for part in parts})
    if len(series) > 1:
        shown = ", ".join(series[:4]) + (", ..." if len(series) > 4 else "")
        raise PolysegError(
            f"{path}: holds {len(series)} DICOM series ({shown}); put each in a separate folder"
        )
    sizes = sorted({f"{part.header.Rows} x {part.header.Columns}" for part in parts})
    if len(sizes) > 1:
        raise PolysegError(
            f"{path}: its slices differ in size ({', '.join(sizes[:4])}); keep one size per folder"
        )
    if len(parts) > 1 and any(_frames_of(part.header) > 1 for part in parts):
        raise PolysegError(f"{path}: holds files of many frames; put each in a separate folder")


def _in_order(parts: list[_Part]) -> list[_Part]:
    """Sort by position along the normal, else by number, else leave the order of names."""
    numbers = [part.header.get("InstanceNumber") for part in parts]
    positions = _positions(parts)
    if positions is None and None in numbers:
        return parts
    ranks = zip(positions or [0.0] * len(parts), (int(one or 0) for one in numbers), strict=True)
    ranked = zip(ranks, parts, strict=True)
    return [part for _, part in sorted(ranked, key=lambda pair: (pair[0], pair[1].path.name))]


def _positions(parts: Sequence[_Part]) -> list[float] | None:
    """Return millimetres along the normal of the slices, or None unless all are parallel."""
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
    import pydicom
    from pydicom.pixels import apply_color_lut, pixel_array

    with guarded(part.path):
        _refuse_undecodable(part)
        dataset = pydicom.dcmread(part.path)
        if dataset.file_meta.TransferSyntaxUID.is_compressed:
            _refuse_oversized_frames(part, dataset)
        kind = str(dataset.get("PhotometricInterpretation", "MONOCHROME2"))
        frames, rows, columns = _frames_of(dataset), int(dataset.Rows), int(dataset.Columns)
        shape = frames, rows, columns, int(dataset.get("SamplesPerPixel") or 1)
        pixels = np.asarray(pixel_array(dataset))
        if pixels.size != math.prod(shape):
            raise PolysegError(f"{part.path}: is damaged: it holds pixels of shape {pixels.shape}")
        pixels = pixels.reshape(shape)
        if kind == "MONOCHROME1" and not labels:
            pixels = _inverted(pixels, dataset)
        if kind == "PALETTE COLOR" and not labels:
            return np.asarray(apply_color_lut(pixels[..., 0], dataset))[..., :3]
        return _rescaled(pixels, dataset)


def _refuse_undecodable(part: _Part) -> None:
    from pydicom.pixels import get_decoder

    syntax = part.header.file_meta.TransferSyntaxUID
    if not syntax.is_compressed:
        header = part.header
        bits = int(header.BitsAllocated) * int(header.get("SamplesPerPixel") or 1)
        size = int(header.Rows) * int(header.Columns) * _frames_of(header) * bits // 8
        # Uncompressed pixels are smallest if chroma has half the width.
        if part.path.stat().st_size < size * 2 // 3:
            raise PolysegError(f"{part.path}: is cut short: its header announces {size:,} bytes")
        return
    try:
        usable = get_decoder(syntax).is_available
    except NotImplementedError:  # What get_decoder raises for syntaxes that pydicom cannot decode.
        usable = False
    if not usable:
        raise PolysegError(
            f"{part.path}: is compressed as {syntax.name}, which needs another package: "
            "pip install python-gdcm, or pylibjpeg with pylibjpeg-libjpeg"
        )


def _refuse_oversized_frames(part: _Part, dataset: Any) -> None:
    """Raise if a frame would decode to more than its rows and columns."""
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


def _inverted(pixels: NDArray[Any], dataset: Any) -> NDArray[Any]:
    if pixels.dtype.kind == "i":
        return ~pixels
    if pixels.dtype.kind == "f":
        return np.asarray(pixels.max() - pixels)
    most = pixels.dtype.type(2 ** int(dataset.get("BitsStored", dataset.BitsAllocated)) - 1)
    return cast(NDArray[Any], most - np.minimum(pixels, most))


def _rescaled(pixels: NDArray[Any], dataset: Any) -> NDArray[Any]:
    """Apply slope and intercept, or the table given in their place."""
    if dataset.get("ModalityLUTSequence"):
        from pydicom.pixels import apply_modality_lut

        return np.asarray(apply_modality_lut(pixels, dataset))
    factors = [_rescale_of(dataset, frame) for frame in range(len(pixels))]
    if all(one == (1.0, 0.0) for one in factors):
        return pixels
    if not np.isfinite(factors).all():
        raise ValueError("its rescale slope or intercept is not a number")
    whole = all(one.is_integer() for pair in factors for one in pair) and pixels.dtype.kind in "iu"
    extremes = float(pixels.min()), float(pixels.max())
    ends = [slope * value + shift for slope, shift in factors for value in extremes]
    # Results that fit keep 16 bit, as those of computed tomography do.
    fits = whole and min(ends) >= -(2**15) and max(ends) < 2**15
    scaled = np.empty(pixels.shape, np.int16 if fits else np.float32)
    for k, (slope, intercept) in enumerate(factors):
        scaled[k] = pixels[k] * slope + intercept
    return scaled


def _rescale_of(dataset: Any, frame: int) -> tuple[float, float]:
    group = _group(dataset, "PixelValueTransformationSequence", frame) or dataset
    slope, intercept = group.get("RescaleSlope"), group.get("RescaleIntercept")
    return (1.0 if slope is None else float(slope), 0.0 if intercept is None else float(intercept))


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
    derived.SOPInstanceUID = _new_uid(
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
    # A value must have an even length.
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
    if shared := source.get("SharedFunctionalGroupsSequence"):
        derived.SharedFunctionalGroupsSequence = list(_geometry_of(shared[:1]))
    if each := source.get("PerFrameFunctionalGroupsSequence"):
        derived.PerFrameFunctionalGroupsSequence = list(_geometry_of(each[:count]))


def _geometry_of(groups: Any) -> Iterator[Any]:
    from pydicom.dataset import Dataset

    for group in groups:
        kept = Dataset()
        for name in _FRAME_GEOMETRY:
            if name in group:
                kept[name] = group[name]
        yield kept


def _new_uid(source: Any, name: str, labels: NDArray[Any], purpose: str) -> str:
    """Return an identifier determined by the source's identifier, the labels and the purpose."""
    from pydicom.uid import generate_uid

    digest = hashlib.sha256(labels.tobytes()).hexdigest()
    return str(generate_uid(entropy_srcs=[str(source.get(name, "")), digest, purpose]))
