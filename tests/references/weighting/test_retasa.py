"""ReTaSA against a small linear system on categories, an exact solution on normal data, and what shifts nothing."""

import math

import numpy as np
import pytest
from scipy import stats
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression, LogisticRegression

from lossary.weighting import ReTaSAWeights, nadaraya_watson_operator


def test_the_operator_is_kernel_regression():
    rng = np.random.default_rng(0)
    points, at, values, width = rng.normal(size=(9, 2)), rng.normal(size=(4, 2)), rng.normal(size=9), (0.7, 1.6)
    found = nadaraya_watson_operator(points, at, bandwidth=width) @ values
    for place, smooth in zip(at, found):
        k = [math.prod(stats.norm(place[j], width[j]).pdf(p[j]) for j in (0, 1)) for p in points]
        assert smooth == pytest.approx(math.fsum(k * values) / math.fsum(k), rel=1e-10)


def test_far_from_all_points_the_nearest_decides():
    assert nadaraya_watson_operator([[0.0], [1.0]], [[1e8]], bandwidth=0.1).tolist() == [[0.0, 1.0]]


COUNTS = np.array([[30, 10], [8, 12], [2, 38]])  # rows with x = 0, 1, 2 (down) and y = 0, 1 (across)


def categories(counts):
    x = np.repeat(np.arange(3.0), counts.sum(1))
    return x[:, None], np.concatenate([np.repeat([0.0, 1.0], row) for row in counts])


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 2.0])
def test_on_categories_it_solves_the_system_of_conditional_frequencies(alpha):
    """Kernels far narrower than the gaps average over equal x or equal y."""
    x, y = categories(COUNTS)
    new = np.array([25, 25, 70])  # of 120
    found = ReTaSAWeights(alpha=alpha, bandwidth=1e-3).fit(x, y, np.repeat(np.arange(3.0), new)[:, None])
    given_x, given_y = COUNTS / COUNTS.sum(1, keepdims=True), (COUNTS / COUNTS.sum(0)).T
    eta = (new / 120) / (COUNTS.sum(1) / 100) - 1
    rho = np.linalg.solve(alpha * np.eye(2) + given_y @ given_x, given_y @ eta)
    expected = (1 + rho) / (COUNTS.sum(0) @ (1 + rho) / 100)
    assert found.predict([0.0, 1.0]) == pytest.approx(expected, rel=1e-6)
    assert found.weights_ == pytest.approx(expected[y.astype(int)], rel=1e-6)
    assert found.weights_.mean() == pytest.approx(1, abs=1e-12)


def test_on_categories_it_finds_the_weights_that_made_the_shift():
    x, y = categories(COUNTS)
    new = COUNTS @ [1, 4]  # four times as many of y = 1
    found = ReTaSAWeights(alpha=1e-7, bandwidth=1e-3).fit(x, y, np.repeat(np.arange(3.0), new)[:, None])
    assert found.predict([0.0, 1.0]) == pytest.approx(np.array([1, 4]) / 2.8, rel=1e-5)


def test_no_shift_gives_equal_weights_and_a_large_alpha_shrinks_to_them():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 2)), rng.normal(size=60)
    assert ReTaSAWeights().fit(x, y, np.tile(x, (3, 1))).weights_ == pytest.approx(np.ones(60), abs=1e-9)
    shifted = ReTaSAWeights(alpha=1e6).fit(x, y, x + 1).weights_
    assert shifted == pytest.approx(np.ones(60), abs=1e-4)
    assert np.ptp(ReTaSAWeights().fit(x, y, x + 1).weights_) > 0.1


def test_weights_at_new_targets_continue_those_at_the_source_rows():
    rng = np.random.default_rng(2)
    y = rng.normal(size=80)
    found = ReTaSAWeights().fit(y[:, None] + rng.normal(size=(80, 1)), y, rng.normal(1, 1, (50, 1)))
    assert found.predict(y) == pytest.approx(found.weights_, rel=1e-8, abs=1e-10)
    assert found.weights_.min() >= 0


def shifted_normals(seed=3, n=800):
    rng = np.random.default_rng(seed)
    y, y_new = rng.normal(0, 1, n), rng.normal(0.7, 0.8, n)
    x, x_new = (v[:, None] + rng.normal(0, 0.5, (n, 1)) for v in (y, y_new))
    return x, y, x_new, y_new, stats.norm(0.7, 0.8).pdf(y) / stats.norm().pdf(y)


def test_weights_come_near_the_density_ratio_of_normals():
    x, y, x_new, _, truth = shifted_normals()
    found = ReTaSAWeights().fit(x, y, x_new).weights_
    assert np.mean((found - truth) ** 2) < 0.1 * np.mean((1 - truth) ** 2)
    # the population's own regularised solution tends to the truth; the target's mean follows from the weights
    assert np.mean(found * y) == pytest.approx(0.7, abs=0.1)


def test_a_classifier_may_supply_the_ratio_and_a_regression_takes_the_weights():
    x, y, x_new, y_new, truth = shifted_normals()
    features = lambda v: np.hstack([v, v**2])  # noqa: E731
    odds = LogisticRegression(C=1e3).fit(features(np.vstack([x, x_new])), np.repeat([0, 1], 800))
    found = ReTaSAWeights().fit(x, y, x_new, ratio=np.exp(odds.decision_function(features(x))))
    assert np.mean((found.weights_ - truth) ** 2) < 0.1 * np.mean((1 - truth) ** 2)
    weighted = LinearRegression().fit(x, y, sample_weight=found.weights_).predict(x_new)
    plain = LinearRegression().fit(x, y).predict(x_new)
    assert np.mean((weighted - y_new) ** 2) < 0.97 * np.mean((plain - y_new) ** 2)


def test_targets_from_nowhere_near_leave_equal_weights():
    x, y = np.arange(12.0)[:, None], np.arange(12.0)
    assert ReTaSAWeights().fit(x, y, x + 1e6).weights_ == pytest.approx(np.ones(12), abs=1e-9)
    constant = ReTaSAWeights().fit(np.ones((6, 1)), np.ones(6), np.ones((3, 1)))
    assert constant.weights_ == pytest.approx(np.ones(6))


def test_refusals_and_conventions():
    x, y = np.arange(6.0)[:, None], np.arange(6.0)
    with pytest.raises(NotFittedError):
        ReTaSAWeights().predict(y)
    with pytest.raises(ValueError, match="alpha: expected a number > 0, got 0"):
        ReTaSAWeights(alpha=0.0).fit(x, y, x)
    with pytest.raises(ValueError, match="bandwidth: expected a number > 0, got -1"):
        ReTaSAWeights(bandwidth=-1.0).fit(x, y, x)
    with pytest.raises(ValueError, match="X_target: expected 1 features"):
        ReTaSAWeights().fit(x, y, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        ReTaSAWeights().fit(x, y[:-1], x)
    with pytest.raises(ValueError, match="NaN"):
        ReTaSAWeights().fit(x, y * np.nan, x)
    with pytest.raises(ValueError, match="ratio: expected 6 numbers >= 0"):
        ReTaSAWeights().fit(x, y, x, ratio=-np.ones(6))
    with pytest.raises(ValueError, match="bandwidth: expected a number > 0 or 1 of them"):
        nadaraya_watson_operator(x, x, bandwidth=[1.0, 2.0])
    with pytest.raises(ValueError, match="at: expected 1 features"):
        nadaraya_watson_operator(x, np.zeros((3, 2)), bandwidth=1.0)
    assert clone(ReTaSAWeights(alpha=0.2)).get_params() == {"alpha": 0.2, "bandwidth": 2.0}
