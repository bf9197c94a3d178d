"""Marginal problems against every coupling, the two-multiplier dual, primal linear programs and normal marginals."""

import itertools

import numpy as np
import pytest
from scipy import stats
from scipy.optimize import linear_sum_assignment, linprog, minimize

from lossary.weighting import makarov_bounds, marginal_model_risk, wasserstein_makarov_bounds


def test_makarov_bounds_are_the_extremes_over_all_couplings():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 5, 5), rng.integers(0, 5, 5)  # with many ties
        z = np.arange(-1, 10)
        sums = np.array([first + second[list(order)] for order in itertools.permutations(range(5))])
        shares = (sums[:, :, None] <= z).mean(1)
        lower, upper = makarov_bounds(first, second, z)
        assert lower == pytest.approx(shares.min(0))
        assert upper == pytest.approx(shares.max(0))


def test_makarov_bounds_of_unequal_samples_are_those_of_repeated_points():
    first, second, z = [0.3, 1.0, 1.0], [-1.0, 0.2], np.linspace(-1, 2, 13)
    repeated = makarov_bounds(np.repeat(first, 2), np.repeat(second, 3), z)
    assert np.array(makarov_bounds(first, second, z)) == pytest.approx(np.array(repeated))


def test_makarov_bounds_of_two_normals():
    """For N(0, 1) twice the sum is at most z with probability at least 2 Phi(z / 2) - 1, for z > 0."""
    points = stats.norm.ppf((np.arange(4000) + 0.5) / 4000)
    lower, upper = makarov_bounds(points, points, np.array([-1.0, 0.5, 2.0]))
    assert lower == pytest.approx([0, *(2 * stats.norm.cdf([0.25, 1.0]) - 1)], abs=1e-3)
    assert upper == pytest.approx([2 * stats.norm.cdf(-0.5), 1, 1], abs=1e-3)


def two_multipliers(first, second, z, radii, order):
    """The dual as the paper has it, minimised over both multipliers by a grid and Nelder-Mead."""
    beyond = np.maximum(np.add.outer(first, second) - z, 0)

    def value(logs):
        a, b = np.exp(logs)
        slope = min(a, b) if order == 1 else a * b / (a + b)
        gain = np.maximum(0, 1 - slope * beyond**order)
        mean = gain[linear_sum_assignment(gain, maximize=True)].mean()
        return a * radii[0] ** order + b * radii[1] ** order + mean

    start = min(itertools.product(np.linspace(-4, 5, 16), repeat=2), key=value)
    return min(minimize(value, start, method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-13}).fun, 1.0)


@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("radii", [(0.1, 0.1), (0.3, 0.05)])
def test_robust_bounds_are_the_dual_over_both_multipliers(order, radii):
    rng = np.random.default_rng(1)
    first, second, z = rng.normal(size=12), rng.normal(size=12), [-1.5, 0.25, 2.0]
    lower, upper = wasserstein_makarov_bounds(first, second, z, radius=radii, order=order)
    assert upper == pytest.approx([two_multipliers(first, second, v, radii, order) for v in z], abs=1e-7)
    mirrored = [two_multipliers(-first, -second, -v, radii, order) for v in z]
    assert lower == pytest.approx(1 - np.array(mirrored), abs=1e-7)
    assert 0 < upper[0] < 1


def primal(first, second, places, gains, radii, order):
    """The worst case over laws on the places (a, b), each reached from the points (i, j): one variable for each
    (i, a, b, j), with the samples' marginals and two budgets."""
    moved = [np.abs(np.subtract.outer(s, p)) ** order for s, p in zip((first, second), places)]
    (n, g), (m, h) = moved[0].shape, moved[1].shape
    index = np.indices((n, g, h, m)).reshape(4, -1)
    i, a, b, j = index
    equal = np.vstack([[i == k for k in range(n)], [j == k for k in range(m)]]).astype(float)
    shares = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    spent = np.vstack([moved[0][i, a], moved[1][j, b]])
    budgets = np.array(radii) ** order
    return -linprog(-gains[a, b], A_ub=spent, b_ub=budgets, A_eq=equal, b_eq=shares).fun


@pytest.mark.parametrize("order", [1.0, 2.0])
@pytest.mark.parametrize("radii", [(0.0, 0.0), (0.2, 0.2), (0.5, 0.0), (9.0, 9.0)])
def test_risk_is_the_primal_linear_program(order, radii):
    rng = np.random.default_rng(2)
    first, second, more = rng.normal(size=4), rng.normal(size=3), np.array([-1.5, 0.0, 1.5])
    places = [np.union1d(s, more) for s in (first, second)]
    for payoff in (lambda a, b: np.maximum(a + b - 0.5, 0), lambda a, b: 1.0 * (a * b > 0.4), lambda a, b: -a * b):
        found = marginal_model_risk(payoff, first, second, support=(more, more), radius=radii, order=order)
        gains = payoff(places[0][:, None], places[1])
        assert found == pytest.approx(primal(first, second, places, gains, radii, order), abs=1e-7)


