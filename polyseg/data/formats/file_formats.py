"""List the kinds of files that are read and written; a new format needs a row here.

Rows name their functions as "module:name", so that finding files imports no decoder.
"""

from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from polyseg.registry import Registry, Row

_FORMATS = "polyseg.data.formats"


@dataclass(frozen=True)
class Format(Row):
    """A kind of file; its function reads one as a `Stack`, given the path and `labels=`.

    It raises PolysegError if the file is damaged, too large or of a kind that is not read.
    """

    suffixes: tuple[str, ...] = ()
    """Suffixes of the files, in lower case."""
    starts: tuple[bytes, ...] = ()
    """First bytes that only files of this kind have; they count more than the name."""
    has_planes: bool = False
    """Whether files are volumes; the function then also takes `plane=` and `stored=`."""
    holds_series: bool = False
    """Whether a folder can hold one image, with a slice in each file."""
    voxels: str = ""
    """Function that returns the file that holds the voxels, where headers may name another."""
    write: str = ""
    """Function that writes (N, H, W) values with the geometry of their source.

    It takes source, values, path without suffix, plane and description, and returns the path. It
    raises PolysegError if the source has other slices. Without it predictions are PNG files.
    """
    libraries: tuple[str, ...] = ()
    """Packages that decode it; another version of one may decode other pixels."""
    holds_maps: bool = False
    """Whether `write` also takes float32 maps; maps of other formats are TIFF files."""


FORMATS = Registry(
    "file format",
    Format(
        "picture",
        "PNG, JPEG, BMP, GIF or WebP",
        f"{_FORMATS}.images:read_picture",
        (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"),
        starts=(b"\x89PNG", b"\xff\xd8\xff", b"GIF8"),
        libraries=("pillow",),
    ),
    Format(
        "tiff",
        "TIFF of one picture or of a stack",
        f"{_FORMATS}.tiff:read_tiff",
        (".tif", ".tiff", ".ome.tif", ".ome.tiff"),
        starts=(b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
        write=f"{_FORMATS}.writers:write_tiff_like",
        libraries=("tifffile", "imagecodecs"),
        holds_maps=True,
    ),
    Format(
        "nifti",
        "NIfTI volume",
        f"{_FORMATS}.nifti:read_nifti",
        (".nii", ".nii.gz"),
        has_planes=True,
        write=f"{_FORMATS}.nifti:write_nifti",
        libraries=("nibabel",),
        holds_maps=True,
    ),
    Format(
        "dicom",
        "DICOM file, or folder of a series",
        f"{_FORMATS}.dicom:read_dicom",
        (".dcm", ".ima"),
        holds_series=True,
        write=f"{_FORMATS}.dicom:write_dicom",
        libraries=("pydicom",),
    ),
    Format(
        "itk",
        "NRRD or MetaImage volume",
        f"{_FORMATS}.itk:read_itk",
        (".nrrd", ".mha", ".nhdr", ".mhd"),
        has_planes=True,
        voxels=f"{_FORMATS}.itk:voxels_of",
        write=f"{_FORMATS}.itk:write_itk",
        libraries=("SimpleITK",),
        holds_maps=True,
    ),
)


def readable_suffixes() -> tuple[str, ...]:
    """Return the suffixes of images and masks; DICOM files may have none."""
    return tuple(suffix for row in FORMATS.values() for suffix in row.suffixes)


def suffix_of(path: Path) -> str:
    """Return the suffix that identifies a file's format, in lower case, or "".

    >>> suffix_of(Path("a.b.NII.gz")), suffix_of(Path("1.2.840"))
    ('.nii.gz', '')
    """
    name = path.name.lower()
    return max((end for end in readable_suffixes() if name.endswith(end)), key=len, default="")


def format_of(path: Path) -> Format | None:
    """Return the format of a file or folder by its first bytes, its name, or DICOM's prefix.

    >>> format_of(Path("a.JPG")).name, format_of(Path("notes.txt"))
    ('picture', None)
    """
    start, suffix = _start_of(path), suffix_of(path)
    if _is_marked(start):  # The bytes before the mark may be the start of a TIFF.
        return FORMATS["dicom"]
    rows = FORMATS.values()
    by_start = (row for row in rows if start.startswith(row.starts))
    by_name = (row for row in rows if suffix in row.suffixes)
    of_series = (row for row in rows if row.holds_series and path.is_dir())
    return next(chain(by_start, by_name, of_series), None)


def is_dicom(path: Path) -> bool:
    """Return whether a file begins as DICOM does."""
    return _is_marked(_start_of(path))


def _is_marked(start: bytes) -> bool:
    return start[128:] == b"DICM"


def _start_of(path: Path) -> bytes:
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as stream:
            return stream.read(132)
    except OSError:
        return b""
