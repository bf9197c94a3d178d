"""What all detectors of features share: scikit-learn's manners, and statistics that are taken once."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import check_estimator

from lossary.ood import (
    NECO,
    ConjNormDetector,
    MahalanobisDetector,
    MeanShiftOutlierScorer,
    WDiscOOD,
    merge,
    moments,
)

DETECTORS = [
    MahalanobisDetector(),
    WDiscOOD(ridge=0.1),
    NECO(),
    ConjNormDetector(),
    MeanShiftOutlierScorer(neighbors=2, epochs=2),
]


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
@pytest.mark.filterwarnings("ignore")
def test_scikit_learns_checks_find_only_what_is_meant(detector):
    meant = {"check_fit_score_takes_y"}  # the role has (features, labels), which need not be called (X, y)
    if isinstance(detector, MeanShiftOutlierScorer):
        meant.add("check_fit2d_1sample")  # fewer rows than neighbours are refused in these words
    results = check_estimator(detector, on_skip=None, on_fail=None)
    assert {r["check_name"] for r in results if r["status"] == "failed"} == meant
    assert len(results) > 40


@pytest.mark.parametrize("detector", DETECTORS, ids=lambda d: type(d).__name__)
def test_in_a_pipeline_under_cross_validation_folds_score_as_by_hand(detector):
    """`cross_val_predict` itself wants a `predict`; detectors have none, since they set no threshold."""
    rng = np.random.default_rng(0)
    labels = np.arange(30) % 3
    features = 3 * np.eye(3, 4)[labels] + rng.standard_normal((30, 4))

    def mean(fitted, x, y):
        return fitted.score_samples(x).mean()

    folds = KFold(3)
    found = cross_val_score(make_pipeline(StandardScaler(), detector), features, labels, cv=folds, scoring=mean)
    for fold, (inside, outside) in enumerate(folds.split(features)):
        scaler = StandardScaler().fit(features[inside])
        by_hand = clone(detector).fit(scaler.transform(features[inside]), labels[inside])
        expected = -by_hand.anomaly_score(scaler.transform(features[outside])).mean()
        assert found[fold] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("detector", DETECTORS[:3], ids=lambda d: type(d).__name__)
def test_moments_taken_once_in_batches_serve_all_detectors_that_need_no_more(detector):
    g = torch.Generator().manual_seed(0)
    index = torch.arange(90) % 3
    features = 4 * torch.eye(3, 6)[index] + torch.randn(90, 6, generator=g)
    parts = [moments(f, i, 3) for f, i in zip(features.split(40), index.split(40))]
    found = merge(merge(parts[0], parts[1]), parts[2])
    new = torch.randn(20, 6, generator=g)
    whole = detector.fit(features, index).anomaly_score(new)
    torch.testing.assert_close(detector.fit_moments(found).anomaly_score(new), whole)
    assert detector.n_features_in_ == 6


def test_moments_of_layers_go_by_name():
    g = torch.Generator().manual_seed(1)
    layers = {"a": torch.randn(20, 2, generator=g), "b": torch.randn(20, 3, generator=g)}
    index = torch.arange(20) % 2
    whole = MahalanobisDetector().fit(layers, index)
    found = MahalanobisDetector().fit_moments({name: moments(f, index, 2) for name, f in layers.items()})
    torch.testing.assert_close(found.layer_scores(layers), whole.layer_scores(layers))


@pytest.mark.parametrize(
    "detector", [NECO(), MeanShiftOutlierScorer(neighbors=2, epochs=2)], ids=["NECO", "mean shift"]
)
def test_a_feature_that_varies_by_rounding_alone_is_constant(detector):
    rows = np.column_stack([np.arange(7.0), np.full(7, 0.1)])
    assert rows[:, 1].std() > 0
    assert detector.fit(rows).scale_.tolist() == [2.0, 1.0]
