"""Conformal risk control: split conformal prediction for any loss that falls as the prediction set grows.

Coverage is one way for a prediction set to be good; others are to miss few of the true labels or pixels, or to
contain an answer close to the right one. Choose the smallest set whose loss on n held-out samples, the next one
counted at its worst, averages at most alpha: then the expected loss on the next sample is at most alpha, for
any model and any distribution, and hardly less. Use it wherever a threshold decides how much to return. The
promise is on average, over calibration sets too, not for each input or group; it needs calibration samples
like those to come, and at least B / alpha - 1 of them for losses up to B.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, from_numpy

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator
from lossary.uncertainty._conformal import as_array, first_safe, losses_at, misshapen, numbers, quantile

PAPER = Paper(
    title="Conformal Risk Control",
    year=2022,
    helps=("uncertainty", "train-test-shift"),
    url="https://arxiv.org/abs/2208.02814",
    departs=(
        "a bound of exactly alpha is safe, as in the paper; the official code asks for less than alpha, and takes"
        " the most cautious lambda where every one is safe",
        "where no lambda is safe and the last one's losses exceed alpha, which the paper rules out: an error",
        "several risks (sec. 4.3) are left to the caller, who takes the largest of their lambdas, and adversarial"
        " ones (sec. 4.4), who passes the worst losses over the perturbations",
        "the correction of u_statistic_risk_control (sec. 4.5) is derived here, from all sets of n + order samples",
    ),
    equation=(
        r"\hat\lambda=\inf\Bigl\{\lambda:\ \frac{1}{n+1}\Bigl(\sum_{i=1}^n L_i(\lambda)+B\Bigr)\le\alpha\Bigr\} "
        r"\quad\Longrightarrow\quad\mathbb E\bigl[L_{n+1}(\hat\lambda)\bigr]\le\alpha"
    ),
)

Array = Any  # an array or a tensor


def conformal_risk_control(losses: Array, lambdas: Array, *, alpha: float, upper_bound: float = 1.0) -> float:
    """The smallest lambda with n / (n + 1) mean_i L_i(lambda) + B / (n + 1) <= alpha, sec. 1.1.

    With it the expected loss of the next sample is at most alpha (theorem 1), and at least
    alpha - 2 B / (n + 1) for losses that are not negative and jump at points of their own (theorem 2). Losses that
    rise again are first raised to falling ones, the largest at any later lambda (sec. 2.4).

    Args:
        losses: (n, G) of n calibration samples at each lambda, falling from left to right.
        lambdas: (G,) increasing. At the last one no loss should exceed alpha: it is returned where no other will do.
        alpha: level of the expected loss, below `upper_bound`.
        upper_bound: B, the largest loss there can be.

    Raises:
        ValueError: wrong shapes, NaN, losses above `upper_bound`, or an alpha that no lambda reaches.

    >>> conformal_risk_control([[1, 0, 0], [1, 1, 0], [1, 0, 0]], [0.0, 0.5, 1.0], alpha=0.5)  # 3/4 1/3 + 1/4
    0.5
    """
    table, grid = losses_at(lambdas, losses, upper_bound)
    return float(_smallest(table, grid, np.ones(len(table)), np.ones(1), alpha, upper_bound)[0])


def weighted_conformal_risk_control(
    losses: Array, lambdas: Array, weights: Array, test_weights: Array, *, alpha: float, upper_bound: float = 1.0
) -> Array:
    """A lambda for each test sample when inputs are no longer distributed as in calibration, sec. 4.1.

    The smallest with sum_i w_i L_i(lambda) + w B <= alpha (sum_i w_i + w), where w(x) is the density of inputs to
    come over that of calibration inputs, up to a factor. Equal weights give `conformal_risk_control`.

    Args:
        losses: (n, G) of n calibration samples at each lambda, falling from left to right.
        lambdas: (G,) increasing.
        weights: (n,) w of the calibration samples, not negative.
        test_weights: (M,) w of the test samples, not negative.
        alpha: level of the expected loss, below `upper_bound`.
        upper_bound: B, the largest loss there can be.

    Returns:
        (M,) lambdas in float64: a tensor if `test_weights` is one, otherwise an array.

    Raises:
        ValueError: wrong shapes, NaN, losses above `upper_bound`, negative weights, or an alpha that no lambda
            reaches for some test sample.

    >>> losses, lambdas = [[1, 0, 0], [1, 1, 0]], [0.0, 0.5, 1.0]
    >>> weighted_conformal_risk_control(losses, lambdas, [9.0, 1.0], [0.1, 5.0], alpha=0.2)
    array([0.5, 1. ])
    """
    table, grid = losses_at(lambdas, losses, upper_bound)
    w, test = _weights("weights", weights), _weights("test_weights", test_weights)
    if len(w) != len(table):
        raise ValueError(f"weights: expected one for each of {len(table)} calibration samples, got {len(w)}")
    found = _smallest(table, grid, w, test, alpha, upper_bound)
    return from_numpy(found).to(test_weights.device) if isinstance(test_weights, Tensor) else found


def quantile_risk_control(losses: Array, lambdas: Array, *, alpha: float, beta: float) -> float:
    """The smallest lambda at which the next loss is at most alpha with probability at least beta, sec. 4.2.

    It controls the miscoverage "the loss exceeds alpha" at level 1 - beta, which is the conformal quantile of the
    first lambda that is safe for each calibration sample. The losses need no upper bound.

    Args:
        losses: (n, G) of n calibration samples at each lambda, falling from left to right.
        lambdas: (G,) increasing. At the last one no loss should exceed alpha.
        alpha: the largest loss to be suffered with probability beta.
        beta: probability, between 0 and 1.

    Raises:
        ValueError: wrong shapes, NaN, beta out of range, or an alpha that no lambda reaches.

    >>> losses = [[5.0, 2.0, 0.0], [9.0, 0.0, 0.0], [9.0, 8.0, 1.0]]
    >>> quantile_risk_control(losses, [0.0, 0.5, 1.0], alpha=2.0, beta=0.5)  # safe from 0.5, 0.5 and 1 on
    0.5
    """
    table, grid = losses_at(lambdas, losses, None)
    require.number("alpha", alpha)
    require.number("beta", beta, above=0.0, below=1.0)
    first = quantile((table > alpha).sum(1), 1 - beta)
    return float(_at(np.array([min(first, len(grid))], dtype=np.intp), grid, table, alpha)[0])


def u_statistic_risk_control(
    losses: Array, lambdas: Array, *, samples: int, order: int = 2, alpha: float, upper_bound: float = 1.0
) -> float:
    """The smallest lambda whose expected loss on a set of new samples, such as a pair, is at most alpha, sec. 4.5.

    Of the sets of `order` among n + order samples, the calibration samples make C(n, order) and the others count at
    their worst: (sum_S L_S(lambda) + (C(n + order, order) - C(n, order)) B) / C(n + order, order) <= alpha. With
    order 1 that is `conformal_risk_control`; pairs take about twice as many samples for the same level. For losses of
    rankings, distances or differences, which are of two samples at a time.

    Args:
        losses: (C(n, order), G) of every set of calibration samples at each lambda, falling from left to right.
        lambdas: (G,) increasing.
        samples: n.
        order: samples in a set, at least 1.
        alpha: level of the expected loss, below `upper_bound`.
        upper_bound: B, the largest loss there can be.

    Raises:
        ValueError: wrong shapes, NaN, losses of another number of sets, losses above `upper_bound`, or an alpha that no
            lambda reaches.

    >>> u_statistic_risk_control([[1, 0, 0]] * 2 + [[1, 1, 0]], [0.0, 0.5, 1.0], samples=3, alpha=0.8)  # (1 + 7) / 10
    0.5
    """
    require.whole("order", order, at_least=1)
    require.whole("samples", samples, at_least=order)
    table, grid = losses_at(lambdas, losses, upper_bound)
    known, every = math.comb(samples, order), math.comb(samples + order, order)
    if len(table) != known:
        raise ValueError(f"losses: expected {known} rows, the sets of {order} of {samples} samples, got {len(table)}")
    unknown = np.array([every - known], dtype=np.float64)
    return float(_smallest(table, grid, np.ones(known), unknown, alpha, upper_bound)[0])


def false_negative_rate(sets: Bool[Array, "rows *entries"], target: Bool[Array, "rows *entries"]) -> Array:
    """Share of the true entries that a set misses, (rows,), 0 to 1; 0 where nothing is true.

    Args:
        sets: what is predicted, an array or tensor of labels, pixels or the like.
        target: what is true, of the same shape.

    Raises:
        ValueError: other than two boolean ones of one shape.

    >>> false_negative_rate(np.array([[True, False, False]]), np.array([[True, True, False]]))
    array([0.5])
    """
    _booleans("sets", sets, sets.shape)
    _booleans("target", target, sets.shape)
    missed, true = (m.reshape(len(m), -1).sum(-1) for m in (target & ~sets, target))
    return missed / true.clip(min=1)


def best_of_set_loss(sets: Bool[Array, "rows entries"], quality: Float[Array, "rows entries"]) -> Array:
    """One minus the quality of the best entry in each set, (rows,); 1 for an empty set.

    With the token F1 of each candidate answer as quality it is the paper's loss for question answering, with
    1 - d / D for a label at distance d from the true one, of D at most, that for label hierarchies.

    Args:
        sets: which entries each set has, an array or tensor.
        quality: of each entry, 0 to 1, of the same shape.

    Raises:
        ValueError: sets that are not boolean, or of another shape.

    >>> best_of_set_loss(np.array([[True, True, False]]), np.array([[0.2, 0.7, 1.0]]))
    array([0.3])
    """
    _booleans("sets", sets, quality.shape)
    found = sets * quality
    return 1 - (found.amax(-1) if isinstance(found, Tensor) else found.max(-1))


@estimator(on="sets", examples=({}, {"alpha": 0.3, "upper_bound": 2.0}, {"grid": 11}))
class ConformalRiskControl(BaseEstimator):
    """Sets {entry: score >= 1 - lambda} whose expected loss is at most alpha, for a model's scores from 0 to 1.

    Fit it on scores that the model gave to samples it was not trained on, with what is true of them; `predict`
    then cuts new scores at 1 - `lambda_`. Entries are labels, pixels, candidate answers. Takes arrays or tensors.

    Args:
        alpha: level of the expected loss, below `upper_bound`.
        loss: loss(sets, target) gives one value a sample, (N,), that falls as sets grow; by default the
            false-negative rate. See also `best_of_set_loss`.
        upper_bound: B, the largest loss there can be.
        grid: number of lambdas tried, evenly from 0 to 1, at least 2; lambda is at most a step too cautious.

    Attributes:
        lambda_: the smallest lambda that is safe.

    Raises:
        ValueError: wrong shapes, NaN, scores outside 0 to 1, losses above `upper_bound`, or an alpha that no lambda
            reaches; asked before `fit` (scikit-learn's NotFittedError).

    >>> scores = np.array([[0.9, 0.2], [0.8, 0.6], [0.7, 0.4]])
    >>> control = ConformalRiskControl(alpha=0.5, grid=5).fit(scores, scores > 0.5)
    >>> control.lambda_, control.predict(np.array([[0.9, 0.45]]))
    (0.5, array([[ True, False]]))
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        loss: Callable[[Array, Array], Array] = false_negative_rate,
        upper_bound: float = 1.0,
        grid: int = 1001,
    ) -> None:
        self.alpha, self.loss, self.upper_bound, self.grid = alpha, loss, upper_bound, grid

    def fit(self, scores: Float[Array, "rows *entries"], target: Array) -> Self:
        """Choose `lambda_` on calibration samples: scores (N, ...) and targets as `loss` takes them."""
        require.whole("grid", self.grid, at_least=2)
        scores, target = _checked(scores), target if isinstance(target, Tensor) else np.asarray(target)
        if len(target) != len(scores):
            raise ValueError(f"target: expected one for each of {len(scores)} samples, got {len(target)}")
        lambdas = np.linspace(0.0, 1.0, self.grid)
        losses = [numbers("loss", self.loss(scores >= 1 - x, target), dims=1) for x in lambdas.tolist()]
        return self.fit_losses(np.stack(losses, axis=1), lambdas)

    def fit_losses(self, losses: Float[Array, "rows lambdas"], lambdas: Float[Array, " lambdas"]) -> Self:
        """Choose `lambda_` where losses are at hand, as `conformal_risk_control` does."""
        self.lambda_ = conformal_risk_control(losses, lambdas, alpha=self.alpha, upper_bound=self.upper_bound)
        return self

    def predict(self, scores: Float[Array, "rows *entries"]) -> Bool[Array, "rows *entries"]:
        """The sets, of the shape of the scores."""
        check_is_fitted(self)
        return _checked(scores) >= 1 - self.lambda_


