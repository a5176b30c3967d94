"""Print the log and the progress of a command to stderr."""

import contextlib
import logging
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from rich.console import Console

from polyseg.system.process_group import rank_here

if TYPE_CHECKING:
    from rich.progress import Progress


class _Display:
    """Shows progress: bars on a terminal, otherwise a plain line from time to time."""

    seconds_between_lines = 30.0

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = _bars(console) if console.is_terminal and not console.quiet else None
        self.tasks: dict[str, Any] = {}
        if self.bars is not None:
            # Show a task while modules are imported, which takes seconds.
            self.tasks["starting"] = self.bars.add_task("starting", total=None)
        self.last_line = time.monotonic()

    def __call__(self, task: str, done: int, total: int) -> None:
        if self.bars is not None:
            self._move_bar(self.bars, task, done, total)
            return
        waited = time.monotonic() - self.last_line
        if waited > self.seconds_between_lines and not self.console.quiet:
            self.last_line = time.monotonic()
            print(f"{task}: {done}/{total}", file=sys.stderr, flush=True)

    def _move_bar(self, bars: "Progress", task: str, done: int, total: int) -> None:
        if "starting" in self.tasks:
            bars.remove_task(self.tasks.pop("starting"))
        if task not in self.tasks:
            self.tasks[task] = bars.add_task(task, total=total)
        bars.update(self.tasks[task], completed=done)
        if done >= total:
            bars.remove_task(self.tasks.pop(task))


def _bars(console: Console) -> "Progress":
    """Return progress bars that vanish at the end; only a terminal needs the import."""
    from rich import progress

    return progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=console,
        transient=True,
    )


class _PlainHandler(logging.Handler):
    """Prints flushed lines without control codes, so that a log on a cluster is up to date."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one line."""
        print(self.format(record), file=sys.stderr, flush=True)


@contextlib.contextmanager
def messages(quiet: bool, verbose: bool) -> Iterator[_Display]:
    """Print the package's log and progress to stderr during a command.

    If there are several processes, only the leading one prints.
    """
    leads = rank_here() == 0
    console = Console(stderr=True, quiet=quiet or not leads, emoji=False)
    logger = logging.getLogger("polyseg")
    logger.setLevel(logging.DEBUG)
    handler: logging.Handler = _PlainHandler()
    if console.is_terminal:
        from rich.logging import RichHandler

        handler = RichHandler(
            console=console,
            show_path=False,
            show_level=False,
            highlighter=None,
            log_time_format="%H:%M",
        )
    # The logger's level is unchanged, so that a run's log file is complete.
    handler.setLevel(logging.WARNING if quiet else logging.DEBUG if verbose else logging.INFO)
    if not leads:
        handler = logging.NullHandler()
    logger.addHandler(handler)
    display = _Display(console)
    try:
        with display.bars or contextlib.nullcontext():
            yield display
    finally:
        logger.removeHandler(handler)
