"""Finding the images and masks of a data set by how its files and folders are named."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polyseg.data.formats.file_formats import readable_suffixes
from polyseg.data.layouts.cases import (
    Case,
    Findings,
    Folders,
    Layout,
    Unmasked,
    counted,
    exists,
    is_readable,
    part_of,
    plain,
    raise_problems,
    repeated,
    seen_in,
    some,
    stem_of,
)
from polyseg.data.layouts.manifest import MANIFEST_SUFFIXES, read_manifest
from polyseg.data.layouts.nnunet import (
    TRAINING_IMAGES,
    by_channels,
    kind_of,
    read_decathlon,
    read_nnunet,
)
from polyseg.errors import PolysegError

__all__ = [
    "Case",
    "Layout",
    "LayoutName",
    "Unmasked",
    "find_cases",
    "find_unlabelled",
    "holds_masks",
]

LayoutName = Literal["auto", "folders", "suffixes", "nnunet", "decathlon", "manifest"]
"""What a data set may be told to be; auto goes by what it holds."""

_IMAGE_NAMES = ("images", "image", "img", "imgs", "original", "jpegimages", "input", "inputs")
_MASK_NAMES = (
    *("masks", "mask", "labels", "label", "gt", "groundtruth", "annotations", "annotation"),
    *("segmentations", "segmentation", "segmentationclass", "1stmanual"),
)
# A second observer's annotations are read only where data.masks asks for them.
_OTHER_OBSERVER = "2ndmanual"
_FIELD_OF_VIEW = re.compile(r"\d+_(training|test)_mask")
_MASK_ENDING = re.compile(
    r"[ _.-]+(masks?|segmentations?|seg|manual|gt|ground[ _-]?truth|labels?|annotations?)"
    r"[ _-]?\d*$",
    re.IGNORECASE,
)
_IMAGE_ENDING = re.compile(
    r"[ _.-]+(images?|img|input|original|train|training|val|validation|test)$", re.IGNORECASE
)
# ISIC's training images have drawings of superpixels beside them.
_DRAWING = re.compile(r"_superpixels$", re.IGNORECASE)
_CLASSES = ("benign", "malignant", "normal")
_WITHOUT_LESION = "normal"
_DEEPEST = 4
_EXPECTED = (
    "expected images/ and masks/, masks beside images (a.png, a_mask.png), train/, val/, test/ of "
    "these, or imagesTr/, labelsTr/ and dataset.json; a CSV manifest (image,mask) fits all else"
)


def find_cases(
    path: str | Path,
    *,
    layout: LayoutName = "auto",
    images: str | None = None,
    masks: str | None = None,
    unmasked: Unmasked = "refuse",
) -> Layout:
    """Find the images and masks of a data set by how its files and folders are named.

    Args:
        path: the folder, or a CSV manifest.
        layout: what it is; auto goes by what it holds (setting data.layout).
        images: the name of the sub-folders that hold images (data.images).
        masks: the name of the sub-folders that hold masks (data.masks).
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
    path = Path(path)
    _check_settings(path, layout, images, masks)
    if exists(path, "file"):
        return read_manifest(path, unmasked)
    folders = Folders()
    if layout in ("auto", "nnunet", "decathlon") and not images and not masks:
        root = _described_root(folders, path)
        if root is not None or layout != "auto":
            root = root or path
            kind = kind_of(folders, root) if layout == "auto" else layout
            return (read_nnunet if kind == "nnunet" else read_decathlon)(folders, root, unmasked)
    search = _Search(folders, layout, images, masks)
    units = search.units(path)
    if not units:
        raise PolysegError(*_unknown(search, path, layout))
    findings = Findings(unmasked, search.problems, search.notes)
    for unit in units:
        _add_unit(folders, unit, findings)
    return findings.finish(str(path), _name(units))


def holds_masks(path: Path) -> bool:
    """Return whether a folder or file is a data set of images with masks, or only of images.

    >>> holds_masks(Path("nowhere"))
    Traceback (most recent call last):
    polyseg.errors.PolysegError: nowhere: there is no such file or folder
    """
    if exists(path, "file"):
        return path.suffix.lower() in MANIFEST_SUFFIXES
    _check_settings(path, "auto", None, None)
    folders = Folders()
    if _described_root(folders, path) is not None:
        return True
    return bool(_Search(folders, "auto", None, None).units(path))


