"""Bayesian flow networks against Bayes' rule step by step, DDPM's formulas, and densities of scipy."""

import math

import pytest
import torch
from scipy.stats import norm

from lossary.diffusion import ContinuousBFN, DiscreteBFN
from lossary.diffusion._denoiser import Counted, Denoiser
from lossary.diffusion._mixture import Mixture


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_many_messages_are_the_flow():
    """Sending n messages one by one and updating the mean gives mu ~ N(gamma x, gamma (1 - gamma))."""
    s, n, t, x = 0.1, 10, 0.6, 0.7
    mu, rho = torch.zeros(200_000, dtype=torch.float64), 1.0
    for i in range(1, 7):
        alpha = s ** (-2 * i / n) * (1 - s ** (2 / n))
        y = x + torch.randn(mu.shape, generator=rng(i), dtype=mu.dtype) / math.sqrt(alpha)
        mu, rho = (rho * mu + alpha * y) / (rho + alpha), rho + alpha
    process, time = ContinuousBFN(s).process, torch.tensor(t, dtype=torch.float64)
    gamma = 1 - s ** (2 * t)
    assert mu.mean().item() == pytest.approx(x * process.alpha(time).item(), abs=5e-3)
    assert mu.std().item() == pytest.approx(process.sigma(time).item(), rel=0.01)
    assert process.alpha(time).item() == pytest.approx(gamma)
    assert process.sigma(time).item() == pytest.approx(math.sqrt(gamma * (1 - gamma)))
    assert process.time(process.ratio(time)).item() == pytest.approx(t)


def test_the_continuous_loss_of_a_gaussian_is_its_integral():
    """Data N(0, 1): the perfect error at time t is 1 - gamma, so the loss is -ln s at all times."""
    bfn, truth = ContinuousBFN(0.05), Mixture(torch.zeros(1, 3, dtype=torch.float64), 1.0)
    clean, noise = torch.randn(2, 40_000, 3, generator=rng(), dtype=torch.float64)
    for t in (0.1, 0.5, 0.9):
        sigma = bfn.process.ratio(torch.full((40_000,), t, dtype=torch.float64))
        assert bfn.loss(truth.denoise, clean, sigma, noise).mean().item() == pytest.approx(-math.log(0.05), rel=0.02)


def test_continuous_samples():
    truth = Mixture(torch.tensor([[0.5, -0.5]]), 0.3)
    counted = Counted(truth.denoise)
    found = ContinuousBFN(0.02).sample(counted, (20_000, 2), steps=200, generator=rng())
    torch.testing.assert_close(found.mean(0), truth.means[0], atol=0.01, rtol=0)
    torch.testing.assert_close(found.std(0), torch.full((2,), 0.3), atol=0.01, rtol=0)
    assert counted.evaluations == 200
    # The paper's network sees mu and predicts the noise: x_hat = mu / gamma - sqrt((1 - gamma) / gamma) eps.
    bfn = ContinuousBFN(0.02)
    network = torch.nn.Module()
    network.forward = lambda mu, t: 0.25 * mu
    t = torch.tensor([0.4])
    gamma, mu = 1 - 0.02**0.8, torch.tensor([[0.3]])
    found = Denoiser(network, bfn.process, "noise")(mu / gamma, bfn.process.ratio(t))
    assert found.item() == pytest.approx(0.3 / gamma - math.sqrt((1 - gamma) / gamma) * 0.075, rel=1e-5)


def test_many_messages_about_a_token_are_the_flow():
    """Multiplying beliefs by exp(y) message by message, against the beliefs at once: mean log-odds and their spread."""
    bfn, n, clean = DiscreteBFN(3, accuracy=1.5), 5, torch.full((60_000, 1), 2)
    theta = torch.full((60_000, 3), 1 / 3, dtype=torch.float64)
    for i in range(1, 5):
        alpha = 1.5 * (2 * i - 1) / n**2
        noise = torch.randn(theta.shape, generator=rng(i), dtype=theta.dtype)
        y = alpha * (3 * torch.tensor([0, 0, 1]) - 1) + math.sqrt(3 * alpha) * noise
        theta = y.exp() * theta
        theta = theta / theta.sum(-1, keepdim=True)
    t = torch.full((60_000,), 0.8, dtype=torch.float64)
    at_once = bfn.beliefs(clean, t, generator=rng(9))[:, 0]
    odds = [(b[:, 2] / b[:, 0]).log() for b in (theta, at_once)]
    expected = 1.5 * 0.64 * 3  # beta K
    for found in odds:
        assert found.mean().item() == pytest.approx(expected, rel=0.02)
        assert found.var().item() == pytest.approx(2 * expected, rel=0.02)


