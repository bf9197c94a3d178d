"""The conformal engine: exact order statistics, ties that rounding must not lose, and losses made to fall."""

import math
from fractions import Fraction

import numpy as np
import pytest

from lossary.uncertainty._conformal import falling, first_safe, quantile


@pytest.mark.parametrize("alpha", ["0.05", "0.1", "0.2", "0.3", "0.7"])
def test_quantile_is_exact_for_every_size(alpha):
    for n in range(1, 400):
        rank = math.ceil((n + 1) * (1 - Fraction(alpha)))
        expected = rank if rank <= n else np.inf
        assert quantile(np.arange(n, 0, -1.0), float(alpha)) == expected


def test_a_mean_that_meets_its_level_exactly_is_safe():
    """Losses of one tenth and alpha = 0.1: in floating point the sum of n tenths is now above, now below n / 10."""
    for n in range(10, 300):
        losses = np.column_stack([np.full(n, 0.2), np.full(n, 0.1)])
        found = first_safe(losses, alpha=0.1, upper_bound=0.1, weights=np.ones(n), test_weights=np.ones(1))
        assert found.tolist() == [1]


def test_first_safe_goes_by_the_weights():
    losses = np.array([[1.0, 0.0, 0.0], [1.0, 1.0, 0.0]])
    common = {"alpha": 0.5, "upper_bound": 1.0, "test_weights": np.array([0.0, 2.0, 9.0])}
    assert first_safe(losses, weights=np.array([3.0, 1.0]), **common).tolist() == [1, 1, 3]
    assert first_safe(losses, weights=np.array([1.0, 3.0]), **common).tolist() == [2, 2, 3]


def test_falling_is_the_smallest_falling_bound():
    assert falling(np.array([[3.0, 1.0, 2.0, 0.0]])).tolist() == [[3.0, 2.0, 2.0, 0.0]]
