"""Conformal parts cover as often as theory says, from both sides, and agree with MAPIE and crepes where these do.

A resample draws calibration rows and one new row, so the number of resamples in which the new row is covered is
binomial with the exact probability k / (n + 1), k = ceil((n + 1)(1 - alpha)).
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import betabinom, binom
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin

from lossary.uncertainty import (
    conformal_risk_control,
    conformalize_quantiles,
    quantile_risk_control,
    weighted_conformal_risk_control,
)
from lossary.uncertainty._conformal import (
    lower_quantile,
    p_values,
    quantile,
    set_scores,
    split_interval,
    threshold_scores,
)
from lossary.uncertainty._quantile import conformal_shift

RESAMPLES = 1000
SIZES = [(4, "0.1"), (9, "0.1"), (24, "0.05"), (50, "0.1"), (50, "0.3"), (99, "0.2")]  # the first below 1 / alpha
LABELS = 6


def chance(n, alpha):
    """Of covering, with scores that do not tie."""
    return min(Fraction(math.ceil((n + 1) * (1 - Fraction(alpha))), n + 1), 1)


def in_band(hits, n, alpha, *, ties=False):
    """Within the central 99.99% of the binomial; scores that tie may only cover more often than asked."""
    low, high = binom.interval(0.9999, len(hits), float(1 - Fraction(alpha) if ties else chance(n, alpha)))
    assert low <= sum(hits) <= (len(hits) if ties else high)


def by_quantile(scores, new, alpha):
    return new <= quantile(scores, alpha)


def by_lower_quantile(scores, new, alpha):
    return -new >= lower_quantile(-scores, alpha)


def by_p_value(scores, new, alpha):
    return p_values(new, scores) > alpha


def by_interval(scores, new, alpha):
    low, high = split_interval(np.array([7.0]), -scores, alpha)[0]
    return low <= 7 - new and 7 + new <= high


def by_pair(scores, new, alpha):
    shift = conformal_shift(-1 - scores, 1 - scores, np.zeros(len(scores)), alpha)  # scores: 1 - s above, s - 1 below
    return -1 - new - shift <= 0 <= 1 - new + shift


def by_quantiles(scores, new, alpha):
    """Quantile pairs off their targets by the score, downwards."""
    bands = np.stack([-1 - scores, 1 - scores], axis=1)
    low, high = conformalize_quantiles(
        bands, np.zeros(len(scores)), np.array([[-1 - new, 1 - new]]), levels=(alpha / 2, 1 - alpha / 2)
    )[0]
    return low <= 0 <= high


def by_risk_control(scores, new, alpha):
    grid = np.concatenate([[-1.0], np.unique(scores), [1e9]])
    return new <= conformal_risk_control(scores[:, None] > grid, grid, alpha=alpha)


def by_weighted_risk_control(scores, new, alpha):
    grid = np.concatenate([[-1.0], np.unique(scores), [1e9]])
    even = np.ones(len(scores))
    return new <= weighted_conformal_risk_control(scores[:, None] > grid, grid, even, [1.0], alpha=alpha)


def by_quantile_control(scores, new, alpha):
    grid = np.concatenate([[-1.0], np.unique(scores), [1e9]])
    return new <= quantile_risk_control(scores[:, None] - grid, grid, alpha=0.0, beta=1 - alpha)


COVERS = [
    by_quantile,
    by_lower_quantile,
    by_p_value,
    by_interval,
    by_pair,
    by_quantiles,
    by_risk_control,
    by_weighted_risk_control,
    by_quantile_control,
]


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("covers", COVERS, ids=lambda f: f.__name__[3:])
def test_coverage_is_in_its_binomial_band(covers, ties):
    rng = np.random.default_rng(0)
    for n, alpha in SIZES:
        draws = rng.integers(0, 4, (RESAMPLES, n + 1)) / 1.0 if ties else rng.exponential(size=(RESAMPLES, n + 1))
        hits = [bool(covers(row[:-1], row[-1], float(alpha))) for row in draws]
        in_band(hits, n, alpha, ties=ties)


def test_coverage_given_the_calibration_rows_is_beta_binomial():
    """500 calibration sets, 200 new rows each: by Kolmogorov-Smirnov, at a level of 1e-4 for each n and alpha."""
    rng = np.random.default_rng(1)
    for n, alpha in SIZES[1:]:
        k = math.ceil((n + 1) * (1 - Fraction(alpha)))
        hits = [(rng.random(200) <= quantile(rng.random(n), float(alpha))).sum() for _ in range(500)]
        distance = np.abs(
            np.searchsorted(np.sort(hits), np.arange(201), side="right") / 500
            - betabinom.cdf(np.arange(201), 200, k, n + 1 - k)
        ).max()
        assert distance < math.sqrt(math.log(2 / 1e-4) / 2 / 500)


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_random_p_values_are_exact_whatever_the_ties_and_however_few(n, alpha):
    rng = np.random.default_rng(2)
    draws = rng.integers(0, 3, (RESAMPLES, n + 1))
    values = np.array([p_values(row[-1], row[:-1], rng.random()) for row in draws])
    low, high = binom.interval(0.9999, RESAMPLES, float(1 - Fraction(alpha)))
    assert low <= (values > float(alpha)).sum() <= high


def draw_labels(rng, rows, sharpness=1.0):
    """Probabilities in 64ths, so that some tie and some are 0, and labels that they describe."""
    probabilities = rng.multinomial(64, rng.dirichlet(np.full(LABELS, sharpness), rows)) / 64
    labels = (rng.random((rows, 1)) > probabilities.cumsum(1)).sum(1)
    return probabilities, labels


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_adaptive_sets_with_random_shares_cover_exactly(n, alpha):
    rng = np.random.default_rng(3)
    probabilities, labels = draw_labels(rng, RESAMPLES * (n + 1))
    scores = set_scores(probabilities, rng.random(len(labels)))
    own = np.take_along_axis(scores, labels[:, None], 1).reshape(RESAMPLES, n + 1)
    in_band([row[-1] <= quantile(row[:-1], float(alpha)) for row in own], n, alpha)


@pytest.mark.parametrize(("n", "alpha"), SIZES)
def test_threshold_sets_cover_at_least_and_with_random_p_values_exactly(n, alpha):
    rng = np.random.default_rng(4)
    probabilities, labels = draw_labels(rng, RESAMPLES * (n + 1))
    own = np.take_along_axis(threshold_scores(probabilities), labels[:, None], 1).reshape(RESAMPLES, n + 1)
    in_band([row[-1] <= quantile(row[:-1], float(alpha)) for row in own], n, alpha, ties=True)
    values = np.array([p_values(row[-1], row[:-1], rng.random()) for row in own])
    low, high = binom.interval(0.9999, RESAMPLES, float(1 - Fraction(alpha)))
    assert low <= (values > float(alpha)).sum() <= high


def test_adaptive_scores_by_hand():
    probabilities = np.array([[0.25, 0.5, 0.25]])
    assert set_scores(probabilities, np.ones(1)).tolist() == [[0.75, 0.5, 1.0]]
    assert set_scores(probabilities, np.zeros(1)).tolist() == [[0.5, 0.0, 0.75]]
    assert set_scores(probabilities, np.full(1, 0.5)).tolist() == [[0.625, 0.25, 0.875]]
    assert p_values(np.array([1.0, 2.0, 9.0]), np.array([1.0, 2.0, 2.0, 3.0])).tolist() == [1.0, 0.8, 0.2]
    assert p_values(2.0, np.array([1.0, 2.0, 2.0, 3.0]), 0.5) == (1 + 0.5 * 3) / 5
    assert lower_quantile(np.arange(1.0, 20), 0.1) == 2
    assert lower_quantile(np.arange(1.0, 9), 0.1) == -np.inf
    assert np.isinf(split_interval(np.zeros(1), np.ones(8), 0.1)).all()


class GivenProbabilities(ClassifierMixin, BaseEstimator):
    """Probabilities are the features, as a classifier for MAPIE."""

    def fit(self, X, y):
        self.classes_ = np.arange(LABELS)
        self.n_features_in_ = LABELS
        return self

    def predict_proba(self, X):
        return X

    def predict(self, X):
        return X.argmax(1)


class GivenPrediction(RegressorMixin, BaseEstimator):
    """A column of the features is the prediction."""

    def __init__(self, column=0):
        self.column = column

    def fit(self, X, y=None):
        self.n_features_in_ = X.shape[1]
        return self

    def predict(self, X):
        return X[:, self.column]


def rows_of_labels(rng, rows):
    """Probabilities with no ties and no zeros."""
    probabilities = rng.dirichlet(np.ones(LABELS), rows)
    return probabilities, (rng.random((rows, 1)) > probabilities.cumsum(1)).sum(1)


def mapie_sets(score, calibration, labels, new, alpha, **how):
    from mapie.classification import SplitConformalClassifier

    model = GivenProbabilities().fit(calibration, labels)
    conformal = SplitConformalClassifier(model, 1 - alpha, prefit=True, conformity_score=score, random_state=0)
    sets = conformal.conformalize(calibration, labels).predict_set(new, conformity_score_params=how)[1]
    return sets[:, :, 0]


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
def test_threshold_sets_are_those_of_mapie_and_crepes(alpha):
    from crepes import ConformalClassifier

    rng = np.random.default_rng(5)
    (calibration, labels), (new, _) = rows_of_labels(rng, 500), rows_of_labels(rng, 400)
    own = np.take_along_axis(threshold_scores(calibration), labels[:, None], 1)[:, 0]
    ours = threshold_scores(new) <= quantile(own, alpha)
    assert np.array_equal(ours, mapie_sets("lac", calibration, labels, new, alpha))
    crepes = ConformalClassifier().fit(own)
    assert np.array_equal(ours, crepes.predict_set(threshold_scores(new), confidence=1 - alpha, smoothing=False) == 1)
    np.testing.assert_allclose(
        p_values(threshold_scores(new), own), crepes.predict_p(threshold_scores(new), smoothing=False), atol=1e-12
    )


def test_adaptive_sets_are_exact_where_mapies_usual_ones_cover_too_much():
    """On 4000 new rows; MAPIE's default includes the label that crosses the threshold, and so covers about 94%."""
    rng = np.random.default_rng(6)
    (calibration, labels), (new, true) = rows_of_labels(rng, 4000), rows_of_labels(rng, 4000)
    own = np.take_along_axis(set_scores(calibration, rng.random(4000)), labels[:, None], 1)[:, 0]
    ours = set_scores(new, rng.random(4000)) <= quantile(own, 0.1)
    usual = mapie_sets("aps", calibration, labels, new, 0.1, include_last_label=True)
    randomised = mapie_sets("aps", calibration, labels, new, 0.1, include_last_label="randomized")
    covered = [100 * sets[np.arange(4000), true].mean() for sets in (ours, usual, randomised)]
    assert abs(covered[0] - 90) < 2  # binomial and calibration: 4 standard errors are 2.7
    assert abs(covered[2] - 90) < 2
    assert covered[1] > 93
    assert ours.sum() < 0.95 * usual.sum()
    assert abs(ours.sum() / randomised.sum() - 1) < 0.02
    # Its threshold comes from random shares as ours does, but new labels enter by where their own mass begins.
    begins, ends = set_scores(new, np.zeros(4000)), set_scores(new, np.ones(4000))
    assert begins[usual].max() < begins[~usual].min()
    assert begins[usual].max() < quantile(own, 0.1) + 0.01
    assert begins[~usual].min() > quantile(own, 0.1) - 0.01
    assert not (randomised & ~usual).any()
    assert ends[randomised].max() > quantile(own, 0.1)


