"""Splits: sizes, strata, groups, folds, files, and duplicates across parts."""

import functools
import hashlib
import io
import itertools
import json
import operator
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.fft import dctn

from polyseg.config import DataConfig
from polyseg.data.duplicates import (
    MOST_DIFFERING_BITS,
    content_hash,
    likeness_of,
    near_pairs,
    refuse_leaks,
)
from polyseg.data.groups import with_groups
from polyseg.data.layouts.cases import Case
from polyseg.data.phantoms.phantom_sets import make_phantoms
from polyseg.data.splits import (
    PARTS,
    Member,
    groups_in_two_parts,
    read_split_file,
    split_by_settings,
)
from polyseg.errors import PolysegError


def members(n, seed=0):
    generator = np.random.default_rng(seed)
    return [Member(f"i{i:03d}", float(generator.random() ** 3)) for i in range(n)]


def everything(split):
    return sorted(functools.reduce(operator.iadd, split.values(), []))


@given(
    st.integers(3, 200),
    st.tuples(st.floats(0.1, 1), st.floats(0.05, 1), st.floats(0.05, 1)),
    st.integers(0, 10),
    st.booleans(),
)
def test_splits_hold_every_image_and_have_the_requested_sizes(n, weights, seed, stratify):
    shares = tuple(weight / sum(weights) for weight in weights)
    images = members(n)
    config = DataConfig(split=shares, split_seed=seed, stratify=stratify)
    split = split_by_settings(images, config)
    assert everything(split) == sorted(image.id for image in images)
    assert all(split[part] for part in PARTS)
    assert split == split_by_settings(images[::-1], config)
    if n >= 30:
        for part, share in zip(PARTS, shares, strict=True):
            assert abs(len(split[part]) - share * n) <= 1.5


def test_part_with_share_zero_is_empty():
    config = DataConfig(split=(1.0, 0.0, 0.0))
    assert split_by_settings(members(4), config)["val"] == []
    with pytest.raises(PolysegError, match="2 images are too few"):
        split_by_settings(members(2), DataConfig(split=(0.5, 0.25, 0.25)))


def test_stratification_makes_parts_similar():
    """Over many seeds the mean foregrounds of parts vary less than without stratification."""

    def spread(stratify):
        images = members(100)
        foreground = {image.id: image.foreground for image in images}
        means = [
            np.mean([foreground[identity] for identity in split["test"]])
            for seed in range(40)
            for split in [split_by_settings(images, DataConfig(split_seed=seed, stratify=stratify))]
        ]
        return np.std(means)

    assert spread(True) < 0.5 * spread(False)


def test_seed_changes_the_split():
    tests = [
        set(split_by_settings(members(100), DataConfig(split_seed=seed))["test"])
        for seed in range(2)
    ]
    assert len(tests[0] & tests[1]) < 8


def test_groups_stay_together():
    images = [Member(f"p{i % 17:02d}_{i}", i / 90) for i in range(90)]
    split = split_by_settings(images, DataConfig(group=r"p(\d+)_"))
    patients = {part: {identity[:3] for identity in ids} for part, ids in split.items()}
    assert sum(map(len, patients.values())) == 17
    assert all(patients.values()) and everything(split) == sorted(image.id for image in images)
    with pytest.raises(PolysegError, match=r"finds nothing in p00_0"):
        split_by_settings(images, DataConfig(group="x"))
    named = [Member(image.id, image.foreground, image.id[:3]) for image in images]
    assert split_by_settings(named, DataConfig()) == split_by_settings(
        images, DataConfig(group=r"(p\d+)_")
    )


def test_folds_test_each_image_once():
    images = members(52)
    splits = [split_by_settings(images, DataConfig(folds=4, fold=k)) for k in range(4)]
    assert all(everything(split) == sorted(image.id for image in images) for split in splits)
    tested = sorted(identity for split in splits for identity in split["test"])
    assert tested == sorted(image.id for image in images)
    assert {len(split["test"]) for split in splits} <= {12, 13, 14}
    assert all(split["val"] for split in splits)


