"""Deep quantile aggregation against scoringrules, definitions written out, the official code and its guarantee."""

import math

import numpy as np
import pytest
import scoringrules
import torch
from scipy.stats import binom
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import QuantileRegressor
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.uncertainty import (
    DeepQuantileAggregator,
    conformalize_quantiles,
    isotonic_quantiles,
    weighted_interval_score,
)
from lossary.uncertainty.deep_quantile_aggregation import _crossing, _mixed

LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)


def data(rows, seed=0):
    """y spreads with the first feature: its quantiles are (1 + x_1) times those of a normal."""
    rng = np.random.default_rng(seed)
    X = rng.random((rows, 2))
    return X, (1 + X[:, 0]) * rng.normal(size=rows)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_the_score_is_scoringrules_times_the_number_of_levels(kind):
    rng = np.random.default_rng(0)
    q, y = np.sort(rng.normal(size=(50, 5))), rng.normal(size=50)
    expected = scoringrules.weighted_interval_score(y, q[:, 2], q[:, :2], q[:, :2:-1], np.array([0.2, 0.6]))
    got = weighted_interval_score(kind(q), kind(y), levels=LEVELS)
    assert type(got) is type(kind(y))
    np.testing.assert_allclose(np.asarray(got), 5 * expected, rtol=1e-6)


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_pooled_quantiles_answer_in_kind_and_leave_their_input(kind):
    q = kind(np.array([[1.0, 3.0, 2.0, 5.0], [4.0, 3.0, 2.0, 7.0]]))
    got = isotonic_quantiles(q)
    assert type(got) is type(q)
    assert got.tolist() == [[1, 2.5, 2.5, 5], [3, 3, 3, 7]]
    assert q[0, 1] == 3


def test_shifts_are_pair_by_pair_and_leave_the_median():
    rng = np.random.default_rng(1)
    q, y, new = np.sort(rng.normal(size=(60, 5))), 2 * rng.normal(size=60), rng.normal(size=(3, 5))
    got = conformalize_quantiles(q, y, new, levels=LEVELS)
    for low, high, alpha in ((0, 4, 0.2), (1, 3, 0.6)):
        scores = sorted(max(row[low] - t, t - row[high]) for row, t in zip(q, y))
        shift = scores[math.ceil(61 * (1 - alpha) - 1e-9) - 1]
        np.testing.assert_allclose(got[:, low], new[:, low] - shift)
        np.testing.assert_allclose(got[:, high], new[:, high] + shift)
    assert np.array_equal(got[:, 2], new[:, 2])
    few = conformalize_quantiles(q[:3], y[:3], torch.from_numpy(new), levels=LEVELS)
    assert isinstance(few, torch.Tensor)
    assert few[:, [0, 4]].isinf().all()  # 4 rows are needed for 0.2, 1 for 0.6
    assert few[:, 1:4].isfinite().all()


def test_cross_validated_pairs_are_the_definition():
    rng = np.random.default_rng(2)
    q, y, fold = np.sort(rng.normal(size=(40, 3))), rng.normal(size=40), np.arange(40) % 4
    new = np.sort(rng.normal(size=(4, 5, 3)))
    got = conformalize_quantiles(q, y, new, levels=(0.1, 0.5, 0.9), fold=fold)
    scores = [max(row[0] - t, t - row[2]) for row, t in zip(q, y)]
    for j in range(5):
        lows = sorted(new[fold[i], j, 0] - scores[i] for i in range(40))
        highs = sorted(new[fold[i], j, 2] + scores[i] for i in range(40))
        assert got[j].tolist() == [lows[7], new[:, j, 1].mean(), highs[32]]  # ranks 8 and 33 of 40
    same = np.repeat(new[:1], 4, axis=0)  # one model for all folds: the split form
    np.testing.assert_allclose(
        conformalize_quantiles(q, y, same, levels=(0.1, 0.5, 0.9), fold=fold),
        conformalize_quantiles(q, y, new[0], levels=(0.1, 0.5, 0.9)),
    )
    few = conformalize_quantiles(q[:8], y[:8], same, levels=(0.05, 0.5, 0.95), fold=fold[:8])  # 9 rows are needed
    assert np.isinf(few[:, [0, 2]]).all()


