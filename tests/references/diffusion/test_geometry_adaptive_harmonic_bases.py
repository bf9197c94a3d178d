"""Geometry-adaptive bases, against posterior covariances of mixtures, finite differences and torch's batch norm."""

import pytest
import torch
from torch import nn

from lossary.diffusion import BiasFreeConv2d, denoiser_jacobian_basis, score_convergence_test
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import euler, karras_sigmas, sde


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture() -> Mixture:
    means = torch.tensor([[1.0, -2.0, 0.5], [-1.0, 0.5, 2.0]], dtype=torch.float64)
    return Mixture(means, torch.tensor([0.5, 1.2], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64))


def test_the_basis_is_that_of_the_posterior_covariance():
    """Cov[x | y] = sigma^2 J, here by the law of total variance over the components."""
    truth, sigma = mixture(), 0.8
    y = 1.5 * torch.randn(6, 3, generator=rng(), dtype=torch.float64)
    basis = denoiser_jacobian_basis(truth.denoise, y, sigma)
    within = 1 / (1 / truth.scales**2 + 1 / sigma**2)  # (K,)
    centre = within[:, None] * (truth.means / truth.scales[:, None] ** 2 + y[:, None] / sigma**2)
    share = truth.responsibilities(y, sigma)
    off = centre - (share[..., None] * centre).sum(1, keepdim=True)
    covariance = torch.einsum("bk,bki,bkj->bij", share, off, off)
    covariance = covariance + (share @ within)[:, None, None] * torch.eye(3, dtype=torch.float64)
    rebuilt = (basis.vectors * basis.values.unsqueeze(1)) @ basis.vectors.mT
    torch.testing.assert_close(sigma**2 * rebuilt, covariance)
    torch.testing.assert_close(basis.expected_error, covariance.diagonal(dim1=1, dim2=2).sum(1))
    torch.testing.assert_close(basis.dimension, basis.expected_error / 0.64)
    assert basis.asymmetry.max() < 1e-12
    assert (basis.values.diff(dim=1) <= 0).all()
    assert basis.net_bias.abs().max() > 0.1  # a mixture's mean is not homogeneous
    each = torch.full((6,), sigma, dtype=torch.float64)
    torch.testing.assert_close(denoiser_jacobian_basis(truth.denoise, y, each).values, basis.values)


def test_the_expected_error_is_met_by_samples():
    truth, sigma = mixture(), 0.8
    x, _ = truth.sample(4000, generator=rng())
    y = x + sigma * torch.randn(x.shape, generator=rng(1), dtype=x.dtype)
    error = (x - truth.denoise(y, sigma)).square().sum(1).mean()
    assert denoiser_jacobian_basis(truth.denoise, y, sigma).expected_error.mean().item() == pytest.approx(
        error.item(), rel=0.04
    )


def test_a_linear_denoiser_whose_matrix_is_not_symmetric():
    matrix = torch.tensor([[0.9, 0.4], [0.0, 0.3]], dtype=torch.float64)
    y = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    basis = denoiser_jacobian_basis(lambda x, s: x @ matrix.T + 0.25, y, 1.0)
    # eigenvalues 0.6 +- sqrt(0.3^2 + 0.2^2) of [[0.9, 0.2], [0.2, 0.3]]
    assert basis.values[0].tolist() == pytest.approx([0.6 + 0.13**0.5, 0.6 - 0.13**0.5])
    assert basis.asymmetry.item() == pytest.approx((2 * 0.4**2) ** 0.5 / (2 * (0.81 + 0.16 + 0.09) ** 0.5))
    torch.testing.assert_close(basis.net_bias, torch.full_like(y, 0.25))


