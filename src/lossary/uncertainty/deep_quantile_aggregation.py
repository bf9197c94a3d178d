"""Deep quantile aggregation: mix the quantiles of several models by weights that depend on level and input.

Several quantile models, each best somewhere, are combined by convex weights: one for each model, one for each model
and level, or, for every level to be given, one for each model and each of its levels; the same everywhere or by a
network of the input. They minimise pinball loss on predictions for rows that the models were not fitted on. Quantiles
that cross are then sorted or pooled, which never raises the weighted interval score, and pairs of them are shifted
until they cover. Take it when no single model wins throughout. With one good model, or few rows, the plain average
of two or three is hard to beat; mending and shifting help there too.
"""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, RegressorMixin, clone
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator
from lossary.uncertainty._conformal import numbers, rank
from lossary.uncertainty._network import generator, perceptron, standard, train
from lossary.uncertainty._quantile import checked_levels, conformal_shift, isotonic, pairs, pinball

PAPER = Paper(
    title="Flexible Model Aggregation for Quantile Regression",
    year=2023,
    helps=("uncertainty", "heavy-tails"),
    url="https://arxiv.org/abs/2103.00083",
    departs=(
        "mending crossed quantiles comes after training, as in the official code's defaults, not within it; it can"
        " be differentiated",
        "one margin for all pairs of levels; the paper also tries margins by level, fitted to the data",
        "Adam for a number of steps at a cosine rate, no dropout; the official code searches widths, rates and"
        " margins and stops early",
        "the regressor shifts by held-out rows; the variant by cross-validation (CV+) is in conformalize_quantiles",
    ),
    equation=(
        r"\begin{aligned} "
        r"\hat q_\tau(x)&=\sum_{j,\nu}w^{\tau}_{j\nu}(x)\,q_{j\nu}(x),\qquad "
        r"w^\tau_{j\nu}\ge0,\quad\textstyle\sum_{j,\nu}w^{\tau}_{j\nu}=1\\ "
        r"\min_w\ &\operatorname*{mean}_{i,\tau}\,\rho_\tau\bigl(y_i-\hat q_\tau(x_i)\bigr) "
        r"+\text{penalty for crossing},\qquad\rho_\tau(u)=\max\bigl(\tau u,(\tau-1)u\bigr) "
        r"\end{aligned}"
    ),
)

Array = Any  # an array or a tensor


def weighted_interval_score(
    quantiles: Float[Array, "*batch levels"], target: Float[Array, "*batch"], *, levels: Sequence[float]
) -> Float[Array, "*batch"]:
    """Twice the sum of the quantiles' pinball losses; lower is better. Arrays or tensors.

    Where every level has its mirror image it is the sum over the pairs, at alpha / 2 and 1 - alpha / 2, of alpha
    times their interval score, plus the median's distance. Others divide it by the number of levels.

    Args:
        quantiles: one for each level.
        target: numbers.
        levels: increasing, between 0 and 1.

    Raises:
        ValueError: levels out of order or range, shapes that do not fit.

    >>> weighted_interval_score(np.array([1.0, 2.0, 4.0]), np.array(5.0), levels=(0.25, 0.5, 0.75))
    np.float64(6.5)
    """
    taus = _levels(levels, quantiles)
    if quantiles.shape != (*target.shape, len(levels)):
        wanted = (*target.shape, len(levels))
        raise ValueError(f"quantiles: expected shape {tuple(wanted)}, got {tuple(quantiles.shape)}")
    return 2 * pinball(quantiles, target, taus).sum(-1)


def isotonic_quantiles(quantiles: Float[Array, "*batch levels"]) -> Float[Array, "*batch levels"]:
    """The nearest quantiles, in squares, that do not cross: neighbours that do are replaced by their mean.

    Like sorting, which is `numpy.sort`, it never raises the weighted interval score. Arrays or tensors; a tensor's
    gradient is spread evenly over those that share a mean.

    Args:
        quantiles: at increasing levels.

    Raises:
        ValueError: no dimension, or not floating-point.

    >>> isotonic_quantiles(np.array([[1.0, 3.0, 2.0, 5.0], [4.0, 3.0, 2.0, 7.0]]))
    array([[1. , 2.5, 2.5, 5. ],
           [3. , 3. , 3. , 7. ]])
    """
    values = quantiles if isinstance(quantiles, Tensor) else torch.from_numpy(np.array(quantiles))
    require.floating("quantiles", values, at_least_dims=1)
    pooled = isotonic(values)
    return pooled if isinstance(quantiles, Tensor) else pooled.numpy()


