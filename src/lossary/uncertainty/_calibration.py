"""The engine of calibrators: checked logits and labels, the one temperature that fits them, and what is left to wish.

A calibrator learns on a classifier's logits for samples it was not trained on. `temperature` is the baseline of all
of them. `expected_calibration_error` asks whether confidence is how often a prediction is right,
`area_under_risk_coverage` whether the right ones are the confident ones. `mass_edges` cuts values into bins alike
frequent. All take arrays or tensors and compute in float64.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data
from torch import Tensor

from lossary import require
from lossary.uncertainty._conformal import numbers

LARGEST = math.exp(10.0)  # temperature; the smallest is 1 / LARGEST. scikit-learn has the same range
ENOUGH = 4096  # samples from which to find where to start, where there are many more
CLOSE = 1e-7  # a relative step; the next Newton step would be about its square


def as_logits(name: str, logits: Any, classes: int | None = None) -> NDArray[np.float64]:
    """Logits (N, C) as a float64 array, C at least 2 and, where given, `classes`.

    Raises:
        ValueError: not numbers, another shape, NaN or infinite.
    """
    found = numbers(name, logits, dims=2)
    if found.shape[1] < 2 or classes not in (None, found.shape[1]):
        wanted = "at least two classes" if classes is None else f"{classes} classes"
        hint = "; 1 feature(s) are not enough" if found.shape[1] == 1 else ""
        raise ValueError(f"{name}: expected {wanted} in the last dimension, got shape {found.shape}{hint}")
    return found


def rows_of(estimator: BaseEstimator, name: str, logits: Any, *, reset: bool = False) -> NDArray[np.float64]:
    """Logits (N, C) given to an estimator, which in `fit`, with `reset`, keeps C as `n_features_in_`.

    Raises:
        ValueError: as `as_logits`, or another C than in `fit`.
    """
    found = as_logits(name, logits) if reset else numbers(name, logits, dims=2)
    checked: NDArray[np.float64] = validate_data(estimator, found, reset=reset, skip_check_array=True)
    return checked


def as_labels(name: str, labels: Any, rows: int, classes: int) -> NDArray[np.intp]:
    """Class numbers (N,), from 0 to `classes` - 1.

    Raises:
        ValueError: not whole numbers, not one a row, or out of range.
    """
    found = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if found.dtype.kind not in "iu" or found.shape != (rows,):
        raise ValueError(f"{name}: expected {rows} whole numbers, got {found.dtype} of shape {found.shape}")
    if found.min() < 0 or found.max() >= classes:
        raise ValueError(f"{name}: expected classes 0 to {classes - 1}, got {found.min()} to {found.max()}")
    return found.astype(np.intp)


def temperature(logits: Any, labels: Any) -> float:
    """The T that minimises the mean of -log softmax(z / T)_y: temperature scaling (Guo et al. 2017).

    The loss is convex in 1/T, with slope E[z] - z_y and curvature Var[z] under the softmax at 1/T, and Newton steps
    that leave the bracket are replaced by halving it on a logarithmic scale.

    Args:
        logits: z (N, C), of samples that the classifier was not trained on.
        labels: y (N,), 0 to C - 1.

    Returns:
        T, from e^-10, where every label has the largest logit, to e^10, where the logits tell nothing.

    Raises:
        ValueError: wrong shapes or dtypes, NaN, labels out of range.
    """
    z = as_logits("logits", logits)
    y = as_labels("labels", labels, *z.shape)
    behind = np.ascontiguousarray((z - z.max(axis=1, keepdims=True)).T)  # (C, N): sums over classes run along rows
    chosen = behind[y, np.arange(len(y))]
    every = len(y) // ENOUGH
    start = _inverse_temperature(behind[:, ::every], chosen[::every], 1.0) if every > 1 else 1.0
    return 1 / _inverse_temperature(behind, chosen, start)


def _inverse_temperature(z: NDArray, chosen: NDArray, start: float) -> float:
    """The best 1/T for logits (C, N), at most 0, and those of the labels (N,); a good start saves passes over them."""
    if not chosen.any():
        return LARGEST
    low, high, inverse = 1 / LARGEST, LARGEST, start
    observed = chosen.mean()
    while True:
        weights = np.exp(inverse * z)
        total = weights.sum(axis=0)
        weights *= z
        mean = weights.sum(axis=0) / total
        weights *= z
        curvature = (weights.sum(axis=0) / total - mean**2).mean()
        slope = mean.mean() - observed
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        newton = inverse - slope / curvature if curvature > 0 else np.inf
        further = newton if low <= newton <= high else math.sqrt(low * high)
        if abs(further - inverse) <= CLOSE * inverse:
            return float(further)
        inverse = further


def calibrated(logits: NDArray, temperatures: float | NDArray) -> NDArray[np.float64]:
    """softmax(z / T), (N, C), for one T or one a row (N,)."""
    return softmax(logits / np.reshape(temperatures, (-1, 1)), axis=1)


def mass_edges(values: NDArray, bins: int) -> NDArray[np.float64]:
    """Upper ends of all bins but the last, for at most `bins` bins that hold about as many values each.

    `np.searchsorted(edges, values)` gives the bin. What is equal shares a bin, which may leave fewer of them.
    """
    parts = np.array_split(np.sort(values), min(bins, len(values)))
    return np.unique([part[-1] for part in parts[:-1] if part[-1] < parts[-1][-1]])


def expected_calibration_error(confidence: Any, correct: Any, *, bins: int = 15, equal: str = "width") -> float:
    """Mean over samples of |share that is right - mean confidence| in the sample's bin, 0 to 1.

    Args:
        confidence: (N,), 0 to 1.
        correct: (N,), true or 1 where the prediction is right.
        bins: how many, at least 1.
        equal: "width", for bins that split 0 to 1 evenly and own their upper end, or "mass", for `mass_edges`.

    Raises:
        ValueError: wrong shapes, values outside 0 to 1, a number out of range.
    """
    p, right = _predictions(confidence, correct)
    require.whole("bins", bins, at_least=1)
    require.one_of("equal", equal, ("width", "mass"))
    if p.min() < 0 or p.max() > 1:
        raise ValueError(f"confidence: expected numbers from 0 to 1, got {p.min():g} to {p.max():g}")
    edges = np.linspace(0, 1, bins + 1)[1:-1] if equal == "width" else mass_edges(p, bins)
    gaps = np.bincount(np.searchsorted(edges, p), weights=right - p)
    return float(np.abs(gaps).sum() / len(p))


def area_under_risk_coverage(confidence: Any, correct: Any) -> float:
    """Mean over k of the error rate among the k most confident samples, 0 to 1 (AURC); ties in random order.

    Args:
        confidence: (N,), any numbers, higher is more confident.
        correct: (N,), true or 1 where the prediction is right.

    Raises:
        ValueError: wrong shapes, NaN.
    """
    confidence, right = _predictions(confidence, correct)
    _, tie, sizes = np.unique(-confidence, return_inverse=True, return_counts=True)
    errors = np.bincount(tie, weights=1 - right)
    covered = np.arange(1, len(right) + 1)
    expected = np.interp(covered, np.cumsum([0, *sizes]), np.cumsum([0, *errors]))
    return float((expected / covered).mean())


def _predictions(confidence: Any, correct: Any) -> tuple[NDArray, NDArray]:
    p = numbers("confidence", confidence, dims=1)
    right = numbers("correct", correct, dims=1)
    if right.shape != p.shape or not np.isin(right, (0, 1)).all():
        raise ValueError(f"correct: expected {len(p)} zeros and ones, got shape {right.shape}")
    return p, right
