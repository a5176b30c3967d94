"""Runs of other people: resuming and replaying them does not run their code."""

import re
import shutil
import sys

import pytest
import yaml

from polyseg.commands.train import train
from tests.conftest import TINY

SOURCE = """
import pathlib
import torch
pathlib.Path({canary!r}).touch()
def make(in_channels, out_channels):
    return torch.nn.Sequential(
        torch.nn.Conv2d(in_channels, 2, 3, padding=1),
        torch.nn.Dropout2d(0.2),
        torch.nn.Conv2d(2, out_channels, 1),
    )
"""


@pytest.fixture
def foreign_run(tiny, tmp_path, monkeypatch):
    """Return a run with a network of its author's, and the file that its import would write."""
    canary = tmp_path / "canary"
    (tmp_path / "strange_module.py").write_text(SOURCE.format(canary=str(canary)))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("strange_module", None)
    config = tiny("run", "network.name=strange_module:make", "network.kwargs={}")
    train(config)
    sys.modules.pop("strange_module")
    canary.unlink()
    return tmp_path / "run", canary


def test_resume_imports_code_only_with_trust(polyseg, foreign_run):
    run, canary = foreign_run
    arguments = ("train", "--resume", "--out", run, "--epochs", 4)
    said = polyseg(*arguments)
    assert said.code == 2 and "--trust" in said.err and len(said.err.splitlines()) == 1
    assert not canary.exists()
    assert polyseg(*arguments, "--trust").code == 0 and canary.exists()


def test_configuration_given_by_the_user_is_trusted(polyseg, foreign_run, tmp_path):
    run, canary = foreign_run
    mine = shutil.copy(run / "config.yaml", tmp_path / "mine.yaml")
    assert polyseg("train", mine, "--resume", "--out", run, "--epochs", 4).code == 0
    assert canary.exists()


def test_replay_imports_code_only_with_trust(polyseg, foreign_run, tmp_path):
    run, canary = foreign_run
    arguments = ("train", "--replay", run, "--out", tmp_path / "again")
    said = polyseg(*arguments)
    assert said.code == 2 and "--trust" in said.err and not canary.exists()
    assert polyseg(*arguments, "--trust").code == 0 and canary.exists()


@pytest.mark.slow
def test_replay_copies_epsilons_but_not_settings(polyseg, tiny, tmp_path):
    train(tiny("run", "training.workers=1", "data.memory=17"))
    again = tmp_path / "again"
    assert polyseg("train", "--replay", tmp_path / "run", "--out", again).code == 0
    settings = yaml.safe_load((again / "config.yaml").read_text())
    assert settings["training"]["workers"] == 0 and settings["data"]["memory"] != 17
    assert settings["training"]["epochs"] == 3


def test_run_without_config_is_not_resumed_with_other_settings(polyseg, finished, tmp_path):
    finished()
    (tmp_path / "run" / "config.yaml").unlink()
    said = polyseg("train", "--resume", "--out", tmp_path / "run")
    assert said.code == 2 and "config.yaml: cannot be read" in said.err


def test_log_that_is_a_link_is_refused(polyseg, finished, tmp_path):
    finished()
    secret = tmp_path / "secret"
    secret.write_text("mine")
    log = tmp_path / "run" / "log.txt"
    log.unlink()
    log.symlink_to(secret)
    said = polyseg("train", "--resume", "--out", tmp_path / "run", "--epochs", 4)
    assert said.code == 2 and "is not a regular file" in said.err
    assert secret.read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--accept-changes", "--out", "x"], "--accept-changes needs --resume"),
        (["--resume"], "--resume needs --out"),
        (["--resume", "--out", "nowhere"], "nowhere: holds no run to resume"),
        (["--resume", "--dry-run", "--out", "nowhere"], "nowhere: holds no run to resume"),
    ],
)
def test_conflicting_options_give_one_line(polyseg, tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    said = polyseg("train", *arguments)
    assert said.code == 2 and re.search(match, said.err)
    assert len(said.err.splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_dry_run_of_a_resumed_run_writes_nothing(polyseg, finished, tmp_path):
    finished()
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    settings = [part for one in TINY[:1] for part in ("--set", one)]
    said = polyseg(
        *("train", "--resume", "--dry-run", "--out", tmp_path / "run", "--epochs", 9, *settings)
    )
    assert said.code == 0 and "epochs done" in said.out
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
