"""Minority guidance against closed forms for Gaussians, finite differences, and mixtures whose classes are known."""

import math

import pytest
import torch

from lossary.diffusion import MinorityGuidance, minority_classes, minority_score
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import euler, heun, karras_sigmas

WEIGHTS = torch.tensor([0.6, 0.3, 0.08, 0.02], dtype=torch.float64)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_score_of_a_gaussian():
    """shrink (x_0 + sigma noise) is found: of mean squared distance (1 - shrink)^2 |x_0|^2 + 3 shrink^2 sigma^2."""
    data, sigma, x = Mixture(torch.zeros(1, 3, dtype=torch.float64), 2.0), 5.0, torch.tensor([[3.0, -1.0, 2.0]])

    def square(clean, found):
        return (clean - found).square().sum(-1)

    found = minority_score(data.denoise, x.double(), sigma, draws=20_000, distance=square, generator=rng())
    shrink = 4 / 29
    assert found.item() == pytest.approx((1 - shrink) ** 2 * 14 + 3 * shrink**2 * 25, rel=0.01)


def test_it_is_the_mean_of_the_distances():
    seen = []

    def denoise(x, sigma):
        seen.append(x)
        return 0.5 * x

    clean = torch.randn(2, 4, 3, generator=rng(1), dtype=torch.float64)
    found = minority_score(denoise, clean, 3.0, draws=3, data_dims=1, generator=rng())
    assert len(seen) == 3
    expected = sum((0.5 * x - clean).square().sum(-1).sqrt() for x in seen) / 3
    torch.testing.assert_close(found, expected)
    assert torch.stack(seen).sub(clean).std() == pytest.approx(3.0, rel=0.2)
    whole = minority_score(denoise, clean, 3.0, draws=1, generator=rng())
    assert whole.tolist() == pytest.approx((0.5 * seen[3] - clean).square().sum((1, 2)).sqrt().tolist())


def test_rare_modes_score_high():
    truth = ring(4, radius=2.0, scale=0.2, weights=WEIGHTS)
    found = minority_score(truth.denoise, truth.means, 4.0, draws=200, generator=rng())
    assert found.argsort().tolist()[0] == 0
    assert found[2:].min() > 1.5 * found[0]


def test_classes_are_quantiles():
    scores = torch.randn(1000, generator=rng(), dtype=torch.float64)
    found = minority_classes(scores, levels=10)
    assert torch.bincount(found).tolist() == [100] * 10
    rank = scores.argsort().argsort()
    torch.testing.assert_close(found, rank // 100)
    # a score that is itself a quantile belongs to the class below, as in the official code
    assert minority_classes(torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0]), levels=4).tolist() == [0, 0, 1, 2, 3]
    assert minority_classes(torch.zeros(5), levels=3).tolist() == [0] * 5
    for dtype in (torch.bfloat16, torch.float16):
        low = minority_classes(torch.arange(8, dtype=dtype), levels=4)
        assert low.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("sigma", [0.05, 0.7, 9.0])
def test_a_perfect_classifier_gives_the_denoiser_of_its_class(sigma):
    truth = ring(4, radius=2.0, scale=0.5, weights=WEIGHTS)
    x = (2 + sigma) * torch.randn(50, 2, generator=rng(), dtype=torch.float64)

    def classify(x, sigma):
        return truth._log_joint(x, sigma)[0]

    rare = MinorityGuidance(truth.denoise, classify, level=3, scale=1.0)
    torch.testing.assert_close(rare(x, sigma), truth.component(3).denoise(x, sigma))
    level = torch.randint(4, (50,), generator=rng(1))
    each = MinorityGuidance(truth.denoise, classify, level=level, scale=1.0)(x, torch.full((50,), sigma).double())
    expected = torch.stack([truth.component(k).denoise(row, sigma) for k, row in zip(level.tolist(), x)])
    torch.testing.assert_close(each, expected)
    plain = MinorityGuidance(truth.denoise, classify, level=3, scale=0.0)(x, sigma)
    torch.testing.assert_close(plain, truth.denoise(x, sigma))


def test_the_shift_by_finite_differences():
    def classify(x, sigma):
        return torch.stack([x[..., 0] * x[..., 1], x.sin().sum(-1), 0 * x[..., 0] + sigma], dim=-1)

    x, sigma, step = torch.tensor([[0.3, -0.8]], dtype=torch.float64), 1.7, 1e-6
    guided = MinorityGuidance(lambda x, sigma: 0 * x, classify, level=1, scale=2.5)(x, sigma)
    for k in range(2):
        shift = torch.zeros_like(x)
        shift[0, k] = step
        up, down = (classify(x + s, sigma).log_softmax(-1)[0, 1].item() for s in (shift, -shift))
        assert guided[0, k].item() == pytest.approx(2.5 * 1.7**2 * (up - down) / (2 * step), rel=1e-6)
    assert not guided.requires_grad


def test_sampling_reaches_the_rare_mode():
    truth = ring(4, radius=2.0, scale=0.2, weights=WEIGHTS)
    x = 20 * torch.randn(200, 2, generator=rng(), dtype=torch.float64)
    sigmas = karras_sigmas(20, high=20.0)
    rare = MinorityGuidance(truth.denoise, lambda x, s: truth._log_joint(x, s)[0], level=3, scale=1.5)
    share = [truth.responsibilities(sample(d, x, sigmas))[:, 3].mean() for sample in (euler, heun) for d in (rare,)]
    assert min(share) > 0.99
    assert truth.responsibilities(euler(truth.denoise, x, sigmas))[:, 3].mean() < 0.1


def test_stacks_dtypes_and_conditions():
    seen = []

    def denoise(x, sigma, label):
        seen.append(label)
        return x

    guided = MinorityGuidance(denoise, lambda x, sigma: x.cumsum(-1), level=0)
    x = torch.randn(2, 3, 4, generator=rng())
    with torch.no_grad():
        found = guided(x, torch.rand(2, 3), "cat")
    assert found.shape == x.shape
    assert seen == ["cat"]
    assert guided(x.bfloat16(), 0.5, "cat").dtype is torch.bfloat16
    assert math.isfinite(found.sum().item())


def test_refusals():
    x = torch.zeros(2, 3)

    def same(x, sigma):
        return x

    for call, message in (
        (lambda: minority_score(same, x, 0.0), "sigma: expected a number > 0"),
        (lambda: minority_score(same, x, 1.0, draws=0), "draws: expected a whole number >= 1"),
        (lambda: minority_score(same, x, 1.0, data_dims=3), "data_dims: expected a whole number"),
        (lambda: minority_classes(x), "scores: expected 1 dimensions"),
        (lambda: minority_classes(torch.zeros(3), levels=1), "levels: expected a whole number >= 2"),
        (lambda: MinorityGuidance(same, same, level=-1), "level: expected a whole number >= 0"),
        (lambda: MinorityGuidance(same, same, level=0, scale=-1.0), "scale: expected a number >= 0"),
        (lambda: MinorityGuidance(same, same, level=3)(x, 1.0), "level: expected a class below 3, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
