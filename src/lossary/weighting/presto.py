"""PRESTO: rare events at the end of an ordered sequence, estimated with what the common steps before them teach.

A user sees an ad, may click, may buy. Logistic regression on the few purchases alone is noisy; proportional odds
borrows all slopes from the common steps, which is too rigid. PRESTO gives each step its own slopes and penalises how
much they differ from the step before, feature by feature, so that only what the data insist on departs from the
common slopes.

Use it for a rare last (or first) category of an ordered outcome, when probabilities are wanted. With plenty of rare
cases plain logistic regression does as well; where the slopes have nothing in common the penalty only costs.
"""

import warnings
from typing import Any, Self

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator

PAPER = Paper(
    title="Predicting Rare Events by Shrinking Towards Proportional Odds",
    year=2023,
    helps=("class-imbalance", "few-labels"),
    departs=(
        "proximal Newton steps on log-likelihood and penalty in place of the official code's iterated least squares",
        "the penalty on the first slopes has a factor of its own, `base`; the paper's is 1",
        "no elastic-net mix",
        "where estimated boundaries cross, the category between them gets 0 and the others are rescaled; the official"
        " code stops",
    ),
    equation=(
        r"\begin{aligned} "
        r"&\operatorname{logit}P(y\le k\mid x)=\alpha_k+\beta_k^\top x,\qquad k=1,\dots,K-1\\ "
        r"&\min_{\alpha,\beta}\ -\frac1n\sum_{i=1}^n\log P(y_i\mid x_i) "
        r"+\lambda\Bigl(\lVert\beta_1\rVert_1+\sum_{k=2}^{K-1}\lVert\beta_k-\beta_{k-1}\rVert_1\Bigr) "
        r"\end{aligned}"
    ),
    url="https://proceedings.mlr.press/v202/faletto23a.html",
)

_TOLERANCE = 1e-12  # of the objective, per row
_SWEEPS = 100  # of coordinate descent within a step
_RIDGE = 1e-12  # on Hessians that may be singular


def presto_penalty(
    weight: Float[Tensor, "*batch boundaries features"], *, base: float = 1.0
) -> Float[Tensor, "*batch"]:
    """base sum_j |w_1j| + sum_(k>1) sum_j |w_kj - w_(k-1)j|, for the last layer of a cumulative model in torch.

    Args:
        weight: slopes of the boundaries between adjacent categories, in order.
        base: factor of the first boundary's slopes, >= 0; with 0 only differences are penalised, and a large
            multiple of the penalty gives proportional odds instead of no slopes at all.

    Raises:
        ValueError: a weight that is not floating point of two or more dimensions, base < 0.

    >>> import torch
    >>> presto_penalty(torch.tensor([[1.0, -2.0], [1.5, -2.0], [1.5, 0.0]]))  # 1 + 2, then 0.5, then 2
    tensor(5.5000)
    """
    require.floating("weight", weight, at_least_dims=2)
    require.number("base", base, at_least=0.0)
    return base * weight[..., 0, :].abs().sum(-1) + weight.diff(dim=-2).abs().sum((-1, -2))


