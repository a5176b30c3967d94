"""Image sets in memory and on disk: channels, levels, batches, and damaged or missing files."""

import dataclasses
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from polyseg.config import DataConfig, load_config
from polyseg.data.dataset import arrays_as_set, make_demo
from polyseg.data.loading import load_images, load_others
from polyseg.data.order import epoch_order
from polyseg.data.pixel_store import index_of
from polyseg.data.training_batches import training_batches
from polyseg.errors import PolysegError
from polyseg.system.seeds import permutation


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folder(tmp_path):
    generator = np.random.default_rng(0)
    for i in range(5):
        save(tmp_path / f"images/case {i}.png", generator.integers(0, 256, (20, 30), np.uint8))
        mask = np.zeros((20, 30), np.uint8)
        mask[4:12, 5 : 10 + i] = 255
        save(tmp_path / f"masks/case {i}.png", mask)
    return tmp_path


def test_each_image_is_normalised_by_its_own_levels(folder):
    images = load_images(DataConfig(path=str(folder), size=(16, 32)))
    assert images.sizes() == {(16, 32)} and images.channels == 1 and images.has_masks
    for identity in images.ids:
        image, masks = images.sample(identity)
        assert image.shape == (1, 16, 32) and masks.shape == (1, 16, 32)
        assert image.mean().abs() < 1e-5
        assert image.std(correction=0) == pytest.approx(1, abs=1e-4)
    unit = load_images(DataConfig(path=str(folder), normalise="unit")).sample("case 0")[0]
    assert unit.min() >= 0 and unit.max() <= 1


def test_item_holds_the_properties_of_an_image(folder):
    images = load_images(DataConfig(path=str(folder), size=None))
    item = images.item("case 2")
    assert (item.size, item.channels, item.bits, item.part, item.spacing) == (
        (20, 30),
        1,
        8,
        None,
        None,
    )
    assert item.foreground == pytest.approx(8 * 7 / 600)


def test_gray_images_become_colour_in_a_mixed_set(folder):
    save(folder / "images/colour.png", np.zeros((20, 30, 3), np.uint8))
    save(folder / "masks/colour.png", np.zeros((20, 30), np.uint8))
    images = load_images(DataConfig(path=str(folder)))
    assert images.channels == 3
    assert all(images.sample(identity)[0].shape[0] == 3 for identity in images.ids)
    with pytest.raises(PolysegError, match="1 and 3 channels, such as colour; expected 1 in each"):
        load_others(folder, DataConfig(), channels=1)
    (folder / "images/colour.png").unlink()
    (folder / "masks/colour.png").unlink()
    assert load_others(folder, DataConfig(), channels=3).channels == 3


def test_incompatible_channel_numbers_are_refused():
    pixels = [np.zeros((8, 8, 2), np.uint8), np.zeros((8, 8, 3), np.uint8)]
    with pytest.raises(PolysegError, match="2 and 3 channels, such as a; expected 3 in each"):
        arrays_as_set(["a", "b"], pixels, [None, None], DataConfig())


def test_other_images_can_be_loaded_without_masks(folder):
    for path in (folder / "masks").iterdir():
        path.unlink()
    (folder / "masks").rmdir()
    images = load_others(folder, DataConfig(), channels=1)
    assert len(images.ids) == 5 and not images.has_masks
    assert next(iter(images.batches(images.ids, 2))).masks is None


def test_error_names_every_unreadable_file(folder):
    save(folder / "masks/case 0.png", np.full((20, 30), 7, np.uint8))
    save(folder / "masks/case 2.png", np.zeros((9, 9), np.uint8))
    (folder / "images/case 4.png").write_text("x")
    (folder / "masks/case 3.png").unlink()
    with pytest.raises(PolysegError) as caught:
        load_images(DataConfig(path=str(folder)))
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert "case 3" in lines[0]
    assert "case 2.png: is 9 x 9, its image case 2.png 20 x 30" in lines[1]
    assert "case 4.png" in lines[2]
    assert "case 0.png: masks contain the values 7 (100 %)" in lines[3]


def test_batches_keep_order_and_never_mix_sizes():
    sizes = [4, 4, 4, 8, 8, 4]
    images = arrays_as_set(
        list("abcdef"),
        [np.full((size, size, 1), i, np.uint8) for i, size in enumerate(sizes)],
        [np.ones((size, size), np.uint8) for size in sizes],
        DataConfig(normalise="unit"),
    )
    batches = list(images.batches(list("abcdef"), 2))
    assert [batch.ids for batch in batches] == [["a", "b"], ["c"], ["d", "e"], ["f"]]
    assert batches[0].masks.shape == (2, 1, 4, 4)


