"""Antidote data: individual fairness by training on made-up twins of the rows, in another group but otherwise alike.

Two people who differ in little but their sex should get nearly the same score. Robust training asks for that along a
direction in feature space that tells the sexes apart, where nobody need live: half a husband, say. This paper
learns from pairs of comparable rows what the twin of a row looks like, and draws twins that keep to the data. Added
to the table with the label of their original they are plain pre-processing; inside training the worst of a few counts.
Try it where predictions must not hang on a sensitive attribute through its proxies either. It needs comparable pairs
in the data, and so few features or generous thresholds; differences that the labels hold are given up.
"""

from collections.abc import Sequence
from itertools import pairwise, permutations
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from scipy.special import ndtri
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_consistent_length, check_is_fitted, validate_data
from torch import Generator, Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import estimator

PAPER = Paper(
    title="Learning Antidote Data to Individual Unfairness",
    year=2023,
    departs=(
        "only the abstract and the start of the introduction could be read, and no code: what follows is a stand-in",
        "comparable: numeric features within thresholds, at most so many categorical ones changed",
        "a Gaussian copula, conditional on the row, stands for the paper's learned tabular generator",
        "an antidote has its original's label, one a row; in training the worst of a few is added to the loss",
    ),
    equation=(
        r"\min_f\ \frac1n\sum_{i=1}^n\Bigl[\ell(f(x_i),y_i)+\max_{k\le K}\ell(f(x'_{ik}),y_i)\Bigr],\qquad "
        r"x'_{ik}\sim\hat p\bigl(\cdot\mid x_i,\ \text{other group}\bigr)"
    ),
    url="https://arxiv.org/abs/2211.15897",
)

_BLOCK = 1 << 22  # entries of a comparison of rows with rows that are held at once


