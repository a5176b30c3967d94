"""Decoded images in memory and in a file: python -m tests.benchmarks.store [images] [side]

Writes generated PNG files to a temporary folder, then prints the ratio of the time to read an epoch
from the file and from memory (medians, in turn), and the peak memory of a process of each kind.
"""

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

BOUND = 256
"""Largest size in MB that stays in memory."""


def make_images(folder, count, side):
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    for part in ("images", "masks"):
        (folder / part).mkdir()
    for i in range(count):
        row, column, radius = generator.integers(side // 4, side // 2, 3)
        disc = (rows - row) ** 2 + (columns - column) ** 2 < (radius // 2) ** 2
        # Noise of few values, which PNG encodes and decodes at the speed of real images.
        image = (generator.integers(0, 8, (side, side)) + 100 + 60 * disc).astype(np.uint8)
        Image.fromarray(image).save(folder / f"images/{i:05d}.png", compress_level=1)
        Image.fromarray((255 * disc).astype(np.uint8)).save(folder / f"masks/{i:05d}.png")


def load(folder, side, memory):
    from polyseg.config import DataConfig
    from polyseg.data.loading import load_images

    config = DataConfig(
        path=str(folder / "data"), size=side, memory=memory, cache=str(folder / "cache")
    )
    return load_images(config)


def read_epoch(images):
    from polyseg.data.training_batches import training_batches

    start = time.perf_counter()
    for _ in training_batches(images, images.ids, batch_size=8, seed=0, epoch=1):
        pass
    return time.perf_counter() - start


def child(folder, side, memory):
    """Print the peak memory in MB after the imports, after loading, and after an epoch."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    from polyseg.data import loading  # noqa: F401

    peaks = [peak()]
    images = load(folder, side, memory)
    peaks.append(peak())
    read_epoch(images)
    peaks.append(peak())
    print(*(f"{value:.0f}" for value in peaks))


def main(count=2000, side=512):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "data").mkdir()
        make_images(folder / "data", count, side)
        print(f"{count} images of {side} x {side} with masks, {2 * count * side**2 / 1e6:.0f} MB")
        for memory, kind in (
            (BOUND, "file, being made"),
            (BOUND, "file, made before"),
            (10**6, "memory"),
        ):
            command = [sys.executable, "-m", __spec__.name, "child", name, str(side), str(memory)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"peak MB after imports, loading, an epoch: {done.stdout.strip()} ({kind})")
        stores = {"memory": load(folder, side, 10**6), "file": load(folder, side, BOUND)}
        seconds = {kind: [] for kind in stores}
        for _ in range(5):
            for kind, images in stores.items():
                seconds[kind].append(read_epoch(images))
        ratios = [b / a for a, b in zip(seconds["memory"], seconds["file"], strict=True)]
        print(
            f"an epoch from the file over one from memory: {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f}); "
            f"{1e3 * statistics.median(seconds['file']) / count:.2f} ms an image"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main(*map(int, sys.argv[1:]))