@estimator(on="classes", examples=({"lam": 0.02}, {"lam": 0.1, "base": 0.5}))
class PrestoOrdinalClassifier(ClassifierMixin, BaseEstimator):
    """Classifier for ordered categories: logit P(y <= k | x) = alpha_k + beta_k . x for k = 1, ..., K - 1.

    Minimises the mean negative log-likelihood + lam (base |beta_1|_1 + sum_(k>1) |beta_k - beta_(k-1)|_1) over
    standardised features; the problem is convex. As lam grows all slopes tend to 0, with base 0 to shared ones
    (proportional odds). With two categories it is logistic regression with an L1 penalty.

    Categories are ordered as numpy sorts them. Where two boundaries cross, the category between them has probability
    0 and the others are scaled to sum to 1.

    Args:
        lam: lambda >= 0 of the penalty. None chooses among `n_lambdas` by cross-validated Brier score, as the
            official code does, from the smallest that leaves no penalised slope down to a hundredth of it.
        base: factor of the penalty on beta_1, >= 0.
        n_lambdas: number of lambdas tried, at least 2.
        cv: number of folds, at least 2; fewer where a category has fewer rows.
        max_iter: Newton steps for a lambda.

    Attributes:
        coef_: (K - 1, d) beta, in units of the features.
        intercept_: (K - 1,) alpha.
        classes_: (K,) the categories in order.
        lam_: lambda that was used.
        n_iter_: Newton steps that the last fit took.

    Raises:
        ValueError: a parameter out of range, NaN, arrays that do not fit, fewer than two categories, or a category of
            one row where lambda is to be chosen; asked before `fit` (scikit-learn's NotFittedError).

    >>> rng = np.random.default_rng(0)
    >>> x = rng.normal(size=(500, 3))
    >>> y = np.searchsorted([0.0, 3.0], x[:, 0] + rng.logistic(size=500))  # 0, 1 or, rarely, 2
    >>> model = PrestoOrdinalClassifier().fit(x, y)
    >>> model.coef_.round(1)
    array([[-0.9, -0. ,  0. ],
           [-0.9, -0. ,  0. ]])
    >>> model.predict_proba([[2.0, 0.0, 0.0]]).round(1)
    array([[0.2, 0.6, 0.2]])
    """

    def __init__(
        self,
        *,
        lam: float | None = None,
        base: float = 1.0,
        n_lambdas: int = 20,
        cv: int = 5,
        max_iter: int = 100,
    ) -> None:
        self.lam, self.base, self.n_lambdas, self.cv, self.max_iter = lam, base, n_lambdas, cv, max_iter

    def fit(self, X: Float[Any, "rows features"], y: Any) -> Self:
        """Learn the slopes, choosing lambda if none is given."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        require.number("base", self.base, at_least=0.0)
        require.whole("n_lambdas", self.n_lambdas, at_least=2)
        require.whole("cv", self.cv, at_least=2)
        require.whole("max_iter", self.max_iter, at_least=1)
        self.classes_, rank = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y: expected at least two classes, got one class, {self.classes_[0]}")
        if self.lam is None:
            self.lam_ = self._chosen(X, rank)
        else:
            require.number("lam", self.lam, at_least=0.0)
            self.lam_ = float(self.lam)
        (model,) = self._path(X, rank, np.array([self.lam_]))
        self.intercept_, self.coef_, self.n_iter_ = model
        return self

    def predict_proba(self, X: Float[Any, "rows features"]) -> Float[NDArray, "rows classes"]:
        """Probabilities of the categories, in order."""
        check_is_fitted(self)
        return _probabilities(validate_data(self, X, dtype=np.float64, reset=False), self.intercept_, self.coef_)

    def predict(self, X: Float[Any, "rows features"]) -> NDArray:
        """The likeliest category."""
        likeliest = self.predict_proba(X).argmax(1)
        return self.classes_[likeliest]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.poor_score = True  # on classes that are in no order
        return tags

    def _chosen(self, X: NDArray, y: NDArray) -> float:
        """The lambda with the least Brier score on held-out folds."""
        from sklearn.model_selection import StratifiedKFold

        counts = np.bincount(y)
        if counts.min() < 2:
            raise ValueError(f"lam: expected a number, as class {self.classes_[counts.argmin()]} has one row only")
        lambdas = self._largest(X, y) * np.geomspace(1.0, 0.01, self.n_lambdas)
        scores = np.zeros(len(lambdas))
        for train, test in StratifiedKFold(min(self.cv, int(counts.min()))).split(X, y):
            for i, (intercept, coef, _) in enumerate(self._path(X[train], y[train], lambdas)):
                p = _probabilities(X[test], intercept, coef)
                scores[i] += ((p - np.eye(len(counts))[y[test]]) ** 2).sum() / len(y)
        return float(lambdas[scores.argmin()])

    def _largest(self, X: NDArray, y: NDArray) -> float:
        """The smallest lambda at which nothing that is penalised has a slope."""
        problem = _Problem(X, y, self.base)
        theta, _ = problem.solve(problem.start(), 1e9, self.max_iter)
        factors = problem.factors.ravel()
        slope = np.abs(problem.expand(theta)[1].ravel())
        return float((slope[factors > 0] / factors[factors > 0]).max(initial=np.finfo(float).tiny))

    def _path(self, X: NDArray, y: NDArray, lambdas: NDArray) -> list[tuple[NDArray, NDArray, int]]:
        """Intercepts, slopes and steps for each lambda, each fit starting where the last one ended."""
        problem, found = _Problem(X, y, self.base), []
        theta = problem.start()
        for lam in lambdas:
            theta, steps = problem.solve(theta, lam, self.max_iter)
            found.append((*problem.original(theta), steps))
        return found


class _Problem:
    """The convex problem in theta (K - 1, 1 + d): alpha_k beside psi_1 = beta_1 and psi_k = beta_k - beta_(k-1)."""

    def __init__(self, X: NDArray, y: NDArray, base: float) -> None:
        spread = X.std(axis=0)
        self.mean, self.spread = X.mean(axis=0), np.where(spread > 0, spread, 1.0)
        self.rows = np.column_stack([np.ones(len(X)), (X - self.mean) / self.spread])
        self.y, self.boundaries, width = y, int(y.max()), self.rows.shape[1]
        self.factors = np.ones((self.boundaries, width))
        self.factors[:, 0], self.factors[0, 1:] = 0.0, base
        # flattened (alpha, beta) = mix @ flattened theta
        slopes = np.diag(np.arange(width) > 0).astype(float)
        steps = np.tril(np.ones((self.boundaries, self.boundaries)))
        self.mix = np.kron(steps, slopes) + np.kron(np.eye(self.boundaries), np.eye(width) - slopes)

    def start(self) -> NDArray:
        """No slopes, and the frequencies of the categories."""
        theta = np.zeros_like(self.factors)
        below = np.bincount(self.y).cumsum()[:-1] / len(self.y)
        theta[:, 0] = np.log(below / (1 - below))
        return theta

    def original(self, theta: NDArray) -> tuple[NDArray, NDArray]:
        """Intercepts (K - 1,) and slopes (K - 1, d) in units of the features."""
        coef = theta[:, 1:].cumsum(axis=0) / self.spread
        return theta[:, 0] - coef @ self.mean, coef

    def loss(self, theta: NDArray) -> float:
        """Mean negative log-likelihood; infinite where the boundaries of a row's category cross."""
        return self._terms(theta)[0]

    def _terms(self, theta: NDArray) -> tuple[float, NDArray, NDArray, NDArray]:
        """The loss, and each row's lower and upper boundary with the gap between them."""
        lower, upper = _around(self.rows @ (self.mix @ theta.ravel()).reshape(theta.shape).T, self.y)
        gap = upper - lower
        if gap.min() <= 0:
            return np.inf, lower, upper, gap
        # log(s(u) - s(l)) = log s(u) + log s(-l) + log(1 - exp(l - u))
        values = np.logaddexp(0, -upper) + np.logaddexp(0, lower) - np.log(-np.expm1(-gap))
        return float(values.mean()), lower, upper, gap

    def expand(self, theta: NDArray) -> tuple[float, NDArray, NDArray]:
        """The loss, its gradient like theta and its Hessian over flattened theta."""
        from scipy.special import expit

        loss, lower, upper, gap = self._terms(theta)
        n, m = len(self.y), self.boundaries
        with np.errstate(over="ignore"):
            pull = 1 / np.expm1(gap)
        below, above = self.y > 0, self.y < m  # has a lower, has an upper boundary
        slope, curve, cross = np.zeros((n, m + 1)), np.zeros((n, m + 1)), np.zeros((n, m))
        each = np.arange(n)
        slope[each, self.y] = np.where(above, -expit(-upper) - pull, 0.0)
        slope[each[below], self.y[below] - 1] = (expit(lower) + pull)[below]
        curve[each, self.y] = np.where(above, expit(upper) * expit(-upper) + pull * (1 + pull), 0.0)
        curve[each[below], self.y[below] - 1] = (expit(lower) * expit(-lower) + pull * (1 + pull))[below]
        both = below & above
        cross[each[both], self.y[both]] = -(pull * (1 + pull))[both]  # of boundaries y - 1 and y
        gradient = (slope[:, :m].T @ self.rows / n).ravel() @ self.mix
        width = theta.shape[1]
        hessian = np.zeros((m, width, m, width))
        for k in range(m):
            hessian[k, :, k] = self.rows.T @ (curve[:, k, None] * self.rows) / n
            if k:
                hessian[k - 1, :, k] = hessian[k, :, k - 1] = self.rows.T @ (cross[:, k, None] * self.rows) / n
        hessian = self.mix.T @ hessian.reshape(m * width, m * width) @ self.mix
        return loss, gradient.reshape(theta.shape), hessian

    def solve(self, theta: NDArray, lam: float, max_iter: int) -> tuple[NDArray, int]:
        """Theta at the minimum, and the number of proximal Newton steps."""
        penalty = lam * self.factors
        for step in range(1, max_iter + 1):
            loss, gradient, hessian = self.expand(theta)
            change = _lasso_step(theta.ravel(), gradient.ravel(), hessian, penalty.ravel()).reshape(theta.shape) - theta
            gain = (gradient * change).sum() + (penalty * (np.abs(theta + change) - np.abs(theta))).sum()
            if gain > -_TOLERANCE:
                return theta, step
            size, value = 1.0, loss + (penalty * np.abs(theta)).sum()
            while self.loss(theta + size * change) + (penalty * np.abs(theta + size * change)).sum() > (
                value + 1e-4 * size * gain
            ):
                size /= 2
                if size < 1e-10:
                    return theta, step
            theta = theta + size * change
        from sklearn.exceptions import ConvergenceWarning

        warnings.warn(
            f"PRESTO has not converged in {max_iter} steps; raise max_iter or lam", ConvergenceWarning, stacklevel=2
        )
        return theta, max_iter