def test_given_test_set_is_kept_and_folds_divide_the_rest():
    images = [Member(f"a{i}", i / 40, part="test" if i % 4 == 0 else None) for i in range(40)]
    given = sorted(f"a{i}" for i in range(0, 40, 4))
    split = split_by_settings(images, DataConfig())
    assert split["test"] == given
    assert len(split["val"]) == pytest.approx(30 * 0.15 / 0.85, abs=1)
    folds = [split_by_settings(images, DataConfig(folds=3, fold=k)) for k in range(3)]
    assert all(fold["test"] == given for fold in folds)
    assert sorted(one for fold in folds for one in fold["val"]) == sorted(
        image.id for image in images if image.part is None
    )


def test_given_validation_without_test_leaves_the_test_set_empty():
    images = [Member(f"a{i}", part="val" if i < 5 else "train") for i in range(20)]
    split = split_by_settings(images, DataConfig())
    assert (len(split["train"]), len(split["val"]), split["test"]) == (15, 5, [])


def test_split_file_defines_the_parts(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps({"train": [{"id": "i000", "sha256": "x"}], "test": ["i002"]}))
    split = split_by_settings(members(4), DataConfig(split_file=str(path)))
    assert split == {"train": ["i000"], "val": [], "test": ["i002"]}
    path.write_text(json.dumps({"train": ["i000", "gone"], "val": ["i001"]}))
    with pytest.raises(PolysegError, match="1 of its images are not in the data, such as gone"):
        split_by_settings(members(4), DataConfig(split_file=str(path)))


def test_nnunet_split_file_assigns_slices_by_volume(tmp_path):
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]))
    images = [Member(f"{volume}#{k:03d}", group=volume) for volume in "ab" for k in range(3)]
    images.append(Member("c", part="test"))
    split = split_by_settings(images, DataConfig(split_file=str(path), fold=1))
    assert split == {
        "train": ["b#000", "b#001", "b#002"],
        "val": ["a#000", "a#001", "a#002"],
        "test": ["c"],
    }
    with pytest.raises(PolysegError, match="holds folds 0 to 1; choose one by --fold"):
        split_by_settings(images, DataConfig(split_file=str(path)))


@pytest.mark.parametrize(
    "text",
    ["", "[", "{}", "3", "[]", '{"train": 3}', '{"train": [3]}', '{"train": ["a"], "x": []}'],
)
def test_invalid_split_file_is_one_line(tmp_path, text):
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(PolysegError, match=r"s\.json: ") as caught:
        read_split_file(tmp_path / "s.json")
    assert "\n" not in str(caught.value)


def test_split_file_without_folds_refuses_a_fold(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["i000"]}))
    with pytest.raises(PolysegError, match="is one split, not a list of folds"):
        read_split_file(tmp_path / "s.json", fold=0)


def test_id_in_two_parts_of_a_split_file_is_refused(tmp_path):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["i000"], "test": ["i000"]}))
    with pytest.raises(PolysegError, match="i000 is in it twice"):
        split_by_settings(members(2), DataConfig(split_file=str(tmp_path / "s.json")))


def test_images_given_for_training_stay_in_training():
    images = [Member(f"t{i}", i / 40, part="train") for i in range(10)]
    images += [Member(f"f{i}", i / 40) for i in range(20)]
    split = split_by_settings(images, DataConfig())
    assert {f"t{i}" for i in range(10)} <= set(split["train"])
    assert split["val"] and split["test"]


def test_given_validation_images_are_distributed_over_folds():
    parts = ["train"] * 12 + ["val"] * 4 + ["test"] * 4
    images = [Member(f"a{i:02d}", i / 40, part=part) for i, part in enumerate(parts)]
    folds = [split_by_settings(images, DataConfig(folds=2, fold=k)) for k in range(2)]
    assert all(everything(fold) == [image.id for image in images] for fold in folds)
    assert all(fold["test"] == ["a16", "a17", "a18", "a19"] for fold in folds)


