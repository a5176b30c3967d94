"""What a command hands to the command line: files, and numbers to print."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseg.evaluation.scores import Evaluation


@dataclass(frozen=True)
class Outcome:
    """What a command has written and found."""

    folder: Path
    files: list[Path]
    evaluation: Evaluation | None = None
    correlations: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    """Sentences on the correlations."""
