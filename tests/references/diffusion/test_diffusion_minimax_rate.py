"""Rates against hand-worked exponents, the estimator against scikit-learn's kernel density and its own samples."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.neighbors import KernelDensity

from lossary.diffusion import KernelScoreDiffusion, empirical_rate, minimax_exponent


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exponents():
    assert minimax_exponent(1, 1) == pytest.approx(1 / 3)
    assert minimax_exponent(2, 1) == pytest.approx(2 / 5)
    assert minimax_exponent(3, 5) == pytest.approx(3 / 11)
    assert minimax_exponent(3, 5, distance="w1") == pytest.approx(4 / 11)
    assert minimax_exponent(1, 1, distance="w1") == 0.5  # 2/3 would beat the law of large numbers


def test_a_rate_is_a_slope_of_logarithms():
    sizes = torch.tensor([100.0, 300.0, 1000.0, 5000.0], dtype=torch.float64)
    noise = torch.randn(4, generator=rng(), dtype=torch.float64)
    errors = 7 * sizes**-0.37 * (0.1 * noise).exp()
    expected = -np.polyfit(sizes.log().numpy(), errors.log().numpy(), 1)[0]
    assert empirical_rate(sizes, errors).item() == pytest.approx(expected)
    assert empirical_rate(sizes, torch.stack([errors, sizes**-0.5]))[1].item() == pytest.approx(0.5)


def test_the_law_is_a_kernel_density():
    x = torch.randn(200, 3, generator=rng(), dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5])
    model = KernelScoreDiffusion(1.5, constant=0.7).fit(x)
    spread = math.sqrt(x.numpy().var(0, ddof=1).mean())
    assert model.bandwidth_ == pytest.approx(0.7 * spread * 200 ** (-1 / 6))
    at = torch.randn(50, 3, generator=rng(1), dtype=torch.float64)
    peer = KernelDensity(bandwidth=model.bandwidth_).fit(x.numpy())
    torch.testing.assert_close(model.log_density(at), torch.from_numpy(peer.score_samples(at.numpy())))
    noisy = KernelDensity(bandwidth=math.hypot(model.bandwidth_, 0.4)).fit(x.numpy())
    torch.testing.assert_close(model.log_density(at, 0.4), torch.from_numpy(noisy.score_samples(at.numpy())))


def test_the_sampler_draws_from_that_law():
    x = torch.tensor([[-1.0], [0.0], [3.0]], dtype=torch.float64)
    model = KernelScoreDiffusion(2.0).fit(x)
    found = model.sample(4000, steps=40, generator=rng())[:, 0].numpy()

    def distribution(values):
        at = torch.as_tensor(values)[:, None]
        return torch.special.ndtr((at - x.T) / model.bandwidth_).mean(1).numpy()

    assert kstest(found, distribution).pvalue > 0.01


def test_without_smoothing_it_gives_the_samples_back():
    x = torch.randn(20, 2, generator=rng(), dtype=torch.float64)
    found = KernelScoreDiffusion(constant=0.0).fit(x).sample(50, generator=rng(1))
    nearest = torch.cdist(found, x).amin(1)
    assert nearest.max() < 0.02


def test_refusals():
    for call, message in (
        (lambda: minimax_exponent(0, 1), "smoothness: expected a number > 0"),
        (lambda: minimax_exponent(1, 0), "dimension: expected a whole number >= 1"),
        (lambda: minimax_exponent(1, 1, distance="w2"), "distance: expected one of"),
        (lambda: empirical_rate(torch.ones(3), torch.ones(2)), r"errors: expected \(..., 3\)"),
        (lambda: KernelScoreDiffusion(constant=-1.0), "constant: expected a number >= 0"),
        (lambda: KernelScoreDiffusion().fit(torch.ones(3)), "x: expected 2 dimensions"),
        (lambda: KernelScoreDiffusion().fit(torch.ones(1, 2)), "x: expected at least 2 samples"),
        (lambda: KernelScoreDiffusion().sample(3), "fit: expected samples first"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
