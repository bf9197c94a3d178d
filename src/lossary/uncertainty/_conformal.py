"""The engine of conformal methods: count the unseen sample at its worst, then stop as early as that allows.

Losses of n calibration samples fall as a setting lambda grows. `first_safe` finds the first setting at which
their weighted mean, the unseen sample counted among them at the largest loss there is, meets a level.
Where the loss is a yes or no that each sample decides at a point of its own, that setting is `quantile` of
these points, the usual split-conformal one.
"""

import numpy as np
from numpy.typing import NDArray

ROUNDING = 1e-12  # relative; a mean that misses its level by less has met it


def falling(losses: NDArray) -> NDArray:
    """Each row (n, G) replaced by its running maximum from the right: the smallest loss above it that falls."""
    if (losses[:, 1:] <= losses[:, :-1]).all():  # as a rule; to look is five times as fast as to accumulate
        return losses
    return np.maximum.accumulate(losses[:, ::-1], axis=1)[:, ::-1]


def first_safe(
    losses: NDArray, *, alpha: float, upper_bound: float, weights: NDArray, test_weights: NDArray
) -> NDArray[np.intp]:
    """For each test weight w the first column g with sum_i w_i L_ig + w B <= alpha (sum_i w_i + w).

    Args:
        losses: (n, G), each row falling.
        alpha: level of the mean.
        upper_bound: B, the unseen sample's loss at worst.
        weights: (n,) of the calibration samples, not negative.
        test_weights: (M,) of the unseen ones, not negative.

    Returns:
        (M,) columns, G where there is none.
    """
    everyone = weights.sum() + test_weights
    spare = alpha * everyone - upper_bound * test_weights
    spare += ROUNDING * max(abs(alpha), abs(upper_bound)) * everyone
    return np.searchsorted(-(weights @ losses), -spare)


def quantile(points: NDArray, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n points, infinity where n is too small for alpha."""
    rank = int(np.ceil((len(points) + 1) * (1 - alpha) * (1 - ROUNDING)))
    return float(np.partition(points, rank - 1)[rank - 1]) if rank <= len(points) else np.inf
