"""R2CCP against closed forms, a fine grid, the official code's numbers and its own guarantee."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import binom
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lossary.uncertainty import R2CCPRegressor, density_level_set, interpolated_density_score, r2ccp_loss


def drawn(rows=50, points=9, seed=0):
    g = torch.Generator().manual_seed(seed)
    grid = torch.linspace(-1, 2, points, dtype=torch.float64)
    return (
        2 * torch.randn(rows, points, generator=g, dtype=torch.float64),
        4 * torch.rand(rows, generator=g).double() - 1.5,
        grid,
    )


@pytest.mark.parametrize(("p", "tau"), [(0.5, 0.2), (2.0, 0.0), (1.0, 3.0)])
def test_loss_is_distance_less_entropy_point_by_point(p, tau):
    logits, y, grid = drawn(7)
    got = r2ccp_loss(logits, y, midpoints=grid, p=p, tau=tau)
    for z, target, value in zip(logits.tolist(), y.tolist(), got.tolist()):
        total = sum(math.exp(v) for v in z)
        expected = 0.0
        for v, m in zip(z, grid.tolist()):
            q = math.exp(v) / total
            expected += q * abs(target - m) ** p + tau * q * math.log(q)
        assert value == pytest.approx(expected, rel=1e-12)


def test_loss_is_a_fifth_of_the_official_codes():
    """Run by the authors' code (EtashGuha/R2CCP): distances weigh 5, negative entropy 1, power 0.5; a sum over rows."""
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0], [3.0, 0.0, -3.0, 3.0]], dtype=torch.float64)
    grid, y = torch.tensor([-1.5, -0.5, 0.5, 1.5], dtype=torch.float64), torch.tensor([0.3, -1.2], dtype=torch.float64)
    assert 5 * r2ccp_loss(logits, y, midpoints=grid).sum().item() == pytest.approx(6.959969328848462, rel=1e-12)
    score = interpolated_density_score(logits.softmax(-1), y, midpoints=grid)
    assert score.tolist() == pytest.approx([0.562507987, 0.348364353], abs=1e-6)


def test_least_mean_loss_is_at_the_closed_form():
    """No logits do better than -E|y - m|^p / tau, where the gradient vanishes and the value is a log-partition."""
    _, y, grid = drawn(400)
    cost = (y[:, None] - grid).abs().sqrt().mean(0)
    best = (-cost / 0.2).requires_grad_()
    value = r2ccp_loss(best.expand(400, -1), y, midpoints=grid).mean()
    (slope,) = torch.autograd.grad(value, best)
    assert slope.abs().max() < 1e-12
    assert value.item() == pytest.approx(-0.2 * math.log(sum(math.exp(-c / 0.2) for c in cost.tolist())), rel=1e-12)


def test_root_keeps_two_peaks_where_the_square_makes_one():
    y, grid = torch.tensor([-1.0, 1.0] * 50), torch.linspace(-2, 2, 41)
    for p, modes in ((0.5, [-1.0, 1.0]), (2.0, [0.0])):
        logits = torch.zeros(41)
        for _ in range(200):
            free = logits.requires_grad_()
            loss = r2ccp_loss(free.expand(100, -1), y, midpoints=grid, p=p).mean()
            logits = (free - 20 * torch.autograd.grad(loss, free)[0]).detach()
        q = logits.softmax(0)
        peak = (q[1:-1] > q[:-2]) & (q[1:-1] > q[2:])
        assert grid[1:-1][peak].tolist() == pytest.approx(modes, abs=1e-5)


def test_score_is_numpys_interpolation():
    logits, y, grid = drawn()
    y[:3] = torch.tensor([-1.0, 2.0, grid[4].item()])  # both ends and a grid point
    probs = logits.softmax(-1)
    expected = [np.interp(t, grid, q, left=0, right=0) for t, q in zip(y.tolist(), probs.numpy())]
    assert interpolated_density_score(probs, y, midpoints=grid).tolist() == pytest.approx(expected, rel=1e-12)
    assert y.min() < -1
    assert y.max() > 2


@pytest.mark.parametrize("threshold", [0.02, 0.1, 0.3, 0.99])
def test_level_sets_hold_the_points_whose_score_is_high_enough(threshold):
    logits, _, grid = drawn(200)
    probs = logits.softmax(-1)
    sets = density_level_set(probs, threshold, midpoints=grid)
    fine = torch.linspace(-1.1, 2.1, 801, dtype=torch.float64)
    high = (
        interpolated_density_score(probs[:, None].expand(-1, 801, -1), fine.expand(200, -1), midpoints=grid)
        >= threshold
    )
    inside = ((sets[..., :1] <= fine) & (fine <= sets[..., 1:])).any(1)
    assert torch.equal(high, inside)
    count = (~sets[..., 0].isnan()).sum(1)
    assert sets.shape[1] == max(int(count.max()), 1)
    assert not (sets[..., 1][sets[..., 0] == sets[..., 0]] < sets[..., 0][sets[..., 0] == sets[..., 0]]).any()


def test_level_sets_by_hand():
    grid = torch.tensor([0.0, 1.0, 2.0, 4.0])
    probs = torch.tensor([[0.5, 0.0, 0.25, 0.25]])
    assert density_level_set(probs, 0.25, midpoints=grid).tolist() == [[[0.0, 0.5], [2.0, 4.0]]]
    assert density_level_set(probs, 0.5, midpoints=grid).tolist() == [[[0.0, 0.0]]]  # a point is enough
    assert density_level_set(probs, 0.6, midpoints=grid).isnan().all()
    assert density_level_set(probs, 0.0, midpoints=grid).tolist() == [[[-math.inf, math.inf]]]
    stacked = density_level_set(probs.expand(2, 3, 4), 0.25, midpoints=grid)
    assert stacked.shape == (2, 3, 2, 2)


