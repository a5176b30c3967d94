"""The results of a command for printing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polyseg.evaluation.scores import Evaluation


@dataclass(frozen=True)
class Outcome:
    """The results of a command for printing: files, evaluation and correlations."""

    folder: Path
    files: list[Path]
    evaluation: Evaluation | None = None
    correlations: Sequence[Mapping[str, Any]] = ()
    notes: Sequence[str] = ()
    """Sentences about the correlations."""
