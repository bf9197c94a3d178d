"""Heteroscedastic registration against the official code's numbers, finite differences and motions by hand.

Where a test says so, numbers come from running the official losses and spatial transformer on the same input.
"""

import math

import pytest
import torch
from torch import nn

from lossary.roles.procedure import advance
from lossary.uncertainty import (
    HeteroscedasticRegistration,
    beta_nll_loss,
    collaborative_variance_loss,
    snr_weight,
    snr_weighted_mse_loss,
    warp,
)

I = torch.arange(12, dtype=torch.float64)  # noqa: E741
FIXED, WARPED = ((I * 7) % 11 / 10).view(1, 1, 3, 4), ((I * 5) % 13 / 12).view(1, 1, 3, 4)
LOG_VARIANCE = ((I * 3) % 7 / 3 - 1.5).view(1, 1, 3, 4)
FLOW = ((torch.arange(24, dtype=torch.float64) * 11) % 17 / 8 - 1).view(1, 2, 3, 4)
MASK = torch.ones_like(FIXED)
MASK[..., 0] = 0
WEIGHTS = [0.5, 0.6700071557478433, 0.5698428802675999, 0.7310585786300049, 0.6153403539706661, 0.6290912956357496]
WEIGHTS += [0.6636854170251124, 0.7284646980802783, 0.5665235116086643, 0.6128277534854065, 0.6530460379407679, 0.5]


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_are_the_official_ones():
    assert snr_weight(FIXED, LOG_VARIANCE).flatten().tolist() == pytest.approx(WEIGHTS)
    masked = snr_weight(FIXED, LOG_VARIANCE, mask=MASK)
    assert masked.flatten().tolist() == pytest.approx([0 if k % 4 == 0 else w for k, w in enumerate(WEIGHTS)])


@pytest.mark.parametrize(("mask", "expected"), [(None, 0.13715657793356364), (MASK, 0.1371292199737123)])
def test_weighted_error_is_the_official_one(mask, expected):
    loss = snr_weighted_mse_loss(WARPED, FIXED, log_variance=LOG_VARIANCE, mask=mask)
    assert loss.tolist() == pytest.approx([expected])


@pytest.mark.parametrize(
    ("mask", "beta", "distribution", "expected"),
    [
        (None, 0.0, "gaussian", -0.013616725283268858),
        (None, 0.0, "laplace", 0.12601308804352535),
        (None, 0.5, "gaussian", 0.04527749648550533),
        (None, 0.5, "laplace", 0.1438932538219677),
        (MASK, 0.0, "gaussian", 0.06274328394131921),
        (MASK, 0.5, "laplace", 0.18056263084440108),
    ],
)
def test_variance_loss_is_the_official_one(mask, beta, distribution, expected):
    loss = collaborative_variance_loss(
        WARPED, FIXED, log_variance=LOG_VARIANCE, beta=beta, distribution=distribution, mask=mask
    )
    assert loss.tolist() == pytest.approx([expected])


def test_warp_is_the_official_one():
    expected = [0, 0.4765625, 0.40625, 0.25, 0.35625, 0.3, 0.3125, 0.5875, 0.425, 0.175, 0.6, 0.046875]
    assert warp(FIXED, FLOW).flatten().tolist() == pytest.approx(expected, abs=1e-6)