def conformalize_quantiles(
    quantiles: Float[Array, "rows levels"],
    target: Float[Array, " rows"],
    new: Float[Array, "*folds new levels"],
    *,
    levels: Sequence[float],
    fold: Int[Array, " rows"] | None = None,
) -> Float[Array, "new levels"]:
    """New quantiles, each pair shifted so that it covers a target with probability 1 - alpha.

    The pair at alpha / 2 and 1 - alpha / 2 is widened on either side by the conformal quantile of
    max(lower - y, y - upper) over rows on which the model was not fitted (CQR); a negative shift narrows it, and
    may turn it around: then nothing is covered. The median stays. Pairs of different levels are shifted by themselves
    and may cross.

    With `fold`, all rows are used (CV+): each row's quantiles come from a model fitted without its fold, and so do
    as many predictions for the new rows. Coverage is then at least 1 - 2 alpha, and mostly 1 - alpha.

    Args:
        quantiles: of n held-out rows.
        target: their targets.
        new: quantiles of the new rows; with `fold` those by each fold's model, (K, M, m).
        levels: increasing, between 0 and 1, with 1 - level beside every level.
        fold: number of each row's fold, 0 to K - 1. None: one model, fitted on other rows.

    Returns:
        (M, m) in float64, infinite where n is too small for a level: a tensor if `new` is one, otherwise an array.

    Raises:
        ValueError: wrong shapes, NaN, levels out of order or without their mirror image.

    >>> held_out = np.array([[-1.0, 0.0, 1.0]] * 4)
    >>> conformalize_quantiles(held_out, np.array([0.0, 0.5, 3.0, -1.5]), held_out[:1], levels=(0.25, 0.5, 0.75))
    array([[-1.5,  0. ,  1.5]])
    """
    rows, y = numbers("quantiles", quantiles, dims=2), numbers("target", target, dims=1)
    answer = numbers("new", new, dims=2 if fold is None else 3).copy()
    both = pairs(levels)
    if rows.shape != (len(y), len(levels)) or answer.shape[-1] != len(levels):
        raise ValueError(
            f"quantiles: expected shape {(len(y), len(levels))} and new ones with as many levels,"
            f" got {rows.shape} and {answer.shape}"
        )
    if fold is None:
        for low, high in both:
            shift = conformal_shift(rows[:, low], rows[:, high], y, 2 * float(levels[low]))
            answer[:, low] -= shift
            answer[:, high] += shift
    else:
        answer = _cross_validated(rows, y, answer, both, levels, _folds(fold, len(y), len(answer)))
    return torch.from_numpy(answer).to(new.device) if isinstance(new, Tensor) else answer


