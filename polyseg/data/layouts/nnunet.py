"""Data sets with a dataset.json: nnU-Net raw, and the Medical Segmentation Decathlon."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from polyseg.data.formats.file_formats import readable_suffixes
from polyseg.data.layouts.cases import (
    DEEPEST,
    Case,
    Findings,
    Folders,
    Layout,
    counted,
    exists,
    is_readable,
    plain,
    seen_in,
    shown,
    stem_of,
)
from polyseg.data.layouts.names import IMAGE_FOLDERS, MASK_FOLDERS
from polyseg.data.layouts.source import Source, several_sets
from polyseg.errors import PolysegError, reason
from polyseg.system.files import read_text

DESCRIPTION = "dataset.json"
TRAINING_IMAGES = "imagesTr"

_CHANNEL = re.compile(r"(.+)_(\d{4})")
_LARGEST_LABEL = 65535

_Json = dict[str, Any]
_Regions = dict[str, tuple[int, ...]]


def read_if_nnunet(source: Source) -> Layout | None:
    """Read nnU-Net's raw layout, versions 1 and 2: imagesTr, labelsTr, imagesTs, labelsTs.

    Cases of imagesTr have no part, since nnU-Net divides them by a separate split; those of
    imagesTs are the test part if labelsTs exists, else they are left out.
    """
    root = _root_of_kind(source, "nnunet")
    if root is None:
        return None
    folders, findings = source.folders, Findings(source.unmasked)
    description = _read_description(root)
    labels, regions = _label_values(root, description)
    ending, channels = _file_ending(root, description), _channels(root, description)
    if not exists(root / TRAINING_IMAGES, "folder"):
        raise PolysegError(f"{root}: has no folder imagesTr (it holds {seen_in(root)})")
    for end, part in (("Tr", None), ("Ts", "test")):
        images, masks = root / f"images{end}", root / f"labels{end}"
        if part and _files(folders, images) and not _files(folders, masks):
            findings.notes.append(f"{images} has no labels and was left out")
        else:
            side = _Side(images, masks, part, ending, channels)
            _add_side(folders, side, findings)
    said = description.get("numTraining")
    cases = by_channels(_files(folders, root / TRAINING_IMAGES))
    if isinstance(said, int) and cases is not None and len(cases) != said:
        findings.notes.append(
            f"{DESCRIPTION} declares {shown(said)} training cases, imagesTr holds {len(cases)}"
        )
    return replace(findings.finish(str(root), "nnU-Net raw", labels), regions=regions)


def read_if_decathlon(source: Source) -> Layout | None:
    """Read a task of the Medical Segmentation Decathlon: the images that dataset.json lists."""
    root = _root_of_kind(source, "decathlon")
    if root is None:
        return None
    findings, where = Findings(source.unmasked), root / DESCRIPTION
    description = _read_description(root)
    labels, regions = _label_values(root, description)
    entries = description.get("training")
    if not isinstance(entries, list) or not entries:
        raise PolysegError(f'{where}: training: expected a list of {{"image", "label"}}')
    found = [
        _listed_case(root, f"{where}: training, entry {index}", entry, findings)
        for index, entry in enumerate(entries, start=1)
    ]
    findings.add(str(where), [case for case in found if case is not None])
    tests = description.get("test")
    if isinstance(tests, list) and tests:
        findings.notes.append(f"{counted(len(tests), 'test image')} without labels left out")
    layout = findings.finish(str(root), "Medical Segmentation Decathlon", labels)
    return replace(layout, regions=regions)


def _root_of_kind(source: Source, kind: str) -> Path | None:
    if source.chosen:
        return _described_root(source.folders, source.path) or source.path
    if source.images or source.masks:
        return None
    root = _described_root(source.folders, source.path)
    return root if root is not None and _kind_of(source.folders, root) == kind else None


def _described_root(folders: Folders, path: Path) -> Path | None:
    """Return the folder that holds imagesTr: this one, or the only such one in it."""
    for _ in range(DEEPEST):
        if exists(path / TRAINING_IMAGES, "folder"):
            return path
        below = folders.list(path).folders
        if any(plain(each.name) in (*IMAGE_FOLDERS, *MASK_FOLDERS) for each in below):
            return None
        described = [each for each in below if exists(each / TRAINING_IMAGES, "folder")]
        if len(described) > 1:
            raise several_sets(path, described)
        if not described and len(below) != 1:
            return None
        path = (described or below)[0]
    return None


def _kind_of(folders: Folders, root: Path) -> Literal["nnunet", "decathlon"]:
    """Return the layout: nnU-Net's names end in a channel (_0000), the Decathlon lists files."""
    description = _read_description(root)
    images = {stem_of(file) for file in _files(folders, root / TRAINING_IMAGES)}
    labels = {stem_of(file) for file in _files(folders, root / "labelsTr")}
    channels = [match for match in map(_CHANNEL.fullmatch, images) if match]
    by_label = any(f"{label}_0000" in images for label in labels)
    by_name = len(channels) == len(images) and any(match[2] == "0000" for match in channels)
    listed = isinstance(description.get("training"), list)
    return "decathlon" if listed and not by_label and not by_name else "nnunet"


