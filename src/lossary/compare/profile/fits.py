"""What detectors look at: the rows, and one pass of two families of models over them, out of fold."""

import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.ensemble import ExtraTreesClassifier, ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge

from lossary.compare.encode import Encoder
from lossary.compare.problem import Problem, deal, folds

Floats = NDArray[np.float64]

FOLDS = 5
MOST_CLASSES = 100  # with more, no model is fitted
MOST_LABELS = 20  # the commonest ones, of a multilabel target
MOST_ROWS = 5_000
FEW_ROWS = 2_500  # up to so many there are two passes, for the luck of the folds shows
MOST_WORK = 20_000_000  # rows x encoded columns x outputs of the sample that models are fitted on
SHARES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0)  # of the rows, on the learning curve
FEWEST_FITTED = 20
LINEAR = {"real": "ridge regression"}  # otherwise logistic regression
TREES = "randomised trees"


@dataclass(frozen=True, eq=False)
class Part:
    """Positions to fit on and to predict, and their encoded columns."""

    train: NDArray[np.int64]
    test: NDArray[np.int64]
    x: NDArray[np.float32]
    unseen: NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Fits:
    """Two families of models on the same folds, each row predicted by models that were fitted without it.

    Attributes:
        problem: the sample of rows.
        rows: their positions among the rows that may be looked at.
        target: class numbers without gaps (n,); 0 and 1 (n, labels); or standardised values (n,).
        labels: of a multilabel target, the columns of the target that were fitted.
        parts: the folds of each repeat.
        predictions: by family (repeats, n, ...): probabilities of classes or labels, or values.
    """

    problem: Problem
    rows: NDArray[np.int64]
    target: NDArray[Any]
    labels: NDArray[np.int64]
    parts: tuple[tuple[Part, ...], ...]
    predictions: dict[str, Floats]
    seed: int

    @cached_property
    def baseline(self) -> str:
        """The family that predicts better, by log-loss or by squared error."""
        return min(self.predictions, key=lambda family: self._misfit(self.predictions[family][0]))

    @property
    def prediction(self) -> Floats:
        """The baseline's, of the first repeat."""
        return self.predictions[self.baseline][0]

    def error(self, prediction: Floats) -> Floats:
        """For each row 1 where the class is wrong, the share of labels that are wrong, or the absolute residual."""
        if self.problem.task == "real":
            return abs(self.target - prediction)
        if self.problem.task == "multilabel":
            return ((prediction > 0.5) != self.target).mean(-1)
        return (prediction.argmax(-1) != self.target).astype(float)

    def square(self, prediction: Floats) -> Floats:
        """For each row the squared residual, or the Brier score, mean over labels."""
        if self.problem.task == "real":
            return (self.target - prediction) ** 2
        if self.problem.task == "multilabel":
            return ((prediction - self.target) ** 2).mean(-1)
        return ((prediction - np.eye(prediction.shape[-1])[self.target]) ** 2).sum(-1)

    @cached_property
    def curve(self) -> tuple[tuple[float, ...], Floats]:
        """The shares of the rows on the learning curve, and the baseline's predictions (shares, repeats, n, ...).

        A smaller share is part of every larger one; each keeps the strata in proportion.
        """
        fewest = min(len(part.train) for parts in self.parts for part in parts)
        shares = tuple(share for share in SHARES if share * fewest >= FEWEST_FITTED or share >= 0.5)
        known = self.predictions[self.baseline]
        predictions = np.broadcast_to(known, (len(shares), *known.shape)).copy()
        for repeat, parts in enumerate(self.parts):
            for part in parts:
                order = _evenly(self.problem.strata[part.train], np.random.default_rng(self.seed))
                for place, share in enumerate(shares[:-1]):
                    few = order[: max(2, round(share * len(order)))]
                    made = self.fit(self.baseline, part.x[few], part.train[few], part.unseen, share)
                    predictions[place, repeat, part.test] = made
        return shares, predictions

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """A number per row from 0, shared by rows that are no independent draws."""
        return np.unique(self.problem.units, return_inverse=True)[1]

    def of(self, total: int) -> str:
        """What to say where the sample is not all there is."""
        return "" if len(self.problem) == total else f" on {len(self.problem):,} of {total:,} rows"

    def fit(
        self,
        family: str,
        x: NDArray[np.float32],
        rows: NDArray[np.int64],
        unseen: NDArray[np.float32],
        share: float = 1,
    ) -> Floats:
        """Predictions for `unseen` of a model that was fitted to `x`, the columns of these rows, a share of all."""
        y, task, model = self.target[rows], self.problem.task, _model(family, self.problem.task, share)
        model.set_params(random_state=self.seed)
        if task == "real" or (task == "multilabel" and family == TREES):
            return model.fit(x, y).predict(unseen)
        if task == "multilabel":
            return np.column_stack([_chances(model, x, label, unseen, 2)[:, 1] for label in y.T])
        return _chances(model, x, y, unseen, int(self.target.max()) + 1)

    def _misfit(self, prediction: Floats) -> float:
        if self.problem.task == "real":
            return float(self.square(prediction).mean())
        if self.problem.task == "multilabel":
            chance = np.where(self.target == 1, prediction, 1 - prediction)
        else:
            chance = prediction[np.arange(len(prediction)), self.target]
        return -float(np.log(np.maximum(chance, 1e-6)).mean())


