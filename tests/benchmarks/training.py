"""Time and memory of an epoch, of a bare loop and of MONAI: python tests/benchmarks/training.py

All train the same network on the same phantoms with AdamW in batches of 8. Measured in turn in
one process, so that other load affects all equally. Each row's ratio is the median
over rounds of its time to that of the bare loop in the same round. Memory is the growth of the peak
of a new process in the first step, including compilation.
"""

import argparse
import functools
import importlib.util
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from monai.data import CacheDataset, ThreadDataLoader
from monai.losses import DiceLoss
from monai.transforms import EnsureTyped
from rich.console import Console
from rich.table import Table

from polyseg.config import load_config
from polyseg.data.dataset import make_demo
from polyseg.losses import polydice1_loss
from polyseg.networks.networks_by_name import build_network
from polyseg.runs.run_folder import RunDirectory
from polyseg.training.trainer import Trainer

BATCH = 8
RATE = 3e-3


def bare(samples, device, **how):
    """Return a bare loop over tensors in memory, always in one order."""
    network = build_network("unet", in_channels=1).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE, **how)
    images, masks = (torch.stack(values).to(device) for values in zip(*samples, strict=True))
    masks = masks.float()

    def epoch():
        for start in range(0, len(images), BATCH):
            optimizer.zero_grad()
            logits = network(images[start : start + BATCH])
            loss = polydice1_loss(logits.sigmoid(), masks[start : start + BATCH]).mean()
            loss.backward()
            optimizer.step()

    return epoch


def monai_parts(samples, device):
    """Return the parts of MONAI's tutorials: cached tensors in batches, loss, optimizer."""
    network = build_network("unet", in_channels=1).to(device)
    data = CacheDataset(
        [{"image": image, "label": masks.float()} for image, masks in samples],
        EnsureTyped(("image", "label"), track_meta=False),
        progress=False,
    )
    return {
        "train_data_loader": ThreadDataLoader(data, batch_size=BATCH, shuffle=True),
        "network": network,
        "optimizer": torch.optim.AdamW(network.parameters(), lr=RATE),
        "loss_function": DiceLoss(sigmoid=True, squared_pred=True),
    }


def monai_engine(samples, device):
    """Return a function that trains an epoch with MONAI's SupervisedTrainer."""
    from monai.engines import SupervisedTrainer

    logging.getLogger("ignite").setLevel(logging.WARNING)
    engine = SupervisedTrainer(device=device, max_epochs=10**6, **monai_parts(samples, device))

    def epoch():
        engine.state.max_epochs = engine.state.epoch + 1
        engine.run()

    return epoch


def monai_loop(samples, device):
    """Return the loop of MONAI's tutorials, which reads the loss of every step."""
    parts = monai_parts(samples, device)
    network, optimizer, loss_function = (
        parts[name] for name in ("network", "optimizer", "loss_function")
    )

    def epoch():
        network.train()
        epoch_loss = 0
        for batch in parts["train_data_loader"]:
            images, masks = batch["image"].to(device), batch["label"].to(device)
            optimizer.zero_grad()
            loss = loss_function(network(images), masks)
            loss.backward()
            optimizer.step()
            epoch_loss += loss.item()

    return epoch


def ours(config, images, **settings):
    """Return polyseg's epoch as in `polyseg train`, without validation and files."""
    training = config.training.model_copy(update=settings)
    config = config.model_copy(update={"training": training})
    split = {"train": images.ids, "val": [], "test": []}
    # Nothing is written there, because only `fit` writes files.
    run = RunDirectory(Path(tempfile.gettempdir()) / "polyseg-benchmark")
    trainer = Trainer(config, images, split, run)
    return lambda: trainer._train(epoch=1)


def build(arguments):
    """Return the builders of functions that train an epoch, by name."""
    settings = [
        f"data.size={arguments.size}",
        f"data.demo_images={arguments.images}",
        "control.enabled=false",
        f"training.device={arguments.device}",
        f"training.batch_size={BATCH}",
        f"training.learning_rate={RATE}",
    ]
    light = load_config(overrides=settings)
    plain = load_config(overrides=[*settings, "data.augmentation=none"])
    images = make_demo(plain.data)
    samples = [images.sample(identity) for identity in images.ids]
    device = torch.device(arguments.device)
    makers = {
        "bare loop": functools.partial(bare, samples, device),
        "bare, fused AdamW": functools.partial(bare, samples, device, fused=True),
        "polyseg": functools.partial(ours, plain, images),
        "polyseg, light": functools.partial(ours, light, images),
    }
    if importlib.util.find_spec("ignite"):
        makers["MONAI's trainer"] = functools.partial(monai_engine, samples, device)
    else:  # SupervisedTrainer needs ignite
        makers["MONAI, no ignite"] = functools.partial(monai_loop, samples, device)
    if arguments.compile:
        makers["polyseg, compiled"] = functools.partial(ours, plain, images, compile=True)
    return makers


def seconds(epoch, device):
    """Return the time of an epoch."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    epoch()
    synchronize()
    return time.perf_counter() - start


def measure(epochs, arguments):
    """Return the seconds of each round and of the first epoch, a warm-up, by name."""
    first = {name: seconds(epoch, arguments.device) for name, epoch in epochs.items()}
    times = {name: [] for name in epochs}
    for _ in range(arguments.rounds):
        for name, epoch in epochs.items():
            times[name].append(seconds(epoch, arguments.device))
    return times, first


def memory_of_step(make, device):
    """Return the growth of the peak memory in MB over the first step."""

    def peak():
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    epoch = make()
    before = peak()
    epoch()
    return peak() - before


def memory_by_name(names, arguments):
    """Return the MB that a step adds by name, each measured in a separate process."""
    settings = ["--size", arguments.size, "--images", BATCH, "--device", arguments.device]
    command = [sys.executable, __file__, *map(str, settings)]
    return {
        name: subprocess.run(
            [*command, "--compile", "--memory-of", name], stdout=subprocess.PIPE, check=True
        ).stdout.decode()
        for name in names
    }


def main():
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="measure training.compile, too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    makers = build(arguments)
    with tempfile.TemporaryDirectory() as folder:
        # A new folder, because the default one may hold code compiled by another run.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        if arguments.memory_of:
            print(f"{memory_of_step(makers[arguments.memory_of], arguments.device):.0f}", end="")
            return
        # First, because a process inherits the peak of its parent.
        memory = memory_by_name(makers, arguments)
        times, first = measure({name: make() for name, make in makers.items()}, arguments)
    title = f"{arguments.images} images of {arguments.size} x {arguments.size}, an epoch"
    columns = ("median s", "images/s", "ratio", "10-90 %", "MB a step")
    table = Table("loop", *columns, title=title)
    reference = np.array(times["bare loop"])
    for name, values in times.items():
        low, middle, high = np.percentile(np.array(values) / reference, (10, 50, 90))
        median = np.median(values)
        speed = f"{arguments.images / median:.1f}"
        ratio = (f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        table.add_row(name, f"{median:.2f}", speed, *ratio, memory[name])
    Console().print(table)
    if arguments.compile:
        name = "polyseg, compiled"
        print(f"compiled once in {first[name] - np.median(times[name]):.1f} s")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")


if __name__ == "__main__":
    main()
