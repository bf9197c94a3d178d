"""Antidote data against double loops, the conditional of a joint normal, sums by hand and a generic optimiser."""

import math
import pickle

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.special import ndtr, ndtri
from scipy.stats import ks_2samp
from sklearn.base import BaseEstimator, clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.weighting import (
    AntidoteInprocessor,
    AntidotePreprocessor,
    ComparableSampleGenerator,
    antidote_loss,
    comparable_pairs,
)
from lossary.weighting import antidote_data as module


def people(n=90, seed=0):
    """Group, two numbers, two categories of three codes; groups a, b and c."""
    rng = np.random.default_rng(seed)
    X = np.concatenate([rng.integers(3, size=(n, 1)), rng.standard_normal((n, 2)), rng.integers(3, size=(n, 2))], 1)
    X[:, 2] *= 40
    return X, np.array(["a", "b", "c"])[X[:, 0].astype(int)]


@pytest.mark.parametrize("block", [1 << 22, 300])
@pytest.mark.parametrize("max_changed", [0, 1, 2])
def test_pairs_are_those_of_a_double_loop(max_changed, block, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", block)
    X, group = people()
    got = comparable_pairs(
        X, group, threshold=(np.inf, 0.5, 0.8, 0, 0), categorical=(3, 4), max_changed=max_changed
    ).tolist()
    wide = [math.sqrt(sum((v - sum(c) / 90) ** 2 for v in c) / 90) for c in X.T.tolist()]
    expected = []
    for i in range(90):
        for j in range(90):
            near = abs(X[i, 1] - X[j, 1]) <= 0.5 * wide[1] and abs(X[i, 2] - X[j, 2]) <= 0.8 * wide[2]
            changed = sum(X[i, k].item() != X[j, k].item() for k in (3, 4))
            if group[i] != group[j] and near and changed <= max_changed:
                expected.append([i, j])
    assert got == expected
    assert len(got) > 20


SHAPE = np.array([[1.0, 0.5], [0.5, 2.0]])
SLOPE, SHIFT, NOISE = np.array([[0.9, 0.0], [-0.4, 0.7]]), np.array([1.0, -2.0]), np.array([[0.3, 0.1], [0.1, 0.5]])


def normal_pairs(n=20_000):
    """Rows x ~ N(0, SHAPE) and partners SLOPE x + SHIFT + N(0, NOISE), their groups and the pairs of both orders."""
    rng = np.random.default_rng(1)
    x = rng.multivariate_normal([0, 0], SHAPE, n)
    partner = x @ SLOPE.T + SHIFT + rng.multivariate_normal([0, 0], NOISE, n)
    forth = np.stack([np.arange(n), n + np.arange(n)], 1)
    return np.concatenate([x, partner]), np.repeat([0, 1], n), np.concatenate([forth, forth[:, ::-1]])


def test_draws_follow_the_closed_conditional_of_normal_pairs():
    X, group, pairs = normal_pairs()
    generator = ComparableSampleGenerator().fit(X, group, pairs)
    for x in ([0.0, 0.0], [1.2, -1.5]):
        drawn, other = generator.sample([x], [0], 20_000)
        assert (other == 1).all()
        assert drawn[0].mean(0) == pytest.approx(SLOPE @ x + SHIFT, abs=0.04)
        assert np.cov(drawn[0].T) == pytest.approx(NOISE, abs=0.04)
    there = np.array([2.0, -3.0])  # the way back, by Bayes: precision SHAPE^-1 + SLOPE' NOISE^-1 SLOPE
    spread = np.linalg.inv(np.linalg.inv(SHAPE) + SLOPE.T @ np.linalg.inv(NOISE) @ SLOPE)
    drawn, _ = generator.sample([there], [1], 20_000)
    assert drawn[0].mean(0) == pytest.approx(spread @ SLOPE.T @ np.linalg.inv(NOISE) @ (there - SHIFT), abs=0.04)
    assert np.cov(drawn[0].T) == pytest.approx(spread, abs=0.04)


def test_the_copula_sees_ranks_only():
    X, group, pairs = normal_pairs(2000)
    new, own = X[:500], group[:500]
    plain, _ = ComparableSampleGenerator().fit(X, group, pairs).sample(new, own)
    bent, _ = ComparableSampleGenerator().fit(np.exp(X), group, pairs).sample(np.exp(new), own)
    assert np.median(np.abs(np.log(bent) - plain)) < 1e-4
    assert np.abs(np.log(bent) - plain).max() < 0.2


def test_where_everybody_is_comparable_draws_follow_the_other_group():
    rng = np.random.default_rng(2)
    group = np.repeat(["m", "f"], 300)
    X = rng.gamma(2.0, size=(600, 1)) + 3 * (group == "f")[:, None]
    generator = ComparableSampleGenerator(threshold=np.inf).fit(X, group)
    drawn, other = generator.sample(X[:300], group[:300], 4)
    assert drawn.shape == (300, 4, 1)
    assert (other == "f").all()
    assert ks_2samp(drawn.ravel(), X[300:, 0]).pvalue > 0.01
    assert abs(np.corrcoef(drawn[:, 0, 0], X[:300, 0])[0, 1]) < 0.15
    assert len(generator.pairs_) == 2 * 20_000  # of 90,000 each way


def test_categories_change_as_often_as_their_scores_do():
    """Fair bits that agree in 9 of 10 pairs: scores of +-s, slope 0.8, residual 0.6 s; those flip with P(N < -4/3)."""
    n = 20_000
    bit = np.arange(n) % 2
    agrees = np.arange(n) // 2 % 10 != 0
    X = np.concatenate([bit, np.where(agrees, bit, 1 - bit)])[:, None]
    pairs = np.stack([np.arange(n), n + np.arange(n)], 1)
    pairs = np.concatenate([pairs, pairs[:, ::-1]])
    drawn, _ = ComparableSampleGenerator(categorical=(0,)).fit(X, np.repeat([0, 1], n), pairs).sample(X[:n], [0] * n)
    assert set(drawn.ravel()) == {0.0, 1.0}
    assert (drawn[:, 0, 0] != X[:n, 0]).mean() == pytest.approx(ndtr(-4 / 3), abs=0.01)


def test_rare_categories_stay_rare():
    """One in ten, whatever the row: scores of the middle ranks 0.45 and 0.95, a normal of their mean and variance."""
    n = 20_000
    X = np.concatenate([np.arange(n) % 2, np.arange(n) // 2 % 10 == 0]).astype(float)[:, None]
    forth = np.stack([np.arange(n), n + np.arange(n)], 1)
    generator = ComparableSampleGenerator(categorical=(0,))
    generator.fit(X, np.repeat([0, 1], n), np.concatenate([forth, forth[:, ::-1]]))
    drawn, _ = generator.sample(X[:n], np.zeros(n), 5)
    often, rare = ndtri([0.45, 0.95])
    mean, sd = 0.9 * often + 0.1 * rare, 0.3 * (rare - often)
    assert drawn.mean() == pytest.approx(ndtr((mean - (often + rare) / 2) / sd), abs=0.003)


def test_what_goes_with_the_group_changes_with_it():
    """Married men are husbands, married women wives: antidotes too, whatever is constant within a group besides."""
    rng = np.random.default_rng(3)
    man, married, age = rng.integers(2, size=400), rng.integers(2, size=400), rng.standard_normal(400)
    X = np.stack([man, age, married * man, married * (1 - man)], 1)
    generator = ComparableSampleGenerator(threshold=(np.inf, 0.2, 0, 0), categorical=(2, 3), max_changed=2).fit(X, man)
    pairs = generator.pairs_
    same = X[pairs[:, 0], 2:].sum(1) == X[pairs[:, 1], 2:].sum(1)
    generator.fit(X, man, pairs[same])
    drawn, other = generator.sample(X, man, 3)
    assert (other == 1 - man[:, None]).all()
    assert (drawn[..., 0] == other).all()
    assert (drawn[..., 2] == (married[:, None] * other)).all()
    assert (drawn[..., 3] == (married[:, None] * (1 - other))).all()
    # ages differ evenly by up to 0.2, which a normal of the same variance stands for: half of them by 0.6745 sd
    moved = np.abs(drawn[..., 1] - age[:, None])[np.abs(age) < 1]
    assert np.median(moved) == pytest.approx(0.6745 * 0.2 / 3**0.5, abs=0.015)


def test_groups_are_drawn_among_those_with_pairs():
    X = np.array([[0.0], [0.1], [1.0], [1.1], [0.5], [0.6]])
    group = np.array(["low", "low", "high", "high", "mid", "mid"])
    pairs = np.array([[0, 4], [1, 5], [2, 4], [3, 5]])
    generator = ComparableSampleGenerator().fit(X, group, np.concatenate([pairs, pairs[:, ::-1]]))
    _, other = generator.sample(X, group, 200)
    assert (other[:4] == "mid").all()
    assert (other[4:] == "low").mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="fewer than two comparable pairs lead from group high"):
        ComparableSampleGenerator().fit(X, group, pairs[:2])
    with pytest.raises(ValueError, match="fewer than two comparable pairs lead from group low"):
        ComparableSampleGenerator().fit(X[[0, 4]], group[[0, 4]], np.array([[0, 1], [1, 0]]))


def unfair(n=3000):
    """Group, an innocent number, and a label whose log-odds are their sum, the group counting 1.5."""
    rng = np.random.default_rng(4)
    X = np.stack([rng.random(n) < 0.3, rng.standard_normal(n)], 1)
    return X, np.where(rng.random(n) < 1 / (1 + np.exp(-1.5 * X[:, 0] - X[:, 1])), "yes", "no")


def test_added_antidotes_take_the_group_out_of_a_regression():
    X, y = unfair()
    near = ComparableSampleGenerator(threshold=(np.inf, 0.05))
    pre = AntidotePreprocessor(near)
    more, label = pre.fit_resample(X, y, X[:, 0])
    assert np.array_equal(more[:3000], X)
    assert np.array_equal(label, np.tile(y, 2))
    assert np.array_equal(more[3000:, 0], 1 - X[:, 0])
    assert np.array_equal(pre.sensitive_features_, more[:, 0])
    plain, fair = (LogisticRegression(C=1e6).fit(*rows).coef_[0] for rows in ((X, y), (more, label)))
    assert plain == pytest.approx([1.5, 1.0], abs=0.2)
    assert fair[0] == pytest.approx(0.0, abs=0.03)
    assert fair[1] == pytest.approx(1.0, abs=0.15)

    half = AntidotePreprocessor(near, ratio=0.25, random_state=3)
    more, label = half.fit_resample(X, y, X[:, 0])
    assert more.shape == (3750, 2)
    assert np.array_equal(label, y[half.sample_indices_])
    assert len(set(half.sample_indices_[3000:])) == 750
    assert np.array_equal(more[3000:, 0], 1 - X[half.sample_indices_[3000:], 0])

    for nothing in (None, np.ones(3000)):  # no other group
        same, label = pre.fit_resample(X, y, nothing)
        assert np.array_equal(same, X)
        assert np.array_equal(label, y)
        assert pre.generator_ is None


def test_inner_maximum():
    losses = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    twins = torch.tensor([[0.1, 0.7, 0.6], [2.0, torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    worst = antidote_loss(losses, twins)
    assert worst.tolist() == pytest.approx([1.2, math.inf])
    worst[0].backward()
    assert losses.grad.tolist() == [1.0, 0.0]
    assert twins.grad[0].tolist() == [0.0, 1.0, 0.0]
    stack = torch.stack([twins, twins / 2])
    assert torch.equal(antidote_loss(torch.stack([losses, losses]), stack)[1], losses + (twins / 2).amax(1))


class Shifts(BaseEstimator):
    """Antidotes at fixed distances, for sums by hand."""

    def fit(self, X, sensitive_features):
        return self

    def sample(self, X, sensitive_features, n_samples=1, *, rng=None):
        return X[:, None] + np.array([1.5, -1.0])[:n_samples, None], None


def test_training_minimises_loss_plus_worst_antidote():
    """Logistic regression on one feature, against a generic solver of the same sum."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal(60)
    y = (x + rng.standard_normal(60) > 0).astype(int)
    how = {"hidden": (), "epochs": 200, "batch_size": 60, "lr": 0.03}

    def objective(parameters, shifts):
        losses = [np.logaddexp(0, (1 - 2 * y) * (parameters[0] * (x + shift) + parameters[1])) for shift in shifts]
        return (losses[0] + np.max(losses[1:] or [0 * x], axis=0)).mean()

    found = {}
    for k, shifts in ((0, [0.0]), (2, [0.0, 1.5, -1.0])):
        best = minimize(objective, [0.5, 0.0], args=(shifts,), method="Nelder-Mead", options={"xatol": 1e-6}).x
        model = AntidoteInprocessor(Shifts(), antidotes=k, **how).fit(x[:, None], y, x > 0)
        p = model.predict_proba([[0.0], [1.0]])[:, 1]
        odds = np.log(p / (1 - p))
        found[k] = [odds[1] - odds[0], odds[0]]
        assert found[k] == pytest.approx(best, abs=0.02), k
    assert abs(found[0][0] - found[2][0]) > 0.3
    assert AntidoteInprocessor(Shifts(), epochs=1).fit(x[:, None], y).generator_ is None
    assert AntidoteInprocessor(Shifts(), epochs=1).fit(x[:, None], y, np.ones(60)).generator_ is None


def gap(model, X):
    """By how much a change of the group alone moves the probability."""
    other = np.stack([1 - X[:, 0], X[:, 1]], 1)
    return np.abs(model.predict_proba(X) - model.predict_proba(other))[:, 1].mean()


def test_the_estimator_is_fairer_and_goes_through_scikit_learns_tools():
    X, y = unfair(800)
    near = ComparableSampleGenerator(threshold=(np.inf, 0.1))
    how = {"hidden": (8,), "epochs": 20, "lr": 0.02, "batch_size": 200}
    fair = AntidoteInprocessor(near, antidotes=2, **how).fit(X, y, sensitive_features=X[:, 0])
    plain = AntidoteInprocessor(antidotes=0, **how).fit(X, y, sensitive_features=X[:, 0])
    assert list(fair.classes_) == ["no", "yes"]
    assert gap(plain, X) > 0.2
    assert gap(fair, X) < 0.08
    again = pickle.loads(pickle.dumps(clone(fair).fit(X, y, X[:, 0])))
    assert np.array_equal(again.predict_proba(X), fair.predict_proba(X))
    assert clone(AntidotePreprocessor(near, ratio=0.5)).get_params()["generator__threshold"] == (np.inf, 0.1)
    model = make_pipeline(StandardScaler(), AntidoteInprocessor(**how))
    assert cross_val_score(model, X, y, cv=3).mean() > 0.65


def test_draws_repeat_and_take_a_generator():
    X, group = people(200)
    generator = ComparableSampleGenerator(threshold=np.inf, max_pairs=50).fit(X, group)
    first, second = (generator.sample(X, group)[0] for _ in range(2))
    assert np.array_equal(first, second)
    rng = np.random.default_rng(0)
    assert np.array_equal(first, generator.sample(X, group, rng=rng)[0])
    assert not np.array_equal(first, generator.sample(X, group, rng=rng)[0])
    assert len(np.unique(generator.pairs_, axis=0)) == len(generator.pairs_) == 6 * 50


def test_refusals():
    X, group = people()
    with pytest.raises(ValueError, match="threshold: expected a number >= 0 or 5 of them, got -1"):
        comparable_pairs(X, group, threshold=-1)
    with pytest.raises(ValueError, match="threshold: expected a number >= 0 or 5 of them"):
        ComparableSampleGenerator(threshold=(1.0, 1.0)).fit(X, group)
    with pytest.raises(ValueError, match=r"categorical\[1\]: expected a whole number >= 0 and <= 4, got 5"):
        comparable_pairs(X, group, categorical=(1, 5))
    with pytest.raises(ValueError, match="max_changed: expected a whole number >= 0"):
        comparable_pairs(X, group, max_changed=-1)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        comparable_pairs(X, group[:-1])
    with pytest.raises(ValueError, match=r"sensitive_features: expected one label a row, got shape \(90, 5\)"):
        AntidoteInprocessor().fit(X, group, sensitive_features=X)
    with pytest.raises(ValueError, match="comparable pairs lead from group a to any other one; raise threshold"):
        AntidotePreprocessor(ComparableSampleGenerator(threshold=0.0)).fit_resample(X, group, group)
    with pytest.raises(ValueError, match=r"pairs: expected row numbers of shape \(pairs, 2\), got float64 \(3, 2\)"):
        ComparableSampleGenerator().fit(X, group, np.ones((3, 2)))
    generator = ComparableSampleGenerator(threshold=9.0).fit(X, group)
    with pytest.raises(ValueError, match="sensitive_features: group d did not occur at fit"):
        generator.sample(X[:1], ["d"])
    with pytest.raises(ValueError, match="X: expected 5 columns, as at fit, got 4"):
        generator.sample(X[:, :4], group)
    with pytest.raises(ValueError, match="n_samples: expected a whole number >= 1"):
        generator.sample(X, group, 0)
    with pytest.raises(ValueError, match=r"ratio: expected a number > 0 and <= 1, got 1\.5"):
        AntidotePreprocessor(ratio=1.5).fit_resample(X, group)
    with pytest.raises(ValueError, match="antidotes: expected a whole number >= 0, got -1"):
        AntidoteInprocessor(antidotes=-1).fit(X, group)
    with pytest.raises(ValueError, match=r"antidote_losses: expected shape \(3,\) and antidotes, got \(3, 0\)"):
        antidote_loss(torch.zeros(3), torch.zeros(3, 0))
