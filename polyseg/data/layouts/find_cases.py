"""Find the images and masks of a data set by the layouts that `polyseg.choices.LAYOUTS` lists."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyseg.choices import LAYOUTS
from polyseg.data.layouts.cases import Layout, Unmasked, exists, left_out, plain, seen_in
from polyseg.data.layouts.manifest import MANIFEST_SUFFIXES
from polyseg.data.layouts.names import IMAGE_FOLDERS, MASK_FOLDERS
from polyseg.data.layouts.source import Names, Source, as_names
from polyseg.errors import PolysegError

_OF_FILES = ("auto", "manifest")
_TAKE_NAMES = ("auto", "folders", "case-folders", "bids")


def find_cases(
    path: str | Path,
    *,
    layout: str = "auto",
    images: Names = None,
    masks: Names = None,
    unmasked: Unmasked = "refuse",
) -> Layout:
    """Find the images and masks of a data set by how its files and folders are named.

    Args:
        path: the folder, or a CSV manifest.
        layout: the name of a row of `LAYOUTS`; auto takes the first row that fits.
        images: names or paths of folders or files of images (data.images).
        masks: names or paths of folders or files of masks (data.masks).
        unmasked: treatment of images without a mask (data.unmasked).

    Returns:
        The cases in order of their ids, and the problems: images and masks that do not match, to be
        reported together with those of the files' content. An id is the image's stem; where two
        are the same in different parts or classes, each has its folder's name before it.

    Raises:
        PolysegError: it has none of the layouts, or its layout is ambiguous.
    """
    source = Source(Path(path), layout, as_names(images), as_names(masks), unmasked)
    _check_settings(source)
    found = _first(source)
    if found is None:
        raise PolysegError(*_unknown_layout(source))
    files = [file for case in found.cases for file in (*case.images, *(case.masks or ()))]
    notes, problems = left_out(source.folders, (file.parent for file in files))
    return replace(found, notes=(*found.notes, *notes), problems=(*found.problems, *problems))


def holds_masks(path: Path) -> bool:
    """Return whether a folder or file is a data set with masks, not one of images only."""
    source = Source(path, unmasked="skip")
    if exists(path, "file"):
        return path.suffix.lower() in MANIFEST_SUFFIXES
    _check_settings(source)
    return _first(source) is not None


def _first(source: Source) -> Layout | None:
    """Return the result of the chosen layout, or of the first one that applies."""
    rows = [LAYOUTS[source.layout]] if source.chosen else LAYOUTS.values()
    found = (row.resolve()(source) for row in rows if row.function)
    return next((layout for layout in found if layout is not None), None)


def _check_settings(source: Source) -> None:
    path, layout = source.path, source.layout
    is_file = exists(path, "file")
    if not is_file and not exists(path, "folder"):
        what = "is neither file nor folder" if path.exists() else "there is no such file or folder"
        raise PolysegError(f"{path}: {what}")
    if (said := source.settings()) and (is_file or layout not in _TAKE_NAMES):
        what = "a CSV manifest" if is_file else f"data.layout={layout}"
        raise PolysegError(f"{said[0].partition('=')[0]}: has no effect for {what}; leave it out")
    shared = {plain(name) for name in source.images} & {plain(name) for name in source.masks}
    if shared:
        raise PolysegError(
            f"data.masks: {source.masks[0]} is the folder of images too; name another"
        )
    if is_file and (path.suffix.lower() not in MANIFEST_SUFFIXES or layout not in _OF_FILES):
        expected = "a folder or a CSV manifest" if layout in _OF_FILES else "a folder"
        raise PolysegError(f"{path}: is a file; data.layout={layout} takes {expected}")
    if layout == "manifest" and not is_file:
        raise PolysegError(f"{path}: is a folder; data.layout=manifest takes a CSV file")


def _unknown_layout(source: Source) -> Sequence[str]:
    """Return the error lines about a folder without a known layout."""
    path, layout = source.path, source.layout
    lacks = "has no known layout" if not source.chosen else f"does not fit data.layout={layout}"
    folder = path.resolve()
    if plain(folder.name) in IMAGE_FOLDERS and not source.chosen:
        beside = (one.name for one in source.folders.list(folder.parent).folders)
        if masks := next((name for name in beside if plain(name) in MASK_FOLDERS), None):
            above = path.parent if path.name else folder.parent
            return [f"{path}: holds images; their masks are in {masks}/ beside it: give {above}"]
    lines = [
        f"{path}: {lacks} (it holds {seen_in(path)}); name the folders by data.images and "
        f"data.masks, or list the files: `polyseg data manifest {path} --out set.csv` writes a "
        "draft to edit"
    ]
    if said := source.settings():
        lines.append(f"{path}: nothing matches {' and '.join(said)}; give existing names")
    return [*lines, *source.problems]
