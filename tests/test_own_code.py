"""The user's own losses, difficulties and maps, given by import path or file."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from polyseg.commands import schedule as job
from polyseg.commands.train import train
from polyseg.errors import PolysegError
from polyseg.runs.record_files import read_assessment, read_schedule
from polyseg.system.files import sha256_of_file

EXAMPLES = Path(__file__).parent.parent / "examples"
LOSS = f"loss.name={EXAMPLES / 'own_loss.py'}:loss"
METRIC = f"uncertainty.metric={EXAMPLES / 'own_difficulty.py'}:unsure_area"
MAP = f"control.map={EXAMPLES / 'own_difficulty.py'}:steps"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_example_functions_train_and_are_recorded(tiny, tmp_path, polyseg):
    train(tiny("run", LOSS, METRIC, MAP))
    run = tmp_path / "run"
    found = read_assessment(run / "uncertainty" / "epoch_0003.h5")
    assert found.metric.endswith("own_difficulty.py:unsure_area")
    assert np.ptp(found.difficulty) > 0
    recorded = json.loads((run / "environment.json").read_text())["own_code"]
    assert recorded["loss.name"]["sha256"] == sha256_of_file(EXAMPLES / "own_loss.py")
    assert set(recorded) == {"loss.name", "uncertainty.metric", "control.map"}
    schedule = read_schedule(run / "schedule.h5")
    adapted = schedule.epsilon[schedule.assessed >= 0]
    assert set(adapted.ravel().tolist()) == {np.float32(-0.4).item(), 1.0}
    with pytest.raises(PolysegError, match="--trust"):
        job.recompute(run)
    job.recompute(run, out=tmp_path / "again.h5", trust=True)
    np.testing.assert_array_equal(read_schedule(tmp_path / "again.h5").epsilon, schedule.epsilon)
    assert "own_difficulty" in json.dumps(job.validity(run).rows)
    assert job.show(run, image=schedule.ids[0]).rows
    replay = ("train", "--replay", run, "--replay-arm", "permuted", "--out", tmp_path / "arm")
    said = polyseg(*replay)
    assert said.code == 2 and "--trust" in said.err
    assert polyseg(*replay, "--trust").code == 0
    assert polyseg("report", run, "--out", tmp_path / "report.html").code == 0
    said = polyseg("estimate-uncertainty", run, "--out", tmp_path / "estimate")
    assert said.code == 2 and "--trust" in said.err
    assert polyseg("estimate-uncertainty", run, "--trust", "--out", tmp_path / "x").code == 0


def write(folder, text):
    (folder / "mine.py").write_text("import numpy as np\nimport torch\n" + text)
    return folder / "mine.py"


@pytest.mark.parametrize(
    ("setting", "text", "expected"),
    [
        ("loss.name", "def f(logits, mask, epsilon): return logits.mean()", "one loss per image"),
        ("loss.name", "def f(logits, mask, epsilon): return mask.sum((1, 2, 3))", "no gradient"),
        ("loss.name", "def f(logits, mask, epsilon): return logits.sum((1, 2, 3)) / 0", "finite"),
        ("loss.name", "def f(logits): return logits", "fails on a small input: .*positional"),
        ("uncertainty.metric", "def f(moments, mask): return moments.mean", "one number per image"),
        ("uncertainty.metric", "def f(probability, mask): return 1 / 0", "division by zero"),
        ("control.map", "def f(z, low, high, rate): return z", "must lie in -0.5 to 100"),
        ("control.map", "def f(z, low, high, rate): return z * np.nan", "not finite"),
        ("control.map", "def g(): pass", "has no attribute 'f'"),
    ],
)
def test_unusable_function_is_refused_before_training(tiny, tmp_path, setting, text, expected):
    file = write(tmp_path, text)
    with pytest.raises(PolysegError, match=f"{setting} = .*mine.py:f: .*{expected}"):
        train(tiny("run", f"{setting}={file}:f"))
    assert not (tmp_path / "run").exists()


def test_missing_file_is_named(tiny):
    with pytest.raises(PolysegError, match=r"loss.name = .*gone.py:f: .*there is no file"):
        train(tiny("run", "loss.name=gone.py:f"))


def test_difficulty_function_of_a_pass_is_averaged_over_passes(tiny, tmp_path):
    file = write(tmp_path, "def f(probability, mask): return probability.flatten(1).mean(dim=1)")
    train(tiny("run", f"uncertainty.metric={file}:f", "uncertainty.save_maps=true"))
    found = read_assessment(tmp_path / "run" / "uncertainty" / "epoch_0003.h5", with_maps=True)
    expected = [one.astype(float).mean() for one in found.maps["mean"]]
    np.testing.assert_allclose(found.difficulty, expected, atol=1e-3)


def test_non_finite_result_during_training_names_epoch_and_image(tiny, tmp_path):
    many = "d = moments.mean.flatten(1).mean(dim=1); return d / (0 * d if d.shape[0] > 2 else 1)"
    file = write(tmp_path, f"def f(moments, mask): {many}")
    with pytest.raises(PolysegError, match=r"assessment after epoch 1: image .* not finite"):
        train(tiny("run", f"uncertainty.metric={file}:f"))
    other = tmp_path / "other.py"
    other.write_text("def f(z, low, high, rate): return z * (float('nan') if len(z) < 5 else 0)")
    with pytest.raises(PolysegError, match=r"control.map .*epsilon nan of image .* in epoch 2"):
        train(tiny("run2", f"control.map={other}:f"))


def test_function_can_be_given_by_import_path(tiny, tmp_path, monkeypatch):
    write(tmp_path, "def f(z, low, high, rate): return 0 * z + high")
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine", None)
    train(tiny("run", "control.map=mine:f"))
    schedule = read_schedule(tmp_path / "run" / "schedule.h5")
    assert (schedule.epsilon[schedule.assessed >= 0] == 1).all()
