"""Time and memory of MC Dropout and of usual methods: python tests/benchmarks/montecarlo.py

All assess the same images, whose share of foreground is in a given range. "naive loop" sets
the dropout layers to training, runs N passes, stacks them and takes the mean of each map over the
foreground; "repeated batch" is the method of torch-uncertainty, whose wrapper is used if it is
installed: the batch N times in one pass. MONAI has no MC Dropout. Measured in turn in
one process, so that other load affects all equally; each ratio is the median over
rounds of the time to that of the naive loop in the same round. Memory is the growth of the
peak of a new process, including imports and compilation.
"""

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from polyseg.config import UncertaintyConfig, load_config
from polyseg.data.loading import load_images
from polyseg.difficulty import foreground_mean
from polyseg.losses import polydice1_loss
from polyseg.montecarlo.assessment import assess
from polyseg.networks.dropout import dropout_types
from polyseg.networks.networks_by_name import build_network
from polyseg.uncertainty import mutual_information, prediction_variance, predictive_entropy

BATCH = 8
EPOCHS, START, EVERY = 100, 20, 5
ASSESSMENTS = len(range(START, EPOCHS + 1, EVERY))
FUNCTIONS = (mutual_information, predictive_entropy, prediction_variance)


def load(arguments):
    """Return batches of images whose share of foreground is in the range."""
    settings = [f"data.path={arguments.data}", f"data.size={arguments.size}"]
    if arguments.data == "demo":
        settings.append(f"data.demo_images={20 * arguments.images}")
    images = load_images(load_config(None, settings).data)
    low, high = arguments.foreground
    chosen = [item.id for item in images.items if low <= (item.foreground or 0) <= high]
    if not chosen:
        raise SystemExit(f"no image of {arguments.data} has a foreground of {low} to {high}")
    return list(images.batches(chosen[: arguments.images], BATCH))


def build(arguments, batches):
    """Return the network after some training passes, which change its running statistics."""
    torch.manual_seed(0)
    channels = batches[0].images.shape[1]
    network = build_network(arguments.network, in_channels=channels).to(arguments.device)
    with torch.no_grad():
        for _ in range(3):
            network.train()(batches[0].images.to(arguments.device))
    return network.eval()


def with_dropout(network):
    """Set the dropout layers to training, the rest to evaluation."""
    for layer in network.modules():
        layer.training = isinstance(layer, dropout_types())
    return network


def scores(samples, masks):
    """Return the difficulties from (N, B, H, W) probabilities."""
    return [foreground_mean(function(samples).cpu(), masks[:, 0]) for function in FUNCTIONS]


def naive(network, batches, samples, device):
    """Assess by single passes, all kept in memory."""
    for batch in batches:
        images = batch.images.to(device)
        with torch.no_grad():
            passes = [network(images).sigmoid()[:, 0] for _ in range(samples)]
            scores(torch.stack(passes), batch.masks)


def repeated(network, batches, samples, device):
    """Assess by one pass over a batch with each image N times."""
    for batch in batches:
        images = batch.images.to(device)
        with torch.no_grad():
            if isinstance(network, nn.Sequential):  # torch-uncertainty's wrapper repeats the batch.
                passes = network(images)
            else:
                passes = network(images.repeat(samples, 1, 1, 1))
            scores(passes.sigmoid().unflatten(0, (samples, -1))[:, :, 0], batch.masks)


def as_torch_uncertainty(network, samples):
    """Return the network in torch-uncertainty's wrapper, or None if it is not installed."""
    try:
        from torch_uncertainty.models import mc_dropout
    except ImportError:
        return None
    return nn.Sequential(mc_dropout(network, num_estimators=samples, on_batch=True).eval())


def train(network, batches, device):
    """Return a function that trains an epoch over the batches."""
    optimizer = torch.optim.AdamW(network.train().parameters(), lr=1e-4)

    def epoch():
        for batch in batches:
            optimizer.zero_grad()
            probability = network(batch.images.to(device)).sigmoid()
            polydice1_loss(probability, batch.masks.to(device).float()).mean().backward()
            optimizer.step()

    return epoch


