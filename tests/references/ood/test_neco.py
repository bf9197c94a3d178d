"""NECO against scikit-learn's StandardScaler and PCA, the two steps of the official code, and worked cases."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.ood import NECO, id_ood_orthogonality, neco_score


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    features = 2 + rng.standard_normal((70, 3)) @ rng.standard_normal((3, 6)) + 0.2 * rng.standard_normal((70, 6))
    return features, rng.standard_normal((15, 6)), rng.standard_normal((15, 4))


@pytest.mark.parametrize("components", [2, 5, 0.8])
@pytest.mark.parametrize("standardize", [True, False])
def test_score_is_the_ratio_of_scikit_learns_projection(sample, components, standardize):
    features, rows, logits = sample
    scaler = StandardScaler(with_mean=standardize, with_std=standardize).fit(features)
    pca = PCA(components, svd_solver="full").fit(scaler.transform(features))
    whole = scaler.transform(rows)
    expected = np.linalg.norm(pca.transform(whole), axis=1) / np.linalg.norm(whole, axis=1)
    detector = NECO(components=components, standardize=standardize).fit(features)
    np.testing.assert_allclose(detector.score_samples(rows), expected, rtol=1e-9)
    np.testing.assert_allclose(detector.anomaly_score(rows, logits), -expected * logits.max(1), rtol=1e-9)
    np.testing.assert_allclose(detector.explained_, pca.explained_variance_ratio_.sum(), rtol=1e-9)
    assert detector.axes_.shape == (6, pca.n_components_)


def test_in_a_pipeline_after_a_scaler(sample):
    features, rows, _ = sample
    piped = make_pipeline(StandardScaler(), NECO(components=2, standardize=False)).fit(features)
    direct = NECO(components=2).fit(features)
    np.testing.assert_allclose(piped.score_samples(rows), direct.score_samples(rows), rtol=1e-9)


def test_a_feature_that_never_varied_counts_once_it_does(sample):
    features, rows, _ = sample
    flat, same, away = (np.column_stack([x, np.full(len(x), v)]) for x, v in ((features, 7), (rows, 7), (rows, 9)))
    detector = NECO(components=2).fit(flat)
    np.testing.assert_allclose(
        detector.anomaly_score(same), NECO(components=2).fit(features).anomaly_score(rows), rtol=1e-9
    )
    assert (detector.anomaly_score(away) > detector.anomaly_score(same)).all()


def test_degenerate_training_data_have_an_answer():
    constant = NECO().fit(np.ones((5, 3)))
    assert constant.axes_.shape == (3, 1)
    assert constant.explained_ == 0
    assert constant.anomaly_score(np.ones((1, 3))).tolist() == [0]  # at the mean: no length, no share
    assert np.isfinite(constant.anomaly_score(np.zeros((1, 3)))).all()


def test_share_of_given_axes_worked_by_hand():
    axes = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    got = neco_score(torch.tensor([[1.0, 2.0, 2.0], [0.0, 3.0, 0.0], [0.0, 0.0, 0.0]]), axes)
    torch.testing.assert_close(got, torch.tensor([5**0.5 / 3, 0.0, 0.0]))


def test_orthogonality_is_numpys_cosine_of_means(sample):
    features, rows, _ = sample
    labels = np.arange(70) % 3
    features[labels == 0] *= -1
    outside = rows.mean(0)
    cosines = []
    for c in range(3):
        mean = features[labels == c].mean(0)
        cosines.append(mean @ outside / np.linalg.norm(mean) / np.linalg.norm(outside))
    assert min(cosines) < 0 < max(cosines)
    got = id_ood_orthogonality(*(torch.from_numpy(a) for a in (features, labels + 4, rows)))
    assert got.item() == pytest.approx(np.mean(np.abs(cosines)), rel=1e-12)


def test_refusals_name_the_argument(sample):
    features, rows, logits = sample
    with pytest.raises(ValueError, match=r"components: expected a whole number >= 1 and <= 6, got 7"):
        NECO(components=7).fit(features)
    with pytest.raises(ValueError, match=r"components: expected a number > 0 and < 1, got 1.5"):
        NECO(components=1.5).fit(features)
    with pytest.raises(ValueError, match=r"logits: expected 15 rows, as many as x, got 14"):
        NECO().fit(features).anomaly_score(rows, logits[1:])
    with pytest.raises(ValueError, match=r"axes: expected \(6, at most as many\), got \(5, 2\)"):
        neco_score(torch.from_numpy(rows), torch.ones(5, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees(sample):
    features, rows, logits = (torch.from_numpy(a) for a in sample)
    expected = NECO().fit(features).anomaly_score(rows, logits)
    got = NECO().fit(features.cuda()).anomaly_score(rows.cuda(), logits.cuda())
    torch.testing.assert_close(got.cpu(), expected)
