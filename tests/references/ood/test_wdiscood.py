"""WDiscOOD against scikit-learn's discriminant analysis and a row-by-row rendering of the paper's steps."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power, null_space
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.ood import WDiscOOD, whitened_lda


@pytest.fixture
def sample():
    """Four classes of different size in 6 dimensions with one crooked covariance, and rows to rate."""
    rng = np.random.default_rng(0)
    labels = rng.choice(4, p=[0.4, 0.3, 0.2, 0.1], size=120)
    crooked = rng.standard_normal((6, 6))
    features = 3 * rng.standard_normal((4, 6))[labels] + rng.standard_normal((120, 6)) @ crooked
    return features, labels, 5 * rng.standard_normal((15, 6))


def by_hand(features, labels, row, weight, kept):
    """Distances of one row by the symmetric root of the scatter and an explicit basis of the residual space."""
    mean, classes = features.mean(0), np.unique(labels)
    share = np.array([np.mean(labels == c) for c in classes])
    means = np.stack([features[labels == c].mean(0) for c in classes])
    within = sum(s * np.cov(features[labels == c].T, bias=True) for s, c in zip(share, classes))
    white = fractional_matrix_power(within, -0.5)
    scatter = sum(s * np.outer(white @ (m - mean), white @ (m - mean)) for s, m in zip(share, means))
    q = np.linalg.svd(scatter)[0][:, :kept]
    rest = null_space(q.T)
    to_class = min(np.linalg.norm(q.T @ white @ (row - m)) for m in means)
    return to_class + weight * np.linalg.norm(rest.T @ white @ (row - mean))


@pytest.mark.parametrize(("weight", "discriminants"), [(5.0, None), (0.7, 2), (1.0, 1)])
def test_score_is_the_papers_row_by_row(sample, weight, discriminants):
    features, labels, rows = sample
    expected = [by_hand(features, labels, row, weight, discriminants or 3) for row in rows]
    got = WDiscOOD(weight=weight, discriminants=discriminants).fit(features, labels).anomaly_score(rows)
    np.testing.assert_allclose(got, expected, rtol=1e-8)


def test_discriminants_are_scikit_learns(sample):
    features, labels, _ = sample
    peer = LinearDiscriminantAnalysis(solver="eigen").fit(features, labels)
    directions, fisher = whitened_lda(features, labels)
    assert directions.shape == (6, 3)
    theirs = peer.scalings_[:, :3]
    np.testing.assert_allclose(directions * np.sign((directions * theirs).sum(0)), theirs, rtol=1e-7)
    np.testing.assert_allclose(fisher / fisher.sum(), peer.explained_variance_ratio_, rtol=1e-7)
    assert whitened_lda(*(torch.from_numpy(a) for a in (features, labels)))[0].dtype is torch.float64


def test_a_ridge_bounds_what_a_flat_direction_says(sample):
    features, labels, rows = sample
    flat, away = (np.column_stack([x, np.full(len(x), v)]) for x, v in ((features, 7.0), (rows, 9.0)))
    plain = WDiscOOD().fit(features, labels)
    np.testing.assert_allclose(WDiscOOD().fit(flat, labels).anomaly_score(away), plain.anomaly_score(rows), rtol=1e-8)
    ridged, with_flat = WDiscOOD(ridge=0.5).fit(features, labels), WDiscOOD(ridge=0.5).fit(flat, labels)
    squares = with_flat.distances(away)[1] ** 2 - ridged.distances(rows)[1] ** 2
    np.testing.assert_allclose(squares, (9.0 - 7.0) ** 2 / 0.5, rtol=1e-8)


def test_one_class_leaves_the_residual_alone(sample):
    features, _, rows = sample
    detector = WDiscOOD(weight=2.0).fit(features, np.zeros(120, dtype=int))
    to_class, to_all = detector.distances(rows)
    precision = np.linalg.inv(np.cov(features.T, bias=True))
    apart = rows - features.mean(0)
    assert (to_class == 0).all()
    np.testing.assert_allclose(to_all, np.sqrt(np.einsum("nd,de,ne->n", apart, precision, apart)), rtol=1e-8)
    np.testing.assert_allclose(detector.anomaly_score(rows), 2 * to_all)


def test_classes_with_one_mean_have_no_discriminants(sample):
    features, _, rows = sample
    mirrored = 0.1 + np.concatenate([features[:40], -features[:40], 2 * features[40:], -2 * features[40:]])
    labels = np.repeat([0, 1], [80, 160])
    assert whitened_lda(mirrored, labels)[0].shape == (6, 0)  # rounding is no difference
    assert (WDiscOOD().fit(mirrored, labels).distances(rows)[0] == 0).all()


def test_in_a_pipeline_scaling_changes_nothing(sample):
    features, labels, rows = sample
    piped = make_pipeline(StandardScaler(), WDiscOOD()).fit(features, labels)
    direct = WDiscOOD().fit(features, labels)
    np.testing.assert_allclose(piped.score_samples(rows), direct.score_samples(rows), rtol=1e-8)


def test_refusals_name_the_argument(sample):
    features, labels, _ = sample
    with pytest.raises(ValueError, match=r"discriminants: expected a whole number >= 1 and <= 3, got 4"):
        WDiscOOD(discriminants=4).fit(features, labels)
    with pytest.raises(ValueError, match=r"weight: expected a number >= 0, got -1"):
        WDiscOOD(weight=-1.0).fit(features, labels)
    with pytest.raises(ValueError, match=r"features: no variance within classes"):
        WDiscOOD().fit(np.eye(3), [0, 1, 2])
    assert np.isfinite(WDiscOOD(ridge=0.1).fit(np.eye(3), [0, 1, 2]).anomaly_score(np.ones((1, 3)))).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees(sample):
    features, labels, rows = (torch.from_numpy(a) for a in sample)
    expected = WDiscOOD().fit(features, labels).anomaly_score(rows)
    got = WDiscOOD().fit(features.cuda(), labels.cuda()).anomaly_score(rows.cuda())
    torch.testing.assert_close(got.cpu(), expected)
