"""Images in memory and in a file: equal pixels, and refusal of damaged files."""

import json
import multiprocessing
import pickle

import numpy as np
import pytest

from polyseg.data.pixel_store import DTYPES, DiskStore, index_of, writing_store
from polyseg.errors import PolysegError


def some_images():
    generator = np.random.default_rng(0)
    for i, dtype in enumerate(DTYPES):
        image = (generator.random((5 + i, 7, 1 + i % 3)) * 200).astype(dtype)
        masks = generator.integers(0, 2, (2, 5 + i, 7), np.uint8) if i % 2 else None
        yield image, masks


@pytest.fixture
def path(tmp_path):
    place = tmp_path / "deep" / "a.images"
    with writing_store(place) as writer:
        for i, (image, masks) in enumerate(some_images()):
            writer.add(image, masks, {"id": f"i{i}"})
    return place


def check(store):
    for i, (image, masks) in enumerate(some_images()):
        kept, kept_masks = store.get(i)
        np.testing.assert_array_equal(kept, image)
        assert kept.dtype == image.dtype
        if masks is None:
            assert kept_masks is None
        else:
            np.testing.assert_array_equal(kept_masks, masks)


def test_stored_images_round_trip(path):
    store = DiskStore(path)
    check(store)
    check(pickle.loads(pickle.dumps(store)))
    assert store.about == [{"id": f"i{i}"} for i in range(4)]


def test_several_processes_can_read_one_file(path):
    store = DiskStore(path)
    with multiprocessing.get_context("fork").Pool(2) as pool:
        sums = pool.map(_sum, [(store, i % 4) for i in range(40)])
    assert sums == [float(store.get(i % 4)[0].sum()) for i in range(40)]


def _sum(task):
    store, i = task
    return float(store.get(i)[0].sum())


def test_error_while_writing_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), writing_store(tmp_path / "a.images") as writer:
        writer.add(np.ones((2, 2, 1), np.uint8), None, {})
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_flipped_bit_is_detected(path):
    values = bytearray(path.read_bytes())
    values[3] ^= 1
    path.write_bytes(values)
    store = DiskStore(path)
    with pytest.raises(PolysegError, match=r"a checksum differs.*remove it"):
        store.get(0)
    store.get(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: rows[0]["shape"].update(height=10**9),
        lambda rows: rows[0]["shape"].update(height=-5),
        lambda rows: rows[0]["shape"].update(height="5"),
        lambda rows: rows[0]["shape"].update(dtype="object"),
        lambda rows: rows[0]["shape"].update(more=1),
        lambda rows: rows[0].pop("checksum"),
        lambda rows: rows.pop(),
        lambda rows: rows.append(3),
    ],
)
def test_invalid_index_is_refused_in_one_line(path, change):
    rows = json.loads(index_of(path).read_text())
    change(rows)
    index_of(path).write_text(json.dumps(rows))
    with pytest.raises(
        PolysegError, match=r"is not a file of decoded images .*remove it"
    ) as caught:
        DiskStore(path)
    assert "\n" not in str(caught.value)


def test_missing_index_or_truncated_file_is_one_line(path):
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(PolysegError, match="its size is not that of its images"):
        DiskStore(path)
    index_of(path).unlink()
    with pytest.raises(PolysegError, match=r"cannot be read: No such file .*writes it again"):
        DiskStore(path)