def ways(arguments, batches):
    """Return the functions that assess all images or train an epoch, by name."""
    device, samples = arguments.device, arguments.samples
    found = {}

    def keep(name, network, **how):
        found[name] = assess(network, batches, UncertaintyConfig(samples=samples, **how)).difficulty

    dropping, plain, wrapped = (build(arguments, batches) for _ in range(3))
    wrapper = as_torch_uncertainty(wrapped, samples)
    by_hand = "" if wrapper else ", by hand"
    repeating = wrapper or with_dropout(wrapped)
    with_dropout(dropping)
    learner = train(build(arguments, batches), batches, device)
    return found, {
        "naive loop": lambda: naive(dropping, batches, samples, device),
        f"repeated batch{by_hand}": lambda: repeated(repeating, batches, samples, device),
        "polyseg, plain": lambda: keep("plain", plain, program="plain"),
        "polyseg": lambda: keep("program", plain),
        "epoch of training": learner,
    }


def seconds(function, device):
    """Return the time of a call."""
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


def measure(functions, arguments):
    """Return the seconds of each round by name, after one warm-up round."""
    times = {name: [] for name in functions}
    for turn in range(arguments.rounds + 1):
        for name, function in functions.items():
            taken = seconds(function, arguments.device)
            if turn:
                times[name].append(taken)
    return times


def memory_of(what, arguments):
    """Return the growth of the peak memory in MB of a training step or an assessment."""

    def peak():
        if arguments.device == "cuda":
            return torch.cuda.max_memory_allocated() / 2**20
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10

    batches = load(arguments)[:1]
    # Without passes before the measurement, which would raise the peak.
    network = build_network(arguments.network, in_channels=batches[0].images.shape[1])
    network.to(arguments.device)
    before = peak()
    if what == "step":
        train(network, batches, arguments.device)()
    elif what == "naive":
        naive(with_dropout(network), batches, arguments.samples, arguments.device)
    else:
        assess(network, batches, UncertaintyConfig(samples=arguments.samples))
    return peak() - before


def memory_table(arguments):
    """Return the table of memory, with each row measured in a separate process."""
    table = Table("what", "MB", title=f"memory, batches of {BATCH}")
    rows = {f"step of training, batch of {BATCH}": ("step", 20)}
    rows |= {f"naive loop, N = {count}": ("naive", count) for count in (20, 100)}
    rows |= {f"polyseg, N = {count}": ("assess", count) for count in (20, 100)}
    settings = ["--data", arguments.data, "--size", arguments.size, "--images", BATCH]
    settings += ["--network", arguments.network, "--device", arguments.device]
    settings += ["--foreground", *arguments.foreground]
    for name, (what, samples) in rows.items():
        command = [sys.executable, __file__, *settings, "--memory-of", what, "--samples", samples]
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=True)
        table.add_row(name, done.stdout.decode().splitlines()[-1])
    return table


def share(assessment, epoch):
    """Return the share of assessments in the time of an adaptive run."""
    return ASSESSMENTS * assessment / (ASSESSMENTS * assessment + EPOCHS * epoch)


def main():
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="demo", help="demo, or a folder")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--network", default="unet")
    parser.add_argument("--foreground", type=float, nargs=2, default=(0.1, 0.2))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory_of:
        print(f"{memory_of(arguments.memory_of, arguments):.0f}")
        return
    # First, because a process inherits the peak of its parent.
    memory = memory_table(arguments)
    batches = load(arguments)
    count = sum(len(batch.ids) for batch in batches)
    covered = np.mean([float(mask.float().mean()) for one in batches for mask in one.masks])
    found, functions = ways(arguments, batches)
    times = measure(functions, arguments)
    title = (
        f"{arguments.network}, {count} images of {arguments.size} x {arguments.size}, "
        f"foreground {covered:.0%}, N = {arguments.samples}"
    )
    table = Table("way", "median s", "ratio", "10-90 %", title=title)
    reference = np.array(times["naive loop"])
    for name, values in times.items():
        low, middle, high = np.percentile(np.array(values) / reference, (10, 50, 90))
        ratio = (f"{middle:.3f}", f"{low:.3f} to {high:.3f}")
        table.add_row(name, f"{np.median(values):.2f}", *ratio)
    console = Console()
    console.print(table)
    apart = np.max(np.abs(found["program"] - found["plain"]) / np.abs(found["plain"]))
    print(f"largest relative difference of D between polyseg, plain and polyseg: {apart:.1e}")
    console.print(memory)
    epoch = np.median(times["epoch of training"])
    print(f"share of MC Dropout in {EPOCHS} epochs with {ASSESSMENTS} assessments, predicted:")
    for name in ("naive loop", "polyseg, plain", "polyseg"):
        print(f"  {name}: {share(np.median(times[name]), epoch):.1%}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}")


if __name__ == "__main__":
    main()
