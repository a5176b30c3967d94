"""Find images that are the same: pixel by pixel, or nearly, by a perceptual hash."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyseg.data.splits import Split
from polyseg.errors import PolysegError

MOST_DIFFERING_BITS = 24
"""Largest number of 255 bits in which nearly equal images differ. Copies that were compressed,
halved, brightened or overlaid with noise differed in at most 18, different images of four sets in
at least 60."""

_SIDE, _KEPT = 64, 16
_SHOWN = 5
_ROWS_AT_ONCE = 512
MOST_PAIRS = 1000
"""Pairs that are looked for; who has so many has more."""


def likeness_of(pixels: NDArray[Any], *, sliced: bool = False) -> "Likeness":
    """Return what an image, (H, W, C) or (H, W), is compared with others by.

    >>> likeness_of(np.ones((9, 9))).flat, likeness_of(np.eye(9), sliced=True).near
    (True, '')
    """
    near = perceptual_hash(pixels)
    return Likeness(content_hash(pixels), "" if sliced else near, flat=not near)


@dataclass(frozen=True)
class Likeness:
    """Hashes by which two images are compared."""

    exact: str
    """sha256 of the pixels."""
    near: str
    """Perceptual hash, 64 hexadecimal digits; empty where nothing is nearly the same: for flat
    images, and for slices of volumes, which resemble those of others by their anatomy."""
    flat: bool = False
    """True where all pixels have one value; such images are no copies."""


def content_hash(pixels: NDArray[Any]) -> str:
    """Return the sha256 of an image's pixels, whatever file format held them.

    >>> content_hash(np.zeros((2, 2), np.uint8)) == content_hash(np.zeros((4, 1), np.uint8))
    False
    """
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def perceptual_hash(pixels: NDArray[Any]) -> str:
    """Return 256 bits that hardly change with size, compression, brightness and noise.

    They tell which of the 16 x 16 lowest frequencies of the gray image, shrunk to 64 x 64, are
    above their median (the "pHash" of the field). Flips and crops do change them.

    Args:
        pixels: (H, W, C) or (H, W).

    Returns:
        64 hexadecimal digits, or none for an image of one value.

    >>> len(perceptual_hash(np.eye(9))), perceptual_hash(np.ones((9, 9)))
    (64, '')
    """
    gray = np.asarray(pixels, dtype=np.float32)
    gray = gray.mean(axis=2) if gray.ndim == 3 else gray
    if gray.min() == gray.max():
        return ""
    small = np.asarray(Image.fromarray(gray).resize((_SIDE, _SIDE), Image.Resampling.BOX))
    cosines = _cosines()
    frequencies = (cosines @ small.astype(np.float64) @ cosines.T).ravel()
    # The first is the mean brightness, which tells nothing of what is seen. What is 0 but for
    # rounding, as much of a symmetric image, is not above a median of 0.
    above = frequencies - np.median(frequencies[1:]) > 1e-9 * np.abs(frequencies).max()
    above[0] = False
    return np.packbits(above).tobytes().hex()


def _cosines() -> NDArray[np.float64]:
    """Return the lowest frequencies of the orthonormal discrete cosine transform (type II).

    They are the rows of a (16, 64) matrix. Importing scipy.fft takes longer than many a data set.
    """
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)
    cosines: NDArray[np.float64] = np.sqrt(2 / _SIDE) * np.cos(
        np.pi * frequency * (2 * place + 1) / (2 * _SIDE)
    )
    cosines[0] /= np.sqrt(2)
    return cosines


def refuse_leaks(split: Split, likeness: Mapping[str, Likeness], duplicates: str) -> list[str]:
    """Raise if an image stands on two sides of a split, as it is or nearly.

    Args:
        split: ids by part.
        likeness: by id.
        duplicates: "refuse", "allow-near" or "allow".

    Returns:
        What was allowed, a sentence a pair; some of it, where it is much.

    Raises:
        PolysegError: names the pairs and their parts, and what mends or allows it.

    >>> twin = Likeness("1", 64 * "0")
    >>> refuse_leaks({"train": ["a"], "val": [], "test": ["b"]}, {"a": twin, "b": twin}, "allow")
    ['b (test) and a (train) are the same image']
    """
    same = _exact_pairs(split, likeness)
    found = [] if duplicates == "allow" else _near_pairs(split, likeness)
    near = [(one, other) for one, other in found if likeness[one].exact != likeness[other].exact]
    part_of = {identity: part for part, ids in split.items() for identity in ids}

    def sentences(pairs: list[tuple[str, str]], what: str) -> list[str]:
        return [
            f"{one} ({part_of[one]}) and {other} ({part_of[other]}) are {what}"
            for one, other in pairs
        ]

    exact, nearly = sentences(same, "the same image"), sentences(near, "nearly the same image")
    refused = {"refuse": exact + nearly, "allow-near": exact, "allow": []}[duplicates]
    if refused:
        more = f"; and {len(refused) - _SHOWN} more" if len(refused) > _SHOWN else ""
        raise PolysegError(
            f"data: {'; '.join(refused[:_SHOWN])}{more}. The test would be of what was trained on: "
            "remove copies, keep images of one origin together by data.group, or allow it by "
            f"data.duplicates={'allow' if exact else 'allow-near'}"
        )
    return exact + nearly


def _exact_pairs(split: Split, likeness: Mapping[str, Likeness]) -> list[tuple[str, str]]:
    """Return pairs on two sides with equal pixels, flat images left out: they show nothing."""
    seen: dict[str, tuple[str, str]] = {}
    pairs = []
    for part, ids in split.items():
        for identity in ids:
            own = likeness[identity]
            if own.flat:
                continue
            other_part, other = seen.setdefault(own.exact, (part, identity))
            if other_part != part:
                pairs.append((identity, other))
    return pairs


def near_pairs(likeness: Mapping[str, Likeness]) -> list[tuple[str, str]]:
    """Return the pairs of images that are nearly the same, exact copies among them, at most 1000.

    >>> near_pairs({"a": Likeness("1", 64 * "0"), "b": Likeness("2", 63 * "0" + "1")})
    [('b', 'a')]
    """
    ids = [identity for identity, one in likeness.items() if one.near]
    return _close(ids, ids, likeness, below_diagonal=True)


def _near_pairs(split: Split, likeness: Mapping[str, Likeness]) -> list[tuple[str, str]]:
    parts = [[i for i in ids if likeness[i].near] for ids in split.values()]
    return [
        pair
        for later in range(1, len(parts))
        for earlier in range(later)
        for pair in _close(parts[later], parts[earlier], likeness)
    ]


def _close(
    ids: list[str],
    others: list[str],
    likeness: Mapping[str, Likeness],
    *,
    below_diagonal: bool = False,
) -> list[tuple[str, str]]:
    """Return the pairs of one of `ids` and one of `others` that differ in few bits."""
    columns = _bits([likeness[identity].near for identity in others])
    pairs = []
    for start in range(0, len(ids), _ROWS_AT_ONCE):
        rows = _bits([likeness[one].near for one in ids[start : start + _ROWS_AT_ONCE]])
        # Bits as -1 and 1: the product is 256 less twice the number that differ.
        close = rows @ columns.T >= 256 - 2 * MOST_DIFFERING_BITS
        if below_diagonal:
            close = np.tril(close, start - 1)
        places = np.argwhere(close)[:MOST_PAIRS]
        pairs += [(ids[start + row], others[column]) for row, column in places]
        if len(pairs) >= MOST_PAIRS:
            break
    return pairs[:MOST_PAIRS]


def _bits(hashes: list[str]) -> NDArray[np.float32]:
    packed = np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(-1, 32)
    return np.unpackbits(packed, axis=1).astype(np.float32) * 2 - 1
