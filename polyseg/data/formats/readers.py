"""Reading a file of any kind as a stack of slices, of images or of labels."""

from pathlib import Path

from polyseg.data.formats.dicom import is_dicom, read_dicom
from polyseg.data.formats.images import PICTURE_SUFFIXES, read_picture
from polyseg.data.formats.nifti import NIFTI_SUFFIXES, read_nifti
from polyseg.data.formats.stacks import Plane, Stack, guarded
from polyseg.data.formats.tiff import TIFF_SUFFIXES, read_tiff
from polyseg.errors import PolysegError

_SUFFIXES = (*PICTURE_SUFFIXES, *TIFF_SUFFIXES, *NIFTI_SUFFIXES, ".dcm")


def read_image_stack(path: str | Path, plane: Plane = "axial") -> Stack:
    """Read an image, a volume or a series as slices, (N, H, W, C).

    Args:
        path: a file, or a folder that holds one DICOM series.
        plane: how a NIfTI volume is sliced; all else is as stored.

    Raises:
        PolysegError: it is damaged, too large or of a kind that is not read.

    >>> read_image_stack(Path("notes.txt"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: notes.txt: is of no kind that is read: .png, .jpg, .jpeg, .bmp, .gif, .tif, .tiff, .nii, .nii.gz, .dcm
    """  # noqa: E501
    return _read(Path(path), plane, labels=False)


def read_label_stack(path: str | Path, plane: Plane = "axial") -> Stack:
    """Read a mask or labels as slices, (N, H, W), of the values that the file holds.

    Args:
        path: a file, or a folder that holds one DICOM series; colours have equal channels.
        plane: how a NIfTI volume is sliced; all else is as stored.

    Raises:
        PolysegError: it is damaged, too large or of a kind that is not read.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.png"
    ...     Image.new("L", (3, 2), 255).save(path)
    ...     read_label_stack(path).pixels
    array([[[255, 255, 255],
            [255, 255, 255]]], dtype=uint8)
    """
    return _read(Path(path), plane, labels=True)


def _is_bare_dicom(path: Path) -> bool:
    """Say whether a file without a suffix, or named by numbers and dots, is DICOM."""
    ending = path.suffix.lower().removeprefix(".")
    return (not ending or ending.isdigit() or ending == "ima") and is_dicom(path)


def _read(path: Path, plane: Plane, *, labels: bool) -> Stack:
    name = path.name.lower()
    with guarded(path):
        bare = path.is_dir() or _is_bare_dicom(path)
    if name.endswith(PICTURE_SUFFIXES):
        return read_picture(path, labels=labels)
    if name.endswith(TIFF_SUFFIXES):
        return read_tiff(path, labels=labels)
    if name.endswith(NIFTI_SUFFIXES):
        return read_nifti(path, plane, labels=labels)
    if name.endswith(".dcm") or bare:
        return read_dicom(path, labels=labels)
    raise PolysegError(f"{path}: is of no kind that is read: {', '.join(_SUFFIXES)}")