def comparable_pairs(
    X: Any,
    sensitive_features: Any,
    *,
    threshold: float | Sequence[float] = 0.25,
    categorical: Sequence[int] = (),
    max_changed: int = 1,
) -> np.ndarray:
    """Pairs of rows from different groups that are otherwise alike: row numbers (M, 2), every pair in both orders.

    Rows are comparable if no numeric column differs by more than `threshold` standard deviations of that column and
    at most `max_changed` of the categorical columns differ. Time grows with the square of the rows.

    Args:
        X: (N, d) numbers; categories as codes.
        sensitive_features: group labels (N,).
        threshold: >= 0, in standard deviations, one or one a column (those of categorical columns are not used).
            Infinite for a column that may differ freely, as the sensitive attribute itself has to.
        categorical: numbers of the categorical columns.
        max_changed: how many categorical columns may differ.

    Raises:
        ValueError: data that do not fit, or a hyper-parameter out of range.

    >>> X = np.array([[30.0, 1], [31.0, 0], [60.0, 1]])
    >>> comparable_pairs(X, ["f", "m", "m"], categorical=(1,)).tolist()
    [[0, 1], [1, 0]]
    """
    X, group = _table(X, sensitive_features)
    limit = np.broadcast_to(np.asarray(threshold, dtype=float), np.shape(threshold) or X.shape[1:])
    if limit.shape != X.shape[1:] or not (limit >= 0).all():
        raise ValueError(f"threshold: expected a number >= 0 or {X.shape[1]} of them, got {threshold!r}")
    for i, column in enumerate(categorical):
        require.whole(f"categorical[{i}]", column, at_most=X.shape[1] - 1)
    require.whole("max_changed", max_changed)
    spread = X.std(0)
    limit = limit * np.where(spread > 0, spread, 1.0)
    numeric = [j for j in range(X.shape[1]) if j not in set(categorical)]
    found = []
    for rows in np.array_split(np.arange(len(X)), -(-(len(X) ** 2) // _BLOCK)):
        alike = group[rows, None] != group
        for j in numeric:
            alike &= np.abs(X[rows, None, j] - X[:, j]) <= limit[j]
        if categorical:
            alike &= sum(X[rows, None, j] != X[:, j] for j in set(categorical)) <= max_changed
        first, second = alike.nonzero()
        found.append(np.stack([rows[first], second], 1))
    return np.concatenate(found)


class ComparableSampleGenerator(BaseEstimator):
    """Draws what a row might look like in another group, having learned it from comparable pairs.

    For each ordered pair of groups the columns of both rows become normal scores, each by its own ranks. With z and
    z' jointly normal, z' given z is N(m' + C S^-1 (z - m), T - C S^-1 C^T), where S and T are the covariances of z and
    z' and C is that of z' with z. A draw's scores are turned back into values of the other group: by interpolation
    between those that were seen, and for categorical columns into the nearest. No value lies beyond what the other
    group's comparable rows had. A draw is likely, but not certain, to be within the thresholds of its original.

    Args:
        threshold: of `comparable_pairs`.
        categorical: numbers of the categorical columns. More than two categories should be in some sensible order, or
            be spread over columns of zeros and ones.
        max_changed: how many of these may differ.
        max_pairs: of an ordered pair of groups; of more, so many are drawn.
        random_state: seed of those, and of draws that are not handed a generator; a whole number.

    Attributes:
        groups_: group labels in order.
        pairs_: row numbers of the pairs learned from, (M, 2).

    Raises:
        ValueError: at fit, hyper-parameters out of range, data that do not fit, or a group without comparable pairs.

    >>> X = np.array([[0, 20.0], [0, 30], [0, 40], [1, 21], [1, 31], [1, 41]])  # a group, and an age
    >>> generator = ComparableSampleGenerator(threshold=(np.inf, 0.2)).fit(X, X[:, 0])
    >>> twins, group = generator.sample(X[:2], X[:2, 0])
    >>> twins.round()[:, 0].tolist(), group.tolist()
    ([[1.0, 21.0], [1.0, 31.0]], [[1.0], [1.0]])
    """

    def __init__(
        self,
        *,
        threshold: float | Sequence[float] = 0.25,
        categorical: Sequence[int] = (),
        max_changed: int = 1,
        max_pairs: int = 20_000,
        random_state: int = 0,
    ) -> None:
        self.threshold, self.categorical, self.max_changed = threshold, categorical, max_changed
        self.max_pairs, self.random_state = max_pairs, random_state

    def fit(self, X: Any, sensitive_features: Any, pairs: Any = None) -> Self:
        """Learn from rows X (N, d) of groups (N,); from `pairs` (M, 2) of row numbers instead of those found."""
        require.whole("max_pairs", self.max_pairs, at_least=2)
        require.whole("random_state", self.random_state)
        X, sensitive = _table(X, sensitive_features)
        if pairs is None:
            pairs = comparable_pairs(
                X,
                sensitive,
                threshold=self.threshold,
                categorical=self.categorical,
                max_changed=self.max_changed,
            )
        pairs = np.asarray(pairs)
        if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype.kind not in "iu":
            raise ValueError(f"pairs: expected row numbers of shape (pairs, 2), got {pairs.dtype} {pairs.shape}")
        self.n_features_in_ = X.shape[1]
        self.groups_, group = np.unique(sensitive, return_inverse=True)
        rng, kept, self._twins = np.random.default_rng(self.random_state), [], {}
        for a, b in permutations(range(len(self.groups_)), 2):
            own = pairs[(group[pairs[:, 0]] == a) & (group[pairs[:, 1]] == b)]
            if len(own) > self.max_pairs:
                own = own[np.sort(rng.choice(len(own), self.max_pairs, replace=False))]
            if len(own) > 1:
                self._twins[a, b] = _Copula(X[own[:, 0]], X[own[:, 1]], self.categorical)
                kept.append(own)
        for a, label in enumerate(self.groups_):
            if not any(a == first for first, _ in self._twins):
                raise ValueError(
                    f"sensitive_features: fewer than two comparable pairs lead from group {label!s} to any other one;"
                    " raise threshold or max_changed"
                )
        self.pairs_ = np.concatenate(kept)
        return self

    def sample(
        self, X: Any, sensitive_features: Any, n_samples: int = 1, *, rng: np.random.Generator | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Draw comparable rows (N, n_samples, d) of rows X (N, d), and their groups (N, n_samples).

        The other group is drawn evenly from those with pairs. Without `rng` every call draws the same.
        """
        check_is_fitted(self)
        require.whole("n_samples", n_samples, at_least=1)
        X, sensitive = _table(X, sensitive_features)
        if X.shape[1] != self.n_features_in_:
            raise ValueError(f"X: expected {self.n_features_in_} columns, as at fit, got {X.shape[1]}")
        unknown = np.setdiff1d(sensitive, self.groups_)
        if len(unknown):
            raise ValueError(f"sensitive_features: group {unknown[0]!s} did not occur at fit")
        rng = rng or np.random.default_rng(self.random_state)
        X, group = X.repeat(n_samples, 0), np.searchsorted(self.groups_, sensitive).repeat(n_samples)
        other, drawn = np.empty_like(group), np.empty_like(X)
        for a in np.unique(group):
            rows = np.flatnonzero(group == a)
            other[rows] = rng.choice([b for first, b in self._twins if first == a], len(rows))
        for (a, b), twin in self._twins.items():
            rows = np.flatnonzero((group == a) & (other == b))
            drawn[rows] = twin.draw(X[rows], rng)
        return drawn.reshape(-1, n_samples, X.shape[1]), self.groups_[other].reshape(-1, n_samples)


class AntidotePreprocessor(BaseEstimator):
    """Resampler that adds to rows an antidote each, with its label (AntiPre), for any model to be trained on.

    With one for every row the label tells nothing more about the group among comparable rows; with several a row the
    group would tell it the other way round. Without `sensitive_features`, or with a single group, nothing is added.

    Args:
        generator: what draws antidotes, by `fit(X, sensitive_features)` and `sample(X, sensitive_features, n)`; it is
            cloned. None is `ComparableSampleGenerator()`.
        ratio: share of the rows, drawn at random, that are given one, above 0 and at most 1.
        random_state: seed of that draw, a whole number.

    Attributes:
        generator_: the fitted generator, None where nothing was added.
        sample_indices_: the row that each row of the result comes from, (N',).
        sensitive_features_: groups of the result, (N',), None without groups.

    Raises:
        ValueError: at fit_resample, hyper-parameters out of range and data that do not fit.

    >>> X, y = np.array([[0, 20.0], [0, 30], [0, 40], [1, 21], [1, 31], [1, 41]]), np.array([0, 1, 1, 0, 0, 1])
    >>> pre = AntidotePreprocessor(ComparableSampleGenerator(threshold=(np.inf, 0.2)))
    >>> more, labels = pre.fit_resample(X, y, X[:, 0])
    >>> more.shape, labels.tolist()
    ((12, 2), [0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 0, 1])
    """

    def __init__(self, generator: Any = None, *, ratio: float = 1.0, random_state: int = 0) -> None:
        self.generator, self.ratio, self.random_state = generator, ratio, random_state

    def fit_resample(self, X: Any, y: Any, sensitive_features: Any = None) -> tuple[np.ndarray, np.ndarray]:
        """Rows (N', d) and labels (N',), the given ones first, then max(1, round(ratio N)) antidotes."""
        require.number("ratio", self.ratio, above=0.0, at_most=1.0)
        require.whole("random_state", self.random_state)
        X, y = check_array(X, dtype=np.float64), np.asarray(y)
        check_consistent_length(X, y)
        self.generator_, self.sample_indices_ = _fitted(self.generator, X, sensitive_features), np.arange(len(X))
        self.sensitive_features_ = None
        if sensitive_features is not None:
            self.sensitive_features_ = sensitive = np.asarray(sensitive_features)
        if self.generator_ is None:
            return X, y
        rng = np.random.default_rng(self.random_state)
        chosen = np.sort(rng.choice(len(X), max(1, round(self.ratio * len(X))), replace=False))
        drawn, groups = self.generator_.sample(X[chosen], sensitive[chosen])
        self.sensitive_features_ = np.concatenate([sensitive, groups[:, 0]])
        self.sample_indices_ = np.concatenate([self.sample_indices_, chosen])
        return np.concatenate([X, drawn[:, 0]]), y[self.sample_indices_]


def antidote_loss(
    losses: Float[Tensor, "*batch"], antidote_losses: Float[Tensor, "*batch antidotes"]
) -> Float[Tensor, "*batch"]:
    """The in-processing objective per sample: its loss plus the largest among its antidotes' losses on its label.

    Raises:
        ValueError: shapes or dtypes that do not fit, or no antidotes.

    >>> antidote_loss(torch.tensor([0.5, 1.0]), torch.tensor([[0.1, 0.7], [0.2, 0.0]]))
    tensor([1.2000, 1.2000])
    """
    require.floating("losses", losses)
    require.floating("antidote_losses", antidote_losses, at_least_dims=1)
    if antidote_losses.shape[:-1] != losses.shape or not antidote_losses.shape[-1]:
        raise ValueError(
            f"antidote_losses: expected shape {tuple(losses.shape)} and antidotes, got {tuple(antidote_losses.shape)}"
        )
    return losses + antidote_losses.amax(-1)


@estimator(on="classes", examples=({"epochs": 10, "hidden": (16,), "lr": 0.05},))
class AntidoteInprocessor(ClassifierMixin, BaseEstimator):
    """Perceptron for tables that counts, with every row, the worst of its antidotes (AntiIn).

    It minimises loss(x, y) + max over k of loss(x'_k, y), with x'_1 to x'_K drawn anew in each epoch.
    `fit(X, y, sensitive_features=s)` takes a column of group labels and does not ask for it again. Without one, or
    with a single group, the perceptron is trained alone. Scale the features beforehand.

    Args:
        generator: as in `AntidotePreprocessor`; its `sample` is handed `rng` as well.
        antidotes: K, per row; 0 trains the perceptron alone.
        hidden: widths of the hidden layers; none is logistic regression.
        epochs: passes over the data.
        batch_size: rows of a step.
        lr: of Adam.
        random_state: seed of initial weights, batches and antidotes, a whole number.

    Attributes:
        classes_: labels in order, as `predict_proba` has them.
        generator_: the fitted generator, None where the perceptron was trained alone.
        network_: the trained network.

    Raises:
        ValueError: at fit, hyper-parameters out of range and data that are not as scikit-learn asks.

    >>> X, y = np.array([[0, 2.0], [0, 3], [0, 4], [1, 2.1], [1, 3.1], [1, 4.1]]), [0, 0, 1, 0, 1, 1]
    >>> fair = AntidoteInprocessor(ComparableSampleGenerator(threshold=(np.inf, 0.2)), hidden=(8,), lr=0.05)
    >>> fair.fit(X, y, sensitive_features=X[:, 0]).predict([[0, 2.0], [1, 2.0], [0, 4.0], [1, 4.0]])
    array([0, 0, 1, 1])
    """

    def __init__(
        self,
        generator: Any = None,
        *,
        antidotes: int = 4,
        hidden: Sequence[int] = (32,),
        epochs: int = 50,
        batch_size: int = 256,
        lr: float = 1e-3,
        random_state: int = 0,
    ) -> None:
        self.generator, self.antidotes, self.hidden, self.epochs = generator, antidotes, hidden, epochs
        self.batch_size, self.lr, self.random_state = batch_size, lr, random_state

    def fit(self, X: Any, y: Any, sensitive_features: Any = None) -> Self:
        """Train on rows X (N, d), targets y (N,) and group labels (N,)."""
        for name, value in (*((f"hidden[{i}]", width) for i, width in enumerate(self.hidden)), ("epochs", self.epochs)):
            require.whole(name, value, at_least=1)
        require.whole("antidotes", self.antidotes)
        require.whole("batch_size", self.batch_size, at_least=1)
        require.number("lr", self.lr, above=0.0)
        require.whole("random_state", self.random_state)
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, target = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError("y: expected at least two classes, got 1 class")
        self.generator_ = _fitted(self.generator, X, sensitive_features) if self.antidotes else None

        g, rng = torch.Generator().manual_seed(self.random_state), np.random.default_rng(self.random_state)
        self.network_ = _network(X.shape[1], *self.hidden, len(self.classes_), generator=g).double()
        optimizer = torch.optim.Adam(self.network_.parameters(), lr=self.lr)
        x, label = torch.from_numpy(X), torch.from_numpy(target)
        for _ in range(self.epochs):
            if self.generator_ is not None:
                drawn, _ = self.generator_.sample(X, sensitive_features, self.antidotes, rng=rng)
                twins = torch.from_numpy(drawn)
            for rows in torch.randperm(len(y), generator=g).split(self.batch_size):
                values = F.cross_entropy(self.network_(x[rows]), label[rows], reduction="none")
                if self.generator_ is not None:
                    logits, labels = self.network_(twins[rows]), label[rows, None].expand(-1, self.antidotes)
                    values = antidote_loss(values, F.cross_entropy(logits.mT, labels, reduction="none"))
                optimizer.zero_grad()
                values.mean().backward()
                optimizer.step()
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (N, classes)."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        with torch.no_grad():
            probability: np.ndarray = self.network_(torch.from_numpy(X)).softmax(-1).numpy()
        return probability

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of every row, (N,)."""
        likeliest = self.predict_proba(X).argmax(1)
        predicted: np.ndarray = self.classes_[likeliest]
        return predicted


class _Copula:
    """Normal scores of rows and of their partners, and the partner's distribution given the row."""

    def __init__(self, x: np.ndarray, partner: np.ndarray, categorical: Sequence[int]) -> None:
        self.knots, self.partner_knots = ([_knots(column) for column in table.T] for table in (x, partner))
        self.categorical, d = set(categorical), x.shape[1]
        scores = np.concatenate([_scores(x, self.knots), _scores(partner, self.partner_knots)], 1)
        self.mean, covariance = scores.mean(0), np.cov(scores.T).reshape(2 * d, 2 * d)
        own, cross, theirs = covariance[:d, :d], covariance[d:, :d], covariance[d:, d:]
        self.slope = cross @ np.linalg.pinv(own, hermitian=True)  # columns may be constant, or tell the same
        left, axes = np.linalg.eigh(theirs - self.slope @ cross.T)
        self.factor = axes * np.sqrt(left.clip(min=0.0))

    def draw(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        d = x.shape[1]
        z = self.mean[d:] + (_scores(x, self.knots) - self.mean[:d]) @ self.slope.T
        z += rng.standard_normal(x.shape) @ self.factor.T
        drawn = np.empty_like(x)
        for j, (values, scores) in enumerate(self.partner_knots):
            if j in self.categorical:
                drawn[:, j] = values[np.searchsorted((scores[1:] + scores[:-1]) / 2, z[:, j])]
            else:
                drawn[:, j] = np.interp(z[:, j], scores, values)
        return drawn


def _knots(column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct values, and the normal score of each one's middle rank."""
    values, counts = np.unique(column, return_counts=True)
    return values, ndtri((np.cumsum(counts) - counts / 2) / len(column))


def _scores(table: np.ndarray, knots: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    return np.stack([np.interp(column, *known) for column, known in zip(table.T, knots)], 1)


def _table(X: Any, sensitive_features: Any) -> tuple[np.ndarray, np.ndarray]:
    X, sensitive = check_array(X, dtype=np.float64), np.asarray(sensitive_features)
    if sensitive.ndim != 1:
        raise ValueError(f"sensitive_features: expected one label a row, got shape {sensitive.shape}")
    check_consistent_length(X, sensitive)
    return X, sensitive


def _fitted(generator: Any, X: np.ndarray, sensitive_features: Any) -> Any:
    """A clone that has learned from these rows, or None if there is no other group to learn about."""
    if sensitive_features is None:
        return None
    _, sensitive = _table(X, sensitive_features)
    if len(np.unique(sensitive)) < 2:
        return None
    return clone(generator or ComparableSampleGenerator()).fit(X, sensitive)


def _network(*sizes: int, generator: Generator) -> nn.Sequential:
    """A perceptron with the weights that torch would have drawn from this generator."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        layer = nn.Linear(wide, narrow, device="meta").to_empty(device="cpu")
        for tensor in (layer.weight, layer.bias):
            nn.init.uniform_(tensor, -(wide**-0.5), wide**-0.5, generator=generator)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])
