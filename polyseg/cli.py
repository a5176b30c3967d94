"""The command line: parse, call one job, print.

Heavy imports wait inside the commands, so that help comes at once.
"""

import contextlib
import io
import json
import logging
import math
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.exceptions import TyperException

from polyseg import __version__
from polyseg.errors import Interrupted, PolysegError

if TYPE_CHECKING:
    from polyseg.evaluate import RunScores
    from polyseg.report import Outcome

app = typer.Typer(
    name="polyseg",
    help="Medical image segmentation with an uncertainty-adaptive loss.\n\n"
    "Start with [bold]polyseg train[/bold]: without arguments it trains on a built-in demo.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Look at data, or make some.", no_args_is_help=True)
config_app = typer.Typer(help="See and write the configuration.", no_args_is_help=True)

_MOST_FILES = 24
"""Lines; who wants all of them has --json, or looks."""

_THE_PRODUCT, _AROUND_IT = "The main job", "Around it"
_WHERE, _HOW, _TALK = "Input and output", "Settings", "Talking"

Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Say only warnings.", rich_help_panel=_TALK)
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=_TALK)]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print the results as JSON.", rich_help_panel=_TALK)
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=_HOW)]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Import and run the network code that a checkpoint names (package.module:factory).",
        rich_help_panel=_HOW,
    ),
]
Sources = Annotated[
    list[Path], typer.Argument(metavar="CHECKPOINT|RUN ...", help="Checkpoints, or run folders.")
]
Source = Annotated[Path, typer.Argument(metavar="CHECKPOINT|RUN", help="A checkpoint or a run.")]
OtherData = Annotated[
    Path | None,
    typer.Option(
        "--data", help="Folder of images; the run's own if left out.", rich_help_panel=_WHERE
    ),
]
Part = Annotated[
    str | None,
    typer.Option("--split", help="train, val, test or all.", rich_help_panel=_WHERE),
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder for the results.", rich_help_panel=_WHERE)
]
Cache = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        help="Folder for decoded images that do not fit into memory.",
        rich_help_panel=_WHERE,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY.SUB=VALUE", help="Any setting; repeatable.", rich_help_panel=_HOW
    ),
]
Fold = Annotated[
    int | None,
    typer.Option(
        "--fold",
        metavar="K",
        help="Fold to test on, from 0, of data.folds (of the split file, with --split).",
        rich_help_panel=_HOW,
    ),
]
DataPath = Annotated[str, typer.Argument(metavar="PATH", help="Folder, or CSV manifest.")]
ConfigFile = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG.yaml", help="Settings; the defaults if left out."),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"polyseg {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the version and leave.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


@app.command(rich_help_panel=_THE_PRODUCT)
def train(
    config: ConfigFile = None,
    data: Annotated[
        str | None,
        typer.Option(help="Folder of a data set, CSV manifest, or 'demo'.", rich_help_panel=_WHERE),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run's folder, new.", rich_help_panel=_WHERE)
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Passes over the images.", rich_help_panel=_HOW)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of everything random.", rich_help_panel=_HOW)
    ] = None,
    loss: Annotated[
        str | None,
        typer.Option(
            help="polydice1, polydice, dice, dice_bce, bce, tversky, focal or tvmf.",
            rich_help_panel=_HOW,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="auto, cpu, cuda or mps.", rich_help_panel=_HOW)
    ] = None,
    fold: Fold = None,
    split: Annotated[
        Path | None,
        typer.Option(
            "--split",
            metavar="FILE",
            help="split.json of a run or of `data split`, or nnU-Net's splits_final.json.",
            rich_help_panel=_WHERE,
        ),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with the run in --out; with --epochs for longer, the learning rate then "
            "following the new number.",
            rich_help_panel=_WHERE,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check all, print the plan, train nothing.", rich_help_panel=_HOW
        ),
    ] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train a network, measure its uncertainty as it learns, test it, draw the figures.

    Example: polyseg train --data my/images --out runs/first --set data.size=256
    """
    from polyseg.config import load_config

    if resume and out is None:
        raise PolysegError("--resume: name the run by --out")
    if resume and config is None and out is not None and (out / "config.yaml").is_file():
        config = out / "config.yaml"
    flags = {
        "data.path": data,
        "output.path": None if out is None else str(out),
        "training.epochs": epochs,
        "training.seed": seed,
        "training.device": device,
        "loss.name": loss,
        "data.fold": fold,
        "data.split_file": None if split is None else str(split),
    }
    settings = load_config(config, [*(overrides or []), *_as_overrides(flags)])
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import training

        found = (
            training.plan(settings, progress=display)
            if dry_run
            else training.train(settings, resume=resume, progress=display)
        )
    if isinstance(found, dict):
        _print_mapping("Plan", found, as_json)
    else:
        _print_outcome(found, as_json)


@app.command(rich_help_panel=_THE_PRODUCT)
def estimate_uncertainty(
    source: Source,
    data: OtherData = None,
    part: Part = None,
    samples: Annotated[
        int | None, typer.Option(help="N, passes of MC Dropout.", rich_help_panel=_HOW)
    ] = None,
    maps: Annotated[
        bool, typer.Option("--maps", help="Keep the pixel maps too.", rich_help_panel=_HOW)
    ] = False,
    out: Out = None,
    cache: Cache = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure by MC Dropout how unsure a network is about images, with or without masks.

    Example: polyseg estimate-uncertainty runs/first --data new/images --samples 50
    """
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import uncertainty

        outcome = uncertainty.estimate_uncertainty(
            source,
            data=data,
            part=part,
            samples=samples,
            save_maps=maps,
            out=out,
            cache=cache,
            device=device,
            trust=trust,
            progress=display,
        )
    _print_outcome(outcome, as_json)


