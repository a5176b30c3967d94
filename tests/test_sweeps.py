"""Parallel runs: example scripts that start several runs, and shared decoded images."""

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polyseg.config import DataConfig, load_config
from polyseg.data.loading import load_images
from polyseg.runs.checkpoints import read_checkpoint

from . import forks
from .conftest import TINY

EXAMPLES = Path(__file__).parent.parent / "examples"
AT_ONCE = 3
SETTINGS = (*TINY, "output.figures=false", "training.device=cpu")
GENUINE_POLYSEG = f'#!/bin/sh\nexec "{sys.executable}" -m polyseg "$@"\n'
FAKE_POLYSEG = """#!/bin/bash
echo "$CUDA_VISIBLE_DEVICES $*" >> "$NOTES"
while [ $# -gt 0 ] && [ "$1" != --out ]; do shift; done
[[ $2 != *"$FAILING"* ]] && mkdir -p "$2/evaluation" && touch "$2/evaluation/summary.json"
"""
"""Script in place of polyseg that logs its arguments and writes a run's summary, or fails."""


@pytest.fixture
def folder(tmp_path):
    """Return a data set of a few images."""
    generator = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / "set" / kind).mkdir(parents=True)
    for i in range(12):
        mask = np.zeros((32, 32), np.uint8)
        mask[4 : 12 + i, 6:20] = 255
        pixels = generator.integers(0, 256, (32, 32), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"set/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"set/masks/{i}.png")
    return tmp_path / "set"


@pytest.fixture(scope="module")
def forked():
    """Return the text of a program `polyseg` that forks."""
    with forks.program() as text:
        yield text


@pytest.fixture
def script(tmp_path, forked):
    """Return a function that starts an example script with given programs first in PATH."""
    place = tmp_path / "programs"
    place.mkdir()

    def start(name, *arguments, programs=(), **variables):
        for program, text in {"polyseg": forked, **dict(programs)}.items():
            (place / program).write_text(text)
            (place / program).chmod(0o755)
        path = f"{place}:{os.environ['PATH']}"
        return subprocess.Popen(
            ["bash", EXAMPLES / name, *map(str, arguments)],
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def weights_of(run):
    return read_checkpoint(run / "checkpoints" / "last.safetensors").weights


def content_of(images):
    digest = hashlib.sha256()
    for identity in images.ids:
        for tensor in images.sample(identity):
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def load_at_once(config, barrier, answers):
    def wait(_, done, __):
        if done == 1:  # All have begun to decode before any continues.
            barrier.wait(60)

    try:
        answers.put(content_of(load_images(config, wait)))
    except BaseException as error:
        answers.put(repr(error))


def test_concurrent_decoding_of_the_same_images_agrees(folder, tmp_path):
    config = DataConfig(path=str(folder), size=32, memory=0, cache=str(tmp_path / "cache"))
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(AT_ONCE), context.Queue()
    started = [
        context.Process(target=load_at_once, args=(config, barrier, answers))
        for _ in range(AT_ONCE)
    ]
    for one in started:
        one.start()
    found = [answers.get(timeout=120) for _ in started]
    for one in started:
        one.join()
    in_memory = load_images(config.model_copy(update={"memory": 2048}))
    assert found == [content_of(in_memory)] * AT_ONCE
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".images", ".json"]


@pytest.mark.slow
def test_concurrent_runs_share_the_decoded_images(folder, tmp_path):
    settings = [*SETTINGS, "data.memory=0", f"data.cache={tmp_path / 'cache'}"]
    command = ["train", "--data", str(folder), "--epochs", "1"]
    command += [word for setting in settings for word in ("--set", setting)]
    runs = [tmp_path / f"run-{i}" for i in range(AT_ONCE)]
    said = [tmp_path / f"said-{i}" for i in range(AT_ONCE)]
    forks.context()
    at = time.monotonic() + 1
    started = [
        forks.start([*command, "--out", str(run)], Path(os.devnull), path, at=at)
        for run, path in zip(runs, said, strict=True)
    ]
    for one in started:
        one.join(120)
    errors = [path.read_text() for path in said]
    assert [one.exitcode for one in started] == [0] * AT_ONCE, errors
    assert all("read from" in error for error in errors)
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".images", ".json"]
    first, *others = map(weights_of, runs)
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)


