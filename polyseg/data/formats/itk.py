"""Read and write NRRD and MetaImage volumes; the only module that imports SimpleITK."""

import contextlib
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray

from polyseg.data.formats.images import as_stack
from polyseg.data.formats.nifti import AS_STORED, plane_of, slices_of, spacing_of
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

_READERS = {
    **dict.fromkeys((".nrrd", ".nhdr"), "NrrdImageIO"),
    **dict.fromkeys((".mha", ".mhd"), "MetaImageIO"),
}
_IN_ONE_FILE = {".nhdr": ".nrrd", ".mhd": ".mha"}
"""Suffixes of the files that are written for headers with their voxels in another file."""
_LONGEST_HEADER = 2**16
_BLOCK = 2**20
_LINES = re.MULTILINE | re.IGNORECASE
# MetaImage's own reader accepts = and :, and is case-sensitive.
_META_FILE = re.compile(rb"^[ \t]*ElementDataFile[ \t]*[=:][ \t]*(.*?)[ \t\r]*$", re.MULTILINE)
_META_PACKED = re.compile(rb"^[ \t]*CompressedData[ \t]*[=:][ \t]*[t1]", _LINES)
_META_SIZE = re.compile(rb"^[ \t]*CompressedDataSize[ \t]*[=:][ \t]*(\d{1,12})[ \t\r]*$", _LINES)
_META_BINARY = re.compile(rb"^[ \t]*BinaryData[ \t]*[=:][ \t]*[t1]", _LINES)
_NRRD_FILE = re.compile(rb"^data ?file:(?!=)[ \t]*(.*?)[ \t\r]*$", _LINES)
_NRRD_ENCODING = re.compile(rb"^encoding:[ \t]*(\w+)", _LINES)
_NRRD_END = re.compile(rb"\r?\n\r?\n")
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From ITK's axes, to the left and the back, to NIfTI's, to the right and the front."""


def read_itk(
    path: Path, plane: Plane = "axial", *, labels: bool = False, stored: bool = False
) -> Stack:
    """Read an NRRD or MetaImage volume of two or three axes, sliced as NIfTI volumes are.

    With `stored` the voxels are shown in their order, and the orientation in the header is ignored.
    """
    itk = _simpleitk(path)
    with guarded(path):
        reader = _header(path, itk)
        try:
            with _suppressing_reader_output():
                image = reader.Execute()
        except RuntimeError:
            raise PolysegError(
                f"{path}: is damaged or cut short: its voxels cannot be read"
            ) from None
        voxels, affine = _stored(image, itk)
        affine = AS_STORED if stored else affine
        shown = plane_of(voxels.shape, affine, plane)
        pixels = np.ascontiguousarray(slices_of(voxels, affine, shown))
        spacing = spacing_of(affine, shown)
        pixels = pixels if labels else whole_numbers(pixels)
        return as_stack(path, pixels, labels=labels, spacing=spacing)


def write_itk(
    source: Path, values: NDArray[Any], path: Path, plane: Plane, description: str
) -> Path:
    """Write slices, (N, H, W), as a volume of the source's kind, with its geometry."""
    itk = _simpleitk(source)
    with guarded(source):
        image = _header(source, itk).Execute()
        stored, affine = _stored(image, itk)
        volume = np.zeros((*stored.shape[:3], 1), values.dtype)
        view = slices_of(volume, affine, plane_of(stored.shape, affine, plane))[..., 0]
        refuse_other_shape(source, view.shape, values)
        view[...] = values
        array = np.ascontiguousarray(volume[..., 0].T)
        written = itk.GetImageFromArray(array if image.GetDimension() == 3 else array[0])
        written.CopyInformation(image)
        written.SetMetaData("description", description)
    suffix = source.suffix.lower()
    suffix = _IN_ONE_FILE.get(suffix, suffix)
    target = path.with_name(path.name + suffix)
    with atomic_path(target) as temporary:
        writer = itk.ImageFileWriter()
        writer.SetImageIO(_READERS[suffix])
        writer.SetFileName(str(temporary))
        writer.UseCompressionOn()
        writer.Execute(written)
    return target