@app.command(rich_help_panel=_THE_PRODUCT)
def evaluate(
    sources: Sources,
    data: OtherData = None,
    part: Part = None,
    out: Out = None,
    cache: Cache = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Test networks side by side: accuracy, sensitivity, specificity, AUC, Dice, IoU, HD95, ASD.

    Example: polyseg evaluate runs/dice runs/adaptive --out runs/comparison
    """
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import evaluation

        outcome = evaluation.evaluate_runs(
            sources,
            data=data,
            part=part,
            out=out,
            cache=cache,
            device=device,
            trust=trust,
            progress=display,
        )
    _print_outcome(outcome, as_json)


@app.command(rich_help_panel=_THE_PRODUCT)
def plot_loss(
    s: Annotated[
        float, typer.Option("--s", help="Scale s, in (0, 1].", rich_help_panel=_HOW)
    ] = 0.1,
    epsilon: Annotated[
        str, typer.Option(help="Steepnesses, separated by commas.", rich_help_panel=_HOW)
    ] = "-0.4,0,0.5,1",
    terms: Annotated[int, typer.Option(help="K, terms of PolyDice.", rich_help_panel=_HOW)] = 1,
    gradient: Annotated[
        bool,
        typer.Option("--gradient", help="Draw the derivative by theta.", rich_help_panel=_HOW),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(help="File; without suffix both PDF and PNG.", rich_help_panel=_WHERE),
    ] = Path("polydice"),
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw the loss over the angle between prediction and mask, for several epsilon.

    Example: polyseg plot-loss --epsilon=-0.4,0,1 --out fig2.pdf
    """
    with _talking(quiet, verbose):
        from polyseg.jobs import figure

        for path in figure.plot_loss(
            s=s, epsilons=_numbers(epsilon), terms=terms, gradient=gradient, out=out
        ):
            print(path)


@app.command(rich_help_panel=_AROUND_IT)
def predict(
    source: Source,
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="IMAGE|DIR ...", help="Images, or folders of images or a series."),
    ],
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the masks, new.", rich_help_panel=_WHERE)
    ],
    uncertainty: Annotated[
        bool,
        typer.Option(
            "--uncertainty",
            help="Write maps of the uncertainty too, and difficulties into the table.",
            rich_help_panel=_HOW,
        ),
    ] = False,
    samples: Annotated[
        int | None,
        typer.Option(help="N, passes of MC Dropout for --uncertainty.", rich_help_panel=_HOW),
    ] = None,
    device: Device = "auto",
    trust: Trust = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment images: a mask for each, of its size, spacing, orientation and format.

    Example: polyseg predict runs/first new/images --out masks
    """
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import prediction

        outcome = prediction.predict_images(
            source,
            paths,
            out=out,
            uncertainty=uncertainty,
            samples=samples,
            device=device,
            trust=trust,
            progress=display,
        )
    _print_outcome(outcome, as_json)


@data_app.command("check")
def data_check(
    path: DataPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Read every image and mask of a data set and say what was found, and all that is wrong.

    Example: polyseg data check my/images
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *_as_overrides({"data.path": path})])
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import data

        found = data.check_data(settings, display)
    _print_mapping(path, found, as_json)


@data_app.command("split")
def data_split(
    path: DataPath,
    out: Annotated[Path, typer.Option(help="File to write.", rich_help_panel=_WHERE)] = Path(
        "split.json"
    ),
    fold: Fold = None,
    overrides: Overrides = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Divide a data set into training, validation and test images, for `train --split`.

    Example: polyseg data split my/images --fold 0 --out fold_0.json --set data.folds=10
    """
    from polyseg.config import load_config

    flags = _as_overrides({"data.path": path, "data.fold": fold})
    settings = load_config(None, [*(overrides or []), *flags])
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import data

        found = data.make_split(settings, out, display)
    _print_mapping(path, found, as_json)


