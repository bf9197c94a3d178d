"""ConjNorm against autograd's Bregman divergence, a slow sum over rows, and von Mises and Fisher's normaliser."""

import math

import numpy as np
import pytest
import torch
from scipy.special import gamma, iv

from lossary.ood import ConjNormDetector, bregman_lq_divergence, importance_partition


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, p=[0.5, 0.3, 0.2], size=60)
    features = rng.standard_normal((60, 5)) + 3 * np.eye(3, 5)[labels]
    features[:, 4] = np.maximum(features[:, 4], 0)  # zeros, as after a ReLU
    return features, labels, rng.standard_normal((12, 5))


@pytest.mark.parametrize("q", [1.4, 2.0, 3.0])
def test_divergence_is_autograds(q):
    g = torch.Generator().manual_seed(0)
    z, mu = (torch.randn(n, 4, generator=g, dtype=torch.float64) for n in (6, 3))

    def phi(x):
        return x.abs().pow(q).sum().pow(2 / q) / 2

    slopes = [torch.autograd.grad(phi(m), m)[0] for m in mu.clone().requires_grad_().unbind()]
    expected = [[phi(row) - phi(m) - (row - m) @ slope for m, slope in zip(mu, slopes)] for row in z]
    got = bregman_lq_divergence(z, mu, q=q)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert got.min() >= 0
    torch.testing.assert_close(bregman_lq_divergence(mu, mu, q=q).diagonal(), torch.zeros(3, dtype=torch.float64))


@pytest.mark.parametrize("partition", ["all", "class"])
@pytest.mark.parametrize(("p", "temperature"), [(2.2, 0.05), (1.5, 0.3), (4.0, 0.01)])
def test_score_is_the_papers_summed_row_by_row(sample, p, temperature, partition):
    features, labels, rows = sample
    q = 1 / (1 - 1 / p)

    def scaled(v):
        return v / (np.abs(v) ** p).sum() ** (1 / p)

    def density(z, mu):
        norm = (np.abs(mu) ** q).sum() ** (1 / q)
        slope = norm ** (2 - q) * np.sign(mu) * np.abs(mu) ** (q - 1)
        return math.exp((-0.5 * (np.abs(z) ** q).sum() ** (2 / q) + z @ slope) / temperature)

    means = [scaled(features[labels == c].mean(0)) for c in range(3)]
    phi = [
        sum(density(scaled(f), mean) for f, y in zip(features, labels) if partition == "all" or y == c)
        for c, mean in enumerate(means)
    ]
    expected = [math.log(sum(density(scaled(r), mean) / s for mean, s in zip(means, phi))) for r in rows]
    detector = ConjNormDetector(p=p, temperature=temperature, partition=partition).fit(features, labels)
    np.testing.assert_allclose(detector.score_samples(rows), expected, rtol=1e-8)


@pytest.mark.parametrize("concentration", [0.5, 2.0])
def test_partition_over_the_sphere_is_that_of_von_mises_and_fisher(concentration):
    g = torch.Generator().manual_seed(0)
    sphere = torch.nn.functional.normalize(torch.randn(200_000, 6, generator=g, dtype=torch.float64), dim=1)
    mean = torch.eye(6, dtype=torch.float64)[:1]
    found = importance_partition(sphere, mean, temperature=1 / concentration) - math.log(len(sphere))
    # The mean of exp(k cos) over the sphere in 6 dimensions; the density has exp(-k / 2) besides.
    expected = gamma(3) * (2 / concentration) ** 2 * iv(2, concentration) * math.exp(-concentration / 2)
    assert found.exp().item() == pytest.approx(expected, rel=3e-3)


def test_partition_does_not_depend_on_the_cut_and_takes_classes(sample, monkeypatch):
    z = torch.from_numpy(sample[0])
    labels, mu = torch.from_numpy(sample[1]), torch.eye(4, 5, dtype=torch.float64)
    whole, own = importance_partition(z, mu), importance_partition(z, mu, target=labels)
    monkeypatch.setattr("lossary.ood.conjnorm.CHUNK", 28)  # seven rows at a time
    torch.testing.assert_close(importance_partition(z, mu), whole)
    torch.testing.assert_close(importance_partition(z, mu, target=labels), own)
    torch.testing.assert_close(own[1], importance_partition(z[labels == 1], mu)[1])
    assert own[3] == -torch.inf


def test_length_does_not_count_and_zero_has_an_answer(sample):
    features, labels, rows = sample
    detector = ConjNormDetector().fit(features, labels)
    np.testing.assert_allclose(detector.anomaly_score(1e-3 * rows), detector.anomaly_score(rows), rtol=1e-9)
    still = ConjNormDetector().fit(7 * features, labels)
    np.testing.assert_allclose(still.anomaly_score(rows), detector.anomaly_score(rows), rtol=1e-9)
    assert np.isfinite(detector.anomaly_score(np.zeros((1, 5)))).all()
    assert np.isfinite(ConjNormDetector().fit(np.zeros((4, 5)), [0, 0, 1, 1]).anomaly_score(rows)).all()


def test_a_sharp_temperature_and_norms_near_one_stay_finite(sample):
    features, labels, rows = sample
    for p in (1.01, 1.5, 50.0):
        got = ConjNormDetector(p=p, temperature=5e-4).fit(features, labels).anomaly_score(rows.astype("f4"))
        assert np.isfinite(got).all()


def test_refusals_name_the_argument(sample):
    features, labels, _ = sample
    with pytest.raises(ValueError, match=r"p: expected a number > 1, got 1.0"):
        ConjNormDetector(p=1.0).fit(features, labels)
    with pytest.raises(ValueError, match=r"partition: expected one of 'all', 'class', got 'none'"):
        ConjNormDetector(partition="none").fit(features, labels)
    with pytest.raises(ValueError, match=r"mu: expected shape \(2, 5\), got \(2, 4\)"):
        bregman_lq_divergence(torch.ones(3, 5), torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"temperature: expected a number > 0, got 0.0"):
        importance_partition(torch.ones(3, 5), torch.ones(2, 5), temperature=0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("partition", ["all", "class"])
def test_cuda_agrees(sample, partition):
    features, labels, rows = (torch.from_numpy(a) for a in sample)
    expected = ConjNormDetector(partition=partition).fit(features, labels).anomaly_score(rows)
    got = ConjNormDetector(partition=partition).fit(features.cuda(), labels.cuda()).anomaly_score(rows.cuda())
    torch.testing.assert_close(got.cpu(), expected)
