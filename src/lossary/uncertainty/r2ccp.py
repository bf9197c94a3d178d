"""R2CCP: conformal regression by classification, whose sets may have gaps where the target has several modes.

Cut the target's range into a grid, let a network give each grid point a probability, and train it with a loss that
charges a point by its distance from the target and pays for entropy, so that neighbours share and nothing collapses.
Between grid points the probability is interpolated; the set for a new row is where it exceeds a threshold chosen on
held-out rows, a union of intervals that covers as often as asked, for any network and any distribution. Take it when
the spread changes with the input, is skewed or has two peaks. Where one peak and even spread can be taken for
granted, residuals or two quantiles do as well with less.
"""

from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator
from lossary.uncertainty._conformal import lower_quantile
from lossary.uncertainty._network import generator, perceptron, standard, train

PAPER = Paper(
    title="Conformal Prediction via Regression-as-Classification",
    year=2024,
    helps=("uncertainty",),
    url="https://arxiv.org/abs/2404.08168",
    departs=(
        "the threshold is the order statistic that guarantees coverage; the official code interpolates between two"
        " and covers a little less",
        "the grid runs from the smallest to the largest training target, ends included, as in the official code",
        "where the threshold is 0, since too many calibration targets lie outside that range or the rows are too"
        " few, the set is the whole line; the official code returns the range",
        "Adam at a cosine rate for a number of steps, two hidden layers; the official code trains for 1000 epochs",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\sum_k q_k\,\lvert y-m_k\rvert^p-\tau\,\mathrm H(q),\qquad "
        r"q=\operatorname{softmax}(f(x))\text{ on the grid }m\\ "
        r"C(x)&=\{y:\ \tilde q(y\mid x)\ge\hat t\,\},\qquad "
        r"\hat t=\lfloor(n+1)\alpha\rfloor\text{-th smallest of }\tilde q(y_i\mid x_i) "
        r"\end{aligned}"
    ),
)


