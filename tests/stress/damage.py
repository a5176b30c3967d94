"""Damaged and forged assessments and schedules: refused in one line, or read as written.

Three kinds of files are made from valid ones. Damaged files are read without a hash and with
the hash that a run recorded. Forged files are damaged and then get a valid hash, as an attacker
would write: they can hold anything, but may not crash, take long, or take much memory. Handmade
files have a valid hash too, and each uses an unusual feature of HDF5.
"""

import contextlib
import dataclasses
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from polyseg.choices import UNCERTAINTIES, map_names
from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.runs.record_files import (
    read_assessment,
    read_schedule,
    write_assessment,
    write_schedule,
)
from tests.children import faults_in_child, faults_of_reading
from tests.hostile import DAMAGE, Random, seal

MOST_IMAGES = 12
_VIRTUAL = 2**40


def check(count: int, seed: int) -> list[str]:
    """Read `count` damaged, forged and handmade files; return the faults of each."""
    generator = random.Random(f"damage {seed}")
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for k in range(count):
            name, faults = _trial(generator, folder, k)
            failures += [f"damage, seed {seed}, file {k} ({name}): {fault}" for fault in faults]
    print(f"damage: {count} files of seed {seed}, {len(failures)} failures", flush=True)
    return failures


def _trial(generator: Random, folder: Path, k: int) -> tuple[str, list[str]]:
    """Make and read a file; of every ten, six are damaged, two forged and two handmade."""
    sound = Sound(generator, folder / f"{k}-sound.h5")
    path = folder / f"{k}.h5"
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [one.unlink() for one in folder.iterdir()])
        if k % 10 < 6:
            damage = generator.choice([*DAMAGE, _swapped(folder / f"{k}-other.h5")])
            path.write_bytes(damage(generator, sound.content))
            return damage.__name__, faults_in_child(lambda: _faults_of_damaged(sound, path))
        if k % 10 < 8:
            damage = generator.choice(DAMAGE)
            path.write_bytes(_headed(damage(generator, sound.content)))
            seal(path)
            return f"forged, {damage.__name__}", faults_in_child(
                lambda: faults_of_reading(path, sound.read)
            )
        trick = TRICKS[(k // 10 * 2 + k % 10) % len(TRICKS)]
        path.write_bytes(sound.content)
        trick(path, sound)
        seal(path)
        return trick.__name__, faults_in_child(
            lambda: faults_of_reading(path, sound.read, sound.same)
        )


class Sound:
    """A valid file, its content, and its reader."""

    def __init__(self, generator: Random, path: Path) -> None:
        numbers = np.random.default_rng(generator.getrandbits(32))
        self.record: Assessment | Schedule
        if generator.random() < 0.4:
            self.record = schedule(numbers)
            self.sha256 = write_schedule(path, self.record)
        else:
            self.record = assessment(numbers)
            self.sha256 = write_assessment(path, self.record)
        self.content = path.read_bytes()

    def read(self, path: Path, **options: Any) -> Assessment | Schedule:
        """Read a file as this kind of record."""
        if isinstance(self.record, Schedule):
            return read_schedule(path, **options)
        return read_assessment(path, with_maps=True, **options)

    def same(self, other: Assessment | Schedule) -> bool:
        """Return whether the record equals the written one to the last bit."""
        return same(self.record, other)


def _faults_of_damaged(sound: Sound, path: Path) -> Iterator[str]:
    yield from faults_of_reading(path, sound.read, sound.same)
    if path.read_bytes() == sound.content:
        return
    try:
        sound.read(path, sha256=sound.sha256)
        yield "was read though the hash differs"
    except PolysegError as error:
        if "\n" in str(error) or str(path) not in str(error):
            yield f"by its hash says {error}"


def same(record: Any, other: Any) -> bool:
    """Return whether two records are equal, including the type and last bit of each number.

    >>> same([np.zeros(2)], [np.zeros(2)]), same([np.zeros(2)], [np.zeros(2, int)])
    (True, False)
    """
    if isinstance(record, np.ndarray):
        alike = (record.dtype, record.shape) == (other.dtype, other.shape)
        return alike and record.tobytes() == other.tobytes()
    if type(record) is not type(other):
        return False
    if dataclasses.is_dataclass(record):
        return same(vars(record), vars(other))
    if isinstance(record, dict):
        return record.keys() == other.keys() and all(
            same(value, other[key]) for key, value in record.items()
        )
    if isinstance(record, list):
        return len(record) == len(other) and all(map(same, record, other))
    return repr(record) == repr(other)


# Valid records.


def _rows(numbers: np.random.Generator) -> tuple[list[str], list[str] | None]:
    images = [f"image ß{i:02d}" for i in range(numbers.integers(1, MOST_IMAGES))]
    if numbers.random() < 0.7:
        return images, None
    return [one for one in images for _ in "ab"], ["liver", "tumour"] * len(images)


def assessment(numbers: np.random.Generator) -> Assessment:
    """Return an assessment of a few images."""
    ids, labels = _rows(numbers)
    n = len(ids)
    dice = numbers.random(n)
    dice[numbers.random(n) < 0.2] = np.nan
    maps: dict[str, Any] = {}
    if numbers.random() < 0.5:
        maps = {name: list(numbers.random((n, 6, 5)).astype(np.float16)) for name in map_names()}
    return Assessment(
        epoch=int(numbers.integers(1, 99)),
        samples=20,
        rate=0.2,
        metric=str(numbers.choice(list(UNCERTAINTIES))),
        region="mask",
        masks="consistent",
        seed=int(numbers.integers(0, 99)),
        ids=ids,
        scores={name: numbers.random(n) for name in UNCERTAINTIES},
        scores_se={name: numbers.random(n) for name in UNCERTAINTIES},
        rank_stability={"entropy": float(numbers.random()), "variance": float("nan")},
        foreground_pixels=numbers.integers(0, 999, n),
        fallback=numbers.integers(0, 3, n).astype(np.int8),
        dice=dice,
        mask_pixels=numbers.integers(0, 999, n) if numbers.random() < 0.5 else None,
        epsilon=numbers.random(n) if numbers.random() < 0.5 else None,
        labels=labels,
        maps=maps,
        weights_sha256="0" * 64,
        config_yaml="loss: {}\n" * 30,
    )


def schedule(numbers: np.random.Generator) -> Schedule:
    """Return a schedule of a few images and epochs."""
    ids, labels = _rows(numbers)
    epochs = np.arange(1, numbers.integers(2, 20))
    epsilon = numbers.random((len(epochs), len(ids)), dtype=np.float32)
    assessed = np.maximum(epochs - 3, -1) if numbers.random() < 0.5 else None
    if numbers.random() < 0.5:
        return Schedule(ids, epochs, epsilon, labels, assessed)
    statistics = numbers.random((numbers.integers(1, 9), 2))
    group = numbers.integers(-1, len(statistics), epsilon.shape, dtype=np.int32)
    return Schedule(ids, epochs, epsilon, labels, assessed, group, statistics)


# Damage that tests.hostile does not have.


def _swapped(other: Path) -> Callable[[Random, bytes], bytes]:
    def swapped(generator: Random, content: bytes) -> bytes:
        """Replace bytes by those of another valid file."""
        foreign = Sound(generator, other).content
        start = generator.randrange(min(len(content), len(foreign)))
        end = start + generator.choice([1, 8, 100, 512, 4000, len(content)])
        return content[:start] + foreign[start:end] + content[end:]

    return swapped


def _headed(content: bytes) -> bytes:
    """Return content with space for the hash, as a forger would write it."""
    return content if len(content) > 600 else content.ljust(600, b"\0")


# Forgeries with features of HDF5. Columns that they do not change must be read unchanged.

Trick = Callable[[Path, Sound], None]


def _column(sound: Sound) -> str:
    return "epsilon" if isinstance(sound.record, Schedule) else "dice"


def _inside(change: Callable[[Any, str], None]) -> Trick:
    """Return a trick that changes the open file at a column that both kinds of files have."""

    def trick(path: Path, sound: Sound) -> None:
        with h5py.File(path, "r+") as file:
            change(file, _column(sound))

    trick.__name__ = change.__name__
    return trick


def _instead(make: Callable[[Any, str, Any], None], *names: str) -> Callable[[Any, str], None]:
    """Return a change that replaces columns by something else."""

    def change(file: Any, column: str) -> None:
        for name in names or (column,):
            old = file[name]
            del file[name]
            make(file, name, old)

    change.__name__ = make.__name__
    return change


def external_link(file: Any, name: str, _: Any) -> None:
    file[name] = h5py.ExternalLink("/etc/passwd", "/")


def external_link_to_itself(file: Any, name: str, _: Any) -> None:
    file[name] = h5py.ExternalLink(file.filename, f"/{name}")


def soft_link(file: Any, name: str, _: Any) -> None:
    file[name] = h5py.SoftLink("/id")


def soft_link_in_a_circle(file: Any, name: str, _: Any) -> None:
    file[name] = h5py.SoftLink(f"/{name}")


def hard_link_to_the_root(file: Any, name: str, _: Any) -> None:
    file[name] = file["/"]


def values_outside(file: Any, name: str, old: Any) -> None:
    place = [("/dev/zero", 0, old.nbytes)]
    file.create_dataset(name, old.shape, old.dtype, external=place)


def virtual(file: Any, name: str, old: Any) -> None:
    layout = h5py.VirtualLayout(old.shape, old.dtype)
    layout[...] = h5py.VirtualSource("/etc/passwd", "x", old.shape)
    file.create_virtual_dataset(name, layout)


def virtual_without_end(file: Any, name: str, old: Any) -> None:
    layout = h5py.VirtualLayout((_VIRTUAL,), old.dtype)
    layout[: 2**20] = h5py.VirtualSource(".", name, (2**20,))
    file.create_virtual_dataset(name, layout)


def chunks_never_written(file: Any, name: str, old: Any) -> None:
    shape = (_VIRTUAL, *old.shape[1:])
    file.create_dataset(name, shape, old.dtype, chunks=(2**10, *old.shape[1:]))


def never_written(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, (_VIRTUAL, *old.shape[1:]), old.dtype)


def packed_zeros(file: Any, name: str, old: Any) -> None:
    shape = (2**22, *old.shape[1:])
    file.create_dataset(name, shape, old.dtype, chunks=shape, compression="gzip")
    file[name][:1000] = 0


def compact(file: Any, name: str, old: Any) -> None:
    """Store the same values in the header, which is valid."""
    values = old[()]
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    kind = h5py.h5t.py_create(values.dtype, logical=True)
    h5py.h5d.create(file.id, name.encode(), kind, space, dcpl=properties).write(
        h5py.h5s.ALL, h5py.h5s.ALL, values
    )


def no_space(file: Any, name: str, old: Any) -> None:
    file[name] = h5py.Empty(old.dtype)


def one_value(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, data=np.zeros((), old.dtype))


def other_order_of_bytes(file: Any, name: str, old: Any) -> None:
    file[name] = old[()].astype(old.dtype.newbyteorder())


def references(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, data=np.full(old.shape, file.ref, object), dtype=h5py.ref_dtype)


def lists_of_any_length(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, (len(old),), h5py.vlen_dtype(np.float64))


def texts_of_one_size(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, old.shape, "S100000", chunks=old.shape)


def records(file: Any, name: str, old: Any) -> None:
    file[name] = np.zeros(old.shape, [("a", "f8"), ("b", "S9")])


def no_rows(file: Any, name: str, old: Any) -> None:
    file.create_dataset(name, (0, *old.shape[1:]), old.dtype)


def many_attributes(file: Any, _: str) -> None:
    """Add something that readers ignore, which is valid."""
    for i in range(3000):
        file.attrs[f"more {i}"] = np.zeros(500)


def attributes_of_many_texts(file: Any, _: str) -> None:
    file.attrs["schema"] = np.full(4000, "x" * 60_000, object)


def attribute_of_arrays(file: Any, _: str) -> None:
    del file.attrs["schema"]
    kind = h5py.h5t.array_create(h5py.h5t.NATIVE_INT64, (8000,))
    space = h5py.h5s.create(h5py.h5s.SCALAR)
    h5py.h5a.create(file.id, b"schema", kind, space).write(np.zeros(8000, np.int64), mtype=kind)


def attribute_without_value(file: Any, _: str) -> None:
    file.attrs["kind"] = h5py.Empty("f8")


def attribute_that_refers(file: Any, _: str) -> None:
    file.attrs.create("kind", file.ref, dtype=h5py.ref_dtype)


def attribute_of_another_type(file: Any, _: str) -> None:
    file.attrs["schema"] = "2" * 60_000


def circle_of_groups(file: Any, _: str) -> None:
    """Add something that readers ignore, which is valid."""
    file.create_group("around")["around"] = file["/"]


def groups_without_end(file: Any, _: str) -> None:
    """Add something that readers ignore, which is valid."""
    group = file
    for _i in range(500):
        group = group.create_group("deeper")


def label_of_many(file: Any, _: str) -> None:
    if "label" in file:
        del file["label"]
    file.create_dataset("label", data=["a"] * len(file["id"]), dtype=h5py.string_dtype())
    file["label"][-1] = "b"


def ids_that_are_no_names(file: Any, _: str) -> None:
    file["id"][0] = "a\nb\x1b[2J"


def empty_pieces(file: Any, _: str) -> None:
    """Write almost empty compressed chunks, on which HDF5 filters may crash."""
    for maps in file["maps"].values() if "maps" in file else ():
        maps.id.write_direct_chunk((0, 0, 0), b"x")


def ids_of_one_long_text(path: Path, _: Sound) -> None:
    """Make every row refer to the same megabyte of the heap."""
    content, start = _with_ids_in_the_heap(path, ["x" * 10**6, *"y" * 1999])
    content[start : start + 16 * 2000] = bytes(content[start : start + 16]) * 2000
    path.write_bytes(content)


def ids_outside_the_heap(path: Path, _: Sound) -> None:
    """Declare a row as text of four gigabytes, which HDF5 allocates before it reads."""
    content, start = _with_ids_in_the_heap(path, ["a", "b"])
    content[start : start + 16] = b"\xff" * 16
    path.write_bytes(content)


def _with_ids_in_the_heap(path: Path, ids: list[str]) -> tuple[bytearray, int]:
    """Return the content of a file and the offset of the references to its ids."""
    with h5py.File(path, "r+") as file:
        del file["id"]
        file.create_dataset("id", data=ids, dtype=h5py.string_dtype())
        start = file["id"].id.get_offset()
    return bytearray(path.read_bytes()), start


def attribute_outside_the_heap(path: Path, _: Sound) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["schema"] = "x" * 5
    content = bytearray(path.read_bytes())
    at = content.rindex(b"schema\0")
    at = content.index((5).to_bytes(4, "little"), at + 40)
    content[at : at + 4] = b"\xff" * 4
    path.write_bytes(content)


def _filter(number: int) -> Trick:
    def unknown_filter(path: Path, sound: Sound) -> None:
        """Declare a column as compressed by a filter that only a plugin could provide."""
        name = _column(sound)
        with h5py.File(path, "r+") as file:
            values = file[name][()]
            del file[name]
            file.create_dataset(name, data=values, compression="gzip", chunks=values.shape)
        content = path.read_bytes()
        at = content.rindex(b"deflate") - 8
        path.write_bytes(content[:at] + number.to_bytes(2, "little") + content[at + 2 :])

    return unknown_filter


def a_link_to_a_device(path: Path, _: Sound) -> None:
    path.write_bytes(path.read_bytes()[:512])


TRICKS: list[Trick] = [
    *(
        _inside(_instead(make))
        for make in (
            external_link,
            external_link_to_itself,
            soft_link,
            soft_link_in_a_circle,
            hard_link_to_the_root,
            values_outside,
            virtual,
            virtual_without_end,
            chunks_never_written,
            never_written,
            packed_zeros,
            compact,
            no_space,
            one_value,
            other_order_of_bytes,
            references,
            lists_of_any_length,
            texts_of_one_size,
            records,
            no_rows,
        )
    ),
    *(
        _inside(_instead(make, "id"))
        for make in (
            external_link,
            chunks_never_written,
            no_space,
            references,
            lists_of_any_length,
            texts_of_one_size,
            records,
            no_rows,
            hard_link_to_the_root,
        )
    ),
    *(
        _inside(change)
        for change in (
            many_attributes,
            attributes_of_many_texts,
            attribute_of_arrays,
            attribute_without_value,
            attribute_that_refers,
            attribute_of_another_type,
            circle_of_groups,
            groups_without_end,
            label_of_many,
            ids_that_are_no_names,
            empty_pieces,
        )
    ),
    ids_of_one_long_text,
    ids_outside_the_heap,
    attribute_outside_the_heap,
    _filter(32015),
    _filter(305),
    _filter(40_000),
    a_link_to_a_device,
]
