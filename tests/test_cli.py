"""Commands from the command line: output, files written, and errors."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import yaml
from PIL import Image
from scipy.optimize import brentq
from typer.main import get_command

from polyseg import __version__
from polyseg.cli.main import app
from polyseg.commands.plot_loss import _derivative_where_the_sum_is_one
from polyseg.config import Config, settings_of
from polyseg.losses import polydice1_curve
from polyseg.metrics.image_metrics import METRICS
from polyseg.networks.segmentation_network import hash_weights
from polyseg.runs.assessment_text import describe_order
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.record_files import read_assessment
from polyseg.runs.weights import network_of
from polyseg.training import log_lines

from .conftest import TINY
from .reference import commands

SET = [word for one in (*TINY, "output.figures=false") for word in ("--set", one)]


@pytest.fixture
def images(polyseg, tmp_path):
    """Return a folder of phantoms written as PNG files."""
    folder = tmp_path / "phantoms"
    assert polyseg("data", "demo", folder, "--images", 16, "--size", 32).code == 0
    return folder


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=str)
def test_every_command_has_help_with_an_example_that_parses(polyseg, name, command):
    answer = polyseg(*name, "--help")
    assert answer.code == 0
    assert all(parameter.help for parameter in command.params if parameter.name != "help"), name
    example = command.help.split("Example: polyseg ")[1].split("\n")[0].split(" > ")[0]
    words = example.replace(" ".join(name), "", 1).split()
    command.make_context(name[-1], words, resilient_parsing=True)
    assert example.startswith(" ".join(name))


def test_version_option_prints_the_version(polyseg):
    assert polyseg("--version").out.strip() == f"polyseg {__version__}"


@pytest.mark.slow
def test_train_estimate_and_evaluate_write_readable_files(polyseg, tmp_path, images):
    """Train two arms on files, estimate uncertainty, and evaluate both arms together."""
    for name, loss, drawn in (("adaptive", "polydice1", "true"), ("dice", "dice", "false")):
        settings = ("--loss", loss, *SET, "--set", f"output.figures={drawn}")
        answer = polyseg("train", "--data", images, "--out", tmp_path / name, *settings)
        assert answer.code == 0, answer.err
        assert "epoch 3/3" in answer.err and "\x1b" not in answer.err
        assert "Dice" in answer.out and "history.csv" in answer.out
    run = tmp_path / "adaptive"
    for name in ("config.yaml", "environment.json", "split.json", "log.txt", "history.csv"):
        assert (run / name).stat().st_size > 0
    for name in ("curves", "epsilon", "difficulty", "difficulty_dice", "overlays_largest_d"):
        with Image.open(run / "figures" / f"{name}.png") as image:
            assert min(image.size) > 300
        assert (run / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert Config.model_validate(yaml.safe_load((run / "config.yaml").read_text())).adaptive
    assert len(list((run / "uncertainty").glob("epoch_000[123].h5"))) == 3
    assert "epoch 3/3" in (run / "log.txt").read_text()

    out = tmp_path / "estimate"
    answer = polyseg(
        "estimate-uncertainty", run, "--data", images, "--samples", 4, "--maps", "--out", out
    )
    assert answer.code == 0, answer.err
    assessment = read_assessment(out / "assessment.h5", with_maps=True)
    assert len(assessment.ids) == 16 and assessment.samples == 4
    assert assessment.maps["entropy"][0].shape == (32, 32)
    (line,) = describe_order(assessment)
    assert "".join(line.split()) in "".join(answer.out.split())
    assert (out / "figures/overlays_smallest_d.png").is_file()
    rows = list(csv.DictReader((out / "per_image.csv").open()))
    np.testing.assert_allclose(
        [float(row["difficulty"]) for row in rows], assessment.difficulty, rtol=1e-8
    )

    out = tmp_path / "comparison"
    answer = polyseg("evaluate", run, tmp_path / "dice", "--out", out, "--json")
    assert answer.code == 0, answer.err
    printed = json.loads(answer.out)
    assert printed["evaluation"] == json.loads((out / "summary.json").read_text())
    assert [one["name"] for one in printed["evaluation"]["runs"]] == ["adaptive", "dice"]
    rows = list(csv.DictReader((out / "per_image.csv").open()))
    tested = [row["id"] for row in json.loads((run / "split.json").read_text())["test"]]
    assert [row["id"] for row in rows] == 2 * tested
    for one in printed["evaluation"]["runs"]:
        own = [row for row in rows if row["run"] == one["name"]]
        for metric in METRICS.values():
            values = [float(row[metric.name]) for row in own if row[metric.name]]
            assert one["metrics"][metric.name]["mean"] == pytest.approx(np.mean(values))
    # Training ends with a table of the same images and the same checkpoint.
    alone = json.loads((run / "evaluation" / "summary.json").read_text())["runs"][0]
    assert alone["metrics"] == printed["evaluation"]["runs"][0]["metrics"]
    assert "\\toprule" in (out / "table.tex").read_text()
    assert (out / "table.md").read_text().count("|") > 30


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_estimate_uncertainty_accepts_images_without_masks(polyseg, tmp_path, images):
    polyseg("train", "--data", images, "--out", tmp_path / "run", *SET, "--quiet")
    answer = polyseg(
        "estimate-uncertainty", tmp_path / "run", "--data", images / "images", "--out",
        tmp_path / "out",
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assessment = read_assessment(tmp_path / "out" / "assessment.h5")
    assert np.isnan(assessment.dice).all() and np.isfinite(assessment.difficulty).all()
    answer = polyseg("evaluate", tmp_path / "run", "--data", images / "images")
    assert answer.code == 2 and "no masks to compare with" in answer.err


def test_results_are_written_into_the_run_by_default(polyseg, finished, tmp_path):
    finished()
    assert polyseg("evaluate", tmp_path / "run", "--no-figures").code == 0
    assert len(list((tmp_path / "run").glob("evaluation-*/summary.json"))) == 1


def test_quiet_does_not_change_the_log_file(polyseg, tmp_path, monkeypatch):
    monkeypatch.setattr(log_lines, "_HARDLY_SEGMENTS", -1)  # Its warning is printed also then.
    answer = polyseg("train", "--out", tmp_path / "run", *SET, "--quiet")
    assert answer.code == 0 and answer.err == "" and "Dice" in answer.out
    assert "epoch 3/3" in (tmp_path / "run" / "log.txt").read_text()


def test_dry_run_trains_nothing(polyseg, tmp_path):
    answer = polyseg("train", "--out", tmp_path / "run", "--dry-run", "--json", *SET)
    assert answer.code == 0, answer.err
    planned = json.loads(answer.out)
    assert planned["epochs"] == 3 and planned["images"]["train"] == 11
    assert not (tmp_path / "run").exists()


def test_resume_takes_the_settings_of_the_run(polyseg, finished, tmp_path):
    finished()
    answer = polyseg("train", "--resume", "--out", tmp_path / "run", "--epochs", 4)
    assert answer.code == 0, answer.err
    assert "resumed after epoch 3" in answer.err and "epoch 4/4" in answer.err


@pytest.mark.parametrize("arguments", [[], ["--gradient"], ["--terms", "3"], ["--s", "1"]])
def test_plot_loss_writes_the_requested_file(polyseg, tmp_path, arguments):
    answer = polyseg("plot-loss", *arguments, "--out", tmp_path / "fig2.pdf")
    assert answer.code == 0, answer.err
    assert answer.out.strip() == str(tmp_path / "fig2.pdf")
    assert (tmp_path / "fig2.pdf").read_bytes().startswith(b"%PDF")


def test_plot_loss_without_suffix_writes_png_and_pdf(polyseg, tmp_path):
    assert polyseg("plot-loss", "--out", tmp_path / "both").code == 0
    assert (tmp_path / "both.png").is_file() and (tmp_path / "both.pdf").is_file()


@pytest.mark.parametrize("terms", [1, 4])
def test_shaded_region_is_where_the_loss_increases_with_s(terms):
    """Compare its edge in the plot of derivatives with finite differences of the loss."""
    theta = np.linspace(0.01, np.pi / 2, 500)
    edge = _derivative_where_the_sum_is_one(theta, terms)
    for i in (100, 250, 450):
        on_the_edge = brentq(
            lambda e, i=i: polydice1_curve(theta[i : i + 1], e, 1.0, terms=terms)[0] - 1, -0.5, 99
        )
        around = theta[i] + np.array([-1e-5, 1e-5])
        slope = np.diff(polydice1_curve(around, on_the_edge, 1.0, terms=terms))[0] / 2e-5
        assert edge[i] == pytest.approx(slope, rel=1e-4)
        for s in (0.1, 0.7):
            loss = polydice1_curve(theta[i : i + 1], on_the_edge, s, terms=terms)
            assert loss[0] == pytest.approx(1)


def test_data_check_summarises_the_data_set(polyseg, images):
    answer = polyseg("data", "check", images, "--json")
    found = json.loads(answer.out)
    assert found["images"] == 16 and found["sizes"] == ["32 x 32 (16)"]
    assert found["empty masks"] == 0
    (images / "masks" / "phantom_0000.png").unlink()
    Image.fromarray(np.full((32, 32), 7, np.uint8)).save(images / "masks" / "phantom_0001.png")
    answer = polyseg("data", "check", images)
    assert answer.code == 2
    assert "1 image (phantom_0000.png) without a mask" in answer.err
    assert "phantom_0001.png: masks contain the values 7" in answer.err


def test_config_init_writes_the_defaults(polyseg, tmp_path):
    path = tmp_path / "a.yaml"
    assert polyseg("config", "init", path).code == 0
    assert polyseg("config", "show", path).out == Config().to_yaml()
    assert polyseg("config", "init", path).code == 2
    schema = json.loads(polyseg("config", "schema").out)
    assert "loss" in schema["properties"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["trian"], "No such command 'trian'"),
        (["train", "--epoch", "3"], "No such option: --epoch"),
        (["train", "--epochs", "many"], "'--epochs'"),
        (["evaluate"], "Missing argument"),
        (["train", "--data", "nowhere"], "nowhere: there is no such file or folder"),
        (["train", "nowhere.yaml"], "nowhere.yaml: cannot be read"),
        (["train", "--loss", "dicee"], "loss.name"),
        (["train", "--set", "loss.epsilom=1"], "did you mean loss.epsilon?"),
        (["train", "--set", "loss.epsilon"], "write KEY=VALUE"),
        (["train", "--epochs", "0"], "training.epochs: must be greater than or equal to 1"),
        (["train", "--device", "tpu"], "training.device"),
        (["train", "--resume"], "--resume needs --out"),
        (["train", "--resume", "--out", "nowhere"], "holds no run to resume"),
        (["train", "--set", "network.name=resnet"], "choose unet, basic-unet"),
        (["train", "--set", "network.dropout=0"], "network.dropout is 0"),
        (["evaluate", "nowhere"], "nowhere: there is no such file or folder"),
        (["estimate-uncertainty", "nowhere"], "there is no such file or folder"),
        (["plot-loss", "--epsilon", "a,b"], "give numbers separated by commas"),
        (["plot-loss", "--epsilon", "nan"], "at least -0.5"),
        (["plot-loss", "--s", "2"], "--s 2"),
        (["plot-loss", "--epsilon", ",".join(map(str, range(40)))], "at most 12"),
        (["plot-loss", "--out", ""], "choose another name"),
        (["config", "init", "n" * 300], "File name too long"),
        (["evaluate", "n" * 300], "File name too long"),
        (["data", "demo", "new", "--images", "100000", "--size", "1024"], "make fewer"),
        (["plot-loss", "--out", "figure.docx"], "saved as .png, .pdf or .svg"),
        (["data", "check", "nowhere"], "there is no such file or folder"),
        (["data", "demo", "new", "--modality", "mri"], "choose ultrasound or endoscopy"),
        (["data", "demo", "new", "--size", "3"], "--size from 32 to"),
        (["data", "demo", "new", "--seed", "-1"], "--seed -1: give 0 or more"),
    ],
)
def test_user_error_is_one_line_and_exit_code_2(polyseg, tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    answer = polyseg(*arguments)
    assert answer.code == 2
    assert match in answer.err
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_control_characters_of_names_are_escaped_in_the_terminal(polyseg):
    answer = polyseg("evaluate", "\x1b[2Jgone")
    assert answer.code == 2 and "\x1b" not in answer.err and "[2Jgone" in answer.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "gone\nerror: no"],
        ["tr\nain"],
        ["train", "--epochs", "a\nb"],
        ["train", "--set", "a\nb=1"],
        ["train", "--set", 'data.path="a\\nb"'],
        ["train", "--set", "data.group=(a\nb"],
        ["train", "--data", "a\nb"],
        ["config", "show", "a\nb.yaml"],
        ["config", "init", "a\nb/\udcff/c" + "d" * 300],
        ["data", "check", "a\nb"],
        ["plot-loss", "--epsilon", "a\nb"],
        ["train", "--set", "loss.name=" + "x" * 9000],
        ["config", "show", "y/" * 1900],
    ],
    ids=lambda arguments: repr(arguments)[:40],
)
def test_newline_in_an_argument_does_not_split_the_error(polyseg, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    answer = polyseg(*arguments)
    assert answer.code == 2
    assert answer.err.startswith("error: ") and answer.err.count("\n") == 1
    assert len(answer.err) < 2100


def test_each_problem_is_printed_on_its_own_line(polyseg, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(b"no image")
        (tmp_path / f"{name}_mask.png").write_bytes(b"no image")
    answer = polyseg("data", "check", tmp_path)
    assert answer.code == 2 and answer.err.startswith("error: ")
    lines = answer.err.removesuffix("\n").split("\n")
    assert len(lines) == 2 and all(str(tmp_path) in line for line in lines)


@pytest.mark.slow
def test_errors_about_a_run_name_the_cause(polyseg, tmp_path, images):
    run = tmp_path / "run"
    polyseg("train", "--data", images, "--out", run, *SET, "--quiet")
    other = tmp_path / "other"
    polyseg("train", "--data", images, "--out", other, *SET, "--set", "data.split_seed=5", "-q")
    assert "choose train, val, test or all" in polyseg("evaluate", run, "--split", "tset").err
    assert "tested on other images" in polyseg("evaluate", run, other).err
    answer = polyseg("estimate-uncertainty", run, "--samples", "0")
    assert answer.code == 2 and "--samples 0: must be from 2 to 10,000" in answer.err
    answer = polyseg("train", "--data", images, "--out", run, *SET)
    assert answer.code == 2 and "is not empty" in answer.err
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(images / "images" / "phantom_0003.png")
    answer = polyseg("evaluate", run, "--no-figures")
    assert answer.code == 2 and "image phantom_0003 has changed" in answer.err


@pytest.mark.slow
def test_resume_accepts_data_in_a_new_place(polyseg, tmp_path, images):
    whole, run, new = tmp_path / "whole", tmp_path / "run", tmp_path / "new"
    command = ["train", "--data", images, *SET, "--set", "training.scheduler=constant", "-q"]
    assert polyseg(*command, "--out", whole).code == 0
    assert polyseg(*command, "--out", run, "--epochs", 2).code == 0
    images.rename(new)
    answer = polyseg("train", "--resume", "--out", run, "--epochs", 3)
    assert answer.code == 2 and len(answer.err.splitlines()) == 1
    assert f"{images}: there is no such file or folder" in answer.err and "--data" in answer.err
    again = ["train", "--resume", "--out", run, "--epochs", 3, "--data", new]
    assert polyseg(*again, "--dry-run").code == 0
    answer = polyseg(*again)
    assert answer.code == 0, answer.err
    told = [line for line in answer.err.splitlines() if str(new) in line and str(images) in line]
    assert len(told) == 1 and "read from" in told[0]
    first, second = (
        read_checkpoint(path / "checkpoints/last.safetensors") for path in (whole, run)
    )
    assert hash_weights(network_of(first)) == hash_weights(network_of(second))
    # The run now records the new place.
    assert polyseg("train", "--resume", "--out", run, "-q").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("change", ["missing", "changed"])
def test_resume_refuses_changed_data(polyseg, tmp_path, images, change):
    run, new = tmp_path / "run", tmp_path / "new"
    polyseg("train", "--data", images, "--out", run, *SET, "-q", "--epochs", 1)
    shutil.copytree(images, new)
    (new / "masks/phantom_0003.png").unlink()
    (new / "images/phantom_0003.png").unlink()
    if change == "changed":
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(new / "images/phantom_0003.png")
        Image.fromarray(np.full((32, 32), 255, np.uint8)).save(new / "masks/phantom_0003.png")
    before = (run / "config.yaml").read_text()
    answer = polyseg("train", "--resume", "--out", run, "--epochs", 2, "--data", new)
    expected = "has changed" if change == "changed" else "is missing"
    assert answer.code == 2 and f"image phantom_0003 {expected}" in answer.err
    assert (run / "config.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_evaluate_accepts_data_in_a_new_place(polyseg, tmp_path, images):
    run, new, others = tmp_path / "run", tmp_path / "new", tmp_path / "others"
    polyseg("train", "--data", images, "--out", run, *SET, "-q")
    polyseg("data", "demo", others, "--images", 4, "--size", 32, "--seed", 5)

    def evaluated(*more):
        answer = polyseg("evaluate", run, "--no-figures", "--json", *more)
        return answer, json.loads(answer.out)["evaluation"]["runs"] if answer.code == 0 else None

    choice = ("--threshold", "val")
    _, there = evaluated("--out", tmp_path / "a", *choice)
    images.rename(new)
    for command in ("evaluate", "estimate-uncertainty"):
        answer = polyseg(command, run)
        assert answer.code == 2 and len(answer.err.splitlines()) == 1
        assert f"{images}: there is no such file or folder" in answer.err and "--data" in answer.err
    answer, moved = evaluated("--out", tmp_path / "b", "--data", new, *choice)
    assert moved == there and "reading its images from" in " ".join(answer.err.split())
    answer, _ = evaluated("--out", tmp_path / "c", "--data", new, "--split", "train")
    assert answer.code == 0 and "not a test" in " ".join(answer.err.split())
    answer, every = evaluated("--out", tmp_path / "d", "--data", new, "--split", "all")
    assert every[0]["counts"]["images"] == 16 and "not a test" in " ".join(answer.err.split())
    _, other = evaluated("--out", tmp_path / "e", "--data", others)
    assert other[0]["counts"]["images"] == 4
    answer, _ = evaluated("--data", others, "--split", "test")
    assert answer.code == 2 and "was not trained on" in answer.err
    answer = polyseg("estimate-uncertainty", run, "--data", new, "--split", "test", "--json")
    assert answer.code == 0 and "reading its images from" in " ".join(answer.err.split())


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_file_names_like_formulas_are_escaped_in_all_csv_files(polyseg, tmp_path, images):
    """Only CSV cells are escaped; JSON files and HTML pages hold the names unchanged."""
    for kind in ("images", "masks"):
        for number in range(16):
            name = {14: "@SUM(A1)", 15: "-0.5"}.get(number, f"=1+{number}")
            (images / kind / f"phantom_{number:04}.png").rename(images / kind / f"{name}.png")
    run = tmp_path / "=run"
    last = ["--resume", "--out", run, "--epochs", "3"]
    assert polyseg("train", "--data", images, "--out", run, *SET, "-q", "--epochs", 2).code == 0
    assert polyseg("train", *last, "-q", "--set", "training.scheduler=constant").code == 2
    assert polyseg("train", *last, "-q").code == 0
    all_of_it = ["--out", tmp_path / "e", "--split", "all", "--corrupt", "noise", "--no-figures"]
    assert polyseg("evaluate", run, *all_of_it).code == 0
    assert polyseg("estimate-uncertainty", run, "--out", tmp_path / "u").code == 0
    assert polyseg("predict", run, images / "images", "--out", tmp_path / "p").code == 0
    assert polyseg("schedule", "export", run, "--out", tmp_path / "s.csv").code == 0
    shown = polyseg("schedule", "show", run, "--csv")
    (tmp_path / "shown.csv").write_text(shown.out)
    tables = [*tmp_path.rglob("*.csv")]
    assert len(tables) == 9, tables
    found = set()
    for path in tables:
        for row in csv.reader(path.open(newline="")):
            for cell in row:
                found.add(cell)
                if cell.startswith(("=", "+", "-", "@")):
                    float(cell)
    assert {"'=1+1", "'@SUM(A1)", "-0.5", "'=run", "'=1+1.png"} <= found
    split = json.loads((run / "split.json").read_text())
    page_there = ["--out", tmp_path / "r.html"]
    formula = next(row["id"] for row in split["train"] if row["id"].startswith("="))
    assert polyseg("schedule", "show", run, "--image", formula).code == 0
    assert polyseg("report", run, "--evaluation", tmp_path / "e", *page_there).code == 0
    page = (tmp_path / "r.html").read_text()
    assert f">{formula}<" in page and "'=1" not in page and "&#x27;=1" not in page


def test_manifest_accepts_ids_that_look_like_formulas(polyseg, tmp_path, images):
    rows = [f"images/phantom_{i:04}.png,masks/phantom_{i:04}.png,=1+{i}" for i in range(16)]
    (images / "list.csv").write_text("\n".join(["image,mask,id", *rows]) + "\n")
    out = tmp_path / "split.json"
    assert polyseg("data", "split", images / "list.csv", "--out", out).code == 0
    assert '"=1+3"' in out.read_text()


@pytest.mark.slow
def test_evaluate_warns_of_training_images(polyseg, tmp_path, images):
    polyseg("train", "--data", images, "--out", tmp_path / "run", *SET, "--quiet")
    shutil.copytree(images, tmp_path / "moved")
    answer = polyseg("evaluate", tmp_path / "run", "--data", tmp_path / "moved", "--no-figures")
    assert answer.code == 0
    assert "14 of these 16 images are training or validation images of" in answer.err


@pytest.mark.slow
def test_sigterm_ends_the_process_by_signal(tmp_path):
    arguments = ["train", "--out", tmp_path / "run", "--epochs", "100000", *SET]
    process = subprocess.Popen(
        [sys.executable, "-m", "polyseg", *map(str, arguments)],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    for line in process.stderr:
        if line.startswith("epoch 2/"):
            process.send_signal(signal.SIGTERM)
            break
    _, rest = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in rest and "polyseg train --resume --out" in rest


def test_ctrl_c_while_reading_images_exits_with_130(polyseg, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("polyseg.commands.train.load_images", interrupted)
    answer = polyseg("train", "--dry-run")
    assert answer.code == 130 and "Traceback" not in answer.err


def test_closed_pipe_is_not_an_error(tmp_path):
    command = f"{sys.executable} -m polyseg config schema | head -1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.stdout == "{\n" and done.stderr == ""


def test_help_states_the_defaults_of_the_settings():
    settings = {setting["key"]: setting["default"] for setting in settings_of()}
    command = get_command(app).commands["train"]
    helps = {parameter.name: parameter.help for parameter in command.params}
    keys = {"epochs": "training.epochs", "seed": "training.seed", "data": "data.path"}
    keys |= {"loss": "loss.name", "device": "training.device", "replay_arm": "control.replay_arm"}
    for name, key in keys.items():
        assert f"default: {settings[key]}" in helps[name]


@pytest.mark.parametrize("command", [["train"], ["evaluate"], ["schedule", "show"]], ids=str)
def test_help_shows_no_value_type_for_flags(polyseg, command):
    done = polyseg(*command, "--help")
    assert "--verbose" in done.out and "bool" not in done.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("polyseg tra", ["train"]),
        ("polyseg train --loss dice", ["dice", "dice_bce"]),
        (
            "polyseg train --set control.stat",
            ["control.statistics=batch", "control.statistics=dataset"],
        ),
        ("polyseg train --set training.epo", ["training.epochs=30"]),
        ("polyseg train --set loss.name = dice", ["dice", "dice_bce"]),
        ("polyseg evaluate run --split t", ["train", "test"]),
    ],
)
def test_bash_completes_commands_names_and_settings(words, offers):
    environment = {**os.environ, "_POLYSEG_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(len(words.split()) - 1)
    code = "import sys; sys.argv = ['polyseg']; from polyseg.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == offers


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["config", "show", "--set", "control.lambda=3"], "did you mean control.sensitivity?"),
        (["config", "show", "--set", "epochs=3"], "did you mean training.epochs?"),
        (["train", "--loss", "adaptive"], "did you mean polydice1?"),
    ],
)
def test_wrong_setting_name_gets_a_suggestion(polyseg, arguments, hint):
    done = polyseg(*arguments)
    assert done.code == 2 and hint in done.err


def test_misplaced_data_folder_error_shows_the_correct_command(polyseg, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    done = polyseg("train", tmp_path)
    assert done.code == 2 and f"polyseg train --data {tmp_path}" in done.err
    done = polyseg("data", "check", tmp_path / "images")
    assert done.code == 2 and f"beside it: give {tmp_path}" in done.err