def find_unlabelled(paths: Sequence[Path]) -> list[Case]:
    """Find images without asking for masks.

    Of a folder they are what its images/ holds (imagesTs/ too), else what it holds itself; masks
    beside images are left out. A folder of DICOM files alone is one series, unless it is called
    images/. In imagesTs/ and imagesTr/ the files CASE_0000, CASE_0001, ... are channels of one
    image.

    Args:
        paths: images and folders.

    Returns:
        Cases in order of their ids, which have names of folders before them where they need it.

    Raises:
        PolysegError: one cannot be read or holds no image; all of them are named, a line each.

    >>> find_unlabelled([Path("nowhere.png")])
    Traceback (most recent call last):
    polyseg.errors.PolysegError: nowhere.png: there is no such file or folder
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
    return _told_apart(cases)


@dataclass(frozen=True)
class _Unit:
    """Images in one folder, and their masks in another, or beside them (None)."""

    images: Path
    masks: Path | None
    part: str | None = None
    prefix: str = ""


@dataclass
class _Search:
    """Looks for folders of images and masks, and for images with masks beside them."""

    folders: Folders
    layout: LayoutName
    images: str | None
    masks: str | None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def units(
        self, folder: Path, part: str | None = None, prefix: str = "", depth: int = 0
    ) -> list[_Unit]:
        """Return what belongs together in `folder` or, if nothing does, below it."""
        if depth > _DEEPEST:
            return []
        own = self._pairs(folder, part, prefix)
        own += self._parts(folder, part, prefix, depth, bool(own))
        return own or self._beside(folder, part, prefix) or self._below(folder, part, prefix, depth)

    def candidates(self, folder: Path) -> tuple[list[Path], list[Path]]:
        """Return the sub-folders that may hold images, and those that may hold masks."""
        images = self._named(folder, _IMAGE_NAMES, self.images)
        masks = self._named(folder, _MASK_NAMES, self.masks)
        if self.masks is None:
            masks = [each for each in masks if each not in images]
            masks = self._without_fields_of_view(masks)
        return [each for each in images if each not in masks], masks

    def holds_files(self, folder: Path, depth: int = 0) -> bool:
        """Say whether there is anything to read in a folder or not far below it."""
        listing = self.folders.list(folder)
        below = listing.folders if depth < _DEEPEST else ()
        return bool(listing.files) or any(self.holds_files(each, depth + 1) for each in below)

    def _named(self, folder: Path, names: Sequence[str], chosen: str | None) -> list[Path]:
        wanted = names if chosen is None else (plain(chosen),)
        found = [each for each in self.folders.list(folder).folders if plain(each.name) in wanted]
        if chosen is not None:
            found = [each for each in found if each.name == chosen] or found
        return [each for each in found if self.holds_files(each)] or found

    def _without_fields_of_view(self, masks: list[Path]) -> list[Path]:
        """Leave out DRIVE's mask/, which shows where the retina is and no annotation."""
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
        if self.layout == "suffixes":
            return []
        images, masks = self.candidates(folder)
        if not images or not masks:
            return [] if self.images or self.masks else self._compounds(folder, part, prefix)
        for each in self.folders.list(folder).folders:
            if plain(each.name) == _OTHER_OBSERVER and each not in masks:
                self._note(f"{each}: holds a second observer's annotations: left out")
        only_images, only_masks = _only(folder, "images", images), _only(folder, "masks", masks)
        return self._nested(only_images, only_masks, part, prefix)

    def _compounds(self, folder: Path, part: str | None, prefix: str) -> list[_Unit]:
        """Find folders whose names tell the part as well, such as ISIC's or train_images/."""
        found: dict[str, dict[str, list[Path]]] = {}
        for each in self.folders.list(folder).folders:
            if (meaning := _compound(each.name)) and self.holds_files(each):
                sides = found.setdefault(meaning[1], {"images": [], "masks": []})
                sides[meaning[0]].append(each)
        units = []
        for name, sides in found.items():
            if sides["images"] and sides["masks"]:
                images = _only(folder, "images", sides["images"])
                masks = _only(folder, "masks", sides["masks"])
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
        if _items(self.folders, images) or _items(self.folders, masks) or not groups:
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
        if self.layout == "folders" or self.images or self.masks:
            return []
        _, masks = _split_by_suffix(_items(self.folders, folder, series=False))
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
            raise _several_sets(folder, list(sets))
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
        """Do without a part that has no masks, but for the training part."""
        if part in ("val", "test"):
            self._note(f"{images} has no masks and was left out")
        else:
            what = f"; {expected}" if expected else ""
            self.problems.append(f"{images}: there are no masks for these images{what}")

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


