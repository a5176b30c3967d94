"""Output folders: complete or absent, and rules for replacing results."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from PIL import Image

from polyseg.data.phantoms.phantom_sets import make_phantoms, write_phantoms
from polyseg.errors import PolysegError
from polyseg.system import files
from polyseg.system.files import write_text
from polyseg.system.output_folder import (
    moved,
    refuse_existing,
    refuse_existing_figure,
    whole_folder,
)


def fill(path, text, **settings):
    """Write results of two files, one of them in a subfolder."""
    with whole_folder(path, **settings) as folder:
        write_text(folder / "summary.json", text)
        write_text(folder / "figures" / "a.png", text)


def names(path):
    """Return the sorted names in a folder."""
    return sorted(one.name for one in path.iterdir())


def contents(path):
    """Return the content of each file below a folder by its path."""
    return {str(one.relative_to(path)): one.read_text() for one in path.rglob("*") if one.is_file()}


def expected_files(text):
    return {"summary.json": text, "figures/a.png": text}


def refusal_of(path, **settings):
    """Return the error message for a folder without the path."""
    with pytest.raises(PolysegError) as caught, whole_folder(path, **settings):
        pass
    message = str(caught.value)
    assert "\n" not in message and message.startswith(f"{path}: "), message
    return message.removeprefix(f"{path}: ")


OURS = {"overwrite": True, "known_by": ("summary.json",)}


def test_folder_appears_when_the_block_ends(tmp_path):
    path = tmp_path / "new" / "out"
    with whole_folder(path) as folder:
        assert folder.parent == path.parent and folder.name == ".partial-out"
        write_text(folder / "a.txt", "a")
        assert not path.exists()
    assert contents(tmp_path) == {"new/out/a.txt": "a"}
    assert names(tmp_path / "new") == ["out"]


@pytest.mark.parametrize("ending", [ValueError, KeyboardInterrupt, SystemExit])
def test_early_end_leaves_no_files(tmp_path, ending):
    with pytest.raises(ending), whole_folder(tmp_path / "new" / "deep" / "out") as folder:
        write_text(folder / "figures" / "a.txt", "a")
        raise ending
    assert names(tmp_path) == []


def test_errors_name_the_requested_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(PolysegError, match=r"^out/a\.txt: is full$"),
        whole_folder(files.Path("out")) as folder,
    ):
        raise PolysegError(f"{folder}/a.txt: is full")


def test_empty_folder_keeps_its_mode(tmp_path):
    path = tmp_path / "out"
    path.mkdir()
    path.chmod(0o750)
    with pytest.raises(ValueError), whole_folder(path):
        raise ValueError
    assert path.is_dir() and names(tmp_path) == ["out"]
    fill(path, "new")
    assert contents(path) == expected_files("new") and path.stat().st_mode & 0o777 == 0o750


def test_existing_results_need_the_overwrite_flag(tmp_path):
    path = tmp_path / "out"
    fill(path, "old")
    assert "nothing is overwritten" in refusal_of(path)
    assert "or add --overwrite" in refusal_of(path, known_by=("summary.json",))
    assert "add --overwrite" not in refusal_of(path, known_by=("other.json",))
    assert contents(path) == expected_files("old")
    (path / "stale.txt").write_text("of the former run")
    fill(path, "new", **OURS)
    assert contents(path) == expected_files("new") and names(tmp_path) == ["out"]


def test_error_keeps_the_previous_results(tmp_path):
    path = tmp_path / "out"
    fill(path, "old")
    with pytest.raises(ValueError), whole_folder(path, **OURS) as folder:
        write_text(folder / "summary.json", "new")
        raise ValueError
    assert contents(path) == expected_files("old") and names(tmp_path) == ["out"]


@pytest.mark.parametrize("run", ["checkpoints/note.txt", "fold/checkpoints/a", "best.safetensors"])
def test_runs_and_foreign_files_are_never_overwritten(tmp_path, run):
    path = tmp_path / "out"
    write_text(path / "note.txt", "mine")
    assert "has no summary.json" in refusal_of(path, **OURS)
    write_text(path / "summary.json", "{}")
    write_text(path / run, "weights")
    assert "--overwrite removes no runs" in refusal_of(path, **OURS)
    assert "add --overwrite" not in refusal_of(path, known_by=OURS["known_by"])
    assert len(contents(path)) == 3 and names(tmp_path) == ["out"]


def test_files_written_during_the_block_are_kept(tmp_path):
    path = tmp_path / "out"
    with pytest.raises(PolysegError, match="is not empty"), whole_folder(path) as folder:
        write_text(folder / "a.txt", "late")
        write_text(path / "mine.txt", "early")
    assert contents(tmp_path) == {"out/mine.txt": "early"}


WRITER = """
import sys
from pathlib import Path
from polyseg.system.output_folder import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "torn").mkdir()
    (folder / "torn" / "a.txt").write_text("torn")
    (folder / "link").symlink_to(sys.argv[2])
    print("writing", flush=True)
    sys.stdin.read()
