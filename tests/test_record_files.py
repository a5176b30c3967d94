"""HDF5 files of assessments and schedules: round trips, and refusal of damaged or forged files."""

import contextlib
import dataclasses
import hashlib

import h5py
import numpy as np
import pytest

from polyseg.choices import UNCERTAINTIES, map_names
from polyseg.errors import PolysegError
from polyseg.records import Assessment, Schedule
from polyseg.runs.record_files import (
    read_assessment,
    read_schedule,
    write_assessment,
    write_schedule,
)
from polyseg.system.files import sha256_of_file
from tests.hostile import seal

SCHEDULE = Schedule(["a", "b"], np.arange(1, 4), np.linspace(0, 1, 6, dtype="f4").reshape(3, 2))

EXPLAINED = dataclasses.replace(
    SCHEDULE,
    group=np.array([[-1, -1], [0, 1], [0, 0]], np.int32),
    statistics=np.array([[0.25, 1.5], [0.5, 0.0]]),
)


@pytest.fixture
def assessment():
    generator = np.random.default_rng(0)
    n = 4
    return Assessment(
        epoch=8,
        samples=20,
        rate=0.2,
        metric="entropy",
        region="mask",
        masks="consistent",
        seed=7,
        ids=["a", "ß image", "c.d", "e"],
        scores={name: generator.random(n) for name in UNCERTAINTIES},
        scores_se={"entropy": generator.random(n)},
        rank_stability={"entropy": 0.9, "variance": float("nan")},
        foreground_pixels=np.arange(n),
        mask_pixels=np.array([0, 2**40, 3, 17]),
        fallback=np.zeros(n, dtype=np.int8),
        dice=np.array([0.5, 1.0, np.nan, 0.0]),
        epsilon=generator.random(n),
        maps={name: list(generator.random((n, 6, 5)).astype(np.float16)) for name in map_names()},
        weights_sha256="0" * 64,
        config_yaml="loss: {}\n" * 20_000,
    )


def test_assessment_round_trip(tmp_path, assessment):
    path = tmp_path / "epoch_0008.h5"
    assert write_assessment(path, assessment) == sha256_of_file(path)
    again = read_assessment(path, with_maps=True)
    for field in dataclasses.fields(Assessment):
        np.testing.assert_equal(getattr(again, field.name), getattr(assessment, field.name))
    np.testing.assert_array_equal(again.difficulty, assessment.scores["entropy"])
    assert read_assessment(path).maps == {}
    assert [entry.name for entry in tmp_path.iterdir()] == ["epoch_0008.h5"]


def test_assessment_file_is_readable_by_plain_h5py(tmp_path, assessment):
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    with h5py.File(path) as file:
        assert file.attrs["schema"] == 3 and file.attrs["samples"] == 20
        assert file["id"].asstr()[1] == "ß image" and file.attrs["metric"] == b"entropy"
        assert file["difficulty"].shape == (4,) and file["difficulty"].dtype == np.float64
        assert file["maps/mean"].chunks == (1, 6, 5) and file["maps/mean"].fletcher32


@pytest.mark.parametrize("samples", [2, 3])
def test_errors_from_too_few_passes_are_not_written_and_read_as_missing(
    tmp_path, assessment, samples
):
    nothing = {name: np.full(4, np.nan) for name in UNCERTAINTIES}
    few = dataclasses.replace(
        assessment,
        samples=samples,
        scores_se=nothing,
        rank_stability=dict.fromkeys(UNCERTAINTIES, float("nan")),
    )
    path = tmp_path / "a.h5"
    write_assessment(path, few)
    with h5py.File(path) as file:
        assert "scores_se" not in file and "rank_stability" not in file["scores/entropy"].attrs
    again = read_assessment(path)
    np.testing.assert_equal(again.scores_se, few.scores_se)
    np.testing.assert_equal(again.rank_stability, few.rank_stability)


def test_zeros_that_version_0_1_wrote_from_too_few_passes_are_read_as_missing(tmp_path, assessment):
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    with h5py.File(path, "r+") as file:
        file.attrs["samples"] = 3
        file["scores_se/entropy"][:] = 0
        file["scores/entropy"].attrs["rank_stability"] = 0.0
    seal(path)
    again = read_assessment(path)
    assert np.isnan(again.scores_se["entropy"]).all()
    assert np.isnan(again.rank_stability["entropy"])
    np.testing.assert_array_equal(again.difficulty, assessment.difficulty)


@pytest.mark.parametrize("name", ["mask_pixels", "epsilon"])
def test_missing_columns_are_not_written(tmp_path, assessment, name):
    path = tmp_path / "a.h5"
    write_assessment(path, dataclasses.replace(assessment, **{name: None}))
    with h5py.File(path) as file:
        assert name not in file
    assert getattr(read_assessment(path), name) is None


def test_mask_sizes_follow_the_order_of_images_and_labels(assessment):
    turned = assessment.in_order(assessment.ids[::-1])
    assert turned.mask_pixels.tolist() == [17, 3, 2**40, 0]
    labelled = dataclasses.replace(assessment, ids=list("aabb"), labels=["x", "y"] * 2)
    assert labelled.of_label("y").mask_pixels.tolist() == [2**40, 17]


