"""Write a draft of a CSV manifest for a data set, to be edited by hand."""

from pathlib import Path

from polyseg.data.layouts.cases import Folders, plain, stem_of
from polyseg.data.layouts.find_cases import find_cases
from polyseg.data.layouts.manifest import COLUMNS
from polyseg.data.layouts.names import is_for_masks, is_mask_name
from polyseg.data.layouts.pairing import match
from polyseg.errors import PolysegError
from polyseg.system.files import csv_table


def draft_of(path: Path, folder: Path) -> tuple[str, int, int]:
    """Return a manifest as text, and the numbers of its images and of those without a mask.

    In a known layout it lists the images and masks that are found. Otherwise it lists every
    readable file, and assigns masks, recognised by their name or folder, to the image that fits
    best. Paths inside `folder`, where the manifest will be, are relative to it.
    """
    try:
        cases = find_cases(path, unmasked="skip").cases
        rows = [(case.images, case.masks or (), case.part, case.group, case.id) for case in cases]
    except PolysegError:
        rows = [((image,), masks, None, None, "") for image, masks in _guessed(path)]
    if not rows:
        raise PolysegError(f"{path}: holds no file that can be read")
    table: list[list[str]] = []
    for images, masks, part, group, identity in rows:
        files = (";".join(_relative(file, folder) for file in one) for one in (images, masks))
        table.append([*files, part or "", group or "", identity])
    return csv_table(COLUMNS, table), len(rows), sum(not masks for _, masks, *_ in rows)


def _guessed(path: Path) -> list[tuple[Path, tuple[Path, ...]]]:
    files = list(Folders().files_below(path))
    masks: dict[str, list[Path]] = {}
    images: dict[str, list[Path]] = {}
    for file in files:
        above = file.relative_to(path).parts[:-1]
        words = plain(above[-1]) if above else ""
        side = is_mask_name(stem_of(file)) or any(map(is_for_masks, above)) or "mask" in words
        (masks if side else images).setdefault(stem_of(file), []).append(file)
    found = match(images, masks).masks if images else {}
    pairs = [(file, tuple(found.get(stem, ()))) for stem, one in images.items() for file in one]
    return sorted(pairs or [(file, ()) for file in files])


def _relative(file: Path, folder: Path) -> str:
    inside = file.resolve().is_relative_to(folder.resolve())
    return str(file.resolve().relative_to(folder.resolve()) if inside else file.resolve())