def test_dataset_levels_equal_numpy_over_all_pixels(folder):
    images = load_images(DataConfig(path=str(folder), size=None, normalise="dataset"))
    pooled = images.pooled_over(images.ids[:3])
    pixels = np.stack([images.pixels(identity) for identity in images.ids[:3]]).astype(float)
    np.testing.assert_allclose(pooled.offset, pixels.mean())
    np.testing.assert_allclose(pooled.scale, pixels.std())


# ---- on disk


def test_images_on_disk_equal_images_in_memory(folder, tmp_path):
    settings = {"path": str(folder), "size": 32, "cache": str(tmp_path / "cache")}
    memory = load_images(DataConfig(**settings))
    assert not (tmp_path / "cache").exists()
    disk = load_images(DataConfig(**settings, memory=0))
    assert disk.items == memory.items
    for seed in range(2):
        batches = [
            list(training_batches(one, one.ids, batch_size=2, seed=seed, epoch=1, workers=seed))
            for one in (memory, disk)
        ]
        for (ids, images, masks), (others, again, same) in zip(*batches, strict=True):
            assert ids == others and torch.equal(images, again) and torch.equal(masks, same)


def test_cache_file_is_reused_until_settings_or_images_change(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"

    def load(**more):
        settings = {"path": str(folder), "size": 32, "cache": str(cache), "memory": 0}
        return load_images(DataConfig(**settings | more))

    def files():
        return sorted(path.name for path in cache.glob("*.images"))

    first = load()
    assert len(files()) == 1
    stamp = (cache / files()[0]).stat().st_mtime_ns
    assert load().items == first.items
    assert (cache / files()[0]).stat().st_mtime_ns == stamp
    load(size=16)
    assert len(files()) == 2
    save(folder / "images/case 0.png", np.full((20, 30), 3, np.uint8))
    changed = load()
    assert len(files()) == 3
    assert changed.item("case 0").likeness != first.item("case 0").likeness
    assert int(changed.pixels("case 0").max()) == 3


def test_order_of_tasks_gives_another_cache_file(folder, tmp_path):
    """The channels of the masks follow the order of the tasks."""
    mask = np.zeros((20, 30), np.uint8)
    mask[:3, :3], mask[9:, 9:] = 1, 2
    for i in range(5):
        save(folder / f"masks/case {i}.png", mask)
    sums = []
    for tasks in ({"one": 1, "two": 2}, {"two": 2, "one": 1}):
        config = DataConfig(
            path=str(folder), size=None, foreground=tasks, memory=0, cache=str(tmp_path / "cache")
        )
        masks = load_images(config).masks("case 0")
        sums.append(masks.sum(axis=(1, 2)).tolist())
    assert sums == [[9, 11 * 21], [11 * 21, 9]]


def test_files_of_killed_runs_are_removed(folder, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in ((".partial-old.images", 25 * 3600), (".partial-new.images", 60)):
        (cache / name).touch()
        os.utime(cache / name, (time.time() - age,) * 2)
    load_images(DataConfig(path=str(folder), memory=0, cache=str(cache)))
    assert [path.name for path in cache.glob(".partial*")] == [".partial-new.images"]


def test_cache_files_unused_for_a_month_are_removed(folder, tmp_path, caplog):
    cache = tmp_path / "cache"

    def load(size):
        load_images(DataConfig(path=str(folder), size=size, memory=0, cache=str(cache)))
        return {path.stem for path in cache.glob("*.images")}

    def age(name, days):
        for path in (cache / f"{name}.images", cache / f"{name}.json"):
            os.utime(path, (time.time() - 24 * 3600 * days,) * 2)

    first = load(16).pop()
    age(first, 29)
    second = (load(32) - {first}).pop()
    age(first, 31)
    age(second, 31)
    (cache / "mine.images").write_text("x")
    os.utime(cache / "mine.images", (0, 0))
    # Reading a file counts as use, whenever it was written.
    assert load(16) == {first, "mine"}
    assert load(16) == {first, "mine"}
    assert {path.stem for path in cache.glob("*.json")} == {first}
    assert load(32) == {first, second, "mine"}


def test_task_without_foreground_is_named(folder, polyseg, tmp_path):
    for i in range(5):
        mask = np.zeros((20, 30), np.uint8)
        mask[:3, : 3 + i] = 1
        save(folder / f"masks/case {i}.png", mask)
    flags = ("--data", folder, "--dry-run", "--set", "data.foreground={here: 1, gone: 7}")
    answer = polyseg("train", *flags)
    assert answer.code == 2 and "no training mask has any foreground of gone" in answer.err


def test_unreadable_image_leaves_no_partial_cache(folder, tmp_path):
    (folder / "images/case 4.png").write_text("x")
    with pytest.raises(PolysegError, match=r"case 4\.png"):
        load_images(DataConfig(path=str(folder), memory=0, cache=str(tmp_path / "cache")))
    assert list((tmp_path / "cache").iterdir()) == []


def test_location_of_images_is_logged(folder, polyseg, tmp_path):
    from tests.conftest import TINY

    settings = [part for one in (*TINY, "output.figures=false") for part in ("--set", one)]
    place = ("--set", f"data.cache={tmp_path / 'cache'}", "--set", "data.memory=0")
    said = polyseg(
        "train", "--data", folder, "--out", tmp_path / "run", "--epochs", 1, *settings, *place
    )
    assert said.code == 0 and "over data.memory (0 MB): read from" in said.err


def test_demo_refuses_several_labels():
    with pytest.raises(PolysegError, match="the demo's masks are 0/1"):
        load_images(load_config(overrides=["data.foreground=[1, 2]"]).data)


def test_order_of_an_epoch_is_computed_without_images():
    images = make_demo(DataConfig(demo_images=8, size=32))
    order = {"batch_size": 3, "seed": 4}
    for epoch in (1, 2):
        batches = training_batches(images, images.ids, epoch=epoch, **order)
        assert [names for names, _, _ in batches] == epoch_order(images.ids, epoch=epoch, **order)
    first, second = (epoch_order(images.ids, epoch=epoch, **order) for epoch in (1, 2))
    assert first != second
    assert sorted(name for batch in first for name in batch) == sorted(images.ids)


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1, 2**32 + 3, 2**62 + 12345])
def test_permutation_equals_torch_randperm(seed):
    """The image order of all earlier runs depends on it."""
    for n in (0, 1, 2, 3, 17, 1000, 20_000):
        expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
        assert permutation(n, seed) == expected.tolist()


