"""The Mahalanobis detector against scipy's distances, scikit-learn's discriminant analysis and hand gradients."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_curve
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.ood import MahalanobisClassifier, MahalanobisDetector, class_conditional_gaussian, tnr_at_tpr


@pytest.fixture
def sample():
    """Three classes in 4 dimensions with one crooked covariance, and rows to rate."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=90)
    crooked = rng.standard_normal((4, 4))
    features = 3 * rng.standard_normal((3, 4))[labels] + rng.standard_normal((90, 4)) @ crooked
    return features, labels, 5 * rng.standard_normal((20, 4))


def tied_covariance(features, labels):
    """The share-weighted mean of the classes' own covariances: another road to eq. 1."""
    classes, counts = np.unique(labels, return_counts=True)
    return sum(n / len(labels) * np.cov(features[labels == c].T, bias=True) for c, n in zip(classes, counts))


def test_gaussian_is_the_weighted_mean_of_class_covariances(sample):
    features, labels, _ = sample
    means, covariance = class_conditional_gaussian(features, labels)
    np.testing.assert_allclose(covariance, tied_covariance(features, labels), rtol=1e-10)
    np.testing.assert_allclose(means[1], features[labels == 1].mean(0), rtol=1e-12)


def test_score_is_scipys_squared_distance_to_the_nearest_class(sample):
    features, labels, rows = sample
    precision = np.linalg.inv(tied_covariance(features, labels))
    means = [features[labels == c].mean(0) for c in range(3)]
    expected = [min(mahalanobis(row, mean, precision) ** 2 for mean in means) for row in rows]
    got = MahalanobisDetector().fit(features, labels).anomaly_score(rows)
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_float32_loses_no_digits_far_from_the_origin(sample):
    features, labels, rows = sample
    expected = MahalanobisDetector().fit(features, labels).anomaly_score(rows)
    shift = np.float32(1000)
    got = MahalanobisDetector().fit((features + shift).astype("f4"), labels).anomaly_score((rows + shift).astype("f4"))
    np.testing.assert_allclose(got, expected, rtol=2e-3)


def test_without_variance_a_direction_is_ignored_and_with_a_ridge_it_counts(sample):
    features, labels, rows = sample
    flat, away = (np.column_stack([x, np.full(len(x), value)]) for x, value in ((features, 7.0), (rows, 9.0)))
    plain = MahalanobisDetector().fit(features, labels).anomaly_score(rows)
    np.testing.assert_allclose(MahalanobisDetector().fit(flat, labels).anomaly_score(away), plain, rtol=1e-9)
    ridged = MahalanobisDetector(ridge=0.5).fit(features, labels).anomaly_score(rows)
    with_flat = MahalanobisDetector(ridge=0.5).fit(flat, labels).anomaly_score(away)
    np.testing.assert_allclose(with_flat - ridged, (9.0 - 7.0) ** 2 / 0.5, rtol=1e-9)


def test_space_is_averaged_and_layers_add_up(sample):
    features, labels, rows = sample
    noise = np.array([[-1.0, 1.0], [2.0, -2.0]])
    maps, row_maps = features[..., None, None] + noise, rows[..., None, None] + noise
    one, other = (MahalanobisDetector().fit(f, labels) for f in (features, features[:, :2]))
    both = MahalanobisDetector().fit({"deep": maps, "early": features[:, :2]}, labels)
    layers = {"early": rows[:, :2], "deep": row_maps}
    expected = np.column_stack([one.anomaly_score(rows), other.anomaly_score(rows[:, :2])])
    np.testing.assert_allclose(both.layer_scores(layers), expected, rtol=1e-9)
    np.testing.assert_allclose(both.anomaly_score(layers), expected.sum(1), rtol=1e-9)
    with pytest.raises(ValueError, match=r"x: expected the layers \['deep', 'early'\] of fit, got \['deep'\]"):
        both.anomaly_score({"deep": row_maps})


def test_weights_are_a_logistic_regression_on_standardised_layer_scores(sample):
    features, labels, _ = sample
    detector = MahalanobisDetector().fit([features[:, :2], features[:, 2:]], labels)
    rng = np.random.default_rng(1)
    inside, outside = (features, features + rng.standard_normal(features.shape) * [0, 0, 4, 4])
    split = [[x[:, :2], x[:, 2:]] for x in (inside, outside)]
    scores = np.vstack([detector.layer_scores(x) for x in split])
    target = np.repeat([0, 1], len(features))
    expected = make_pipeline(StandardScaler(), LogisticRegression()).fit(scores, target).decision_function(scores)
    detector.fit_weights(*split)
    got = np.concatenate([detector.anomaly_score(x) for x in split])
    assert np.ptp(got - expected) < 1e-9  # equal but for the intercept


def test_a_layer_without_variance_gets_no_say(sample):
    features, labels, rows = sample
    detector = MahalanobisDetector().fit([features, np.ones((90, 2))], labels)
    detector.fit_weights([features, np.ones((90, 2))], [4 * features, np.ones((90, 2))])
    assert detector.weights_[1] == 0
    expected = detector.weights_[0] * MahalanobisDetector().fit(features, labels).anomaly_score(rows)
    np.testing.assert_allclose(detector.anomaly_score([rows, np.ones((20, 2))]), expected, rtol=1e-9)


