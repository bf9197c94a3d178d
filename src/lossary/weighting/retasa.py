"""ReTaSA: weights for a target whose distribution has shifted, from unlabelled inputs alone, for regression.

Where p(x | y) stays and p(y) moves, a regression needs the weights w(y) = p_t(y) / p_s(y), but no y of the new kind has
been seen. What is seen are their x, and E_s[w(Y) | X = x] = p_t(x) / p_s(x): an integral equation for w, which kernel
smoothing turns into a linear system and a ridge term makes stable.

Use the weights as `sample_weight` of any regression. It presumes that x given y is the same before and after, so it
is wrong for shifts of the inputs, and that x tells different y apart; it asks for an n x n system and smooths in x, so
give it few features: for many, first map them to a model's predictions of y, as the paper does.
"""

from typing import Any, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="ReTaSA: A Nonparametric Functional Estimation Approach for Addressing Continuous Target Shift",
    year=2024,
    helps=("train-test-shift",),
    departs=(
        "Gaussian kernels with bandwidths by Scott's rule and the penalty's default are ours; the paper's rates for"
        " them hold up to constants",
        "no limit on the weights besides 0",
        "at new y the weights follow from the regularised equation itself, not from another smoothing",
    ),
    equation=(
        r"\begin{aligned} "
        r"\mathbb E_s\bigl[w(Y)\mid X=x\bigr]&=\frac{p_t(x)}{p_s(x)}=1+\eta(x),\qquad "
        r"w(y)=\frac{p_t(y)}{p_s(y)}=1+\rho(y)\\ "
        r"(\alpha I+BA)\,\rho&=B\,\eta,\qquad "
        r"A\approx\mathbb E_s[\,\cdot\mid X],\quad B\approx\mathbb E_s[\,\cdot\mid Y] "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2401.16410",
)

Array = Any  # whatever numpy turns into an array


def nadaraya_watson_operator(points: Array, at: Array, *, bandwidth: Array) -> Float[NDArray, "m n"]:
    """The matrix that turns values at n points into their kernel regression at m places.

    Entry (i, j) is k((at_i - points_j) / bandwidth) / sum_l k((at_i - points_l) / bandwidth) with a Gaussian k, so
    each row sums to 1, even far from all points, where the nearest one takes it all.

    Args:
        points: (n, d).
        at: (m, d).
        bandwidth: a positive number, or (d,) of them, in the units of the features.

    Raises:
        ValueError: arrays that are not finite or do not fit, bandwidths that are not positive.

    >>> nadaraya_watson_operator([[0.0], [1.0]], [[0.5], [900.0]], bandwidth=0.5)
    array([[0.5, 0.5],
           [0. , 1. ]])
    """
    logs = _log_kernel(check_array(points), check_array(at), bandwidth)
    kernel = np.exp(logs - logs.max(axis=1, keepdims=True))
    return kernel / kernel.sum(axis=1, keepdims=True)


