"""The calibration engine against scikit-learn, closed forms, and its definitions read out slowly."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.calibration import CalibratedClassifierCV, calibration_curve
from sklearn.frozen import FrozenEstimator

from lossary.uncertainty._calibration import (
    LARGEST,
    area_under_risk_coverage,
    calibrated,
    expected_calibration_error,
    mass_edges,
    temperature,
)


def drawn(n, classes, scale, inverse, seed=0):
    """Logits, and labels from their softmax at a temperature of 1 / inverse."""
    rng = np.random.default_rng(seed)
    logits = scale * rng.standard_normal((n, classes)) + rng.standard_normal((n, 1))
    chances = calibrated(logits, 1 / inverse).cumsum(axis=1)
    return logits, (chances > rng.random((n, 1))).argmax(axis=1)


class Model(ClassifierMixin, BaseEstimator):
    """A classifier whose rows are its logits."""

    def fit(self, X, y):
        self.classes_ = np.arange(X.shape[1])
        return self

    def decision_function(self, X):
        return X

    def predict(self, X):
        return X.argmax(axis=1)


@pytest.mark.parametrize(
    ("n", "classes", "scale", "inverse"), [(9000, 10, 6, 0.2), (500, 3, 2, 3.0), (400, 20, 30, 1.0)]
)
def test_temperature_is_scikit_learns(n, classes, scale, inverse):
    logits, labels = drawn(n, classes, scale, inverse)
    labels[: 5 * classes] = np.arange(5 * classes) % classes  # scikit-learn wants five of each
    model = FrozenEstimator(Model().fit(logits, labels))
    reference = CalibratedClassifierCV(model, method="temperature", ensemble=False).fit(logits, labels)
    found = temperature(torch.from_numpy(logits), torch.from_numpy(labels))
    np.testing.assert_allclose(calibrated(logits, found), reference.predict_proba(logits), rtol=1e-6, atol=1e-12)


def test_temperature_where_the_answer_is_known():
    """Two classes, logits m apart, a share a right: softmax says a at T = m / log(a / (1 - a))."""
    for margin, right in itertools.product((0.01, 1.0, 40.0), (60, 75, 99)):
        logits = np.tile([margin, 0.0], (100, 1))
        labels = (np.arange(100) >= right).astype(int)
        expected = margin / math.log(right / (100 - right))
        assert temperature(logits, labels) == pytest.approx(expected, rel=1e-9)


def test_start_from_a_part_of_many_rows_does_not_matter():
    logits, labels = drawn(20_000, 4, 3, 0.5)
    labels[::4] = logits[::4].argmax(1)  # the part looked at first finds every label on top
    found = temperature(logits, labels)
    step = 1e-4
    losses = [
        -np.log(calibrated(logits, t)[np.arange(20_000), labels]).mean()
        for t in found * np.array([1 - step, 1, 1 + step])
    ]
    assert losses[1] < min(losses[0], losses[2])
    slope = (losses[2] - losses[0]) / (losses[2] + losses[0] - 2 * losses[1])
    assert abs(slope) < 0.05  # the parabola's vertex lies at `found`, to a hundredth of a step


def test_temperature_without_an_inside_minimum():
    logits, _ = drawn(50, 3, 1, 1)
    assert temperature(logits, logits.argmax(1)) == 1 / LARGEST  # every label on top
    assert temperature(logits, logits.argmin(1)) == pytest.approx(LARGEST, rel=1e-5)  # worse than chance
    assert temperature(np.ones((5, 2)), [0, 1, 0, 1, 1]) == 1 / LARGEST  # any temperature is as good


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_calibration_error_bin_by_bin(bins):
    rng = np.random.default_rng(1)
    confidence = rng.integers(0, 31, 400) / 30  # many on the edges between bins
    correct = rng.random(400) < confidence**2
    expected = 0.0
    for i in range(bins):
        inside = (confidence > i / bins) & (confidence <= (i + 1) / bins)
        inside |= (i == 0) & (confidence == 0)
        if inside.any():
            expected += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    assert expected_calibration_error(confidence, correct, bins=bins) == pytest.approx(expected, abs=1e-12)


def test_calibration_error_of_scikit_learns_curve():
    rng = np.random.default_rng(2)
    confidence = rng.permutation(np.linspace(0.005, 0.995, 100))  # ten to each bin, of either kind
    correct = rng.random(100) < 0.5
    for strategy, equal in (("uniform", "width"), ("quantile", "mass")):
        share, mean = calibration_curve(correct, confidence, n_bins=10, strategy=strategy)
        got = expected_calibration_error(confidence, correct, bins=10, equal=equal)
        assert got == pytest.approx(np.abs(share - mean).mean(), abs=1e-12)


def test_mass_edges_keep_ties_together():
    assert mass_edges(np.array([3.0, 1.0, 2.0, 4.0, 5.0]), 2).tolist() == [3.0]
    assert mass_edges(np.array([1.0, 1.0, 1.0, 1.0, 2.0]), 5).tolist() == [1.0]
    assert mass_edges(np.array([1.0, 1.0]), 5).tolist() == []
    assert mass_edges(np.array([0.0, 1.0, 2.0]), 9).tolist() == [0.0, 1.0]


def test_risk_coverage_over_all_orders_of_the_ties():
    confidence = np.array([0.2, 0.9, 0.5, 0.5, 0.5, 0.2])
    wrong = np.array([1, 0, 1, 0, 1, 0])
    total = Fraction(0)
    orders = [o for o in itertools.permutations(range(6)) if all(np.diff(confidence[list(o)]) <= 0)]
    for order in orders:
        total += sum(Fraction(int(wrong[list(order[:k])].sum()), k) for k in range(1, 7)) / 6
    assert area_under_risk_coverage(confidence, 1 - wrong) == pytest.approx(float(total / len(orders)), abs=1e-12)


def test_refusals_name_the_argument():
    good = np.zeros((3, 2))
    with pytest.raises(ValueError, match=r"logits: contains NaN"):
        temperature([[np.nan, 0.0]], [0])
    with pytest.raises(ValueError, match=r"logits: expected at least two classes in the last dimension"):
        temperature(np.zeros((3, 1)), [0, 0, 0])
    with pytest.raises(ValueError, match=r"labels: expected 3 whole numbers, got float64 of shape \(3,\)"):
        temperature(good, np.zeros(3))
    with pytest.raises(ValueError, match=r"labels: expected classes 0 to 1, got 0 to 2"):
        temperature(good, [0, 1, 2])
    with pytest.raises(ValueError, match=r"confidence: expected numbers from 0 to 1, got 0.5 to 1.5"):
        expected_calibration_error([0.5, 1.5], [0, 1])
    with pytest.raises(ValueError, match=r"correct: expected 2 zeros and ones, got shape \(3,\)"):
        area_under_risk_coverage([0.5, 1.5], [0, 1, 1])
    with pytest.raises(ValueError, match=r"equal: expected one of"):
        expected_calibration_error([0.5], [1], equal="size")
