"""Find the images and masks of a data set by the layouts that `polyseg.choices.LAYOUTS` lists."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyseg.choices import LAYOUTS
from polyseg.data.layouts.cases import Layout, Unmasked, exists, left_out, plain, seen_in
from polyseg.data.layouts.manifest import MANIFEST_SUFFIXES
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
        unmasked: what becomes of images without a mask (data.unmasked).

    Returns:
        The cases in order of their ids, and the problems: images and masks that do not match, so
        that they can be told together with those of the files' content. An id is the image's stem;
        where two are the same in different parts or classes, each has its folder's name before it.

    Raises:
        PolysegError: it is none of the layouts, or could be several.

    >>> find_cases(Path("nowhere"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: nowhere: there is no such file or folder
    """
    source = Source(Path(path), layout, as_names(images), as_names(masks), unmasked)
    _check_settings(source)
    found = _first(source)
    if found is None:
        raise PolysegError(*_unknown(source))
    return _with_left_out(source, found)


def holds_masks(path: Path) -> bool:
    """Return whether a folder or file is a data set of images with masks, or only of images.

    >>> holds_masks(Path("nowhere"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: nowhere: there is no such file or folder
    """
    source = Source(path, unmasked="skip")
    if exists(path, "file"):
        return path.suffix.lower() in MANIFEST_SUFFIXES
    _check_settings(source)
    return _first(source) is not None


def _first(source: Source) -> Layout | None:
    """Return what the layout that was chosen finds, or the first of all that finds something."""
    rows = [LAYOUTS[source.layout]] if source.chosen else LAYOUTS.values()
    for row in rows:
        if row.function and (found := row.resolve()(source)) is not None:
            layout: Layout = found
            return layout
    return None


def _with_left_out(source: Source, layout: Layout) -> Layout:
    files = [file for case in layout.cases for file in (*case.images, *(case.masks or ()))]
    notes, problems = left_out(source.folders, (file.parent for file in files))
    return replace(layout, notes=(*layout.notes, *notes), problems=(*layout.problems, *problems))


def _check_settings(source: Source) -> None:
    path, layout = source.path, source.layout
    is_file = exists(path, "file")
    if not is_file and not exists(path, "folder"):
        what = "is neither file nor folder" if path.exists() else "there is no such file or folder"
        raise PolysegError(f"{path}: {what}")
    if (said := source.settings()) and (is_file or layout not in _TAKE_NAMES):
        what = "a CSV manifest" if is_file else f"data.layout={layout}"
        raise PolysegError(f"{said[0].partition('=')[0]}: has no meaning for {what}; leave it out")
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


def _unknown(source: Source) -> Sequence[str]:
    """Return what a folder of no known layout lacks and what to do, a line for each thing."""
    path, layout = source.path, source.layout
    lacks = "is of no known layout" if not source.chosen else f"does not fit data.layout={layout}"
    lines = [
        f"{path}: {lacks} (it holds {seen_in(path)}); name the folders by data.images and "
        f"data.masks, or list the files: `polyseg data manifest {path} --out set.csv` writes a "
        "draft to edit"
    ]
    if said := source.settings():
        lines.append(f"{path}: nothing was found by {' and '.join(said)}; name what exists")
    return [*lines, *source.problems]