@estimator(
    on="real",
    examples=({"models": ("linear",), "levels": (0.3, 0.7), "folds": 2, "steps": 20, "lr": 0.03},),
)
class DeepQuantileAggregator(RegressorMixin, BaseEstimator):
    """A regressor that predicts quantiles, mixed from those of several models; `predict` gives the median.

    Args:
        models: "linear" (linear quantile regression), "boosting" (gradient boosting on histograms), or regressors
            of scikit-learn's kind whose parameter `quantile`, or else `alpha`, is the level.
        levels: increasing, with 1 - level beside every level.
        resolution: what the weights distinguish: "coarse" models, "medium" models and levels, "fine" models and
            levels for each level to be given.
        local: whether they depend on the input.
        monotone: how quantiles that cross are mended: "sort", "isotonic" or "none".
        calibration: share of the rows kept for the shift of each pair, at least 0; with 0 there is none. A pair is
            infinite unless these are at least 1 / alpha - 1 rows; it may cross another afterwards.
        folds: of the predictions that the weights are fitted on, at least 2.
        crossing: weight of the penalty for crossing, the mean over pairs of levels of max(0, q - q' + margin).
        margin: of that penalty, in standard deviations of the target, at least 0.
        hidden: width of the local weights' two hidden layers.
        steps: of training the weights.
        batch: rows in a step.
        lr: learning rate at the start.
        random_state: of folds, initial weights and batches: a whole number or a `RandomState`.

    Attributes:
        models_: for each model its regressors, one for each level.
        weights_: the module that maps standardised rows to logits of weights.
        shifts_: (m,), added to the quantiles.

    Raises:
        ValueError: wrong shapes, NaN, fewer than 6 rows, a hyper-parameter out of range; asked before `fit`
            (scikit-learn's NotFittedError).

    >>> X = np.linspace(0, 1, 300)[:, None]
    >>> y = (1 + X[:, 0]) * np.sin(np.arange(300) ** 2)  # spreads
    >>> model = DeepQuantileAggregator(models=("linear",), levels=(0.1, 0.5, 0.9), steps=100).fit(X, y)
    >>> low, median, high = model.predict_quantiles([[0.0], [1.0]]).T
    >>> bool(high[1] - low[1] > high[0] - low[0] > 1)
    True
    """

    def __init__(
        self,
        *,
        models: Sequence[Any] = ("linear", "boosting"),
        levels: Sequence[float] = (0.05, 0.25, 0.5, 0.75, 0.95),
        resolution: str = "fine",
        local: bool = True,
        monotone: str = "sort",
        calibration: float = 0.2,
        folds: int = 5,
        crossing: float = 1.0,
        margin: float = 0.001,
        hidden: int = 64,
        steps: int = 500,
        batch: int = 64,
        lr: float = 0.003,
        random_state: Any = 0,
    ) -> None:
        self.models, self.levels, self.resolution, self.local = models, levels, resolution, local
        self.monotone, self.calibration, self.folds = monotone, calibration, folds
        self.crossing, self.margin, self.hidden, self.steps = crossing, margin, hidden, steps
        self.batch, self.lr, self.random_state = batch, lr, random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Fit the models, the weights and the shifts on rows X (N, D) and their targets y (N,)."""
        require.number("calibration", self.calibration, at_least=0.0, below=1.0)
        require.whole("folds", self.folds, at_least=2)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=6)
        g = generator(self.random_state)
        order = torch.randperm(len(X), generator=g).numpy()
        kept = min(int(np.ceil(self.calibration * len(X))), len(X) - 4)
        held_out, rows = order[:kept], order[kept:]
        x, target = X[rows], y[rows]
        fold = np.arange(len(rows)) % min(self.folds, len(rows))  # the order is random already
        predictions = np.empty((len(rows), len(self.models), len(checked_levels(self.levels))))
        for k in range(fold.max() + 1):
            fitted = [self._fitted(model, x[fold != k], target[fold != k]) for model in self.models]
            predictions[fold == k] = _asked(fitted, x[fold == k])
        self.fit_weights(x, predictions, target)
        self.models_ = [self._fitted(model, x, target) for model in self.models]
        return self.calibrate(X[held_out], y[held_out]) if kept else self

    def fit_weights(self, X: Any, predictions: Any, y: Any) -> Self:
        """Fit the weights alone, where models' quantiles (N, models, levels) for rows not fitted on are at hand."""
        for name, value in (("crossing", self.crossing), ("margin", self.margin)):
            require.number(name, value, at_least=0.0)
        require.number("lr", self.lr, above=0.0)
        require.one_of("resolution", self.resolution, ("coarse", "medium", "fine"))
        require.one_of("monotone", self.monotone, ("sort", "isotonic", "none"))
        for name, size in (("hidden", self.hidden), ("batch", self.batch)):
            require.whole(name, size, at_least=1)
        require.whole("steps", self.steps)
        pairs(self.levels)
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True)
        base = self._predictions(predictions, X)
        g, scale = generator(self.random_state), y.std() or 1.0
        self._centre, self._spread = standard(X)
        self.shifts_ = np.zeros(len(self.levels))
        inputs, outputs = _sizes(self.resolution, *base.shape[1:])
        self.weights_ = _Weights(X.shape[1] if self.local else 0, self.hidden, inputs, outputs, g)
        x, z, target = self._standardised(X), base / scale, torch.from_numpy(y / scale)
        taus = _levels(self.levels, z)

        def objective(index: Tensor) -> Tensor:
            q = _mixed(z[index], self.weights_(x[index]))
            loss = pinball(q, target[index], taus).mean()
            return loss + self.crossing * _crossing(q, self.margin) if q.shape[-1] > 1 else loss

        train(self.weights_.parameters(), objective, len(x), steps=self.steps, batch=self.batch, lr=self.lr, g=g)
        return self

    def calibrate(self, X: Any, y: Any) -> Self:
        """Choose the shifts on rows that neither the models nor the weights were fitted on."""
        check_is_fitted(self, "models_")
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, reset=False)
        raw = self.aggregate(X, _asked(self.models_, X))
        none = np.zeros((1, len(self.levels)))
        self.shifts_ = conformalize_quantiles(raw, y, none, levels=self.levels)[0]
        return self

    def predict(self, X: Any) -> Float[NDArray, " rows"]:
        """The median, or the mean of the two quantiles about it."""
        middle = (len(self.levels) - 1) / 2
        return self.predict_quantiles(X)[:, [int(np.floor(middle)), int(np.ceil(middle))]].mean(1)

    def predict_quantiles(self, X: Any) -> Float[NDArray, "rows levels"]:
        """Quantiles at the levels, mended and shifted."""
        check_is_fitted(self, "models_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        return self.aggregate(X, _asked(self.models_, X)) + self.shifts_

    @torch.no_grad()
    def aggregate(self, X: Any, predictions: Any) -> Float[NDArray, "rows levels"]:
        """Models' quantiles (N, models, levels) mixed and mended, not shifted."""
        check_is_fitted(self, "weights_")
        X = validate_data(self, X, dtype=np.float64, reset=False)
        q = _mixed(self._predictions(predictions, X), self.weights_(self._standardised(X)))
        if self.monotone == "none":
            return q.numpy()
        return (isotonic(q) if self.monotone == "isotonic" else q.sort(-1).values).numpy()

    def _fitted(self, model: Any, x: NDArray, y: NDArray) -> list[Any]:
        return [_at_level(model, level).fit(x, y) for level in self.levels]

    def _predictions(self, predictions: Any, X: NDArray) -> Tensor:
        found = numbers("predictions", predictions, dims=3)
        if found.shape[::2] != (len(X), len(self.levels)):
            wanted = f"({len(X)}, models, {len(self.levels)})"
            raise ValueError(f"predictions: expected shape {wanted}, got {found.shape}")
        return torch.from_numpy(found)

    def _standardised(self, X: NDArray) -> Tensor:
        return torch.from_numpy((X - self._centre) / self._spread)


class _Weights(nn.Module):
    """Logits (rows, inputs, outputs) of the weights: of a network of the row, or the same for all (features = 0)."""

    def __init__(self, features: int, hidden: int, inputs: int, outputs: int, g: torch.Generator) -> None:
        super().__init__()
        self.shape = (inputs, outputs)
        self.network = perceptron((features, hidden, hidden, inputs * outputs), g) if features else None
        self.free = None if features else nn.Parameter(torch.zeros(inputs * outputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        logits = self.free.expand(len(x), -1) if self.network is None else self.network(x)
        return logits.view(-1, *self.shape)


def _sizes(resolution: str, models: int, levels: int) -> tuple[int, int]:
    """How many weights sum to one, and how many sets of them there are."""
    return {"coarse": (models, 1), "medium": (models, levels), "fine": (models * levels, levels)}[resolution]


def _mixed(z: Tensor, logits: Tensor) -> Tensor:
    """Quantiles (rows, levels) from those of the models (rows, models, levels)."""
    if logits.shape[1] != z.shape[1]:  # fine: all models' levels are inputs
        z = z.flatten(1).unsqueeze(-1)
    return (logits.softmax(1) * z).sum(1)


def _crossing(q: Tensor, margin: float) -> Tensor:
    """Mean over rows and pairs of levels of max(0, lower one's quantile - higher one's + margin)."""
    low, high = torch.triu_indices(q.shape[-1], q.shape[-1], offset=1)
    return (q[:, low] - q[:, high] + margin).clamp_min(0).mean()


def _at_level(model: Any, level: float) -> Any:
    """An unfitted regressor for the level."""
    if isinstance(model, str):
        require.one_of("models", model, ("linear", "boosting"))
        if model == "linear":
            from sklearn.linear_model import QuantileRegressor

            return QuantileRegressor(quantile=level, alpha=0.0)
        from sklearn.ensemble import HistGradientBoostingRegressor

        return HistGradientBoostingRegressor(loss="quantile", quantile=level, random_state=0)
    return clone(model).set_params(**{"quantile" if "quantile" in model.get_params() else "alpha": level})


def _asked(models: list[list[Any]], X: NDArray) -> NDArray:
    return np.stack([np.stack([m.predict(X) for m in at_levels], axis=1) for at_levels in models], axis=1)


def _levels(levels: Sequence[float], like: Array) -> Array:
    values = checked_levels(levels)
    return like.new_tensor(values) if isinstance(like, Tensor) else np.asarray(values)


def _folds(fold: Any, rows: int, folds: int) -> NDArray:
    found = np.asarray(fold)
    if found.shape != (rows,) or found.dtype.kind not in "iu" or not ((found >= 0) & (found < folds)).all():
        raise ValueError(f"fold: expected {rows} whole numbers from 0 to {folds - 1}, got {fold!r}")
    return found


def _cross_validated(
    rows: NDArray, y: NDArray, new: NDArray, both: list[tuple[int, int]], levels: Sequence[float], fold: NDArray
) -> NDArray:
    """CV+: order statistics over the rows of what the model without the row's fold predicts, less or plus its score."""
    answer = new.mean(0)  # of the median; the folds' models are all as good
    for low, high in both:
        score = np.maximum(rows[:, low] - y, y - rows[:, high])[:, None]
        k = rank(len(y), 2 * float(levels[low]))
        for column, sign in ((low, -1.0), (high, 1.0)):
            ends = sign * new[fold, :, column] + score
            answer[:, column] = sign * (np.partition(ends, k - 1, axis=0)[k - 1] if k <= len(y) else np.inf)
    return answer
