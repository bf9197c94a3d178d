"""Conformal risk control against split conformal quantiles, a brute-force search and its own guarantee."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict

from lossary.uncertainty import (
    ConformalRiskControl,
    best_of_set_loss,
    conformal_risk_control,
    false_negative_rate,
    quantile_risk_control,
    u_statistic_risk_control,
    weighted_conformal_risk_control,
)


def random_losses(n, columns=40, seed=0):
    """Losses in sixteenths that fall to 0, so that fractions can follow them exactly."""
    rng = np.random.default_rng(seed)
    losses = np.sort(rng.integers(0, 17, (n, columns)), axis=1)[:, ::-1] / 16
    losses[:, -1] = 0
    return losses, np.arange(columns) / 7.0


def search(losses, lambdas, weights, test_weight, alpha, bound):
    """The definition, lambda by lambda, in exact arithmetic."""
    alpha, bound, w = Fraction(alpha), Fraction(bound), [Fraction(float(v)) for v in weights]
    for column, value in enumerate(lambdas):
        total = (
            sum(wi * Fraction(float(loss)) for wi, loss in zip(w, losses[:, column])) + Fraction(test_weight) * bound
        )
        if total <= alpha * (sum(w) + Fraction(test_weight)):
            return value
    return lambdas[-1]


@pytest.mark.parametrize("n", [3, 19, 100])
@pytest.mark.parametrize("alpha", [0.0625, 0.25, 0.5])
def test_lambda_is_what_a_search_finds(n, alpha):
    losses, lambdas = random_losses(n)
    for bound in (1.0, 1.5):
        expected = search(losses, lambdas, np.ones(n), 1, alpha, bound)
        assert conformal_risk_control(losses, lambdas, alpha=alpha, upper_bound=bound) == expected


@pytest.mark.parametrize("n", [9, 19, 99, 250])
@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.3])
def test_miscoverage_gives_the_split_conformal_quantile(n, alpha):
    scores = np.random.default_rng(n).permutation(n) / n
    lambdas = np.concatenate([[-1.0], np.sort(scores)])
    miscoverage = scores[:, None] > lambdas
    rank = math.ceil((n + 1) * (1 - Fraction(str(alpha))))
    expected = np.sort(scores)[rank - 1]
    assert conformal_risk_control(miscoverage, lambdas, alpha=alpha) == expected
    assert quantile_risk_control(scores[:, None] - lambdas, lambdas, alpha=0.0, beta=1 - alpha) == expected


def test_quantile_control_is_risk_control_of_exceeding_alpha():
    losses, lambdas = random_losses(60)
    for alpha, beta in ((0.25, 0.5), (0.5, 0.9), (0.0, 0.75)):
        expected = conformal_risk_control(losses > alpha, lambdas, alpha=1 - beta)
        assert quantile_risk_control(losses, lambdas, alpha=alpha, beta=beta) == expected


def test_weights_enter_as_a_search_over_each_test_sample_says():
    losses, lambdas = random_losses(50)
    rng = np.random.default_rng(1)
    weights, test_weights = rng.integers(0, 64, 50) / 16, np.array([0.0, 0.25, 3.0, 400.0])
    expected = [search(losses, lambdas, weights, float(w), 0.25, 1.0) for w in test_weights]
    got = weighted_conformal_risk_control(losses, lambdas, weights, test_weights, alpha=0.25)
    assert got.tolist() == expected
    assert expected[-1] == lambdas[-1]  # too foreign a sample is given everything
    even = weighted_conformal_risk_control(losses, lambdas, np.full(50, 7.0), torch.tensor([7]), alpha=0.25)
    assert even.tolist() == [conformal_risk_control(torch.from_numpy(losses.copy()), lambdas, alpha=0.25)]


@pytest.mark.parametrize(("n", "order"), [(4, 1), (7, 2), (12, 2), (6, 3)])
@pytest.mark.parametrize("alpha", [0.5, 0.75])
def test_sets_of_samples_count_as_a_search_over_all_of_them_says(n, order, alpha):
    known = list(itertools.combinations(range(n), order))
    losses, lambdas = random_losses(len(known), seed=n)
    every = list(itertools.combinations(range(n + order), order))
    whole = np.ones((len(every), len(lambdas)))  # a set that has a new sample at its worst
    for row, members in enumerate(every):
        if members in known:
            whole[row] = losses[known.index(members)]
    safe = [sum(map(Fraction, column)) <= Fraction(alpha) * len(every) for column in whole.T.tolist()]
    expected = lambdas[safe.index(True)] if True in safe else lambdas[-1]
    assert u_statistic_risk_control(losses, lambdas, samples=n, order=order, alpha=alpha) == expected


def test_pairs_of_new_samples_meet_the_level_on_average():
    """The share of pairs more than lambda apart, over 600 resamples of 30 and two new ones."""
    rng = np.random.default_rng(3)
    first, second = np.triu_indices(30, 1)
    lambdas, lost = np.linspace(0, 8, 401), []
    for _ in range(600):
        x = rng.normal(size=32)
        losses = np.abs(x[first] - x[second])[:, None] > lambdas
        chosen = u_statistic_risk_control(losses, lambdas, samples=30, alpha=0.3)
        lost.append(abs(x[30] - x[31]) > chosen)
    # 61 of 496 pairs count at their worst, which leaves (0.3 496 - 61) / 435 = 0.202 for the pairs that are seen.
    assert np.mean(lost) <= 0.3
    assert np.mean(lost) == pytest.approx(0.202, abs=4 * np.sqrt(0.2 * 0.8 / 600))


def test_losses_that_rise_again_count_as_their_largest_later_value():
    rising = np.array([[0.5, 0.1, 0.4, 0.0]] * 20)
    falling = np.array([[0.5, 0.4, 0.4, 0.0]] * 20)
    grid = [0.0, 1.0, 2.0, 3.0]
    assert conformal_risk_control(rising, grid, alpha=0.3) == conformal_risk_control(falling, grid, alpha=0.3) == 3.0


def test_expected_loss_meets_the_level_from_both_sides():
    """Uniform scores, miscoverage: coverage of rank k among n is k / (n + 1) whatever the data."""
    rng = np.random.default_rng(0)
    n, alpha, lambdas = 24, 0.2, np.linspace(0, 1, 1001)
    found = [conformal_risk_control(rng.random(n)[:, None] > lambdas, lambdas, alpha=alpha) for _ in range(800)]
    risk = 1 - np.mean(found)
    assert risk == pytest.approx(alpha, abs=4 * 0.08 / math.sqrt(800))  # (n + 1) alpha is whole: exactly alpha
    assert alpha - 2 / (n + 1) < risk


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_estimator_cuts_scores_where_the_definition_says(kind):
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 129, (40, 3, 5)) / 128  # a grid of 129 lambdas hits every score
    target = rng.random(scores.shape) < scores
    target[0] = False
    control = ConformalRiskControl(alpha=0.125, grid=129).fit(kind(scores), kind(target))
    lambdas = [k / 128 for k in range(129)]
    losses = np.array([[np.mean(s[t] < 1 - x) if t.any() else 0.0 for x in lambdas] for s, t in zip(scores, target)])
    assert control.lambda_ == search(losses, lambdas, np.ones(40), 1, 0.125, 1)
    sets = control.predict(kind(scores))
    assert type(sets) is type(kind(scores))
    assert np.array_equal(np.asarray(sets), scores >= 1 - control.lambda_)
    assert clone(control).fit_losses(losses, lambdas).lambda_ == control.lambda_


@pytest.mark.parametrize(("n", "alpha"), [(20, 0.05), (20, 0.3), (50, 0.1), (150, 0.1)])
def test_sets_of_labels_are_mapies(n, alpha):
    from mapie.risk_control import MultiLabelClassificationController

    rng = np.random.default_rng(n)
    scores, new = rng.random((n, 6)), rng.random((40, 6))
    target = rng.random((n, 6)) < scores
    target[:, 0] |= ~target.any(1)  # MAPIE wants a label in every row
    mapie = MultiLabelClassificationController(
        lambda x: x, risk="recall", method="crc", target_level=1 - alpha, predict_params=np.linspace(0, 1, 101)
    ).calibrate(scores, target.astype(int))
    control = ConformalRiskControl(alpha=alpha, grid=101).fit(scores, target)
    assert 1 - control.lambda_ == pytest.approx(mapie.best_predict_param[0], abs=1e-12)
    assert np.array_equal(control.predict(new), mapie.predict(new).reshape(40, 6) == 1)


def test_scikit_learn_drives_it_and_the_promise_holds_on_folds():
    rng = np.random.default_rng(3)
    scores = rng.random((2000, 6))
    target = rng.random(scores.shape) < scores**2
    sets = cross_val_predict(ConformalRiskControl(alpha=0.1, grid=201), scores, target, cv=4, method="predict")
    loss = false_negative_rate(sets, target)
    assert 0.1 - 4 * loss.std() / math.sqrt(2000) - 1 / 200 < loss.mean() < 0.1 + 4 * loss.std() / math.sqrt(2000)


@pytest.mark.parametrize("kind", [np.asarray, lambda rows: torch.from_numpy(np.asarray(rows))])
def test_shipped_losses_by_hand(kind):
    sets = kind([[True, False, True], [False, False, False], [False, True, False]])
    target = kind([[True, True, False], [False, False, True], [False, False, False]])
    assert false_negative_rate(sets, target).tolist() == [0.5, 1.0, 0.0]  # nothing true, nothing missed
    quality = kind([[0.25, 1.0, 0.5], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert best_of_set_loss(sets, quality).tolist() == [0.5, 1.0, 1.0]


def test_any_loss_may_be_controlled():
    scores = torch.tensor([[0.9, 0.1, 0.5]] * 9, dtype=torch.bfloat16)
    control = ConformalRiskControl(alpha=0.5, loss=best_of_set_loss, grid=11)
    control.fit(scores, torch.tensor([[0.0, 1.0, 0.6]] * 9))  # 0.9 0.4 + 0.1 <= 0.5 from the third entry on
    assert control.lambda_ == pytest.approx(0.5)
    assert control.predict([[0.9, 0.4, 0.5]]).tolist() == [[True, False, True]]


def test_refusals_name_the_argument():
    losses, lambdas = random_losses(10)
    with pytest.raises(NotFittedError):
        ConformalRiskControl().predict(losses)
    with pytest.raises(ValueError, match=r"alpha: expected a number < 1, got 1.0"):
        conformal_risk_control(losses, lambdas, alpha=1.0)
    with pytest.raises(ValueError, match=r"losses: expected at most upper_bound, 0.5, got"):
        conformal_risk_control(losses, lambdas, alpha=0.1, upper_bound=0.5)
    with pytest.raises(ValueError, match=r"lambdas: expected 40 increasing numbers, got shape \(40,\)"):
        conformal_risk_control(losses, lambdas[::-1], alpha=0.1)
    assert conformal_risk_control(losses, lambdas, alpha=0.0) == lambdas[-1]  # the last one is harmless
    losses[3, -1] = 0.0625
    assert conformal_risk_control(losses, lambdas, alpha=0.0625) == lambdas[-1]
    with pytest.raises(ValueError, match=r"alpha: 0.05 is out of reach with 10 samples, of which some lose 0.0625"):
        conformal_risk_control(losses, lambdas, alpha=0.05)
    with pytest.raises(ValueError, match=r"lambdas: expected 2 increasing numbers"):
        conformal_risk_control([[1.0, 0.0]], [0.5, 0.5], alpha=0.5)
    with pytest.raises(ValueError, match=r"scores: expected shape \(samples, entries, ...\), got \(0, 3\)"):
        ConformalRiskControl().fit(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool))
    with pytest.raises(ValueError, match=r"losses: expected 6 rows, the sets of 2 of 4 samples, got 10"):
        u_statistic_risk_control(losses, lambdas, samples=4, alpha=0.5)
    with pytest.raises(ValueError, match=r"samples: expected a whole number >= 2, got 1"):
        u_statistic_risk_control(losses, lambdas, samples=1, alpha=0.5)
    with pytest.raises(ValueError, match=r"weights: expected numbers >= 0, got -1"):
        weighted_conformal_risk_control(losses, lambdas, -np.ones(10), [1.0], alpha=0.1)
    with pytest.raises(ValueError, match=r"beta: expected a number > 0 and < 1, got 1.5"):
        quantile_risk_control(losses, lambdas, alpha=0.1, beta=1.5)
    with pytest.raises(ValueError, match=r"scores: expected numbers from 0 to 1"):
        ConformalRiskControl().fit(losses * 3, losses > 0)
    with pytest.raises(ValueError, match=r"target: expected booleans of shape \(10, 40\), got int64"):
        ConformalRiskControl().fit(losses, np.ones((10, 40), dtype=np.int64))
