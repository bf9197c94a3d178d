"""PolyLoss against its own power series, which the code never sums, and against numbers worked by hand."""

import math

import pytest
import torch

from lossary.losses import poly1_cross_entropy, poly1_focal_loss, poly_n_cross_entropy


def logits_for(p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two-class logits whose true class has probability p."""
    return torch.tensor([[math.log(p / (1 - p)), 0.0]], dtype=torch.float64), torch.tensor([0])


def series(p: float, coefficient, terms: int = 4000) -> float:
    """sum over j of coefficient(j) (1 - p)^j, the paper's eq. 3, term by term."""
    return math.fsum(coefficient(j) * (1 - p) ** j for j in range(1, terms))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("epsilon", [-1.0, 0.0, 2.0])
def test_poly1_is_the_series_with_its_first_coefficient_moved(p, epsilon):
    expected = series(p, lambda j: 1 / j + (epsilon if j == 1 else 0.0))
    assert poly1_cross_entropy(*logits_for(p), epsilon=epsilon).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_poly_n_moves_the_first_n_coefficients(p):
    moved = (-0.5, 0.25, 2.0)
    expected = series(p, lambda j: 1 / j + (moved[j - 1] if j <= 3 else 0.0))
    assert poly_n_cross_entropy(*logits_for(p), epsilons=moved).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("p", [0.2, 0.7])
def test_focal_form_is_the_series_with_every_power_raised_by_gamma(p):
    gamma, epsilon = 2, -0.5
    expected = math.fsum((1 / j + (epsilon if j == 1 else 0.0)) * (1 - p) ** (j + gamma) for j in range(1, 4000))
    got = poly1_focal_loss(*logits_for(p), gamma=float(gamma), epsilon=epsilon).item()
    assert got == pytest.approx(expected, abs=1e-12)


def test_coefficients_that_would_turn_negative_are_refused():
    with pytest.raises(ValueError, match=r"epsilons: expected a number >= -0\.5, got -0\.6"):
        poly_n_cross_entropy(*logits_for(0.5), epsilons=(0.0, -0.6))
    with pytest.raises(ValueError, match="epsilon: expected a number >= -1"):
        poly1_cross_entropy(*logits_for(0.5), epsilon=-1.5)


@pytest.mark.parametrize("gamma", [-1.0, 0.5])
def test_exponents_whose_gradient_is_infinite_are_refused(gamma):
    with pytest.raises(ValueError, match="gamma"):
        poly1_focal_loss(*logits_for(0.5), gamma=gamma)
