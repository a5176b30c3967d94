"""Measure uncertainty by MC Dropout (eq. 7)."""

from polyseg.montecarlo.assessment import assess
from polyseg.networks.dropout import stochastic_layers

__all__ = ["assess", "stochastic_layers"]
