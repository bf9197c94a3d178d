"""Cauchy loss and company, against scipy, brute force, printed formulas, torch's own layer norm, and a Gaussian's
probability flow."""

import itertools
import math

import pytest
import torch
from scipy.stats import cauchy, norm

from lossary.diffusion import (
    ConsistencyModel,
    NonScalingLayerNorm,
    cauchy_loss,
    consistency_loss,
    consistency_width,
    early_denoising_loss,
    level_weights,
    transport_noise,
)
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import heun, karras_sigmas


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("c", [0.02, 1.0, 7.0])
def test_it_is_the_cauchy_likelihood(c):
    """-log density at r against that at 0, of a Cauchy of scale sqrt(2) c."""
    r = torch.linspace(-30, 30, 31, dtype=torch.float64)
    law = cauchy(scale=2**0.5 * c)
    expected = torch.from_numpy(law.logpdf(0.0) - law.logpdf(r.numpy()))
    torch.testing.assert_close(cauchy_loss(r - 2, torch.full_like(r, -2.0), c=c), expected)


def test_the_pull_of_an_outlier_fades():
    x = torch.tensor([0.1, 2**0.5, 1e4], dtype=torch.float64, requires_grad=True)
    cauchy_loss(x, torch.zeros(3, dtype=torch.float64)).sum().backward()
    expected = [0.1 / (1 + 0.005), 2**0.5 / 2, 1e4 / (1 + 5e7)]  # the largest at sqrt(2) c
    assert x.grad.tolist() == pytest.approx(expected)


def test_the_consistency_losses_as_the_official_code_has_them():
    g = rng()
    found, target = torch.randn(2, 5, 3, 4, generator=g, dtype=torch.float64).unbind()
    gap, c = torch.rand(5, generator=g, dtype=torch.float64) + 0.1, 0.3
    mean = ((found - target) ** 2).mean((1, 2))
    expected = {
        "cauchy": torch.log(0.5 * mean + c**2) - 2 * math.log(c),
        "pseudo_huber": torch.sqrt(mean + c**2) - c,
        "squared": mean,
    }
    for distance, values in expected.items():
        got = consistency_loss(found, target, gap=gap, c=c, distance=distance)
        torch.testing.assert_close(got, values / gap)
    stacked = consistency_loss(found[None], target[None], gap=gap[None], c=c)
    torch.testing.assert_close(stacked[0], expected["cauchy"] / gap)
    frozen = target.requires_grad_()
    assert not consistency_loss(found, frozen, gap=gap, c=c).requires_grad


def test_the_width():
    assert consistency_width(10, dimension=4 * 32 * 32) == pytest.approx(0.00054 * 64)
    for intervals in (20, 640):
        assert consistency_width(intervals, dimension=7) == pytest.approx(intervals**-1.15 * math.exp(-0.85))


def test_level_weights_are_a_normal_in_the_logarithm():
    sigmas = karras_sigmas(11)[:-1]
    expected = norm(-1.1, 2.0).cdf(sigmas.log().numpy())
    expected = expected[:-1] - expected[1:]
    torch.testing.assert_close(level_weights(sigmas), torch.from_numpy(expected / expected.sum()))


def test_early_denoising_concerns_the_cleanest_quarter():
    g = rng()
    found, clean = torch.randn(2, 6, 2, 3, generator=g).unbind()
    sigma, index = torch.rand(6, generator=g) + 0.1, torch.tensor([0, 7, 8, 10, 3, 9])
    values = early_denoising_loss(found, clean, sigma, index, levels=11)  # int(8.25) = 8
    chosen = [2, 3, 5]
    by_hand = [5 * (1 / sigma[i] ** 2 + 4) * ((found[i] - clean[i]) ** 2).mean() for i in chosen]
    assert values.mean().item() == pytest.approx(sum(by_hand).item() / 3, rel=1e-5)
    assert (values[[0, 1, 4]] == 0).all()
    assert (early_denoising_loss(found, clean, sigma, index * 0, levels=11) == 0).all()


def test_transport_is_the_best_of_all_orders():
    clean, noise = torch.randn(2, 5, 2, 2, generator=rng()).unbind()
    cost = min((clean - noise[list(order)]).square().sum().item() for order in itertools.permutations(range(5)))
    found = transport_noise(clean, noise)
    assert (clean - found).square().sum().item() == pytest.approx(cost, rel=1e-5)
    assert sorted(found.flatten().tolist()) == sorted(noise.flatten().tolist())


def test_the_norm_keeps_its_scale():
    x = torch.randn(5, 6, generator=rng())
    norm_ = NonScalingLayerNorm(6)
    torch.testing.assert_close(norm_(x), torch.nn.functional.layer_norm(x, (6,)))
    assert [name for name, w in norm_.named_parameters() if w.requires_grad] == ["bias"]
    assert set(norm_.state_dict()) == {"weight", "bias"}