@contextlib.contextmanager
def _suppressing_reader_output() -> Iterator[None]:
    """Drop the lines about damaged files that MetaImage's reader writes to file descriptor 2."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _header(path: Path, itk: Any) -> Any:
    """Return a reader that has read the header, which is checked before anything is decoded."""
    voxels = _voxels(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO(_READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
        with _suppressing_reader_output():
            reader.ReadImageInformation()
    except RuntimeError:
        raise PolysegError(f"{path}: is damaged: its header cannot be read") from None
    sizes = [int(side) for side in reader.GetSize()]
    channels = int(reader.GetNumberOfComponents())
    if len(sizes) not in (2, 3) or channels > MOST_CHANNELS:
        raise PolysegError(
            f"{path}: has {len(sizes)} axes and {channels} channels; expected 2 or 3 axes, and up "
            f"to {MOST_CHANNELS} channels"
        )
    kind = itk.GetPixelIDValueAsString(reader.GetPixelID())
    bits = "".join(letter for letter in kind if letter.isdigit())
    if "complex" in kind or bits not in _BYTES:
        raise PolysegError(f"{path}: holds {kind} voxels; expected integers or floats")
    depth, height, width = sorted([*sizes, 1][:3])
    each = channels * _BYTES[bits]
    held = voxels.file.stat().st_size
    refuse_if_large(path, (height, width), slices=depth, bytes_per_pixel=each, held=held)
    _refuse_damaged(path, voxels, depth * height * width * each)
    return reader


@dataclass(frozen=True)
class _Voxels:
    """The place of the voxels, as their header describes it."""

    file: Path
    start: int
    """Number of bytes before the voxels in the file."""
    encoding: str
    """"raw", "gzip" (also for zlib) or another encoding."""
    packed: int | None = None
    """Number of compressed bytes by a MetaImage header; None for all up to the end of the file."""


def voxels_of(path: Path) -> Path:
    """Return the file that holds the voxels of a header: the file itself, or one beside it.

    Raises:
        PolysegError: the header names several files, or one that is not in its folder.
    """
    return _voxels(path).file


def _voxels(path: Path) -> _Voxels:
    """Return the place of voxels; a header may name any file, so only one beside is accepted."""
    with path.open("rb") as stream:
        header = stream.read(_LONGEST_HEADER)
    packed = None
    if path.suffix.lower() in (".mha", ".mhd"):
        found = _META_FILE.search(header)
        names, start = ([found[1]], found.end() + 1) if found else ([b""], 0)
        encoding = "raw" if _META_BINARY.search(header[:start]) else "text"
        if _META_PACKED.search(header[:start]):
            # SimpleITK unpacks this many bytes; without the number it returns random memory.
            sizes = _META_SIZE.findall(header[:start])
            encoding, packed = "gzip", int(sizes[0]) if len(sizes) == 1 else 0
        names = [name for name in names if name.lower() != b"local"]
    else:
        end = _NRRD_END.search(header)
        header, start = (header[: end.start()], end.end()) if end else (header, 0)
        names = _NRRD_FILE.findall(header)
        found = _NRRD_ENCODING.search(header)
        encoding = found[1].decode().lower() if found else ""
        encoding = {"gz": "gzip"}.get(encoding, encoding)
    if not names:
        return _Voxels(path, start, encoding, packed)
    name = b" ".join(names).decode("utf-8", "replace")
    # A % is a pattern of many file names; LIST precedes such names.
    single = name == Path(name).name and name.isprintable() and "%" not in name
    if not single or name.startswith("LIST") or not (path.parent / name).is_file():
        raise PolysegError(
            f"{path}: its voxels are not in one file beside it ({name[:80]!r}); put that file "
            "there, or save header and voxels in one file, .mha or .nrrd"
        )
    return _Voxels(path.parent / name, 0, encoding, packed)


def _refuse_damaged(path: Path, voxels: _Voxels, expected: int) -> None:
    """Raise if voxels are cut short or do not unpack, which SimpleITK does not always notice."""
    held = voxels.file.stat().st_size - voxels.start
    if voxels.encoding == "gzip":
        packed = held if voxels.packed is None else voxels.packed
        with voxels.file.open("rb") as stream:
            stream.seek(voxels.start)
            held = _unpacked(stream, packed, expected) if packed <= held else 0
    if (voxels.encoding == "raw" and held < expected) or (
        voxels.encoding == "gzip" and held != expected
    ):
        raise PolysegError(
            f"{path}: is damaged or cut short: {expected:,} bytes of voxels are expected, and "
            f"{voxels.file.name} holds {max(0, held):,} that can be read"
        )


def _unpacked(stream: BinaryIO, left: int, most: int) -> int:
    """Return the size of the next `left` bytes unpacked: 0 if damaged, at most about `most`."""
    unpacker, count = zlib.decompressobj(wbits=47), 0
    try:
        while not unpacker.eof and count <= most:
            packed = unpacker.unconsumed_tail
            if not packed:
                packed = stream.read(min(left, _BLOCK))
                left -= len(packed)
            if not packed:
                return 0
            count += len(unpacker.decompress(packed, _BLOCK))
    except zlib.error:
        return 0
    return count


def _stored(image: Any, itk: Any) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Return voxels, (X, Y, Z, C), and the affine from voxels to NIfTI's millimetres."""
    values = itk.GetArrayFromImage(image)
    values = values if image.GetNumberOfComponentsPerPixel() > 1 else values[..., None]
    values = values if image.GetDimension() == 3 else values[None]
    axes = image.GetDimension()
    turn = np.eye(4)
    turn[:axes, :axes] = np.reshape(image.GetDirection(), (axes, axes))
    turn[:axes, :axes] *= np.array(image.GetSpacing())
    turn[:axes, 3] = image.GetOrigin()
    return values.transpose(2, 1, 0, 3), cast(NDArray[np.float64], _TO_RAS @ turn)


def _simpleitk(path: Path) -> Any:
    kind = "NRRD" if path.suffix.lower() == ".nrrd" else "MetaImage"
    itk = imported("SimpleITK", path, kind)
    itk.ProcessObject.SetGlobalWarningDisplay(False)
    return itk
