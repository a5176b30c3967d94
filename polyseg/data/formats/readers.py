"""Read a file of any kind as a stack of slices, of images or of labels."""

from pathlib import Path

from polyseg.data.formats.file_formats import format_of, readable_suffixes
from polyseg.data.formats.stacks import Plane, Stack, guarded, refuse_if_no_file
from polyseg.errors import PolysegError


def read_image_stack(path: str | Path, plane: Plane = "axial") -> Stack:
    """Read an image, a volume or a series as slices, (N, H, W, C).

    Args:
        path: a file, or a folder that holds one DICOM series.
        plane: plane in which a volume is sliced; other files are read as stored.

    Raises:
        PolysegError: it is damaged, too large or in an unsupported format.
    """
    return _read(Path(path), plane, labels=False)


def read_label_stack(path: str | Path, plane: Plane = "axial", *, stored: bool = False) -> Stack:
    """Read a mask or labels as slices, (N, H, W), of the values that the file holds.

    With `stored` the voxels of a volume are shown in their order, x to the right and y down, and
    its orientation and spacing are ignored. All else is as in `read_image_stack`.

    >>> import tempfile
    >>> from PIL import Image
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "a.png"
    ...     Image.new("L", (3, 2), 255).save(path)
    ...     read_label_stack(path).pixels
    array([[[255, 255, 255],
            [255, 255, 255]]], dtype=uint8)
    """
    return _read(Path(path), plane, labels=True, stored=stored)


def _read(path: Path, plane: Plane, *, labels: bool, stored: bool = False) -> Stack:
    with guarded(path):
        kind = format_of(path)
        if kind is not None and not (kind.holds_series and path.is_dir()):
            refuse_if_no_file(path)
    if kind is None:
        raise PolysegError(f"{path}: is not a supported file: {', '.join(readable_suffixes())}")
    how = {"plane": plane, "stored": stored} if kind.has_planes else {}
    stack: Stack = kind.resolve()(path, labels=labels, **how)
    return stack
