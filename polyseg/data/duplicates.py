"""Find equal images by a hash of their pixels, and nearly equal ones by a perceptual hash."""

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
"""Largest number of nearly equal pairs to find."""


def likeness_of(pixels: NDArray[Any], *, sliced: bool = False) -> "Likeness":
    """Return the hashes by which an image, (H, W, C) or (H, W), is compared with others."""
    near = perceptual_hash(pixels)
    return Likeness(content_hash(pixels), "" if sliced else near, flat=not near)


@dataclass(frozen=True)
class Likeness:
    """Hashes by which two images are compared."""

    exact: str
    """sha256 of the pixels."""
    near: str
    """Perceptual hash, 64 hexadecimal digits; empty for flat images, and for slices of volumes,
    which resemble slices of other patients by their anatomy."""
    flat: bool = False
    """Whether all pixels have one value; such images do not count as copies."""


def content_hash(pixels: NDArray[Any]) -> str:
    """Return the sha256 of an image's pixels, independent of the file format."""
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def perceptual_hash(pixels: NDArray[Any]) -> str:
    """Return 256 bits that hardly change with size, compression, brightness and noise, as hex.

    Each bit says whether one of the 16 x 16 lowest frequencies of the gray image, shrunk to
    64 x 64, is above their median (known as "pHash"). Flips and crops do change them. The image is
    (H, W, C) or (H, W); if all its pixels have one value, the result is empty.

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
    # The first is the mean brightness, which says nothing about the content. Rounding errors,
    # such as in a symmetric image, are not above a median of 0.
    above = frequencies - np.median(frequencies[1:]) > 1e-9 * np.abs(frequencies).max()
    above[0] = False
    return np.packbits(above).tobytes().hex()


# Importing scipy.fft would take longer than hashing a small data set.
def _cosines() -> NDArray[np.float64]:
    """Return the lowest frequencies of the orthonormal cosine transform (type II), (16, 64)."""
    frequency, place = np.arange(_KEPT)[:, None], np.arange(_SIDE)
    cosines: NDArray[np.float64] = np.sqrt(2 / _SIDE) * np.cos(
        np.pi * frequency * (2 * place + 1) / (2 * _SIDE)
    )
    cosines[0] /= np.sqrt(2)
    return cosines


def refuse_leaks(split: Split, likeness: Mapping[str, Likeness], duplicates: str) -> list[str]:
    """Raise if equal or nearly equal images are in different parts of a split.

    `likeness` is by id; `duplicates` is "refuse", "allow-near" or "allow".

    Returns:
        A sentence about each pair that was allowed; nearly equal pairs are limited in number.

    Raises:
        PolysegError: a pair is not allowed; the message names pairs, parts and remedies.

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
            f"data: {'; '.join(refused[:_SHOWN])}{more}. Copies of training images bias the test: "
            "remove them, keep images of one origin together by data.group, or allow them by "
            f"data.duplicates={'allow' if exact else 'allow-near'}"
        )
    return exact + nearly


def _exact_pairs(split: Split, likeness: Mapping[str, Likeness]) -> list[tuple[str, str]]:
    """Return pairs in different parts with equal pixels, without images of a single value."""
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
    """Return the pairs of nearly equal images, including exact copies, at most 1000.

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
    """Return the pairs of an id of `ids` and one of `others` whose hashes differ in few bits."""
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
