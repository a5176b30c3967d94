"""Read and write NRRD and MetaImage (MHA) volumes; alone in importing SimpleITK."""

import re
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from polyseg.data.formats.images import one_channel
from polyseg.data.formats.nifti import lie, plane_of, spacing_of
from polyseg.data.formats.stacks import (
    MISSING,
    MOST_CHANNELS,
    Plane,
    Stack,
    guarded,
    image_pixels,
    label_pixels,
    refuse_if_large,
    refuse_if_no_file,
    refuse_other_shape,
    whole_numbers,
)
from polyseg.errors import PolysegError
from polyseg.system.files import atomic_path

_READERS = {".nrrd": "NrrdImageIO", ".mha": "MetaImageIO"}
_LONGEST_HEADER = 2**16
_BYTES = {"8": 1, "16": 2, "32": 4, "64": 8}
_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
"""From ITK's axes, to the left and the back, to NIfTI's, to the right and the front."""


def read_itk(path: Path, plane: Plane = "axial", *, labels: bool = False) -> Stack:
    """Read an NRRD or MetaImage volume of two or three axes, sliced as NIfTI volumes are.

    Raises:
        PolysegError: the file is damaged, too large or of a kind not read, or SimpleITK is missing.

    >>> read_itk(Path("/dev/null"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: /dev/null: is no file; expected an image
    """
    itk = _simpleitk(path)
    with guarded(path):
        refuse_if_no_file(path)
        reader = _header(path, itk)
        try:
            image = reader.Execute()
        except RuntimeError:
            raise PolysegError(
                f"{path}: is damaged or cut short: its voxels cannot be read"
            ) from None
        stored, affine = _stored(image, itk)
        shown = plane_of(stored.shape, affine, plane)
        pixels = np.ascontiguousarray(lie(stored, affine, shown))
        spacing = spacing_of(affine, shown)
        if labels:
            return Stack(label_pixels(path, one_channel(path, pixels)), spacing)
        return Stack(image_pixels(path, whole_numbers(pixels)), spacing)


def write_itk(
    source: Path, values: NDArray[Any], path: Path, plane: Plane, description: str
) -> Path:
    """Write slices, (N, H, W), as a volume of the source's kind that lies where it does.

    Raises:
        PolysegError: the source has other slices, is damaged, or the file cannot be written.
    """
    itk = _simpleitk(source)
    with guarded(source):
        image = _header(source, itk).Execute()
        stored, affine = _stored(image, itk)
        volume = np.zeros((*stored.shape[:3], 1), values.dtype)
        view = lie(volume, affine, plane_of(stored.shape, affine, plane))[..., 0]
        refuse_other_shape(source, view.shape, values)
        view[...] = values
        array = np.ascontiguousarray(volume[..., 0].T)
        written = itk.GetImageFromArray(array if image.GetDimension() == 3 else array[0])
        written.CopyInformation(image)
        written.SetMetaData("description", description)
    suffix = source.suffix.lower()
    target = path.with_name(path.name + suffix)
    with atomic_path(target) as temporary:
        writer = itk.ImageFileWriter()
        writer.SetImageIO(_READERS[suffix])
        writer.SetFileName(str(temporary))
        writer.UseCompressionOn()
        writer.Execute(written)
    return target


def _header(path: Path, itk: Any) -> Any:
    """Return a reader that has read the header, which is checked before anything is decoded."""
    _refuse_other_files(path)
    reader = itk.ImageFileReader()
    reader.SetImageIO(_READERS[path.suffix.lower()])
    reader.SetFileName(str(path))
    try:
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
    refuse_if_large(path, (height, width), slices=depth, bytes_per_pixel=each)
    return reader


def _refuse_other_files(path: Path) -> None:
    """Raise where the voxels are not in the file itself: headers of strangers may name any file."""
    with path.open("rb") as stream:
        header = stream.read(_LONGEST_HEADER).lower()
    if path.suffix.lower() == ".mha":
        apart = re.search(rb"elementdatafile\s*=\s*local\s", header) is None
    else:
        apart = re.search(rb"\ndata ?file:", re.split(rb"\r?\n\r?\n", header)[0]) is not None
    if apart:
        raise PolysegError(
            f"{path}: holds no voxels of its own; save header and voxels in one file"
        )


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
    try:
        import SimpleITK
    except ImportError:
        kind = "NRRD" if path.suffix.lower() == ".nrrd" else "MetaImage"
        raise PolysegError(MISSING.format(path=path, kind=kind, name="SimpleITK")) from None
    SimpleITK.ProcessObject.SetGlobalWarningDisplay(False)
    return SimpleITK