def test_warp_moves_by_pixels_in_two_and_three_dimensions():
    flat = uniform(2, 3, 5, 6)
    shift = torch.tensor([1.0, -2.0], dtype=torch.float64).view(1, 2, 1, 1).expand(2, 2, 5, 6)
    assert torch.allclose(warp(flat, shift)[:, :, :4, 2:], flat[:, :, 1:, :4])
    solid = uniform(1, 1, 4, 5, 6)
    shift = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64).view(1, 3, 1, 1, 1).expand(1, 3, 4, 5, 6)
    assert torch.allclose(warp(solid, shift)[:, :, :2, :, :5], solid[:, :, 2:, :, 1:])
    half = torch.zeros(1, 3, 4, 5, 6, dtype=torch.float64)
    half[:, 1] = 0.5
    assert torch.allclose(warp(solid, half)[..., :4, :], (solid[..., :4, :] + solid[..., 1:, :]) / 2)
    assert torch.autograd.gradcheck(lambda d: warp(flat, d), 0.3 + 0.4 * uniform(2, 2, 5, 6, seed=1).requires_grad_())


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_beta_nll_has_the_gradients_it_is_made_for(beta):
    mean, target, log_var = (
        uniform(5).requires_grad_(),
        uniform(5, seed=1),
        (uniform(5, seed=2) * 4 - 2).requires_grad_(),
    )
    loss = beta_nll_loss(mean, target, log_variance=log_var, beta=beta)
    by_mean, by_variance = torch.autograd.grad(loss.sum(), (mean, log_var))
    assert torch.allclose(by_mean, (mean - target) * log_var.exp() ** (beta - 1))
    assert torch.allclose(by_variance, (1 - (mean - target) ** 2 / log_var.exp()) / 2 * log_var.exp() ** beta)
    if beta == 0:
        normal = torch.distributions.Normal(mean, (log_var / 2).exp())
        assert torch.allclose(loss, -normal.log_prob(target) - math.log(2 * math.pi) / 2)


def test_limits_of_the_weights():
    image, log_var = uniform(3, 1, 4, 4), uniform(3, 1, 4, 4, seed=1)
    weights = snr_weight(image, log_var.requires_grad_())
    assert not weights.requires_grad
    low, high = weights.flatten(1).aminmax(dim=1)
    assert torch.allclose(low, torch.full((3,), 0.5).double())
    assert torch.allclose(high, torch.ones(3).double().sigmoid())
    assert torch.equal(snr_weight(image[:1], log_var[:1]), weights[:1])  # whatever else is in the batch
    even = snr_weight(torch.ones(1, 4), torch.zeros(1, 4))
    assert even.tolist() == [[0.5] * 4]
    assert snr_weight(torch.tensor([[-1.0, 0.0, 1.0]]), torch.zeros(1, 3))[0, :2].tolist() == [0.5, 0.5]
    assert snr_weight(torch.rand(1, 5).bfloat16(), torch.full((1, 5), -30.0).bfloat16()).isfinite().all()


def test_who_learns_from_what():
    warped, fixed = WARPED.clone().requires_grad_(), FIXED.clone().requires_grad_()
    log_var = LOG_VARIANCE.clone().requires_grad_()
    collaborative_variance_loss(warped, fixed, log_variance=log_var).sum().backward()
    assert warped.grad is None
    assert fixed.grad is None
    assert log_var.grad.abs().sum() > 0
    log_var.grad = None
    snr_weighted_mse_loss(warped, fixed, log_variance=log_var).sum().backward()
    assert log_var.grad is None
    expected = torch.tensor(WEIGHTS, dtype=torch.float64).view_as(warped) * 2 * (WARPED - FIXED) / 12
    assert torch.allclose(warped.grad, expected)


class Field(nn.Module):
    """A displacement that does not look at the images."""

    def __init__(self, *shape):
        super().__init__()
        self.flow = nn.Parameter(torch.zeros(*shape, dtype=torch.float64))

    def forward(self, images):
        return self.flow.expand(-1, -1, *images.shape[2:])


def registration(**hyper):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HeteroscedasticRegistration(Field(1, 2, 3, 4), nn.Conv2d(2, 1, 3, padding=1).double(), **hyper)


def test_objectives_are_the_losses_on_the_warped_image():
    both = registration(smoothness=0.25, warm_up=2)
    both.displacement.flow.data.copy_(FLOW)
    batch = (WARPED, FIXED)
    moved = warp(WARPED, FLOW)
    log_var = both.variance(torch.cat([moved, FIXED], 1))
    rough = 0.25 * 1.0966254340277777  # the official smoothness of this flow
    plain = both.objective("displacement", batch, step=1)
    assert plain.item() == pytest.approx(((moved - FIXED) ** 2).mean().item() + rough)
    weighted = both.objective("displacement", batch, step=2)
    assert weighted.item() == pytest.approx(snr_weighted_mse_loss(moved, FIXED, log_variance=log_var).item() + rough)
    variance = both.objective("variance", batch, step=2)
    assert variance.item() == pytest.approx(collaborative_variance_loss(moved, FIXED, log_variance=log_var).item())
    for part, expected in zip(both(*batch), (moved, FLOW, log_var)):
        assert torch.equal(part, expected)
    assert [both.turns(k) for k in (0, 1, 2, 3, 4)] == [
        *[("displacement",)] * 2, *[("variance",)] * 2, ("displacement", "variance")
    ]  # fmt: skip


