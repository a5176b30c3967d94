"""PolyDice as a function of the angle, for tensors and NumPy arrays."""

import math
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Array = TypeVar("Array", NDArray[np.float64], "Tensor")


def polydice1_curve(
    theta: NDArray[np.float64], epsilon: float, s: float, *, terms: int = 1
) -> NDArray[np.float64]:
    """Return PolyDice at given angles and constant s.

    Args:
        theta: radians, any shape.
        epsilon: a number.
        s: the scale, in [0, 1].
        terms: K, at least 1.

    Returns:
        The loss, of theta's shape, float64.

    Raises:
        ValueError: epsilon or s is not a number.

    >>> polydice1_curve(np.array([0.0, 1.0]), epsilon=0.5, s=0.1)
    array([0.9, 1. ])
    """
    if np.ndim(epsilon) or np.ndim(s):
        raise ValueError(
            f"epsilon {np.shape(epsilon)} and s {np.shape(s)} must be numbers, at theta "
            f"{np.shape(theta)}"
        )
    squared = np.square(np.asarray(theta, dtype=np.float64))
    return np.asarray((1 - s) + s * angle_penalty(squared, 0.5 + epsilon, terms))


def angle_penalty(squared_angle: Array, steepness: Any, terms: int) -> Array:
    """Return sum_k alpha_k theta^(2k) with alpha_1 = steepness, by Horner's rule.

    Args:
        squared_angle: theta^2, any shape.
        steepness: 1/2 + epsilon, a number or an array that broadcasts to that shape.
        terms: K, at least 1.

    >>> angle_penalty(np.array([0.0, 1.0, 4.0]), 0.5, terms=1)
    array([0. , 0.5, 2. ])
    """
    total: Any = 0.0
    for k in range(terms, 1, -1):
        total = (total + (-1) ** (k - 1) / math.factorial(2 * k)) * squared_angle
    penalty: Array = (total + steepness) * squared_angle
    return penalty
