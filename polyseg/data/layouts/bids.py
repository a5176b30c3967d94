"""Read BIDS data sets with masks among their derivatives."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from polyseg.data.layouts.cases import DEEPEST, Case, Findings, Layout, exists, stem_of
from polyseg.data.layouts.names import is_mask_name
from polyseg.data.layouts.source import Source, ambiguity

_ENTITIES = re.compile(r"(?:sub|ses|task|acq|run|sample|chunk|slice)-[A-Za-z0-9]+")
"""Parts of a name that a mask shares with its image, unlike space-, desc- and label-."""


def read_bids(source: Source) -> Layout | None:
    """Read images of sub-*/ and masks of derivatives/, paired by subject, session and run.

    Images and masks are distinguished by the end of their names after the last _: T1w, mask. Where
    there are several, data.images and data.masks choose one.
    """
    folders, root = source.folders, source.path
    if not exists(root / "derivatives", "folder"):
        return None
    subjects = [each for each in folders.list(root).folders if each.name.startswith("sub-")]
    below = [file for each in subjects for file in folders.files_below(each, DEEPEST + 1)]
    images = _by_kind(below)
    derived = _by_kind(folders.files_below(root / "derivatives", DEEPEST + 1))
    masks = {kind: files for kind, files in derived.items() if is_mask_name(kind) or kind == "dseg"}
    kind, mask_kind = _kind(source, "images", images), _kind(source, "masks", masks or derived)
    if kind is None or mask_kind is None:
        return None
    findings = Findings(source.unmasked)
    by_entities: dict[str, list[Path]] = {}
    for file in derived[mask_kind]:
        by_entities.setdefault(_entities(file), []).append(file)
    cases = []
    for file in images[kind]:
        entities = _entities(file)
        found = tuple(by_entities.pop(entities, ())) or None
        cases.append(Case(entities, (file,), found, group=entities.partition("_")[0]))
    lost = [file.name for files in by_entities.values() for file in files]
    findings.problem(str(root / "derivatives"), "mask", lost, f"without an image _{kind}")
    findings.add(str(root), cases)
    return findings.finish(str(root), f"BIDS, {kind} and {mask_kind}")


def _by_kind(files: Iterable[Path]) -> dict[str, list[Path]]:
    kinds: dict[str, list[Path]] = {}
    for file in files:
        if "sub-" in file.name:
            kinds.setdefault(stem_of(file).rpartition("_")[2], []).append(file)
    return kinds


def _kind(source: Source, side: str, kinds: Mapping[str, list[Path]]) -> str | None:
    chosen = getattr(source, side)
    if chosen:
        return chosen[0] if chosen[0] in kinds and len(chosen) == 1 else None
    if len(kinds) > 1:
        raise ambiguity(source.path, side, sorted(kinds), "kinds of files")
    return next(iter(kinds), None)


def _entities(file: Path) -> str:
    """Return subject, session, run, ... of a file."""
    return "_".join(_ENTITIES.findall(stem_of(file)))
