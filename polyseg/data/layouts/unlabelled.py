"""Find images without masks, such as those to predict."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from polyseg.data.formats.file_formats import readable_suffixes
from polyseg.data.layouts.cases import (
    DEEPEST,
    Case,
    Folders,
    exists,
    is_readable,
    left_out,
    plain,
    raise_problems,
    repeated,
    seen_in,
    some,
    stem_of,
)
from polyseg.data.layouts.folders import items_of
from polyseg.data.layouts.names import IMAGE_FOLDERS, is_for_masks
from polyseg.data.layouts.nnunet import TRAINING_IMAGES, by_channels
from polyseg.data.layouts.pairing import split_by_suffix
from polyseg.errors import PolysegError

log = logging.getLogger(__name__)


def find_unlabelled(paths: Sequence[Path]) -> list[Case]:
    """Find images without masks.

    For a folder they are the files of its images/ or imagesTs/, else its own files; masks beside
    images are left out. A folder of DICOM files alone is one series, unless it is called images/.
    In imagesTs/ and imagesTr/ the files CASE_0000, CASE_0001, ... are channels of one image.

    Returns:
        Cases in order of their ids; names of folders precede ids that would not be unique.

    Raises:
        PolysegError: one cannot be read or holds no image; the message names all, one per line.
    """
    folders = Folders()
    cases: list[Case] = []
    problems = [] if paths else ["no image was named; give images or folders of images"]
    for path in paths:
        try:
            cases.extend(_unlabelled(folders, path))
        except PolysegError as error:
            problems.append(str(error))
    raise_problems(problems)
    images = [file for case in cases for file in case.images]
    notes, problems = left_out(folders, (file.parent for file in images if file not in paths))
    raise_problems(problems)
    for note in notes:
        log.warning("%s", note)
    return _with_unique_ids(cases)


def _unlabelled(folders: Folders, path: Path) -> list[Case]:
    if exists(path, "file"):
        if not is_readable(path) or not path.name.isprintable():
            suffixes = " ".join(readable_suffixes())
            raise PolysegError(f"{path}: is not a supported file ({suffixes})")
        return [Case(stem_of(path), (path,), None)]
    if not exists(path, "folder"):
        what = "is neither file nor folder" if path.exists() else "there is no such file or folder"
        raise PolysegError(f"{path}: {what}")
    cases = _images_of(folders, path)
    if not cases:
        suffixes = " ".join(readable_suffixes())
        raise PolysegError(f"{path}: holds no image ({suffixes}), but {seen_in(path)}")
    return cases


def _images_of(folders: Folders, folder: Path, depth: int = 0) -> list[Case]:
    """Return the images of a folder's images/, else its own, else those of its sub-folders."""
    below = folders.list(folder).folders
    named = [each for each in below if plain(each.name) in IMAGE_FOLDERS]
    if len(named) > 1:
        names = ", ".join(f"{each.name}/" for each in named)
        raise PolysegError(f"{folder}: several folders may hold the images ({names}); name one")
    named += [each for each in below if each.name == "imagesTs"]
    named = named or [each for each in below if each.name == TRAINING_IMAGES]
    own = [] if named else _images_in(folders, folder)
    if own or depth >= DEEPEST:
        return own
    others = [each for each in below if not is_for_masks(each.name)]
    return [case for each in named or others for case in _images_of(folders, each, depth + 1)]


def _images_in(folders: Folders, folder: Path) -> list[Case]:
    files = folders.list(folder).files
    if folder.name in (TRAINING_IMAGES, "imagesTs") and (channels := by_channels(files)):
        return [
            Case(name, tuple(found[number] for number in sorted(found)), None)
            for name, found in channels.items()
        ]
    if place := folders.series(folder):
        names = (folder.name, *place.relative_to(folder).parts)
        if not any(plain(name) in IMAGE_FOLDERS for name in names):
            # Path(".") has no name before it is resolved.
            return [Case(folder.name or folder.resolve().name, (place,), None)]
    images, _ = split_by_suffix(items_of(folders, folder), by_kind=False)
    return [Case(stem, (file,), None) for stem, found in images.items() for file in found]


def _with_unique_ids(cases: Sequence[Case]) -> list[Case]:
    """Return cases with ids made unique by the names of their folders."""
    once = {case.images: case for case in cases}
    for count in range(DEEPEST * 2):
        found = []
        for case in once.values():
            above = case.images[0].absolute().parent.parts[1:]
            names = above[len(above) - min(count, len(above)) :]
            found.append(replace(case, id="/".join([*names, case.id])))
        if not (twice := repeated(case.id for case in found)):
            return sorted(found, key=lambda case: case.id)
    raise PolysegError(f"{some('name', twice)} shared by images that differ in suffix; rename one")
