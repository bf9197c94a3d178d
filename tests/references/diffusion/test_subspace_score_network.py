"""Subspace score network, against the exact score of a mixture on a plane, taken in the full space."""

import math

import pytest
import torch

from lossary.diffusion import SubspaceScoreNet, subspace_distance
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import cosine, variance_preserving


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def plane(dimension: int = 7) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(dimension, 2, generator=rng(), dtype=torch.float64)).Q


@pytest.mark.parametrize("process", [cosine(), variance_preserving(1.0, 1.0)])
def test_with_a_perfect_inner_network_it_is_the_score(process):
    """By automatic differentiation of the log-density in 7 dimensions, whose covariance is singular plus noise."""
    a, inside = plane(), ring(3, radius=1.5, scale=0.4)
    t = torch.linspace(0.1, 0.9, 5, dtype=torch.float64)
    alpha, sigma = process.alpha(t), process.sigma(t)
    x = torch.randn(5, 7, generator=rng(1), dtype=torch.float64).requires_grad_()
    densities = []
    for i in range(5):
        covariance = alpha[i] ** 2 * 0.4**2 * a @ a.T + sigma[i] ** 2 * torch.eye(7, dtype=torch.float64)
        parts = [
            torch.distributions.MultivariateNormal(alpha[i] * a @ mean, covariance).log_prob(x[i])
            for mean in inside.means
        ]
        densities.append(torch.stack(parts).logsumexp(0))
    (score,) = torch.autograd.grad(torch.stack(densities).sum(), x)

    def perfect(z, times):
        scale = process.alpha(times)[:, None]
        return scale * inside.denoise(z / scale, process.ratio(times))

    turned = a @ torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    net = SubspaceScoreNet(lambda z, times: perfect(z @ q, times) @ q.mT, 2 * turned, process)
    q = (a.T @ net.basis).detach().T  # the basis may turn within the plane
    torch.testing.assert_close(net(x.detach(), t).detach(), score)


def test_across_the_plane_it_pulls_by_one_over_h():
    """h(t) = 1 - exp(-t) under dX = -X / 2 dt + dW: variance_preserving with beta 1."""
    a = plane()
    net = SubspaceScoreNet(
        lambda z, t: torch.randn(z.shape, dtype=z.dtype, generator=rng()), a, variance_preserving(1, 1)
    )
    x = torch.randn(4, 7, generator=rng(2), dtype=torch.float64)
    off = x - x @ a @ a.T
    t = torch.tensor([0.01, 0.1, 0.5, 1.0], dtype=torch.float64)
    score = net(x, t).detach()
    torch.testing.assert_close(score - score @ a @ a.T, -off / (1 - (-t).exp())[:, None])


def test_as_a_denoiser_it_stays_in_the_plane_and_learns_it():
    a = plane()
    start = torch.randn(7, 2, generator=rng(3), dtype=torch.float64)
    net = SubspaceScoreNet(lambda z, t: z, start, cosine())  # the identity does at little noise
    denoise = Denoiser(net, cosine(), "score")
    data = torch.randn(500, 2, generator=rng(4), dtype=torch.float64) @ a.T
    noise = torch.randn(data.shape, generator=rng(5), dtype=torch.float64)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (denoise(data + 0.1 * noise, 0.1) - data).square().mean().backward()
        optimizer.step()
    assert subspace_distance(net.basis, a).item() < 1e-3  # PCA would do as well
    found = denoise(data, 0.1).detach()
    v = net.basis.detach()
    torch.testing.assert_close(found @ v @ v.T, found)


def test_replicas_and_half_precision():
    stack = torch.randn(3, 7, 2, generator=rng())
    net = SubspaceScoreNet(lambda z, t: z.sin(), stack, cosine())
    x, t = torch.randn(3, 5, 7, generator=rng(1)), torch.rand(3, 5, generator=rng(2)) + 0.1
    each = [SubspaceScoreNet(lambda z, t: z.sin(), b, cosine())(*xt) for b, *xt in zip(stack, x, t)]
    torch.testing.assert_close(net(x, t), torch.stack(each))
    assert net.bfloat16()(x.bfloat16(), t.bfloat16()).dtype == torch.bfloat16
    assert set(net.state_dict()) == {"free"}


def test_the_distance_of_planes():
    angle = 0.3
    a = torch.eye(4, 2, dtype=torch.float64)
    b = torch.zeros(4, 2, dtype=torch.float64)
    b[0, 0], b[1, 1], b[2, 1] = 1.0, math.cos(angle), math.sin(angle)
    expected = 2 * math.sin(angle) ** 2
    assert subspace_distance(a, b).item() == pytest.approx(expected)
    brute = (a @ a.T - b @ b.T).square().sum().item()
    assert brute == pytest.approx(expected)
    assert subspace_distance(a, a @ torch.tensor([[2.0, 1.0], [0.0, -1.0]]).double()).item() == pytest.approx(
        0, abs=1e-20
    )
    assert subspace_distance(a, torch.eye(4, dtype=torch.float64)[:, 2:]).item() == pytest.approx(4.0)


def test_refusals():
    with pytest.raises(ValueError, match=r"basis: expected \(\*replicas, D, d\) with d <= D"):
        SubspaceScoreNet(torch.nn.Identity(), torch.zeros(2, 3), cosine())
    with pytest.raises(ValueError, match="true: expected shape"):
        subspace_distance(torch.zeros(3, 2), torch.zeros(3, 1))