def test_the_model_starts_at_the_data_and_keeps_unit_scale():
    network = torch.nn.Module()
    network.forward = lambda x, t: torch.ones_like(x)
    model = ConsistencyModel(network)
    x = torch.randn(4, 2, 3, generator=rng(), dtype=torch.float64)
    torch.testing.assert_close(model(x, 0.002), x)
    s = torch.tensor([0.5, 1.0, 9.0, 80.0], dtype=torch.float64)
    skip = 0.25 / ((s - 0.002) ** 2 + 0.25)
    out = (s - 0.002) * 0.5 / (s**2 + 0.25).sqrt()
    torch.testing.assert_close(model(x, s), skip.view(-1, 1, 1) * x + out.view(-1, 1, 1))
    seen = []
    ConsistencyModel(lambda y, t: seen.extend([y, t]) or y)(x, s)
    torch.testing.assert_close(seen[0], x / (s**2 + 0.25).sqrt().view(-1, 1, 1))
    torch.testing.assert_close(seen[1], s.log() / 4)


def test_the_exact_flow_of_a_gaussian_is_consistent():
    """f = m + (x - m) (s^2 + lowest^2)^p / (s^2 + sigma^2)^p is constant along the flow for p = 1/2, and only there."""
    mean, s, lowest = 0.7, 0.4, 0.002
    truth = Mixture(torch.full((1, 3), mean, dtype=torch.float64), s)

    def model_of(power):
        def network(y, quarter):
            sigma = (4 * quarter).exp()[:, None]
            x = y * (sigma**2 + 0.25).sqrt()
            wanted = mean + (x - mean) * ((s**2 + lowest**2) / (s**2 + sigma**2)) ** power
            skip, out = 0.25 / ((sigma - lowest) ** 2 + 0.25), (sigma - lowest) * 0.5 / (sigma**2 + 0.25).sqrt()
            return (wanted - skip * x) / out

        return ConsistencyModel(network)

    high = torch.tensor([0.5, 3.0, 40.0], dtype=torch.float64)
    low = high / 2
    above = torch.stack([truth.sample(1, generator=rng(i))[0][0] for i in range(3)])
    above = above + high[:, None] * torch.randn(3, 3, generator=rng(9), dtype=torch.float64)
    below = torch.cat(
        [
            heun(truth.denoise, x[None], torch.linspace(a, b, 1001))
            for x, a, b in zip(above, high.tolist(), low.tolist())
        ]
    )
    ends = {}
    for power in (0.4, 0.5, 0.6):
        model = model_of(power)
        values = consistency_loss(model(above, high), model(below, low), gap=high - low, c=0.03)
        ends[power] = values.tolist()
    assert ends[0.5] == pytest.approx([0.0] * 3, abs=1e-8)
    shrunk = (below - mean).square().mean(1) * (s**2 / (s**2 + low**2)) ** 1.2
    apart = shrunk * (((s**2 + high**2) / (s**2 + low**2)) ** -0.1 - 1).square()
    assert ends[0.6] == pytest.approx(((1 + apart / 0.0018).log() / low).tolist(), rel=1e-3)
    assert min(ends[0.4]) > 1e-3
    noise = 80 * torch.randn(4000, 3, generator=rng(), dtype=torch.float64)
    assert model_of(0.5)(noise, 80.0).std().item() == pytest.approx(s, rel=0.02)


def test_a_diffusers_network_serves():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    model = ConsistencyModel(lambda x, t: unet(x, 1000 * t).sample)
    x, noise = torch.randn(2, 3, 1, 8, 8)
    high, low = torch.tensor([1.0, 5.0, 40.0]), torch.tensor([0.8, 4.0, 30.0])
    found, target = (model(x + s.view(-1, 1, 1, 1) * transport_noise(x, noise), s) for s in (high, low))
    consistency_loss(found, target, gap=high - low, c=0.03).mean().backward()
    assert all(p.grad is not None for p in unet.parameters())


def test_refusals():
    x, one = torch.zeros(2, 3), torch.ones(2)
    for call, message in (
        (lambda: cauchy_loss(x, x, c=0.0), "c: expected a number > 0"),
        (lambda: consistency_loss(x, x, gap=torch.ones(3), c=1.0), "gap: expected shape"),
        (lambda: consistency_loss(x, x, gap=one, c=1.0, distance="l1"), "distance: expected one of"),
        (lambda: consistency_width(0, dimension=2), "intervals: expected a whole number >= 1"),
        (lambda: level_weights(one[:1]), "sigmas: expected at least 2 levels"),
        (lambda: early_denoising_loss(x, x, one, one, levels=3), "index: expected an int64 tensor"),
        (lambda: transport_noise(x, x[:1]), "noise: expected shape"),
        (lambda: NonScalingLayerNorm(4)(x), r"input: expected to end in \(4,\)"),
        (lambda: ConsistencyModel(None, spread=0.0), "spread: expected a number > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
