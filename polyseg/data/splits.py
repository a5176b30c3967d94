"""Divide images into training, validation and test images."""

import contextlib
import json
import logging
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from polyseg.config import DataConfig
from polyseg.errors import PolysegError, reason
from polyseg.system.files import read_text

log = logging.getLogger(__name__)

PARTS = ("train", "val", "test")

Split = dict[str, list[str]]
"""Ids by part."""

_LONGEST_MATCHED = 300
_LONGEST_MATCHING = 5.0
"""Seconds for all images, because a pattern from another user may never end on one of them."""
_SLICE = re.compile(r"#\d{3,}$")


@dataclass(frozen=True)
class Member:
    """Facts about an image that a split depends on."""

    id: str
    foreground: float = 0.0
    """Share of its pixels."""
    group: str | None = None
    """Images of one group, such as a patient's, stay together; None is a group of its own."""
    part: str | None = None
    """Part to which the data set assigns it: train, val or test."""


def split_by_settings(members: Sequence[Member], config: DataConfig) -> Split:
    """Split images, of unique ids, by a file, by the parts in the data, by folds, or by shares.

    If the data give a test part but no validation part, validation images are drawn from the
    others. A fold is the test part, or the validation part if the data have a test part.

    Raises:
        PolysegError: too few images or groups, or a file that does not fit.

    >>> split_by_settings([Member(i) for i in "abcd"], DataConfig(split=(0.5, 0.25, 0.25)))
    {'train': ['c', 'd'], 'val': ['b'], 'test': ['a']}
    """
    members = _all_grouped(members, config.group_pattern)
    if config.split_file is not None:
        return _from_file(Path(config.split_file), members, config.fold)
    placed = {part: [member for member in members if member.part == part] for part in PARTS}
    free = [member for member in members if member.part is None]
    if config.fold is not None:
        held_out = "val" if placed["test"] else "test"
        free += placed["val"] if held_out == "val" else []
        placed["val"] = [] if held_out == "val" else placed["val"]
    if not free:
        # All have their part, so a missing part can only be drawn from the training images.
        free, placed["train"] = placed["train"], []
    if config.fold is not None:
        fold = set(divide(free, [1 / config.folds] * config.folds, config)[config.fold])
        placed[held_out] = [member for member in free if member.id in fold]
        free = [member for member in free if member.id not in fold]
    # If validation images are given, no test images are drawn.
    closed = {"test"} if placed["val"] or placed["test"] else set()
    open_parts = [part for part in PARTS if part == "train" or not placed[part]]
    open_parts = [part for part in open_parts if part not in closed]
    shares = dict(zip(PARTS, config.split, strict=True))
    whole = sum(shares[part] for part in open_parts)
    split = {part: [member.id for member in placed[part]] for part in PARTS}
    divided = divide(free, [shares[part] / whole for part in open_parts], config) if free else []
    for part, ids in zip(open_parts, divided, strict=False):
        split[part] += ids
    return {part: sorted(ids) for part, ids in split.items()}


def groups_in_two_parts(split: Split, members: Sequence[Member], config: DataConfig) -> list[str]:
    """Return the groups with images in two parts of a split.

    >>> members = [Member("a", group="x"), Member("b", group="x")]
    >>> groups_in_two_parts({"train": ["a"], "val": [], "test": ["b"]}, members, DataConfig())
    ['x (train and test)']
    """
    group_of = groups_by_id(members, config)
    parts: dict[str, list[str]] = {}
    for part, ids in split.items():
        for group in {group_of[identity] for identity in ids} - {None}:
            parts.setdefault(str(group), []).append(part)
    return [
        f"{group} ({' and '.join(found)})" for group, found in sorted(parts.items()) if found[1:]
    ]


def volume_of(identity: str) -> str:
    """Return the id of a slice's volume, or the id of an image unchanged.

    >>> volume_of("scan#012"), volume_of("photo")
    ('scan', 'photo')
    """
    return _SLICE.sub("", identity)


def groups_by_id(members: Sequence[Member], config: DataConfig) -> dict[str, str | None]:
    """Return the group of each image, such as its patient, by its id; None where it has none.

    >>> groups_by_id([Member("p1_a"), Member("p2_a")], DataConfig(group="^(p.)_"))
    {'p1_a': 'p1', 'p2_a': 'p2'}
    """
    return {one.id: one.group for one in _all_grouped(members, config.group_pattern)}


