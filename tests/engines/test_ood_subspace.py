"""Covariances of rows and of class means, streamed, against numpy's; and their axes."""

import numpy as np
import pytest
import torch

from lossary.ood._gaussian import merge, moments
from lossary.ood._subspace import between, centre, principal_axes, total


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, p=[0.6, 0.3, 0.1], size=80)
    return 50 + rng.standard_normal((80, 5)) @ rng.standard_normal((5, 5)) + 3 * np.eye(3, 5)[labels], labels


def test_streamed_moments_give_numpys_covariances(sample):
    features, labels = sample
    x, y = torch.from_numpy(features), torch.from_numpy(labels)
    found = merge(moments(x[:30], y[:30], 3), moments(x[30:], y[30:], 3))
    np.testing.assert_allclose(centre(found), features.mean(0))
    np.testing.assert_allclose(total(found), np.cov(features.T, bias=True), rtol=1e-9)
    means = np.stack([features[labels == c].mean(0) for c in range(3)])[labels]
    np.testing.assert_allclose(between(found), np.cov(means.T, bias=True), rtol=1e-9, atol=1e-12)
    apart = features - np.arange(5.0)
    np.testing.assert_allclose(total(found, torch.arange(5.0)), apart.T @ apart / 80, rtol=1e-9)


def test_axes_fall_in_variance_and_rebuild_the_covariance(sample):
    covariance = np.cov(sample[0][:3].T)  # of rank 2
    variance, axes = (t.numpy() for t in principal_axes(torch.from_numpy(covariance)))
    assert (np.diff(variance) <= 0).all()
    assert (variance >= 0).all()
    np.testing.assert_allclose(variance[2:], 0, atol=1e-12)
    np.testing.assert_allclose(axes @ np.diag(variance) @ axes.T, covariance, atol=1e-12)
    np.testing.assert_allclose(axes.T @ axes, np.eye(5), atol=1e-12)
