"""Generated images of lesions with known masks and difficulties, for demonstrations.

Everything about a phantom follows from a seed, its index and its difficulty.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from polyseg.choices import MODALITIES
from polyseg.data.phantoms import endoscopy, ultrasound
from polyseg.data.phantoms.lesions import Factors, Size, draw_factors
from polyseg.errors import PolysegError, reason
from polyseg.system.files import csv_table, write_text
from polyseg.system.output_folder import whole_folder
from polyseg.system.seeds import derive_seed

_PAINTERS = {"ultrasound": ultrasound.paint, "endoscopy": endoscopy.paint}


@dataclass(frozen=True)
class Phantom:
    """An image of a lesion, its mask, and its factors of difficulty.

    Attributes:
        id: such as "phantom_0007".
        image: (H, W) for ultrasound, (H, W, 3) for endoscopy.
        mask: (H, W), 0 or 1, never empty.
        difficulty: from 0, the easiest, to 1, the hardest.
        factors: the values of the fields of `lesions.Factors` for this image.
    """

    id: str
    image: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    difficulty: float
    factors: dict[str, float]


def make_phantom(
    seed: int,
    index: int,
    *,
    difficulty: float,
    size: Size = (128, 128),
    modality: str = "ultrasound",
) -> Phantom:
    """Make one phantom; equal arguments give equal pixels.

    Args:
        seed: random seed of the set, 0 or more.
        index: position in the set, from 0.
        difficulty: in [0, 1]; contrast and area fall with it, the other factors rise.
        size: height and width in pixels, 32 to 512 each.
        modality: one of `MODALITIES`.

    Raises:
        ValueError: the difficulty or the modality is invalid.

    >>> phantom = make_phantom(0, 7, difficulty=0.5)
    >>> phantom.id, phantom.image.shape, int(phantom.mask.sum())
    ('phantom_0007', (128, 128), 809)
    """
    if not 0 <= difficulty <= 1:
        raise ValueError(f"difficulty {difficulty} is not in [0, 1]")
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r} is none of {', '.join(MODALITIES)}")
    rng = np.random.default_rng(np.random.SeedSequence([seed, index]))
    factors = draw_factors(rng, difficulty)
    image, lesion = _PAINTERS[modality](rng, size, factors)
    return Phantom(
        id=f"phantom_{index:04d}",
        image=image,
        mask=lesion.astype(np.uint8),
        difficulty=float(difficulty),
        # The area in whole pixels, which at small sizes differs from the drawn one.
        factors=asdict(factors) | {"area": float(lesion.mean())},
    )


def make_phantoms(
    count: int, *, seed: int = 0, size: Size = (128, 128), modality: str = "ultrasound"
) -> list[Phantom]:
    """Make a set of phantoms whose difficulties are spread evenly over [0, 1], in random order.

    `seed` also determines the order; all else is as in `make_phantom`.

    >>> [phantom.difficulty for phantom in make_phantoms(3, size=(32, 32))]
    [0.5, 1.0, 0.0]
    """
    order = np.random.default_rng(derive_seed(seed, "order of phantoms"))
    difficulties = order.permutation(np.linspace(0, 1, count))
    return [
        make_phantom(seed, index, difficulty=float(difficulty), size=size, modality=modality)
        for index, difficulty in enumerate(difficulties)
    ]


def write_phantoms(directory: str | Path, phantoms: Sequence[Phantom]) -> None:
    """Write images/ID.png, masks/ID.png (0 and 255) and phantoms.csv into a new directory.

    Either all files are written, or none; ids must be distinct.

    Raises:
        PolysegError: the directory is not empty, or cannot be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_phantoms(Path(folder), make_phantoms(1, size=(32, 32)))
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['images', 'masks', 'phantoms.csv']
    """
    directory = Path(directory)
    with whole_folder(directory) as folder:
        try:
            for name in ("images", "masks"):
                (folder / name).mkdir()
            for phantom in phantoms:
                _save(folder / "images" / f"{phantom.id}.png", phantom.image)
                _save(folder / "masks" / f"{phantom.id}.png", phantom.mask * np.uint8(255))
        except OSError as error:
            raise PolysegError(f"{directory}: cannot be written: {reason(error)}") from error
        names = [field.name for field in fields(Factors)]
        rows = ([one.id, one.difficulty, *map(one.factors.get, names)] for one in phantoms)
        write_text(folder / "phantoms.csv", csv_table(["id", "difficulty", *names], rows))


def _save(path: Path, pixels: NDArray[np.uint8]) -> None:
    Image.fromarray(pixels).save(path)