"""


def test_second_writer_is_refused_and_leftovers_are_removed(tmp_path):
    path, precious = tmp_path / "out", tmp_path / "precious"
    write_text(precious / "a.txt", "mine")
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, path, precious],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    with pytest.raises(PolysegError, match="out is being written by another process"):
        fill(path, "new")
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    assert (tmp_path / ".partial-out" / "torn").is_dir() and not path.exists()
    fill(path, "new")
    assert contents(path) == expected_files("new") and contents(precious) == {"a.txt": "mine"}
    assert names(tmp_path) == ["out", "precious"]


def test_file_system_without_locks_gives_a_warning(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", none)
    fill(tmp_path / "out", "new")
    assert "does not support locks" in caplog.text and contents(tmp_path / "out") == expected_files(
        "new"
    )


class Died(BaseException):
    """Raised in place of the death of the process."""


STEPS = {name for name in vars(files.Disk) if not name.startswith("_")}


class DyingDisk(files.Disk):
    """A disk whose process dies before one step; no later step takes effect."""

    def __init__(self, steps):
        self.left, self.dead = steps, False

    def __getattribute__(self, name):
        step = super().__getattribute__(name)
        if name not in STEPS:
            return step

        def taken(*arguments):
            if self.dead:
                return None
            self.left -= 1
            if self.left < 0:
                self.dead = True
                raise Died
            return step(*arguments)

        return taken


@pytest.mark.parametrize("former", [None, "old"])
def test_killed_at_any_step_leaves_old_or_new_folder_complete(tmp_path, monkeypatch, former):
    seen = set()
    for steps in range(100):
        path = tmp_path / str(steps) / "out"
        path.parent.mkdir()
        if former:
            fill(path, former)
        with monkeypatch.context() as patch:
            disk = DyingDisk(steps)
            patch.setattr(files, "disk", disk)
            with contextlib.suppress(Died):
                fill(path, "new", **OURS)
        # The next writer finds the leftovers and fails.
        with pytest.raises(ValueError), whole_folder(path, **OURS):
            raise ValueError
        found = contents(path)
        assert found in (expected_files(former) if former else {}, expected_files("new")), steps
        assert [one for one in names(path.parent) if one != "out"] == [], steps
        seen.add(found.get("summary.json"))
        if not disk.dead:
            break
    assert steps > 8 and seen == {former, "new"}


def test_full_disk_at_any_step_keeps_old_results(tmp_path, monkeypatch):
    path, steps = tmp_path / "out", 0
    fill(path, "old")
    for steps in range(100):
        with monkeypatch.context() as patch:
            patch.setattr(files, "disk", FullDisk(steps))
            try:
                fill(path, "new", **OURS)
                break
            except PolysegError as error:
                assert str(error).startswith(str(path)) and "No space left" in str(error)
                assert "\n" not in str(error) and ".partial" not in str(error)
        if contents(path) == expected_files("new"):
            break  # Only the flush of the final name has failed.
        assert contents(path) == expected_files("old") and names(tmp_path) == ["out"]
    assert steps > 8 and contents(path) == expected_files("new")


class FullDisk(files.Disk):
    """A disk that is full at one of the steps that need space."""

    def __init__(self, steps):
        self.left = steps

    def _spend(self):
        self.left -= 1
        if self.left == -1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def create(self, path):
        self._spend()
        return super().create(path)

    def flush(self, path):
        self._spend()
        super().flush(path)

    def rename(self, old, new):
        self._spend()
        super().rename(old, new)


def test_mount_points_and_working_folder_are_refused(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    assert "working folder" in refusal_of(files.Path())
    assert "is not empty" in refusal_of(files.Path(".."))
    assert "is not empty" in refusal_of(files.Path("/"))
    assert "has no summary.json" in refusal_of(files.Path("/"), **OURS)
    monkeypatch.setattr(files.Path, "is_mount", lambda self: self == tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    assert refusal_of(tmp_path / "disk") == "is a mount point; give a new folder in it"
    fill(tmp_path / "disk" / "out", "new")


def test_invalid_folder_names_are_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / ".partial-there").write_text("mine")
    (tmp_path / "target").mkdir()
    (tmp_path / ".partial-led").symlink_to("target")
    before = names(tmp_path)
    assert refusal_of(tmp_path / "file") == "is not a folder; choose another one"
    assert refusal_of(tmp_path / "link") == "is not a folder; choose another one"
    assert "File exists (file)" in refusal_of(tmp_path / "file" / "out")
    assert "Not a directory (.partial-there)" in refusal_of(tmp_path / "there")
    assert "Not a directory (.partial-led)" in refusal_of(tmp_path / "led")
    for length in (250, 255, 256):
        assert "File name too long" in refusal_of(tmp_path / "new" / ("n" * length))
    assert names(tmp_path) == before


def test_link_to_a_folder_is_kept(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "here").symlink_to("there")
    fill(tmp_path / "here", "old")
    fill(tmp_path / "here", "new", **OURS)
    assert (tmp_path / "here").is_symlink() and contents(tmp_path / "there") == expected_files(
        "new"
    )
    assert names(tmp_path) == ["here", "there"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_write_permission_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in refusal_of(tmp_path / "out")
    tmp_path.chmod(0o700)


def test_moved_paths_point_into_the_new_folder(tmp_path):
    old, new = tmp_path / ".partial-a", tmp_path / "a"
    assert moved([old / "b" / "c.png"], old, new) == [new / "b" / "c.png"]


def test_existing_file_needs_the_overwrite_flag(tmp_path):
    path = tmp_path / "a.txt"
    refuse_existing(path, overwrite=False)
    path.write_text("old")
    with pytest.raises(PolysegError, match=r"exists already; .*--overwrite"):
        refuse_existing(path, overwrite=False)
    refuse_existing(path, overwrite=True)
    (tmp_path / "link").symlink_to("nowhere")
    for special in (tmp_path, tmp_path / "link", files.Path("/dev/null")):
        with pytest.raises(PolysegError, match="is not a plain file"):
            refuse_existing(special, overwrite=True)


@pytest.mark.parametrize("there", ["fig.png", "fig.pdf"])
def test_figure_without_suffix_checks_both_files(tmp_path, there):
    (tmp_path / there).touch()
    with pytest.raises(PolysegError, match=f"{there}: exists already"):
        refuse_existing_figure(tmp_path / "fig", overwrite=False)
    refuse_existing_figure(tmp_path / "fig", overwrite=True)
    refuse_existing_figure(tmp_path / "fig.svg", overwrite=False)


def test_incomplete_phantom_set_is_removed(tmp_path, monkeypatch):
    phantoms = make_phantoms(3, size=(32, 32))
    monkeypatch.setattr("polyseg.data.phantoms.phantom_sets._save", full_after(2))
    with pytest.raises(PolysegError, match="set: cannot be written: No space left"):
        write_phantoms(tmp_path / "set", phantoms)
    assert names(tmp_path) == []


def full_after(count, write=lambda path, pixels: Image.fromarray(pixels).save(path)):
    """Return a writer that finds the disk full after `count` files."""
    written = []

    def limited(*arguments, **settings):
        if len(written) == count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(*arguments, **settings))
        return written[-1]

    return limited


@pytest.mark.usefixtures("quick_figures")
class TestCommands:
    @pytest.fixture(scope="class")
    @staticmethod
    def run(tmp_path_factory, trained_once):
        place = tmp_path_factory.mktemp("runs")
        write_phantoms(place / "images", make_phantoms(2, size=(32, 32)))
        return files.Path(shutil.copytree(trained_once("training.epochs=2"), place / "run"))

    @pytest.mark.parametrize(
        ("words", "known"),
        [
            ("estimate-uncertainty RUN --samples 2 --split val", "assessment.h5"),
            ("evaluate RUN --no-figures", "summary.json"),
            ("predict RUN IMAGES", "predictions.csv"),
            pytest.param("schedule plot RUN", "rank_stability.png", marks=pytest.mark.slow),
            pytest.param(
                *("schedule plot RUN RUN/../copy", "1_run/rank_stability.png"),
                marks=pytest.mark.slow,
            ),
            ("schedule validity RUN", "validity.png"),
        ],
    )
    def test_commands_replace_their_results_only_with_overwrite(
        self, run, polyseg, tmp_path, words, known
    ):
        if not (copy := run.parent / "copy").exists():
            copy.symlink_to(run)
        if "copy" in words:
            copy.unlink()
            subprocess.run(["cp", "-r", run, copy], check=True)
        images = str(run.parent / "images" / "images")
        given = words.replace("RUN", str(run)).replace("IMAGES", images).split()
        command = [*given, "--out", tmp_path / "out", "--quiet"]
        first = polyseg(*command)
        assert first.code == 0, first.err
        assert (tmp_path / "out" / known).is_file() and names(tmp_path) == ["out"]
        again = polyseg(*command)
        assert again.code == 2 and "or add --overwrite" in again.err
        (tmp_path / "out" / known).write_text("old")
        (tmp_path / "out" / "stale").touch()
        third = polyseg(*command, "--overwrite")
        assert third.code == 0, third.err
        assert (tmp_path / "out" / known).read_bytes() != b"old"
        assert not (tmp_path / "out" / "stale").exists() and names(tmp_path) == ["out"]
        assert ".partial" not in third.out

    @pytest.mark.slow
    def test_reported_files_exist(self, run, polyseg, tmp_path):
        told = polyseg("evaluate", run, "--json", "--quiet", "--out", tmp_path / "out").out
        record = json.loads(told)
        assert record["folder"] == str(tmp_path / "out") and len(record["files"]) > 5
        assert all(files.Path(one).is_file() for one in record["files"])

    @pytest.mark.slow
    @pytest.mark.parametrize(
        "words",
        [
            "report RUN --out OUT/a.html",
            "plot-loss --out OUT/a.png",
            "schedule recompute RUN --out OUT/a.h5",
            "schedule export RUN --out OUT/a.csv",
            "data split IMAGES HALVES --out OUT/a.json",
            "data preview IMAGES HALVES --images 1 --samples 1 --out OUT/a.png",
        ],
    )
    def test_commands_replace_their_file_only_with_overwrite(self, run, polyseg, tmp_path, words):
        images = str(run.parent / "images")
        given = words.replace("RUN", str(run)).replace("IMAGES", images)
        given = given.replace("HALVES", "--set data.split=[0.5,0.5,0]")
        command = [*given.replace("OUT", str(tmp_path)).split(), "--quiet"]
        first = polyseg(*command)
        assert first.code == 0, first.err
        (written,) = tmp_path.iterdir()
        written.write_text("mine")
        again = polyseg(*command)
        assert again.code == 2 and "exists already" in again.err and again.err.count("\n") == 1
        assert written.read_text() == "mine"
        third = polyseg(*command, "--overwrite")
        assert third.code == 0, third.err
        assert written.read_bytes() != b"mine" and list(tmp_path.iterdir()) == [written]

    def test_full_disk_ends_predict_in_one_line(self, run, polyseg, tmp_path, monkeypatch):
        def full(temporary, *_, **__):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(Image.Image, "save", full)
        command = ["predict", run, run.parent / "images" / "images", "--out", tmp_path / "out"]
        answer = polyseg(*command, "--quiet")
        assert answer.code == 2 and "No space left" in answer.err and answer.err.count("\n") == 1
        assert names(tmp_path) == []