def by_channels(files: Sequence[Path]) -> dict[str, dict[int, Path]] | None:
    """Return files with one channel by case, or None if a name has no channel.

    >>> sorted(by_channels([Path("a_0000.png"), Path("a_0001.png")])["a"])
    [0, 1]
    """
    cases: dict[str, dict[int, Path]] = {}
    for file in files:
        if not (match := _CHANNEL.fullmatch(stem_of(file))):
            return None
        cases.setdefault(match[1], {})[int(match[2])] = file
    return cases


@dataclass(frozen=True)
class _Side:
    """Images and labels of a part, and the expected properties of the files."""

    images: Path
    masks: Path
    part: str | None
    ending: str
    channels: int | None


def _add_side(folders: Folders, side: _Side, findings: Findings) -> None:
    images, masks = (
        _of_ending(folders, folder, side.ending, findings) for folder in (side.images, side.masks)
    )
    odd = [file.name for file in images if not _CHANNEL.fullmatch(stem_of(file))]
    what = f"without a channel in the name; expected CASE_0000{side.ending}"
    findings.problem(str(side.images), "image", odd, what)
    cases = by_channels([file for file in images if file.name not in set(odd)]) or {}
    _check_channels(side, cases, findings)
    labels = {stem_of(file): file for file in masks}
    lost = sorted(labels.keys() - cases.keys())
    findings.problem(str(side.masks), "mask", lost, f"without an image in {side.images.name}/")
    found = []
    for name, channels in cases.items():
        files = tuple(channels[number] for number in sorted(channels))
        found.append(Case(name, files, (labels[name],) if name in labels else None, side.part))
    findings.add(str(side.images), found, side.images.name)


def _check_channels(
    side: _Side, cases: Mapping[str, Mapping[int, Path]], findings: Findings
) -> None:
    found = {number for channels in cases.values() for number in channels}
    count = side.channels or len(found)
    odd = [name for name, channels in cases.items() if set(channels) != set(range(count))]
    expected = "_0000" if count == 1 else f"_0000 to _{count - 1:04}"
    source = f"as {DESCRIPTION} says" if side.channels else "as other cases have"
    what = f"without exactly the channels {expected}, {source}"
    findings.problem(str(side.images), "case", odd, what)


def _of_ending(folders: Folders, folder: Path, ending: str, findings: Findings) -> list[Path]:
    files = _files(folders, folder)
    fitting = [file for file in files if file.name.lower().endswith(ending.lower())]
    others = [file.name for file in files if file not in set(fitting)]
    findings.problem(str(folder), "file", others, f"not ending in {ending}, the set's file_ending")
    return fitting


def _files(folders: Folders, folder: Path) -> tuple[Path, ...]:
    return folders.list(folder).files if exists(folder, "folder") else ()


def _read_description(root: Path) -> _Json:
    path = root / DESCRIPTION
    if not exists(path, "file"):
        raise PolysegError(f"{root}: has no {DESCRIPTION} (it holds {seen_in(root)})")
    try:
        description = json.loads(read_text(path).removeprefix("\ufeff"))
    except OSError as error:
        raise PolysegError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError) as error:
        why = "nested too deep" if isinstance(error, RecursionError) else shown(error)
        raise PolysegError(f"{path}: is not JSON: {why}") from None
    if not isinstance(description, dict):
        raise PolysegError(f"{path}: expected an object with channel_names and labels")
    return description