def _check_settings(path: Path, layout: LayoutName, images: str | None, masks: str | None) -> None:
    is_file = exists(path, "file")
    if not is_file and not exists(path, "folder"):
        what = "is neither file nor folder" if path.exists() else "there is no such file or folder"
        raise PolysegError(f"{path}: {what}")
    for key, value in (("data.images", images), ("data.masks", masks)):
        if value is not None and (is_file or layout not in ("auto", "folders")):
            what = "a CSV manifest" if is_file else f"data.layout={layout}"
            raise PolysegError(f"{key}: has no meaning for {what}; leave it out")
    if images is not None and masks is not None and plain(images) == plain(masks):
        raise PolysegError(f"data.masks: {masks} is the folder of images too; name another")
    if is_file and (path.suffix.lower() not in MANIFEST_SUFFIXES or layout not in _OF_FILES):
        expected = "a folder or a CSV manifest" if layout in _OF_FILES else "a folder"
        raise PolysegError(f"{path}: is a file; data.layout={layout} takes {expected}")
    if layout == "manifest" and not is_file:
        raise PolysegError(f"{path}: is a folder; data.layout=manifest takes a CSV file")


_OF_FILES = ("auto", "manifest")


def _described_root(folders: Folders, path: Path) -> Path | None:
    """Return the folder that holds imagesTr: this one, or the only such one in it."""
    for _ in range(_DEEPEST):
        if exists(path / TRAINING_IMAGES, "folder"):
            return path
        below = folders.list(path).folders
        if any(plain(each.name) in (*_IMAGE_NAMES, *_MASK_NAMES) for each in below):
            return None
        described = [each for each in below if exists(each / TRAINING_IMAGES, "folder")]
        if len(described) > 1:
            raise _several_sets(path, described)
        if not described and len(below) != 1:
            return None
        path = (described or below)[0]
    return None


def _several_sets(folder: Path, found: Sequence[Path]) -> PolysegError:
    names = some("data set", [f"{each.name}/" for each in found])
    return PolysegError(f"{folder}: holds {names}; give the path of one of them, as {found[0]}")


