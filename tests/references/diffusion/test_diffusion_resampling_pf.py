"""Diffusion resampling against exact ratios of mixtures, binomial counts, Bayes' rule, and a filter written out."""

import math

import pytest
import torch
from scipy.special import logit

from lossary.diffusion import (
    ParticleFilterSampler,
    discriminator_log_ratio,
    multinomial_resample,
    object_log_ratio,
)
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._mixture import ring
from lossary.diffusion._samplers import heun, karras_sigmas

TRUE = ring(3, radius=2.0, scale=0.3)
MODEL = ring(3, radius=2.0, scale=0.3, weights=torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exact(x, sigma):
    return TRUE.log_density(x, sigma) - MODEL.log_density(x, sigma)


def test_many_particles_give_the_weights_of_the_data():
    x = 20 * torch.randn(8000, 2, generator=rng(), dtype=torch.float64)
    sigmas = karras_sigmas(32, high=20.0, low=0.02)
    counted = Counted(MODEL.denoise)
    found = ParticleFilterSampler(exact, particles=8000, at=(12, 16, 20, 24))(counted, x, sigmas, generator=rng(1))
    assert counted.evaluations == 63
    share = torch.bincount(torch.cdist(found, TRUE.means).argmin(-1), minlength=3) / 8000
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.04, rtol=0)
    assert len(found.unique(dim=0)) == 8000  # copies part
    spread = (found - TRUE.means[torch.cdist(found, TRUE.means).argmin(-1)]).std()
    assert spread.item() == pytest.approx(0.3, rel=0.05)
    plain = ParticleFilterSampler(exact, particles=8000, at=())(MODEL.denoise, x, sigmas)
    torch.testing.assert_close(plain, heun(MODEL.denoise, x, sigmas))


def test_weights_are_over_the_ancestors_and_groups_are_apart():
    """The same filter, group by group and particle by particle, on draws that leave no choice."""
    table = {4.0: [[0.0, -9e9, 0.0], [-9e9, 0.0, -9e9]], 2.0: [[5.0, 5.0, 1e9], [0.0, 1.0, 2.0]]}
    seen = []

    def potential(x, sigma):
        seen.append(x)
        return torch.tensor(table[sigma], dtype=x.dtype).flatten()

    x = torch.arange(6.0).double().view(6, 1)
    sigmas = torch.tensor([4.0, 2.0, 1.0])
    sampler = ParticleFilterSampler(potential, particles=3, at=(0, 1))
    found = sampler(lambda x, sigma: x, x, sigmas, generator=rng())
    assert torch.equal(seen[0], x)
    # what stays of each group: 0 and 2 of the first, the middle one of the second; then the last particle of the first
    noise = torch.Generator()
    noise.manual_seed(0)
    index = torch.multinomial(torch.tensor([[0.5, 0.0, 0.5], [0.0, 1.0, 0.0]]).double(), 3, True, generator=noise)
    after = x.view(2, 3).gather(1, index).view(6, 1)
    after = after + 4.0 * torch.randn(6, 1, generator=noise, dtype=torch.float64)
    torch.testing.assert_close(seen[1], after)
    weight = (torch.tensor(table[2.0]) - torch.tensor(table[4.0]).gather(1, index)).double().softmax(-1)
    index = torch.multinomial(weight, 3, True, generator=noise)
    after = after.view(2, 3).gather(1, index).view(6, 1)
    torch.testing.assert_close(found, after + 2.0 * torch.randn(6, 1, generator=noise, dtype=torch.float64))
    assert index[0].tolist() == [2, 2, 2]


def test_a_constant_ancestor_cancels():
    """Potentials that do not change carry no weight the second time: the share of the kept stays, on average."""
    x = torch.tensor([[0.0], [1.0]]).double().repeat(2000, 1)

    def potential(x, sigma):
        return math.log(3) * (x[:, 0].round() % 2 == 1)

    def still(x, sigma):
        return x

    sigmas = torch.tensor([2e-6, 1e-6, 5e-7])
    once = ParticleFilterSampler(potential, particles=2, at=(0,))(still, x, sigmas, generator=rng())
    twice = ParticleFilterSampler(potential, particles=2, at=(0, 1))(still, x, sigmas, generator=rng())
    for found in (once, twice):
        assert found.round().mean().item() == pytest.approx(0.75, abs=0.03)


def test_a_dead_group_stays_and_lives_on():
    """All weights 0 at the first step: the second is as if it were the first; a dead particle never goes on."""
    x = torch.arange(4.0).double().view(4, 1)
    table = {4.0: [-torch.inf] * 4, 2.0: [-torch.inf, 0.0, 0.0, -torch.inf], 1.0: [0.0, 0.0, -torch.inf, -torch.inf]}
    seen = []

    def potential(x, sigma):
        seen.append(x)
        return torch.tensor(table[sigma], dtype=x.dtype)

    sampler = ParticleFilterSampler(potential, particles=2, at=(0, 1, 2))
    found = sampler(lambda x, sigma: x, x, torch.tensor([4.0, 2.0, 1.0, 0.5]), generator=rng())
    after = seen[1]  # nobody was replaced: each with noise of its own
    assert (after - x).unique().numel() == 4
    assert ((seen[2] - after[[1, 1, 2, 2]]) / 2).abs().max() < 4
    assert found.isfinite().all()
    noise = seen[1] - x
    again = torch.Generator()
    again.manual_seed(0)
    torch.multinomial(torch.full((2, 2), 0.5).double(), 2, True, generator=again)
    torch.testing.assert_close(noise, 4 * torch.randn(4, 1, generator=again, dtype=torch.float64))