@pytest.mark.parametrize("pattern", ["^(.+)$", ".*", "^(v.)"])
def test_group_pattern_keeps_slices_of_a_volume_together(pattern):
    images = [Member(f"v{i}#{k:03d}", k / 9, f"v{i}") for i in range(8) for k in range(9)]
    config = DataConfig(group=pattern)
    split = split_by_settings(images, config)
    assert groups_in_two_parts(split, images, DataConfig()) == []
    assert all(split.values())


def test_group_pattern_with_an_unmatched_group_is_refused():
    with pytest.raises(PolysegError, match="finds nothing in a"):
        split_by_settings([Member("a")], DataConfig(group="(x)?a"))


def test_slow_group_pattern_is_stopped(monkeypatch):
    """An alarm that was set before still works."""
    alarms = []
    before = signal.signal(signal.SIGALRM, lambda *_: alarms.append(1))
    signal.setitimer(signal.ITIMER_REAL, 1000)
    monkeypatch.setattr("polyseg.data.splits._LONGEST_MATCHING", 0.05)
    try:
        images = [Member("a"), Member("a" * 60 + "!")]
        with pytest.raises(PolysegError, match=r"data\.group .*takes too long on aaa.*simplify it"):
            split_by_settings(images, DataConfig(group="^((a+)+)$"))
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 900
        signal.raise_signal(signal.SIGALRM)
        assert alarms == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_group_patterns_work_in_other_threads():
    images = [Member(f"p{i % 9}_{i}") for i in range(45)]
    config = DataConfig(group="^(p.)")
    with ThreadPoolExecutor(1) as pool:
        split = pool.submit(split_by_settings, images, config).result()
    assert split == split_by_settings(images, config)


def test_groups_divided_by_given_parts_are_named():
    images = [Member("a", group="x", part="train"), Member("b", group="x", part="test")]
    split = split_by_settings(images, DataConfig(split=(1.0, 0.0, 0.0)))
    assert groups_in_two_parts(split, images, DataConfig()) == ["x (train and test)"]


def test_images_missing_from_the_split_file_are_counted(tmp_path, caplog):
    (tmp_path / "s.json").write_text(json.dumps({"train": ["i000"], "test": ["i001"]}))
    split_by_settings(members(5), DataConfig(split_file=str(tmp_path / "s.json")))
    assert "3 images are in none of the parts" in caplog.text


# ---- duplicates across parts


def picture(seed, size=(96, 96)):
    return make_phantoms(seed + 1, seed=seed, size=size)[-1].image