def _only(folder: Path, side: str, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        names = ", ".join(f"{each.name}/" for each in found)
        raise PolysegError(
            f"{folder}: several folders may hold the {side} ({names}); say which by "
            f"data.{side}=NAME, such as data.{side}={found[0].name!r}"
        )
    return found[0]


def _compound(name: str) -> tuple[str, str] | None:
    """Return ("images" or "masks", part) for names such as ISIC2018_Task1_Test_GroundTruth.

    >>> _compound("val_images"), _compound("ISIC-2017_Training_Part1_GroundTruth")
    (('images', 'val'), ('masks', 'train'))
    """
    words = [word for word in re.split(r"[ _-]+", name) if word]
    parts = {part for word in words if (part := part_of(word))}
    rest = [word.lower() for word in words if not part_of(word)]
    if len(parts) != 1 or not rest:
        return None
    part = parts.pop()
    if rest[-1] in _IMAGE_NAMES or (rest[-1] == "data" and len(rest) > 1):
        return "images", part
    if rest[-1] in _MASK_NAMES or "".join(rest[-2:]) == "groundtruth":
        return "masks", part
    return None


def _joined(*names: str) -> str:
    return "/".join(filter(None, names))


def _twin_key(folder: Path) -> str:
    return part_of(folder.name) or plain(folder.name)


def _groups(folders: Folders, folder: Path) -> list[Path]:
    """Return the sub-folders that are no DICOM series, but parts or classes."""
    below = folders.list(folder).folders
    return [each for each in below if part_of(each.name) or folders.series(each) is None]


def _items(folders: Folders, folder: Path, *, series: bool = True) -> dict[str, list[Path]]:
    """Return the files and DICOM series of a folder by stem."""
    listing = folders.list(folder)
    found: dict[str, list[Path]] = {}
    for file in listing.files:
        if not _DRAWING.search(stem := stem_of(file)):
            found.setdefault(stem, []).append(file)
    for each in listing.folders if series else ():
        if not part_of(each.name) and (place := folders.series(each)):
            found.setdefault(stem_of(each), []).append(place)
    return found


def _stripped(stem: str) -> list[str]:
    """Return the stem, and what is left of it without the endings of masks.

    >>> _stripped("21_manual1"), _stripped("benign (1)_mask_1")
    (['21_manual1', '21'], ['benign (1)_mask_1', 'benign (1)'])
    """
    names = [stem]
    while (shorter := _MASK_ENDING.sub("", names[-1])) not in ("", names[-1]):
        names.append(shorter)
    return names


def _keys_of_images(stems: Iterable[str]) -> dict[str, str]:
    """Return the images by stem and, where that is one image's alone, by stem without _test."""
    stems = list(stems)
    short = {stem: _IMAGE_ENDING.sub("", stem) for stem in stems}
    shared = set(repeated(short.values()))
    by_short = {name: stem for stem, name in short.items() if name not in shared}
    return by_short | {stem: stem for stem in stems}


def _match(
    images: Iterable[str], masks: Mapping[str, Sequence[Path]]
) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the masks of each image by stem, and the names of masks that have no image."""
    keys = _keys_of_images(images)
    found: dict[str, list[Path]] = {}
    lost: list[str] = []
    for stem, files in masks.items():
        if owner := next((keys[name] for name in _stripped(stem) if name in keys), None):
            found.setdefault(owner, []).append(files[0])
        else:
            lost.extend(file.name for file in files)
    return found, lost


def _split_by_suffix(
    items: Mapping[str, list[Path]],
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return images and masks of one folder: a mask is named as an image with an ending."""
    keys = _keys_of_images(items)
    masks = {
        stem: files
        for stem, files in items.items()
        if any(keys.get(name, stem) != stem for name in _stripped(stem)[1:])
    }
    return {stem: files for stem, files in items.items() if stem not in masks}, masks


def _add_unit(folders: Folders, unit: _Unit, findings: Findings) -> None:
    images = _items(folders, unit.images, series=unit.masks is not None)
    if unit.masks is None:
        images, masks = _split_by_suffix(images)
        images, masks = _with_lost_masks(images, masks)
    else:
        masks = _items(folders, unit.masks)
    where, mask_folder = str(unit.images), unit.masks or unit.images
    found, lost = _match(images, masks)
    if not images:
        findings.problems.append(f"{where}: holds no image ({' '.join(readable_suffixes())})")
    if images and masks and not found:
        findings.problems.append(
            f"{where}: no name fits one in {mask_folder} (such as {next(iter(images))} and "
            f"{next(iter(masks))}); expected equal names, or _mask, _segmentation, ... after them"
        )
        return
    for folder, items in ((where, images), (str(mask_folder), masks)):
        twice = [stem for stem, files in items.items() if len(files) > 1]
        findings.problem(folder, "name", twice, "of two files each, but for the suffix; keep one")
    findings.problem(str(mask_folder), "mask", lost, f"without an image in {where}")
    for stem in found:
        findings.add(_case(stem, images, unit, tuple(sorted(found[stem]))), unit.prefix)
    bare = [_case(stem, images, unit, None) for stem in images if stem not in found]
    _add_bare(unit, bare, findings)


def _with_lost_masks(
    images: dict[str, list[Path]], masks: dict[str, list[Path]]
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Count as masks what ends as masks do, though there is neither image nor mask of it."""
    found, _ = _match(images, masks)
    lost = {stem for stem in images if len(_stripped(stem)) > 1 and stem not in found}
    kept = {stem: files for stem, files in images.items() if stem not in lost}
    return kept, masks | {stem: images[stem] for stem in lost}


def _case(
    stem: str, images: Mapping[str, Sequence[Path]], unit: _Unit, masks: tuple[Path, ...] | None
) -> Case:
    return Case(stem, (images[stem][0],), masks, unit.part)


def _add_bare(unit: _Unit, cases: list[Case], findings: Findings) -> None:
    if cases and plain(unit.images.name) == _WITHOUT_LESION:
        for case in cases:
            findings.add(replace(case, masks=()), unit.prefix)
        count = counted(len(cases), "image")
        findings.notes.append(f"{unit.images}: {count} without a mask: normal, so taken as empty")
    else:
        findings.add_unmasked(str(unit.images), cases, unit.prefix)


def _name(units: Sequence[_Unit]) -> str:
    first = next((unit for unit in units if unit.part == "train"), units[0])
    name = "images with masks beside them"
    if first.masks is not None:
        images, masks = first.images, first.masks
        # In images/train/ and masks/train/ it is the upper folders that tell the two apart.
        while _twin_key(images) == _twin_key(masks) and images != masks:
            images, masks = images.parent, masks.parent
        name = f"{images.name}/ and {masks.name}/"
    parts = [part for part in ("train", "val", "test") if any(unit.part == part for unit in units)]
    return f"{name}, with parts {', '.join(parts)}" if parts else name


def _unknown(search: _Search, path: Path, layout: LayoutName) -> list[str]:
    """Say what a folder of no known layout lacks, a line for each thing."""
    images, masks = search.candidates(path)
    expected = {
        "folders": "expected a folder of images (images/, ...) and one of masks (masks/, ...)",
        "suffixes": "expected masks beside their images, such as a.png and a_mask.png",
    }.get(layout, _EXPECTED)
    lacks = "is of no known layout" if layout == "auto" else f"does not fit data.layout={layout}"
    chosen = (("images", search.images), ("masks", search.masks))
    told = [f"data.{side}={name!r}" for side, name in chosen if name is not None]
    lines = [f"{path}: {lacks} (it holds {seen_in(path)}); {expected}"]
    above = path.resolve().parent
    beside = [
        each for each in search.folders.list(above).folders if plain(each.name) in _MASK_NAMES
    ]
    if beside and plain(path.resolve().name) in _IMAGE_NAMES and not told:
        named = path.parent if path.name else above
        return [
            f"{path}: holds images; their masks are in {beside[0].name}/ beside it: give {named}"
        ]
    if told:
        lines.append(f"{path}: nothing was found by {' and '.join(told)}; name folders that exist")
    elif layout != "suffixes" and bool(images) != bool(masks):
        other = "masks" if images else "images"
        lines.append(
            f"{(images or masks)[0]}: there is no folder of {other} beside it; if it is called "
            f"otherwise, say data.{other}=NAME"
        )
    return [*lines, *search.problems]


def _unlabelled(folders: Folders, path: Path) -> list[Case]:
    if exists(path, "file"):
        if not is_readable(path) or not path.name.isprintable():
            suffixes = " ".join(readable_suffixes())
            raise PolysegError(f"{path}: is of no kind that is read ({suffixes})")
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
    named = [each for each in below if plain(each.name) in _IMAGE_NAMES]
    named = [_only_images(folder, named)] if named else []
    named += [each for each in below if each.name == "imagesTs"]
    named = named or [each for each in below if each.name == TRAINING_IMAGES]
    own = [] if named else _images_in(folders, folder)
    if own or depth >= _DEEPEST:
        return own
    others = [each for each in below if not _is_for_masks(each.name)]
    return [case for each in named or others for case in _images_of(folders, each, depth + 1)]


def _only_images(folder: Path, found: Sequence[Path]) -> Path:
    if len(found) > 1:
        names = ", ".join(f"{each.name}/" for each in found)
        raise PolysegError(f"{folder}: several folders may hold the images ({names}); name one")
    return found[0]


def _is_for_masks(name: str) -> bool:
    meaning = _compound(name)
    return plain(name) in (*_MASK_NAMES, _OTHER_OBSERVER, "labelstr", "labelsts") or (
        meaning is not None and meaning[0] == "masks"
    )


def _images_in(folders: Folders, folder: Path) -> list[Case]:
    files = folders.list(folder).files
    if folder.name in (TRAINING_IMAGES, "imagesTs") and (channels := by_channels(files)):
        return [
            Case(name, tuple(found[number] for number in sorted(found)), None)
            for name, found in channels.items()
        ]
    if place := folders.series(folder):
        names = (folder.name, *place.relative_to(folder).parts)
        if not any(plain(name) in _IMAGE_NAMES for name in names):
            # The name of "." is told by where it is.
            return [Case(folder.name or folder.resolve().name, (place,), None)]
    images, _ = _split_by_suffix(_items(folders, folder))
    return [Case(stem, (file,), None) for stem, found in images.items() for file in found]


def _told_apart(cases: Sequence[Case]) -> list[Case]:
    """Put as many names of folders before the ids as make them unique."""
    once = {case.images: case for case in cases}
    for count in range(_DEEPEST * 2):
        found = [replace(case, id=_long_id(case, count)) for case in once.values()]
        if not (twice := repeated(case.id for case in found)):
            return sorted(found, key=lambda case: case.id)
    raise PolysegError(f"{some('name', twice)} of two images each, but for the suffix; rename one")


def _long_id(case: Case, count: int) -> str:
    above = case.images[0].absolute().parent.parts[1:]
    return "/".join([*above[len(above) - min(count, len(above)) :], case.id])
