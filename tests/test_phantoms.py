"""Phantoms: reproducible images, difficulty factors, and files that can be read back."""

import csv
import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats

from polyseg.data.layouts.find_cases import find_cases
from polyseg.data.phantoms.lesions import Factors
from polyseg.data.phantoms.phantom_sets import (
    MODALITIES,
    Phantom,
    endoscopy,
    make_phantom,
    make_phantoms,
    ultrasound,
    write_phantoms,
)
from polyseg.errors import PolysegError

FACTORS = ("contrast", "blur", "noise", "area", "raggedness", "distractors")
FALLING = ("contrast", "area")

Pixels = NDArray[np.uint8]

sides = st.integers(32, 160)
modalities = st.sampled_from(list(MODALITIES))
difficulties = st.floats(0, 1)


@pytest.fixture(scope="module", params=MODALITIES)
def phantoms(request: pytest.FixtureRequest) -> list[Phantom]:
    return make_phantoms(60, seed=5, modality=request.param)


def spearman(first: list[float], second: list[float]) -> float:
    return float(stats.spearmanr(first, second).statistic)


def paint(modality: str, seed: int, **changed: float) -> tuple[Pixels, Pixels]:
    """Paint an image and a mask with medium factors except those given."""
    middling = Factors(0.25, 1.3, 0.07, 0.06, 0.1, 2.0)
    painter = {"ultrasound": ultrasound.paint, "endoscopy": endoscopy.paint}[modality]
    image, lesion = painter(np.random.default_rng(seed), (128, 128), replace(middling, **changed))
    return image, lesion.astype(np.uint8)


def signal(image: Pixels) -> NDArray[np.float64]:
    """Return gray values in ultrasound; in endoscopy the share of red, which ignores lighting."""
    values = image.astype(float)
    return values if values.ndim == 2 else values[..., 0] / (values.sum(axis=2) + 1)


def ring(mask: Pixels, begin: int, end: int) -> NDArray[np.bool_]:
    """Return the pixels more than `begin` and at most `end` pixels outside the mask."""
    distance = ndimage.distance_transform_edt(mask == 0)
    return (distance > begin) & (distance <= end)


def contrast_to_noise(image: Pixels, mask: Pixels) -> float:
    """Return the difference between the mask and a ring around it, in deviations of the ring."""
    values, around = signal(image), ring(mask, 3, 8)
    return float(abs(values[mask == 1].mean() - values[around].mean()) / values[around].std())


def edge_over_step(image: Pixels, mask: Pixels) -> float:
    """Return the step between pixels across the contour as a share of the whole step."""
    values = signal(image)
    last = (mask == 1) & ~ndimage.binary_erosion(mask)
    core = ndimage.binary_erosion(mask, iterations=3)
    edge = values[ring(mask, 0, 1)].mean() - values[last].mean()
    return float(edge / (values[ring(mask, 4, 6)].mean() - values[core].mean()))


def high_frequency(image: Pixels, mask: Pixels) -> float:
    """Return the noise: the typical difference of a pixel from its neighbours."""
    values = image.astype(float).reshape(*mask.shape, -1).mean(axis=2)
    return float(np.median(np.abs(values - ndimage.gaussian_filter(values, 1.5))[16:112, 16:112]))


def roughness(image: Pixels, mask: Pixels) -> float:
    """Return the length of the contour divided by the root of the area."""
    length = sum(np.count_nonzero(np.diff(mask, axis=axis)) for axis in (0, 1))
    return float(length / np.sqrt(mask.sum()))


def clutter(image: Pixels, mask: Pixels) -> float:
    """Return the deviation along rows of the smoothed image outside the lesion."""
    values = image.astype(float).reshape(*mask.shape, -1).mean(axis=2)
    values = ndimage.gaussian_filter(values, 2) - ndimage.gaussian_filter(values, 10)
    outside = np.where(ring(mask, -1, 6), np.nan, values)[16:112, 16:112]
    return float(np.nanstd(outside))


def digest(phantom: Phantom) -> str:
    factors = repr(sorted(phantom.factors.items())).encode()
    return hashlib.sha256(phantom.image.tobytes() + phantom.mask.tobytes() + factors).hexdigest()


