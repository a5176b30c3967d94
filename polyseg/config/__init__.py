"""The configuration: settings, reading, descriptions."""

from polyseg.config.descriptions import settings_of, template
from polyseg.config.reading import build_config, load_config
from polyseg.config.settings import (
    LARGEST_EPSILON,
    MOST_SAMPLES,
    Config,
    ControlConfig,
    DataConfig,
    LossConfig,
    TrainingConfig,
    UncertaintyConfig,
    least_epsilon,
)

__all__ = [
    "LARGEST_EPSILON",
    "MOST_SAMPLES",
    "Config",
    "ControlConfig",
    "DataConfig",
    "LossConfig",
    "TrainingConfig",
    "UncertaintyConfig",
    "build_config",
    "least_epsilon",
    "load_config",
    "settings_of",
    "template",
]