@pytest.mark.slow
def test_sweep_trains_and_compares_all_runs(tmp_path, script):
    out = tmp_path / "sweep"
    arguments = ("parallel_sweep.sh", "demo", out, "0 1", *SETTINGS, "training.epochs=1")
    sweep = script(*arguments, ARMS="dice")
    said, complaint = sweep.communicate(timeout=120)
    assert sweep.returncode == 0, complaint
    assert "dice-s0: done" in said and "dice-s1: done" in said
    for seed in (0, 1):
        config = load_config(out / f"dice-s{seed}" / "config.yaml")
        assert (config.training.seed, config.loss.name) == (seed, "dice")
    summary = json.loads((out / "comparison" / "summary.json").read_text())
    (arm,) = summary["runs"]
    assert arm["name"] == "dice" and arm["metrics"]["dice"]["seed_deviation"] > 0
    again = script(*arguments, ARMS="dice", programs={"polyseg": "#!/bin/sh\nexit 1\n"})
    assert again.communicate(timeout=60)[0] == "" and again.returncode == 0


def test_sweep_distributes_arms_seeds_folds_and_gpus(tmp_path, script):
    notes, out = tmp_path / "notes", tmp_path / "all runs"
    variables = {"NOTES": str(notes), "FAILING": "nothing", "GPUS": "4 7", "FOLDS": "2"}
    sweep = script(
        *("parallel_sweep.sh", "my data", out, "0 5", "network.kwargs={channels: [4, 8]}"),
        **variables,
        ARMS="dice fixed",
        programs={"polyseg": FAKE_POLYSEG},
    )
    assert sweep.communicate(timeout=60)[1] == "" and sweep.returncode == 0
    *trained, evaluated = notes.read_text().splitlines()
    own = {"dice": "loss.name=dice", "fixed": "loss.name=polydice1 --set control.enabled=false"}
    assert sorted(line.split(" ", 1)[1] for line in trained) == sorted(
        f"train --data my data --out {out}/{arm}-f{fold}-s{seed} --seed {seed} "
        f"--set network.kwargs={{channels: [4, 8]}} --set {own[arm]} "
        f"--fold {fold} --set data.folds=2"
        for arm in own
        for fold in (0, 1)
        for seed in (0, 5)
    )
    assert {line.split(" ", 1)[0] for line in trained} == {"4", "7"}
    assert evaluated.endswith(f"--group --baseline dice --out {out}/comparison")


def test_failed_run_of_a_sweep_does_not_stop_the_others(tmp_path, script):
    notes, out = tmp_path / "notes", tmp_path / "sweep"
    variables = {"NOTES": str(notes), "FAILING": "fixed-s0", "JOBS": "1"}
    sweep = script(
        "parallel_sweep.sh", "demo", out, "0 1", **variables, programs={"polyseg": FAKE_POLYSEG}
    )
    _, complaint = sweep.communicate(timeout=60)
    assert complaint.splitlines()[0] == f"fixed-s0: failed, see {out}/logs/fixed-s0.txt"
    assert sweep.returncode != 0 and "evaluate" not in notes.read_text()
    assert len(list(out.glob("*/evaluation/summary.json"))) == 5


@pytest.mark.slow
def test_slurm_array_task_requeues_itself_and_resumes(tmp_path, script):
    out, number, notes = tmp_path / "array", tmp_path / "number", tmp_path / "notes"
    programs = {
        "polyseg": GENUINE_POLYSEG,
        "srun": f'#!/bin/sh\necho $$ > "{number}.new"\nmv "{number}.new" "{number}"\nexec "$@"\n',
        "scontrol": f'#!/bin/sh\necho "$@" >> "{notes}"\n',
    }
    variables = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "1"}
    variables |= {"LOSSES": "dice bce", "SEEDS": "5 6", "programs": programs}
    run = out / "bce-s6"

    def task(epochs):
        epochs = f"training.epochs={epochs}"
        return script("slurm_array.sh", "demo", out, *SETTINGS, epochs, **variables)

    first = task(5000)
    while not (run / "history.csv").exists() and first.poll() is None:
        time.sleep(0.05)
    os.kill(int(number.read_text()), signal.SIGUSR1)
    _, complaint = first.communicate(timeout=120)
    assert first.returncode == 128 + signal.SIGUSR1, complaint
    assert notes.read_text() == "requeue 77\n"
    before = (run / "history.csv").read_text().splitlines()
    second = task(len(before))
    _, complaint = second.communicate(timeout=120)
    assert second.returncode == 0, complaint
    after = (run / "history.csv").read_text().splitlines()
    assert len(after) == len(before) + 1 and after[: len(before)] == before
    config = load_config(run / "config.yaml")
    assert (config.training.seed, config.loss.name) == (6, "bce")
    number.unlink()
    third = task(len(before))
    third.communicate(timeout=60)
    assert third.returncode == 0 and not number.exists()


def test_array_with_too_many_tasks_is_refused(tmp_path, script):
    task = script("slurm_array.sh", "demo", tmp_path, SLURM_ARRAY_TASK_ID="9")
    _, complaint = task.communicate(timeout=60)
    assert task.returncode == 2
    assert complaint == "task 9: there are 3 losses and 3 seeds only\n"


