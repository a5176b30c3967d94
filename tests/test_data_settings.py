"""Data settings in whole runs: training, resuming, evaluation and `polyseg data check`."""

import csv
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from polyseg.commands.train import train
from polyseg.config import load_config
from polyseg.data.loading import load_images
from polyseg.errors import PolysegError
from polyseg.runs.checkpoints import read_checkpoint
from polyseg.runs.run_folder import RunDirectory
from tests.test_train import Stop, assert_same_run, run_of, stop_after

SETTINGS = {
    "tiles of labels": ("data.foreground={a: 1, b: [1, 2]}", "data.fit=tile"),
    "levels of the data set": ("data.normalise=dataset",),
    "foreground only": (
        "data.foreground=2",
        "data.training_slices=foreground",
        "data.normalise=percentile",
        "data.augmentation=strong",
    ),
    "a fold on disk": ("data.folds=3", "data.fold=2", "data.memory=0"),
    "all at once": (
        "data.foreground=[1, 2]",
        "data.fit=tile",
        "data.normalise=dataset",
        "control.statistics=dataset",
        "training.workers=1",
        "uncertainty.masks=independent",
        "data.memory=0",
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a data set with label 1 in every image and label 2 in every second one."""
    path = tmp_path_factory.mktemp("set")
    generator = np.random.default_rng(0)
    for part in ("images", "masks"):
        (path / part).mkdir()
    for i in range(18):
        pixels = generator.integers(0, 90, (44, 52, 3), np.uint8)
        mask = np.zeros((44, 52), np.uint8)
        row, column = generator.integers(4, 20, 2)
        mask[row : row + 10, column : column + 12] = 1
        if i % 2:
            mask[row + 12 : row + 20, column : column + 9] = 2
        pixels[mask == 1] += 120
        pixels[mask == 2] += 60
        Image.fromarray(pixels).save(path / f"images/case_{i:02d}.png")
        Image.fromarray(mask).save(path / f"masks/case_{i:02d}.png")
    return path


@pytest.fixture
def overrides(folder):
    def of(*settings):
        first = () if any("foreground" in one for one in settings) else ("data.foreground=1",)
        cache = f"data.cache={folder.parent / 'cache'}"
        return f"data.path={folder}", cache, *first, *settings

    return of


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
def test_resumed_run_equals_uninterrupted_run(tiny, finished, overrides, kind):
    stopped = tiny("stopped", *overrides(*SETTINGS[kind]))
    with pytest.raises(Stop):
        train(stopped, progress=stop_after(2))
    train(stopped, resume=True)
    whole = finished("whole", *overrides(*SETTINGS[kind]))
    assert_same_run(whole, RunDirectory(whole.path.parent / "stopped"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", SETTINGS)
@pytest.mark.usefixtures("quick_figures")
def test_evaluate_and_estimate_read_images_as_the_run_did(
    finished, overrides, polyseg, tmp_path, kind
):
    run = finished("run", *overrides(*SETTINGS[kind]))
    expected = list(csv.DictReader((run.evaluation / "per_image.csv").open()))
    answer = polyseg("evaluate", run.path, "--out", tmp_path / "again", "--no-figures")
    assert answer.code == 0, answer.err
    assert list(csv.DictReader((tmp_path / "again/per_image.csv").open())) == expected
    answer = polyseg("estimate-uncertainty", run.path, "--split", "test", "--out", tmp_path / "u")
    assert answer.code == 0, answer.err
    ids = {row["id"] for row in csv.DictReader((tmp_path / "u/per_image.csv").open())}
    assert ids == {row["id"] for row in expected}


def test_checkpoint_holds_the_levels_of_the_training_images(finished, overrides, folder):
    run = finished("run", *overrides("data.normalise=dataset"))
    levels = read_checkpoint(run.best).levels
    split, _ = run.read_split()
    pixels = np.concatenate(
        [
            np.asarray(
                Image.open(folder / f"images/{identity}.png").resize((32, 32), Image.BILINEAR)
            ).reshape(-1, 3)
            for identity in split["train"]
        ]
    ).astype(float)
    np.testing.assert_allclose(levels.offset, pixels.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(levels.scale, pixels.std(axis=0), atol=0.5)
    assert dataclasses.asdict(levels)["clipped"] is False


def test_images_without_foreground_are_removed_from_training_only(finished, overrides):
    run = finished("run", *overrides(*SETTINGS["foreground only"]))
    split, _ = run.read_split()
    odd = [identity for identity in split["train"] if int(identity[-2:]) % 2]
    assert split["train"] == odd
    assert any(int(identity[-2:]) % 2 == 0 for part in ("val", "test") for identity in split[part])


@pytest.mark.slow
def test_data_split_writes_the_split_of_a_run(tiny, finished, overrides, polyseg, tmp_path, folder):
    run = finished("run", *overrides(*SETTINGS["a fold on disk"]))
    flags = ("--fold", 2, "--set", "data.folds=3", "--set", "data.foreground=1")
    answer = polyseg("data", "split", folder, *flags, "--out", tmp_path / "s.json")
    assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "s.json").read_text()) == json.loads(run.split.read_text())
    other = run_of(
        tiny("other", *overrides("data.fit=tile"), f"data.split_file={tmp_path / 's.json'}")
    )
    assert other.read_split()[0] == run.read_split()[0]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_figures")
def test_checkpoint_outside_its_run_uses_all_images(tiny, overrides, polyseg, tmp_path, folder):
    """The split file that the checkpoint names is not read."""
    names = sorted(path.stem for path in (folder / "images").iterdir())
    folds = [{"train": names[:-4], "val": names[-4:]}] * 8
    (tmp_path / "s.json").write_text(json.dumps(folds))
    split = (f"data.split_file={tmp_path / 's.json'}", "data.fold=7")
    run = run_of(tiny("run", *overrides("data.fit=tile"), *split))
    moved = tmp_path / "away" / "moved.safetensors"
    moved.parent.mkdir()
    moved.write_bytes(run.best.read_bytes())
    answer = polyseg("estimate-uncertainty", moved, "--out", tmp_path / "u")
    assert answer.code == 0, answer.err
    assert len((tmp_path / "u/per_image.csv").read_text().splitlines()) == 1 + len(names)
    answer = polyseg("evaluate", moved, "--out", tmp_path / "e", "--no-figures")
    assert answer.code == 2 and "give the folder of the run" in answer.err


def test_duplicates_across_parts_are_refused_before_training(folder, polyseg, tmp_path):
    for part in ("images", "masks"):
        (tmp_path / "d" / part).mkdir(parents=True)
        for path in (folder / part).iterdir():
            (tmp_path / "d" / part / path.name).write_bytes(path.read_bytes())
    # With so many copies one is in another part, whatever the split.
    for i in range(6):
        for part in ("images", "masks"):
            source = folder / part / "case_00.png"
            (tmp_path / "d" / part / f"copy_{i}.png").write_bytes(source.read_bytes())
    flags = ("--data", tmp_path / "d", "--dry-run", "--set", "data.foreground=1")
    answer = polyseg("train", *flags)
    assert answer.code == 2
    assert "are the same image" in answer.err and "data.duplicates=allow" in answer.err
    assert polyseg("train", *flags, "--set", "data.duplicates=allow").code == 0


def test_data_check_finds_a_group_in_two_given_parts(folder, polyseg, tmp_path):
    rows = ["image,mask,split,group"]
    for i, part in enumerate(["train"] * 12 + ["val"] * 3 + ["test"] * 3):
        name = f"case_{i:02d}.png"
        rows.append(f"{folder}/images/{name},{folder}/masks/{name},{part},p{i % 9}")
    (tmp_path / "l.csv").write_text("\n".join(rows))
    answer = polyseg("data", "check", tmp_path / "l.csv", "--set", "data.foreground={a: 1, b: 2}")
    assert (
        answer.code == 2
        and "images of one group are in two parts: p3 (train and val)" in answer.err
    )
    rows = [row.rpartition(",")[0] for row in rows]
    (tmp_path / "l.csv").write_text("\n".join(rows))
    flags = ("--set", "data.foreground={a: 1, b: 2}", "--json")
    found = json.loads(polyseg("data", "check", tmp_path / "l.csv", *flags).out)
    assert (found["empty masks of a"], found["empty masks of b"]) == (0, 9)


def test_small_patches_of_large_images_give_a_warning(tmp_path, polyseg, folder):
    for part, mode in (("images", "L"), ("masks", "L")):
        (tmp_path / "d" / part).mkdir(parents=True)
        for i in range(4):
            with Image.open(folder / part / f"case_{i:02d}.png") as one:
                large = one.convert(mode).resize((520, 440), Image.Resampling.NEAREST)
                large.save(tmp_path / "d" / part / f"{i}.png")
    flags = ("--set", "data.fit=tile", "--set", "data.size=32", "--set", "data.foreground=1")
    answer = polyseg("train", "--data", tmp_path / "d", "--dry-run", *flags)
    assert answer.code == 0, answer.err
    assert "an image of 440 x 520 needs over 238 windows of 32 x 32" in answer.err


def save_pair(root, name, pixels, mask, **options):
    for side, values, end in (("images", pixels, "jpg"), ("masks", mask, "png")):
        (root / side).mkdir(parents=True, exist_ok=True)
        more = options if end == "jpg" else {}
        Image.fromarray(values).save(root / side / f"{name}.{end}", **more)


def lesions(root, side, radius, count=12, size=(64, 64)):
    generator = np.random.default_rng(3)
    for k in range(count):
        pixels = generator.integers(0, 255, size).astype(np.uint8)
        mask = np.zeros(size, np.uint8)
        for row, column in generator.integers(radius, min(size) - radius, (6, 2)):
            mask[row : row + radius, column : column + radius] = 255
        save_pair(root, f"{side}{k}", pixels, mask)
    return root


@pytest.mark.parametrize(
    ("turn", "shape", "settings", "expected"),
    [
        (6, (48, 64), ("data.orientation=stored",), "stored"),
        (6, (48, 64), (), "error"),
        (6, (64, 64), (), "error"),
        (3, (48, 64), (), "error"),
        (6, (64, 64), ("data.orientation=tag",), "turned"),
        (1, (64, 64), (), "stored"),
    ],
)
def test_exif_orientation_needs_a_setting_if_masks_are_ambiguous(
    tmp_path, turn, shape, settings, expected
):
    generator = np.random.default_rng(0)
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.repeat(np.repeat(generator.integers(0, 255, (8, 8)), 8, 0), 8, 1)[: shape[0]]
    mask = (pixels > 128).astype(np.uint8) * 255
    save_pair(tmp_path, "a", pixels.astype(np.uint8), mask, exif=exif, quality=100)
    config = load_config(overrides=[f"data.path={tmp_path}", "data.size=null", *settings]).data
    if expected == "error":
        with pytest.raises(PolysegError, match=r"set data\.orientation=stored .* or =tag"):
            load_images(config)
        return
    found = load_images(config).pixels("a")[..., 0].astype(int)
    true = np.rot90(pixels, -1) if expected == "turned" else pixels
    assert np.abs(found - true).mean() < 3


def test_exif_orientation_is_applied_if_the_mask_has_the_turned_size(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.arange(48 * 64, dtype=np.int64).reshape(48, 64) % 200
    mask = np.rot90(pixels > 100, -1).astype(np.uint8) * 255
    save_pair(tmp_path, "a", pixels.astype(np.uint8), mask, exif=exif)
    config = load_config(overrides=[f"data.path={tmp_path}", "data.size=null"]).data
    assert load_images(config).pixels("a").shape == (64, 48, 1)


def test_foreground_lost_by_resizing_is_reported(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "s", 3, size=(256, 256))
    plain = polyseg("data", "check", data, "--json")
    assert plain.code == 0 and "notes" not in json.loads(plain.out)
    small = polyseg("data", "check", data, "--json", "--set", "data.size=96")
    (note,) = json.loads(small.out)["notes"]
    assert note.startswith("resizing to 96 x 96 loses ") and "data.fit=tile" in note
    gone = ("--set", "data.size=16")
    for command in (("data", "check", data), ("train", "--dry-run", "--data", data)):
        answer = polyseg(*command, *gone)
        assert answer.code == 2
        assert "resizing leaves no foreground in any training mask" in answer.err


def test_checkpoint_records_automatic_size_and_regions(tmp_path, tiny):
    for k in range(12):
        labels = np.zeros((40, 48), np.uint8)
        labels[8 : 20 + k, 8:30] = 1
        labels[10:14, 10 : 16 + k] = 2
        for side, values, end in (("imagesTr", 60 * labels + k, "_0000"), ("labelsTr", labels, "")):
            (tmp_path / "d" / side).mkdir(parents=True, exist_ok=True)
            Image.fromarray(values.astype(np.uint8)).save(tmp_path / "d" / side / f"c{k}{end}.png")
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    description = {"channel_names": {"0": "US"}, "labels": labels, "file_ending": ".png"}
    (tmp_path / "d/dataset.json").write_text(json.dumps(description))
    settings = (f"data.path={tmp_path / 'd'}", "data.size=auto", "data.duplicates=allow")
    run = run_of(tiny("run", *settings, "training.epochs=1"))
    config = read_checkpoint(run.last).config.data
    assert config.size == (48, 48)
    assert config.tasks == {"whole": (1, 2), "core": (2,)}
    train(tiny("run", *settings, "training.epochs=2"), resume=True)  # Resolves to the same values.
    assert read_checkpoint(run.last).config.data.tasks == config.tasks
    for other, told in (
        ("data.size=64", r"data.size \(48, 48\) -> 64"),
        ("data.foreground={core: 2}", r"data.foreground \{'whole': .* -> \{'core'"),
        ("data.group=none", "data.group auto -> none"),
    ):
        with pytest.raises(PolysegError, match=f"--resume cannot change {told}"):
            train(tiny("run", *settings, other, "training.epochs=2"), resume=True)


def test_resume_refuses_missing_data_settings(tmp_path, tiny):
    data = lesions(tmp_path / "d", "s", 12)
    settings = (f"data.path={data}", "data.duplicates=allow", "training.epochs=1")
    train(tiny("run", *settings, "data.foreground=255", "data.size=32"))
    given = ("data.foreground=255", "data.size=32")
    for other, told in (
        ((given[0], "data.size=auto"), r"data.size 32 -> \(64, 64\)"),
        ((given[1],), "data.foreground 255 -> None"),
    ):
        with pytest.raises(PolysegError, match=f"--resume cannot change {told}; start a new run"):
            train(tiny("run", *settings, *other), resume=True)


def test_dry_run_shows_automatic_size_and_memory(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "s", 12, size=(60, 90))
    settings = ("--set", "data.duplicates=allow", "--out", tmp_path / "run", "--json")
    answer = polyseg("train", "--data", data, "--dry-run", *settings)
    megabytes = 12 * (64 * 96 + 64 * 96) / 1e6
    train_pixels = 8 * 64 * 96 / 1e6
    assert json.loads(answer.out)["size of the network's input"] == (
        "64 x 96 (data.size=auto: the images' median, at most 256); images and masks take "
        f"{megabytes:.1f} MB in memory; a pass over the training images has {train_pixels:.2g} "
        "million pixels"
    )


def test_data_check_refuses_what_training_refuses(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "s", 12, count=2)
    for command in (("data", "check", data), ("train", "--dry-run", "--data", data)):
        answer = polyseg(*command)
        assert answer.code == 2
        assert "2 images are too few for 3 parts" in answer.err


def test_data_check_shows_the_groups(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "p1_s", 12)
    lesions(tmp_path / "d", "p2_s", 11)
    lesions(tmp_path / "d", "p3_s", 10)
    answer = polyseg("data", "check", data, "--json", "--set", "data.duplicates=allow")
    found = json.loads(answer.out)
    assert found["groups"] == "3 (p1, p2, p3)"
    assert sum(found["groups in the split"].values()) == 3
    assert "36 images form 3 groups by the first number in their names" in found["notes"][0]
    flags = ("--json", "--set", "data.duplicates=allow", "--set")
    none = json.loads(polyseg("data", "check", data, *flags, "data.group=none").out)
    assert "groups" not in none and "notes" not in none
    given = json.loads(polyseg("data", "check", data, *flags, "data.group=s\\d+$").out)
    assert given["groups"].startswith("12 (s0, s1, s10,")


def test_manifest_draft_can_be_edited_and_read(tmp_path, polyseg):
    lesions(tmp_path / "d" / "x", "a", 12)
    (tmp_path / "d/x/images").rename(tmp_path / "d/x/photos")
    (tmp_path / "d/x/masks").rename(tmp_path / "d/x/drawn masks")
    refused = polyseg("data", "check", tmp_path / "d")
    assert refused.code == 2
    assert f"polyseg data manifest {tmp_path / 'd'} --out set.csv" in refused.err
    out = tmp_path / "set.csv"
    answer = polyseg("data", "manifest", tmp_path / "d", "--out", out, "--json")
    assert json.loads(answer.out) == {"file": str(out), "images": 12, "images without a mask": 0}
    assert polyseg("data", "check", out).code == 0
    assert polyseg("data", "manifest", tmp_path / "d", "--out", out).code == 2


def test_error_shows_colour_names_of_the_label_map(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "s", 12)
    for path in (data / "masks").iterdir():
        mask = np.asarray(Image.open(path))[..., None] // 255 * np.array([184, 61, 245], np.uint8)
        Image.fromarray(mask).save(path)
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "liver:184,61,245::"]
    (data / "labelmap.txt").write_text("\n".join([*lines, "odd:999,0,0::", "bad"]))
    answer = polyseg("data", "check", data)
    assert answer.code == 2
    assert "'#000000' (background, " in answer.err and "'#B83DF5' (liver, " in answer.err


def test_channels_gray_converts_colour_images(tmp_path, polyseg):
    data = lesions(tmp_path / "d", "s", 12)
    colour = np.zeros((64, 64, 4), np.uint8)
    colour[..., 0], colour[..., 3] = np.arange(64) * 4, 255
    Image.fromarray(colour[..., :3]).save(data / "images/s0.jpg")
    found = json.loads(polyseg("data", "check", data, "--json", "--set", "data.channels=gray").out)
    assert found["channels"] == [1]