@dataclass(frozen=True, eq=False)
class Seen:
    """What a detector is given.

    Attributes:
        problem: the rows that may be looked at.
        places: their positions in the whole problem.
        total: rows of the whole problem.
        arrivals: the rows of a test file, without their targets, or None.
        seed: of everything random.
    """

    problem: Problem
    places: NDArray[np.int64]
    total: int
    arrivals: Problem | None = None
    seed: int = 0

    def rng(self, name: str) -> np.random.Generator:
        """A stream of its own for each use."""
        return np.random.default_rng((self.seed, *name.encode()))

    def name(self, row: int) -> str:
        """What people know a row by: its id, or which of the data's rows it is, from 1."""
        return str(self.places[row] + 1 if self.problem.ids is None else self.problem.ids[row])

    @cached_property
    def obstacle(self) -> str:
        """Why no model can be fitted, or nothing."""
        if self.problem.task in ("classes", "ordinal") and len(self.problem.classes) > MOST_CLASSES:
            return f"there are {len(self.problem.classes):,} classes, and at most {MOST_CLASSES} are taken"
        if len(np.unique(self.problem.units)) < 2:
            return "all rows hang together in one group"
        return ""

    @cached_property
    def fits(self) -> Fits:
        """The pass over a sample of the rows that several detectors share."""
        return _pass(self)


def without_targets(problem: Problem) -> Problem:
    """The same rows with every target blanked."""
    return replace(problem, target=np.zeros_like(problem.target))


def _pass(seen: Seen) -> Fits:
    rng = seen.rng("fits")
    rows = _sample(seen.problem, rng)
    problem = seen.problem.rows(rows)
    target, labels = problem.target, np.arange(0)
    if problem.task == "multilabel":
        labels = np.sort(np.argsort(-target.sum(0), kind="stable")[:MOST_LABELS])
        target = target[:, labels]
    elif problem.task == "real":
        target = target - target.mean()
        target /= abs(target).max() or 1.0  # lest squares overflow
        target /= target.std() or 1.0
    else:
        target = problem.strata  # the classes that are in the sample, numbered anew
    seed = int(rng.integers(2**31))
    repeats = 2 if len(problem) <= FEW_ROWS else 1
    parts = tuple(_parts(problem, folds(problem, FOLDS, rng)) for _ in range(repeats))
    fits = Fits(problem, rows, target, labels, parts, {}, seed)
    for family in (LINEAR.get(problem.task, "logistic regression"), TREES):
        fits.predictions[family] = np.stack([_predict(fits, family, every) for every in parts])
    return fits


def _parts(problem: Problem, fold: NDArray[np.int64]) -> tuple[Part, ...]:
    found = []
    for number in np.unique(fold):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        encoder = Encoder().fit(problem.features.iloc[train])
        found.append(Part(train, test, *(encoder.transform(problem.features.iloc[rows]) for rows in (train, test))))
    return tuple(found)


def _predict(fits: Fits, family: str, parts: tuple[Part, ...]) -> Floats:
    made = [fits.fit(family, part.x, part.train, part.unseen) for part in parts]
    predicted = np.zeros((len(fits.problem), *made[0].shape[1:]))
    for part, values in zip(parts, made, strict=True):
        predicted[part.test] = values
    return predicted


def _model(family: str, task: str, share: float) -> Any:
    """Not fitted yet; linear ones pay the same penalty for each row whatever the share of the rows."""
    if family != TREES:
        return Ridge(alpha=share) if task == "real" else LogisticRegression(C=0.1 / share, max_iter=200)
    if task == "real":
        return ExtraTreesRegressor(60, min_samples_leaf=5, max_features=1 / 3)
    if task == "multilabel":  # squares on 0 and 1 split as Gini does, for all labels at once
        return ExtraTreesRegressor(60, min_samples_leaf=5, max_features="sqrt")
    return ExtraTreesClassifier(60, min_samples_leaf=5)


def _chances(
    model: Any, x: NDArray[np.float32], y: NDArray[np.int64], unseen: NDArray[np.float32], classes: int
) -> Floats:
    """(rows, classes) probabilities; those of classes that were not there to be learned are 0."""
    found, present = np.zeros((len(unseen), classes)), np.unique(y)
    if len(present) == 1:
        found[:, present] = 1.0
        return found
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # near enough for a profile
        found[:, present] = model.fit(x, y).predict_proba(unseen)
    return found


def _evenly(strata: NDArray[np.int64], rng: np.random.Generator) -> NDArray[np.int64]:
    """The positions in random order, such that the strata are in proportion in front of every place."""
    shuffled = rng.permutation(len(strata))
    ranked = pd.Series(strata[shuffled]).groupby(strata[shuffled]).cumcount().to_numpy()
    place = (ranked + rng.random(len(ranked))) / np.bincount(strata)[strata[shuffled]]
    return shuffled[np.argsort(place, kind="stable")]


def _sample(problem: Problem, rng: np.random.Generator) -> NDArray[np.int64]:
    """Stratified rows, few enough for `MOST_ROWS` and `MOST_WORK`, at least 500."""
    outputs = min(problem.outputs, MOST_LABELS) if problem.task == "multilabel" else problem.outputs
    most = min(MOST_ROWS, max(500, MOST_WORK // (len(problem.features.columns) * outputs)))
    if len(problem) <= most:
        return np.arange(len(problem))
    share = most / len(problem)
    return np.flatnonzero(deal(problem, (share, 1 - share), rng) == 0)
