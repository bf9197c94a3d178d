"""DiffEnc, on Gaussian data, whose likelihood and best networks are known; KL terms against torch's."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lossary.diffusion import DiffEnc, LearnedMeanEncoder, best_variance_ratio, reverse_variance_kl

VARIANCE, D = 2.0, 3


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gamma(t):
    return -13.3 + 18.3 * t


def scale(kind, t):
    """k of x_phi = k x, and its slope in g by differences."""

    def k(at):
        kept = torch.sigmoid(-gamma(at))
        return {"none": torch.ones_like(at), "fixed": kept, "linear": kept + (1 - kept) * 0.7 * at}[kind]

    return k(t), (k(t + 1e-6) - k(t - 1e-6)) / (2e-6 * 18.3)


def perfect(kind):
    """v-hat that makes the bound tight: x-hat is the posterior mean of what the loss asks for."""

    def network(z, t):
        t = t.double()
        alpha, sigma = torch.sigmoid(-gamma(t)).sqrt(), torch.sigmoid(gamma(t)).sqrt()
        k, slope = scale(kind, t)
        asked = k / 1 if kind == "none" else (k - slope) / (1 + sigma**2)
        mean = alpha * k * VARIANCE / ((alpha * k) ** 2 * VARIANCE + sigma**2)
        return ((alpha - asked * mean) / sigma)[:, None] * z

    return network


ENCODERS = {"none": None, "fixed": LearnedMeanEncoder(), "linear": lambda x, t: 0.7 * t[:, None] * x}


@pytest.mark.parametrize("kind", ENCODERS)
def test_with_the_best_network_the_bound_is_the_entropy_and_what_drifting_costs(kind):
    """A mean of k(g) x has SNR k^2 e^-g, whose own loss is -dSNR / 2 Var(x | z); k'^2 e^-g / 2 Var(x | z) is added.

    So the plain model reaches the entropy of Gaussian data, and an encoder that moves cannot. All is quadratic in data
    and noise, whose averages are therefore exact over two values of each.
    """
    x, eps = torch.cartesian_prod(torch.tensor([1.0, -1.0]).double(), torch.tensor([1.0, -1.0]).double()).T
    x = VARIANCE**0.5 * x[:, None]
    model = DiffEnc(perfect(kind), ENCODERS[kind])
    t = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    diffusion = model.diffusion_loss(x.repeat(4000, 1), t.repeat_interleave(4), eps[:, None].repeat(4000, 1)).mean()
    found = (diffusion + model.prior_loss(x).mean() + model.reconstruction_loss(x, eps[:, None]).mean()).item()
    k, slope = scale(kind, t)
    variance = VARIANCE / (1 + VARIANCE * k**2 * (-gamma(t)).exp())
    drifting = 0.5 * 18.3 * (slope**2 * (-gamma(t)).exp() * variance).mean().item()
    noisy, last = 1 / (1 + math.exp(-5)), scale(kind, torch.ones(1).double())[0].item()
    end = (1 - noisy) * last**2 * VARIANCE + noisy
    prior = 0.5 * (end - 1 - math.log(end))  # KL(q(z_1) | N(0, 1))
    entropy = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)
    assert found == pytest.approx(entropy + drifting + prior, abs=1e-4)
    assert (drifting > 0.05) == (kind == "fixed")


def test_the_bound_is_the_sum_of_its_terms_at_even_times():
    x = torch.rand(5, D, generator=rng(), dtype=torch.float64) * 2 - 1
    model, g = DiffEnc(perfect("fixed"), ENCODERS["fixed"], levels=17), rng(1)
    t = (torch.arange(5) / 5 + torch.rand(1, generator=g, dtype=torch.float64)) % 1
    first, second = (torch.randn(x.shape, generator=g, dtype=torch.float64) for _ in range(2))
    parts = model.diffusion_loss(x, t, first), model.prior_loss(x), model.reconstruction_loss(x, second)
    torch.testing.assert_close(model(x, generator=rng(1)), sum(parts))


@pytest.mark.parametrize("kind", ENCODERS)
def test_its_samples_are_the_data(kind):
    model = DiffEnc(perfect(kind), ENCODERS[kind])
    found = model.sample((20_000, D), steps=300, generator=rng(), like=torch.zeros(0, dtype=torch.float64))
    torch.testing.assert_close(found.T.cov(), VARIANCE * torch.eye(D, dtype=torch.float64), atol=0.08, rtol=0)


def test_the_loss_in_its_other_form():
    """g' e^-g |x_phi - dx_phi/dg - (1 + sigma^2) x-hat|^2 / 2, the derivative by differences."""
    x, eps = torch.randn(2, 5, D, generator=rng(), dtype=torch.float64).unbind()
    t = torch.linspace(0.2, 0.95, 5, dtype=torch.float64)
    encoder = LearnedMeanEncoder(lambda y, at: torch.sin(y) * (3 * at[:, None]))
    model = DiffEnc(lambda z, at: torch.cos(z) + at[:, None], encoder)
    encoded = model.encode(x, t)
    slope = (model.encode(x, t + 1e-6) - model.encode(x, t - 1e-6)) / (2e-6 * 18.3)
    g = gamma(t)[:, None]
    alpha, sigma = torch.sigmoid(-g).sqrt(), torch.sigmoid(g).sqrt()
    z = alpha * encoded + sigma * eps
    clean = alpha * z - sigma * (torch.cos(z) + t[:, None])
    expected = 0.5 * 18.3 * ((-g / 2).exp() * (encoded - slope - (1 + sigma**2) * clean)).square().sum(-1)
    torch.testing.assert_close(model.diffusion_loss(x, t, eps), expected, rtol=1e-5, atol=1e-6)
    plain = DiffEnc(lambda z, at: torch.cos(z) + at[:, None])
    z = alpha * x + sigma * eps
    clean = alpha * z - sigma * (torch.cos(z) + t[:, None])
    vdm = 0.5 * 18.3 * (-g[:, 0]).exp() * (x - clean).square().sum(-1)
    torch.testing.assert_close(plain.diffusion_loss(x, t, eps), vdm)


