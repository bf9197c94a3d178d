"""The engine of conformal methods: count the unseen sample at its worst, then stop as early as that allows.

Losses of n calibration samples fall as a setting lambda grows. `first_safe` finds the first setting at which
their weighted mean, the unseen sample counted among them at the largest loss there is, meets a level.
Where the loss is a yes or no that each sample decides at a point of its own, that setting is `quantile` of
these points, the usual split-conformal one: intervals are predictions plus and minus it, sets of labels those
whose score does not exceed it. With scores that tie, or n too small for the level, such sets cover more than asked;
`p_values` with random numbers make the coverage exact. `losses_at`, `numbers` and `as_array` check what is given, array
or tensor.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import issparse
from torch import Tensor

from lossary import require

ROUNDING = 1e-12  # relative; a mean that misses its level by less has met it


def as_array(name: str, values: Any) -> NDArray:
    """An array or tensor of real numbers as an array; objects that are numbers become float64.

    Raises:
        ValueError: sparse, complex or not numbers.
        TypeError: an array of objects that are not numbers.
    """
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.float() if values.dtype is torch.bfloat16 else values).numpy()  # numpy has no bfloat16
    if issparse(values):
        raise ValueError(f"{name}: expected a dense array, got a sparse one; give {name}.toarray()")
    found = np.asarray(values)
    if found.dtype.kind == "O":
        found = found.astype(np.float64)
    if found.dtype.kind not in "fiub":
        hint = ". Complex data not supported" if found.dtype.kind == "c" else ""
        raise ValueError(f"{name}: expected numbers, got {found.dtype}{hint}")
    return found


def misshapen(shape: tuple[int, ...]) -> str:
    """A shape that is none of (rows, features), and what is wrong, in the words that scikit-learn's checks look for."""
    if len(shape) == 1 and shape[0]:
        return f"{shape}. Reshape your data by .reshape(1, -1) if they are one row"
    if shape[1:] == (0,):
        return f"{shape}: 0 feature(s) (shape={shape}) while a minimum of 1 is required."
    return f"{shape}"


def numbers(name: str, values: Any, *, dims: int) -> NDArray:
    """An array or tensor of finite numbers as a float64 array.

    Raises:
        ValueError: not numbers, another number of dimensions, empty, NaN or infinite.
    """
    found = as_array(name, values)
    if found.ndim != dims or not found.size:
        raise ValueError(f"{name}: expected numbers of {dims} dimensions, got shape {misshapen(found.shape)}")
    found = found.astype(np.float64, copy=False)
    if not np.isfinite(found).all():
        raise ValueError(f"{name}: contains NaN or infinite values")
    return found


def losses_at(lambdas: Any, losses: Any, upper_bound: float | None) -> tuple[NDArray, NDArray]:
    """Losses (n, G), made to fall from left to right, and the settings (G,) that they belong to.

    Raises:
        ValueError: wrong shapes, NaN, settings that do not increase, losses above `upper_bound` (None: unbounded).
    """
    if upper_bound is not None:
        require.number("upper_bound", upper_bound)
    table, grid = numbers("losses", losses, dims=2), numbers("lambdas", lambdas, dims=1)
    if grid.shape != table.shape[1:] or not (np.diff(grid) > 0).all():
        raise ValueError(f"lambdas: expected {table.shape[1]} increasing numbers, got shape {grid.shape}")
    if upper_bound is not None and table.max() > upper_bound:
        raise ValueError(f"losses: expected at most upper_bound, {upper_bound:g}, got {table.max():g}")
    return falling(table), grid


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


def rank(n: int, alpha: float) -> int:
    """ceil((n + 1)(1 - alpha)), which of n sorted points to take; n + 1 where n is too small for alpha."""
    return int(np.ceil((n + 1) * (1 - alpha) * (1 - ROUNDING)))


def quantile(points: NDArray, alpha: float) -> float:
    """The ceil((n + 1)(1 - alpha))-th smallest of n points, infinity where n is too small for alpha."""
    k = rank(len(points), alpha)
    return float(np.partition(points, k - 1)[k - 1]) if k <= len(points) else np.inf


def lower_quantile(points: NDArray, alpha: float) -> float:
    """The floor((n + 1) alpha)-th smallest of n points, minus infinity where n is too small for alpha."""
    return -quantile(-points, alpha)


def split_interval(predictions: NDArray, residuals: NDArray, alpha: float) -> NDArray:
    """Intervals (M, 2): predictions (M,) plus and minus the `quantile` of n residuals' sizes, maybe infinite."""
    radius = quantile(np.abs(residuals), alpha)
    return np.stack([predictions - radius, predictions + radius], axis=-1)


def threshold_scores(probabilities: NDArray) -> NDArray:
    """Scores (N, K) of labels whose sets are the smallest on average: one minus the label's probability."""
    return 1 - probabilities


def set_scores(probabilities: NDArray, u: NDArray) -> NDArray:
    """Scores (N, K) of labels whose sets adapt to the row: the mass of likelier labels plus a share u of the own.

    Args:
        probabilities: (N, K), rows summing to 1; equal ones rank in the order of their labels.
        u: (N,) from 0 to 1. Uniform random numbers make coverage exact, save where labels of probability 0 occur;
            1 counts the label whole, whose sets cover more.
    """
    order = np.argsort(-probabilities, axis=1, kind="stable")
    ranked = np.take_along_axis(probabilities, order, axis=1)
    scores = np.empty_like(ranked)
    np.put_along_axis(scores, order, ranked.cumsum(1) - (1 - u[:, None]) * ranked, axis=1)
    return scores


def p_values(scores: NDArray, calibration: NDArray, u: NDArray | float = 1.0) -> NDArray:
    """The share of the n + 1 scores, the new one among them, that are at least as large as each new one.

    The set of the labels whose value exceeds alpha is that of the scores up to `quantile(calibration, alpha)`.

    Args:
        scores: new ones, of any shape.
        calibration: (n,).
        u: broadcasts over `scores`; how much of the ties counts, the new one's tie with itself among them. Uniform
            random numbers, one a row, make the value of the true label uniform, whatever the ties and however small n.
    """
    ordered, n = np.sort(calibration), len(calibration)
    above = n - np.searchsorted(ordered, scores, side="right")
    at_least = n - np.searchsorted(ordered, scores, side="left")
    return (above + u * (at_least - above + 1)) / (n + 1)