def variants(pixels):
    """Yield near-duplicates of an image: compressed, half size, brighter, with noise."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    yield np.asarray(Image.open(buffer))
    half = (pixels.shape[1] // 2, pixels.shape[0] // 2)
    yield np.asarray(Image.fromarray(pixels).resize(half, Image.Resampling.BILINEAR))
    yield np.clip(pixels * 1.2 + 10, 0, 255).astype(np.uint8)
    noise = np.random.default_rng(0).normal(0, 5, pixels.shape)
    yield np.clip(pixels + noise, 0, 255).astype(np.uint8)
    yield pixels.astype(np.uint16) * 257


def test_near_duplicates_are_found_and_other_images_are_not():
    images = {f"p{seed}": likeness_of(picture(seed)) for seed in range(12)}
    assert near_pairs(images) == []
    for seed in range(4):
        for variant in variants(picture(seed)):
            found = near_pairs(images | {"again": likeness_of(variant)})
            assert found == [("again", f"p{seed}")]


def test_hash_distance_of_different_images_is_far_above_the_threshold():
    hashes = [int(likeness_of(picture(seed)).near, 16) for seed in range(12)]
    distances = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 2 * MOST_DIFFERING_BITS


@pytest.mark.parametrize("modality", ["ultrasound", "endoscopy"])
def test_perceptual_hash_compares_dct_of_scipy_with_its_median(modality):
    for phantom in make_phantoms(6, modality=modality, size=(128, 128)):
        gray = np.atleast_3d(phantom.image).mean(axis=2, dtype=np.float32)
        small = np.asarray(Image.fromarray(gray).resize((64, 64), Image.Resampling.BOX))
        lowest = dctn(small.astype(np.float64), norm="ortho")[:16, :16].ravel()
        above = lowest > np.median(lowest[1:])
        above[0] = False
        assert likeness_of(phantom.image).near == np.packbits(above).tobytes().hex()


@pytest.mark.parametrize("change", [lambda x: x + 3.7, lambda x: 1.1 * x], ids=["brighter", "gain"])
def test_perceptual_hash_of_a_symmetric_image_ignores_rounding_errors(change):
    rows, columns = np.mgrid[:64, :64] - 31.5
    disc = 200.0 * (rows**2 + columns**2 < 300)
    assert likeness_of(change(disc)).near == likeness_of(disc).near


def test_duplicate_across_parts_is_refused():
    one, other = picture(0), picture(1)
    likeness = {"a": likeness_of(one), "b": likeness_of(one.copy()), "c": likeness_of(other)}
    refuse_leaks({"train": ["a", "b"], "val": [], "test": ["c"]}, likeness, "refuse")
    leak = {"train": ["a"], "val": ["c"], "test": ["b"]}
    for duplicates in ("refuse", "allow-near"):
        with pytest.raises(PolysegError, match=r"b \(test\) and a \(train\) are the same image"):
            refuse_leaks(leak, likeness, duplicates)
    assert len(refuse_leaks(leak, likeness, "allow")) == 1


def test_near_duplicates_can_be_allowed_by_setting():
    one = picture(0)
    likeness = {"a": likeness_of(one), "b": likeness_of(next(variants(one)))}
    leak = {"train": ["a"], "val": ["b"], "test": []}
    with pytest.raises(PolysegError, match=r"nearly the same image.*data\.duplicates=allow-near"):
        refuse_leaks(leak, likeness, "refuse")
    assert refuse_leaks(leak, likeness, "allow-near") == [
        "b (val) and a (train) are nearly the same image"
    ]


def test_slices_of_volumes_are_compared_by_exact_pixels_only():
    one = picture(0)
    nearly = next(variants(one))
    likeness = {"a": likeness_of(one, sliced=True), "b": likeness_of(nearly, sliced=True)}
    split = {"train": ["a"], "val": ["b"], "test": []}
    assert refuse_leaks(split, likeness, "refuse") == []
    likeness["b"] = likeness_of(one, sliced=True)
    with pytest.raises(PolysegError, match="are the same image"):
        refuse_leaks(split, likeness, "refuse")


def test_error_about_many_duplicates_is_shortened():
    """Nine million pairs, of which only a few are listed."""
    twin = likeness_of(picture(0))
    likeness = {f"i{i}": twin for i in range(3000)}
    split = {"train": [f"i{i}" for i in range(2000)], "val": [], "test": []}
    split["test"] = [f"i{i}" for i in range(2000, 3000)]
    assert len(near_pairs(likeness)) == 1000
    with pytest.raises(PolysegError, match="and 995 more"):
        refuse_leaks(split, likeness, "refuse")


def test_constant_images_are_not_duplicates():
    blank = likeness_of(np.zeros((8, 8), np.uint8))
    refuse_leaks({"train": ["a"], "val": ["b"], "test": []}, {"a": blank, "b": blank}, "refuse")


def test_content_hash_depends_on_pixels_shape_and_dtype():
    pixels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    assert content_hash(pixels) == content_hash(np.asfortranarray(pixels))
    others = (pixels.reshape(4, 3), pixels.astype(np.uint16), pixels + 1)
    assert all(content_hash(pixels) != content_hash(other) for other in others)


# Groups by folders and names.


def named(*names):
    return [Case(Path(name).stem, (Path("/set") / name,), ()) for name in names]


def numbered(pattern, *counts):
    """Return names for all combinations of numbers below the counts."""
    return [pattern.format(*numbers) for numbers in itertools.product(*map(range, counts))]


KVASIR = [f"cju{hashlib.sha256(bytes([i])).hexdigest()[:22]}.jpg" for i in range(40)]
SURE, SUSPECTED, NONE = True, False, None


@pytest.mark.parametrize(
    ("names", "sure", "count"),
    [
        (numbered("TCGA_CS_{0:04}/TCGA_CS_{0:04}_1996_{1}.tif", 4, 5), SURE, 4),
        (numbered("patient{:03}_frame{:02}.nii.gz", 5, 2), SURE, 5),
        (numbered("patient{:03}_frame01_slice_{}.png", 5, 4), SURE, 5),
        (numbered("IDRiD_{:02}_tile{}.png", 6, 9), SURE, 6),
        (["IDRiD_00-t1-l2.jpg", *numbered("IDRiD_1{}-t{}-l7.jpg", 9, 2)], SURE, 10),
        (numbered("SC-HF-I-{:02}/IM-0001-{:04}.dcm", 4, 6), SURE, 4),
        (numbered("SC-HF-I-{:02}_{:04}.png", 4, 6), SURE, 4),
        (numbered("p{:02}s{:03}.png", 4, 6), SURE, 4),
        (numbered("{:03}_{:03}.png", 5, 5), SURE, 5),
        (numbered("benign/benign ({}).png", 30), NONE, 0),
        (numbered("ISIC_{:07}.jpg", 30), NONE, 0),
        (KVASIR, NONE, 0),
        (
            [
                f"ISIC2018_Task1-2_{part}_Input/{n}.jpg"
                for part in ("Training", "Validation", "Test")
                for n in range(4)
            ],
            NONE,
            0,
        ),
        (numbered("{}_images_2018/{}.jpg", 3, 4), NONE, 0),
        (numbered("BRATS_{:03}.nii.gz", 30), NONE, 0),
        (numbered("{:04}.png", 30), NONE, 0),
        (numbered("img_{}_{}.png", 2, 30), NONE, 0),
        (numbered("case{}_v{}.png", 30, 1), NONE, 0),
        ([f"201{y}-03-{d:02}.png" for y in range(4) for d in range(1, 9)], SUSPECTED, 4),
        ([f"2019030{d}_{n:06}.png" for d in range(1, 5) for n in range(5)], SUSPECTED, 4),
        (numbered("fold{}/img{}.png", 5, 6), SUSPECTED, 5),
        (["extra.png", *numbered("patient{:02}_slice{}.png", 4, 5)], SUSPECTED, 5),
    ],
)
def test_groups_are_guessed_from_folders_and_names(names, sure, count):
    cases, guess = with_groups(named(*names), split_given=False)
    assert (None if guess is None else guess.sure) is sure
    assert len(set(guess.groups) if guess else ()) == count
    assert len({case.group for case in cases} - {None}) == (count if sure else 0)
    if guess:
        assert ("suspected" in guess.line(9)) is not sure
        assert "data.group" in guess.line(9)


def test_given_groups_are_kept():
    cases = [replace(case, group="x") for case in named(*numbered("p{}_{}.png", 4, 4))]
    assert with_groups(cases, split_given=False) == (cases, None)


def test_guessed_groups_that_cross_given_parts_are_not_applied():
    cases = [
        replace(case, part="train" if n % 2 else "test")
        for n, case in enumerate(named(*numbered("p{}_{}.png", 4, 4)))
    ]
    found, guess = with_groups(cases, split_given=False)
    assert found == cases
    assert not guess.sure


def test_error_about_too_few_groups_shows_how_to_split_by_image():
    members = [Member(f"{k}", group="ab"[k % 2]) for k in range(8)]
    with pytest.raises(PolysegError, match=r"2 groups are too few .* data\.group=none"):
        split_by_settings(members, DataConfig())
