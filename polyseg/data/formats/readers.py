"""Read a file of any kind as a stack of slices, of images or of labels."""

from pathlib import Path

from polyseg.data.formats.file_formats import format_of, readable_suffixes
from polyseg.data.formats.stacks import Plane, Stack, guarded
from polyseg.errors import PolysegError


def read_image_stack(path: str | Path, plane: Plane = "axial") -> Stack:
    """Read an image, a volume or a series as slices, (N, H, W, C).

    Args:
        path: a file, or a folder that holds one DICOM series.
        plane: how a NIfTI volume is sliced; all else is as stored.

    Raises:
        PolysegError: it is damaged, too large or of a kind that is not read.

    >>> read_image_stack(Path("notes.txt"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: notes.txt: is of no kind that is read: .png, .jpg, .jpeg, .bmp, .gif, .webp, .tif, .tiff, .ome.tif, .ome.tiff, .nii, .nii.gz, .dcm, .ima, .nrrd, .mha
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


def _read(path: Path, plane: Plane, *, labels: bool) -> Stack:
    with guarded(path):
        kind = format_of(path)
    if kind is None:
        raise PolysegError(f"{path}: is of no kind that is read: {', '.join(readable_suffixes())}")
    stack: Stack = kind.read(path, plane, labels=labels)
    return stack
