"""Durable files: whole or not at all, and one writer."""

import hashlib
import os
import subprocess
import sys

import pytest

from polyseg.errors import PolysegError
from polyseg.files import atomic_path, exclusive_lock, sha256_of_file, write_text


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first")
    write_text(path, "zweites, größer")
    assert path.read_text(encoding="utf-8") == "zweites, größer"
    assert list(path.parent.iterdir()) == [path]
    assert sha256_of_file(path) == hashlib.sha256("zweites, größer".encode()).hexdigest()


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    write_text(path, "old")

    class Stop(Exception):
        pass

    with pytest.raises(Stop), atomic_path(path) as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("torn")
        raise Stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_one_line(tmp_path):
    message = "cannot be written: No space left"
    with pytest.raises(PolysegError, match=message), atomic_path(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PolysegError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_files_are_as_readable_as_any_other(tmp_path):
    umask = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_one_writer_and_a_dead_one_is_none(tmp_path):
    lock = tmp_path / ".lock"
    code = (
        "import os, sys; from pathlib import Path; from polyseg.files import exclusive_lock\n"
        "with exclusive_lock(Path(sys.argv[1]), owner='x'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    message = "this run is being written by another process"
    with pytest.raises(PolysegError, match=message), exclusive_lock(lock, owner="this run"):
        pass
    holder.kill()
    holder.communicate()
    with exclusive_lock(lock, owner="this run"):
        pass
