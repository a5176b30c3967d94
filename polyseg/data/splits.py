"""Which images train, which choose, which test."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from polyseg.data.images import Pixels
from polyseg.errors import PolysegError

PARTS = ("train", "val", "test")

Split = dict[str, list[str]]
"""Ids by part."""


def split_by_ratio(ids: Sequence[str], shares: tuple[float, float, float], seed: int) -> Split:
    """Divide ids at random into train, val and test; every share above 0 gets at least one.

    Args:
        ids: unique, in any order, which does not matter.
        shares: of train, val and test, sum 1.
        seed: of the division.

    Raises:
        PolysegError: there are fewer images than parts.

    >>> split_by_ratio(["a", "b", "c", "d"], (0.5, 0.25, 0.25), seed=0)
    {'train': ['a', 'c'], 'val': ['b'], 'test': ['d']}
    """
    wanted = sum(share > 0 for share in shares)
    if len(ids) < wanted:
        raise PolysegError(
            f"data: {len(ids)} images are too few for {wanted} parts; give more, or data.split "
            "with shares of 0"
        )
    order = np.random.default_rng(seed).permutation(sorted(ids))
    counts = [max(round(share * len(ids)), 1) if share > 0 else 0 for share in shares[1:]]
    while sum(counts) >= len(ids):
        counts[counts.index(max(counts))] -= 1
    test_from = len(ids) - counts[1]
    parts = np.split(order, [test_from - counts[0], test_from])
    return {name: sorted(map(str, part)) for name, part in zip(PARTS, parts, strict=True)}


def content_hash(pixels: Pixels) -> str:
    """Return the sha256 of an image's pixels, whatever file format held them.

    >>> content_hash(np.zeros((2, 2), np.uint8)) == content_hash(np.zeros((4, 1), np.uint8))
    False
    """
    digest = hashlib.sha256(f"{pixels.shape} {pixels.dtype}".encode())
    digest.update(np.ascontiguousarray(pixels).tobytes())
    return digest.hexdigest()


def refuse_leaks(split: Split, hashes: Mapping[str, str]) -> None:
    """Raise if one image, by its pixels, stands on two sides of a split.

    Raises:
        PolysegError: names the two images and their parts.

    >>> refuse_leaks({"train": ["a"], "val": [], "test": ["b"]}, {"a": "1", "b": "2"})
    """
    seen: dict[str, tuple[str, str]] = {}
    for part, ids in split.items():
        for identity in ids:
            other_part, other = seen.setdefault(hashes[identity], (part, identity))
            if other_part != part:
                raise PolysegError(
                    f"data: {identity} ({part}) and {other} ({other_part}) are the same image; "
                    "remove one, or the test would be of what was trained on"
                )