def data(rows, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.random((rows, 2))
    return X, rng.choice([-1.0, 1.0], rows) * (1 + X[:, 0]) + 0.2 * rng.normal(size=rows)


SMALL = {"steps": 150, "hidden": 32, "lr": 0.01}


@pytest.mark.parametrize("alpha", ["0.1", "0.3"])
def test_coverage_is_exact_over_recalibrations_of_one_network(alpha):
    """A pool of rows split 600 times, 30 to calibrate and one to cover: binomial."""
    model = R2CCPRegressor(alpha=float(alpha), **SMALL).fit(*data(300))
    X, y = data(600 * 31, seed=2)
    scores = model._scores(X, y).reshape(600, 31)
    hits = 0
    for row, part in zip(scores, range(600)):
        if part < 20:  # the public way, now and then
            rows = slice(31 * part, 31 * part + 31)
            model.calibrate(X[rows][:30], y[rows][:30])
            assert model.contains(X[rows][:30], y[rows][:30]).sum() == 31 - math.floor(31 * Fraction(alpha))
            covered = bool(model.contains(X[rows][30:], y[rows][30:])[0])
            assert covered == (row[30] >= np.sort(row[:30])[math.floor(31 * Fraction(alpha)) - 1])
        hits += row[30] >= np.sort(row[:30])[math.floor(31 * Fraction(alpha)) - 1]
    chance = 1 - math.floor(31 * Fraction(alpha)) / 31
    low, high = binom.interval(0.9999, 600, chance)
    assert low <= hits <= high


def test_sets_intervals_and_contains_agree():
    model = R2CCPRegressor(tau=0.02, **SMALL).fit(*data(400))
    X, y = data(300, seed=3)
    sets, hull = model.predict_sets(X), model.predict_interval(X)
    inside = ((sets[..., 0] <= y[:, None]) & (y[:, None] <= sets[..., 1])).any(1)
    assert np.array_equal(inside, model.contains(X, y))
    np.testing.assert_array_equal(hull[:, 0], np.nanmin(sets[..., 0], axis=1))
    np.testing.assert_array_equal(hull[:, 1], np.nanmax(sets[..., 1], axis=1))
    assert model.contains(X, np.zeros(300)).mean() < 0.25  # mostly the gap between the peaks is left out
    assert np.abs(model.predict(X)).min() > 0.5  # likeliest is a peak, not the mean in the gap


def test_degenerate_data_have_a_defined_outcome():
    X, y = data(60)
    few = R2CCPRegressor(alpha=0.05, calibration=0.3, **SMALL).fit(X, y)  # 18 rows, of which 19 are needed
    assert few.threshold_ == -math.inf
    assert np.isinf(few.predict_sets(X)).all()
    assert few.contains(X, y + 1e6).all()
    few.set_params(alpha=0.1).calibrate(X, y)
    assert few.threshold_ > 0
    assert not few.contains(X, y + 1e6).any()
    few.calibrate(X, np.where(np.arange(60) < 20, 1e6, y))  # a third beyond the grid
    assert np.isinf(few.predict_sets(X)).all()
    constant = R2CCPRegressor(**SMALL).fit(X, np.full(60, 7.0))
    assert constant.predict(X) == pytest.approx(np.full(60, 7.0), abs=0.02)  # half a step of the grid
    wide = R2CCPRegressor(**SMALL).fit(np.column_stack([X, np.ones(60)]), y)  # a constant feature
    assert np.isfinite(wide.predict(np.column_stack([X, np.ones(60)]))).all()


def test_scikit_learn_drives_it():
    X, y = data(90)
    answers = cross_val_predict(make_pipeline(StandardScaler(), R2CCPRegressor(**SMALL)), X, y, cv=2)
    assert answers.shape == (90,)
    assert np.abs(np.abs(answers) - 1 - X[:, 0]).mean() < 0.3


def test_refusals_name_the_argument():
    logits, y, grid = drawn(5)
    with pytest.raises(ValueError, match=r"target: expected shape \(5,\), got \(4,\)"):
        r2ccp_loss(logits, y[:4], midpoints=grid)
    with pytest.raises(ValueError, match=r"midpoints: expected shape \(9,\), got \(8,\)"):
        r2ccp_loss(logits, y, midpoints=grid[1:])
    with pytest.raises(ValueError, match=r"p: expected a number > 0, got 0"):
        r2ccp_loss(logits, y, midpoints=grid, p=0)
    with pytest.raises(ValueError, match=r"tau: expected a number >= 0, got -1"):
        r2ccp_loss(logits, y, midpoints=grid, tau=-1)
    with pytest.raises(ValueError, match=r"probs: expected a floating-point tensor, got torch.int64"):
        density_level_set(logits.long(), 0.1, midpoints=grid)
    with pytest.raises(ValueError, match=r"midpoints: expected at least two"):
        interpolated_density_score(logits[:, :1], y, midpoints=grid[:1])
    with pytest.raises(NotFittedError):
        R2CCPRegressor().contains(*data(5))
    with pytest.raises(ValueError, match=r"bins: expected a whole number >= 2, got 1"):
        R2CCPRegressor(bins=1).fit(*data(9))
    with pytest.raises(ValueError, match=r"calibration: expected a number > 0 and < 1, got 1"):
        R2CCPRegressor(calibration=1.0).fit(*data(9))
    with pytest.raises(ValueError, match="random_state: expected a whole number or a RandomState, got None"):
        R2CCPRegressor(random_state=None).fit(*data(9))
    X, y = data(9)
    X[3, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        R2CCPRegressor().fit(X, y)
