"""A difficulty and a map of one's own.

polyseg train --set uncertainty.metric=examples/own_difficulty.py:unsure_area \\
  --set control.map=examples/own_difficulty.py:steps
"""

from typing import Any

import numpy as np


def unsure_area(moments: Any, mask: Any) -> Any:
    """Return one number for each image: the pixels that the passes are unsure of, by the mask's."""
    unsure = moments.variance.sqrt() > 0.01  # (B, H, W), as moments.mean and mask are
    return unsure.flatten(1).sum(dim=1) / (mask.flatten(1).sum(dim=1) + 1)


def steps(normalised: Any, epsilon_min: float, epsilon_max: float, sensitivity: float) -> Any:
    """Return one epsilon for each of the images that are normalised together."""
    return np.where(normalised > 0, epsilon_max, epsilon_min)