@pytest.mark.parametrize(("resolution", "weights"), [("coarse", 2), ("medium", 2 * 3), ("fine", 2 * 3 * 3)])
def test_mixing_is_the_weighted_sum_written_out(resolution, weights):
    rng = np.random.default_rng(3)
    X, z, y = rng.normal(size=(8, 2)), rng.normal(size=(8, 2, 3)), rng.normal(size=8)
    model = DeepQuantileAggregator(
        levels=(0.2, 0.5, 0.8), resolution=resolution, local=False, monotone="none", steps=5, lr=0.5
    ).fit_weights(X, z, y)
    w = np.exp(model.weights_.free.detach().numpy())
    assert w.shape == (weights,)
    assert w.std() > 0.01
    expected = np.zeros((8, 3))
    for out in range(3):
        if resolution == "coarse":
            terms = [(w[j], z[:, j, out]) for j in range(2)]
        elif resolution == "medium":
            terms = [(w[3 * j + out], z[:, j, out]) for j in range(2)]
        else:
            terms = [(w[3 * (3 * j + k) + out], z[:, j, k]) for j in range(2) for k in range(3)]
        expected[:, out] = sum(a * b for a, b in terms) / sum(a for a, _ in terms)
    np.testing.assert_allclose(model.aggregate(X, z), expected, rtol=1e-12)


