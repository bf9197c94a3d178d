"""Log-variance sampler: densities of discrete paths written out, exact controls, unbiased constants."""

import math

import pytest
import torch
from torch.distributions import Normal

from lossary.diffusion import ControlledSDE, PathIntegralSampler, log_variance_loss
from lossary.diffusion._mixture import ring


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def log_density(x):
    return -0.5 * ((x - 0.5) / 0.8).square().sum(-1)  # not normalised


def u(x, t):
    return torch.sin(3 * x) - t


def v(x, t):
    return 0.3 * x + t


@pytest.mark.parametrize("rate", [0.0, 0.7])
@pytest.mark.parametrize("steered", [True, False])
def test_the_log_ratio_is_that_of_the_paths_densities(rate, steered):
    """Gaussian transition after transition: log P^u(path) - log P^0(path) + log p_ref(x_T) - log rho(x_T)."""
    sde, seen = ControlledSDE(scale=1.3, horizon=2.0, rate=rate, steps=5), []

    def watched(x, t):
        seen.append(x.detach())
        return u(x, t)

    like = torch.empty(0, dtype=torch.float64)
    follow = v if steered else None
    found = sde.paths(watched, log_density, (6, 2), follow=follow, generator=rng(), like=like)
    places, expected, dt = [*seen, found.x.detach()], 0.0, 2.0 / 5
    for step in range(5):
        here, there, t = places[step], places[step + 1], torch.tensor(step * dt)
        free = Normal(here - rate * here * dt, 1.3 * math.sqrt(dt))
        bound = Normal(here + (1.3 * u(here, t) - rate * here) * dt, 1.3 * math.sqrt(dt))
        expected = expected + (bound.log_prob(there) - free.log_prob(there)).sum(-1)
    variance = 1.3**2 * 2.0 if not rate else 1.3**2 * dt / (1 - (1 - rate * dt) ** 2)
    assert sde.reference_variance == pytest.approx(variance)
    expected = expected + Normal(0, math.sqrt(variance)).log_prob(found.x).sum(-1) - log_density(found.x)
    torch.testing.assert_close(found.log_ratio, expected)


@pytest.mark.parametrize("rate", [0.0, 0.7])
def test_exp_of_minus_r_is_unbiased_for_any_control_and_few_steps(rate):
    sde = ControlledSDE(scale=1.3, rate=rate, steps=4)
    sampler = PathIntegralSampler(lambda x, t: 0.3 * torch.sin(x) - 0.2 * t, log_density, sde)
    found = sampler.log_normaliser((200_000, 1), generator=rng())
    assert found.item() == pytest.approx(math.log(0.8 * math.sqrt(2 * math.pi)), abs=0.01)


def exact(x, t):
    """From Brownian motion of variance 4 to N(0, 1)."""
    return -2 * 0.75 * x / (1 + 4 * 0.75 * (1 - t))


def test_at_the_exact_control_nothing_varies():
    def normal(x):
        return -0.5 * x.square().sum(-1)

    spread = []
    for steps in (50, 200):
        sampler = PathIntegralSampler(exact, normal, ControlledSDE(scale=2.0, steps=steps))
        spread.append(sampler.loss((4000, 2), generator=rng()).mean().item())
    assert spread[1] < 0.02
    assert spread[1] < spread[0] / 2.5  # of first order in the step
    x = sampler((4000, 2), generator=rng(1))
    torch.testing.assert_close(x.T.cov(), torch.eye(2), atol=0.06, rtol=0)
    fine = PathIntegralSampler(exact, normal, ControlledSDE(scale=2.0, steps=400))
    divergence = fine.loss((40_000, 2), generator=rng(), divergence="kl").mean().item()
    assert divergence == pytest.approx(-math.log(2 * math.pi), abs=0.02)  # -log Z


def test_kl_differentiates_the_paths_and_log_variance_does_not():
    factor = torch.tensor(0.5, requires_grad=True)
    sampler = PathIntegralSampler(lambda x, t: factor * exact(x, t), log_density, ControlledSDE(scale=2.0, steps=6))
    step = 1e-3
    for divergence in ("kl", "log_variance"):
        (slope,) = torch.autograd.grad(sampler.loss((500, 2), divergence=divergence, generator=rng()).mean(), factor)
        with torch.no_grad():
            values = []
            for shift in (step, -step):
                moved = PathIntegralSampler(lambda x, t, c=0.5 + shift: c * exact(x, t), log_density, sampler.sde)
                if divergence == "kl":
                    values.append(moved.loss((500, 2), divergence="kl", generator=rng()).mean())
                else:  # the same paths, those of 0.5
                    paths = moved.sde.paths(
                        moved.control, log_density, (500, 2), follow=lambda x, t: 0.5 * exact(x, t), generator=rng()
                    )
                    values.append(paths.log_ratio.var())
        assert slope.item() == pytest.approx((values[0] - values[1]).item() / (2 * step), rel=0.02)


def test_kl_leaves_the_ito_integral_out():
    sampler = PathIntegralSampler(u, log_density, ControlledSDE(scale=1.3, steps=5))
    paths = sampler.sde.paths(u, log_density, (6, 2), generator=rng())
    torch.testing.assert_close(sampler.loss((6, 2), divergence="kl", generator=rng()), paths.log_ratio - paths.ito)
    assert paths.ito.abs().min() > 0


def test_the_values_average_to_the_variance():
    r = torch.randn(3, 7, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(log_variance_loss(r).mean(-1), r.var(-1))


def test_training_covers_a_ring():
    """A network, stacked noise of two generators, and the same result again."""
    truth = ring(3, radius=1.5, scale=0.4)
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))

    def control(x, t):
        return network(torch.cat([x, t.expand(*x.shape[:-1], 1)], -1))

    sampler = PathIntegralSampler(control, truth.log_density, ControlledSDE(scale=1.5, steps=10))
    optimizer, g = torch.optim.Adam(network.parameters(), lr=0.02), rng()
    first = sampler.loss((2, 200, 2), generator=[rng(5), rng(6)]).mean().item()
    for _ in range(60):
        optimizer.zero_grad()
        sampler.loss((128, 2), generator=g).mean().backward()
        optimizer.step()
    again = [sampler.loss((2, 200, 2), generator=[rng(5), rng(6)]) for _ in range(2)]
    assert again[0].mean().item() < first / 2
    torch.testing.assert_close(*again)
    torch.testing.assert_close(again[0][0], sampler.loss((200, 2), generator=rng(5)))


def test_refusals():
    for call, message in (
        (lambda: ControlledSDE(scale=0.0), "scale: expected a number > 0"),
        (lambda: ControlledSDE(rate=20.0, steps=10), "rate: expected a number >= 0 and < 10"),
        (lambda: ControlledSDE(steps=0), "steps: expected a whole number >= 1"),
        (lambda: log_variance_loss(torch.ones(1)), "log_ratio: expected at least 2 paths"),
        (lambda: PathIntegralSampler(u, log_density, ControlledSDE()).loss((4, 2), divergence="tv"), "divergence"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