def test_several_gpus_script_resumes_an_existing_run(tmp_path, script):
    notes, out = tmp_path / "notes", tmp_path / "a run"
    torchrun = f'#!/bin/sh\nprintf "%s " "$@" >> "{notes}"; echo >> "{notes}"\n'
    (out / "checkpoints").mkdir(parents=True)
    for arguments in (["demo", out], ["demo", out, 2, "data.size=32"]):
        started = script("several_gpus.sh", *arguments, programs={"torchrun": torchrun})
        assert started.communicate(timeout=60) == ("", "") and started.returncode == 0
        (out / "checkpoints" / "last.safetensors").touch()
    begin = f"-m polyseg train --data demo --out {out}"
    assert notes.read_text().splitlines() == [
        f"--standalone --nproc-per-node auto {begin} ",
        f"--standalone --nproc-per-node 2 {begin} --resume --set data.size=32 ",
    ]


def test_control_arms_refuse_other_settings_in_the_same_folder(tmp_path, script):
    notes, out = tmp_path / "notes", tmp_path / "arms"
    (out / "comparison").mkdir(parents=True)
    (out / "comparison/table.md").write_text("## Dice: difference from adaptive\n\na\n\n## bias\n")
    variables = {"NOTES": str(notes), "FAILING": "nothing", "programs": {"polyseg": FAKE_POLYSEG}}
    asked = ("control_arms.sh", "demo", out)
    first = script(*asked, "0 3", "data.size=32", **variables)
    said, complaint = first.communicate(timeout=60)
    assert (first.returncode, complaint) == (0, "")
    assert said.endswith("## Dice: difference from adaptive\n\na\n\n")
    *trained, evaluated = notes.read_text().splitlines()
    assert len(trained) == 2 * 8
    shared = "--data demo --set loss.name=polydice1 --set data.size=32"
    for seed in (0, 3):
        run, adaptive = f" train --out {out}/dice-{seed}", f"{out}/adaptive-{seed}"
        assert f"{run} {shared} --loss dice --set control.enabled=auto --seed {seed}" in trained
        run = f" train --out {out}/permuted-{seed}"
        assert f"{run} --replay {adaptive} --replay-arm permuted --trust" in trained
    assert " --group --baseline adaptive " in evaluated
    other = script(*asked, "0 3 4", "data.size=64", **variables)
    said, complaint = other.communicate(timeout=60)
    assert other.returncode == 2 and "choose another OUT" in complaint
    assert len(notes.read_text().splitlines()) == 17
    more = script(*asked, "0 3 4", "data.size=32", **variables)
    assert more.communicate(timeout=60)[1] == ""
    assert len(notes.read_text().splitlines()) == 17 + 8 + 1


@pytest.mark.slow
def test_control_arms_are_trained_resumed_and_summarised(tmp_path, script):
    out = tmp_path / "arms"
    own = f"loss.name={EXAMPLES / 'own_loss.py'}:loss"
    more = ("uncertainty.metric=dispersion", "control.map=weight", "training.epochs=2")
    arguments = ("control_arms.sh", "demo", out, "0", *SETTINGS, *more, own)
    first = script(*arguments)
    said, complaint = first.communicate(timeout=600)
    assert first.returncode == 0, complaint
    arms = {"adaptive", "dice", "fixed", "shuffled", "permuted", "mean", "inverted", "size"}
    configs = {arm: load_config(out / f"{arm}-0/config.yaml") for arm in arms}
    assert configs["dice"].loss.name == "dice" and not configs["fixed"].adaptive
    for arm in arms - {"dice"}:
        assert configs[arm].loss.name.endswith("own_loss.py:loss")
        assert configs[arm].control.map == "weight"
        assert (configs[arm].control.replay_arm == arm) == (arm not in ("adaptive", "fixed"))
    table, sentence = said.split("## Dice: difference from adaptive")[1].split("\n\n", 2)[1:]
    named = [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]]
    assert set(named) == arms - {"adaptive"}
    assert "the Dice loss" in sentence and "which image got the steep loss" in sentence
    assert "which says nothing about other seeds" in sentence
    before = {arm: (out / f"{arm}-0/evaluation/summary.json").stat().st_mtime_ns for arm in arms}
    weights = weights_of(out / "permuted-0")
    (out / "permuted-0/evaluation/summary.json").unlink()
    again = script(*arguments)
    said_again, complaint = again.communicate(timeout=600)
    assert again.returncode == 0, complaint
    assert said_again == f"permuted-0: done\n{said[said.index('## ') :]}"
    after = {arm: (out / f"{arm}-0/evaluation/summary.json").stat().st_mtime_ns for arm in arms}
    assert {arm for arm in arms if before[arm] != after[arm]} == {"permuted"}
    resumed = weights_of(out / "permuted-0")
    assert all(torch.equal(resumed[name], weights[name]) for name in weights)