def test_the_cost_of_a_message_is_a_divergence_of_densities():
    bfn, guess = DiscreteBFN(2, accuracy=2.0), torch.tensor([0.3, 0.7], dtype=torch.float64)
    clean = torch.zeros(100_000, 1, dtype=torch.long)
    step = torch.full((100_000,), 2)
    found = bfn.step_loss(lambda b, t: guess.log().expand_as(b), clean, step, steps=4, generator=rng()).mean()
    alpha = 2.0 * 3 / 16
    y = torch.linspace(-12, 12, 1201, dtype=torch.float64)
    own = [norm(alpha, math.sqrt(2 * alpha)).pdf(y), norm(-alpha, math.sqrt(2 * alpha)).pdf(y)]
    first, second = (torch.as_tensor(p) for p in own)
    sender = first[:, None] * second  # class 0: mean +alpha, then -alpha
    receiver = 0.3 * sender + 0.7 * sender.T
    cell = (y[1] - y[0]) ** 2
    expected = 4 * (torch.special.xlogy(sender, sender / receiver)).nan_to_num().sum() * cell
    assert found.item() == pytest.approx(expected.item(), rel=0.03)
    times = []
    bfn.step_loss(lambda b, t: times.append(t) or b.log(), clean[:1], step[:1], steps=4)
    assert times[0].item() == 0.25  # what is known before the second message
    # Many small messages cost the continuous loss.
    fine = bfn.step_loss(lambda b, t: guess.log().expand_as(b), clean, 0 * step + 501, steps=1000, generator=rng())
    limit = bfn.loss(guess.log().expand(1, 1, 2), clean[:1], torch.tensor([0.5]))
    assert limit.item() == pytest.approx(2 * 2.0 * 0.5 * (0.7**2 + 0.7**2), rel=1e-6)
    assert fine.mean().item() == pytest.approx(limit.item(), abs=0.6)  # 0.2 is its standard error


def test_discrete_samples_and_the_final_loss():
    law = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    bfn = DiscreteBFN(3, accuracy=3.0)

    def predict(beliefs, t):
        return (beliefs * law).log()

    found = bfn.sample(predict, (20_000, 1), steps=30, generator=rng())
    torch.testing.assert_close(torch.bincount(found[:, 0]) / 20_000, law.float(), atol=0.012, rtol=0)
    clean = torch.multinomial(law, 20_000, replacement=True, generator=rng(1))[:, None]
    t = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    cost = bfn.loss(predict(bfn.beliefs(clean, t, generator=rng(2)), t), clean, t).mean()
    cost = cost + bfn.final_loss(predict, clean, generator=rng(3)).mean()
    assert cost.item() == pytest.approx(-(law * law.log()).sum().item(), abs=0.03)


def test_a_sampler_that_is_sure_of_a_token_sends_itself_the_flow_s_messages():
    odds, times = [], []

    def predict(beliefs, t):
        odds.append((beliefs[:, 0, 1] / beliefs[:, 0, 0]).log().mean().item())
        times.append(t[0].item())
        return torch.tensor([-50.0, 50.0]).expand_as(beliefs)

    found = DiscreteBFN(2, accuracy=1.5).sample(predict, (100_000, 1), steps=4, generator=rng())
    assert found.unique().tolist() == [1]
    assert times == [0, 0.25, 0.5, 0.75, 1]
    assert odds == pytest.approx([2 * 1.5 * t**2 for t in times], abs=0.03)


def test_refusals():
    with pytest.raises(ValueError, match="sigma"):
        ContinuousBFN(1.0)
    with pytest.raises(ValueError, match="accuracy"):
        DiscreteBFN(3, accuracy=0.0)
    bfn, clean = DiscreteBFN(3), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="t:"):
        bfn.beliefs(clean, torch.zeros(3))
    with pytest.raises(ValueError, match="logits"):
        bfn.loss(torch.zeros(2, 4, 2), clean, torch.zeros(2))
    with pytest.raises(ValueError, match="steps"):
        bfn.sample(lambda b, t: b, (2, 4), steps=0)