def test_the_best_of_each_group():
    x = torch.randn(2, 6, 3, generator=rng(), dtype=torch.float64)

    def first(x, sigma):
        assert sigma == 0.5
        return x[..., 0]

    sampler = ParticleFilterSampler(first, particles=3, at=(), keep_best=True, data_dims=1)
    for sigmas in (torch.tensor([1.0, 0.5]), torch.tensor([1.0, 0.5, 0.0])):
        found = sampler(lambda x, sigma: x, x, sigmas)
        assert found.shape == (2, 2, 3)
        for s in range(2):
            for group in range(2):
                rows = x[s, 3 * group : 3 * group + 3]
                assert torch.equal(found[s, group], rows[rows[:, 0].argmax()])


def test_churn_raises_the_noise():
    x = torch.zeros(4000, 1, dtype=torch.float64)
    sampler = ParticleFilterSampler(exact, particles=1, at=(), churn=0.5)
    found = sampler(lambda x, sigma: x, x, torch.tensor([2.0, 1.0]), generator=rng())
    assert found.std().item() == pytest.approx(2 * math.sqrt(1.5**2 - 1), rel=0.05)


def test_resampling_counts():
    weights = torch.tensor([0.5, 0.2, 0.0, 0.3]).double()
    index = multinomial_resample(weights.log().expand(20_000, -1) + 7.0, generator=rng())
    share = torch.bincount(index.flatten(), minlength=4) / index.numel()
    torch.testing.assert_close(share.double(), weights, atol=0.005, rtol=0)
    pairs = (index[:, 0] == index[:, 1]).double().mean().item()
    assert pairs == pytest.approx(weights.square().sum().item(), abs=0.01)  # drawn independently
    assert multinomial_resample(torch.zeros(2, 3, 5)).shape == (2, 3, 5)
    huge = multinomial_resample(torch.tensor([[1e9, 0.0], [-1e9, -2e9]]))
    assert huge.tolist() == [[0, 0], [0, 0]]
    assert multinomial_resample(torch.full((9, 4), -torch.inf)).tolist() == [[0, 1, 2, 3]] * 9  # all dead: as they are


def test_the_log_ratio_of_the_best_discriminator():
    p = torch.tensor([0.2, 0.9, 1e-9, 1 - 1e-9], dtype=torch.float64)
    expected = torch.from_numpy(logit(p.clamp(1e-6, 1 - 1e-6).numpy()))
    torch.testing.assert_close(discriminator_log_ratio(p.logit()), expected)


def test_objects_by_the_rule_of_bayes():
    """Pictures show an object or not; the detector's doubt p is a mixture of both cases."""
    p = torch.tensor([[0.9, 0.4], [0.1, 1.0]], dtype=torch.float64)
    detected, prior = torch.tensor([0.6, 0.25], dtype=torch.float64), 0.2
    expected = []
    for row in p.tolist():
        value = 0.0
        for chance, rate in zip(row, detected.tolist()):
            asked_and_missed, not_asked = (1 - prior) * (1 - rate), prior
            r = asked_and_missed / (asked_and_missed + not_asked)
            value += math.log(chance / (chance + (1 - chance) * r))
        expected.append(value)
    assert object_log_ratio(p.log(), detected=detected, prior=prior).tolist() == pytest.approx(expected)
    never_missed = object_log_ratio(p.log(), detected=torch.ones(2).double())
    torch.testing.assert_close(never_missed, torch.zeros(2).double())


def test_objects_that_are_certain_or_certainly_missing():
    log_prob = torch.tensor([[-torch.inf], [-200.0], [-1.0], [0.0]])
    assert object_log_ratio(log_prob, detected=torch.ones(1)).tolist() == [0.0] * 4  # r = 0
    found = object_log_ratio(log_prob, detected=torch.zeros(1), prior=0.5)  # r = 1 / 2
    p = math.exp(-1)
    expected = [-math.inf, -200 + math.log(2), math.log(p / (p + (1 - p) / 2)), 0.0]
    assert found.tolist() == pytest.approx(expected)


def test_refusals():
    x, sigmas = torch.zeros(5, 2), torch.tensor([1.0, 0.5])
    for call, message in (
        (lambda: ParticleFilterSampler(exact, particles=0, at=()), "particles: expected a whole number >= 1"),
        (lambda: ParticleFilterSampler(exact, particles=2, at=(-1,)), "at: expected a whole number >= 0"),
        (lambda: ParticleFilterSampler(exact, particles=2, at=(), churn=-1.0), "churn: expected a number >= 0"),
        (lambda: ParticleFilterSampler(exact, particles=2, at=())(MODEL.denoise, x, sigmas), "x: expected a batch in"),
        (
            lambda: ParticleFilterSampler(exact, particles=5, at=(0, 1))(MODEL.denoise, x, sigmas),
            "at: expected steps from 0 to 0",
        ),
        (
            lambda: ParticleFilterSampler(lambda x, s: x[:, :1], particles=5, at=(0,))(MODEL.denoise, x, sigmas),
            "log_potential: expected shape",
        ),
        (lambda: object_log_ratio(x, detected=torch.ones(3)), "detected: expected shape"),
        (lambda: object_log_ratio(x, detected=torch.ones(2), prior=1.0), "prior: expected a number > 0 and < 1"),
        (lambda: multinomial_resample(torch.tensor([1, 2])), "log_weights: expected a floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
