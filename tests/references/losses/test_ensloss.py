"""EnsLoss against its official code on the same draws, and against scipy's inverse Box-Cox transformation."""

import math

import pytest
import torch
from scipy.special import inv_boxcox

from lossary.criterion import Criterion
from lossary.losses import EnsLoss, inverse_box_cox, random_calibrated_derivatives


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("lam", [-0.8, 1e-9, 0.0, 0.3, 1.0, 2.0])
def test_the_transformation_is_scipys_inverse_box_cox(lam):
    z = torch.linspace(-0.45, 1.2, 30, dtype=torch.float64)
    expected = torch.from_numpy(inv_boxcox(z.numpy(), lam))
    torch.testing.assert_close(inverse_box_cox(z, lam=lam), expected, rtol=1e-12, atol=0)


def test_the_transformation_where_it_is_cut():
    far = torch.tensor([-5.0, 5.0])
    assert inverse_box_cox(far, lam=0.5).tolist() == pytest.approx([0.0, 12.25])
    assert inverse_box_cox(far, lam=-0.5).tolist() == pytest.approx([1 / 12.25, math.inf])


# Gradients times the batch's size, by statmlben/ensLoss, losses.py, under torch.manual_seed(3), which draws the same
# eight numbers.
OFFICIAL = {
    0.0: [-1.000001, 0.8333343, -0.2165348, 1.000001, 1.000001, 0.0636384, 1.000001, -1.000001],
    0.7: [-1.000001, 0.8333343, -0.1793678, 1.000001, 1.000001, 0.0027198, 1.000001, -1.000001],
    -0.5: [-1.000001, 0.8333343, -0.2342094, 1.000001, 1.000001, 0.0881442, 1.000001, -1.000001],
}


@pytest.mark.parametrize("lam", OFFICIAL)
def test_gradient_and_value_are_the_official_codes(lam):
    logit = torch.tensor([0.3, -1.2, 2.5, 0.9, -0.1, -4.0, 1.4, 0.0], requires_grad=True)
    target = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0])
    value = EnsLoss(generator=seeded(3), lam=lam)(logit, target)
    value.sum().backward()
    assert logit.grad.tolist() == pytest.approx(OFFICIAL[lam], abs=1e-6)
    assert value.mean().item() == pytest.approx({0.0: 0.0130137, 0.7: 0.0550877, -0.5: -0.0047625}[lam], abs=1e-6)


def test_half_the_slopes_are_those_of_the_hinge_loss():
    """-1 where exp(e) > 1, and on average -(1/2 + E[exp(e); e < 0]) = -(1/2 + sqrt(e) Phi(-1)) in all."""
    slopes = random_calibrated_derivatives(torch.zeros(200_000), generator=seeded(0))
    share = 0.5 * math.erfc(1 / math.sqrt(2))
    assert (slopes < -1).double().mean().item() == pytest.approx(0.5, abs=0.004)
    assert slopes.double().mean().item() == pytest.approx(-0.5 - math.sqrt(math.e) * share, abs=0.003)


def test_beyond_one_the_slope_falls_off_as_the_inverse_of_the_margin():
    near, far = (random_calibrated_derivatives(m * torch.ones(1), generator=seeded(1)) for m in (1.0, 50.0))
    assert (near.item() + 1e-6) / (far.item() + 1e-6) == pytest.approx(50, rel=1e-2)


def test_a_batch_of_any_shape_is_one_batch_and_in_a_network_the_loss_learns():
    margin = torch.randn(4, 3, generator=seeded(5))
    flat = random_calibrated_derivatives(margin.flatten(), generator=seeded(1))
    assert torch.equal(random_calibrated_derivatives(margin, generator=seeded(1)).flatten(), flat)

    x = torch.randn(64, 2, generator=seeded(2))
    target, weight = (x @ torch.tensor([1.0, -2.0]) > 0).float(), torch.zeros(2, requires_grad=True)
    criterion = Criterion(EnsLoss(generator=seeded(3)), class_dim=None)
    for _ in range(100):
        (slope,) = torch.autograd.grad(criterion(x @ weight, target), weight)
        weight = (weight - 0.3 * slope).detach().requires_grad_()
    assert ((x @ weight > 0) == target.bool()).float().mean() > 0.95


def test_each_call_draws_anew_from_its_own_generator_alone():
    logit, target = torch.linspace(-1, 1, 8), torch.ones(8)
    state = torch.random.get_rng_state()
    loss = EnsLoss(generator=seeded(0))
    first, second = loss(logit, target), loss(logit, target)
    assert not torch.equal(first, second)
    assert torch.equal(EnsLoss(generator=seeded(0))(logit, target), first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert loss(logit.double(), target.double()).dtype == torch.float64
    assert loss(logit.bfloat16(), target.bfloat16()).isfinite().all()
    assert loss(logit[:0], target[:0]).shape == (0,)


@pytest.mark.parametrize(
    ("logit", "target", "lam", "message"),
    [
        (torch.zeros(2, dtype=torch.int64), torch.zeros(2), 0.0, "logit: expected a floating-point tensor"),
        (torch.zeros(2), torch.zeros(3), 0.0, r"target: expected shape \(2,\), got \(3,\)"),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int64), 0.0, "target: expected a floating-point tensor"),
        (torch.zeros(2), torch.zeros(2), math.nan, "lam: expected a finite number, got nan"),
        (torch.zeros(2), torch.zeros(2), torch.tensor(0.0), "lam: expected a number, got a tensor"),
    ],
)
def test_refusals(logit, target, lam, message):
    with pytest.raises(ValueError, match=message):
        EnsLoss(generator=seeded(0), lam=lam)(logit, target)
