"""The engine of second-order classifiers: closed forms against torch's and scipy's, and against 60 digits."""

import math

import mpmath
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Dirichlet, kl_divergence

from lossary.uncertainty import _dirichlet as engine

ALPHAS = [
    [1.0, 1.0, 1.0],
    [2.0, 0.5, 7.0],
    [11.99, 12.01, 0.5],
    [1e-8, 1e-3, 2.0],
    [1e-12, 1e-12, 1e-12],
    [5e3, 2e3, 1e2],
    [1e12, 1.0, 1.0],
    [1e12, 1e12, 3e11],
]
psi, log_gamma = mpmath.digamma, mpmath.loggamma


def exactly(form, *alphas: torch.Tensor) -> float:
    """The textbook form, whose terms cancel, in 60 digits."""
    with mpmath.workdps(60):
        return float(form(*([mpmath.mpf(x) for x in alpha.double().tolist()] for alpha in alphas)))


def entropy(a):
    total = sum(a)
    log_beta = sum(map(log_gamma, a)) - log_gamma(total)
    return log_beta + (total - len(a)) * psi(total) - sum((x - 1) * psi(x) for x in a)


def kl(a, b):
    value = log_gamma(sum(a)) - sum(map(log_gamma, a)) - log_gamma(sum(b)) + sum(map(log_gamma, b))
    return value + sum((x - y) * (psi(x) - psi(sum(a))) for x, y in zip(a, b))


def mutual_information(a):
    total = sum(a)
    return -sum(x / total * (mpmath.log(x / total) - psi(x + 1) + psi(total + 1)) for x in a)


def expected_entropy(a):
    return -sum(x / sum(a) * (psi(x + 1) - psi(sum(a) + 1)) for x in a)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-11), (torch.float32, 2e-6)])
def test_closed_forms_hold_for_tiny_and_huge_alpha(alpha, dtype, rtol):
    a = torch.tensor(alpha, dtype=dtype)
    other = torch.tensor([3.0, 101.0, 1.0], dtype=dtype)
    assert engine.entropy(a).item() == pytest.approx(exactly(entropy, a), rel=rtol)
    assert engine.kl(a).item() == pytest.approx(exactly(kl, a, torch.ones(3)), rel=rtol, abs=rtol)
    assert engine.kl(a, other).item() == pytest.approx(exactly(kl, a, other), rel=rtol)
    assert engine.kl(other, a).item() == pytest.approx(exactly(kl, other, a), rel=rtol)
    assert engine.mutual_information(a).item() == pytest.approx(exactly(mutual_information, a), rel=10 * rtol)
    assert engine.expected_entropy(a).item() == pytest.approx(exactly(expected_entropy, a), rel=10 * rtol, abs=rtol)
    for y in range(3):
        expected = exactly(lambda x, y=y: psi(sum(x)) - psi(x[y]), a)
        assert engine.expected_log_loss(a, torch.tensor(y)).item() == pytest.approx(expected, rel=rtol, abs=rtol / 20)