class ReTaSAWeights(BaseEstimator):
    """Estimates w(y) = p_t(y) / p_s(y) at labelled source rows from unlabelled target rows.

    Solves (alpha I + B A) rho = B eta for rho = w - 1 at the source rows, where A averages over source rows near in x
    and B over those near in y (`nadaraya_watson_operator`), the estimates of E[. | X] and of its adjoint E[. | Y],
    and eta = p_t(x) / p_s(x) - 1. The weights are 1 + rho, cut at 0 and scaled to mean 1 over the source rows; as
    alpha grows they tend to 1. Densities are kernel estimates with the kernel of A, so that smoothing acts alike on
    both sides of the equation. Memory is three n x n matrices.

    Args:
        alpha: of the ridge term, > 0. None takes n^(-1/2) / 2.
        bandwidth: of all kernels, > 0, in multiples of Scott's n^(-1/(d + 4)) standard deviations; on
            samples of hundreds 2 or 3 serve the weights better than 1.

    Attributes:
        weights_: (n,) at the source rows.

    Raises:
        ValueError: a parameter out of range, arrays that are not finite or do not fit; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> rng = np.random.default_rng(0)
    >>> y, y_target = rng.normal(0, 1, 400), rng.normal(1, 1, 400)
    >>> x, x_target = (values[:, None] + rng.normal(0, 0.3, (400, 1)) for values in (y, y_target))
    >>> retasa = ReTaSAWeights().fit(x, y, x_target)
    >>> retasa.predict([-1.0, 0.5, 2.0]).round(1)  # the truth is exp(y - 1/2): 0.2, 1, 4.5
    array([0.2, 1. , 5.3])
    """

    def __init__(self, *, alpha: float | None = None, bandwidth: float = 2.0) -> None:
        self.alpha, self.bandwidth = alpha, bandwidth

    def fit(self, X: Array, y: Array, X_target: Array, *, ratio: Array = None) -> Self:
        """Estimate the weights of source rows.

        Args:
            X: (n, d) inputs of the source rows.
            y: (n,) their targets.
            X_target: (m, d) inputs from where the target has shifted.
            ratio: (n,) p_t(x) / p_s(x) at the source rows, where something better than kernel densities is at hand,
                such as the odds of a classifier that tells target from source; None estimates it.
        """
        require.number("bandwidth", self.bandwidth, above=0.0)
        X, X_target = check_array(X, dtype=np.float64), check_array(X_target, dtype=np.float64)
        y = check_array(y, dtype=np.float64, ensure_2d=False)
        check_consistent_length(X, y)
        if y.ndim != 1 or X_target.shape[1] != X.shape[1]:
            raise ValueError(f"X_target: expected {X.shape[1]} features and y (n,), got {X_target.shape} and {y.shape}")
        alpha = 0.5 * len(y) ** -0.5 if self.alpha is None else self.alpha
        require.number("alpha", alpha, above=0.0)
        width = self._width(X)
        if ratio is None:
            ratio = np.exp(_log_mean(_log_kernel(X_target, X, width)) - _log_mean(_log_kernel(X, X, width)))
        else:
            ratio = check_array(ratio, dtype=np.float64, ensure_2d=False)
            if ratio.shape != y.shape or ratio.min() < 0:
                raise ValueError(f"ratio: expected {len(y)} numbers >= 0, got shape {ratio.shape}")
        near_x = nadaraya_watson_operator(X, X, bandwidth=width)
        self._y = y[:, None]
        near_y = nadaraya_watson_operator(self._y, self._y, bandwidth=self._width(self._y))
        self._pull = np.linalg.solve(alpha * np.eye(len(y)) + near_x @ near_y, ratio - 1)  # rho is B times this
        raw = (1 + near_y @ self._pull).clip(min=0)
        self._mean = float(raw.mean())
        self.weights_ = raw / self._mean
        return self

    def predict(self, y: Array) -> Float[NDArray, " m"]:
        """Weights at any y (m,): rho(y) averages (eta - A rho) / alpha over the source rows near in y."""
        check_is_fitted(self, "weights_")
        y = check_array(y, dtype=np.float64, ensure_2d=False)
        near_y = nadaraya_watson_operator(self._y, y.reshape(-1, 1), bandwidth=self._width(self._y))
        return (1 + near_y @ self._pull).clip(min=0) / self._mean

    def _width(self, points: NDArray) -> NDArray:
        """Scott's rule for each feature; a constant feature, for which any will do, gets 1."""
        spread = points.std(axis=0)
        return self.bandwidth * np.where(spread > 0, spread, 1.0) * len(points) ** (-1 / (points.shape[1] + 4))


def _log_kernel(points: NDArray, at: NDArray, bandwidth: Array) -> NDArray:
    """Logarithms of Gaussian kernels, up to a constant, (m, n)."""
    from scipy.spatial.distance import cdist

    width = np.asarray(bandwidth, dtype=np.float64)
    if width.shape not in ((), points.shape[1:]) or not (np.isfinite(width) & (width > 0)).all():
        raise ValueError(f"bandwidth: expected a number > 0 or {points.shape[1]} of them, got {bandwidth}")
    if at.shape[1:] != points.shape[1:]:
        raise ValueError(f"at: expected {points.shape[1]} features, got shape {at.shape}")
    return -cdist(at / width, points / width, "sqeuclidean") / 2


def _log_mean(logs: NDArray) -> NDArray:
    """Logarithm of the mean of exponentials along the last axis."""
    top = logs.max(axis=1, keepdims=True)
    return top[:, 0] + np.log(np.exp(logs - top).mean(axis=1))