def test_prior_and_reconstruction():
    x, eps = torch.tensor([[-1.0, 0.5, 1.0]]).double(), torch.tensor([[0.3, -2.0, 1.0]]).double()
    model = DiffEnc(None, levels=5, low=-3.0, high=2.0)
    variance = 1 / (1 + math.exp(-2))
    q = Normal(math.sqrt(1 - variance) * x, math.sqrt(variance))
    torch.testing.assert_close(model.prior_loss(x), kl_divergence(q, Normal(0.0, 1.0)).sum(-1))
    seen = x + math.exp(-1.5) * eps
    grid = [-1.0, -0.5, 0.0, 0.5, 1.0]
    likelihood = torch.stack([Normal(value, math.exp(-1.5)).log_prob(seen) for value in grid]).softmax(0)
    expected = -torch.stack([likelihood[grid.index(v), 0, i].log() for i, v in enumerate(x[0].tolist())]).sum()
    torch.testing.assert_close(model.reconstruction_loss(x, eps)[0], expected)
    smooth = DiffEnc(None, low=-3.0, high=2.0).reconstruction_loss(x, eps)
    torch.testing.assert_close(smooth, -Normal(seen, math.exp(-1.5)).log_prob(x).sum(-1))


def test_the_encoder_learns_through_its_own_derivative():
    """Gradients of the loss in the encoder's weight, against differences; replicas and pictures too."""
    weight = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    x, eps = torch.randn(2, 4, D, generator=rng(), dtype=torch.float64).unbind()
    t = torch.linspace(0.3, 0.9, 4, dtype=torch.float64)

    def loss(w):
        model = DiffEnc(lambda z, at: 0.5 * z, LearnedMeanEncoder(lambda y, at: w * y * at[:, None]))
        return model.diffusion_loss(x, t, eps).sum()

    (slope,) = torch.autograd.grad(loss(weight), weight)
    with torch.no_grad():
        by_difference = (loss(weight + 1e-5) - loss(weight - 1e-5)) / 2e-5
    torch.testing.assert_close(slope, by_difference, rtol=1e-5, atol=1e-5)
    model = DiffEnc(lambda z, at: 0.5 * z, levels=5)
    assert model(torch.zeros(2, 4, D), generator=[rng(), rng(1)]).shape == (2, 4)
    assert model(torch.zeros(4, 1, 2, 2), generator=rng()).shape == (4,)
    assert set(model.sample((4, D), steps=3, generator=rng()).unique().tolist()) <= {-1.0, -0.5, 0.0, 0.5, 1.0}


def test_the_variance_of_the_reverse_step():
    mean, other, deviation, w = torch.tensor([1.0, -0.5]).double(), torch.tensor([0.2, 0.4]).double(), 0.7, 0.6
    q, p = Normal(mean, deviation), Normal(other, deviation / math.sqrt(w))
    gain = torch.tensor(3.0, dtype=torch.float64)
    error = ((mean - other) / deviation).square().sum() / gain  # |mu_q - mu_p|^2 / var = SNR gain |x - x-hat|^2
    found = reverse_variance_kl(error, gain, dimension=2, ratio=w)
    torch.testing.assert_close(found, kl_divergence(q, p).sum())
    ratios = torch.linspace(0.05, 1.5, 1451, dtype=torch.float64)
    values = torch.stack([reverse_variance_kl(error, gain, dimension=2, ratio=r) for r in ratios])
    best = best_variance_ratio(error, gain, dimension=2)
    assert ratios[values.argmin()].item() == pytest.approx(best.item(), abs=1e-3)


def test_refusals():
    x, t = torch.zeros(2, 3), torch.zeros(2)
    for call, message in (
        (lambda: DiffEnc(None, low=1.0, high=0.0), "high: expected a number > 1"),
        (lambda: DiffEnc(None, levels=1), "levels: expected a whole number >= 2"),
        (lambda: DiffEnc(None).diffusion_loss(x, t, x[:1]), "noise: expected shape"),
        (lambda: DiffEnc(None).diffusion_loss(x, torch.zeros(3), x), "t: expected shape"),
        (lambda: reverse_variance_kl(t, t[:1], dimension=2), "snr_gain: expected shape"),
        (lambda: reverse_variance_kl(t, t, dimension=2, ratio=0.0), "ratio: expected a number > 0"),
        (lambda: best_variance_ratio(t, t, dimension=0), "dimension: expected a whole number >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