def test_alternation_finds_a_shift_and_a_noisy_corner():
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(16.0).double(), torch.arange(16.0).double(), indexing="ij")
    scene = lambda dx: 2 * torch.exp(-((x + dx - 7) ** 2 + (y - 7) ** 2) / 12)  # noqa: E731
    noise = 0.02 + 0.2 * ((x > 8) & (y > 8))
    moving, fixed = ((scene(dx) + noise * torch.randn(8, 1, 16, 16, generator=g, dtype=torch.float64)) for dx in (0, 1))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        variance = nn.Sequential(nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 1, 5, padding=2)).double()
    model = HeteroscedasticRegistration(Field(8, 2, 1, 1), variance, warm_up=10)
    optimizers = {name: torch.optim.Adam(p.parameters(), lr=0.05) for name, p in model.players().items()}
    for step in range(60):
        means = advance(model, (moving, fixed), optimizers, step=step)
    assert set(means) == {"displacement", "variance"}
    shift = model.displacement.flow.flatten(1).mean(0)
    assert shift.tolist() == pytest.approx([0, 1], abs=0.15)
    log_var = model(moving, fixed)[2]
    assert log_var[..., 10:14, 10:14].mean() > log_var[..., 2:7, 2:7].mean() + 1


def test_refusals_name_the_argument():
    with pytest.raises(ValueError, match=r"target: expected shape \(2,\), got \(3,\)"):
        beta_nll_loss(torch.zeros(2), torch.zeros(3), log_variance=torch.zeros(2))
    with pytest.raises(ValueError, match=r"log_variance: expected shape \(2,\), got \(1,\)"):
        beta_nll_loss(torch.zeros(2), torch.zeros(2), log_variance=torch.zeros(1))
    with pytest.raises(ValueError, match=r"beta: expected a number >= 0 and <= 1, got 2.0"):
        beta_nll_loss(torch.zeros(2), torch.zeros(2), log_variance=torch.zeros(2), beta=2.0)
    with pytest.raises(ValueError, match=r"distribution: expected one of 'gaussian', 'laplace', got 'cauchy'"):
        collaborative_variance_loss(FIXED, WARPED, log_variance=LOG_VARIANCE, distribution="cauchy")
    with pytest.raises(ValueError, match=r"gamma: expected a number > 0, got 0.0"):
        snr_weight(FIXED, LOG_VARIANCE, gamma=0.0)
    with pytest.raises(ValueError, match=r"mask: expected shape \(1, 1, 3, 4\), got \(3, 4\)"):
        snr_weighted_mse_loss(FIXED, WARPED, log_variance=LOG_VARIANCE, mask=MASK[0, 0])
    with pytest.raises(ValueError, match=r"displacement: expected shape \(1, 2, 3, 4\), got \(1, 3, 3, 4\)"):
        warp(FIXED, torch.zeros(1, 3, 3, 4))
    with pytest.raises(ValueError, match=r"image: expected at least 4 dimensions"):
        warp(FIXED[0], FLOW)
    with pytest.raises(ValueError, match=r"smoothness: expected a number >= 0, got -1.0"):
        registration(smoothness=-1.0)
    with pytest.raises(ValueError, match=r"warm_up: expected a whole number"):
        registration(warm_up=1.5)
    with pytest.raises(ValueError, match=r"fixed: expected shape \(1, 1, 3, 4\), got \(1, 1, 4, 3\)"):
        registration()(FIXED, FIXED.mT)
    with pytest.raises(ValueError, match=r"displacement: expected shape \(2, 2, 3, 4\), got \(1, 2, 3, 4\)"):
        registration()(FIXED.expand(2, -1, -1, -1), FIXED.expand(2, -1, -1, -1))
