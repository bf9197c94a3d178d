"""Evidential losses against torch's and scipy's distributions, integrals, and what their authors say they do."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import nn
from torch.distributions import Dirichlet, Gamma, kl_divergence

from lossary.criterion import Criterion
from lossary.uncertainty import (
    NaturalPosteriorHead,
    PosteriorHead,
    dirichlet_collapse_test,
    dirichlet_uncertainty,
    ensemble_distillation_loss,
    evidential_mse_loss,
    information_robust_dirichlet_loss,
    nig_loss,
    nig_uncertainty,
    normal_wishart_uncertainty,
    prior_network_loss,
    regression_prior_network_loss,
    reverse_kl_prior_network_loss,
    uce_loss,
)

EVIDENCE = {"exp": torch.exp, "relu": lambda z: z.clamp(min=0), "softplus": lambda z: torch.log1p(z.exp())}


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


Z, Y = 2 * drawn(5, 4), torch.tensor([0, 3, 1, 2, 2])


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_evidential_mse_is_error_variance_and_divergence(evidence):
    alpha = 1 + EVIDENCE[evidence](Z)
    own = torch.eye(4, dtype=torch.float64)[Y]
    predicted = Dirichlet(alpha)
    squares = ((own - predicted.mean) ** 2 + predicted.variance).sum(-1)
    rest = kl_divergence(Dirichlet(own + (1 - own) * alpha), Dirichlet(torch.ones(4).double()))
    torch.testing.assert_close(evidential_mse_loss(Z, Y, kl_weight=0.3, evidence=evidence), squares + 0.3 * rest)


@pytest.mark.parametrize("evidence", EVIDENCE)
def test_uce_is_expected_log_loss_less_entropy(evidence):
    alpha = 1 + EVIDENCE[evidence](Z)
    expected = torch.digamma(alpha.sum(-1)) - torch.digamma(alpha[range(5), Y])
    expected = expected - 0.2 * Dirichlet(alpha).entropy()
    torch.testing.assert_close(uce_loss(Z, Y, entropy_weight=0.2, evidence=evidence), expected)


def test_uce_with_a_full_entropy_is_the_variational_bound():
    # minus the entropy is the KL to the flat prior, up to a constant: the bound is best at the posterior
    alpha, _, _ = dirichlet_collapse_test(partial(uce_loss, entropy_weight=0.1, prior=0.0), torch.tensor([3, 7]))
    assert alpha.tolist() == pytest.approx([4.0, 8.0], rel=1e-5)


@pytest.mark.parametrize("p", [1.0, 2.0, 4.0, 3.5])
def test_information_robust_error_is_made_of_beta_moments(p):
    for row, y in zip(Z, Y.tolist()):
        alpha = (1 + row.exp()).numpy()
        total = alpha.sum()
        moments = [
            stats.beta(total - a if k == y else a, a if k == y else total - a).expect(lambda t: t**p)
            for k, a in enumerate(alpha)
        ]
        got = information_robust_dirichlet_loss(row, torch.tensor(y), p=p, weight=0.0, evidence="exp").item()
        assert got == pytest.approx(sum(moments) ** (1 / p), rel=1e-6)
        rest = np.delete(alpha, y)
        curvature = special.polygamma(1, rest) - special.polygamma(1, 1 + rest.sum())
        information = ((rest - 1) ** 2 * curvature).sum() / 2
        full = information_robust_dirichlet_loss(row, torch.tensor(y), p=p, weight=0.7, evidence="exp").item()
        assert full - got == pytest.approx(0.7 * information, rel=1e-9)


def test_prior_networks_aim_at_the_target_dirichlet():
    outlier = torch.tensor([False, True, False, False, True])
    beta = torch.ones(5, 4, dtype=torch.float64)
    for row in (0, 2, 3):
        beta[row, Y[row]] = 31.0
    aim, now = Dirichlet(beta), Dirichlet(Z.exp())
    options = {"outlier": outlier, "target_concentration": 30.0}
    torch.testing.assert_close(prior_network_loss(Z, Y, **options), kl_divergence(aim, now))
    torch.testing.assert_close(reverse_kl_prior_network_loss(Z, Y, **options), kl_divergence(now, aim))
    torch.testing.assert_close(
        prior_network_loss(Z, Y)[0], kl_divergence(Dirichlet(100 * (beta > 1).double() + 1), now)[0]
    )


def test_where_labels_disagree_the_reverse_kl_averages_targets_and_the_forward_one_gives_up():
    counts = torch.tensor([60, 40])
    reverse, _, _ = dirichlet_collapse_test(reverse_kl_prior_network_loss, counts)
    assert reverse.tolist() == pytest.approx([61.0, 41.0], rel=1e-5)
    forward, _, _ = dirichlet_collapse_test(prior_network_loss, counts)
    # its best alpha has the mixture's E[log theta]
    logs = special.digamma([101.0, 1.0]) - special.digamma(102.0)
    wanted = 0.6 * logs + 0.4 * logs[::-1]
    found = special.digamma(forward.numpy()) - special.digamma(forward.sum().item())
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert forward.sum() < 2  # less sure than the flat Dirichlet


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_likelihood_of_the_members(temperature):
    members = drawn(5, 3, 4, seed=1)
    p = 0.95 * (members / temperature).softmax(-1) + 0.05 / 4
    density = Dirichlet((Z / temperature).exp()).log_prob(p.movedim(1, 0)).mean(0)
    got = ensemble_distillation_loss(Z, members, temperature=temperature, smoothing=0.05)
    torch.testing.assert_close(got, -density * temperature**2)


def test_distillation_finds_the_dirichlet_that_the_ensemble_was_drawn_from():
    truth = torch.tensor([2.0, 5.0, 0.8], dtype=torch.float64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        members = Dirichlet(truth).sample((20_000,)).log()
    z = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([z], max_iter=100, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        value = ensemble_distillation_loss(z, members, smoothing=0.0)
        value.backward()
        return value

    optimizer.step(objective)
    assert z.exp().tolist() == pytest.approx(truth.tolist(), rel=0.03)


def test_uncertainties_are_entropies_of_draws():
    row = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    p, total, data, model = dirichlet_uncertainty(row, evidence="exp", prior=0.0)
    torch.testing.assert_close(p, row.softmax(-1))
    assert total.item() == pytest.approx(stats.entropy(p.numpy()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = Dirichlet(row.exp()).sample((400_000,))
    assert data.item() == pytest.approx(special.entr(draws.numpy()).sum(-1).mean(), abs=2e-3)
    assert (data + model).item() == pytest.approx(total.item())
    flat = dirichlet_uncertainty(torch.zeros(2), evidence="relu")  # E of entropy on [0, 1] is 1/2
    assert [x.item() for x in flat[1:]] == pytest.approx([math.log(2), 0.5, math.log(2) - 0.5])


def moved(head: nn.Module) -> nn.Module:
    """The head in double precision with parameters well away from their first values."""
    head.double()
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(1.5 * torch.randn(parameter.shape, generator=g, dtype=torch.float64))
    return head


GRID = torch.cartesian_prod(*[torch.linspace(-14, 14, 561, dtype=torch.float64)] * 2)
CELL = (28 / 560) ** 2


def test_evidence_of_a_class_is_its_count_spread_over_the_features():
    head = moved(PosteriorHead(2, (30, 70, 5)))
    with torch.no_grad():
        mass = head(GRID).exp().sum(0) * CELL
        far = head(torch.tensor([[60.0, -60.0]], dtype=torch.float64))
    assert mass.tolist() == pytest.approx([30.0, 70.0, 5.0], rel=2e-3)
    assert far.max() < -30
    flat = math.log(3) - 1 / 2 - 1 / 3  # psi(4) - psi(2) taken from log 3
    assert dirichlet_uncertainty(far, evidence="exp")[3].item() == pytest.approx(flat, abs=1e-9)


def test_densities_agree_with_the_jacobian_of_the_flow():
    flows = moved(PosteriorHead(3, (1, 1), layers=4)).flows
    x = drawn(3, seed=4)

    def straighten(z, k):  # layer by layer, as Rezende and Mohamed write it
        for layer in range(4):
            centre = flows.centre[layer, k]
            a = torch.log1p(flows.radius[layer, k].exp())
            b = torch.log1p(flows.pull[layer, k].exp()) - a
            z = z + b * (z - centre) / (a + (z - centre).norm())
        return z

    for k in range(2):
        jacobian = torch.autograd.functional.jacobian(partial(straighten, k=k), x)
        base = stats.multivariate_normal(np.zeros(3)).logpdf(straighten(x, k).detach().numpy())
        assert flows(x)[k].item() == pytest.approx(base + jacobian.det().abs().log().item(), rel=1e-10)


def test_natural_evidence_is_one_budget_shared_out():
    head = moved(NaturalPosteriorHead(2, 3, layers=5))
    with torch.no_grad():
        evidence = head(GRID).exp()
        assert (evidence.sum() * CELL).item() == pytest.approx(4 * math.pi, rel=2e-3)
        shares = evidence / evidence.sum(-1, keepdim=True)
        near = GRID.norm(dim=-1) < 2
        torch.testing.assert_close(shares[near], head.classify(GRID[near]).softmax(-1))
        assert (moved(NaturalPosteriorHead(2, 3, log_budget=0.0))(GRID).exp().sum() * CELL).item() == pytest.approx(
            1.0, rel=2e-3
        )


def nig(row: torch.Tensor) -> list[float]:
    soft = torch.log1p(row[1:].exp()) + 1e-6
    return [row[0].item(), soft[0].item(), 1 + soft[1].item(), soft[2].item()]


def test_evidential_regression_is_students_t_and_its_penalty():
    target = drawn(5, seed=7)
    for row, y in zip(Z, target):
        gamma, nu, alpha, beta = nig(row)
        t = stats.t(2 * alpha, gamma, math.sqrt(beta * (1 + nu) / (nu * alpha)))
        got = [nig_loss(row, y, evidence_weight=w).item() for w in (0.0, 0.5)]
        assert got[0] == pytest.approx(-t.logpdf(y.item()), rel=1e-9)
        assert got[1] - got[0] == pytest.approx(0.5 * abs(y.item() - gamma) * (2 * nu + alpha), rel=1e-9)
        mean, data, model = nig_uncertainty(row)
        assert mean.item() == gamma
        assert data.item() == pytest.approx(stats.invgamma(alpha, scale=beta).mean(), rel=1e-9)
        assert model.item() == pytest.approx(data.item() / nu, rel=1e-9)
        if alpha > 1.5:  # the t's variance is both together
            assert t.var() == pytest.approx((data + model).item(), rel=1e-9)


def test_regression_prior_network_in_one_dimension():
    mean, w, kappa, nu = 0.4, 0.8, 0.7, 3 + 1.3
    inverse = [math.log(math.expm1(x - 1e-6)) for x in (math.sqrt(w), kappa, nu - 3)]
    y, prior_mean, variance, strength = 1.5, -0.3, 2.0, 0.1
    log_precision = special.digamma(nu / 2) + math.log(2 * w)
    nll = (math.log(2 * math.pi) - log_precision + nu * w * (y - mean) ** 2 + 1 / kappa) / 2
    gammas = [
        Gamma(torch.tensor(n / 2).double(), torch.tensor(s).double())
        for n, s in ((nu, 1 / (2 * w)), (3 + strength, (3 + strength) * variance / 2))
    ]
    of_mean = strength / kappa - 1 - math.log(strength / kappa) + strength * nu * w * (mean - prior_mean) ** 2
    kl = kl_divergence(*gammas).item() + of_mean / 2
    options = {
        "prior_mean": torch.tensor([prior_mean]),
        "prior_covariance": torch.tensor([[variance]]),
        "prior_strength": strength,
        "kl_weight": 0.2,
    }
    input = torch.tensor([[mean, *inverse]] * 2, dtype=torch.float64)
    outlier = torch.tensor([False, True])
    got = regression_prior_network_loss(input, torch.full((2, 1), y).double(), outlier=outlier, **options)
    assert got.tolist() == pytest.approx([nll + 0.2 * kl, 0.2 * kl], rel=1e-6)


def test_regression_prior_network_reads_its_outputs():
    input = drawn(3, 7, seed=5)  # two targets
    soft = torch.log1p(input.exp()) + 1e-6
    mean, data, model = normal_wishart_uncertainty(input, targets=2)
    for i in range(3):
        factor = np.array([[soft[i, 2], 0.0], [input[i, 3], soft[i, 4]]])
        covariance = np.linalg.inv(factor @ factor.T) / (1 + soft[i, 6].item())  # nu - D - 1
        np.testing.assert_allclose(mean[i], input[i, :2])
        np.testing.assert_allclose(data[i], covariance, rtol=1e-9)
        np.testing.assert_allclose(model[i], covariance / soft[i, 5].item(), rtol=1e-9)
    # far from its target in units of its own covariance, a prediction pays for the distance
    y = torch.zeros(3, 2, dtype=torch.float64)
    shifted = regression_prior_network_loss(input, y + 2, prior_mean=torch.full((2,), 2.0), kl_weight=0.0)
    apart = [2 - mean, 0 - mean]
    precision = torch.linalg.inv(data * (1 + soft[:, 6])[:, None, None]) * (4 + soft[:, 6])[:, None, None]
    pay = [(a.unsqueeze(1) @ precision @ a.unsqueeze(2)).flatten() / 2 for a in apart]
    plain = regression_prior_network_loss(input, y, kl_weight=0.0)
    torch.testing.assert_close(shifted - plain, pay[0] - pay[1])


@pytest.mark.parametrize(
    "call",
    [
        lambda z: nig_loss(z, torch.zeros(3).to(z)),
        lambda z: nig_uncertainty(z)[2],
        lambda z: regression_prior_network_loss(z, torch.zeros(3, 1).to(z)),
        lambda z: ensemble_distillation_loss(z, torch.zeros(3, 2, 4).to(z)),
        lambda z: dirichlet_uncertainty(z)[3],
    ],
)
def test_plain_parts_are_differentiable_finite_and_keep_the_dtype(call):
    z = drawn(3, 4, seed=6).requires_grad_()
    assert torch.autograd.gradcheck(call, (z,))
    extreme = (1e4 * z.detach().sign()).float().requires_grad_()
    value = call(extreme)
    (grad,) = torch.autograd.grad(value.sum(), extreme)
    assert value.isfinite().all()
    assert grad.isfinite().all()
    half = call(z.detach().bfloat16())
    assert half.dtype is torch.bfloat16
    assert half.isfinite().all()


def test_refusals():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="outlier: expected booleans of shape"):
        prior_network_loss(z, y, outlier=y)
    with pytest.raises(ValueError, match="members: expected shape"):
        ensemble_distillation_loss(z, z)
    with pytest.raises(ValueError, match="smoothing: expected a number >= 0 and < 1"):
        ensemble_distillation_loss(z, z.unsqueeze(1), smoothing=1.0)
    with pytest.raises(ValueError, match="input: expected 4 outputs last"):
        nig_loss(z, torch.zeros(2))
    with pytest.raises(ValueError, match="target: expected shape"):
        nig_loss(torch.zeros(2, 4), torch.zeros(3))
    with pytest.raises(ValueError, match="input: expected 7 outputs last for 2 targets"):
        normal_wishart_uncertainty(z, targets=2)
    with pytest.raises(ValueError, match="prior_covariance: expected shape"):
        regression_prior_network_loss(torch.zeros(2, 4), torch.zeros(2, 1), prior_covariance=torch.ones(2))
    with pytest.raises(ValueError, match="class_counts: expected a number above 0"):
        PosteriorHead(2, (3, 0))
    with pytest.raises(ValueError, match="input: expected 2 features last"):
        PosteriorHead(2, (3, 1))(torch.zeros(5, 3))
    with pytest.raises(ValueError, match="p: expected a number >= 1"):
        information_robust_dirichlet_loss(z, y, p=0.5)


def test_a_posterior_network_learns_and_knows_what_is_strange():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(200) % 2
    x = torch.randn(200, 2, generator=g) + 3 * torch.stack([y, -y], -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 2), nn.BatchNorm1d(2, affine=False))
        network = nn.Sequential(encoder, PosteriorHead(2, (100, 100), layers=4))
    criterion = Criterion(uce_loss, check=True)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.02)
    for _ in range(120):
        optimizer.zero_grad()
        criterion(network(x), y).backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        p, *_, known = dirichlet_uncertainty(network(x), evidence="exp")
        *_, strange = dirichlet_uncertainty(network(torch.tensor([[-8.0, -8.0]])), evidence="exp")
    assert (p.argmax(-1) == y).double().mean() > 0.95
    assert strange > known.median()
