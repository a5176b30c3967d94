"""The folder of a run: checkpoints, recovery, and damaged or foreign files."""

import dataclasses
import json
import os

import pytest
import torch

from polyseg.config import load_config
from polyseg.errors import PolysegError
from polyseg.runs.checkpoints import Checkpoint, read_checkpoint, write_checkpoint
from polyseg.runs.run_folder import RunDirectory, environment, find_checkpoint
from polyseg.system.files import sha256_of_file


@pytest.fixture
def checkpoint():
    weights = {"core.1.weight": torch.arange(3.0)}
    return Checkpoint(load_config(), channels=1, epoch=7, weights=weights)


def test_run_path_resolves_to_the_best_checkpoint(tmp_path, checkpoint):
    run = RunDirectory(tmp_path)
    with pytest.raises(PolysegError, match="neither a checkpoint nor a run"):
        find_checkpoint(tmp_path)
    write_checkpoint(run.last, checkpoint)
    assert find_checkpoint(tmp_path) == run.last
    write_checkpoint(run.best, checkpoint)
    assert find_checkpoint(tmp_path) == run.best
    assert find_checkpoint(run.last) == run.last


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"train": [], "val": [], "test": []}',
        '{"train": 1}',
        '{"train": [{"id": "a"}]}',
        "[" * 9999,
    ],
)
def test_damaged_split_is_one_line(tmp_path, text):
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(PolysegError, match=r"split.json: cannot be read") as error:
        RunDirectory(tmp_path).read_split()
    assert "\n" not in str(error.value)


def test_replaced_split_is_refused(tmp_path):
    run = RunDirectory(tmp_path)
    rows = [{"id": name, "sha256": "0"} for name in "ab"]
    run.split.write_text(json.dumps({"train": rows[:1], "val": rows[1:], "test": []}))
    recorded = sha256_of_file(run.split)
    assert run.read_split(recorded)[0]["train"] == ["a"]
    run.split.write_text(json.dumps({"train": rows[1:], "val": rows[:1], "test": []}))
    with pytest.raises(PolysegError, match=r"split.json: cannot be read: it is not the file"):
        run.read_split(recorded)


def test_commit_keeps_one_older_checkpoint(tmp_path, checkpoint):
    run = RunDirectory(tmp_path)
    for epoch in (7, 8, 9):
        run.commit(dataclasses.replace(checkpoint, epoch=epoch))
    assert read_checkpoint(run.last).epoch == 9
    assert read_checkpoint(run.previous).epoch == 8


@pytest.mark.parametrize("damage", [b"", None])
def test_damaged_last_checkpoint_falls_back_to_the_older_one(tmp_path, checkpoint, damage, caplog):
    run = RunDirectory(tmp_path)
    for epoch in (7, 8):
        run.commit(dataclasses.replace(checkpoint, epoch=epoch))
    if damage is None:
        run.last.unlink()
    else:
        run.last.write_bytes(damage)
    found = run.checkpoint_to_resume()
    assert found.epoch == 7 and "resuming from the previous one, epoch 7" in caplog.text
    run.recover(found)
    assert not run.last.exists() and run.last.with_suffix(".damaged").exists() == (damage == b"")
    run.commit(dataclasses.replace(checkpoint, epoch=8))
    assert (read_checkpoint(run.last).epoch, read_checkpoint(run.previous).epoch) == (8, 7)


def test_recover_removes_only_files_newer_than_the_checkpoint(tmp_path, checkpoint):
    run = RunDirectory(tmp_path)
    run.commit(checkpoint)
    mine, newer = run.assessment(7), run.assessment(8)
    mine.parent.mkdir()
    for path in (mine, newer, mine.with_name("notes.h5"), mine.with_name(".partial-x.h5")):
        path.write_text("kept?")
    run.recover(checkpoint)
    assert sorted(path.name for path in mine.parent.iterdir()) == ["epoch_0007.h5", "notes.h5"]


def test_recover_does_not_follow_links(tmp_path, checkpoint):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "epoch_0099.h5").touch()
    (tmp_path / "elsewhere" / ".partial-mine").touch()
    run = RunDirectory(tmp_path / "run")
    (run.path / "uncertainty").symlink_to(tmp_path / "elsewhere")
    run.recover(checkpoint)
    assert len(list((tmp_path / "elsewhere").iterdir())) == 2


def test_environments_of_resumed_runs_are_kept(tmp_path):
    run = RunDirectory(tmp_path)
    now = environment(torch.device("cpu"))
    run.environment.write_text(json.dumps(now | {"threads": 64}))
    assert run.changes_of_environment(now) == [f"threads 64 -> {now['threads']}"]
    run.note_resumption(3, now)
    assert run.changes_of_environment(now) == []
    record = json.loads(run.environment.read_text())
    assert record["threads"] == 64 and record["resumed"] == [{"after_epoch": 3, **now}]


@pytest.mark.parametrize("text", ["", "[]", '{"resumed": 1}', '{"resumed": [1]}', "[" * 9999])
def test_damaged_environment_is_one_line(tmp_path, text):
    run = RunDirectory(tmp_path)
    run.environment.write_text(text)
    with pytest.raises(PolysegError, match=r"environment.json: cannot be read") as error:
        run.changes_of_environment({})
    assert "\n" not in str(error.value)


def test_pipe_in_place_of_a_record_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "split.json")
    with pytest.raises(PolysegError, match="is not a file"):
        RunDirectory(tmp_path).read_split()


def begun(run):
    run.begin(load_config(), "{}", environment(torch.device("cpu")))
    (run.path / "log.txt").touch()
    run.last.parent.mkdir()
    (run.last.parent / ".partial-last.abc.safetensors").touch()
    return run


def test_uncommitted_run_can_be_started_again(tmp_path):
    begun(RunDirectory(tmp_path)).refuse_occupied()


@pytest.mark.parametrize(
    "more", ["notes.txt", "checkpoints/last.safetensors", "uncertainty", "history.csv", "foreign"]
)
def test_foreign_folder_is_not_overwritten_by_a_run(tmp_path, more):
    run = begun(RunDirectory(tmp_path))
    if more == "foreign":
        run.environment.write_text("[]")
    else:
        (tmp_path / more).touch()
    with pytest.raises(PolysegError, match="is not empty"):
        run.refuse_occupied()
