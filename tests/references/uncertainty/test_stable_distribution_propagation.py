"""Propagation against torch's own Jacobians, closed forms, quadrature and a million samples."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch import nn

from lossary.uncertainty import CauchySDP, GaussianSDP, propagate_distribution


def network(seed=0, *, activation=nn.ReLU, dtype=torch.float64):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 7), activation(), nn.Linear(7, 6), activation(), nn.Linear(6, 3)).to(dtype)


def pixels(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        made = nn.Sequential(
            *(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
            *(nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)),
        ).double()
        made[1].running_mean.uniform_(-1, 1)
        made[1].running_var.uniform_(0.5, 2)
    return made.eval()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh, nn.GELU])
def test_gaussian_is_j_s_jt(activation):
    model, x = network(activation=activation), normal(5, 4)
    root = normal(5, 4, 4, seed=1)
    mean, covariance = GaussianSDP(model)(x, covariance=root @ root.mT)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(model, x[i])
        assert torch.allclose(covariance[i], jacobian @ root[i] @ root[i].T @ jacobian.T)
    assert torch.equal(mean, model(x))
    std = normal(5, 4, seed=2).abs()
    diagonal = GaussianSDP(model)(x, covariance=torch.diag_embed(std**2))[1]
    assert torch.allclose(GaussianSDP(model)(x, std)[1], diagonal)
    location, scale = propagate_distribution(model, x, std)
    assert torch.equal(location, mean)
    assert torch.allclose(scale, diagonal.diagonal(dim1=1, dim2=2).sqrt())


def test_images_and_numbers():
    model, x = pixels(), normal(3, 2, 6, 6)
    mean, covariance = GaussianSDP(model)(x, 0.3)
    jacobian = torch.autograd.functional.jacobian(lambda row: model(row[None])[0], x[1]).flatten(1)
    assert torch.allclose(mean, model(x))
    assert torch.allclose(covariance[1], 0.09 * jacobian @ jacobian.T)
    assert torch.allclose(CauchySDP(model)(x, 0.3)[1][1], 0.3 * jacobian.abs().sum(1))


def test_affine_networks_are_exact():
    """Sums of independent Cauchy variables have the sum of their scales, quantiles of samples agree."""
    model, x = nn.Linear(3, 2).double(), normal(1, 3)
    scale = torch.tensor([[0.5, 1.0, 2.0]], dtype=torch.float64)
    location, got = CauchySDP(model)(x, scale)
    assert torch.allclose(got, scale @ model.weight.abs().T)
    assert torch.allclose(
        propagate_distribution(nn.Sequential(model), x, scale, family="cauchy", method="marginal")[1], got
    )
    noise = torch.from_numpy(np.random.default_rng(0).standard_cauchy((200_000, 3)))
    with torch.no_grad():
        quartiles = model(x + noise * scale).quantile(torch.tensor([0.25, 0.75], dtype=torch.float64), dim=0)
    expected = torch.cat([location - got, location + got])
    assert torch.allclose(quartiles, expected, atol=0.03)
    gaussian = propagate_distribution(nn.Sequential(model), x, scale, method="marginal")[1]
    assert torch.allclose(gaussian, (scale.square() @ model.weight.square().T).sqrt())


@pytest.mark.parametrize("family", ["gaussian", "cauchy"])
def test_layer_by_layer_by_hand(family):
    model, x = network(activation=nn.Tanh), normal(5, 4)
    location, scale = propagate_distribution(model, x, 0.2, family=family, method="marginal")
    power = 2 if family == "gaussian" else 1
    spread, z = torch.full((5, 4), 0.2, dtype=torch.float64) ** power, x
    for linear in (model[0], model[2], model[4]):
        z, spread = linear(z), spread @ (linear.weight.abs() ** power).T
        if linear is not model[4]:
            z, spread = z.tanh(), spread * (1 - z.tanh() ** 2) ** power
    assert torch.allclose(location, model(x))
    assert torch.allclose(scale, spread ** (1 / power))


def test_layer_by_layer_agrees_where_nothing_is_shared():
    """One input for each unit: there are no correlations to lose, through every kind of layer."""
    model = (
        nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MaxPool2d(2), nn.Softplus(), nn.Flatten())
        .double()
        .eval()
    )
    nn.init.constant_(model[1].weight, -2.0)
    x, std = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1).abs()
    for family in ("gaussian", "cauchy"):
        whole = propagate_distribution(model, x, std, family=family)
        marginal = propagate_distribution(nn.Sequential(model), x, std, family=family, method="marginal")
        assert all(torch.allclose(a, b) for a, b in zip(whole, marginal))
    assert propagate_distribution(pixels(), normal(3, 2, 6, 6), 0.3, method="marginal")[1].shape == (3, 3)


def test_moments_of_a_rectified_gaussian_by_quadrature():
    mean = torch.tensor([[-3.0, -0.5, 0.0, 0.7, 2.0, 40.0]], dtype=torch.float64)
    got = propagate_distribution(nn.Sequential(nn.ReLU()), mean, 0.8, method="moments")
    for i, m in enumerate(mean[0].tolist()):
        first, second = (
            integrate.quad(lambda x, k=k, m=m: x**k * stats.norm.pdf(x, m, 0.8), max(0, m - 10), m + 10)[0]
            for k in (1, 2)
        )
        assert got[0][0, i].item() == pytest.approx(first, rel=1e-7)
        assert got[1][0, i].item() == pytest.approx(math.sqrt(second - first**2), rel=1e-5)
    big = propagate_distribution(nn.Sequential(nn.ReLU()), torch.tensor([[1e4, -1e4, 0.0]]), 0.5, method="moments")
    assert big[1].tolist() == [
        [0.5, 0.0, pytest.approx(0.5 * math.sqrt(0.5 - 0.5 / math.pi))]
    ]  # float32 does not cancel
    x = torch.tensor([[1.0, -1.0]])
    fixed = propagate_distribution(nn.Sequential(nn.ReLU()), x, 0.0, method="moments")
    assert [part.tolist() for part in fixed] == [[[1, 0]], [[0, 0]]]
    cut = propagate_distribution(nn.ReLU(inplace=True), x, 0.5, method="marginal")
    assert [part.tolist() for part in (*cut, x)] == [[[1, 0]], [[0.5, 0]], [[1, -1]]]


def total_variation(m, s, mean, std):
    """Between max(X, 0), X ~ N(m, s), and N(mean, std): the atom at 0, or half the distance of densities above 0."""
    atom = stats.norm.cdf(-m / s)
    if std == 0:
        return 1 - atom if mean == 0 else 1.0
    inside = integrate.quad(
        lambda x: abs(stats.norm.pdf(x, m, s) - stats.norm.pdf(x, mean, std)),
        0,
        max(m + 10 * s, mean + 10 * std),
        limit=200,
    )[0]
    return (atom + stats.norm.cdf(-mean / std) + inside) / 2


@pytest.mark.parametrize(("m", "s"), [(1.0, 0.7), (0.2, 1.0), (-0.3, 1.0), (-2.0, 0.5)])
def test_no_gaussian_is_closer_to_a_rectified_one(m, s):
    model, x = nn.Sequential(nn.ReLU()), torch.tensor([[m]], dtype=torch.float64)
    mean, std = (part.item() for part in propagate_distribution(model, x, s))
    ours = total_variation(m, s, mean, std)
    assert ours == pytest.approx(stats.norm.cdf(-abs(m) / s), abs=1e-7)
    matched = [part.item() for part in propagate_distribution(model, x, s, method="moments")]
    assert total_variation(m, s, *matched) > ours
    for other in np.random.default_rng(0).normal([mean, 0], [0.3, 0.5], (6, 2)):
        assert total_variation(m, s, other[0], abs(std + other[1])) >= ours - 1e-7


def test_small_noise_is_what_samples_show():
    model, x = network(3), normal(2, 4, seed=4)
    mean, covariance = GaussianSDP(model)(x, 1e-3)
    with torch.no_grad():
        samples = model(x[1] + 1e-3 * normal(100_000, 4, seed=5))
    assert torch.allclose(samples.T.cov(), covariance[1], rtol=0.03, atol=1e-9)
    assert torch.allclose(samples.mean(0), mean[1], atol=1e-5)


def test_pairwise_probabilities_are_shares_of_samples():
    model, x = nn.Linear(4, 3).double(), normal(2, 4)
    noise = normal(200_000, 4, seed=1)
    with torch.no_grad():
        samples = model(x[1] + 0.7 * noise)
        p = GaussianSDP(model).pairwise_probabilities(x, 0.7)
        heavy = torch.from_numpy(np.random.default_rng(0).standard_cauchy((200_000, 4)))
        others = model(x[1] + 0.7 * heavy)
        q = CauchySDP(model).pairwise_probabilities(x, 0.7)
    for drawn, got in ((samples, p), (others, q)):
        shares = (drawn.unsqueeze(-1) > drawn.unsqueeze(-2)).double().mean(0).fill_diagonal_(0.5)
        assert torch.allclose(got[1], shares, atol=0.006)
        assert torch.allclose(got + got.mT, torch.ones_like(got))
    covariance = torch.diag_embed(torch.full((2, 4), 0.49, dtype=torch.float64))
    assert torch.allclose(GaussianSDP(model).pairwise_probabilities(x, covariance=covariance), p)
    sure = GaussianSDP(model).pairwise_probabilities(x, 0.0)[1]
    z = model(x)[1]
    assert torch.equal(sure, (z.unsqueeze(1) > z).double().fill_diagonal_(0.5))


def test_a_network_can_be_trained_through_it():
    model, x = network(activation=nn.Tanh), normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: GaussianSDP(model)(x, 0.3), x)
    assert torch.autograd.gradcheck(lambda x: CauchySDP(model)(x, 0.3), x)
    for method in ("sdp", "marginal"):
        assert torch.autograd.gradcheck(lambda x, m=method: propagate_distribution(model, x, 0.3, method=m), x)
    assert torch.autograd.gradcheck(lambda x: GaussianSDP(model).pairwise_probabilities(x, 0.3), x)
    sdp = GaussianSDP(model)
    before = copy.deepcopy(sdp.state_dict())
    optimizer = torch.optim.Adam(sdp.parameters(), lr=0.01)
    y, losses = torch.tensor([0, 1, 2]), []
    for _ in range(30):
        optimizer.zero_grad()
        chance = sdp.pairwise_probabilities(x.detach(), 0.3)[torch.arange(3), y]
        loss = -chance.log().sum(-1).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    sdp.load_state_dict(before)
    with torch.no_grad():
        assert not any(part.requires_grad for part in sdp(x.detach(), 0.3))
    dead = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
    nn.init.constant_(dead[0].weight, 1.0), nn.init.constant_(dead[0].bias, -5.0)
    for method in ("sdp", "marginal", "moments"):
        z = torch.tensor([[1.0]], requires_grad=True)
        sum(propagate_distribution(dead, z, 0.01, method=method)).sum().backward()
        assert z.grad.isfinite().all()


def test_dtypes_follow():
    for dtype in (torch.float32, torch.bfloat16):
        mean, covariance = GaussianSDP(network(dtype=dtype))(normal(2, 4).to(dtype), 0.1)
        assert (mean.dtype, covariance.dtype) == (dtype, dtype)
        assert covariance.isfinite().all()


def test_refusals_name_the_argument():
    model, x = network(), normal(5, 4)
    with pytest.raises(ValueError, match=r"std: expected it or covariance, got neither"):
        GaussianSDP(model)(x)
    with pytest.raises(ValueError, match=r"std: expected it or covariance, got both"):
        GaussianSDP(model)(x, 1.0, covariance=torch.eye(4).expand(5, 4, 4))
    with pytest.raises(ValueError, match=r"covariance: expected shape \(5, 4, 4\), got \(4, 4\)"):
        GaussianSDP(model)(x, covariance=torch.eye(4))
    with pytest.raises(ValueError, match=r"std: expected shape \(5, 4\), got \(4,\)"):
        GaussianSDP(model)(x, torch.ones(4))
    with pytest.raises(ValueError, match=r"scale: expected a number >= 0, got -1.0"):
        CauchySDP(model)(x, -1.0)
    with pytest.raises(ValueError, match=r"location: expected at least 2 dimensions"):
        GaussianSDP(model)(x[0], 1.0)
    with pytest.raises(ValueError, match=r"family: expected one of 'gaussian', 'cauchy', got 'levy'"):
        propagate_distribution(model, x, 1.0, family="levy")
    with pytest.raises(ValueError, match=r"method: expected one of 'sdp', 'marginal', 'moments', got 'mc'"):
        propagate_distribution(model, x, 1.0, method="mc")
    with pytest.raises(ValueError, match=r"method: 'moments' is for family 'gaussian'"):
        propagate_distribution(model, x, 1.0, family="cauchy", method="moments")
    with pytest.raises(ValueError, match=r"model: method 'moments' has rules for .* got a layer Tanh"):
        propagate_distribution(network(activation=nn.Tanh), x, 1.0, method="moments")
    with pytest.raises(ValueError, match=r"model: method 'marginal' has rules for .* got a layer LayerNorm"):
        propagate_distribution(nn.LayerNorm(4).double(), x, 1.0, method="marginal")
    with pytest.raises(ValueError, match=r"model: expected BatchNorm1d in evaluation mode"):
        propagate_distribution(nn.BatchNorm1d(4).double(), x, 1.0, method="marginal")
