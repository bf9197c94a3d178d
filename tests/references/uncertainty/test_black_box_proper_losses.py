"""Black-box proper losses: expectations summed exactly over all samples there can be, and counts done slowly."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from lossary.uncertainty import (
    black_box_power_loss,
    black_box_squared_loss,
    poisson_cross_entropy_loss,
    sequential_cross_entropy_loss,
)


def expectation(loss, p: list[float], q: list[float], m: int, n: int) -> float:
    """The sum over every pair of samples, each as likely as it is."""
    draws = list(itertools.product(range(len(p)), repeat=m))
    outcomes = list(itertools.product(range(len(q)), repeat=n))
    pairs = list(itertools.product(draws, outcomes))
    values = loss(torch.tensor([d for d, _ in pairs]), torch.tensor([o for _, o in pairs]))
    likely = [math.prod(p[k] for k in d) * math.prod(q[k] for k in o) for d, o in pairs]
    return math.fsum(w * v for w, v in zip(likely, values.tolist()))


P, Q = [0.2, 0.5, 0.3], [0.6, 0.3, 0.1]


@pytest.mark.parametrize(("m", "n"), [(2, 2), (3, 2), (2, 4)])
def test_squared_loss_is_unbiased(m, n):
    assert expectation(black_box_squared_loss, P, Q, m, n) == pytest.approx(0.16 + 0.04 + 0.04, abs=1e-12)


def test_without_offset_one_outcome_is_enough():
    def loss(model_samples, target_samples):
        return black_box_squared_loss(model_samples, target_samples, offset=False)

    assert expectation(loss, P, Q, 3, 1) == pytest.approx(0.24 - (0.36 + 0.09 + 0.01), abs=1e-12)


@pytest.mark.parametrize(("power", "m", "n"), [(2, 3, 3), (4, 4, 4), (4, 5, 4)])
def test_power_loss_is_unbiased(power, m, n):
    p, q = P if power == 2 else [0.8, 0.2], Q if power == 2 else [0.3, 0.7]

    def loss(model_samples, target_samples):
        return black_box_power_loss(model_samples, target_samples, power=power)

    expected = sum((a - b) ** power for a, b in zip(p, q))
    assert expectation(loss, p, q, m, n) == pytest.approx(expected, abs=1e-12)


def test_losses_are_those_of_counts():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(6, (5, 40), generator=g), torch.randint(3, 9, (5, 30), generator=g)
    a, b = (np.stack([np.bincount(row, minlength=9) for row in t.numpy()]) for t in (x, y))
    squared = (a * (a - 1)).sum(1) / (40 * 39) - 2 * (a * b).sum(1) / 1200 + (b * (b - 1)).sum(1) / (30 * 29)
    np.testing.assert_allclose(black_box_squared_loss(x, y), squared, rtol=1e-12)
    np.testing.assert_allclose(black_box_power_loss(x, y, power=2), squared, rtol=1e-10)
    falling = {(r, t): special.poch(t - r + 1, r) for r in range(5) for t in (40, 30)}
    fourth = sum(
        special.comb(4, j)
        * (-1) ** j
        * special.poch(a - (4 - j) + 1, 4 - j)
        / falling[4 - j, 40]
        * special.poch(b - j + 1, j)
        / falling[j, 30]
        for j in range(5)
    ).sum(1)
    np.testing.assert_allclose(black_box_power_loss(x, y), fourth, rtol=1e-10)
    # symbols are but names
    np.testing.assert_array_equal(black_box_squared_loss(x**3 - 50, y**3 - 50), black_box_squared_loss(x, y))


@pytest.mark.parametrize("p", [0.1, 0.35, 0.9])
@pytest.mark.parametrize("rate", [20.0, 35.0])
def test_poisson_loss_is_unbiased_and_its_second_moment_diverges(p, rate):
    n = torch.arange(300)
    values = poisson_cross_entropy_loss(n, rate=rate)
    log_likely = stats.poisson(rate * (1 - p)).logpmf(n.numpy())
    first = np.exp(log_likely + np.log(values.clamp(min=1e-300).numpy()))
    assert math.fsum(first) == pytest.approx(-math.log(p), abs=1e-8)
    terms = np.exp(log_likely + 2 * np.log(values.clamp(min=1e-300).numpy()))[1:]
    # in the end each is n (1 - p) / rate times the one before, which passes 1
    ratio = terms[-1] / terms[-2]
    assert ratio == pytest.approx(299 * (1 - p) / rate, rel=0.03)


def test_poisson_loss_of_a_few_misses():
    found = poisson_cross_entropy_loss(torch.tensor([[0, 3], [1, 4]]), rate=5.0)
    three = 3 / 5 + 6 / (2 * 25) + 6 / (3 * 125)
    four = 4 / 5 + 12 / (2 * 25) + 24 / (3 * 125) + 24 / (4 * 625)
    assert found.tolist() == [pytest.approx([0.0, three]), pytest.approx([0.2, four])]
    overflowing = poisson_cross_entropy_loss(torch.tensor([5000, 2]), rate=1.0)
    assert overflowing.tolist() == [math.inf, 3.0]
    assert poisson_cross_entropy_loss(torch.zeros(0, dtype=torch.int64), rate=1.0).shape == (0,)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.95])
def test_sequential_loss_is_unbiased_with_a_finite_variance(p):
    k = torch.arange(1, 2000)
    values = sequential_cross_entropy_loss(k).numpy()
    np.testing.assert_allclose(values[:4], [0, 1, 1.5, 11 / 6], atol=1e-12)
    likely = stats.geom(p).pmf(k.numpy())
    mean = likely @ values
    assert mean == pytest.approx(-math.log(p), abs=1e-10)
    assert likely @ values**2 - mean**2 == pytest.approx(special.spence(p), rel=1e-9)  # Li_2(1 - p)


def test_the_plain_frequencies_are_biased():
    def plug_in(model_samples, target_samples):
        counts = [torch.nn.functional.one_hot(s, 3).double().mean(-2) for s in (model_samples, target_samples)]
        return (counts[0] - counts[1]).square().sum(-1)

    assert expectation(plug_in, P, Q, 2, 2) - 0.24 == pytest.approx((1 - 0.38) / 2 + (1 - 0.46) / 2, abs=1e-12)


def test_refusals():
    x, y = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64)
    for call, message in (
        (lambda: black_box_squared_loss(x, y), "target_samples: expected at least 2 last"),
        (lambda: black_box_squared_loss(y, x), "model_samples: expected at least 2 last"),
        (lambda: black_box_squared_loss(x.float(), x), "model_samples: expected an int64 tensor"),
        (lambda: black_box_squared_loss(x, x[:2]), "target_samples: expected the batch shape of model_samples"),
        (lambda: black_box_power_loss(x, x, power=3), "power: expected an even number, got 3"),
        (lambda: black_box_power_loss(x, x, power=6), "model_samples: expected at least 6 last"),
        (lambda: poisson_cross_entropy_loss(y, rate=0.0), "rate: expected a number > 0"),
        (lambda: poisson_cross_entropy_loss(y.float(), rate=1.0), "misses: expected an int64 tensor"),
        (lambda: sequential_cross_entropy_loss(y.float()), "draws: expected an int64 tensor"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
