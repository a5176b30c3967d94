"""Check which settings and versions of a resumed run may differ from those of its start."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from polyseg.config import Config, TrainingConfig
from polyseg.data.loading import settled
from polyseg.errors import PolysegError
from polyseg.runs.checkpoints import Checkpoint
from polyseg.runs.run_folder import RunDirectory
from polyseg.runs.trained_model import refuse_gone

_FREE_TO_CHANGE = (
    "training.epochs",
    "training.device",
    "training.workers",
    "training.on_nonfinite",
    "data.path",
    "data.memory",
    "data.cache",
    "output.",
)
"""Settings that --resume may change; a check ensures that the images are the same."""
_CHANGED_IF_ACCEPTED = (
    "training.learning_rate",
    "training.weight_decay",
    "training.scheduler",
    "training.early_stopping",
    "training.precision",
    "training.compile",
    "training.channels_last",
    "training.deterministic",
)
"""Settings that --accept-changes may change: the record of earlier epochs stays valid."""
_DECISIVE = (
    "polyseg",
    "torch",
    "numpy",
    "monai",
    "scipy",
    "processor",
    "device",
    "threads",
    "own_code",
)
"""Facts about the environment that change at least the last digits of all later results."""


def resumed_config(
    config: Config, run: RunDirectory, checkpoint: Checkpoint, accept_changes: bool = False
) -> Config:
    """Return the configuration of a resumed run: its own, with allowed changes from `config`.

    Raises:
        PolysegError: names changed settings that would change the result.
    """
    recorded = checkpoint.config
    free = _FREE_TO_CHANGE + (_CHANGED_IF_ACCEPTED if accept_changes else ())
    config = recorded_config(config, recorded.training.epochs)
    refuse_gone(config.data, run.path)
    config = config.model_copy(update={"data": settled(config.data)})
    wanted, kept = config.flat(), recorded.flat()
    differing = [
        f"{key} {kept[key]} -> {wanted[key]}"
        for key in wanted
        # As text, because mappings with another order are equal.
        if repr(wanted[key]) != repr(kept.get(key)) and not key.startswith(free)
    ]
    if differing:
        acceptable = all(change.startswith(_CHANGED_IF_ACCEPTED) for change in differing)
        raise PolysegError(
            f"{run.path}: --resume cannot change {'; '.join(differing)}; "
            + ("--accept-changes allows it" if acceptable else "start a new run instead")
        )
    return config


def refuse_changed_environment(
    run: RunDirectory, changes: Sequence[str], training: TrainingConfig, accepted: bool
) -> None:
    """Raise PolysegError if the environment has changed so that results would differ."""
    names = {change.partition(" ")[0]: change for change in changes}
    # Another number of processes or threads changes results by rounding only.
    exact = training.sync_batch_norm and training.accumulate == 1
    decide = {*_DECISIVE, "processes"}
    if "processes" in names and exact:
        decide -= {"processes", "threads"}
    decisive = [change for name, change in names.items() if name in decide]
    if decisive and not accepted:
        threads = " (OMP_NUM_THREADS sets the threads)" if "threads" in decisive[-1] else ""
        raise PolysegError(
            f"{run.path}: results would differ, because the environment has changed: "
            f"{'; '.join(decisive)}{threads}; --accept-changes resumes nevertheless"
        )


def recorded_config(config: Config, epochs: int) -> Config:
    """Return the settings that a run records.

    Paths become absolute, and the first assessment is given in whole epochs, because it must not
    change when the run is resumed for more epochs.
    """
    settings = config.flat()
    paths = [key for key in ("data.split_file", "control.replay") if settings[key] is not None]
    if config.data.path != "demo":
        paths.append("data.path")
    changes: dict[str, Any] = {key: str(Path(settings[key]).resolve()) for key in paths}
    for key, name in config.own_code.items():
        module, _, attribute = name.rpartition(":")
        if module.endswith(".py"):
            changes[key] = f"{Path(module).resolve()}:{attribute}"
    if config.assesses:
        changes["control.start"] = float(config.control.assessment_epochs(epochs)[0])
    return config.changed(changes)
