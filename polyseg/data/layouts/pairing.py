"""Rules that find the image of a mask by its name; a new rule needs only a row here."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polyseg.data.layouts.cases import repeated
from polyseg.data.layouts.names import without_image_ending, without_mask_endings
from polyseg.registry import Registry, Row

Files = Mapping[str, list[Path]]
"""Files by stem."""

_PREFIX = re.compile(
    r"^(images?|imgs?|input|masks?|segmentations?|seg|labels?|gt|annotations?)[ _.-]+(?=.)",
    re.IGNORECASE,
)
_MASK_PREFIX = re.compile(r"^(masks?|segmentations?|seg|labels?|gt)[ _.-]+(?=.)", re.IGNORECASE)
_MODULE = "polyseg.data.layouts.pairing"

RULES = Registry(
    "pairing rule",
    Row("equal", "equal names apart from endings such as _mask", f"{_MODULE}:unchanged"),
    Row("case", "ignoring upper and lower case", f"{_MODULE}:in_lower_case"),
    Row("zeros", "ignoring leading zeros of numbers", f"{_MODULE}:without_zeros"),
    Row("prefix", "ignoring prefixes such as image_ and mask_", f"{_MODULE}:without_prefix"),
    Row("loose", "ignoring case, leading zeros and prefixes", f"{_MODULE}:loosely"),
)
"""Each function maps the stems of an image and its mask to the same text."""


def unchanged(stem: str) -> str:
    """Return a stem unchanged."""
    return stem


def in_lower_case(stem: str) -> str:
    """Return a stem in lower case."""
    return stem.casefold()


def without_zeros(stem: str) -> str:
    """Return a stem without the zeros before its numbers.

    >>> without_zeros("slice_007")
    'slice_7'
    """
    return re.sub(r"(?<!\d)0+(?=\d)", "", stem)


def without_prefix(stem: str) -> str:
    """Return a stem without a word for images or masks before it.

    >>> without_prefix("image_1"), without_prefix("mask_1")
    ('1', '1')
    """
    return _PREFIX.sub("", stem)


def loosely(stem: str) -> str:
    """Return a stem in lower case, without prefix and zeros.

    >>> loosely("Mask_01") == loosely("img_1")
    True
    """
    return without_zeros(without_prefix(stem).casefold())


@dataclass(frozen=True)
class Pairs:
    """Masks by the stem of their image, names of masks without one, and the rule."""

    masks: dict[str, list[Path]]
    lost: list[str]
    rule: Row


def match(images: Iterable[str], masks: Files) -> Pairs:
    """Return the masks of each image by the rule that pairs most, the first one on a tie.

    >>> pairs = match(["img_1", "img_2"], {"mask_01": [Path("m1")], "mask_02": [Path("m2")]})
    >>> pairs.rule.name, pairs.masks
    ('loose', {'img_1': [PosixPath('m1')], 'img_2': [PosixPath('m2')]})
    """
    stems = list(images)
    tried = []
    for rule in RULES.values():
        found = _matched_by(rule, stems, masks)
        tried.append(found)
        if len(found.masks) == len(stems) and not found.lost:
            return found
    return max(tried, key=lambda pairs: (len(pairs.masks), -len(pairs.lost)))


def _matched_by(rule: Row, images: Sequence[str], masks: Files) -> Pairs:
    keys = image_keys(images, rule.resolve())
    found: dict[str, list[Path]] = {}
    lost: list[str] = []
    for stem, files in masks.items():
        names = map(rule.resolve(), without_mask_endings(stem))
        if owner := next((keys[name] for name in names if name in keys), None):
            found.setdefault(owner, []).append(files[0])
        else:
            lost.extend(file.name for file in files)
    return Pairs(found, lost, rule)


def image_keys(stems: Iterable[str], rule: Callable[[str], str] = unchanged) -> dict[str, str]:
    """Return images by their stem, with and without an ending such as _test, after a rule.

    A key that several images share is left out.

    >>> image_keys(["1_test", "2"])
    {'1': '1_test', '2': '2', '1_test': '1_test'}
    """
    stems = list(stems)
    by_key: dict[str, str] = {}
    for shorten in (without_image_ending, unchanged):
        keys = {stem: rule(shorten(stem)) for stem in stems}
        shared = set(repeated(keys.values()))
        by_key |= {key: stem for stem, key in keys.items() if key not in shared}
    return by_key


def split_by_suffix(
    items: Files, *, by_kind: bool = True
) -> tuple[dict[str, list[Path]], dict[str, list[Path]]]:
    """Return images and masks of one folder: a mask has the name of an image and an ending.

    Of a JPEG and another picture of equal names the JPEG is the image (`by_kind`), because masks
    are not stored as JPEG. Names with mask_ before them are masks where another name fits.

    >>> images, masks = split_by_suffix({"a": [Path("a.jpg"), Path("a.png")]})
    >>> images, masks
    ({'a': [PosixPath('a.jpg')]}, {'a': [PosixPath('a.png')]})
    """
    keys = image_keys(items)
    masks: dict[str, list[Path]] = {
        stem: files
        for stem, files in items.items()
        if any(keys.get(name, stem) != stem for name in without_mask_endings(stem)[1:])
    }
    loose = {loosely(stem) for stem in items if not _MASK_PREFIX.match(stem)}
    masks |= {
        stem: files
        for stem, files in items.items()
        if _MASK_PREFIX.match(stem) and loosely(stem) in loose
    }
    images = {stem: files for stem, files in items.items() if stem not in masks}
    for stem, files in items.items() if by_kind else ():
        lossy = [file for file in files if file.suffix.lower() in (".jpg", ".jpeg")]
        if stem in images and len(files) == 2 and len(lossy) == 1:
            images[stem] = lossy
            masks[stem] = [file for file in files if file not in lossy]
    return images, masks
