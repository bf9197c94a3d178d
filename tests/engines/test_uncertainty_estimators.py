"""What all estimators of the room share: scikit-learn's manners, as far as their inputs are scikit-learn's.

Its checks feed features of any kind and a few classes. An adapter turns these into what an estimator takes:
probabilities, times, two vectors. What scikit-learn would not take for data goes through as it is, so that the refusal
that is checked is the estimator's own.
"""

import numpy as np
import pytest
from scipy.special import expit, softmax
from sklearn import config_context
from sklearn.base import TransformerMixin, clone
from sklearn.exceptions import SkipTestWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import KFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler
from sklearn.utils import check_array
from sklearn.utils.estimator_checks import check_estimator

from lossary.uncertainty import (
    APGWRegressor,
    CentroidDeferral,
    ConformalRiskControl,
    DPKaplanMeierFitter,
    HumanAlignedCalibrator,
    MaskedTemperatureScaling,
    MultivariateConformalRegion,
    TransformAwareTemperature,
)


def turned(X, how):
    """how(X), in X's own type of numbers, if X is data to scikit-learn, NaN or not; otherwise X."""
    try:
        found = how(check_array(X, dtype=np.float64, ensure_all_finite=False))
    except (TypeError, ValueError):
        return X
    dtype = np.asarray(X).dtype
    return found.astype(dtype) if dtype.kind in "fO" else found


def softmaxed(X):
    return turned(X, lambda x: softmax(x, axis=1) if np.isfinite(x).all() else x)


def classes(y, X):
    """y modulo the number of X's columns, if these are data; otherwise y."""
    try:
        return np.asarray(y).astype(int) % check_array(X, dtype=np.float64).shape[1]
    except (TypeError, ValueError):
        return y


class Logits(MaskedTemperatureScaling):
    """Features as they are."""

    def fit(self, logits, labels):
        return super().fit(logits, classes(labels, logits))


class LogitsByRow(TransformAwareTemperature):
    """Features as they are, without views."""

    def fit(self, logits, labels, views=None):
        return super().fit(logits, classes(labels, logits), views)


class Deferral(CentroidDeferral):
    """Features through a softmax."""

    def fit(self, probabilities, labels):
        return super().fit(softmaxed(probabilities), classes(labels, probabilities))

    def decision_function(self, probabilities):
        return super().decision_function(softmaxed(probabilities))

    def predict(self, probabilities):
        return super().predict(softmaxed(probabilities))


class Sets(ConformalRiskControl):
    """Features through a softmax, and one class that is true."""

    def fit(self, scores, target):
        return super().fit(softmaxed(scores), classes(target, scores))

    def predict(self, scores):
        return super().predict(softmaxed(scores))


def misses(sets, target):
    """1 where a set lacks the class that is true."""
    return 1.0 - sets[np.arange(len(sets)), target]


class Times(APGWRegressor):
    """Targets as logarithms of times, of which every third is the end of observation."""

    def fit(self, X, time):
        return super().fit(X, np.exp(np.asarray(time, dtype=np.float64)), np.arange(len(time)) % 3 < 2)

    def score(self, X, time):
        return super().score(X, np.exp(np.asarray(time, dtype=np.float64)))


class Rows:
    """For estimators whose tags tell scikit-learn that they do not take (rows, features): the adapter does."""

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.one_d_array, tags.input_tags.two_d_array, tags.input_tags.three_d_array = False, True, False
        return tags


class Curve(Rows, DPKaplanMeierFitter):
    """The first column as logarithms of times; the same noise each time."""

    def fit(self, time, event=None):
        happened = None if event is None else np.asarray(event).astype(int) % 2
        return super().fit(self._times(time), happened, generator=np.random.default_rng(0))

    def predict(self, time):
        return super().predict(self._times(time))

    def _times(self, X):
        return turned(X, lambda x: np.exp(x[:, 0]))


class Advice(Rows, TransformerMixin, HumanAlignedCalibrator):
    """The first column as the person's confidence, the last as the model's, by a sigmoid."""

    def fit(self, X, y):
        return super().fit(*self._both(X), np.asarray(y).astype(int) % 2)

    def transform(self, X):
        return super().transform(*self._both(X))

    def _both(self, X):
        return turned(X, lambda x: expit(x[:, -1])), turned(X, lambda x: x[:, 0])