def _smallest(table: NDArray, grid: NDArray, w: NDArray, test: NDArray, alpha: float, upper_bound: float) -> NDArray:
    require.number("alpha", alpha, below=upper_bound)
    safe = first_safe(table, alpha=alpha, upper_bound=upper_bound, weights=w, test_weights=test)
    return _at(safe, grid, table, alpha)


def _at(columns: NDArray[np.intp], grid: NDArray, table: NDArray, alpha: float) -> NDArray:
    """The lambdas in these columns, the last one where there is none, if it is as harmless as it has to be."""
    if (columns == len(grid)).any() and table[:, -1].max() > alpha:
        raise ValueError(
            f"alpha: {alpha:g} is out of reach with {len(table)} samples, of which some lose"
            f" {table[:, -1].max():g} even at the last lambda; take more samples or a larger alpha"
        )
    return grid[columns.clip(max=len(grid) - 1)]


def _weights(name: str, weights: Array) -> NDArray:
    found = numbers(name, weights, dims=1)
    if found.min() < 0:
        raise ValueError(f"{name}: expected numbers >= 0, got {found.min():g}")
    return found


def _checked(scores: Array) -> Array:
    scores = scores if isinstance(scores, Tensor) else as_array("scores", scores)
    if scores.ndim < 2 or 0 in scores.shape:
        raise ValueError(f"scores: expected shape (samples, entries, ...), got {misshapen(tuple(scores.shape))}")
    if not bool(((scores >= 0) & (scores <= 1)).all()):  # NaN is neither
        raise ValueError(
            "scores: expected numbers from 0 to 1, not NaN or infinite; logits go through a sigmoid or softmax first"
        )
    return scores


def _booleans(name: str, values: Array, shape: tuple[int, ...]) -> None:
    if not str(values.dtype).endswith("bool") or values.shape != shape:
        raise ValueError(
            f"{name}: expected booleans of shape {tuple(shape)}, got {values.dtype} of shape {tuple(values.shape)}"
        )
