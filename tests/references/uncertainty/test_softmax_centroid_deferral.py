"""Centroid deferral against a loop over samples, scikit-learn's nearest centroid, and worked and degenerate cases."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from lossary.uncertainty import CentroidDeferral


def drawn(n=300, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    p = softmax(3 * rng.standard_normal((n, classes)), axis=1)
    return p, (p.cumsum(1) > rng.random((n, 1))).argmax(1)


def test_everything_sample_by_sample():
    p, y = drawn()
    new, _ = drawn(seed=1)
    centroids, thresholds = [], []
    for c in range(4):
        right = [row for row, label in zip(p, y) if max(row) == row[c] and label == c]
        centroids.append([sum(row[k] for row in right) / len(right) for k in range(4)])
        wrong = [math.dist(row, centroids[c]) for row, label in zip(p, y) if max(row) == row[c] and label != c]
        thresholds.append(min(wrong))
    deferral = CentroidDeferral().fit(p, y)
    np.testing.assert_allclose(deferral.thresholds_, thresholds, rtol=1e-12)
    for row, got, distance, margin in zip(
        new, deferral.predict(new), deferral.anomaly_score(new), deferral.decision_function(new)
    ):
        c = max(range(4), key=lambda k, row=row: row[k])
        assert distance == pytest.approx(math.dist(row, centroids[c]), rel=1e-12)
        assert margin == pytest.approx(thresholds[c] - distance, rel=1e-9)
        assert got == (c if distance < thresholds[c] else -1)


def test_centroids_are_scikit_learns_on_the_correct_samples():
    p, y = drawn()
    right = p.argmax(1) == y
    expected = NearestCentroid().fit(p[right], y[right]).centroids_
    np.testing.assert_allclose(CentroidDeferral().fit(p, y).centroids_, expected, rtol=1e-12)


def test_no_error_of_the_samples_that_set_the_threshold_is_accepted():
    p, y = drawn(3000)
    got = CentroidDeferral().fit(p, y).predict(p)
    assert (got[got >= 0] == y[got >= 0]).all()
    assert (got >= 0).sum() > 4


def test_thresholds_from_other_samples_leave_the_centroids():
    p, y = drawn()
    other, labels = drawn(seed=5)
    deferral = CentroidDeferral().fit(p, y)
    centroids = deferral.centroids_.copy()
    deferral.fit_thresholds(other, labels)
    assert np.array_equal(deferral.centroids_, centroids)
    wrong = other.argmax(1) != labels
    distances = np.linalg.norm(other - centroids[other.argmax(1)], axis=1)
    assert deferral.thresholds_[2] == distances[wrong & (other.argmax(1) == 2)].min()


def test_a_class_without_errors_accepts_all_or_what_was_seen():
    p = [[0.9, 0.1], [0.7, 0.3], [0.1, 0.9], [0.2, 0.8], [0.4, 0.6]]
    everything = CentroidDeferral().fit(p, [0, 0, 1, 1, 1])
    assert everything.thresholds_.tolist() == [math.inf, math.inf]
    assert everything.predict([[0.51, 0.49], [0.0, 1.0]]).tolist() == [0, 1]
    seen = CentroidDeferral(without_errors="seen").fit(p, [0, 0, 1, 1, 1])
    np.testing.assert_allclose(seen.thresholds_, math.sqrt(2) * np.array([0.1, 2.3 / 3 - 0.6]), rtol=1e-12)
    assert seen.predict([[0.75, 0.25], [0.95, 0.05], [0.3, 0.7]]).tolist() == [0, -1, 1]  # surer than all is strange


def test_a_class_never_predicted_right_is_always_deferred():
    p = [[0.9, 0.1, 0.0], [0.8, 0.1, 0.1], [0.3, 0.6, 0.1]]
    for without_errors in ("all", "seen"):
        deferral = CentroidDeferral(without_errors=without_errors).fit(p, [0, 0, 2])
        assert deferral.thresholds_[1:].tolist() == [0.0, 0.0]
        assert deferral.predict([[0.0, 1.0, 0.0], [0.1, 0.1, 0.8], [0.85, 0.1, 0.05]])[:2].tolist() == [-1, -1]
        assert deferral.anomaly_score([[0.0, 1.0, 0.0]]).tolist() == [math.sqrt(2)]
        assert deferral.decision_function([[0.0, 1.0, 0.0]]).tolist() == [-math.sqrt(2)]


def test_scikit_learn_drives_it_and_tensors_do():
    p, y = drawn()
    folds = cross_val_predict(CentroidDeferral(), p, y, cv=KFold(3))
    np.testing.assert_array_equal(folds[:100], clone(CentroidDeferral()).fit(p[100:], y[100:]).predict(p[:100]))
    logits = np.log(p)
    pipeline = make_pipeline(FunctionTransformer(softmax, kw_args={"axis": 1}), CentroidDeferral()).fit(logits, y)
    expected = CentroidDeferral().fit(torch.from_numpy(p), torch.from_numpy(y)).predict(torch.from_numpy(p))
    np.testing.assert_array_equal(pipeline.predict(logits), expected)
    CentroidDeferral().fit(torch.from_numpy(p).bfloat16(), y)  # rows that sum to 1 within its digits


def test_refusals_name_the_argument():
    p, y = drawn()
    with pytest.raises(NotFittedError):
        CentroidDeferral().predict(p)
    with pytest.raises(ValueError, match=r"probabilities: expected rows of numbers >= 0 with sum 1; logits go"):
        CentroidDeferral().fit(np.log(p), y)
    with pytest.raises(ValueError, match=r"probabilities: contains NaN"):
        CentroidDeferral().fit(p * np.nan, y)
    with pytest.raises(ValueError, match=r"labels: expected classes 0 to 3"):
        CentroidDeferral().fit(p, y + 1)
    with pytest.raises(ValueError, match=r"X has 2 features, but CentroidDeferral is expecting 4 features"):
        CentroidDeferral().fit(p, y).predict([[0.5, 0.5]])
    with pytest.raises(ValueError, match=r"without_errors: expected one of 'all', 'seen', got 'none'"):
        CentroidDeferral(without_errors="none").fit(p, y)