class Region(Rows, MultivariateConformalRegion):
    """Each row's columns as points on a line, on which the target is one more."""

    def fit(self, inside, y):
        points = turned(inside, lambda x: x[:, :, None])
        return super().fit(points, np.asarray(y, dtype=np.float64)[:, None], np.linspace(-9, 9, 50)[:, None])


NAMES = {"check_fit_score_takes_y": "its arguments have names of their own, not X and y"}
VECTORS = dict.fromkeys(
    ("check_n_features_in", "check_n_features_in_after_fitting"), "a vector has no features, of which to keep a count"
)
MEANT = {
    Logits(): NAMES,
    LogitsByRow(steps=5): NAMES,
    Deferral(): NAMES,
    Sets(loss=misses, grid=101): {
        **NAMES,
        "check_n_features_in": "one threshold serves samples of any number of entries",
        "check_n_features_in_after_fitting": "one threshold serves samples of any number of entries",
    },
    Times(power=False, kappa=1.0): {
        **NAMES,
        "check_n_features_in_after_fitting": "the check calls score(X, y=y), whose y is called time",
    },
    Curve(grid=(0.5, 1.0, 2.0, 4.0)): {
        **NAMES,
        **VECTORS,
        "check_fit1d": "a vector of times is what it takes",
        "check_fit2d_predict1d": "a vector of times is what it takes",
    },
    Advice(): {
        **VECTORS,
        "check_fit2d_predict1d": "a vector of confidences is what it takes",
        "check_transformer_general": "it refuses other numbers of columns, which vectors do not have",
    },
    Region(): {
        "check_n_features_in": "inputs have three dimensions, and rows of any number of points",
        "check_n_features_in_after_fitting": "inputs have three dimensions, and rows of any number of points",
    },
}


@pytest.mark.parametrize(("adapter", "meant"), MEANT.items(), ids=[type(adapter).__name__ for adapter in MEANT])
@pytest.mark.filterwarnings("ignore:Casting complex values")  # by the adapters, of targets
def test_scikit_learns_checks_find_only_what_is_meant(adapter, meant):
    results = check_estimator(adapter, on_skip=None, on_fail=None)
    assert {r["check_name"] for r in results if r["status"] == "failed"} == set(meant)
    assert sum(r["status"] == "passed" for r in results) > 30


@pytest.mark.parametrize("estimator", [DPKaplanMeierFitter(), HumanAlignedCalibrator(), MultivariateConformalRegion()])
def test_those_who_take_no_rows_of_features_say_so_to_scikit_learn(estimator):
    with pytest.warns(SkipTestWarning, match="requires input"):
        results = check_estimator(estimator)
    assert {r["status"] for r in results} == {"passed"}


def clusters(seed, rows=90):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(rows) % 3)
    return 1.5 * np.eye(3, 4)[labels] + rng.standard_normal((rows, 4)), labels