def _lasso_step(theta: NDArray, gradient: NDArray, hessian: NDArray, penalty: NDArray) -> NDArray:
    """The t that minimises gradient . s + s hessian s / 2 + penalty . |t|, s = t - theta.

    A sweep of coordinate descent finds what is not 0; an exact step within these signs, cut short where one would
    change, then gets to the minimum even where the Hessian is nearly singular.
    """
    found, curve = theta.copy(), hessian.diagonal() + _RIDGE
    for _ in range(_SWEEPS):
        before, slope = found.copy(), gradient + hessian @ (found - theta)
        for j in range(len(found)):
            aim = found[j] - slope[j] / curve[j]
            new = np.sign(aim) * max(abs(aim) - penalty[j] / curve[j], 0.0)
            if new != found[j]:
                slope += hessian[:, j] * (new - found[j])
                found[j] = new
        if (curve * (found - before) ** 2).max() < _TOLERANCE / 100:
            break
        held = (found != 0) | (penalty == 0)
        pull = slope[held] + penalty[held] * np.sign(found[held])
        step = -np.linalg.solve(hessian[np.ix_(held, held)] + _RIDGE * np.eye(held.sum()), pull)
        turns = (penalty[held] > 0) & (found[held] * (found[held] + step) < 0)
        size = min(1.0, (-found[held][turns] / step[turns]).min(initial=1.0))
        found[held] += size * step
    return found


def _around(scores: NDArray, y: NDArray) -> tuple[NDArray, NDArray]:
    """The scores (n, K - 1) of the boundaries below and above each row's category, infinite at the ends."""
    ends = np.full((len(y), 1), np.inf)
    padded = np.hstack([-ends, scores, ends])
    each = np.arange(len(y))
    return padded[each, y], padded[each, y + 1]


def _probabilities(X: NDArray, intercept: NDArray, coef: NDArray) -> NDArray:
    from scipy.special import expit

    ends = np.ones((len(X), 1))
    between = np.diff(np.hstack([0 * ends, expit(intercept + X @ coef.T), ends]), axis=1).clip(min=0)
    return between / between.sum(axis=1, keepdims=True)