def test_phantoms_larger_than_memory_are_refused(polyseg):
    said = polyseg(
        "train", "--dry-run", "--set", "data.demo_images=100000", "--set", "data.size=8192"
    )
    assert said.code == 2
    assert "data.demo_images: 100,000 images of 8192 x 8192, with masks, take " in said.err
    assert "take 13,421.8 GB, and this machine has" in said.err


# ---- files that are removed or changed during a run


def batches_of(images, workers):
    return training_batches(images, images.ids, batch_size=2, seed=0, epoch=1, workers=workers)


@pytest.fixture
def on_disk(folder, tmp_path):
    settings = {"path": str(folder), "size": 32, "cache": str(tmp_path / "cache")}
    return load_images(DataConfig(**settings, memory=0))


@pytest.mark.parametrize("workers", [0, 1])
def test_open_cache_file_stays_readable_after_removal(on_disk, workers):
    expected = list(batches_of(on_disk, 0))
    for path in (on_disk.store.path, index_of(on_disk.store.path)):
        path.unlink()
    for (ids, images, masks), (others, again, same) in zip(
        expected, batches_of(on_disk, workers), strict=True
    ):
        assert ids == others and torch.equal(images, again) and torch.equal(masks, same)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: os.truncate(path, 0),
        lambda path: os.truncate(path, path.stat().st_size - 1),
        lambda path: path.open("r+b").write(b"other"),
    ],
)
def test_changed_cache_file_is_refused_in_one_line(on_disk, change, workers):
    path = on_disk.store.path
    change(path)
    with pytest.raises(PolysegError, match=r"a checksum differs.*remove it") as caught:
        list(batches_of(on_disk, workers))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_missing_cache_file_is_refused_in_one_line(on_disk, workers):
    """A worker process opens the file only after it has received the images."""
    images = pickle.loads(pickle.dumps(on_disk))
    on_disk.store.path.unlink()
    with pytest.raises(PolysegError, match=r"\.images: cannot be read: No such file") as caught:
        list(batches_of(images, workers))
    assert "\n" not in str(caught.value)


