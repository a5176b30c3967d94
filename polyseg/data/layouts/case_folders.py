"""Read sets in which each image or case has a folder of its own."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyseg.data.layouts.cases import (
    DEEPEST,
    Case,
    Findings,
    Folders,
    Layout,
    part_of,
    plain,
    stem_of,
)
from polyseg.data.layouts.folders import items_of
from polyseg.data.layouts.names import IMAGE_FOLDERS, MASK_FOLDERS, is_mask_name
from polyseg.data.layouts.source import Source, ambiguity

_FEWEST = 2
_MOST_NAMES = 12


@dataclass(frozen=True)
class _Root:
    """A folder that holds case folders, and the files of these."""

    folder: Path
    cases: dict[Path, dict[str, list[Path]]]
    """Files of each case by their name without the case's, or by "images/" and "masks/"."""


def read_case_folders(source: Source) -> Layout | None:
    """Read sets with a folder for each image or case, such as the 2018 Data Science Bowl or KiTS.

    A folder holds images/ with one image and masks/ with one or many masks, which are united; or
    files of the same names in each folder, such as imaging.nii.gz and segmentation.nii.gz.
    """
    roots = list(_roots(source.folders, source.path, list(source.masks)))
    names = _names_of(roots, source) if roots else None
    if names is None:
        return None
    images, masks = names
    findings = Findings(source.unmasked)
    for root in roots:
        part = _part_of_words(root.folder.name) if root.folder != source.path else None
        cases = []
        for folder, files in root.cases.items():
            image = tuple(file for name in images for file in files.get(name, []))
            mask = tuple(file for name in masks for file in files.get(name, []))
            if len(image) < len(images):
                findings.problems.append(f"{folder}: holds no {' and '.join(images)}")
            else:
                cases.append(Case(folder.name, image, mask or None, part))
        masked = len(cases) < len(root.cases) or any(case.masks for case in cases)
        if part == "test" and not masked:
            findings.notes.append(f"{root.folder} has no masks and was left out")
        else:
            findings.add(str(root.folder), cases, root.folder.name)
    shown = f"a folder for each case: {' + '.join(images)} and {' + '.join(masks)}"
    return findings.finish(str(source.path), shown)


def _roots(folders: Folders, folder: Path, masks: Sequence[str], depth: int = 0) -> Iterable[_Root]:
    """Yield this folder, or those below it, if its sub-folders hold one case each.

    `masks` are the names that data.masks gives.
    """
    children = [each for each in folders.list(folder).folders if not part_of(each.name)]
    if len(children) >= _FEWEST and not folders.list(folder).files:
        cases = {each: files for each in children if (files := _files_of(folders, each))}
        if len(cases) >= _FEWEST and _is_of_cases(cases, masks):
            yield _Root(folder, cases)
            return
    if depth < DEEPEST and len(folders.list(folder).folders) <= _MOST_NAMES:
        for each in folders.list(folder).folders:
            yield from _roots(folders, each, masks, depth + 1)


def _files_of(folders: Folders, case: Path) -> dict[str, list[Path]]:
    """Return the files of one case by the name that they have in every case."""
    listing = folders.list(case)
    found: dict[str, list[Path]] = {}
    for each in listing.folders:
        side = {**dict.fromkeys(IMAGE_FOLDERS, "images/"), **dict.fromkeys(MASK_FOLDERS, "masks/")}
        if name := side.get(plain(each.name)):
            files = [file for one in items_of(folders, each).values() for file in one]
            found.setdefault(name, []).extend(files)
    if found.get("images/"):
        return found
    for file in listing.files:
        stem = stem_of(file)
        own = re.sub(rf"^{re.escape(case.name)}[ _.-]*", "", stem) or stem
        found.setdefault(own, []).append(file)
    return {name: files for name, files in found.items() if files}


def _is_of_cases(cases: Mapping[Path, Mapping[str, Sequence[Path]]], masks: Sequence[str]) -> bool:
    """Return whether each folder holds one case, not a class, a part or a patient."""
    if all("images/" in files for files in cases.values()):
        return all(len(files["images/"]) == 1 for files in cases.values())
    counts = Counter(name for files in cases.values() for name in files)
    own = all(re.match(r"[A-Za-z]", name) for name in counts)
    shared = max(counts.values()) > len(cases) / 2 and len(counts) <= _MOST_NAMES
    single = all(len(files) == 1 for one in cases.values() for files in one.values())
    return own and shared and single and any(is_mask_name(name) or name in masks for name in counts)


def _names_of(roots: Sequence[_Root], source: Source) -> tuple[list[str], list[str]] | None:
    """Return the names of the image files and of the mask files of a case."""
    names = Counter(name for root in roots for files in root.cases.values() for name in files)
    chosen = {side: list(getattr(source, side)) for side in ("images", "masks")}
    if not names.keys() >= {name for one in chosen.values() for name in one}:
        return None
    if "images/" in names:
        return (["images/"], ["masks/"]) if "masks/" in names else None
    masks = chosen["masks"] or [name for name in names if is_mask_name(name)]
    others = [name for name in names if name not in masks and not is_mask_name(name)]
    images = chosen["images"] or others
    for side, found in (("images", images), ("masks", masks)):
        if len(found) > 1 and not chosen[side]:
            raise ambiguity(roots[0].folder, side, sorted(found), "files of each case")
    return (images, masks) if images and masks else None


def _part_of_words(name: str) -> str | None:
    """Return the part that one word of a name means, such as train for stage1_train."""
    parts = {part for word in re.split(r"[ _-]+", name) if (part := part_of(word))}
    return parts.pop() if len(parts) == 1 else None