def test_risk_of_a_threshold_is_the_robust_bound_where_the_places_allow_the_moves():
    first, second = np.array([0.0, 1.0, 2.0]), np.array([0.0, 2.0, 3.0])
    fine = np.arange(-8, 25) / 8
    for z, radius in ((0.5, 0.125), (1.5, 0.25), (2.5, (0.5, 0.125))):
        _, upper = wasserstein_makarov_bounds(first, second, z, radius=radius)
        below = marginal_model_risk(
            lambda a, b, z=z: 1.0 * (a + b <= z), first, second, support=(fine, fine), radius=radius
        )
        assert below == pytest.approx(float(upper), abs=1e-7)


def test_a_hand_made_case():
    """The pairs (0, 0) and (1, 1) put half of the mass at sums up to 0.9 for free; the pairs (0, 1) and (1, 0) all of
    it if each moves by 0.1. With a budget of 0.02 a fifth may be paired in the second way."""
    _, upper = wasserstein_makarov_bounds([0.0, 1.0], [0.0, 1.0], 0.9, radius=(0.015, 0.005))
    assert upper == pytest.approx(0.8 / 2 + 0.2)
    _, upper = wasserstein_makarov_bounds([0.0, 1.0], [0.0, 1.0], 0.9, radius=0.06)
    assert upper == pytest.approx(1.0)


def test_unequal_samples_and_several_thresholds_of_any_shape():
    rng = np.random.default_rng(3)
    first, second, z = rng.normal(size=4), rng.normal(size=6), np.array([[-1.0, 0.0], [1.0, 2.0]])
    found = np.array(wasserstein_makarov_bounds(first, second, z, radius=0.1, order=2.0))
    repeated = wasserstein_makarov_bounds(np.repeat(first, 3), np.repeat(second, 2), z, radius=0.1, order=2.0)
    assert found.shape == (2, 2, 2)
    assert found == pytest.approx(np.array(repeated), abs=1e-7)


def test_bounds_widen_with_the_radius_from_makarovs_to_nothing():
    rng = np.random.default_rng(4)
    first, second, z = rng.normal(size=25), rng.normal(size=25), np.linspace(-2, 2, 5)
    steps = [np.array(wasserstein_makarov_bounds(first, second, z, radius=r)) for r in (0.0, 1e-9, 0.1, 0.4, 50.0)]
    assert np.array_equal(steps[0], np.array(makarov_bounds(first, second, z)))
    assert steps[1] == pytest.approx(steps[0], abs=1e-5)
    for tight, wide in itertools.pairwise(steps):
        assert (wide[0] <= tight[0] + 1e-9).all()
        assert (wide[1] >= tight[1] - 1e-9).all()
    assert steps[-1].tolist() == [[0.0] * 5, [1.0] * 5]


def test_sums_that_tie_with_the_threshold_count_as_above_it_for_any_radius():
    lower, upper = wasserstein_makarov_bounds([0.0, 1.0], [0.0, 1.0], 1.0, radius=1e-12)
    assert (lower, upper) == (pytest.approx(0.0, abs=1e-9), 1.0)
    assert makarov_bounds([0.0, 1.0], [0.0, 1.0], 1.0)[0] == 0.5


def test_rounding_of_a_tie_does_not_derail_the_search():
    first, second = np.array([0.1, 0.2, 0.3, 0.7]), np.array([0.2, 0.1, 0.3, 0.1])  # 0.1 + 0.2 is above 0.3
    _, upper = wasserstein_makarov_bounds(first, second, 0.3, radius=0.01)
    assert upper == pytest.approx(two_multipliers(first, second, 0.3, (0.01, 0.01), 1), abs=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match=r"first: expected one or more finite numbers in a row, got shape \(0,\)"):
        makarov_bounds([], [1.0], 0.0)
    with pytest.raises(ValueError, match="second: expected one or more finite numbers"):
        makarov_bounds([1.0], [np.nan], 0.0)
    with pytest.raises(ValueError, match="z: expected finite numbers"):
        makarov_bounds([1.0], [1.0], [np.inf])
    for radius in (-0.1, (0.1, -0.1)):
        with pytest.raises(ValueError, match=r"radius: expected a number >= 0, got -0\.1"):
            wasserstein_makarov_bounds([1.0], [1.0], 0.0, radius=radius)
    with pytest.raises(ValueError, match=r"order: expected a number >= 1, got 0\.5"):
        wasserstein_makarov_bounds([1.0], [1.0], 0.0, radius=0.1, order=0.5)
    with pytest.raises(ValueError, match="payoff: expected finite numbers"):
        marginal_model_risk(lambda a, b: a + b + np.inf, [1.0], [1.0], support=([], []), radius=0.1)
