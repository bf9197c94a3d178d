"""Dist loss against its official code's numbers, scipy's kernel density, and the definition of a projection."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.optimize import isotonic_regression
from scipy.stats import gaussian_kde

from lossary.criterion import Criterion
from lossary.weighting import DistLoss, kde_pseudo_labels, soft_sort


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("strength", [0.3, 1.0, 5.0])
def test_soft_sort_is_the_projection_on_the_permutahedron(strength):
    """No ordering of the input lies beyond the projection, seen from the projected point; and it is in their hull."""
    for seed in range(5):
        values = numbers(6, seed=seed, scale=3.0)
        q = soft_sort(values, strength=strength)
        point = torch.arange(1, 7, dtype=torch.float64) / strength
        orderings = torch.stack([values[list(order)] for order in permutations(range(6))])
        assert ((orderings - q) @ (point - q)).max() < 1e-9
        ascending = values.sort().values.cumsum(0)
        assert (q.cumsum(0) >= ascending - 1e-9).all()
        assert q.sum().item() == pytest.approx(values.sum().item(), abs=1e-9)


def test_long_rows_with_outliers_are_scipys_isotonic_regression():
    values = numbers(3, 200, seed=1)
    values[0, :5] = torch.tensor([-300.0, 500.0, 501.0, 1e4, -1e5])
    values[1] = values[1].round()  # ties
    for row, q in zip(values.numpy(), soft_sort(values, strength=0.7)):
        point = np.arange(200) / 0.7
        expected = point - isotonic_regression(point - np.sort(row)).x
        np.testing.assert_allclose(q.numpy(), expected, rtol=1e-10, atol=1e-9)


def test_gradients_pass_to_the_numbers_and_to_the_strength():
    values, strength = numbers(2, 7, scale=2.0).requires_grad_(), torch.tensor(1.3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v, e: soft_sort(v, strength=e), (values, strength.requires_grad_()))
    assert torch.autograd.gradgradcheck(lambda v: soft_sort(v, strength=1.3) ** 2, (values,))


def test_within_reach_it_is_the_plain_sort_at_any_size_of_row():
    ages = 50 + numbers(4096, scale=10.0).float()
    assert torch.equal(soft_sort(ages, strength=0.1), ages.sort().values)
    assert soft_sort(torch.zeros(2, 0)).shape == (2, 0)
    assert soft_sort(torch.tensor([3.0])).tolist() == [3.0]


# By get_batch_theoretical_labels of Ngk03/Dist-Loss, utils.py, on ages 40 + 30 Beta(2, 5) of numpy's default_rng(1),
# 300 of them, with its defaults (grid 21 to 100, bandwidth 0.5).
OFFICIAL = {
    6: [41.0, 42.0, 43.0, 43.0, 44.0, 53.0],
    16: [41.0, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52, 53, 54, 56],
}


@pytest.mark.parametrize("batch_size", OFFICIAL)
def test_pseudo_labels_are_the_official_codes(batch_size):
    ages = torch.from_numpy(40 + 30 * np.random.default_rng(1).beta(2, 5, 300))
    for labels in (ages, torch.cat([ages, torch.tensor([3.0, 130.0])])):
        assert kde_pseudo_labels(labels, batch_size, low=21.0, high=100.0).tolist() == OFFICIAL[batch_size]


def test_counts_of_a_large_batch_are_scipys_density():
    y = numbers(400).numpy() ** 2
    grid = np.arange(0, 6.01, 0.25)
    density = gaussian_kde(y[y <= 6], bw_method=0.3)(grid)
    labels = kde_pseudo_labels(torch.from_numpy(y), 1_000_000, low=0.0, high=6.0, step=0.25, bandwidth=0.3)
    counts = (labels.unsqueeze(1) == torch.from_numpy(grid)).sum(0).numpy()
    assert np.abs(counts - 1_000_000 * density / density.sum()).max() <= 1.5
    assert counts.sum() == 1_000_000


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 257])
@pytest.mark.parametrize("high", [60.0, 41.0])
def test_pseudo_labels_are_as_many_as_asked_for_and_on_the_grid_whatever_its_size(batch_size, high):
    labels = kde_pseudo_labels(40 + numbers(200).abs(), batch_size, low=40.0, high=high)
    assert len(labels) == batch_size
    assert (labels.diff() >= 0).all()
    assert set(labels.tolist()) <= set(np.arange(40.0, high + 1))


def test_what_rounding_leaves_goes_to_the_mode_and_its_neighbours():
    """Far apart, narrow kernels: expected counts 7/3 of three labels each, rounded to 2; one left for the first."""
    labels = kde_pseudo_labels(torch.tensor([0.0, 10.0, 20.0]), 7, low=0.0, high=20.0, bandwidth=0.01)
    assert labels.tolist() == [0.0, 0.0, 0.0, 10.0, 10.0, 20.0, 20.0]
    labels = kde_pseudo_labels(torch.tensor([0.0, 10.0, 20.0]), 8, low=0.0, high=20.0, bandwidth=0.01)  # 3 each: 9
    assert labels.tolist() == [0.0, 0.0, 10.0, 10.0, 10.0, 20.0, 20.0, 20.0]
    five = 10 * torch.arange(5.0)  # 2 each: 10, and the mode's nearest neighbours have none to give
    labels = kde_pseudo_labels(five, 8, low=0.0, high=40.0, bandwidth=0.01)
    assert labels.tolist() == [0.0, 10.0, 20.0, 20.0, 30.0, 30.0, 40.0, 40.0]


PREDICTIONS = torch.tensor([61.0, 43.5, 80.0, 44.0, 59.5, 21.0, 50.0, 48.0])
AGES = torch.tensor([58.0, 41.0, 70.0, 47.0, 63.0, 39.0, 52.0, 44.0])
PSEUDO = torch.tensor([40.0, 42.0, 44.0, 47.0, 51.0, 58.0, 63.0, 71.0])


@pytest.mark.parametrize(
    ("hyper", "value", "slopes"),
    [  # By DistLoss of Ngk03/Dist-Loss with fast-soft-sort, gradients times the batch's size.
        ({}, 9.25, [2.0, 0.0, 2.0, -1.0, 0.0, -2.0, -2.0, 2.0]),
        (
            {"distance": "l2", "weight": 0.5, "strength": 0.5},
            78.4453125,
            [4.875, 3.875, 18.875, -7.125, -8.125, -37.125, -5.125, 6.875],
        ),
    ],
)
def test_value_and_gradient_are_the_official_codes(hyper, value, slopes):
    predictions = PREDICTIONS.clone().requires_grad_()
    values = DistLoss(PSEUDO, **hyper)(predictions, AGES)
    values.sum().backward()
    assert values.mean().item() == pytest.approx(value, rel=1e-6)
    assert predictions.grad.tolist() == pytest.approx(slopes, rel=1e-5)


def test_each_sample_carries_the_distance_at_its_own_rank():
    loss = DistLoss((1.0, 2.0, 9.0), distance=torch.sub)
    assert loss(torch.tensor([5.0, 3.0, 4.0]), torch.zeros(3)).tolist() == [5 + 5 - 9, 3 + 3 - 1, 4 + 4 - 2]


def test_built_from_labels_its_pseudo_labels_are_their_quantiles():
    """Of a normal law, widened by the kernel of half its deviation, at the middles of equal shares, up to a step."""
    g = torch.Generator().manual_seed(0)
    labels = 50 + 10 * torch.randn(20_000, generator=g, dtype=torch.float64)
    made = DistLoss.build(labels, 2000, weight=0.5)
    shares = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    expected = torch.distributions.Normal(50.0, 125.0**0.5).icdf(shares)
    inner = slice(100, -100)  # what rounding leaves over comes from the tails
    assert (made.pseudo_labels[inner] - expected[inner]).abs().max() < 1
    assert made.weight == 0.5
    with pytest.raises(ValueError, match="labels"):
        DistLoss.build(torch.ones(5), 4)


def test_a_stack_has_pseudo_labels_of_its_own_and_criterion_takes_the_mean():
    pseudo = torch.stack([PSEUDO, PSEUDO + 3])
    together = DistLoss(pseudo)(PREDICTIONS.expand(2, 8), AGES.expand(2, 8))
    alone = torch.stack([DistLoss(row)(PREDICTIONS, AGES) for row in pseudo])
    torch.testing.assert_close(together, alone)
    criterion = Criterion(DistLoss(PSEUDO), class_dim=None)
    torch.testing.assert_close(criterion(PREDICTIONS, AGES), alone[0].mean())
    assert list(criterion.state_dict()) == ["loss.pseudo_labels"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistLoss((1.0, 0.0)), "pseudo_labels: expected ascending numbers"),
        (lambda: DistLoss((1, 2)), "pseudo_labels: expected a floating-point tensor, got torch.int64"),
        (lambda: DistLoss(PSEUDO, weight=-1.0), "weight: expected a number >= 0"),
        (lambda: DistLoss(PSEUDO, strength=0.0), "strength: expected a number > 0"),
        (lambda: DistLoss(PSEUDO)(PREDICTIONS[:5], AGES[:5]), r"input: expected \(\*, 8\).* got \(5,\); drop_last"),
        (lambda: kde_pseudo_labels(AGES, 0, low=0.0, high=9.0), "batch_size: expected a whole number >= 1"),
        (lambda: kde_pseudo_labels(AGES, 8, low=0.0, high=0.0), "high: expected a number > 0"),
        (lambda: kde_pseudo_labels(AGES, 8, low=0.0, high=39.5), "target: expected two different values between 0 and"),
        (lambda: kde_pseudo_labels(AGES, 8, low=0.0, high=99.0, bandwidth=torch.tensor(1.0)), "bandwidth: .* tensor"),
        (lambda: soft_sort(torch.arange(3)), "input: expected a floating-point tensor"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