@pytest.mark.parametrize(
    ("estimator", "given", "asked"),
    [
        (MaskedTemperatureScaling(), "decision_function", "predict_proba"),
        (TransformAwareTemperature(steps=20), "decision_function", "predict_proba"),
        (CentroidDeferral(), "predict_proba", "predict"),
        (ConformalRiskControl(loss=misses), "predict_proba", "predict"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else value,
)
def test_behind_a_fitted_classifier_in_a_pipeline_folds_are_as_by_hand(estimator, given, asked):
    """A classifier is no transformer, and learns on other rows than its calibrator: a function hands on its outputs.

    Views, which TransformAwareTemperature may have besides, are a second input that a pipeline does not carry.
    """
    outputs = getattr(LogisticRegression().fit(*clusters(0)), given)
    X, y = clusters(1)
    found = cross_val_predict(make_pipeline(FunctionTransformer(outputs), estimator), X, y, cv=KFold(3), method=asked)
    for inside, outside in KFold(3).split(X):
        by_hand = clone(estimator).fit(outputs(X[inside]), y[inside])
        np.testing.assert_array_equal(found[outside], getattr(by_hand, asked)(outputs(X[outside])))
    assert len(np.unique(found)) > 1


@pytest.mark.parametrize("calibrator", [MaskedTemperatureScaling(), TransformAwareTemperature(steps=20)])
def test_calibrators_predict_what_the_classifier_does(calibrator):
    classifier = LogisticRegression().fit(*clusters(0))
    X, y = clusters(1)
    pipeline = make_pipeline(FunctionTransformer(classifier.decision_function), calibrator).fit(X, y)
    np.testing.assert_array_equal(pipeline.predict(X), classifier.predict(X))


def censored(rows=60):
    rng = np.random.default_rng(2)
    X = rng.standard_normal((rows, 2))
    came, ended = rng.exponential(np.exp(X[:, 0])), rng.exponential(3.0, rows)
    return X, np.minimum(came, ended), came <= ended


def test_survival_regression_behind_a_scaler_with_events_for_each_fold():
    X, time, event = censored()
    model = APGWRegressor(power=False, kappa=1.0)
    pipeline, params = make_pipeline(StandardScaler(), model), {"apgwregressor__event": event}
    medians = cross_val_predict(pipeline, X, time, cv=KFold(3), params=params)
    with config_context(enable_metadata_routing=True):  # without it a score takes every time for an event
        routed = clone(model).set_fit_request(event=True).set_score_request(event=True)
        scores = cross_val_score(routed, X, time, cv=KFold(3), params={"event": event})
    for fold, (inside, outside) in enumerate(KFold(3).split(X)):
        scaler = StandardScaler().fit(X[inside])
        by_hand = clone(model).fit(scaler.transform(X[inside]), time[inside], event[inside])
        np.testing.assert_allclose(medians[outside], by_hand.predict(scaler.transform(X[outside])), rtol=1e-12)
        plain = clone(model).fit(X[inside], time[inside], event[inside])
        assert scores[fold] == pytest.approx(plain.score(X[outside], time[outside], event[outside]), rel=1e-12)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        plain.score(X, time[:1])


@pytest.mark.parametrize("settings", [{"grid": (0.5, 1.0, 2.0, 4.0)}, {"mechanism": "time-indexed"}], ids=repr)
def test_a_private_curve_across_folds_takes_times_for_rows(settings):
    """Each fold is one more release. A pipeline has nothing to do, since there are no features to transform."""
    _, time, event = censored()
    fitter = DPKaplanMeierFitter(**settings)
    noise, again = np.random.default_rng(3), np.random.default_rng(3)
    found = cross_val_predict(fitter, time, event, cv=KFold(3), params={"generator": noise})
    for inside, outside in KFold(3).split(time):
        by_hand = clone(fitter).fit(time[inside], event[inside], generator=again)
        np.testing.assert_array_equal(found[outside], by_hand.predict(time[outside]))


def test_two_confidences_need_an_adapter_for_folds():
    """`transform` takes two vectors, and a pipeline hands on one input: here a table of both.

    It has no `predict`, which `cross_val_predict` wants: folds are scored.
    """
    rng = np.random.default_rng(4)
    human, model = rng.standard_normal((2, 90))
    y = (rng.random(90) < expit(human + model)).astype(int)
    table = np.column_stack([human, model])

    def brier(fitted, x, y):
        return np.square(fitted.transform(x) - y).mean()

    found = cross_val_score(make_pipeline(StandardScaler(), Advice()), table, y, cv=KFold(3), scoring=brier)
    for fold, (inside, outside) in enumerate(KFold(3).split(table)):
        scaled = StandardScaler().fit(table[inside]).transform(table)
        h, b = scaled[:, 0], expit(scaled[:, 1])
        by_hand = HumanAlignedCalibrator().fit(b[inside], h[inside], y[inside])
        assert found[fold] == np.square(by_hand.transform(b[outside], h[outside]) - y[outside]).mean()


def test_regions_of_points_across_folds():
    """They have no `predict` for `cross_val_predict`, and no transformer gives three dimensions: folds are scored."""
    rng = np.random.default_rng(5)
    inside, y = rng.standard_normal((60, 20, 2)), rng.standard_normal((60, 2))
    grid = np.stack(np.meshgrid(np.linspace(-4, 4, 9), np.linspace(-4, 4, 9)), axis=-1).reshape(-1, 2)

    def coverage(fitted, points, targets):
        return fitted.contains(points, targets).mean()

    region = MultivariateConformalRegion(alpha=0.3)
    found = cross_val_score(region, inside, y, cv=KFold(3), scoring=coverage, params={"grid": grid})
    for fold, (learned, asked) in enumerate(KFold(3).split(inside)):
        by_hand = clone(region).fit(inside[learned], y[learned], grid)
        assert found[fold] == by_hand.contains(inside[asked], y[asked]).mean()
