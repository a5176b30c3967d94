"""Recognise public data sets by the paths of their files; a new one needs a row here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polyseg.data.layouts.cases import DEEPEST, Case, Findings, Layout, part_of, some, stem_of
from polyseg.data.layouts.source import Source
from polyseg.registry import Registry, Row


@dataclass(frozen=True)
class PublicSet(Row):
    """A public data set, with patterns of the ends of its paths, without suffixes.

    A field such as {id} stands for any text without "/", the same text each time that it occurs.
    An image and its masks agree in the fields that both patterns have. The field {group} is the
    patient. A folder above that is called training, test, ... gives the part.
    """

    images: str = ""
    masks: str = ""


PUBLIC_SETS = Registry(
    "public data set",
    PublicSet(
        "PH2",
        "dermoscopic images of 200 lesions",
        images="{id}/{id}_Dermoscopic_Image/{id}",
        masks="{id}/{id}_lesion/{id}_lesion",
    ),
    PublicSet(
        "HAM10000",
        "dermoscopic images in two folders, masks in a third",
        images="HAM10000_images_part_{half}/{id}",
        masks="HAM10000_segmentations_lesion_tesselated/{id}_segmentation",
    ),
    PublicSet(
        "Montgomery",
        "chest X-rays, the masks of the left and the right lung united",
        images="CXR_png/{id}",
        masks="ManualMask/{side}Mask/{id}",
    ),
    PublicSet(
        "ACDC",
        "cine MRI of hearts, two frames of each patient with masks",
        images="{group}/{group}_frame{frame}",
        masks="{group}/{group}_frame{frame}_gt",
    ),
)


def read_public_set(source: Source) -> Layout | None:
    """Read a data set whose paths fit a row of `PUBLIC_SETS`."""
    if source.settings():
        return None
    files = list(source.folders.files_below(source.path, DEEPEST + 1))
    found = (_read(row, files, source) for row in PUBLIC_SETS.values())
    return next(filter(None, found), None)


def _read(row: PublicSet, files: Sequence[Path], source: Source) -> Layout | None:
    """Return the cases of a data set, or None if images or masks are missing."""
    image, mask = _compiled(row.images), _compiled(row.masks)
    shared = sorted(image.groupindex.keys() & mask.groupindex.keys())
    masks: dict[tuple[str, ...], list[Path]] = {}
    images: list[tuple[tuple[str, ...], Path, dict[str, str]]] = []
    others: list[str] = []
    for file in files:
        name = (file.parent.relative_to(source.path) / stem_of(file)).as_posix()
        found = mask.search(name) or image.search(name)
        if found is None:
            others.append(file.name)
            continue
        fields = found.groupdict()
        key = tuple(fields[field] for field in shared)
        if found.re is mask:
            masks.setdefault(key, []).append(file)
        else:
            images.append((key, file, fields))
    if not images or not masks:
        return None
    where = str(source.path)
    findings, bare = Findings(source.unmasked), []
    for key, file, fields in images:
        own = tuple(masks.pop(key, ()))
        above = file.relative_to(source.path).parts[:-1]
        part = next(filter(None, map(part_of, above)), None)
        case = Case(stem_of(file), (file,), own or None, part, fields.get("group"))
        if own:
            findings.add(where, [case], file.parent.name)
        else:
            bare.append(case)
    lost = [file.name for own in masks.values() for file in own]
    findings.problem(where, "mask", lost, "without an image")
    findings.add(where, bare)
    if others:
        findings.notes.append(f"{where}: {some('file', others)} with other names left out")
    return findings.finish(where, row.name)


def _compiled(pattern: str) -> re.Pattern[str]:
    """Return a pattern of paths as a regular expression of their ends.

    >>> _compiled("{id}/{id}_mask").search("set/a1/a1_mask").groupdict()
    {'id': 'a1'}
    """
    known: set[str] = set()
    regex = ""
    for text, field in re.findall(r"([^{]+)|\{(\w+)\}", pattern):
        if text:
            regex += re.escape(text)
        else:
            regex += f"(?P={field})" if field in known else f"(?P<{field}>[^/]+)"
            known.add(field)
    return re.compile(f"(?:^|/){regex}$")