def group_names(members: Sequence[Member], config: DataConfig) -> list[str]:
    """Return the groups that the images form, in order; none where no image has one.

    >>> group_names([Member("a", group="x"), Member("b", group="x"), Member("c")], DataConfig())
    ['x']
    """
    return sorted({group for group in groups_by_id(members, config).values() if group is not None})


def groups_of_parts(
    split: Mapping[str, Sequence[str]], members: Sequence[Member], config: DataConfig
) -> dict[str, int]:
    """Return the number of groups in each part of a split; {} where no image has a group.

    An image without a group is its own.

    >>> members = [Member("a", group="x"), Member("b", group="x"), Member("c", group="y")]
    >>> groups_of_parts({"train": ["a", "b"], "test": ["c"]}, members, DataConfig())
    {'train': 1, 'test': 1}
    """
    groups = groups_by_id(members, config)
    if not any(groups.values()):
        return {}
    return {
        part: len({(groups[one] is None, groups[one] or one) for one in ids})
        for part, ids in split.items()
    }


def divide(
    members: Sequence[Member], shares: Sequence[float], config: DataConfig
) -> list[list[str]]:
    """Split images at random by shares, with whole groups and similar parts.

    Groups are sorted by their share of foreground and shuffled within short runs; then each goes to
    the part that lacks most of its share. So every part gets small, middle and large foregrounds.

    Args:
        members: images in any order, which does not change the result.
        shares: shares of the parts, sum 1; every share above 0 gets at least one group.
        config: its split_seed and stratify.

    Returns:
        Sorted ids of each part.

    Raises:
        PolysegError: there are fewer groups than parts.
    """
    groups: dict[tuple[str, str], list[Member]] = {}
    for member in sorted(members, key=lambda member: member.id):
        own = ("image", member.id) if member.group is None else ("group", member.group)
        groups.setdefault(own, []).append(member)
    wanted = sum(share > 0 for share in shares)
    if len(groups) < wanted:
        what = "images" if len(groups) == len(members) else "groups"
        raise PolysegError(
            f"data: {len(groups)} {what} are too few for {wanted} parts; add some, set shares of 0 "
            "in data.split, or fewer data.folds"
            + ("" if what == "images" else ", or divide single images by data.group=none")
        )
    generator = np.random.default_rng(config.split_seed)
    order = [list(groups.values())[i] for i in generator.permutation(len(groups))]
    if config.stratify:
        order = _in_strata(order, min(share for share in shares if share > 0), generator)
    parts: list[list[Member]] = [[] for _ in shares]
    for left, group in zip(range(len(order), 0, -1), order, strict=True):
        empty = [i for i, share in enumerate(shares) if share > 0 and not parts[i]]
        able = empty if left <= len(empty) else [i for i, share in enumerate(shares) if share > 0]
        dealt = sum(map(len, parts)) + len(group)
        lacking = {i: shares[i] * dealt - len(parts[i]) for i in able}
        parts[max(lacking, key=lambda i: lacking[i])].extend(group)
    return [sorted(member.id for member in part) for part in parts]


