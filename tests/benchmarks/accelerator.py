"""Training and MC Dropout on a GPU, in fp32 and bf16: python -m tests.benchmarks.accelerator

On a machine without a GPU it measures the CPU at small sizes, and says so. Training is compared
with a bare loop over the same network and with MONAI, an assessment with N plain passes. All
are measured in turn, A B A B, in one process; each ratio is the median over rounds of the time to
that of the first row in the same round, and the range is over all rounds. polyseg runs with
deterministic algorithms, as `polyseg train` does, the others with torch's defaults. The row "by
trial" is `training.deterministic=false`, where cuDNN chooses the fastest algorithm: the difference
to "polyseg" is the cost of determinism, which is zero on a CPU. "channels last" is that setting
of training with deterministic algorithms. bf16 is `training.precision` of polyseg and autocast
for the others, and `uncertainty.precision` of assessments. The row "one by one" runs
single passes; the other rows join as many passes as fill a GPU. Memory is the growth of the peak
in an epoch, or in the assessment of a batch: of allocated memory on a GPU, or of a new process
on a CPU.
"""

import argparse
import contextlib
import functools
import multiprocessing
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from polyseg.config import UncertaintyConfig
from polyseg.metrics.rank_stability import spearman
from polyseg.montecarlo import passes
from polyseg.montecarlo.assessment import assess

from . import montecarlo, training

PRECISIONS = ("fp32", "bf16")
SMALL = {"size": 96, "batch": 4, "images": 12, "rounds": 3}
LARGE = {"size": 256, "batch": 16, "images": 64, "rounds": 5}
VARIANTS = {"by trial": {"deterministic": False}, "channels last": {"channels_last": True}}
"""Settings of training by the name of polyseg's row."""
OURS = {
    "polyseg, plain": ("plain", True),
    "polyseg": ("auto", True),
    "polyseg, one by one": ("auto", False),
}
"""Program, and whether passes may be joined, by the name of polyseg's assessment."""
ASSESSED = {"naive loop": "naive", "polyseg": "assess"}
"""Assessments whose memory is measured, by their name in `montecarlo`."""


@contextlib.contextmanager
def algorithms(deterministic, benchmark):
    """Set torch's choice of algorithms for the length of the block."""
    before = torch.are_deterministic_algorithms_enabled()
    flags = torch.backends.cudnn.flags(
        enabled=True, benchmark=benchmark, deterministic=deterministic, allow_tf32=True
    )
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        with flags:
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=True)


def under(function, device, precision, deterministic, benchmark=False):
    """Return the function with or without autocast, and with a choice of algorithms."""

    def run():
        reduced = torch.autocast(device, torch.bfloat16, enabled=precision == "bf16")
        with algorithms(deterministic, benchmark), reduced:
            return function()

    return run


def loops(arguments):
    """Return the builders of functions that train an epoch, by name and precision."""

    def made(make, precision, deterministic, benchmark=False):
        return under(make(), arguments.device, precision, deterministic, benchmark)

    built = training.build(arguments)
    for name, settings in VARIANTS.items():
        built[f"polyseg, {name}"] = functools.partial(built["polyseg"], **settings)
    makers = {}
    for name, make in built.items():
        for precision in PRECISIONS:
            if name.startswith("polyseg"):
                ours = functools.partial(make, precision=precision, workers=arguments.workers)
                exact = ours.keywords.get("deterministic", True)
                makers[name, precision] = functools.partial(made, ours, "fp32", exact, not exact)
            else:
                makers[name, precision] = functools.partial(made, make, precision, False)
    return makers


def assessments(arguments, batches):
    """Return a dictionary for the difficulties, and the functions that assess all images."""
    _, ways = montecarlo.ways(arguments, batches)
    device, found, functions = arguments.device, {}, {}
    network = montecarlo.build(arguments, batches)

    def ours(key, program, together):
        settings = UncertaintyConfig(samples=arguments.samples, program=program, precision=key[1])
        pixels = passes._PIXELS_AT_ONCE if together else 1
        with mock.patch.object(passes, "_PIXELS_AT_ONCE", pixels):
            found[key] = assess(network, batches, settings).difficulty

    for precision in PRECISIONS:
        functions["naive loop", precision] = under(ways["naive loop"], device, precision, False)
    for name, (program, together) in OURS.items():
        if together or device == "cuda":
            for key in ((name, precision) for precision in PRECISIONS):
                functions[key] = under(
                    functools.partial(ours, key, program, together), device, "fp32", True
                )
    return found, functions


def measure(trained, assessed, arguments):
    """Return the seconds of all rounds of both by name and precision, measured in turn."""
    functions = {("training", key): function for key, function in trained.items()}
    functions |= {("assessment", key): function for key, function in assessed.items()}
    times, _ = training.measure(functions, arguments)
    return [
        {key: values for (kind, key), values in times.items() if kind == wanted}
        for wanted in ("training", "assessment")
    ]


def in_child(function):
    """Return the result of a function in a process forked from this one."""
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=lambda: there.send(function()))
    child.start()
    there.close()
    try:
        return here.recv()
    finally:
        child.join()