def _file_ending(root: Path, description: _Json) -> str:
    ending = description.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending.lower() not in readable_suffixes():
        raise PolysegError(
            f"{root / DESCRIPTION}: file_ending is {shown(ending)}; expected one of "
            f"{' '.join(readable_suffixes())}"
        )
    return ending


def _channels(root: Path, description: _Json) -> int | None:
    """Return the number of channels by channel_names (version 2) or modality (1), or None."""
    key = "channel_names" if "channel_names" in description else "modality"
    names = description.get(key)
    if names is None:
        return None
    if not isinstance(names, dict | list) or not names:
        raise PolysegError(
            f'{root / DESCRIPTION}: {key}: expected names by number, such as {{"0": "CT"}}'
        )
    return len(names)


def _label_values(root: Path, description: _Json) -> tuple[dict[str, int], _Regions]:
    """Return labels, {"tumour": 1} of version 2 or {"1": "tumour"} of version 1, and regions.

    A region is a task of several values; if there is one, every other label is a task too.
    """
    where = f"{root / DESCRIPTION}: labels"
    said = description.get("labels", {})
    if not isinstance(said, dict):
        raise PolysegError(f'{where}: expected values by name, such as {{"tumour": 1}}')
    values: dict[str, int] = {}
    regions: dict[str, tuple[int, ...]] = {}
    for key, value in said.items():
        if isinstance(value, list):
            numbers = tuple(_label(where, key, one)[1] for one in value)
            if numbers and key.lower() != "background":
                regions[key] = numbers
            continue
        name, number = _label(where, key, value)
        if name in values:
            raise PolysegError(f"{where}: two values are called {name}")
        if name.lower() == "ignore":
            raise PolysegError(
                f"{where}: pixels of {name} ({number}) cannot be left out of the loss; give them "
                f"another value in labelsTr, or remove {name} from dataset.json to take them as "
                "background"
            )
        if number and name.lower() != "background":
            values[name] = number
    if regions:
        named = regions | {name: (value,) for name, value in values.items()}
        regions = {name: named[name] for name in said if name in named}
    return values, regions


def _label(where: str, key: str, value: object) -> tuple[str, int]:
    name, number = (value, key) if isinstance(value, str) and key.isdecimal() else (key, value)
    if isinstance(number, str) and number.isascii() and number.isdecimal() and len(number) < 6:
        number = int(number)
    if isinstance(number, bool) or not isinstance(number, int):
        raise PolysegError(f"{where}: {shown(key)} is {shown(value)}; expected a whole number")
    if not 0 <= number <= _LARGEST_LABEL:
        raise PolysegError(f"{where}: {shown(key)}: give a value from 0 to {_LARGEST_LABEL}")
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise PolysegError(f"{where}: the name {shown(name)} is not valid text")
    return name, number


def _listed_case(root: Path, where: str, entry: object, findings: Findings) -> Case | None:
    said = entry if isinstance(entry, dict) else {"image": entry}
    image = _listed_file(root, said.get("image"))
    mask = _listed_file(root, said["label"]) if said.get("label") is not None else None
    problems = [found for found in (image, mask) if isinstance(found, str)]
    findings.problems.extend(f"{where}: {problem}" for problem in problems)
    if problems or not isinstance(image, Path):
        return None
    return Case(stem_of(image), (image,), (mask,) if isinstance(mask, Path) else None)


def _listed_file(root: Path, said: object) -> Path | str:
    """Return the named file, or a problem with it."""
    if not isinstance(said, str) or not said.strip():
        return f"{shown(said)} is not a path; expected a path such as ./imagesTr/a.nii.gz"
    relative = PurePosixPath(said)
    if relative.is_absolute() or ".." in relative.parts:
        return f"{shown(said)} leads out of the folder; expected a path such as ./imagesTr/a.nii.gz"
    path = root / relative
    if not exists(path, "file"):
        return f"{shown(said)}: there is no such file"
    if not path.name.isprintable() or not is_readable(path):
        return f"{shown(said)} is not a supported file ({' '.join(readable_suffixes())})"
    return path
