"""The room's hot paths, checks included, against the bare numpy that they stand for and against peers.

Conformal risk control of 1,000 samples at 1,000 lambdas; intervals and sets of 100,000 rows from 100,000 others against
crepes and MAPIE; one temperature of 100,000 x 10 logits against scikit-learn; Kaplan-Meier of 100,000 by lifelines.
"""

import statistics
import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from benchmarks._timing import seconds
from lossary.uncertainty import conformal_risk_control, weighted_conformal_risk_control
from lossary.uncertainty._calibration import temperature
from lossary.uncertainty._conformal import quantile, set_scores, split_interval, threshold_scores
from lossary.uncertainty._survival import kaplan_meier

PEER_ROWS, CLASSES = 100_000, 10
SAMPLES, GRID, TESTS, ALPHA, ROUNDS = 1000, 1000, 500, 0.1, 9


def by_hand(losses: NDArray, lambdas: NDArray) -> float:
    """Two lines, with no look at the values and no care for losses that rise again."""
    bound = (losses.sum(0) + 1) / (len(losses) + 1)
    return float(lambdas[np.argmax(bound <= ALPHA)])


def sample_by_sample(losses: NDArray, lambdas: NDArray, weights: NDArray, tests: NDArray) -> list[float]:
    """The weighted form, one test sample after another."""
    found = []
    for test in tests:
        bound = (weights @ losses + test) / (weights.sum() + test)
        found.append(float(lambdas[np.argmax(bound <= ALPHA)]))
    return found


class Told(RegressorMixin, BaseEstimator):
    """A regressor whose prediction is its first column, so that a peer's own work is all that is timed."""

    def fit(self, x: NDArray, y: NDArray) -> "Told":
        self.n_features_in_ = x.shape[1]
        return self

    def predict(self, x: NDArray) -> NDArray:
        return x[:, 0]


class ToldChances(ClassifierMixin, BaseEstimator):
    """A classifier whose probabilities are its columns."""

    def fit(self, x: NDArray, y: NDArray) -> "ToldChances":
        self.classes_, self.n_features_in_ = np.arange(x.shape[1]), x.shape[1]
        return self

    def predict_proba(self, x: NDArray) -> NDArray:
        return x

    def predict(self, x: NDArray) -> NDArray:
        return x.argmax(1)


def contests() -> list[tuple[str, Callable[[], object], Callable[[], object]]]:
    """Name, what a peer does, and what we do, on the same input."""
    from crepes import WrapRegressor
    from lifelines import KaplanMeierFitter
    from mapie.classification import SplitConformalClassifier
    from mapie.regression import SplitConformalRegressor
    from sklearn.calibration import _TemperatureScaling

    rng = np.random.default_rng(0)
    known, new = rng.normal(size=(2, PEER_ROWS, 1))
    y = known[:, 0] + rng.normal(size=PEER_ROWS)
    logits = 2 * rng.normal(size=(2, PEER_ROWS, CLASSES))
    chances = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    labels = (chances[0].cumsum(1) > rng.random((PEER_ROWS, 1))).argmax(1)
    u, rows = rng.random((2, PEER_ROWS)), np.arange(PEER_ROWS)
    time, event = rng.exponential(10, PEER_ROWS), rng.random(PEER_ROWS) < 0.6

    def crepes() -> object:
        model = WrapRegressor(Told().fit(known, y))
        model.calibrate(known, y)
        return model.predict_int(new, confidence=1 - ALPHA)

    def mapie() -> object:
        model = SplitConformalRegressor(Told().fit(known, y), confidence_level=1 - ALPHA, prefit=True)
        return model.conformalize(known, y).predict_interval(new)

    def mapie_sets(score: str) -> Callable[[], object]:
        def run() -> object:
            model = SplitConformalClassifier(
                ToldChances().fit(chances[0], labels), confidence_level=1 - ALPHA, prefit=True, conformity_score=score
            )
            return model.conformalize(chances[0], labels).predict_set(chances[1])

        return run

    def interval() -> object:
        return split_interval(new[:, 0], y - known[:, 0], ALPHA)

    def smallest() -> object:
        scores = threshold_scores(chances[0])[rows, labels]
        return threshold_scores(chances[1]) <= quantile(scores, ALPHA)

    def adaptive() -> object:
        scores = set_scores(chances[0], u[0])[rows, labels]
        return set_scores(chances[1], u[1]) <= quantile(scores, ALPHA)

    return [
        ("intervals, against crepes", crepes, interval),
        ("intervals, against MAPIE", mapie, interval),
        ("smallest sets, against MAPIE", mapie_sets("lac"), smallest),
        ("adaptive sets, against MAPIE", mapie_sets("aps"), adaptive),
        (
            "a temperature, against scikit-learn",
            lambda: _TemperatureScaling().fit(logits[0], labels),
            lambda: temperature(logits[0], labels),
        ),
        (
            "Kaplan-Meier, against lifelines",
            lambda: KaplanMeierFitter().fit(time, event),
            lambda: kaplan_meier(time, event),
        ),
    ]


def against_peers() -> list[dict[str, str | float]]:
    """How many times as fast as each peer, median over rounds."""
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, peer, ours in contests():
            ratios = [seconds(peer) / seconds(ours) for _ in range(ROUNDS)]
            found.append(
                {"name": name, "ratio": statistics.median(ratios[1:]), "target": ">= 1", "unit": "times faster"}
            )
    return found


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds), target and unit of each comparison."""
    rng = np.random.default_rng(0)
    losses = np.sort(rng.random((SAMPLES, GRID)), axis=1)[:, ::-1].copy()
    losses[:, -1] = 0
    lambdas, weights, tests = np.linspace(0, 1, GRID), rng.random(SAMPLES), rng.random(TESTS)
    assert conformal_risk_control(losses, lambdas, alpha=ALPHA) == by_hand(losses, lambdas)
    arguments = (losses, lambdas, weights, tests)
    assert weighted_conformal_risk_control(*arguments, alpha=ALPHA).tolist() == sample_by_sample(*arguments)

    plain, weighted = [], []
    for _ in range(ROUNDS + 1):  # they take turns, so that a busy machine slows all
        ours = seconds(lambda: conformal_risk_control(losses, lambdas, alpha=ALPHA))
        plain.append(ours / seconds(lambda: by_hand(losses, lambdas)))
        slow = seconds(lambda: sample_by_sample(*arguments))
        weighted.append(slow / seconds(lambda: weighted_conformal_risk_control(*arguments, alpha=ALPHA)))
    return [
        {
            "name": "lambda of a million losses, against two lines of numpy",
            "ratio": statistics.median(plain[1:]),  # the first round warms up
            "target": "<= 15",
            "unit": "times its time",
        },
        {
            "name": "lambdas of 500 weighted test samples, against one after another",
            "ratio": statistics.median(weighted[1:]),
            "target": ">= 10",
            "unit": "times faster",
        },
        *against_peers(),
    ]
