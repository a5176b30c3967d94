"""Memory limits, and division of work that does not fit."""

import errno
import logging
import weakref

import numpy as np
import pytest
import torch

from polyseg.errors import PolysegError
from polyseg.system import memory
from polyseg.system.memory import (
    Portions,
    explaining_memory,
    is_out_of_memory,
    memory_of,
    refuse_beyond_memory,
)


def error_of(action):
    with pytest.raises(Exception) as caught:
        action()
    return caught.value


def test_out_of_memory_errors_of_all_libraries_are_recognised():
    petabytes = 10**15
    for real in (
        lambda: torch.empty(petabytes),
        lambda: np.empty(petabytes),
        lambda: bytearray(petabytes),
    ):
        assert is_out_of_memory(error_of(real))
    for said in (
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("could not create a memory object"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("MPS backend out of memory (MPS allocated: 9.05 GB)"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ):
        assert is_out_of_memory(said)


def test_other_errors_are_not_out_of_memory():
    sizes = error_of(lambda: torch.zeros(2) + torch.zeros(3))
    for other in (sizes, OSError(errno.ENOSPC, "full"), ValueError("out of memory"), KeyError()):
        assert not is_out_of_memory(other)
        with pytest.raises(type(other)), explaining_memory("training", "less"):
            raise other


def test_out_of_memory_is_one_line():
    with (
        pytest.raises(PolysegError, match=r"^training: ran out of memory; less$") as caught,
        explaining_memory("training", "less"),
    ):
        torch.empty(10**15)
    assert caught.value.__suppress_context__


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Return a function that writes control group files with a memory limit."""
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_GROUPS_OF_PROCESS", tmp_path / "own")

    def limit(own, name, value):
        (tmp_path / "own").write_text(own)
        place = tmp_path / "groups" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(value)

    return limit


@pytest.mark.parametrize(
    ("own", "name"),
    [
        ("0::/\n", "memory.max"),
        ("0::/jobs/7/step\n", "jobs/7/memory.max"),
        ("9:memory:/docker/a\n1:cpu:/\n", "memory/memory.limit_in_bytes"),
        ("9:memory:/docker/a\n", "memory/docker/a/memory.limit_in_bytes"),
    ],
)
def test_control_group_limits_available_memory(groups, own, name):
    free = memory_of()
    groups(own, name, "1000000\n")
    assert memory_of() == 1_000_000
    groups(own, name, "max\n")
    assert memory_of() == free


def test_control_group_of_other_processes_is_ignored(groups):
    free = memory_of()
    groups("0::/jobs/7\n", "jobs/8/memory.max", "1000")
    assert memory_of() == free


def test_data_larger_than_memory_are_refused(groups):
    groups("0::/\n", "memory.max", "3000000000")
    refuse_beyond_memory(3_000_000_000, "images", "fewer")
    with pytest.raises(PolysegError) as caught:
        refuse_beyond_memory(12_340_000_000, "images", "fewer")
    assert str(caught.value) == "images take 12.3 GB, and this machine has 3.0 GB; fewer"


def work_on(most, seen):
    def work(rows):
        seen.append((rows.start, rows.stop))
        if rows.stop - rows.start > most:
            raise MemoryError
        return list(range(rows.start, rows.stop))

    return work


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 2, 3, 7, 20])
def test_work_is_done_once_and_in_order(most):
    portions = Portions("example", "less")
    for count in (7, 9, 1):
        done = [i for part in portions.run(count, work_on(most, []), "one") for i in part]
        assert done == list(range(count))
    assert portions.most >= (most + 1) // 2


def test_size_that_did_not_fit_is_not_tried_again(caplog):
    portions, seen = Portions("example", "less"), []
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            list(portions.run(8, work_on(2, seen), "one"))
    assert seen[:3] == [(0, 8), (0, 4), (0, 2)]
    assert max(stop - start for start, stop in seen[3:]) == 2
    assert [r.message for r in caplog.records] == [
        "example: memory suffices for only 2 images at once"
    ]


def test_out_of_memory_for_one_image_is_one_line():
    runs = Portions("example", "use less").run(4, work_on(0, []), "an image of 8 x 9")
    with pytest.raises(
        PolysegError, match=r"^example: ran out of memory on an image of 8 x 9 alone; use less$"
    ):
        list(runs)


def test_other_errors_of_work_are_raised_unchanged():
    def work(_):
        raise RuntimeError("sizes")

    with pytest.raises(RuntimeError, match="sizes"):
        list(Portions("example", "less").run(4, work, "one"))


def test_failed_attempt_releases_memory(caplog):
    """Memory of a failed attempt is released before the next one begins."""
    made = []

    class Large:
        pass

    def work(rows):
        assert all(one() is None for one in made)
        held = Large()
        made.append(weakref.ref(held))
        if rows.stop - rows.start > 1:
            raise MemoryError(held)

    with caplog.at_level(logging.DEBUG):
        list(Portions("example", "less").run(4, work, "one"))
    assert len(made) == 6