def read_split_file(path: Path, fold: int | None = None) -> Split:
    """Read a split: polyseg's split.json, or a fold of nnU-Net's splits_final.json.

    Raises:
        PolysegError: there is no such file, it is neither, or the fold is not in it.
    """
    try:
        record = json.loads(read_text(path))
    except OSError as error:
        raise PolysegError(f"{path}: cannot be read: {reason(error)}") from None
    except (ValueError, RecursionError):
        raise PolysegError(f"{path}: is not JSON") from None
    if isinstance(record, list):
        if not record:
            raise PolysegError(f"{path}: holds no folds")
        if fold is None or fold >= len(record):
            raise PolysegError(f"{path}: holds folds 0 to {len(record) - 1}; choose one by --fold")
        record = record[fold]
    elif fold is not None:
        raise PolysegError(f"{path}: is one split, not a list of folds; leave out --fold")
    try:
        if not record.keys() <= set(PARTS):
            raise ValueError
        lists = {part: record.get(part, []) for part in PARTS}
        if not all(isinstance(rows, list) for rows in lists.values()):
            raise TypeError
        split = {part: [_id_of(row) for row in rows] for part, rows in lists.items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PolysegError(
            f"{path}: is not a split; expected lists of ids under train, val and test, or a "
            "list of such folds"
        ) from None
    if not split["train"]:
        raise PolysegError(f"{path}: has no training images")
    return split


def split_json(split: Split, hashes: Mapping[str, str]) -> str:
    """Return a split as JSON for `read_split_file`: ids by part, with the sha256 of their pixels.

    >>> json.loads(split_json({"train": ["a"]}, {"a": "00"}))
    {'train': [{'id': 'a', 'sha256': '00'}]}
    """
    record = {
        part: [{"id": identity, "sha256": hashes.get(identity, "")} for identity in ids]
        for part, ids in split.items()
    }
    return json.dumps(record, indent=1) + "\n"


def refuse_overlap(split: Split, source: str) -> None:
    """Raise PolysegError, which starts with `source`, if a split contains an id twice.

    >>> refuse_overlap({"train": ["a"], "val": ["a"], "test": []}, "split.json")
    Traceback (most recent call last):
    polyseg.errors.PolysegError: split.json: a is in it twice; an image belongs to one part
    """
    counts = Counter(identity for ids in split.values() for identity in ids)
    for identity, count in counts.items():
        if count > 1:
            raise PolysegError(f"{source}: {identity} is in it twice; an image belongs to one part")


def _id_of(row: Any) -> str:
    identity = row["id"] if isinstance(row, dict) else row
    if not isinstance(identity, str) or not identity.isprintable():
        raise ValueError("is not an id")
    return identity


def _from_file(path: Path, members: Sequence[Member], fold: int | None) -> Split:
    """Return a file's split; the part of a volume is that of each of its slices."""
    named = read_split_file(path, fold)
    refuse_overlap(named, str(path))
    slices: dict[str, list[str]] = {}
    for member in members:
        for name in {member.id, volume_of(member.id)}:
            slices.setdefault(name, []).append(member.id)
    missing = [identity for ids in named.values() for identity in ids if identity not in slices]
    if missing:
        raise PolysegError(
            f"{path}: {len(missing)} of its images are not in the data, such as {missing[0]}"
        )
    split = {
        part: sorted({one for identity in ids for one in slices[identity]})
        for part, ids in named.items()
    }
    refuse_overlap(split, str(path))
    unused = len(members) - sum(map(len, split.values()))
    if not split["test"]:
        # Folds have no test set, but the data may have one.
        known = {one for ids in split.values() for one in ids}
        split["test"] = [
            member.id for member in members if member.part == "test" and member.id not in known
        ]
        unused -= len(split["test"])
    if unused:
        log.warning("%d images are in none of the parts of %s and are not used", unused, path)
    return split


def _all_grouped(members: Sequence[Member], pattern: str | None) -> list[Member]:
    """Return members with the groups that a pattern finds in their ids."""
    if pattern is None:
        return list(members)
    grouped: list[Member] = []
    try:
        with _time_limit(_LONGEST_MATCHING):
            for member in members:
                grouped.append(_grouped(member, pattern))  # noqa: PERF401 - for its length
    except TimeoutError:
        name = members[len(grouped)].id
        raise PolysegError(
            f"data.group {pattern!r}: takes too long on {name}; simplify it"
        ) from None
    return grouped


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the block after some seconds; only in the main thread, by a signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TimeoutError

    handler = signal.signal(signal.SIGALRM, end)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, handler)


def _grouped(member: Member, pattern: str) -> Member:
    """Return a member with the group that a pattern finds in its id: its first group, or all.

    The pattern is matched with the id of a slice's volume, which keeps volumes whole.
    """
    found = re.search(pattern, volume_of(member.id)[:_LONGEST_MATCHED])
    group = found and found[1 if found.re.groups else 0]
    if group is None:
        raise PolysegError(
            f"data.group {pattern!r}: finds nothing in {member.id}; every image needs a group"
        )
    return Member(member.id, member.foreground, group, member.part)


def _in_strata(
    groups: Iterable[list[Member]], least_share: float, generator: "np.random.Generator"
) -> list[list[Member]]:
    """Return groups by their mean foreground, shuffled within runs of neighbours."""
    ordered = sorted(groups, key=lambda group: np.mean([member.foreground for member in group]))
    length = int(np.ceil(1.5 / least_share))
    runs = [ordered[start : start + length] for start in range(0, len(ordered), length)]
    return [run[i] for run in runs for i in generator.permutation(len(run))]