def r2ccp_loss(
    input: Float[Tensor, "*batch points"],
    target: Float[Tensor, "*batch"],
    *,
    midpoints: Float[Tensor, " points"],
    p: float = 0.5,
    tau: float = 0.2,
) -> Float[Tensor, "*batch"]:
    """sum_k |y - m_k|^p q_k - tau H(q), q the softmax of the input. Per sample, natural logarithm.

    If x tells no more, the mean loss is least at q_k proportional to exp(-E|y - m_k|^p / tau): peaks where targets
    are near, all of them for p < 1; with p = 2 there is one peak, at the mean.

    Args:
        input: logits of the grid points.
        target: numbers, standardised: tau is in their unit to the power p.
        midpoints: m, the grid.
        p: power of the distance, above 0; 0.5 in the paper.
        tau: pay for entropy, at least 0; 0.2 in the paper.

    Raises:
        ValueError: shapes or dtypes that do not fit, a hyper-parameter out of range.

    >>> import torch
    >>> r2ccp_loss(torch.zeros(1, 2), torch.tensor([0.0]), midpoints=torch.tensor([0.0, 4.0]), tau=0.0)  # (0 + 2) / 2
    tensor([1.])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("target", target, tuple(input.shape[:-1]))
    _require_grid(midpoints, input)
    require.number("p", p, above=0.0)
    require.number("tau", tau, at_least=0.0)
    log_q = input.log_softmax(-1)
    distance = (target.unsqueeze(-1) - midpoints).abs() ** p
    return (log_q.exp() * (distance + tau * log_q)).sum(-1)


def interpolated_density_score(
    probs: Float[Tensor, "*batch points"], target: Float[Tensor, "*batch"], *, midpoints: Float[Tensor, " points"]
) -> Float[Tensor, "*batch"]:
    """The probability at the target, interpolated between the grid points beside it; 0 outside the grid.

    Args:
        probs: of the grid points, at least 0.
        target: numbers.
        midpoints: the grid, increasing.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> probs, grid = torch.tensor([[0.2, 0.6, 0.2]] * 2), torch.tensor([0.0, 1.0, 2.0])
    >>> interpolated_density_score(probs, torch.tensor([0.5, 2.5]), midpoints=grid)
    tensor([0.4000, 0.0000])
    """
    require.floating("probs", probs, at_least_dims=1)
    require.same_shape("target", target, tuple(probs.shape[:-1]))
    _require_grid(midpoints, probs)
    right = torch.searchsorted(midpoints, target.contiguous()).clamp(1, len(midpoints) - 1)
    start, end = midpoints[right - 1], midpoints[right]
    share = (target - start) / (end - start)
    low, high = (probs.gather(-1, k.unsqueeze(-1)).squeeze(-1) for k in (right - 1, right))
    inside = (target >= midpoints[0]) & (target <= midpoints[-1])
    return torch.where(inside, low + share * (high - low), 0)


def density_level_set(
    probs: Float[Tensor, "*batch points"], threshold: float, *, midpoints: Float[Tensor, " points"]
) -> Float[Tensor, "*batch intervals 2"]:
    """Where the interpolated probability is at least the threshold: intervals from left to right, then NaN.

    As many as the row with the most intervals has. The whole line if the threshold is not above 0, since the
    probability is 0 outside the grid.

    Args:
        probs: of the grid points, at least 0.
        threshold: on the scale of `interpolated_density_score`.
        midpoints: the grid, increasing.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> probs, grid = torch.tensor([[0.4, 0.0, 0.6], [0.0, 1.0, 0.0]]), torch.tensor([0.0, 1.0, 2.0])
    >>> density_level_set(probs, 0.3, midpoints=grid)
    tensor([[[0.0000, 0.2500],
             [1.5000, 2.0000]],
    <BLANKLINE>
            [[0.3000, 1.7000],
             [   nan,    nan]]])
    """
    require.floating("probs", probs, at_least_dims=1)
    _require_grid(midpoints, probs)
    if threshold <= 0:
        return probs.new_tensor([[-torch.inf, torch.inf]]).expand(*probs.shape[:-1], 1, 2)
    above = probs >= threshold
    left, right, never = probs[..., :-1], probs[..., 1:], probs.new_tensor(torch.nan)
    crossing = midpoints[:-1] + midpoints.diff() * (threshold - left) / (right - left)
    crossed = above[..., :-1] != above[..., 1:]
    ends = []
    for inside, edge in ((above[..., 1:], 0), (above[..., :-1], -1)):  # entering, then leaving, from left to right
        at_edge = torch.where(above[..., edge], midpoints[edge], never).unsqueeze(-1)
        ends.append(torch.cat([at_edge, torch.where(crossed & inside, crossing, never)], -1).sort(-1).values)
    found = torch.stack(ends, -1)  # NaN is sorted behind the numbers
    return found[..., : int((~found[..., 0].isnan()).sum(-1).max().clamp_min(1)), :]


@estimator(on="real", examples=({"steps": 40, "hidden": 32, "bins": 20, "lr": 0.02, "alpha": 0.3},))
class R2CCPRegressor(RegressorMixin, BaseEstimator):
    """A regressor whose sets cover the target of a new row with probability at least 1 - alpha.

    `fit` trains a network on a part of the rows and calibrates on the rest; `calibrate` does the latter anew, on
    other rows or for another level. `predict` gives the likeliest grid point.

    Args:
        alpha: share of targets that may be missed, between 0 and 1.
        bins: K, points of the grid, at least 2.
        p: power of the distance in the loss, above 0.
        tau: pay for entropy in the loss, at least 0, for targets of standard deviation 1.
        calibration: share of the rows kept for calibration, between 0 and 1. Sets are the whole line unless these
            are at least 1 / alpha - 1 rows.
        hidden: width of the two hidden layers.
        steps: of training.
        batch: rows in a step.
        lr: learning rate at the start.
        random_state: of the split, the weights and the batches: a whole number or a `RandomState`.

    Attributes:
        network_: standardised rows to logits.
        midpoints_: the grid, standardised.
        threshold_: of the score.

    Raises:
        ValueError: wrong shapes, NaN, fewer than 4 rows, a hyper-parameter out of range; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> import numpy as np
    >>> X = np.linspace(0, 1, 200)[:, None]
    >>> y = np.where(np.arange(200) % 2, 5.0, -5.0) * (X[:, 0] > 0.5)  # one value, then two
    >>> model = R2CCPRegressor(steps=300, hidden=32).fit(X, y)
    >>> np.isfinite(model.predict_sets([[0.1], [0.9]])[:, :, 0]).sum(1)
    array([1, 2])
    """

    def __init__(
        self,
        *,
        alpha: float = 0.1,
        bins: int = 50,
        p: float = 0.5,
        tau: float = 0.2,
        calibration: float = 0.2,
        hidden: int = 128,
        steps: int = 1000,
        batch: int = 64,
        lr: float = 0.003,
        random_state: Any = 0,
    ) -> None:
        self.alpha, self.bins, self.p, self.tau, self.calibration = alpha, bins, p, tau, calibration
        self.hidden, self.steps, self.batch, self.lr, self.random_state = hidden, steps, batch, lr, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on a part of the rows X (N, D) and their targets y (N,), calibrate on the others."""
        require.number("calibration", self.calibration, above=0.0, below=1.0)
        require.number("lr", self.lr, above=0.0)
        for name, value, least in (("bins", self.bins, 2), ("hidden", self.hidden, 1), ("batch", self.batch, 1)):
            require.whole(name, value, at_least=least)
        require.whole("steps", self.steps)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=4)
        g = generator(self.random_state)
        order = torch.randperm(len(X), generator=g).numpy()
        kept = min(max(round(self.calibration * len(X)), 1), len(X) - 2)
        held_out, rows = order[:kept], order[kept:]
        self._centre, self._scale = standard(np.column_stack([X, y])[rows])
        x, target = self._standardised(X[rows]), torch.from_numpy((y[rows] - self._centre[-1]) / self._scale[-1])
        low, high = target.min().item(), target.max().item()
        if low == high:  # one value only, at 0
            low, high = -0.5, 0.5
        self.midpoints_ = torch.linspace(low, high, self.bins, dtype=torch.float64)
        self.network_ = perceptron((x.shape[1], self.hidden, self.hidden, self.bins), g)

        def objective(index: Tensor) -> Tensor:
            logits = self.network_(x[index])
            return r2ccp_loss(logits, target[index], midpoints=self.midpoints_, p=self.p, tau=self.tau).mean()

        train(self.network_.parameters(), objective, len(rows), steps=self.steps, batch=self.batch, lr=self.lr, g=g)
        return self.calibrate(X[held_out], y[held_out])

    def calibrate(self, X: Any, y: Any) -> Self:
        """Choose the threshold on rows that the network was not trained on."""
        require.number("alpha", self.alpha, above=0.0, below=1.0)
        self.threshold_ = lower_quantile(self._scores(X, y), self.alpha)
        return self

    def predict(self, X: Any) -> Float[NDArray, " rows"]:
        """The likeliest grid point."""
        probs = self._probs(X)
        return self.midpoints_[probs.argmax(-1)].numpy() * self._scale[-1] + self._centre[-1]

    def predict_sets(self, X: Any) -> Float[NDArray, "rows intervals 2"]:
        """Intervals from left to right, the rest NaN; a set may be empty, or the whole line."""
        probs = self._probs(X)
        sets = density_level_set(probs, self.threshold_, midpoints=self.midpoints_)
        return sets.numpy() * self._scale[-1] + self._centre[-1]

    def predict_interval(self, X: Any) -> Float[NDArray, "rows 2"]:
        """The smallest interval that holds the set; NaN where that is empty."""
        sets = self.predict_sets(X)
        return np.stack([np.fmin.reduce(sets[..., 0], axis=1), np.fmax.reduce(sets[..., 1], axis=1)], axis=1)

    def contains(self, X: Any, y: Any) -> Bool[NDArray, " rows"]:
        """Whether each target is in its row's set."""
        return self._scores(X, y) >= self.threshold_

    def _scores(self, X: Any, y: Any) -> Float[NDArray, " rows"]:
        check_is_fitted(self, "network_")
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        target = torch.from_numpy((y - self._centre[-1]) / self._scale[-1])
        return interpolated_density_score(self._probs(X), target, midpoints=self.midpoints_).numpy()

    @torch.no_grad()
    def _probs(self, X: Any) -> Float[Tensor, "rows points"]:
        check_is_fitted(self, "network_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.network_(self._standardised(X)).softmax(-1)

    def _standardised(self, X: NDArray) -> Tensor:
        return torch.from_numpy((X - self._centre[:-1]) / self._scale[:-1])


def _require_grid(midpoints: Any, like: Tensor) -> None:
    require.same_shape("midpoints", midpoints, tuple(like.shape[-1:]))
    if len(midpoints) < 2:
        raise ValueError(f"midpoints: expected at least two, got {len(midpoints)}")