def test_mixing_and_crossing_penalty_are_the_official_codes():
    """Values of amazon-science/quantile-aggregation, run on these numbers; its global weights agreed to 1e-7."""
    q = torch.tensor([[1.0, 0.5, 2.0, 1.9], [0.0, 1.0, 2.0, 3.0]])
    assert _crossing(q, 0.25).item() == pytest.approx(0.09166666666666667)
    z = torch.tensor([[[1.0, 2.0], [3.0, 5.0]]])
    logits = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]])
    e = math.e
    expected = [(1 + 2 + 3 * e + 5) / (3 + e), (e + 2 + 3 + 5 * e**2) / (2 + e + e**2)]
    assert _mixed(z, logits)[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize(("local", "resolution"), [(True, "coarse"), (True, "fine"), (False, "medium")])
def test_weights_go_to_the_model_that_is_right_where_it_is_right(local, resolution):
    """Two models: one right for x > 0, the other for x < 0, or, globally, one at low levels and one at high ones."""
    rng = np.random.default_rng(4)
    X = rng.choice([-1.0, 1.0], (600, 1))
    y = rng.random(600)
    levels = np.array([0.1, 0.5, 0.9])
    right = np.broadcast_to(levels, (600, 3))
    wrong = right + 3.0
    first = (X > 0) if local else (levels < 0.6)
    z = np.stack([np.where(first, right, wrong), np.where(first, wrong, right)], axis=1)
    model = DeepQuantileAggregator(
        levels=tuple(levels), local=local, resolution=resolution, steps=400, lr=0.03, hidden=8
    ).fit_weights(X, z, y)
    assert np.abs(model.aggregate(X, z) - levels).max() < 0.15


def test_steps_zero_is_the_plain_average_and_mending_is_as_told():
    rng = np.random.default_rng(5)
    X, z, y = rng.normal(size=(20, 2)), rng.normal(size=(20, 4, 5)), rng.normal(size=20)
    plain = {"levels": LEVELS, "resolution": "medium", "local": False, "steps": 0}
    mean = z.mean(1)
    for monotone, expected in (("none", mean), ("sort", np.sort(mean)), ("isotonic", isotonic_quantiles(mean))):
        got = DeepQuantileAggregator(monotone=monotone, **plain).fit_weights(X, z, y).aggregate(X, z)
        np.testing.assert_allclose(got, expected, atol=1e-12)


LINEAR = {"models": ("linear",), "levels": (0.1, 0.5, 0.9), "folds": 2, "steps": 100}


@pytest.mark.parametrize("tail", [0.05, 0.1, 0.25])
def test_pairs_cover_as_asked_over_recalibrations(tail):
    """The models once; then 600 times 19 rows to calibrate and one to cover: rank 20 (1 - 2 tail) of 20, binomial."""
    levels = (tail, 0.5, 1 - tail)
    model = DeepQuantileAggregator(**{**LINEAR, "levels": levels}).fit(*data(100))
    X, y = data(600 * 20, seed=6)
    model.shifts_ = np.zeros(3)
    raw = model.predict_quantiles(X).reshape(600, 20, 3)
    hits = []
    for q, target in zip(raw, y.reshape(600, 20)):
        low, _, high = conformalize_quantiles(q[:19], target[:19], q[19:], levels=levels)[0]
        hits.append(low <= target[19] <= high)
    low, high = binom.interval(0.9999, 600, 1 - 2 * tail)
    assert low <= sum(hits) <= high
    model.calibrate(X[:19], y[:19])
    np.testing.assert_allclose(
        model.predict_quantiles(X[19:20]),
        conformalize_quantiles(raw[0, :19], y[:19], raw[0, 19:], levels=levels),
    )


def test_quantiles_near_the_true_ones():
    X, y = data(600)
    new, _ = data(200, seed=7)
    model = DeepQuantileAggregator(**{**LINEAR, "steps": 200, "resolution": "medium"}).fit(X, y)
    true = (1 + new[:, :1]) * np.array([-1.2816, 0, 1.2816])
    assert np.abs(model.predict_quantiles(new) - true).mean() < 0.25
    assert np.abs(model.predict(new)).mean() < 0.25


def test_models_may_be_regressors_with_a_level_of_their_own():
    X, y = data(80)
    given = DeepQuantileAggregator(**{**LINEAR, "models": (QuantileRegressor(alpha=0.0, quantile=0.99),)}).fit(X, y)
    named = DeepQuantileAggregator(**LINEAR).fit(X, y)
    assert np.array_equal(given.predict_quantiles(X), named.predict_quantiles(X))
    assert [m.quantile for m in given.models_[0]] == [0.1, 0.5, 0.9]


def test_degenerate_data_have_a_defined_outcome():
    X, y = data(12)
    few = DeepQuantileAggregator(**LINEAR).fit(X, y)  # 3 rows kept, 4 are needed for the pair at 0.2
    assert np.isinf(few.predict_quantiles(X)[:, [0, 2]]).all()
    assert np.isfinite(few.predict(X)).all()
    none = DeepQuantileAggregator(calibration=0.0, **LINEAR).fit(X, y)
    assert np.isfinite(none.predict_quantiles(X)).all()
    assert not none.shifts_.any()
    constant = DeepQuantileAggregator(**LINEAR).fit(np.column_stack([X, np.ones(12)]), np.full(12, 3.0))
    assert constant.predict(np.column_stack([X, np.ones(12)])) == pytest.approx(np.full(12, 3.0))


def test_scikit_learn_drives_it():
    X, y = data(60)
    answers = cross_val_predict(make_pipeline(StandardScaler(), DeepQuantileAggregator(**LINEAR)), X, y, cv=2)
    assert answers.shape == (60,)


def test_refusals_name_the_argument():
    X, y = data(20)
    q = np.zeros((20, 3))
    with pytest.raises(ValueError, match=r"quantiles: expected shape \(20, 2\), got \(20, 3\)"):
        weighted_interval_score(q, y, levels=(0.1, 0.9))
    with pytest.raises(ValueError, match="levels: expected 1 - level beside every level"):
        conformalize_quantiles(q, y, q, levels=(0.1, 0.5, 0.8))
    with pytest.raises(ValueError, match=r"quantiles: expected shape \(20, 3\)"):
        conformalize_quantiles(q[:, :2], y, q, levels=(0.1, 0.5, 0.9))
    with pytest.raises(ValueError, match="fold: expected 20 whole numbers from 0 to 1"):
        conformalize_quantiles(q, y, np.zeros((2, 5, 3)), levels=(0.1, 0.5, 0.9), fold=np.arange(20))
    with pytest.raises(ValueError, match="target: contains NaN"):
        conformalize_quantiles(q, np.full(20, np.nan), q, levels=(0.1, 0.5, 0.9))
    with pytest.raises(ValueError, match="quantiles: expected a floating-point tensor"):
        isotonic_quantiles(np.ones((2, 2), dtype=int))
    with pytest.raises(ValueError, match="models: expected one of 'linear', 'boosting', got 'magic'"):
        DeepQuantileAggregator(models=("magic",)).fit(X, y)
    with pytest.raises(ValueError, match="resolution: expected one of"):
        DeepQuantileAggregator(**LINEAR, resolution="finer").fit(X, y)
    with pytest.raises(ValueError, match=r"predictions: expected shape \(20, models, 3\), got \(20, 1, 2\)"):
        DeepQuantileAggregator(**LINEAR).fit_weights(X, np.zeros((20, 1, 2)), y)
    with pytest.raises(NotFittedError):
        DeepQuantileAggregator().predict_quantiles(X)
