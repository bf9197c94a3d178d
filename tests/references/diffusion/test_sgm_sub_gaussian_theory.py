"""Tilted Gaussians, against mixtures that are tilts as well, integrals by scipy and differences of the density."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.stats import kstest

from lossary.diffusion import RidgeTilt, mehler_score
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import heun, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ridge(u):
    return 2 * (u - 0.5).relu() + 2 * (-u - 0.5).relu()


W = torch.tensor([0.6, 0.0, -0.8], dtype=torch.float64)


@pytest.mark.parametrize("t", [0.05, 0.7, 3.0])
def test_two_unit_gaussians_are_a_tilt(t):
    """exp(-|x - m|^2 / 2) + exp(-|x + m|^2 / 2) = standard normal times cosh(m . x), up to a constant."""
    truth = Mixture(torch.stack([2 * W, -2 * W]), 1.0)
    target = RidgeTilt(3 * W, lambda u: (2 * u).cosh().log())
    x = 2 * torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    alpha, s = math.exp(-t), math.sqrt(1 - math.exp(-2 * t))
    exact = truth.score(x / alpha, s / alpha) / alpha
    torch.testing.assert_close(target.score(x, torch.full((6,), t)), exact)
    torch.testing.assert_close(target.denoise(x, s / alpha), truth.denoise(x, s / alpha))
    levels = torch.linspace(0.2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(target.denoise(x, levels), truth.denoise(x, levels))
    sampled = mehler_score(x, t, lambda y: (2 * y @ W).cosh().log(), samples=200_000, generator=rng(1))
    assert (sampled - exact).abs().max() < (0.05 if t > 0.1 else 0.2)


def test_quadrature_and_draws_agree_where_no_mixture_does():
    target = RidgeTilt(W, ridge)
    x, t = torch.randn(5, 3, generator=rng(), dtype=torch.float64), 0.6
    sampled = mehler_score(x, t, lambda y: ridge(y @ W), samples=200_000, generator=rng(1))
    torch.testing.assert_close(target.score(x, torch.full((5,), t)), sampled, atol=0.02, rtol=0)


def test_the_score_is_the_slope_of_the_noised_density():
    """p_t along w by scipy's integral; across it the score is -x."""
    t, u, step = 0.4, 0.9, 1e-4
    alpha, s = math.exp(-t), math.sqrt(1 - math.exp(-2 * t))

    def log_p(y):
        def inside(v):
            return math.exp(-v * v / 2 + 2 * max(abs(v) - 0.5, 0) - (y - alpha * v) ** 2 / (2 * s * s))

        return math.log(quad(inside, -10, 10, points=[-0.5, 0.5], epsabs=1e-13, limit=200)[0])

    across = torch.tensor([0.0, 1.5, 0.0], dtype=torch.float64)
    found = RidgeTilt(W, ridge).score((u * W + across)[None], torch.tensor([t]))[0]
    assert (found @ W).item() == pytest.approx((log_p(u + step) - log_p(u - step)) / (2 * step), rel=2e-3)
    assert found[1].item() == pytest.approx(-1.5)


def test_samples_are_exact_and_the_sampler_agrees():
    target = RidgeTilt(W, ridge)
    total = quad(lambda v: math.exp(-v * v / 2 + 2 * max(abs(v) - 0.5, 0)), -12, 12, points=[-0.5, 0.5])[0]
    grid = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    cumulative = torch.cumulative_trapezoid((ridge(grid) - grid.square() / 2).exp() / total, grid)

    def distribution(v):
        return cumulative[torch.searchsorted(grid[1:], torch.as_tensor(v)).clamp(max=3999)].numpy()

    start = 30 * torch.randn(1000, 3, generator=rng(1), dtype=torch.float64)
    flowed = heun(target.denoise, start, karras_sigmas(25, low=0.02, high=30.0))
    for x in (target.sample(4000, generator=rng()), flowed):
        assert kstest((x @ W).numpy(), distribution).pvalue > 0.01
        assert x[:, 1].var().item() == pytest.approx(1.0, abs=0.1)
    assert target.log_density(2 * W[None]).item() == pytest.approx(3 - 2)


def test_refusals():
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: mehler_score(x[0], 1.0, ridge), "x: expected 2 dimensions"),
        (lambda: mehler_score(x, 0.0, ridge), "t: expected a number > 0"),
        (lambda: mehler_score(x, 1.0, ridge, samples=3), "samples: expected an even number"),
        (lambda: RidgeTilt(x, ridge), "direction: expected 1 dimensions"),
        (lambda: RidgeTilt(x[0], ridge, reach=0.0), "reach: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
