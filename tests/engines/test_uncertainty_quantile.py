"""The quantile engine: scores against scoringrules, isotonic rows against scikit-learn, identities between them."""

import numpy as np
import pytest
import scoringrules
import torch
from sklearn.isotonic import isotonic_regression

from lossary.uncertainty._quantile import (
    checked_levels,
    conformal_shift,
    interval_score,
    isotonic,
    pairs,
    pinball,
)

LEVELS = np.array([0.05, 0.2, 0.5, 0.8, 0.95])


def crossed(rows=300, columns=5, seed=0):
    """Quantiles in quarters, which cross and tie, and targets."""
    rng = np.random.default_rng(seed)
    return rng.integers(-8, 9, (rows, columns)) / 4, rng.integers(-12, 13, rows) / 4


def test_scores_are_those_of_scoringrules():
    q, y = crossed()
    q.sort(axis=1)
    for column, level in enumerate(LEVELS):
        expected = scoringrules.quantile_score(y, q[:, column], level)
        np.testing.assert_allclose(pinball(q, y, LEVELS)[:, column], expected, atol=1e-12)
    expected = scoringrules.interval_score(y, q[:, 0], q[:, 4], 0.1)
    np.testing.assert_allclose(interval_score(q[:, 0], q[:, 4], y, 0.1), expected, atol=1e-12)


def test_a_pair_of_pinball_losses_is_an_interval_score():
    q, y = crossed()
    both = pinball(q[:, [0, 4]], y, np.array([0.05, 0.95])).sum(1)
    np.testing.assert_allclose(0.05 * interval_score(q[:, 0], q[:, 4], y, 0.1), both, atol=1e-12)


def test_arrays_and_tensors_agree_and_the_slope_is_the_level():
    q, y = crossed()
    tensor = torch.from_numpy(q).requires_grad_()
    loss = pinball(tensor, torch.from_numpy(y), torch.from_numpy(LEVELS))
    assert np.array_equal(loss.detach().numpy(), pinball(q, y, LEVELS))
    (slope,) = torch.autograd.grad(loss.sum(), tensor)
    apart = q != y[:, None]
    np.testing.assert_allclose(slope.numpy()[apart], np.where(q > y[:, None], 1 - LEVELS, -LEVELS)[apart], atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2, 5, 40])
def test_isotonic_rows_are_those_of_scikit_learn(columns):
    q, _ = crossed(200, columns)
    q[0] = np.arange(columns)[::-1]  # all pooled
    expected = np.stack([isotonic_regression(row) for row in q])
    np.testing.assert_allclose(isotonic(torch.from_numpy(q)).numpy(), expected, atol=1e-12)


def test_isotonic_leaves_rows_in_order_alone_and_stacks():
    q, _ = crossed()
    ordered = torch.from_numpy(np.sort(q, axis=1))
    assert torch.equal(isotonic(ordered), ordered)
    stack = torch.from_numpy(q).view(3, 100, 5)
    assert torch.equal(isotonic(stack)[1], isotonic(stack[1]))


def test_the_gradient_of_isotonic_is_its_blocks():
    q = torch.tensor([3.0, 1.0, 5.0, 4.0, 3.0], dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(isotonic, q)
    half, third = torch.full((2, 2), 1 / 2), torch.full((3, 3), 1 / 3)
    assert torch.allclose(jacobian, torch.block_diag(half, third).double())


def test_mending_never_raises_the_sum_of_pinball_losses():
    q, y = crossed(2000, seed=1)
    before = pinball(q, y, LEVELS).sum(1)
    for mended in (np.sort(q, axis=1), isotonic(torch.from_numpy(q)).numpy()):
        change = pinball(mended, y, LEVELS).sum(1) - before
        assert change.max() < 1e-12
        assert change.mean() < -0.1


def test_a_shift_by_hand():
    low, high, y = np.full(4, -1.0), np.full(4, 1.0), np.array([0.0, 0.5, 3.0, -1.5])
    assert conformal_shift(low, high, y, 0.5) == 0.5  # scores -1, -0.5, 2, 0.5: rank 3
    assert conformal_shift(low, high, y, 0.7) == -0.5  # rank 2: narrower
    assert conformal_shift(low, high, y, 0.1) == np.inf


def test_levels_are_refused_that_do_not_rise_or_have_no_mirror_image():
    assert checked_levels(np.array([0.1, 0.9])) == (0.1, 0.9)
    assert pairs((0.1, 0.25, 0.5, 0.75, 0.9)) == [(0, 4), (1, 3)]
    for wrong in ((), (0.0, 0.5), (0.5, 1.0), (0.2, 0.2), (0.8, 0.2), ((0.1, 0.9),), (0.1, float("nan"))):
        with pytest.raises(ValueError, match="levels: expected increasing numbers between 0 and 1"):
            checked_levels(wrong)
    with pytest.raises(ValueError, match="levels: expected 1 - level beside every level"):
        pairs((0.1, 0.8))