def test_schedule_round_trip(tmp_path):
    write_schedule(tmp_path / "schedule.h5", SCHEDULE)
    again = read_schedule(tmp_path / "schedule.h5")
    assert again.ids == SCHEDULE.ids
    np.testing.assert_array_equal(again.epochs, SCHEDULE.epochs)
    np.testing.assert_array_equal(again.epsilon, SCHEDULE.epsilon)
    assert again.group is None and again.statistics is None
    write_schedule(tmp_path / "schedule.h5", EXPLAINED)
    again = read_schedule(tmp_path / "schedule.h5")
    np.testing.assert_array_equal(again.group, EXPLAINED.group)
    np.testing.assert_array_equal(again.statistics, EXPLAINED.statistics)
    with h5py.File(tmp_path / "schedule.h5") as file:
        assert file["group"].dtype == np.int32 and file["statistics"].dtype == np.float64


def test_percentile_and_sigma_of_each_epsilon():
    nan = float("nan")
    expected = [[[nan, nan]] * 2, [[0.25, 1.5], [0.5, 0.0]], [[0.25, 1.5]] * 2]
    np.testing.assert_array_equal(EXPLAINED.percentile_and_sigma(), expected)
    assert np.isnan(SCHEDULE.percentile_and_sigma()).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group", np.zeros((3, 2))),
        ("group", np.zeros((2, 2), np.int32)),
        ("group", np.full((3, 2), 2, np.int32)),
        ("group", np.full((3, 2), -2, np.int32)),
        ("group", None),
        ("statistics", None),
        ("statistics", np.zeros((2, 3))),
        ("statistics", np.zeros((2, 2), np.float32)),
        ("statistics", np.full((2, 2), np.nan)),
    ],
)
def test_inconsistent_statistics_are_refused(tmp_path, name, value):
    path = tmp_path / "schedule.h5"
    write_schedule(path, EXPLAINED)

    def change(file):
        del file[name]
        if value is not None:
            file[name] = value

    forge(path, change)
    with pytest.raises(PolysegError, match=r"schedule\.h5: cannot be read as a polyseg schedule"):
        read_schedule(path)


def test_schedule_of_schema_2_has_no_statistics(tmp_path):
    path = tmp_path / "schedule.h5"
    write_schedule(path, SCHEDULE)
    forge(path, lambda file: file.attrs.__setitem__("schema", 2))
    np.testing.assert_array_equal(read_schedule(path).epsilon, SCHEDULE.epsilon)
    forge(path, lambda file: file.attrs.__setitem__("schema", 4))
    with pytest.raises(PolysegError, match="has schema 4, not 2 or 3"):
        read_schedule(path)


def test_different_hash_is_refused(tmp_path, assessment):
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    with pytest.raises(PolysegError, match=r"a\.h5: is not the file that the run recorded"):
        read_assessment(path, sha256="1" * 64)


def test_maps_of_several_sizes_are_refused_and_leave_nothing(tmp_path, assessment):
    maps = {"mean": [np.zeros((2, 2), np.float16), np.zeros((3, 2), np.float16)]}
    with pytest.raises(PolysegError, match=r"data\.size"):
        write_assessment(tmp_path / "a.h5", dataclasses.replace(assessment, maps=maps))
    assert list(tmp_path.iterdir()) == []


def forge(path, change):
    """Change a file and recompute its hash, as an attacker would."""
    with h5py.File(path, "r+") as file:
        change(file)
    seal(path)


def replace(name, value):
    def change(file):
        del file[name]
        file[name] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda file: file.attrs.__setitem__("kind", "something else"),
        lambda file: file.attrs.__setitem__("schema", 1),
        lambda file: file.attrs.__setitem__("metric", "no such"),
        lambda file: file.attrs.__delitem__("epoch"),
        lambda file: file.attrs.__setitem__("epoch", -1),
        lambda file: file.attrs.__setitem__("epoch", 1.5),
        lambda file: file.attrs.__setitem__("region", np.full(3, b"mask")),
        lambda file: file.attrs.__setitem__("region", "a text that lies in the heap"),
        replace("id", ["texts", "that lie", "in the", "heap"]),
        lambda file: file.__delitem__("dice"),
        replace("dice", np.zeros(3)),
        replace("dice", np.zeros(4, np.float32)),
        replace("fallback", "text"),
        replace("mask_pixels", np.zeros(4)),
        replace("mask_pixels", np.zeros(5, np.int64)),
        replace("mask_pixels", h5py.SoftLink("/foreground_pixels")),
        replace("dice", h5py.ExternalLink("/etc/passwd", "/")),
        replace("dice", h5py.SoftLink("/difficulty")),
    ],
)
def test_invalid_content_is_refused_in_one_line(tmp_path, assessment, change):
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    forge(path, change)
    with pytest.raises(PolysegError, match=r"a\.h5: cannot be read as a polyseg assessment") as e:
        read_assessment(path)
    assert "\n" not in str(e.value)