@given(size=st.tuples(sides, sides), modality=modalities, difficulty=difficulties)
@settings(max_examples=20, deadline=None)
def test_phantom_of_any_size_has_one_lesion(
    size: tuple[int, int], modality: str, difficulty: float
) -> None:
    phantom = make_phantom(3, 4, difficulty=difficulty, size=size, modality=modality)
    assert phantom.id == "phantom_0004"
    assert phantom.image.shape == (size if modality == "ultrasound" else (*size, 3))
    assert phantom.image.dtype == phantom.mask.dtype == np.uint8
    assert phantom.mask.shape == size
    assert set(np.unique(phantom.mask)) == {0, 1}
    assert phantom.mask.mean() == phantom.factors["area"]
    assert phantom.mask[1:-1, 1:-1].sum() == phantom.mask.sum(), "the lesion lies within the image"
    assert tuple(phantom.factors) == FACTORS
    assert np.ptp(phantom.image) > 120


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("size", [(32, 512), (512, 32), (512, 512)])
def test_lesion_area_at_extreme_sizes(modality: str, size: tuple[int, int]) -> None:
    phantom = make_phantom(0, 0, difficulty=0.0, size=size, modality=modality)
    assert phantom.mask.shape == size
    assert 0.05 < phantom.mask.mean() < 0.15


@pytest.mark.slow
def test_equal_arguments_give_equal_bytes_in_another_process() -> None:
    script = (
        "import sys; sys.path[:0] = ['tests']\n"
        "from test_phantoms import digest, make_phantom\n"
        "for m in ('ultrasound', 'endoscopy'):\n"
        "    print(digest(make_phantom(11, 2, difficulty=0.4, size=(48, 64), modality=m)))"
    )
    here = [
        digest(make_phantom(11, 2, difficulty=0.4, size=(48, 64), modality=modality))
        for modality in MODALITIES
    ]
    root = Path(__file__).parents[1]
    there = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    )
    assert there.stdout.split() == here


def test_seed_and_index_change_the_phantom() -> None:
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]
    made = {digest(make_phantom(*key, difficulty=0.5, size=(32, 32))) for key in keys}
    assert len(made) == len(keys)


@given(modality=modalities, difficulty=difficulties)
@settings(max_examples=10, deadline=None)
def test_larger_image_shows_the_same_lesion(modality: str, difficulty: float) -> None:
    small, large = (
        make_phantom(9, 1, difficulty=difficulty, size=(side, side), modality=modality).mask
        for side in (64, 192)
    )
    coarse = large.reshape(64, 3, 64, 3).mean(axis=(1, 3)) >= 0.5
    assert 2 * (coarse & small.astype(bool)).sum() / (coarse.sum() + small.sum()) > 0.85


def test_difficulties_are_spread_evenly_and_shuffled() -> None:
    difficulties = [phantom.difficulty for phantom in make_phantoms(21, seed=1, size=(32, 32))]
    assert np.allclose(sorted(difficulties), np.linspace(0, 1, 21))
    assert abs(spearman(difficulties, list(range(21)))) < 0.6
    assert difficulties != [p.difficulty for p in make_phantoms(21, seed=2, size=(32, 32))]


def test_phantom_depends_on_seed_index_and_difficulty_only() -> None:
    for index, phantom in enumerate(make_phantoms(4, seed=6, size=(40, 32))):
        alone = make_phantom(6, index, difficulty=phantom.difficulty, size=(40, 32))
        assert alone.id == phantom.id
        assert digest(alone) == digest(phantom)


@pytest.mark.slow
@pytest.mark.parametrize("name", FACTORS)
def test_every_factor_follows_the_difficulty(phantoms: list[Phantom], name: str) -> None:
    values = [phantom.factors[name] for phantom in phantoms]
    rank = spearman([phantom.difficulty for phantom in phantoms], values)
    assert rank * (-1 if name in FALLING else 1) > 0.6
    assert abs(rank) < 0.9999, "each image has some luck of its own"


def test_lesion_area_ranges_from_an_eighth_to_a_hundredth(phantoms: list[Phantom]) -> None:
    ordered = sorted(phantoms, key=lambda phantom: phantom.difficulty)
    assert 0.08 < np.mean([phantom.mask.mean() for phantom in ordered[:6]]) <= 0.125
    assert 0.011 < np.mean([phantom.mask.mean() for phantom in ordered[-6:]]) < 0.02
    assert min(int(phantom.mask.sum()) for phantom in phantoms) >= 60


