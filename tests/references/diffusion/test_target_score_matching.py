"""Target score matching, by numerical integrals over x_0 and by the exact score of Gaussians and mixtures."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm

from lossary.diffusion import (
    mixed_score_target,
    target_score_estimate,
    target_score_matching_loss,
    target_score_mixing,
)
from lossary.diffusion._mixture import Mixture, ring


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mixing", [0.0, 0.3, 1.0])
def test_the_mean_target_is_the_score(mixing):
    """E[target | x_t] by quadrature over x_0 in one dimension; p_t by quadrature as well, its slope by differences."""
    alpha, sigma, x_t = 0.8, 0.5, 0.7

    def p_0(x):
        return 0.3 * norm.pdf(x, -1, 0.4) + 0.7 * norm.pdf(x, 1, 0.6)

    def clean_score(x):
        return (p_0(x + 1e-6) - p_0(x - 1e-6)) / (2e-6 * p_0(x))

    def p_t(y):
        return quad(lambda x: p_0(x) * norm.pdf(y, alpha * x, sigma), -6, 6, epsabs=1e-13)[0]

    score = (math.log(p_t(x_t + 1e-4)) - math.log(p_t(x_t - 1e-4))) / 2e-4

    grid = np.linspace(-4, 4, 801)
    values = torch.from_numpy(np.stack([clean_score(grid), (x_t - alpha * grid) / sigma]))[..., None]
    levels = torch.tensor([[alpha], [sigma]], dtype=torch.float64).expand(2, 801)
    target = mixed_score_target(*values, alpha=levels[0], sigma=levels[1], mixing=mixing)[:, 0].numpy()
    weight = p_0(grid) * norm.pdf(x_t, alpha * grid, sigma)
    mean = (weight * target).sum() / weight.sum()
    assert mean == pytest.approx(score, abs=1e-5)


def test_for_a_gaussian_the_mixed_target_has_no_variance():
    data = Mixture(torch.zeros(1, 3, dtype=torch.float64), 1.7)
    clean, _ = data.sample(50, generator=rng())
    noise = torch.randn(50, 3, generator=rng(1), dtype=torch.float64)
    alpha = torch.linspace(0.05, 1, 50, dtype=torch.float64)
    sigma = torch.linspace(2, 0.01, 50, dtype=torch.float64)
    x_t = alpha[:, None] * clean + sigma[:, None] * noise
    mixing = target_score_mixing(alpha, sigma, variance=1.7**2)
    found = mixed_score_target(data.score(clean), noise, alpha=alpha, sigma=sigma, mixing=mixing)
    exact = -x_t / (alpha**2 * 1.7**2 + sigma**2)[:, None]
    torch.testing.assert_close(found, exact)
    args = {"alpha": alpha, "sigma": sigma}
    losses = target_score_matching_loss(exact + 2, data.score(clean), noise, **args, mixing=mixing)
    torch.testing.assert_close(losses, torch.full((50,), 4.0, dtype=torch.float64))


def test_variances_at_the_ends():
    """DSM's target has variance 1 / sigma^2 as sigma -> 0, TSM's vanishes; at high noise TSM's is that of the score."""
    truth = ring(4, radius=2.0, scale=0.5)
    x, _ = truth.sample(20_000, generator=rng())
    noise = torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    for level, (low, high) in {0.01: (0.0, 0.05), 10.0: (3.0, 4.0)}.items():
        sigma = torch.full((len(x),), level, dtype=x.dtype)
        one = torch.ones_like(sigma)
        exact = truth.score(x + level * noise, level)
        tsm = target_score_matching_loss(exact, truth.score(x), noise, alpha=one, sigma=sigma).mean()
        dsm = target_score_matching_loss(exact, truth.score(x), noise, alpha=one, sigma=sigma, mixing=0.0).mean()
        assert low <= tsm < high  # the score's own variance is nearly 1 / 0.5^2
        assert dsm < 0.01 or dsm == pytest.approx(level**-2, rel=0.05)


def test_at_no_noise_the_target_is_the_clean_score():
    score, noise = torch.randn(2, 4, 3, generator=rng()).unbind()
    one, zero = torch.ones(4), torch.zeros(4)
    torch.testing.assert_close(mixed_score_target(score, noise, alpha=one, sigma=zero), score)
    torch.testing.assert_close(mixed_score_target(score, noise, alpha=zero, sigma=one, mixing=0.0), -noise)


@pytest.mark.parametrize("mixing", [0.0, 0.5, 1.0])
def test_the_estimate_needs_no_training(mixing):
    truth = ring(4, radius=2.0, scale=0.5)
    alpha, sigma = 0.9, 0.3
    x = alpha * truth.sample(40, generator=rng())[0]
    found = target_score_estimate(
        x,
        lambda y: truth.log_density(y) + 5,  # not normalised
        truth.score,
        alpha=alpha,
        sigma=sigma,
        samples=20_000,
        mixing=mixing,
        generator=rng(1),
    )
    exact = truth.score(x / alpha, sigma / alpha) / alpha
    torch.testing.assert_close(found, exact, atol=0.1, rtol=0)


def test_a_diffusers_model_learns_from_it():
    """A scheduler's alpha and sigma, and a network that predicts noise: its score is -prediction / sigma."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler()
    t = torch.tensor([0, 300, 999])
    alpha, sigma = scheduler.alphas_cumprod[t].sqrt(), (1 - scheduler.alphas_cumprod[t]).sqrt()
    clean, noise = torch.randn(2, 3, 1, 4, 4, generator=rng()).unbind()
    x_t = scheduler.add_noise(clean, noise, t)
    score = -noise / sigma.view(3, 1, 1, 1)
    standard = -clean  # of a standard normal
    mixing = target_score_mixing(alpha, sigma)
    zero = target_score_matching_loss(-x_t, standard, noise, alpha=alpha, sigma=sigma, mixing=mixing)
    torch.testing.assert_close(zero, torch.zeros(3), atol=1e-5, rtol=0)
    denoising = target_score_matching_loss(score, standard, noise, alpha=alpha, sigma=sigma, mixing=0.0)
    torch.testing.assert_close(denoising, torch.zeros(3), atol=1e-5, rtol=0)


def test_refusals():
    x, level = torch.zeros(2, 3), torch.ones(2)
    for call, message in (
        (lambda: target_score_mixing(level, level, variance=0.0), "variance: expected a number > 0"),
        (lambda: target_score_mixing(level, level[:1]), "sigma: expected shape"),
        (lambda: mixed_score_target(x, x[:1], alpha=level, sigma=level), "noise: expected shape"),
        (lambda: mixed_score_target(x, x, alpha=torch.ones(3), sigma=level), "alpha: expected shape"),
        (lambda: target_score_matching_loss(x[:1], x, x, alpha=level, sigma=level), "input: expected shape"),
        (lambda: target_score_estimate(x[0], None, None, alpha=1.0, sigma=1.0), "x: expected 2 dimensions"),
        (lambda: target_score_estimate(x, None, None, alpha=1.0, sigma=0.0), "sigma: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