def network(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    layers = [BiasFreeConv2d(1, 6), nn.ReLU(), BiasFreeConv2d(6, 6), nn.ReLU(), BiasFreeConv2d(6, 1, norm=False)]
    if bias:
        layers.insert(3, nn.BatchNorm2d(6))
    net = nn.Sequential(*layers).double()
    with torch.no_grad():
        net[0].gamma.uniform_(0.5, 2.0)
        for _ in range(3):
            net(torch.randn(8, 1, 5, 5, dtype=torch.float64))
    return net.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_without_constants_the_network_is_its_jacobian(bias):
    net = network(bias)
    y = torch.randn(2, 1, 5, 5, generator=rng(), dtype=torch.float64)
    basis = denoiser_jacobian_basis(lambda x, s: x - net(x), y, 0.5)
    assert basis.vectors.shape == (2, 25, 25)
    assert basis.net_bias.shape == y.shape
    if bias:
        assert basis.net_bias.abs().max() > 1e-3
    else:
        torch.testing.assert_close(basis.net_bias, torch.zeros_like(y), atol=1e-12, rtol=0)
        torch.testing.assert_close(net(7 * y), 7 * net(y))
        numeric = []
        for i in range(25):
            step = torch.zeros(25, dtype=torch.float64)
            step[i] = 1e-6
            step = step.view(1, 5, 5)
            numeric.append(((y - net(y + step) - (y - net(y - step))) / 2e-6 + 1.0 * step / 1e-6).flatten(1))
        trace = torch.stack([column[:, i] for i, column in enumerate(numeric)]).sum(0)
        torch.testing.assert_close(basis.dimension, trace, atol=1e-6, rtol=1e-6)


def test_the_norm_is_a_batch_norm_that_takes_no_mean():
    """Of channels whose mean is 0, torch's own agrees; in eval mode both use what they gathered."""
    conv = BiasFreeConv2d(2, 3, 1, momentum=0.3).double()
    torch.nn.init.uniform_(conv.gamma, 0.5, 2.0)
    peer = nn.BatchNorm2d(3, affine=False).double()
    x = torch.randn(4, 2, 6, 6, generator=rng(), dtype=torch.float64)
    x = x - x.mean((0, 2, 3), keepdim=True)
    plain = nn.functional.conv2d(x, conv.weight)
    gamma = conv.gamma.view(-1, 1, 1)
    torch.testing.assert_close(conv(x), gamma * peer(plain))
    sd = (plain.var((0, 2, 3), unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(conv.running_sd, 0.7 + 0.3 * sd)
    shifted = x + 3.0
    expected = gamma * nn.functional.conv2d(shifted, conv.weight) / (0.7 + 0.3 * sd).view(-1, 1, 1)
    torch.testing.assert_close(conv.eval()(shifted), expected)
    assert set(conv.state_dict()) == {"weight", "gamma", "running_sd"}
    assert set(BiasFreeConv2d(2, 3, norm=False).state_dict()) == {"weight"}


def test_the_norm_under_autocast_and_in_half_precision():
    conv, twin = BiasFreeConv2d(2, 3, momentum=0.3), BiasFreeConv2d(2, 3, momentum=0.3)
    twin.load_state_dict(conv.state_dict())
    x = torch.randn(4, 2, 6, 6, generator=rng())
    with torch.autocast("cpu", torch.bfloat16):
        found = conv(x)
        found.float().square().sum().backward()
    assert found.dtype is torch.bfloat16
    assert conv.weight.grad.isfinite().all()
    torch.testing.assert_close(found.float(), twin(x), atol=0.03, rtol=0.03)
    assert conv.running_sd.dtype is torch.float32
    torch.testing.assert_close(conv.running_sd, twin.running_sd, atol=0.003, rtol=0)


def test_half_precision_zeros_and_chunks():
    matrix = torch.tensor([[0.5, 0.25], [0.25, 0.5]], dtype=torch.bfloat16)
    y = torch.tensor([[1.0, 2.0], [0.0, 4.0]], dtype=torch.bfloat16)
    basis = denoiser_jacobian_basis(lambda x, s: x @ matrix, y, 2.0)
    assert basis.values.dtype is torch.float32
    torch.testing.assert_close(basis.values, torch.tensor([[0.75, 0.25]] * 2))
    assert basis.expected_error.tolist() == [4.0, 4.0]
    assert basis.net_bias.abs().max() == 0
    nothing = denoiser_jacobian_basis(lambda x, s: 0 * x, y.float(), 2.0)
    assert nothing.asymmetry.tolist() == [0.0, 0.0]
    x, calls = torch.randn(2, 1, 5, 5, generator=rng(), dtype=torch.float64), []

    class Square(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x):
            return x.square()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, slope):
            calls.append(1)
            (x,) = ctx.saved_tensors
            return 2 * x * slope

    found = denoiser_jacobian_basis(lambda x, s: Square.apply(x), x, 1.0, chunk_size=10)
    assert len(calls) == 3  # 25 in tens
    torch.testing.assert_close(found.values, 2 * x.flatten(1).sort(descending=True).values)


def test_one_density_gives_one_sample_and_copies_are_found():
    """Two exact denoisers of the same mixture agree to the last digit; of single points, each returns its point."""
    truth, g = mixture(), rng(3)
    start, sigmas = 10 * torch.randn(50, 3, generator=rng(), dtype=torch.float64), karras_sigmas(30, high=10.0)
    pools = (truth.sample(5, generator=rng(1))[0], truth.sample(7, generator=rng(2))[0])
    found = score_convergence_test(truth.denoise, truth.denoise, start, sigmas, pools=pools, generator=g)
    torch.testing.assert_close(found.between, torch.ones(50, dtype=torch.float64))
    for sample, pool, cosine in zip(found.samples, pools, found.nearest):
        expected = torch.cosine_similarity(sample[:, None], pool, dim=-1).amax(1)
        torch.testing.assert_close(cosine, expected)
    state = g.get_state()
    score_convergence_test(truth.denoise, truth.denoise, start, sigmas, pools=pools, generator=rng(3), sampler=sde)
    again = rng(3)
    sde(truth.denoise, start, sigmas, generator=again)
    torch.testing.assert_close(state, again.get_state())  # as many numbers as in one run

    points = [Mixture(mean[None], 0.0) for mean in truth.means]
    copies = score_convergence_test(
        points[0].denoise,
        points[1].denoise,
        start,
        sigmas,
        pools=(truth.means, truth.means[1:]),
        generator=g,
        sampler=euler,
    )
    cosine = torch.cosine_similarity(truth.means[0], truth.means[1], dim=0)
    torch.testing.assert_close(copies.between, cosine.expand(50))
    for nearest in copies.nearest:
        torch.testing.assert_close(nearest, torch.ones_like(nearest))


def test_refusals():
    truth = mixture()
    x, sigmas = torch.zeros(2, 3), torch.tensor([1.0, 0.0])
    for call, message in (
        (lambda: denoiser_jacobian_basis(truth.denoise, x[0], 1.0), "y: expected at least 2 dimensions"),
        (lambda: denoiser_jacobian_basis(truth.denoise, x, torch.ones(3)), "sigma: expected shape"),
        (
            lambda: score_convergence_test(None, None, x, sigmas, pools=(x, x[:, :2]), generator=rng()),
            r"pools: expected \(N, 3\)",
        ),
        (lambda: denoiser_jacobian_basis(truth.denoise, x, 1.0, chunk_size=0), "chunk_size: expected a whole number"),
        (lambda: BiasFreeConv2d(1, 1, 2), "kernel_size: expected an odd number"),
        (lambda: BiasFreeConv2d(1, 0), "out_channels: expected a whole number"),
        (lambda: BiasFreeConv2d(1, 1, momentum=1.5), "momentum: expected a number"),
        (lambda: BiasFreeConv2d(2, 1)(torch.zeros(1, 1, 3, 3)), "input: expected 2 channels"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