def test_preprocessing_steps_against_the_gradient_worked_by_hand(sample):
    features, labels, _ = sample
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((6, 4))
    x = rng.standard_normal((20, 6))
    precision = np.linalg.inv(tied_covariance(features, labels))
    means = np.stack([features[labels == c].mean(0) for c in range(3)])
    residual = (x @ mixing)[:, None] - means
    nearest = np.einsum("nkd,de,nke->nk", residual, precision, residual).argmin(1)
    slope = 2 * residual[np.arange(20), nearest] @ precision @ mixing.T
    expected = (x - 0.01 * np.sign(slope)) @ mixing

    detector = MahalanobisDetector().fit(features, labels)
    model = torch.from_numpy(mixing).requires_grad_()
    before = torch.from_numpy(x)
    after = detector.perturbed_features(lambda t: t @ model, before, epsilon=0.01)
    np.testing.assert_allclose(after[0].numpy(), expected, rtol=1e-9)
    assert model.grad is None
    assert (detector.anomaly_score(after) < detector.anomaly_score(before @ model)).all()


def test_each_layer_is_perturbed_for_itself(sample):
    features, labels, _ = sample
    detector = MahalanobisDetector().fit({"a": features, "b": features[:, ::-1].copy()}, labels)
    x = torch.from_numpy(features[:5])
    together = detector.perturbed_features(lambda t: {"a": t, "b": t.flip(1)}, x, epsilon=0.1)
    alone = MahalanobisDetector().fit(features[:, ::-1].copy(), labels)
    assert torch.equal(together["b"], alone.perturbed_features(lambda t: t.flip(1), x, epsilon=0.1)[0])


def test_classifier_is_linear_discriminant_analysis_with_equal_priors():
    rng = np.random.default_rng(5)
    labels = np.arange(90) % 3  # of one size, as scikit-learn weighs class covariances by the priors
    features, rows = rng.standard_normal((90, 4)) + labels[:, None] / 2, rng.standard_normal((30, 4)) + 0.5
    names = np.array(["ant", "bee", "cat"])[labels]
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(features, names)
    classifier = MahalanobisClassifier().fit(features, names)
    np.testing.assert_allclose(classifier.predict_proba(rows), reference.predict_proba(rows), rtol=1e-9)
    assert (classifier.predict(rows) == reference.predict(rows)).all()


def test_a_new_class_of_equal_size_enters_as_the_paper_says():
    rng = np.random.default_rng(3)
    blocks = [rng.standard_normal((25, 4)) @ rng.standard_normal((4, 4)) + 9 * c for c in range(4)]
    classifier = MahalanobisClassifier().fit(np.vstack(blocks[:3]), np.repeat([0, 1, 3], 25))
    old = class_conditional_gaussian(np.vstack(blocks[:3]), np.repeat([0, 1, 3], 25))[1]
    classifier.partial_fit(blocks[3], np.full(25, 2))
    running = 3 / 4 * old + 1 / 4 * np.cov(blocks[3].T, bias=True)  # C = 3 classes become 4
    np.testing.assert_allclose(classifier.moments_.covariance.numpy(), running, rtol=1e-9)
    assert classifier.predict(np.stack([b.mean(0) for b in blocks])).tolist() == [0, 1, 3, 2]


def test_tensors_come_back_as_tensors_and_scikit_learn_takes_the_classifier(sample):
    features, labels, rows = sample
    searched = GridSearchCV(MahalanobisClassifier(), {"ridge": [0.0, 1.0]}, cv=3).fit(features, labels)
    tensor = MahalanobisClassifier(**searched.best_params_).fit(torch.from_numpy(features), torch.from_numpy(labels))
    got = tensor.predict(torch.from_numpy(rows))
    assert got.dtype is torch.int64
    assert (got.numpy() == searched.predict(rows)).all()
    with pytest.raises(NotFittedError):
        MahalanobisClassifier().predict(rows)


def test_tnr_is_read_off_the_roc_curve():
    rng = np.random.default_rng(4)
    inside, outside = rng.normal(0, 1, 400), rng.normal(1.5, 1, 300)
    got = tnr_at_tpr(torch.from_numpy(inside), torch.from_numpy(outside), tpr=0.95).item()
    ordinary = np.r_[np.ones(400), np.zeros(300)]  # the paper's positives are the ordinary inputs
    fpr, tpr, _ = roc_curve(ordinary, -np.r_[inside, outside], drop_intermediate=False)
    assert got == pytest.approx(1 - fpr[np.argmax(tpr >= 0.95 - 1e-12)], abs=1e-12)


def test_refusals_name_the_argument(sample):
    features, labels, _ = sample
    with pytest.raises(ValueError, match=r"features: contains NaN or infinite values"):
        MahalanobisDetector().fit(np.full((3, 2), np.inf), [0, 1, 1])
    with pytest.raises(ValueError, match=r"labels: expected one label a row, shape \(90,\), got \(89,\)"):
        MahalanobisDetector().fit(features, labels[1:])
    with pytest.raises(ValueError, match=r"ridge: expected a number >= 0, got -1"):
        MahalanobisDetector(ridge=-1.0).fit(features, labels)
    with pytest.raises(ValueError, match=r"x: expected \(rows, 4\), neither empty, got shape \(2, 3\)"):
        MahalanobisDetector().fit(features, labels).anomaly_score(np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"tpr: expected a number > 0 and <= 1, got 1.5"):
        tnr_at_tpr(torch.ones(3), torch.ones(3), tpr=1.5)
    with pytest.raises(ValueError, match=r"y: expected an int64 tensor"):
        MahalanobisClassifier().fit(torch.from_numpy(features), torch.from_numpy(labels).double())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_agrees(sample):
    features, labels, rows = (torch.from_numpy(a) for a in sample)
    expected = MahalanobisDetector().fit(features, labels).anomaly_score(rows)
    got = MahalanobisDetector().fit(features.cuda(), labels.cuda()).anomaly_score(rows.cuda())
    torch.testing.assert_close(got.cpu(), expected)
