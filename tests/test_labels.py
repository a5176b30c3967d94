"""Several labels as separate binary tasks, from masks to figures; and large images in tiles."""

import csv
import io
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

from polyseg.adaptive.controller import EpsilonControl
from polyseg.commands.train import train
from polyseg.config import ControlConfig, DataConfig, LossConfig, UncertaintyConfig, load_config
from polyseg.difficulty import epsilon_from_difficulty, normalise
from polyseg.losses import polydice1_loss
from polyseg.montecarlo.assessment import assess
from polyseg.networks.networks_by_name import build_network
from polyseg.networks.segmentation_network import SegmentationNetwork, SlidingWindow
from polyseg.records import Assessment, Batch
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.record_files import read_assessment, read_schedule
from polyseg.training.losses_by_name import as_tasks, build_objective
from tests.conftest import TINY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data set with mask values 0, 1 (a bright disc), 2 (a dark disc) and 5 (noise)."""
    path = tmp_path_factory.mktemp("labels")
    (path / "images").mkdir()
    (path / "masks").mkdir()
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:40, :48]
    for i in range(16):
        image = generator.normal(120, 10, (40, 48))
        mask = np.zeros((40, 48), np.uint8)
        for value, shift in ((1, 80), (2, -80)):
            row, column = generator.integers(8, 32), generator.integers(8, 40)
            disc = (rows - row) ** 2 + (columns - column) ** 2 < (4 + i % 4) ** 2
            image[disc] += shift
            mask[disc] = value
        mask[0, :3] = 5
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path / f"images/c{i:02d}.png")
        Image.fromarray(mask).save(path / f"masks/c{i:02d}.png")
    return path


TASKS = "data.foreground={bright: 1, dark: 2}"


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    """Return the folder of a short run with two labels, and the output of the command."""
    path = tmp_path_factory.mktemp("runs") / "run"
    settings = [TASKS, f"data.path={folder}", f"output.path={path}", "uncertainty.save_maps=true"]
    with pytest.MonkeyPatch.context() as patch:  # No test looks at the figures themselves.
        patch.setattr(Figure, "savefig", lambda _, path, **__: Path(path).touch())
        return path, train(load_config(overrides=[*TINY, *settings]))


def test_each_label_has_its_own_row(run):
    path, outcome = run
    assessment = read_assessment(path / "uncertainty/epoch_0001.h5", with_maps=True)
    schedule = read_schedule(path / "schedule.h5")
    n = len(set(assessment.ids))
    assert n == 11 and len(assessment.ids) == 2 * n
    assert assessment.labels == ["bright", "dark"] * n
    assert schedule.ids == assessment.ids and schedule.labels == assessment.labels
    assert schedule.epsilon.shape == (3, 2 * n)
    assert len(assessment.maps["mean"]) == 2 * n
    bright, dark = (assessment.of_label(label) for label in ("bright", "dark"))
    assert bright.ids == dark.ids and not np.array_equal(bright.difficulty, dark.difficulty)
    with h5py.File(path / "uncertainty/epoch_0001.h5") as file:
        assert file["label"].asstr()[:2].tolist() == ["bright", "dark"]
    assert [one.title for one in outcome.evaluation.runs] == ["run: bright", "run: dark"]


def test_epsilons_of_a_label_follow_from_its_own_difficulties(run):
    """Apply eq. 11 and 12 with data-set statistics to each label."""
    path, _ = run
    assessment = read_assessment(path / "uncertainty/epoch_0001.h5")
    control = EpsilonControl(ControlConfig(statistics="dataset"), 0.0, assessment, labels=2)
    epsilon = control.over_data_set
    for k, label in enumerate(("bright", "dark")):
        difficulty = assessment.of_label(label).difficulty
        expected = epsilon_from_difficulty(normalise(difficulty), -0.4, 1.0, 1.0)
        np.testing.assert_allclose(epsilon[k::2], expected)
    some = [assessment.ids[4], assessment.ids[0]]
    np.testing.assert_array_equal(control.epsilon(some), epsilon[[4, 5, 0, 1]])
    assert EpsilonControl(ControlConfig(), 0.3, labels=2).epsilon(some).tolist() == [0.3] * 4


def test_tables_and_figures_separate_labels(run):
    path, _ = run
    rows = list(csv.DictReader(io.StringIO((path / "evaluation/per_image.csv").read_text())))
    assert {row["label"] for row in rows} == {"bright", "dark"}
    assert len(rows) == 2 * len({row["id"] for row in rows})
    assert "run: bright" in (path / "evaluation/table.md").read_text()
    figures = {one.name for one in (path / "figures").iterdir()}
    for name in ("difficulty", "difficulty_dice", "epsilon"):
        assert {f"{name}_1_bright.png", f"{name}_2_dark.png"} <= figures


@pytest.mark.slow
def test_run_with_labels_resumes_bit_for_bit(folder, tiny):
    def weights(name, epochs, resume=False):
        more = (f"data.path={folder}", f"training.epochs={epochs}", "training.scheduler=constant")
        outcome = train(tiny(name, TASKS, *more), resume=resume)
        return read_checkpoint(outcome.folder / "checkpoints/last.safetensors").weights

    whole = weights("whole", 3)
    weights("parts", 2)
    parts = weights("parts", 3, resume=True)
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_predict_writes_the_mask_values_of_the_labels(run, folder, polyseg, tmp_path):
    path, _ = run
    answer = polyseg("predict", path, folder / "images", "--out", tmp_path / "masks")
    assert answer.code == 0, answer.err
    values = {
        value
        for one in (tmp_path / "masks").glob("*.png")
        for value in np.unique(np.asarray(Image.open(one))).tolist()
    }
    assert values <= {0, 1, 2}
    for row in csv.DictReader((tmp_path / "masks/predictions.csv").open()):
        written = np.asarray(Image.open(tmp_path / "masks" / row["file"]))
        value = {"bright": 1, "dark": 2}[row["label"]]
        assert int(row["foreground_pixels"]) == (written == value).sum()


def test_predict_writes_one_file_per_overlapping_task(folder, tiny, polyseg, tmp_path):
    train(tiny("run", "data.foreground={all: [1, 2], dark: 2}", f"data.path={folder}"))
    answer = polyseg(
        "predict", tmp_path / "run", folder / "images/c03.png", "--out", tmp_path / "o"
    )
    assert answer.code == 0, answer.err
    names = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert names == ["c03_all.png", "c03_dark.png", "predictions.csv"]
    for name in names[:2]:
        values = np.unique(np.asarray(Image.open(tmp_path / "o" / name))).tolist()
        assert set(values) <= {0, 255}


def test_loss_of_several_labels_equals_the_loss_of_each():
    logits, masks = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8) > 0.7
    epsilon = torch.linspace(-0.4, 1, 6)
    losses = build_objective(LossConfig())(as_tasks(logits), as_tasks(masks).float(), epsilon)
    for i in range(3):
        for k in range(2):
            alone = polydice1_loss(
                logits[i, k].sigmoid()[None], masks[i, k][None], float(epsilon[2 * i + k])
            )
            torch.testing.assert_close(losses[2 * i + k], alone[0])


class TwoHeads(nn.Module):
    """A network with two channels, each of which can be selected alone."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Dropout2d(0.5))
        self.heads = nn.ModuleList(nn.Conv2d(8, 1, 1) for _ in range(2))
        self.chosen = (0, 1)

    def forward(self, images):
        features = self.body(images)
        return torch.cat([self.heads[k](features) for k in self.chosen], dim=1)