def added_memory(function, device):
    """Return the growth of the peak memory in MB during a function."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return function()
    return in_child(function)


def memory(arguments):
    """Return the MB that an epoch, or an assessment of a batch, adds by name and precision."""

    # Everything is made in the child, because threads of this process would be missing there.
    def of_loop(key):
        return training.memory_of_step(loops(arguments)[key], arguments.device)

    names = ("bare loop", "polyseg")
    keys = [(name, precision) for name in names for precision in PRECISIONS]
    training_memory = {
        key: added_memory(functools.partial(of_loop, key), arguments.device) for key in keys
    }
    assessment_memory = {
        (name, "fp32"): added_memory(
            functools.partial(montecarlo.memory_of, what, arguments), arguments.device
        )
        for name, what in ASSESSED.items()
    }
    return training_memory, assessment_memory


def table_of(times, added, images, title):
    """Return a table of the times, with the first row as the reference."""
    columns = ("median s", "images/s", "ratio", "range", "MB")
    table = Table("", "", *columns, title=title)
    reference = np.array(next(iter(times.values())))
    for (name, precision), values in times.items():
        ratios, median = np.array(values) / reference, np.median(values)
        megabytes = f"{added[name, precision]:.0f}" if (name, precision) in added else ""
        table.add_row(
            *(name, precision, f"{median:.3f}", f"{images / median:.1f}"),
            *(f"{np.median(ratios):.2f}", f"{ratios.min():.2f} to {ratios.max():.2f}", megabytes),
        )
    return table


def largest_difference(one, other):
    """Return the largest relative difference of the difficulty of any image."""
    return np.max(np.abs(one - other) / np.abs(other))


def difference_between_devices(arguments, batches):
    """Return the difference between D on the GPU and on the CPU, with and without TF32."""
    network = montecarlo.build(arguments, batches)
    on_cpu = assess(network.cpu(), batches, UncertaintyConfig(samples=arguments.samples)).difficulty
    found = {}
    for tf32 in (True, False):
        with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=tf32):
            on_gpu = assess(
                network.cuda(), batches, UncertaintyConfig(samples=arguments.samples)
            ).difficulty
        found[tf32] = largest_difference(on_gpu, on_cpu)
    return found


def read_arguments():
    """Return the arguments, which the imported benchmarks use as well."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    usual = LARGE if device == "cuda" else SMALL
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=usual["size"])
    parser.add_argument("--batch", type=int, default=usual["batch"])
    parser.add_argument("--images", type=int, default=usual["images"])
    parser.add_argument("--rounds", type=int, default=usual["rounds"])
    parser.add_argument("--samples", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0, help="training.workers of polyseg")
    parser.add_argument("--data", default="demo", help="images to assess: demo, or a folder")
    parser.add_argument("--network", default="unet", help="to be assessed")
    parser.add_argument("--foreground", type=float, nargs=2, default=(0.1, 0.2))
    parser.add_argument("--compile", action="store_true", help="measure training.compile, too")
    arguments = parser.parse_args()
    arguments.device = device
    # Attributes that both modules read when they make batches.
    training.BATCH = montecarlo.BATCH = arguments.batch
    return arguments


def print_what_follows(times, assessed, found, arguments, batches):
    """Print the share of MC Dropout in a run, and the differences between difficulties."""
    epoch = np.median(times["polyseg, light", "fp32"])
    print(
        f"share of MC Dropout in {montecarlo.EPOCHS} epochs with {montecarlo.ASSESSMENTS} "
        "assessments, fp32, light augmentation, no validation, predicted:"
    )
    count = sum(len(batch.ids) for batch in batches)
    for name in ("naive loop", "polyseg, plain", "polyseg"):
        assessment = np.median(assessed[name, "fp32"]) * arguments.images / count
        print(f"  {name}: {montecarlo.share(assessment, epoch):.1%}")
    reference = found["polyseg, plain", "fp32"]
    for (name, precision), difficulty in found.items():
        apart, alike = largest_difference(difficulty, reference), spearman(difficulty, reference)
        told = f"{apart:.1e}, rank correlation {alike:.4f}"
        print(f"largest relative difference of D, {name}, {precision}, to plain, fp32: {told}")
    if arguments.device == "cuda":
        for tf32, apart in difference_between_devices(arguments, batches).items():
            how = "as torch has it, with TF32" if tf32 else "without TF32"
            print(f"largest relative difference of D, GPU to CPU, {how}: {apart:.1e}")
    else:
        print("largest relative difference of D, GPU to CPU: not measured, there is no GPU")


def main():
    """Measure and print the tables."""
    arguments = read_arguments()
    on_gpu = arguments.device == "cuda"
    where = torch.cuda.get_device_name() if on_gpu else "CPU, because there is no GPU here"
    print(f"{where}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    # First, because earlier use of memory would be in the peak.
    of_training, of_assessment = memory(arguments)
    batches = montecarlo.load(arguments)
    found, ways = assessments(arguments, batches)
    epochs = {key: make() for key, make in loops(arguments).items()}
    trained, assessed = measure(epochs, ways, arguments)
    size = f"{arguments.size} x {arguments.size}, batches of {arguments.batch}"
    console = Console()
    title = f"an epoch of {arguments.images} images of {size}"
    console.print(table_of(trained, of_training, arguments.images, title))
    count = sum(len(batch.ids) for batch in batches)
    title = f"MC Dropout, N = {arguments.samples}, of {count} images of {size}"
    console.print(table_of(assessed, of_assessment, count, title))
    print_what_follows(trained, assessed, found, arguments, batches)


if __name__ == "__main__":
    main()
