"""The engine of second-order regression, against scipy's densities, torch's divergences and sampled expectations."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Gamma, MultivariateNormal, Normal, Wishart, kl_divergence

from lossary.uncertainty._normal_wishart import NormalWishart, nig_nll


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def one(mean, w, kappa, nu) -> NormalWishart:
    return NormalWishart(
        double(mean), double(w).sqrt().view(1, 1), torch.tensor(kappa).double(), torch.tensor(nu).double()
    )


@pytest.mark.parametrize("alpha", [1.01, 3.0, 40.0, 1e6])
@pytest.mark.parametrize("y", [-2.0, 0.5, 30.0])
def test_the_predictive_density_is_students(alpha, y):
    gamma, upsilon, beta = 0.5, 0.3, 2.0
    scale = math.sqrt(beta * (1 + upsilon) / (upsilon * alpha))
    expected = -stats.t(2 * alpha, gamma, scale).logpdf(y)
    got = nig_nll(*double(gamma, upsilon, alpha, beta, y)).item()
    assert got == pytest.approx(expected, rel=1e-8)
    assert nig_nll(*double(gamma, upsilon, alpha, beta, y).float()).item() == pytest.approx(expected, rel=1e-5)


def test_in_one_dimension_it_is_a_gamma_and_a_normal_distribution():
    p, q = one(0.3, 0.4, 2.0, 5.0), one(-0.5, 0.25, 0.7, 3.5)

    def gamma(d):
        return Gamma(d.nu / 2, 1 / (2 * d.factor[0, 0] ** 2))

    precision = p.nu * p.factor[0, 0] ** 2  # the divergence of the normals is linear in the precision
    normal = kl_divergence(
        Normal(p.mean[0], (p.kappa * precision) ** -0.5), Normal(q.mean[0], (q.kappa * precision) ** -0.5)
    )
    assert p.kl(q).item() == pytest.approx((kl_divergence(gamma(p), gamma(q)) + normal).item(), rel=1e-12)
    assert p.kl(p).item() == pytest.approx(0.0, abs=1e-12)
    assert p.covariance.item() == pytest.approx(1 / (0.4 * (5 - 2)))  # beta / (alpha - 1)


def three() -> tuple[NormalWishart, NormalWishart]:
    rng = np.random.default_rng(0)
    found = []
    for kappa, nu in ((2.0, 7.5), (0.6, 6.2)):
        half = 0.15 * rng.standard_normal((3, 3)) + np.eye(3)
        factor = np.linalg.cholesky(half @ half.T)
        found.append(
            NormalWishart(
                torch.from_numpy(rng.standard_normal(3)), torch.from_numpy(factor), *double(kappa, nu).unbind()
            )
        )
    return found[0], found[1]


def sampled(d: NormalWishart, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Precisions, by Bartlett's decomposition, and means."""
    rng = np.random.default_rng(1)
    bartlett = np.tril(rng.standard_normal((n, 3, 3)), -1)
    for i in range(3):
        bartlett[:, i, i] = np.sqrt(rng.chisquare(d.nu.item() - i, n))
    half = d.factor @ torch.from_numpy(bartlett)
    precision = half @ half.mT
    noise = torch.linalg.solve_triangular(half.mT, torch.from_numpy(rng.standard_normal((n, 3, 1))), upper=True)
    return precision, d.mean + noise.squeeze(-1) / d.kappa.sqrt()


def log_density(d: NormalWishart, precision: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    normal = MultivariateNormal(d.mean, precision_matrix=d.kappa * precision)
    return normal.log_prob(mean) + Wishart(df=d.nu, scale_tril=d.factor).log_prob(precision)


def test_in_three_dimensions_expectations_are_those_of_samples():
    p, q = three()
    assert [d.kl(d).item() for d in (p, q)] == pytest.approx([0.0, 0.0], abs=1e-12)
    precision, mean = sampled(p, 40_000)
    ratio = log_density(p, precision, mean) - log_density(q, precision, mean)
    assert p.kl(q).item() == pytest.approx(ratio.mean().item(), abs=4 * ratio.std().item() / 200)
    y = double(0.2, -1.0, 0.4)
    nll = -MultivariateNormal(mean, precision_matrix=precision).log_prob(y)
    assert p.expected_nll(y).item() == pytest.approx(nll.mean().item(), abs=4 * nll.std().item() / 200)
    exact = stats.invwishart(p.nu.item(), np.linalg.inv((p.factor @ p.factor.mT).numpy())).mean()
    np.testing.assert_allclose(p.covariance, exact, rtol=1e-10)


def test_batches_and_gradients():
    g = torch.Generator().manual_seed(0)
    mean, y = torch.randn(2, 4, 2, generator=g, dtype=torch.float64)
    factor = torch.eye(2, dtype=torch.float64) + 0.2 * torch.rand(4, 2, 2, generator=g, dtype=torch.float64).tril()
    kappa, nu = 1 + torch.rand(2, 4, generator=g, dtype=torch.float64)
    prior = NormalWishart(torch.zeros(2).double(), torch.eye(2).double(), *double(0.1, 4.1).unbind())

    def both(mean, factor, kappa, nu):
        d = NormalWishart(mean, factor.tril(), kappa, nu + 3)
        return d.kl(prior), d.expected_nll(y)

    inputs = tuple(t.requires_grad_() for t in (mean, factor, kappa, nu))
    assert torch.autograd.gradcheck(both, inputs)
    rows = [both(mean[i], factor[i], kappa[i], nu[i])[0] for i in range(4)]
    torch.testing.assert_close(both(*inputs)[0], torch.stack(rows))


@pytest.mark.parametrize("nu", [1e4, 1e9])
def test_single_precision_keeps_its_digits_at_huge_degrees_of_freedom(nu):
    values = {}
    for dtype in (torch.float64, torch.float32):
        p = NormalWishart(
            torch.tensor([0.1], dtype=dtype),
            torch.tensor([[nu**-0.5]], dtype=dtype),
            torch.tensor(3.0, dtype=dtype),
            torch.tensor(nu, dtype=dtype),
        )
        q = NormalWishart(torch.zeros(1).to(dtype), torch.eye(1).to(dtype), *double(1.0, 4.0).to(dtype).unbind())
        values[dtype] = p.kl(q).item()
    assert values[torch.float32] == pytest.approx(values[torch.float64], rel=1e-5)
    exact = kl_divergence(Gamma(*double(nu / 2, nu / 2).unbind()), Gamma(*double(2.0, 0.5).unbind())).item()
    exact += (1 / 3 - 1 - math.log(1 / 3) + 0.01) / 2
    assert values[torch.float64] == pytest.approx(exact, rel=1e-6)
