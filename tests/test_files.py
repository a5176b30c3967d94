"""Durable files: whole or not at all, and one writer."""

import errno
import hashlib
import os
import subprocess
import sys

import pytest

from polyseg import files
from polyseg.errors import PolysegError
from polyseg.files import atomic_path, exclusive_lock, keep_as, sha256_of_file, write_text


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


def test_an_older_file_is_kept_whichever_way_names_are_given(tmp_path, monkeypatch):
    """By second names, and by copies where the file system knows none."""
    for number, link in enumerate((files.disk.link, refused)):
        monkeypatch.setattr(files.disk, "link", link)
        last, previous = tmp_path / f"last{number}", tmp_path / f"previous{number}"
        write_text(last, "first")
        for _ in range(2):  # The second time both are the same file, or equal.
            keep_as(last, previous)
        write_text(last, "second")
        assert (last.read_text(), previous.read_text()) == ("second", "first")
        keep_as(last, previous)
        assert previous.read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 4


def refused(*_):
    raise OSError(errno.EPERM, "no second names here")


def test_where_there_are_no_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with exclusive_lock(tmp_path / ".lock", owner="this"):
        assert "knows no locks (No locks available)" in caplog.text


def test_new_folders_reach_the_disk_with_their_names(tmp_path, monkeypatch):
    flushed = []
    flush = files.disk.flush
    monkeypatch.setattr(files.disk, "flush", lambda path: (flushed.append(path), flush(path)))
    write_text(tmp_path / "a" / "b" / "c.txt", "")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(flushed)