@data_app.command("preview")
def data_preview(
    path: DataPath = "demo",
    out: Annotated[
        Path, typer.Option(help="File; without suffix both PDF and PNG.", rich_help_panel=_WHERE)
    ] = Path("preview"),
    images: Annotated[int, typer.Option(help="Images, a row each.", rich_help_panel=_HOW)] = 4,
    samples: Annotated[
        int, typer.Option(help="Augmented samples of each.", rich_help_panel=_HOW)
    ] = 5,
    overrides: Overrides = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Draw training images with their masks, as they are and as the first epochs would see them.

    Example: polyseg data preview my/images --set data.augmentation=strong --out strong.png
    """
    from polyseg.config import load_config

    settings = load_config(None, [*(overrides or []), *_as_overrides({"data.path": path})])
    with _talking(quiet, verbose) as display:
        from polyseg.jobs import data

        for file in data.preview(
            settings, out=out, count=images, samples=samples, progress=display
        ):
            print(file)


@data_app.command("demo")
def data_demo(
    path: Annotated[Path, typer.Argument(help="Folder to make.")],
    images: Annotated[int, typer.Option(help="How many.", rich_help_panel=_HOW)] = 160,
    size: Annotated[
        int, typer.Option(help="Height and width in pixels.", rich_help_panel=_HOW)
    ] = 128,
    modality: Annotated[
        str, typer.Option(help="ultrasound or endoscopy.", rich_help_panel=_HOW)
    ] = "ultrasound",
    seed: Annotated[int, typer.Option(help="Of the phantoms.", rich_help_panel=_HOW)] = 0,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the demo's phantoms, images of lesions whose difficulty is known, as PNG files.

    Example: polyseg data demo phantoms --images 20 --modality endoscopy
    """
    with _talking(quiet, verbose):
        from polyseg.jobs import data

        data.write_demo(path, count=images, size=size, modality=modality, seed=seed)
        print(path)


@config_app.command("show")
def config_show(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Print all settings that a run would have.

    Example: polyseg config show --set loss.name=dice
    """
    from polyseg.config import load_config

    print(load_config(config, overrides or []).to_yaml(), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of the configuration.

    Example: polyseg config schema > polyseg.schema.json
    """
    from polyseg.config import Config

    print(json.dumps(Config.model_json_schema(), indent=2))


@config_app.command("init")
def config_init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("polyseg.yaml"),
) -> None:
    """Write a configuration file of all defaults, each with its meaning.

    Example: polyseg config init my-settings.yaml
    """
    from polyseg.config import template
    from polyseg.files import write_text

    if path.exists():
        raise PolysegError(f"{path}: exists already; choose another name")
    write_text(path, template())
    print(path)


app.add_typer(data_app, name="data", rich_help_panel=_AROUND_IT)
app.add_typer(config_app, name="config", rich_help_panel=_AROUND_IT)


def main() -> None:
    """Run the command line; a user's error is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a sign shows a question mark.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        sys.exit(app(standalone_mode=False))
    except PolysegError as error:
        print(f"error: {_visible(str(error))}", file=sys.stderr)
        sys.exit(2)
    except TyperException as error:
        # A mistyped command or option; without a message the help has been printed instead.
        if message := error.format_message():
            print(f"error: {message} (--help tells what there is)", file=sys.stderr)
        sys.exit(2)
    except Interrupted as end:
        print(end, file=sys.stderr)
        sys.exit(128 + end.number)
    except BrokenPipeError:
        # The reader went away, as `head` does; there is no one left to tell.
        sys.stderr.close()
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        # Names that are too long, links in circles, folders in place of files.
        where = f"{error.filename!s:.200}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.exit(128 + signal.SIGINT)


def _as_overrides(flags: Mapping[str, Any]) -> list[str]:
    """Return flags that were given as settings."""
    return [f"{key}={json.dumps(value)}" for key, value in flags.items() if value is not None]


def _visible(text: str) -> str:
    """Return a text without what would steer a terminal: names in it may be anyone's."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)


class _Display:
    """Shows progress: bars on a terminal, elsewhere a plain line now and then."""

    seconds_between_lines = 30.0

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self.console = console
        # Imports take seconds; until the first progress there is at least this to see.
        self.tasks: dict[str, Any] = {"starting": self.bars.add_task("starting", total=None)}
        self.last_line = time.monotonic()

    def __call__(self, task: str, done: int, total: int) -> None:
        if self.console.quiet:
            return
        if self.console.is_terminal:
            self._move_bar(task, done, total)
        elif time.monotonic() - self.last_line > self.seconds_between_lines:
            self.last_line = time.monotonic()
            print(f"{task}: {done}/{total}", file=sys.stderr, flush=True)

    def _move_bar(self, task: str, done: int, total: int) -> None:
        if "starting" in self.tasks:
            self.bars.remove_task(self.tasks.pop("starting"))
        if task not in self.tasks:
            self.tasks[task] = self.bars.add_task(task, total=total)
        self.bars.update(self.tasks[task], completed=done)
        if done >= total:
            self.bars.remove_task(self.tasks.pop(task))


class _PlainHandler(logging.Handler):
    """Flushed lines without control codes, so that a log on a cluster is never behind."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def _talking(quiet: bool, verbose: bool) -> Iterator[_Display]:
    """Send the package's log and progress to stderr for the length of a command."""
    console = Console(stderr=True, quiet=quiet)
    logger = logging.getLogger("polyseg")
    logger.setLevel(logging.DEBUG)
    handler = (
        RichHandler(
            console=console,
            show_path=False,
            show_level=False,
            highlighter=None,
            log_time_format="%H:%M:%S",
        )
        if console.is_terminal
        else _PlainHandler()
    )
    # A run's own log says all that there is to say, however quiet the terminal is.
    handler.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    logger.addHandler(handler)
    display = _Display(console)
    try:
        with display.bars if console.is_terminal and not quiet else contextlib.nullcontext():
            yield display
    finally:
        logger.removeHandler(handler)


def _print_outcome(outcome: "Outcome", as_json: bool) -> None:
    """Print tables and paths, or all of it as JSON, to stdout."""
    from polyseg import evaluate

    if as_json:
        record = {
            "folder": str(outcome.folder),
            "files": [str(path) for path in outcome.files],
            "runs": evaluate.summary(outcome.runs) if outcome.runs else None,
            "correlations": list(outcome.correlations),
        }
        print(json.dumps(_without_nan(record), indent=2))
        return
    console = Console()
    if outcome.runs:
        _print_scores(console, outcome.runs)
    if outcome.correlations:
        _print_correlations(console, outcome.correlations)
    suffixes: dict[Path, list[str]] = {}
    for path in outcome.files:
        shown = path.relative_to(outcome.folder) if path.is_relative_to(outcome.folder) else path
        suffixes.setdefault(shown.with_suffix(""), []).append(shown.suffix)
    print(f"\nin {outcome.folder}:")
    for stem, endings in list(suffixes.items())[:_MOST_FILES]:
        print(f"  {stem}{', '.join(endings)}")
    if len(suffixes) > _MOST_FILES:
        print(f"  and {len(suffixes) - _MOST_FILES} more")


def _print_scores(console: Console, runs: "Sequence[RunScores]") -> None:
    """Print a table of metrics, a row a metric, so that it fits however many there are."""
    from polyseg import evaluate

    table = Table(title="Mean ± deviation over the images", title_justify="left")
    table.add_column("metric")
    for run in runs:
        table.add_column(escape(f"{run.title} ({len(run.scores)} images)"), justify="right")
    cells = [evaluate.table_cells(run) for run in runs]
    for row, metric in enumerate(evaluate.METRICS):
        table.add_row(metric.title, *(column[row] for column in cells))
    console.print(table)
    for note in evaluate.notes(runs):
        console.print(note, highlight=False, markup=False)


def _print_correlations(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Spearman's correlation of the difficulty D", title_justify="left")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "metric" else "right")
    for row in rows:
        cells = (value if isinstance(value, str) else f"{value:.3f}" for value in row.values())
        table.add_row(*("-" if cell == "nan" else cell for cell in cells))
    console.print(table)


def _print_mapping(title: str, values: Mapping[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(values, indent=2))
        return
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        if isinstance(value, dict):
            shown = ", ".join(f"{count} {part}" for part, count in value.items())
        table.add_row(name, shown)
    Console().print(table)


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise PolysegError(f"--epsilon {text}: give numbers separated by commas") from None


def _without_nan(value: Any) -> Any:
    """Return the same with None for NaN, which JSON does not know."""
    if isinstance(value, dict):
        return {key: _without_nan(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_nan(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