def test_entropy_and_divergence_are_those_of_torch_distributions():
    g = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 50, 4, generator=g, dtype=torch.float64) * 20 + 0.1
    torch.testing.assert_close(engine.entropy(a), Dirichlet(a).entropy(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(engine.kl(a, b), kl_divergence(Dirichlet(a), Dirichlet(b)), rtol=1e-9, atol=1e-9)


def test_density_is_that_of_torch_distributions_and_linear_in_log_p():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(50, 4, generator=g, dtype=torch.float64) * 20 + 0.1
    p = torch.randn(2, 50, 4, generator=g, dtype=torch.float64).softmax(-1)
    densities = -Dirichlet(a).log_prob(p)
    torch.testing.assert_close(engine.negative_log_density(a, p[0].log()), densities[0], rtol=1e-10, atol=1e-10)
    both = engine.negative_log_density(a, p.log().mean(0))
    torch.testing.assert_close(both, densities.mean(0), rtol=1e-10, atol=1e-10)
    huge = torch.tensor([3e9, 6e9, 1e9], dtype=torch.float64)
    with mpmath.workdps(60):  # at its own mean, where only the constants are left
        exact = [mpmath.mpf(x) for x in huge.tolist()]
        at = sum(map(log_gamma, exact)) - log_gamma(sum(exact))
        at -= sum((x - 1) * mpmath.log(x / sum(exact)) for x in exact)
    assert engine.negative_log_density(huge, (huge / 1e10).log()).item() == pytest.approx(float(at), rel=1e-6)


def test_expectations_are_integrals_over_the_beta_distribution():
    a, b = 2.5, 0.7
    density = stats.beta(a, b)

    def expected(value):
        return integrate.quad(lambda t: value(t) * density.pdf(t), 0, 1, limit=200)[0]

    alpha = torch.tensor([a, b], dtype=torch.float64)
    own, other = torch.tensor(0), torch.tensor(1)
    assert engine.expected_log_loss(alpha, own).item() == pytest.approx(expected(lambda t: -math.log(t)), abs=1e-8)
    assert engine.expected_brier_loss(alpha, own).item() == pytest.approx(
        expected(lambda t: 2 * (1 - t) ** 2), abs=1e-8
    )
    assert engine.expected_brier_loss(alpha, other).item() == pytest.approx(expected(lambda t: 2 * t**2), abs=1e-8)
    # by symmetry the entropy's two terms, each without the pole of the density at 1
    assert engine.expected_entropy(alpha).item() == pytest.approx(
        expected(lambda t: -t * math.log(t)) + expected(lambda t: -(1 - t) * math.log1p(-t)), abs=1e-7
    )
    assert engine.mean_entropy(alpha).item() == pytest.approx(stats.entropy([a / (a + b), b / (a + b)]), abs=1e-12)
    power = engine.log_rising(alpha[0], 1.5) - engine.log_rising(alpha.sum(), 1.5)
    assert power.exp().item() == pytest.approx(expected(lambda t: t**1.5), abs=1e-8)


@pytest.mark.parametrize("x", [1e-6, 0.3, 11.999, 12.001, 1e3, 1e9])
@pytest.mark.parametrize("power", [0.5, 4.0])
def test_log_rising_is_a_difference_of_log_gammas(x, power):
    with mpmath.workdps(60):
        expected = float(log_gamma(mpmath.mpf(x) + power) - log_gamma(mpmath.mpf(x)))
    assert engine.log_rising(torch.tensor(x, dtype=torch.float64), power).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_gradients_agree_with_finite_differences_on_both_sides_of_the_series(scale):
    g = torch.Generator().manual_seed(1)
    z = (scale * (0.5 + torch.rand(3, 4, generator=g, dtype=torch.float64))).log().requires_grad_()
    other = torch.rand(3, 4, generator=g, dtype=torch.float64) * 5
    for form in (
        engine.entropy,
        engine.mutual_information,
        engine.expected_entropy,
        lambda a: engine.kl(a, other),
        lambda a: engine.kl(other, a),
    ):
        assert torch.autograd.gradcheck(lambda v, form=form: form(v.exp()), (z,))
        if scale < 1e3:
            assert torch.autograd.gradgradcheck(lambda v, form=form: form(v.exp()), (z,))


def test_evidence_maps():
    z = torch.tensor([-2.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(engine.concentration(z), 1 + torch.log1p(z.exp()))
    torch.testing.assert_close(engine.concentration(z, evidence="relu"), torch.tensor([1.0, 1.0, 4.0]).double())
    torch.testing.assert_close(engine.concentration(z, evidence="exp", prior=0.0), z.exp())
    assert engine.concentration(1e4 * z.float(), evidence="exp", prior=0.0).log().tolist() == [-30, 0, 30]
    assert engine.concentration(z.bfloat16()).dtype is torch.float32
    for wrong in ({"evidence": "tanh"}, {"prior": 0.0}, {"prior": -1.0, "evidence": "exp"}):
        with pytest.raises(ValueError, match=r"evidence: expected one of|prior: expected a number"):
            engine.concentration(z, **wrong)
    with pytest.raises(ValueError, match="input: expected at least two classes"):
        engine.concentration(z[:1])


@pytest.mark.parametrize("x", [1e-9, 0.2, 11.9, 12.0, 15.0, 40.0, 1e6])
def test_the_two_functions_that_all_is_made_of(x):
    with mpmath.workdps(60):
        exact = mpmath.mpf(x)
        excess = float(psi(exact + 1) - mpmath.log(exact))
        stirling = (exact - 0.5) * mpmath.log(exact) - exact + mpmath.log(2 * mpmath.pi) / 2
        remainder = float(log_gamma(exact) - stirling)
    given = torch.tensor(x, dtype=torch.float64)
    assert engine.excess(given).item() == pytest.approx(excess, rel=1e-14, abs=4e-15)
    assert engine.stirling_remainder(given).item() == pytest.approx(
        remainder, rel=1e-14, abs=1e-14 if x < 12 else 4e-15
    )
    assert engine.log_gap(given).item() == pytest.approx(1 / x - excess, rel=1e-12, abs=1e-14)
