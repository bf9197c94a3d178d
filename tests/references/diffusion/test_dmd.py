"""DMD against the official formula, the KL divergence of two Gaussians, and the solution of the teacher's ODE."""

import math

import pytest
import torch
from torch import nn

from lossary.diffusion import DistributionMatchingDistillation, distribution_matching_gradient, ode_pairs
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import karras_sigmas

MEAN, SCALE = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5
DATA = Mixture(MEAN[None], SCALE)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Affine(nn.Module):
    def __init__(self, mean=0.0, scale=1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, latent, *condition):
        return self.mean + self.scale * latent + sum(condition)


class Exact(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.of = (of,)

    def forward(self, x, sigma, *condition):
        return Mixture(self.of[0].mean.detach()[None], self.of[0].scale.detach()).denoise(x, sigma)


def test_the_push_is_the_official_one():
    x, real, fake = torch.randn(3, 4, 2, 3, 5, generator=rng(), dtype=torch.float64).unbind()
    p_real, p_fake = x - real, x - fake
    official = (p_real - p_fake) / p_real.abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(distribution_matching_gradient(x, real, fake), official)
    stacked = torch.stack([distribution_matching_gradient(*parts) for parts in zip(x, real, fake)])
    torch.testing.assert_close(distribution_matching_gradient(x, real, fake, dims=2), stacked)
    there = distribution_matching_gradient(x, x, fake)
    torch.testing.assert_close(there, (fake - x) * 1e5)


def test_the_loss_and_its_gradient():
    """0.5 mse(x, stopgrad(x - push)), a mean over entries as officially, and 0.25 the pairs' squared error."""
    generator, g = Affine(0.2, 0.9), rng(1)
    procedure = DistributionMatchingDistillation(generator, Exact(generator), DATA.denoise)
    latent, noise, pair, target = torch.randn(4, 3, 6, 2, generator=g, dtype=torch.float64).unbind()
    sigma = torch.rand(3, 6, generator=g, dtype=torch.float64) + 0.2
    x = generator(latent)
    x_t = x + sigma[..., None] * noise
    batch = {"pair_latent": pair, "pair_target": target}
    found = procedure.generator_loss(x, x_t, sigma, batch, None)
    real, fake = DATA.denoise(x_t.detach(), sigma), Exact(generator)(x_t.detach(), sigma)
    push = distribution_matching_gradient(x.detach(), real, fake, dims=2)
    expected = push.square().mean(-1) / 2 + 0.25 * (generator(pair) - target).square().mean(-1)
    torch.testing.assert_close(found, expected)
    slope = torch.autograd.grad(found.sum(), generator.mean, retain_graph=True)[0]
    by_hand = push.sum((0, 1)) / 2 + 0.25 * (generator(pair) - target).sum((0, 1)).detach()
    torch.testing.assert_close(slope, by_hand)
    own = DistributionMatchingDistillation(
        generator, Exact(generator), DATA.denoise, distance=lambda a, b: (a - b).abs().amax(-1), regression_weight=2.0
    )
    worst = push.square().mean(-1) / 2 + 2 * (generator(pair) - target).abs().amax(-1)
    torch.testing.assert_close(own.generator_loss(x, x_t, sigma, batch, None), worst)


def test_conditions_reach_the_pairs():
    generator = Affine()
    procedure = DistributionMatchingDistillation(generator, Exact(generator), lambda x, sigma, c: x * 0)
    x, ones = torch.zeros(4, 2, dtype=torch.float64), torch.ones(4, 2, dtype=torch.float64)
    batch = {"condition": ones, "pair_latent": ones, "pair_target": 3 * ones, "pair_condition": 5 * ones}
    found = procedure.generator_loss(x, x, ones[:, 0], batch, None)
    torch.testing.assert_close(found, 0.25 * 9 * ones[:, 0])
    del batch["pair_condition"]
    with pytest.raises(ValueError, match="batch: expected 'pair_condition' beside 'condition'"):
        procedure.generator_loss(x, x, ones[:, 0], batch, None)


def test_a_generator_of_gaussians_learns_the_teacher():
    generator = Affine()
    procedure = DistributionMatchingDistillation(
        generator, Exact(generator), DATA.denoise, regression_weight=0.0, fake_steps=0
    )
    optimizer, g = torch.optim.Adam(generator.parameters(), lr=0.03), rng(7)
    for step in range(200):
        batch = {"latent": torch.randn(128, 2, generator=g, dtype=torch.float64)}
        optimizer.zero_grad()
        procedure.objective("generator", batch, step=step, generator=g).mean().backward()
        optimizer.step()
    torch.testing.assert_close(generator.mean.detach(), MEAN, atol=0.05, rtol=0)
    assert generator.scale.item() == pytest.approx(0.5, rel=0.06)


def test_pairs_solve_the_ode():
    """For one Gaussian distances from the mean shrink like the standard deviation."""
    latent = torch.randn(30, 2, generator=rng(), dtype=torch.float64).requires_grad_()
    found = ode_pairs(DATA.denoise, latent, karras_sigmas(150, high=20.0))
    assert not found.requires_grad
    latent = latent.detach()
    expected = MEAN + (20 * latent - MEAN) * 0.5 / math.sqrt(0.25 + 400)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)
    shifted = ode_pairs(lambda x, sigma, c: DATA.denoise(x - c, sigma) + c, latent, karras_sigmas(150, high=20.0), 7.0)
    assert (shifted - found).mean().item() == pytest.approx(7.0, abs=0.3)


def test_levels_leave_out_the_ends():
    procedure = DistributionMatchingDistillation(Affine(), Affine(), DATA.denoise)
    found = procedure.levels((50_000,), rng())
    grid = karras_sigmas(1001)[:-1]
    assert found.min().item() == pytest.approx(grid[980].item(), rel=0.01)
    assert found.max().item() == pytest.approx(grid[20].item(), rel=0.01)
    assert (procedure.regression_weight, procedure.fake_steps) == (0.25, 1)


def test_refusals():
    x = torch.zeros(2, 3)
    procedure = DistributionMatchingDistillation(Affine(), Affine(), DATA.denoise)
    for call, message in (
        (lambda: distribution_matching_gradient(x, x[:1], x), "real: expected shape"),
        (lambda: distribution_matching_gradient(x, x, x[:1]), "fake: expected shape"),
        (lambda: distribution_matching_gradient(x[0], x[0], x[0]), "x: expected at least 2"),
        (lambda: ode_pairs(DATA.denoise, x, torch.tensor([1.0, 2.0])), "sigmas"),
        (lambda: DistributionMatchingDistillation(x, x, None, regression_weight=-1.0), "regression_weight"),
        (lambda: procedure.objective("generator", {"latent": torch.zeros(2, 2).double()}, step=0), "pair_latent"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
