"""The engine of quantile methods: what quantiles are worth, how to uncross them, how to make them keep their word.

Quantiles (..., m) are predicted at increasing levels (m,). Pinball loss scores each, the interval score a pair, and
summed over pairs they are one: alpha / 2 times the interval score of the levels alpha / 2 and 1 - alpha / 2 is the
sum of their pinball losses. Sorting a row, or pooling neighbours that cross, never raises the sum. A conformal shift
widens or narrows a pair until it covers. The scores take arrays or tensors, gradients included.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossary.uncertainty._conformal import quantile

Array = Any  # an array or a tensor


def checked_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """Levels as floats.

    Raises:
        ValueError: none, not increasing, or not strictly between 0 and 1.
    """
    values = np.asarray(levels, dtype=np.float64)
    if values.ndim != 1 or not values.size or not (np.diff([0.0, *values, 1.0]) > 0).all():
        raise ValueError(f"levels: expected increasing numbers between 0 and 1, got {levels!r}")
    return tuple(values.tolist())


def pairs(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Positions of each level below one half and of its mirror image 1 - level, the outermost pair first.

    Raises:
        ValueError: a level without its mirror image.
    """
    values = np.asarray(checked_levels(levels))
    if not np.allclose(values, 1 - values[::-1], rtol=0, atol=1e-9):
        raise ValueError(f"levels: expected 1 - level beside every level, got {levels!r}")
    return [(k, len(values) - 1 - k) for k in range(len(values) // 2)]


def pinball(quantiles: Array, target: Array, levels: Array) -> Array:
    """level * (y - q) where y is above q, (1 - level) * (q - y) below: (..., m) for targets (...).

    Levels broadcast over the quantiles, a tensor for tensors.
    """
    error = target[..., None] - quantiles
    return levels * error - error.clip(max=0)


def interval_score(lower: Array, upper: Array, target: Array, alpha: float) -> Array:
    """Width of the interval plus 2 / alpha times the distance of a target outside."""
    outside = (lower - target).clip(min=0) + (target - upper).clip(min=0)
    return upper - lower + 2 / alpha * outside


def isotonic(values: Tensor) -> Tensor:
    """The nearest rows (..., m) that do not fall, in squares: neighbours that fall are pooled to their mean.

    All rows at once, a round after another: each joins every two adjacent blocks whose means fall, until none do.
    The gradient is spread evenly over a block.
    """
    flat = values.reshape(-1)
    starts = torch.zeros(values.shape, dtype=torch.bool, device=values.device)
    starts[..., 0] = True
    row_starts, starts = starts.reshape(-1), torch.ones_like(starts).reshape(-1)
    while True:
        block = starts.cumsum(0) - 1
        size = torch.bincount(block)
        mean = flat.new_zeros(len(size)).index_add(0, block, flat) / size
        first = starts.nonzero().squeeze(1)
        falls = (mean[1:] < mean[:-1]) & ~row_starts[first[1:]]
        if not falls.any():
            return mean[block].view(values.shape)
        starts[first[1:][falls]] = False


def conformal_shift(lower: NDArray, upper: NDArray, target: NDArray, alpha: float) -> float:
    """By how much to widen a pair of quantiles on either side (below 0: narrow it) to cover with 1 - alpha."""
    return quantile(np.maximum(lower - target, target - upper), alpha)