def test_assessment_of_two_labels_equals_two_assessments():
    network = TwoHeads()
    images, masks = torch.rand(4, 1, 12, 12), (torch.rand(4, 2, 12, 12) > 0.5).byte()
    ids = list("abcd")
    both = assess(network, [Batch(ids, images, masks, ("x", "y"))], UncertaintyConfig(samples=4))
    for k, label in enumerate("xy"):
        network.chosen = (k,)
        alone = assess(
            network, [Batch(ids, images, masks[:, k : k + 1])], UncertaintyConfig(samples=4)
        )
        part = both.of_label(label)
        assert isinstance(part, Assessment) and part.ids == ids
        for name in part.scores:
            np.testing.assert_allclose(part.scores[name], alone.scores[name], atol=1e-7)
        np.testing.assert_array_equal(part.dice, alone.dice)
        np.testing.assert_array_equal(part.foreground_pixels, alone.foreground_pixels)


# ---- large images in tiles


@pytest.fixture
def network():
    settings = {"channels": [4, 8], "strides": [2], "num_res_units": 1}
    return build_network("unet", in_channels=1, settings=settings)


def test_window_predictions_equal_whole_image_predictions():
    """A pixel-wise network gives equal values; one with a neighbourhood does so away from edges."""
    images = torch.rand(2, 1, 96, 112)
    for size, edge in ((1, 0), (3, 1)):
        network = SegmentationNetwork(nn.Conv2d(1, 2, size, padding=edge), 1).eval()
        with torch.no_grad():
            whole = network(images)
            network.window = SlidingWindow((64, 64), 0.5)
            tiled = network(images)
            assert tiled.shape == whole.shape == (2, 2, 96, 112)
            # Windows begin at 0 and 32 along the rows, at 0, 32 and 48 along the columns.
            rows = [r for r in range(96) if min(abs(r - e) for e in (32, 64)) > edge or not edge]
            columns = [
                c
                for c in range(112)
                if min(abs(c - e) for e in (32, 48, 64, 96)) > edge or not edge
            ]
            torch.testing.assert_close(
                tiled[:, :, rows][..., columns], whole[:, :, rows][..., columns]
            )
            small = images[..., :48, :64]
            torch.testing.assert_close(network(small), network.core(small))


