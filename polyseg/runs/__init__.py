"""Folders of runs: checkpoints, assessment and schedule files, trained models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polyseg.runs.record_files import read_assessment, read_schedule
    from polyseg.runs.trained_model import open_model

__all__ = ["open_model", "read_assessment", "read_schedule"]


def __getattr__(name: str) -> Any:
    # Reading a record needs no torch; opening a model does.
    from importlib import import_module

    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    home = "trained_model" if name == "open_model" else "record_files"
    return getattr(import_module(f"{__name__}.{home}"), name)
