"""`polyseg data`: looking at a folder of images, and writing phantoms."""

from pathlib import Path
from typing import Any

import numpy as np

from polyseg.config import Config
from polyseg.data import phantoms
from polyseg.data.dataset import load_images
from polyseg.errors import PolysegError
from polyseg.records import Progress, no_progress


def check_data(config: Config, progress: Progress = no_progress) -> dict[str, Any]:
    """Read a folder whole and return what was found.

    Raises:
        PolysegError: all that is wrong with it, a line a problem.
    """
    data = config.data.model_copy(update={"size": None})
    images = load_images(data, progress)
    masks = images.masks or []
    shares = np.array([mask.mean() for mask in masks])
    copies = len(images.hashes) - len(set(images.hashes.values()))
    return {
        "pairs": len(images.ids),
        "sizes": sorted(f"{height} x {width}" for height, width in images.sizes()),
        "channels": images.channels,
        "bits": sorted({8 * image.dtype.itemsize for image in images.images}),
        "foreground, mean": round(float(shares.mean()), 4),
        "foreground, range": [round(float(shares.min()), 4), round(float(shares.max()), 4)],
        "empty masks": int((shares == 0).sum()),
        "copies of another image": copies,
    }


def write_demo(path: Path, *, count: int, size: int, modality: str, seed: int) -> None:
    """Write phantoms as PNG files, with a table of their known difficulties.

    Raises:
        PolysegError: the folder is not empty, or an argument is out of bounds.
    """
    if modality not in phantoms.MODALITIES:
        raise PolysegError(f"--modality {modality}: choose {' or '.join(phantoms.MODALITIES)}")
    if seed < 0:
        raise PolysegError(f"--seed {seed}: 0 or more")
    if not (1 <= count <= 100_000 and 32 <= size <= 1024):
        raise PolysegError("--images: 1 to 100000; --size: 32 to 1024")
    if count * size**2 > 2**30:
        raise PolysegError(f"--images {count} of --size {size}: do not fit into memory; make fewer")
    made = phantoms.make_phantoms(count, seed=seed, size=(size, size), modality=modality)
    phantoms.write_phantoms(path, made)