def test_damaged_cache_file_ends_a_run_with_workers_in_one_line(folder, polyseg, tmp_path):
    """The file is damaged between two runs; its name and size stay."""
    from tests.conftest import TINY

    settings = [*TINY, "output.figures=false", "data.memory=0", f"data.cache={tmp_path / 'cache'}"]
    flags = [part for one in settings for part in ("--set", one)]

    def run(name):
        place = ("--out", tmp_path / name, "--epochs", 1, "--set", "training.workers=1")
        return polyseg("train", "--data", folder, *place, *flags)

    assert run("first").code == 0
    (path,) = (tmp_path / "cache").glob("*.images")
    path.write_bytes(bytes(path.stat().st_size))
    said = run("second")
    errors = [line for line in said.err.splitlines() if "error" in line]
    assert said.code == 2 and "Traceback" not in said.err
    assert len(errors) == 1 and f"{path}: is not a file of decoded images" in errors[0]


# ---- workers that run into system limits


class FailingStore:
    """A store that calls a given function, which fails."""

    def __init__(self, store, fail):
        self.store, self.fail = store, fail

    def get(self, i):
        self.fail()
        return self.store.get(i)


def failing(fail):
    images = make_demo(DataConfig(demo_images=8, size=32))
    return dataclasses.replace(images, store=FailingStore(images.store, fail))


def too_large():
    return torch.empty(10**15)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("workers", [0, 1])
def test_out_of_memory_for_a_batch_is_one_line(workers):
    with pytest.raises(PolysegError, match=r"^reading .* ran out of memory; lower .*workers"):
        list(batches_of(failing(too_large), workers))


def test_killed_worker_is_reported_in_one_line():
    with pytest.raises(PolysegError, match=r"^training\.workers: .*; lower training\.workers"):
        list(batches_of(failing(die), 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_programming_error_keeps_its_traceback(workers):
    def wrong():
        raise KeyError("no such thing")

    with pytest.raises(KeyError, match="no such thing"):
        list(batches_of(failing(wrong), workers))


_FEW_FILES = """
import pathlib
import resource
import sys
import torch
from polyseg.config import DataConfig
from polyseg.data.dataset import make_demo
from polyseg.data.training_batches import training_batches
from polyseg.data.loading import load_images, read_cases
from polyseg.data.layouts.cases import Case
from polyseg.errors import PolysegError
from polyseg.system.files import write_text

folder = pathlib.Path(sys.argv[1])
cases = [Case("case 0", [folder / "images/case 0.png"], [folder / "masks/case 0.png"])]
read_cases(cases, DataConfig())
images = make_demo(DataConfig(demo_images=16, size=32))
settings = dict(batch_size=2, seed=0, epoch=1)
expected = list(training_batches(images, images.ids, **settings))


def read(workers, soft, hard, spare=None):
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    held = []
    try:
        while spare is not None:
            held.append(open("/dev/null"))
    except OSError:
        del held[len(held) - (spare or 0):]
    try:
        found = list(training_batches(images, images.ids, workers=workers, **settings))
        same = [a == b and torch.equal(x, y) for (a, x, _), (b, y, _) in zip(found, expected)]
        said = "same" if all(same) and len(found) == len(expected) else "other"
    except PolysegError as error:
        said = str(error)
    del held
    print(said, "/", resource.getrlimit(resource.RLIMIT_NOFILE)[0])


read(2, 4096, 4096)
read(2, 50, 4096)
read(2, 64, 64, spare=8)
read(2, 64, 64, spare=0)
read(0, 64, 64, spare=0)
held = []
try:
    while True:
        held.append(open("/dev/null"))
except OSError:
    pass
for action in (
    lambda: read_cases(cases, DataConfig()),
    lambda: load_images(DataConfig(path=str(folder))),
    lambda: write_text(folder / "note.txt", "x"),
):
    try:
        action()
    except PolysegError as error:
        print(error)
"""


@pytest.mark.slow
def test_limit_of_open_files_is_raised_or_reported_in_one_line(folder):
    """The soft limit is raised if the hard limit allows it; otherwise no worker hangs."""
    done = subprocess.run(
        [sys.executable, "-c", _FEW_FILES, folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    enough, raised, refused, none_left, none_wanted, *others = done.stdout.splitlines()
    assert enough == "same / 4096"
    assert raised.startswith("same / ") and 50 < int(raised.split()[-1]) < 300
    number = r"training\.workers: 2 need [0-9]+ open files, and 64 are allowed; lower it, .* / 64"
    assert re.fullmatch(number, refused)
    assert none_left.startswith("training.workers: Too many open files; raise `ulimit -n`, or ")
    assert none_wanted == "same / 64"
    assert len(others) == 3
    assert all("Too many open files; raise `ulimit -n`, or lower" in line for line in others)
    places = [str(folder / name) for name in ("images/case 0.png", "", "note.txt")]
    assert all(line.startswith(place) for line, place in zip(others, places, strict=True))