@pytest.mark.parametrize(("n", "alpha"), [(40, 0.1), (200, 0.05), (333, 0.3)])
def test_intervals_are_those_of_mapie_and_crepes(n, alpha):
    from crepes import ConformalRegressor
    from mapie.regression import ConformalizedQuantileRegressor, SplitConformalRegressor

    rng = np.random.default_rng(n)
    X, y, new = np.sort(rng.normal(size=(n, 3))), rng.normal(size=n), np.sort(rng.normal(size=(50, 3)))
    ours = split_interval(new[:, 0], y - X[:, 0], alpha)
    mapie = SplitConformalRegressor(GivenPrediction().fit(X), 1 - alpha, prefit=True).conformalize(X, y)
    np.testing.assert_allclose(ours, mapie.predict_interval(new)[1][:, :, 0], atol=1e-6)
    crepes = ConformalRegressor().fit(y - X[:, 0]).predict_int(new[:, 0], confidence=1 - alpha)
    np.testing.assert_allclose(ours, crepes, atol=1e-6)

    bands = [0, 2, 1]  # MAPIE wants lower, upper and median models
    given = [GivenPrediction(column).fit(X) for column in bands]
    cqr = ConformalizedQuantileRegressor(given, 1 - alpha, prefit=True).conformalize(X, y)
    theirs = cqr.predict_interval(new, symmetric_correction=True)[1][:, :, 0]
    levels = (alpha / 2, 0.5, 1 - alpha / 2)
    np.testing.assert_allclose(conformalize_quantiles(X, y, new, levels=levels)[:, [0, 2]], theirs, atol=1e-6)


def test_tensors_are_answered_in_kind():
    band = torch.tensor([[0.0, 1.0, 2.0]] * 19, dtype=torch.float64)
    target = torch.arange(19, dtype=torch.float64) / 4
    got = conformalize_quantiles(band, target, band[:1], levels=(0.1, 0.5, 0.9))
    assert got.tolist() == [[-1.75, 1.0, 3.75]]  # rank 16 of max(y - 2, -y): 15 / 4 - 2
