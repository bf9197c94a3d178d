"""SiD against the official formula, and against the closed form of two Gaussians."""

import math

import pytest
import torch
from torch import nn

from lossary.diffusion import ScoreIdentityDistillation, score_identity_loss
from lossary.diffusion._distil import karras_levels
from lossary.diffusion._mixture import Mixture
from lossary.roles.procedure import advance

MEAN, SCALE = torch.tensor([1.0, -2.0], dtype=torch.float64), 0.5
DATA = Mixture(MEAN[None], SCALE)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Affine(nn.Module):
    def __init__(self, mean=0.0, scale=1.0):
        super().__init__()
        self.mean = nn.Parameter(torch.full((2,), mean, dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float64))

    def forward(self, latent):
        return self.mean + self.scale * latent


class Exact(nn.Module):
    """The denoiser of an affine generator, which looks at it as a constant."""

    def __init__(self, of):
        super().__init__()
        self.of = (of,)

    def forward(self, x, sigma):
        return Mixture(self.of[0].mean.detach()[None], self.of[0].scale.detach()).denoise(x, sigma)


def test_the_loss_is_the_official_one():
    x, real, fake = torch.randn(3, 2, 5, 3, generator=rng(), dtype=torch.float64).unbind()
    for alpha in (0.0, 1.0, 1.2):
        official = ((real - fake) * ((real - x) - alpha * (real - fake))).sum(-1)
        torch.testing.assert_close(score_identity_loss(x, real, fake, alpha=alpha, dims=2), official)
    torch.testing.assert_close(score_identity_loss(x, real, fake, alpha=1.2), official.sum(-1))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0, 1.2])
def test_gradients_of_two_gaussians(alpha):
    """By hand: k and l are what the denoisers keep of x_t; l, of the fake network, is a constant."""
    sigma, g = 0.7, rng(1)
    generator = Affine(0.3, 0.8)
    k, m, s = SCALE**2 / (SCALE**2 + sigma**2), 0.3, 0.8
    keep = s**2 / (s**2 + sigma**2)
    # apart = (1 - k) mu - (1 - keep) m' + (k - keep) x_t; fake - x = (1 - keep) m' + keep x_t - x; m' constant.
    gap = (1 - k) * (MEAN - m)
    mean_slope = (k - keep) * 2 * (1 - alpha) * gap + gap * (keep - 1)
    scale_slope = 2 * (2 * s * (1 - alpha) * (k - keep) ** 2 + 2 * s * (k - keep) * (keep - 1))
    latent, noise = torch.randn(2, 400_000, 2, generator=g, dtype=torch.float64).unbind()
    x = generator(latent)
    x_t = x + sigma * noise
    real, fake = DATA.denoise(x_t, sigma), Exact(generator)(x_t, sigma)
    score_identity_loss(x, real, fake, alpha=alpha).mean().backward()
    torch.testing.assert_close(generator.mean.grad, mean_slope, atol=0.01, rtol=0)
    assert generator.scale.grad.item() == pytest.approx(scale_slope, abs=0.01)
    if alpha == 0.5:  # |real - fake|^2 = |gap|^2 + 2 (k - keep)^2 (s^2 + sigma^2), now with keep moving along
        torch.testing.assert_close(mean_slope, -(1 - k) * gap)
        total = s**2 + sigma**2
        squared = 2 * (2 * k**2 * s - 4 * k * s + (4 * s**3 * total - 2 * s**5) / total**2)
        assert scale_slope == pytest.approx(squared / 2)


def test_a_generator_of_gaussians_learns_the_teacher():
    generator = Affine()
    procedure = ScoreIdentityDistillation(
        generator, Exact(generator), DATA.denoise, levels=karras_levels(0.1, 10.0), fake_steps=0
    )
    assert procedure.alpha == 1.2
    optimizer, g = torch.optim.Adam(generator.parameters(), lr=0.03), rng(7)
    for step in range(200):
        batch = {"latent": torch.randn(128, 2, generator=g, dtype=torch.float64)}
        optimizer.zero_grad()
        procedure.objective("generator", batch, step=step, generator=g).mean().backward()
        optimizer.step()
    torch.testing.assert_close(generator.mean.detach(), MEAN, atol=0.05, rtol=0)
    assert generator.scale.abs().item() == pytest.approx(0.5, rel=0.05)


def test_the_weight_is_the_teacher_s_error_and_gets_no_gradient():
    generator = Affine()
    procedure = ScoreIdentityDistillation(generator, Exact(generator), DATA.denoise, alpha=1.0)
    latent = torch.randn(3, 4, 2, generator=rng(), dtype=torch.float64)
    x, sigma = generator(latent), torch.full((3, 4), 0.9, dtype=torch.float64)
    x_t = x + 0.9 * torch.randn(3, 4, 2, generator=rng(1), dtype=torch.float64)
    real, fake = DATA.denoise(x_t, sigma), Exact(generator)(x_t, sigma)
    weight = 2 / (x - real).abs().sum(-1)
    expected = weight.detach() * ((real - fake) * (fake - x)).sum(-1)
    found = procedure.generator_loss(x, x_t, sigma, {}, None)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(v.sum(), generator.mean, retain_graph=True)[0] for v in (found, expected)]
    torch.testing.assert_close(*slopes)
    at_the_data = Mixture(torch.zeros(1, 2, dtype=torch.float64), 1e-9).denoise
    still = ScoreIdentityDistillation(generator, Exact(generator), at_the_data)
    zeros = torch.zeros_like(x)
    assert still.generator_loss(zeros, zeros, sigma, {}, None).isfinite().all()


def test_turns_move_who_plays_and_conditions_reach_all():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(2, 2).double()

        def forward(self, x, *rest):
            return self.linear(x) + rest[-1]

    teacher = Conditional()
    procedure = ScoreIdentityDistillation(Conditional(), None, teacher, fake_steps=2)
    assert procedure.turns(0) == ("fake", "fake", "generator")
    before = [p.detach().clone() for p in procedure.parameters()]
    optimizers = {n: torch.optim.SGD(p.parameters(), lr=0.1) for n, p in procedure.players().items()}
    batch = {"latent": torch.randn(6, 2, generator=rng()).double(), "condition": torch.ones(6, 2).double()}
    means = advance(procedure, batch, optimizers, step=0, generator=rng(2))
    assert all(v.isfinite() for v in means.values())
    moved = [not torch.equal(a, b) for a, b in zip(before, procedure.parameters())]
    frozen = [not p.requires_grad for p in procedure.parameters()]
    assert moved == [not f for f in frozen]
    assert sum(frozen) == 2


def test_refusals():
    x = torch.zeros(2, 3)
    for call, message in (
        (lambda: score_identity_loss(x, x[:1], x), "real: expected shape"),
        (lambda: score_identity_loss(x, x, x[:1]), "fake: expected shape"),
        (lambda: score_identity_loss(x, x, x, alpha=math.nan), "alpha: expected a finite number"),
        (lambda: score_identity_loss(x.long(), x, x), "x: expected a floating-point"),
        (lambda: ScoreIdentityDistillation(Affine(), Affine(), DATA.denoise, alpha=math.inf), "alpha"),
        (lambda: ScoreIdentityDistillation(Affine(), None, DATA.denoise), "fake"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