def test_windows_of_a_pass_share_dropout_masks(network):
    """A periodic image gets a periodic uncertainty."""
    generator = torch.Generator().manual_seed(0)
    patch = torch.rand(1, 1, 32, 32, generator=generator)
    images = patch.repeat(1, 1, 3, 3)
    network.window = SlidingWindow((32, 32), 0.0)
    masks = torch.ones(1, 1, 96, 96, dtype=torch.uint8)
    for kind in ("consistent", "independent"):
        maps = assess(
            network,
            [Batch(["a"], images, masks)],
            UncertaintyConfig(samples=3, save_maps=True, masks=kind),
        ).maps["mutual_information"][0]
        assert maps.max() > 0
        np.testing.assert_allclose(maps[:32, :32], maps[64:, 32:64], atol=2e-3)


@pytest.mark.slow
def test_training_on_tiles_accepts_images_of_many_sizes(polyseg, tmp_path):
    generator = np.random.default_rng(0)
    for i in range(10):
        (tmp_path / "d/images").mkdir(parents=True, exist_ok=True)
        (tmp_path / "d/masks").mkdir(exist_ok=True)
        height, width = 50 + 5 * i, 90 - 3 * i
        mask = np.zeros((height, width), np.uint8)
        mask[10:30, 20:50] = 255
        pixels = generator.integers(0, 100, (height, width)) + mask // 2
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / f"d/images/{i}.png")
        Image.fromarray(mask).save(tmp_path / f"d/masks/{i}.png")
    settings = [part for one in (*TINY, "output.figures=false") for part in ("--set", one)]
    answer = polyseg(
        *("train", "--data", tmp_path / "d", "--out", tmp_path / "run", "--epochs", 1),
        *(*settings, "--set", "data.fit=tile", "--set", "control.start=1"),
    )
    assert answer.code == 0, answer.err
    answer = polyseg("predict", tmp_path / "run", tmp_path / "d/images", "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    with Image.open(tmp_path / "out/3.png") as mask:
        assert mask.size == (90 - 9, 50 + 15)


def test_tiles_need_a_size():
    with pytest.raises(ValueError, match=r"data.fit tile needs a data\.size"):
        DataConfig(fit="tile", size=None)
