"""Durable files: atomic writes, and one writer at a time."""

import csv
import errno
import hashlib
import io
import os
import subprocess
import sys

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from polyseg.commands.schedule import read_record
from polyseg.commands.train import train
from polyseg.config import load_config
from polyseg.data.formats.readers import read_image_stack, read_label_stack
from polyseg.data.layouts.find_cases import find_cases
from polyseg.data.layouts.manifest import read_manifest
from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms
from polyseg.errors import PolysegError
from polyseg.figures.style import save_figure
from polyseg.runs.checkpoints import read_checkpoint, write_checkpoint
from polyseg.runs.record_files import (
    read_assessment,
    read_schedule,
    write_assessment,
    write_schedule,
)
from polyseg.runs.run_folder import RunDirectory, find_checkpoint, results_beside
from polyseg.runs.trained_model import Inputs, images_for, open_model
from polyseg.system import files
from polyseg.system.files import (
    atomic_path,
    csv_rows,
    csv_table,
    exclusive_lock,
    keep_as,
    read_text,
    sha256_of_file,
    write_text,
)

from .conftest import TINY


def test_write_replaces_the_whole_file(tmp_path):
    path = tmp_path / "new" / "a.txt"
    write_text(path, "first")
    write_text(path, "zweites, größer")
    assert path.read_text(encoding="utf-8") == "zweites, größer"
    assert list(path.parent.iterdir()) == [path]
    assert sha256_of_file(path) == hashlib.sha256("zweites, größer".encode()).hexdigest()


def test_error_keeps_the_old_file_and_leaves_no_temporary(tmp_path):
    path = tmp_path / "a.csv"
    write_text(path, "old")

    class Stop(Exception):
        pass

    with pytest.raises(Stop), atomic_path(path) as temporary:
        assert temporary.suffix == ".csv"
        temporary.write_text("torn")
        raise Stop
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_full_disk_is_reported_in_one_line(tmp_path):
    message = "cannot be written: No space left"
    with pytest.raises(PolysegError, match=message), atomic_path(tmp_path / "a"):
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_file_in_place_of_a_folder_is_reported_in_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PolysegError, match="cannot be written"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_files_get_permissions_by_umask(tmp_path):
    umask = os.umask(0o022)
    try:
        write_text(tmp_path / "a", "")
    finally:
        os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_lock_allows_one_writer_and_is_released_by_a_killed_one(tmp_path):
    lock = tmp_path / ".lock"
    code = (
        "import os, sys; from pathlib import Path\n"
        "from polyseg.system.files import exclusive_lock\n"
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


def test_keep_as_works_with_links_and_with_copies(tmp_path, monkeypatch):
    """Copies are used where the file system has no hard links."""
    for number, link in enumerate((files.disk.link, refused)):
        monkeypatch.setattr(files.disk, "link", link)
        last, previous = tmp_path / f"last{number}", tmp_path / f"previous{number}"
        write_text(last, "first")
        for _ in range(2):  # The second time both are the same file, or equal files.
            keep_as(last, previous)
        write_text(last, "second")
        assert (last.read_text(), previous.read_text()) == ("second", "first")
        keep_as(last, previous)
        assert previous.read_text() == "second"
    assert len(list(tmp_path.iterdir())) == 4


def refused(*_):
    raise OSError(errno.EPERM, "no second names here")


def test_missing_file_locks_give_a_warning(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", flock)
    with exclusive_lock(tmp_path / ".lock", owner="this"):
        assert "does not support locks (No locks available)" in caplog.text


def test_new_folders_and_their_parents_are_flushed(tmp_path, monkeypatch):
    flushed = []
    flush = files.disk.flush
    monkeypatch.setattr(files.disk, "flush", lambda path: (flushed.append(path), flush(path)))
    write_text(tmp_path / "a" / "b" / "c.txt", "")
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= set(flushed)


def is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


@given(st.text("'=+-@\t\r\n1e.,;\"a", max_size=8))
@example("=1+1")
@example("'=1+1")
@example("-0.5")
@example("\tx")
def test_formula_cells_are_escaped_reversibly(name):
    text = csv_table(["id", name], [[name, -0.5]])
    (head, row) = csv.reader(io.StringIO(text, newline=""))
    (cell, value) = row
    assert head == ["id", cell] and float(value) == -0.5
    assert is_number(cell) or not cell.startswith(("=", "+", "-", "@", "\t", "\r", "\n"))
    assert csv_rows(text) == [["id", name], [name, "-0.5"]]


@pytest.mark.parametrize("cell", ["-0.5", "+3", "-1e-07", -0.5, "-inf", "nan", "a=b", "", 7, None])
def test_numbers_and_plain_text_are_not_escaped(cell):
    assert csv_table(["a", "b"], [[0, cell]]) == f"a,b\n0,{'' if cell is None else cell}\n"


def test_public_functions_accept_paths_as_strings(tmp_path):
    settings = load_config(overrides=[*TINY, "training.epochs=1", "output.figures=false"])
    run = tmp_path / "run"
    place = settings.output.model_copy(update={"path": str(run)})
    train(settings.model_copy(update={"output": place}))
    assessment = run / "uncertainty/epoch_0001.h5"
    phantoms = tmp_path / "phantoms"
    write_phantoms(str(phantoms), make_phantoms(2, size=(16, 16)))
    image = next((phantoms / "images").iterdir())
    (phantoms / "list.csv").write_text(f"image,mask\n{image},{image}\n")
    model = open_model(run, "cpu", False)
    readers = [
        (read_assessment, assessment),
        (read_schedule, run / "schedule.h5"),
        (read_checkpoint, run / "checkpoints/last.safetensors"),
        (find_checkpoint, run),
        (load_config, run / "config.yaml"),
        (lambda path: RunDirectory(path).read_split(), run),
        (lambda path: open_model(path, "cpu", False).source, run),
        (lambda path: images_for(model, Inputs(path), "all")[1], phantoms),
        (lambda path: results_beside(path, "x").parent, run),
        (read_record, run),
        (read_image_stack, image),
        (read_label_stack, image),
        (find_cases, phantoms),
        (read_manifest, phantoms / "list.csv"),
        (sha256_of_file, image),
        (read_text, run / "split.json"),
    ]
    for read, path in readers:
        assert type(read(str(path))) is type(read(path)), read
    writers = [
        (write_assessment, read_assessment(assessment)),
        (write_schedule, read_schedule(run / "schedule.h5")),
        (write_checkpoint, read_checkpoint(run / "checkpoints/last.safetensors")),
        (write_text, "text"),
    ]
    for number, (write, value) in enumerate(writers):
        write(str(tmp_path / f"{number}"), value)
        assert (tmp_path / f"{number}").is_file(), write
    save_figure(Figure(), str(tmp_path / "figure.png"))
    assert (tmp_path / "figure.png").is_file()


def test_flush_waits_for_files_and_folders(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda one: flushed.append(os.fstat(one).st_ino))
    (tmp_path / "file").write_text("a")
    for place in (tmp_path / "file", tmp_path):
        files.disk.flush(place)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]
