"""Read sets with folders of images and of masks, or with masks beside the images."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

from polyseg.data.formats.file_formats import readable_suffixes
from polyseg.data.layouts.cases import (
    DEEPEST,
    Case,
    Findings,
    Folders,
    Layout,
    counted,
    exists,
    part_of,
    plain,
    some,
    stem_of,
)
from polyseg.data.layouts.names import (
    DRAWING,
    IMAGE_FOLDERS,
    MASK_FOLDERS,
    OTHER_OBSERVER,
    SECOND_OBSERVER,
    meaning_of,
    without_mask_endings,
)
from polyseg.data.layouts.pairing import match, split_by_suffix
from polyseg.data.layouts.source import Source, ambiguity, several_sets
from polyseg.errors import PolysegError

_FIELD_OF_VIEW = re.compile(r"\d+_(training|test)_mask")
_CLASSES = ("benign", "malignant", "normal")
_WITHOUT_LESION = "normal"

_Files = dict[str, list[Path]]
"""Files by stem."""


def read_folders(source: Source) -> Layout | None:
    """Read folders of images and masks, parts and classes of them, or masks beside images."""
    names = (*source.images, *source.masks)
    lists = len(source.images) > 1 or len(source.masks) > 1
    if lists or any("/" in name or "*" in name for name in names):
        return _read_listed(source)
    search = _Search(source)
    units = search.units(source.path)
    if not units:
        source.problems += [*search.hints(source.path), *search.problems]
        return None
    findings = Findings(source.unmasked, search.problems, search.notes)
    for unit in units:
        _add_unit(source.folders, unit, findings)
    return findings.finish(str(source.path), _name(units))


def read_suffixes(source: Source) -> Layout | None:
    """Read masks beside their images if the user asks for it; `read_folders` finds them too."""
    return read_folders(source) if source.chosen else None


def _read_listed(source: Source) -> Layout:
    """Read the folders or patterns that the settings give, several masks of an image united."""
    search = _Search(source)
    masks = _listed(source, "masks") or _files_of_side(search, "masks")
    used = [file for items in masks.values() for files in items.values() for file in files]
    images = _listed(source, "images") or _files_of_side(search, "images", used)
    pictures: dict[str, list[Path]] = {}
    for items in images.values():
        for stem, files in items.items():
            pictures.setdefault(stem, []).extend(files)
    findings = Findings(source.unmasked, search.problems, search.notes)
    _report_repeated(str(source.path), pictures, findings)
    pairs = [match(pictures, items) for items in masks.values()]
    for name, pair in zip(masks, pairs, strict=True):
        findings.problem(name, "mask", pair.lost, "without an image")
    cases = []
    for stem, files in pictures.items():
        found = tuple(file for pair in pairs for file in pair.masks.get(stem, []))
        cases.append(Case(stem, (files[0],), found or None))
    findings.add(", ".join(images), cases)
    names = (" + ".join(items) for items in (images, masks))
    return findings.finish(str(source.path), " and ".join(names))


def _listed(source: Source, side: str) -> dict[str, _Files]:
    """Return the files by stem of each folder or pattern, such as masks/*.png, of a setting."""
    found: dict[str, _Files] = {}
    for name in getattr(source, side):
        place = source.path / name
        if "*" in name:
            folders = {each.parent for each in source.path.glob(name)}
            files = [file for each in sorted(folders) for file in source.folders.list(each).files]
            items: dict[str, list[Path]] = {}
            for file in files:
                if fnmatch(file.name, place.name):
                    items.setdefault(stem_of(file), []).append(file)
        else:
            items = items_of(source.folders, place) if exists(place, "folder") else {}
        if not items:
            raise PolysegError(f"data.{side}: {place}: holds no file that can be read")
        found[f"{name.rstrip('/')}/" if "*" not in name else name] = items
    return found


def _files_of_side(search: "_Search", side: str, without: Sequence[Path] = ()) -> dict[str, _Files]:
    """Return the files of the folder named like this side, or of the data set's own folder."""
    root = search.source.path
    folders = search.candidates(root)[0 if side == "images" else 1]
    taken = {file.parent for file in without}
    folders = [each for each in folders if each not in taken]
    place = _single(root, side, folders) if folders else next(iter(taken), root)
    items = {
        stem: kept
        for stem, files in items_of(search.folders, place).items()
        if (kept := [file for file in files if file not in set(without)])
    }
    if not items:
        raise PolysegError(f"{root}: no folder of {side} was found; set data.{side}=PATH")
    return {f"{place.name}/": items}


def _report_repeated(where: str, items: Mapping[str, Sequence[Path]], findings: Findings) -> None:
    twice = [stem for stem, files in items.items() if len(files) > 1]
    findings.problem(where, "name", twice, "shared by two files that differ in suffix; keep one")


@dataclass(frozen=True)
class _Unit:
    """A folder of images, and the folder of their masks; None if masks lie beside the images."""

    images: Path
    masks: Path | None
    part: str | None = None
    prefix: str = ""


@dataclass
class _Search:
    """Find folders of images and masks, and images with masks beside them."""

    source: Source
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def folders(self) -> Folders:
        """The folders, each listed once."""
        return self.source.folders

    def units(
        self, folder: Path, part: str | None = None, prefix: str = "", depth: int = 0
    ) -> list[_Unit]:
        """Return pairs of folders in `folder` or, if there are none, below it."""
        if depth > DEEPEST:
            return []
        own = self._pairs(folder, part, prefix)
        own += self._parts(folder, part, prefix, depth, bool(own))
        return own or self._beside(folder, part, prefix) or self._below(folder, part, prefix, depth)

    def candidates(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the sub-folders that may hold images, and those that may hold masks."""
        images = self._named(folder, IMAGE_FOLDERS, self.source.images)
        masks = self._named(folder, MASK_FOLDERS, self.source.masks)
        if not self.source.masks:
            masks = [each for each in masks if each not in images]
            masks = self._without_fields_of_view(masks)
        return [each for each in images if each not in masks], masks

    def hints(self, folder: Path) -> list[str]:
        """Return a message if the names in a folder show images or masks, but not both."""
        images, masks = self.candidates(folder)
        if bool(images) == bool(masks) or self.source.layout == "suffixes":
            return []
        other = "masks" if images else "images"
        return [
            f"{(images or masks)[0]}: there is no folder of {other} beside it; if it has "
            f"another name, set data.{other}=NAME"
        ]

    @property
    def _chosen(self) -> bool:
        return bool(self.source.images or self.source.masks)

    def holds_files(self, folder: Path) -> bool:
        """Return whether a folder, or one up to four levels below it, holds a file to read."""
        return any(self.folders.files_below(folder))

    def _named(self, folder: Path, names: Sequence[str], chosen: Sequence[str]) -> list[Path]:
        wanted = [plain(name) for name in chosen] or names
        found = [each for each in self.folders.list(folder).folders if plain(each.name) in wanted]
        if chosen:
            found = [each for each in found if each.name in chosen] or found
        return [each for each in found if self.holds_files(each)] or found

    def _without_fields_of_view(self, masks: list[Path]) -> list[Path]:
        """Leave out DRIVE's mask/, which holds fields of view, not annotations."""
        manual = any(plain(each.name) == "1stmanual" for each in masks)
        kept = []
        for each in masks:
            stems = [stem_of(file) for file in self.folders.list(each).files]
            views = bool(stems) and all(map(_FIELD_OF_VIEW.fullmatch, stems))
            if plain(each.name) in ("mask", "masks") and (manual or views):
                self._note(f"{each}: holds fields of view, not annotations: left out")
            else:
                kept.append(each)
        return kept

    def _pairs(self, folder: Path, part: str | None, prefix: str) -> list[_Unit]:
        if self.source.layout == "suffixes":
            return []
        images, masks = self.candidates(folder)
        if not images or not masks:
            return [] if self._chosen else self._compounds(folder, part, prefix)
        for each in self.folders.list(folder).folders:
            if plain(each.name) == OTHER_OBSERVER and each not in masks:
                self._note(f"{each}: holds a second observer's annotations: left out")
        only_images, only_masks = _single(folder, "images", images), _single(folder, "masks", masks)
        return self._nested(only_images, only_masks, part, prefix)

    def _compounds(self, folder: Path, part: str | None, prefix: str) -> list[_Unit]:
        """Find folders whose names give the part as well, such as ISIC's or train_images/."""
        found: dict[str, dict[str, list[Path]]] = {}
        for each in self.folders.list(folder).folders:
            if (meaning := meaning_of(each.name)) and self.holds_files(each):
                sides = found.setdefault(meaning[1], {"images": [], "masks": []})
                sides[meaning[0]].append(each)
        units = []
        for name, sides in found.items():
            if sides["images"] and sides["masks"]:
                images = _single(folder, "images", sides["images"])
                masks = _single(folder, "masks", sides["masks"])
                units += self._nested(images, masks, part or name, _joined(prefix, name))
        for name, sides in found.items() if units else ():
            if not sides["masks"]:
                self._leave_out(sides["images"][0], part or name)
            elif not sides["images"]:
                self.problems.append(f"{sides['masks'][0]}: there is no folder of {name} images")
        return units

    def _nested(self, images: Path, masks: Path, part: str | None, prefix: str) -> list[_Unit]:
        """Return the two folders and their sub-folders of the same names, such as train/."""
        groups = _groups(self.folders, images)
        others = {_twin_key(each): each for each in _groups(self.folders, masks)}
        units = []
        several = [each for each in others.values() if self.holds_files(each)]
        own = items_of(self.folders, images), items_of(self.folders, masks)
        if several and own[0] and not own[1] and not groups:
            names = [str(each.relative_to(self.source.path)) for each in several]
            united = f"[{', '.join(names)}] to unite them, or =" if names[1:] else ""
            raise PolysegError(
                f"{masks}: holds no mask, but {some('folder', [each.name for each in several])}; "
                f"set data.masks={united}{names[0]}"
            )
        if any(own) or not groups:
            units.append(_Unit(images, masks, part, prefix))
        for group in groups:
            twin = others.pop(_twin_key(group), None)
            group_part = part or part_of(group.name)
            if twin is not None:
                units += self._nested(group, twin, group_part, _joined(prefix, group.name))
            elif self.holds_files(group):
                self._leave_out(group, group_part, f"expected {masks / group.name}")
        for twin in filter(self.holds_files, others.values()):
            self.problems.append(
                f"{twin}: there are no images for these masks; expected {images / twin.name}"
            )
        return units

    def _parts(
        self, folder: Path, part: str | None, prefix: str, depth: int, with_others: bool
    ) -> list[_Unit]:
        if part is not None:
            return []
        found = {}
        for each in self.folders.list(folder).folders:
            if name := part_of(each.name):
                found[each] = self.units(each, name, _joined(prefix, each.name), depth + 1)
        for each, units in found.items():
            if not units and (with_others or any(found.values())) and self.holds_files(each):
                self._leave_out(each, part_of(each.name))
        return [unit for units in found.values() for unit in units]

    def _beside(self, folder: Path, part: str | None, prefix: str) -> list[_Unit]:
        if self.source.layout == "folders" or self._chosen:
            return []
        items = items_of(self.folders, folder, series=False)
        _, masks = split_by_suffix(items)
        if not masks:
            _refuse_unclear_masks(folder, items)
        return [_Unit(folder, None, part, prefix)] if masks else []

    def _below(self, folder: Path, part: str | None, prefix: str, depth: int) -> list[_Unit]:
        """Look through a folder that only wraps another, or that holds a folder for each class."""
        children = [each for each in self.folders.list(folder).folders if not part_of(each.name)]
        found = {each: self.units(each, part, "", depth + 1) for each in children}
        sets = {each: units for each, units in found.items() if units}
        classes = bool(sets) and all(
            unit.masks is None and unit.images == each
            for each, units in sets.items()
            for unit in units
        )
        if len(sets) > 1 and not classes and any(plain(each.name) not in _CLASSES for each in sets):
            raise several_sets(folder, list(sets))
        if classes:
            for each in children:
                if each not in sets and self.folders.list(each).files:
                    sets[each] = [_Unit(each, None, part)]
        return [
            replace(unit, prefix=_joined(prefix, each.name if len(sets) > 1 else "", unit.prefix))
            for each, units in sets.items()
            for unit in units
        ]

    def _leave_out(self, images: Path, part: str | None, expected: str = "") -> None:
        """Leave out a part without masks; for the training part this is a problem."""
        if part in ("val", "test"):
            self._note(f"{images} has no masks and was left out")
        else:
            what = f"; {expected}" if expected else ""
            self.problems.append(f"{images}: there are no masks for these images{what}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _single(folder: Path, side: str, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        raise ambiguity(folder, side, [each.name for each in found])
    return found[0]


def _joined(*names: str) -> str:
    return "/".join(filter(None, names))


def _twin_key(folder: Path) -> str:
    return part_of(folder.name) or plain(folder.name)


def _groups(folders: Folders, folder: Path) -> list[Path]:
    """Return the sub-folders that are parts or classes, not DICOM series."""
    below = folders.list(folder).folders
    return [each for each in below if part_of(each.name) or folders.series(each) is None]


def items_of(folders: Folders, folder: Path, *, series: bool = True) -> dict[str, list[Path]]:
    """Return the files and DICOM series of a folder by stem."""
    listing = folders.list(folder)
    found: dict[str, list[Path]] = {}
    for file in listing.files:
        if not DRAWING.search(stem := stem_of(file)):
            found.setdefault(stem, []).append(file)
    for each in listing.folders if series else ():
        if not part_of(each.name) and (place := folders.series(each)):
            found.setdefault(stem_of(each), []).append(place)
    return found


def _refuse_unclear_masks(folder: Path, items: Mapping[str, Sequence[Path]]) -> None:
    """Raise if two files have each name and their suffixes do not show which is the mask."""
    kinds = {tuple(file.suffix for file in files) for files in items.values()}
    if len(items) > 1 and len(kinds) == 1 and len(pair := kinds.pop()) == 2:
        raise PolysegError(
            f"{folder}: two files have each name ({' and '.join(pair)}); name the masks by "
            f"data.masks, such as data.masks='*{pair[1]}'"
        )


def _add_unit(folders: Folders, unit: _Unit, findings: Findings) -> None:
    images = items_of(folders, unit.images, series=unit.masks is not None)
    if unit.masks is None:
        masks = _without_second_observer(unit.images, images, findings)
        pictures, masks = _with_lost_masks(*split_by_suffix(masks))
    else:
        pictures, masks = images, items_of(folders, unit.masks)
        masks = _without_second_observer(unit.masks, masks, findings)
    where, mask_folder = str(unit.images), unit.masks or unit.images
    pairs = match(pictures, masks)
    if not pictures:
        findings.problems.append(f"{where}: holds no image ({' '.join(readable_suffixes())})")
    if pictures and masks and not pairs.masks:
        findings.problems.append(
            f"{where}: no name matches one in {mask_folder} (such as {next(iter(pictures))} and "
            f"{next(iter(masks))}); expected equal names, or _mask, _segmentation, ... after them"
        )
        return
    _report_repeated(where, pictures, findings)
    _report_repeated(str(mask_folder), masks, findings)
    findings.problem(str(mask_folder), "mask", pairs.lost, f"without an image in {where}")
    if pairs.rule.name != "equal":
        image, files = next(iter(pairs.masks.items()))
        findings.notes.append(
            f"{mask_folder}: masks and images are paired by this rule: {pairs.rule.help} "
            f"({files[0].name} is the mask of {image})"
        )
    cases = [
        Case(stem, (files[0],), tuple(sorted(pairs.masks.get(stem, ()))) or None, unit.part)
        for stem, files in pictures.items()
    ]
    bare = sum(case.masks is None for case in cases)
    if bare and plain(unit.images.name) == _WITHOUT_LESION:
        cases = [replace(case, masks=case.masks or ()) for case in cases]
        count = counted(bare, "image")
        findings.notes.append(f"{where}: {count} without a mask: normal, so taken as empty")
    findings.add(where, cases, unit.prefix)


def _without_second_observer(folder: Path, items: _Files, findings: Findings) -> _Files:
    others = [stem for stem in items if SECOND_OBSERVER.search(stem)]
    if others:
        count = counted(len(others), "mask")
        findings.notes.append(f"{folder}: {count} of a second observer left out")
    return {stem: files for stem, files in items.items() if stem not in others}


def _with_lost_masks(images: _Files, masks: _Files) -> tuple[_Files, _Files]:
    """Move images that are named like masks, and have no mask themselves, to the masks."""
    found = match(images, masks).masks
    lost = {stem for stem in images if without_mask_endings(stem)[1:] and stem not in found}
    kept = {stem: files for stem, files in images.items() if stem not in lost}
    return kept, masks | {stem: images[stem] for stem in lost}


def _name(units: Sequence[_Unit]) -> str:
    first = next((unit for unit in units if unit.part == "train"), units[0])
    name = "images with masks beside them"
    if first.masks is not None:
        images, masks = first.images, first.masks
        # For images/train/ and masks/train/ use the names of the upper folders.
        while _twin_key(images) == _twin_key(masks) and images != masks:
            images, masks = images.parent, masks.parent
        name = f"{images.name}/ and {masks.name}/"
    parts = [part for part in ("train", "val", "test") if any(unit.part == part for unit in units)]
    return f"{name}, with parts {', '.join(parts)}" if parts else name