def test_data_outside_the_file_is_refused(tmp_path, assessment):
    path, outside = tmp_path / "a.h5", tmp_path / "outside.bin"
    outside.write_bytes(bytes(32))
    write_assessment(path, assessment)

    def change(file):
        del file["dice"]
        file.create_dataset("dice", (4,), "f8", external=[(str(outside), 0, 32)])

    forge(path, change)
    with pytest.raises(PolysegError, match="not a plain dataset"):
        read_assessment(path)


@pytest.mark.parametrize("content", [b"", b"no hdf5", bytes(5000)])
def test_files_that_are_not_hdf5_are_refused(tmp_path, content):
    path = tmp_path / "a.h5"
    path.write_bytes(content)
    for read in (read_assessment, read_schedule):
        with pytest.raises(PolysegError, match=r"a\.h5: cannot be read"):
            read(path)


def test_truncated_file_is_refused_or_read_equal(tmp_path, assessment):
    path = tmp_path / "a.h5"
    write_assessment(path, dataclasses.replace(assessment, maps={}, config_yaml="x"))
    whole = path.read_bytes()
    expected = read_assessment(path)
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with contextlib.suppress(PolysegError):
            np.testing.assert_equal(read_assessment(path).scores, expected.scores)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(PolysegError, match=r"none\.h5: there is no such file"):
        read_schedule(tmp_path / "none.h5")


def test_shape_larger_than_the_file_is_refused(tmp_path):
    """Chunks that were never written take no space in the file, but terabytes when read."""
    path = tmp_path / "bomb.h5"
    write_schedule(path, SCHEDULE)

    def change(file):
        del file["epsilon"]
        file.create_dataset("epsilon", shape=(3, 2**40), dtype="f4", chunks=(1, 2**20))

    forge(path, change)
    with pytest.raises(PolysegError, match="has no values"):
        read_schedule(path)


def test_too_many_epochs_are_refused_before_reading(tmp_path):
    path = tmp_path / "long.h5"
    write_schedule(path, SCHEDULE)
    forge(path, replace("epoch", np.zeros(100_001, np.int64)))
    with pytest.raises(PolysegError, match=r"epoch must be .* at most 100,000"):
        read_schedule(path)


def test_maps_that_were_never_written_are_refused(tmp_path, assessment):
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)

    def change(file):
        del file["maps/mean"]
        file.create_dataset("maps/mean", (4, 2**13, 2**13), "f2", chunks=(1, 2**13, 2**13))

    forge(path, change)
    read_assessment(path)
    with pytest.raises(PolysegError, match="maps/mean must have one compressed chunk"):
        read_assessment(path, with_maps=True)


@pytest.mark.parametrize(("piece", "mask"), [(b"x", 0), (bytes(60), 7), (bytes(5000), 0)])
def test_maps_with_unfiltered_chunks_are_refused(tmp_path, assessment, piece, mask):
    """HDF5 filters crash on such chunks."""
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    forge(path, lambda file: file["maps/mean"].id.write_direct_chunk((2, 0, 0), piece, mask))
    with pytest.raises(PolysegError, match="maps/mean must have one compressed chunk"):
        read_assessment(path, with_maps=True)


def test_changed_value_is_refused(tmp_path, assessment):
    """Change it with plain h5py, which writes a valid HDF5 file."""
    path = tmp_path / "a.h5"
    write_assessment(path, assessment)
    with h5py.File(path, "r+") as file:
        file["dice"][0] = 0.25
    with pytest.raises(PolysegError, match=r"a\.h5: .* its sha256 differs: it is damaged$"):
        read_assessment(path)


def test_any_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "schedule.h5"
    write_schedule(path, SCHEDULE)
    whole = path.read_bytes()
    for place in range(0, len(whole), 53):
        content = bytearray(whole)
        content[place] ^= 1 << place % 8
        path.write_bytes(content)
        with pytest.raises(PolysegError, match=r"schedule\.h5: cannot be read as"):
            read_schedule(path)


def test_file_hash_covers_the_content(tmp_path):
    path = tmp_path / "schedule.h5"
    write_schedule(path, SCHEDULE)
    content = path.read_bytes()
    digest = hashlib.sha256(content[512:]).hexdigest()
    text = f"polyseg: the sha256 of what follows byte 512 is {digest}\n"
    assert content[:512].rstrip(b"\0").decode() == text


def test_files_of_an_earlier_schema_are_refused(tmp_path, assessment):
    """They have no embedded hash; the error states the number of their schema."""
    path = tmp_path / "old.h5"
    with h5py.File(path, "w") as file:
        file.attrs.update({"kind": "polyseg assessment", "schema": 1})
    with pytest.raises(PolysegError, match=r"old\.h5: .* an earlier schema or another program"):
        read_assessment(path)
    with pytest.raises(PolysegError, match=r"old\.h5: .* has schema 1, not 2"):
        read_assessment(path, sha256=sha256_of_file(path))