def test_lesions_are_connected(phantoms: list[Phantom]) -> None:
    pieces = [ndimage.label(phantom.mask, np.ones((3, 3)))[1] for phantom in phantoms]
    assert set(pieces) == {1}


def test_contrast_to_noise_decreases_with_difficulty(phantoms: list[Phantom]) -> None:
    ordered = sorted(phantoms, key=lambda phantom: phantom.difficulty)
    ratios = [contrast_to_noise(phantom.image, phantom.mask) for phantom in ordered]
    assert spearman([phantom.difficulty for phantom in ordered], ratios) < -0.6
    thirds = np.reshape(ratios, (3, -1)).mean(axis=1)
    assert all(harder < easier for easier, harder in pairwise(thirds))
    assert thirds[0] > 2, "the easiest stand out"
    assert np.mean(ratios[-6:]) > 0.5, "the hardest are not lost in the noise"


@pytest.mark.slow
@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize(
    ("measure", "factor", "easy", "hard"),
    [
        (contrast_to_noise, "contrast", 0.36, 0.15),
        (edge_over_step, "blur", 0.7, 2.0),
        (high_frequency, "noise", 0.05, 0.10),
        (roughness, "raggedness", 0.03, 0.18),
        (clutter, "distractors", 0, 6),
    ],
)
def test_each_factor_changes_its_measure_of_the_pixels(
    modality: str, measure: Callable[[Pixels, Pixels], float], factor: str, easy: float, hard: float
) -> None:
    means = [
        np.mean([measure(*paint(modality, seed, **{factor: value})) for seed in range(8)])
        for value in (easy, hard)
    ]
    if factor in ("contrast", "blur"):
        means.reverse()
    assert means[1] > 1.15 * means[0]


def test_written_phantoms_are_read_back(tmp_path: Path) -> None:
    for modality in MODALITIES:
        folder = tmp_path / "new" / modality
        phantoms = make_phantoms(3, seed=2, size=(40, 48), modality=modality)
        write_phantoms(folder, phantoms)
        pairs = find_cases(folder).cases
        assert [pair.id for pair in pairs] == [phantom.id for phantom in phantoms]
        for pair, phantom in zip(pairs, phantoms, strict=True):
            assert np.array_equal(np.asarray(Image.open(pair.images[0])), phantom.image)
            assert pair.masks is not None
            assert np.array_equal(np.asarray(Image.open(pair.masks[0])), 255 * phantom.mask)


def test_written_table_holds_difficulty_and_factors(tmp_path: Path) -> None:
    phantoms = make_phantoms(3, seed=2, size=(32, 32))
    write_phantoms(tmp_path, phantoms)
    with (tmp_path / "phantoms.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["id", "difficulty", *FACTORS]
    for row, phantom in zip(rows, phantoms, strict=True):
        assert row.pop("id") == phantom.id
        assert float(row.pop("difficulty")) == phantom.difficulty
        assert {name: float(value) for name, value in row.items()} == phantom.factors


@pytest.mark.parametrize("occupied", ["a folder", "a file"])
def test_occupied_directory_is_refused_and_unchanged(tmp_path: Path, occupied: str) -> None:
    note = tmp_path / "note.txt"
    note.write_text("mine")
    target = tmp_path if occupied == "a folder" else note
    with pytest.raises(PolysegError) as caught:
        write_phantoms(target, make_phantoms(1, size=(32, 32)))
    message = str(caught.value)
    assert message.startswith(f"{target}: ")
    assert "choose another" in message
    assert "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert note.read_text() == "mine"


@pytest.mark.parametrize("difficulty", [-0.1, 1.1, float("nan")])
def test_invalid_difficulty_is_refused(difficulty: float) -> None:
    with pytest.raises(ValueError, match="difficulty"):
        make_phantom(0, 0, difficulty=difficulty)


def test_unknown_modality_is_refused() -> None:
    with pytest.raises(ValueError, match="'xray' is none of ultrasound, endoscopy"):
        make_phantoms(1, modality="xray")
