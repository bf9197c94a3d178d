"""Comp-sum losses against their definition by sums, their named members, and bounds found by brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from lossary.losses import (
    comp_sum_loss,
    h_consistency_bound,
    margin_shift_attack,
    minimizability_gap,
    smooth_adversarial_comp_sum_loss,
)

LOGITS = torch.tensor([[1.0, -2.0, 0.5, 3.0], [0.2, 0.1, -0.4, 0.3], [-4.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
TARGET = torch.tensor([0, 3, 2])
TAUS = (0.0, 0.5, 1.0, 1.3, 2.0, 3.0)


def phi(tau: float, s: float) -> float:
    """The outer function, of the sum of exponentials."""
    return math.log(1 + s) if tau == 1 else ((1 + s) ** (1 - tau) - 1) / (1 - tau)


def exponentials(logits: list[float], y: int, rho: float = 1.0) -> float:
    return math.fsum(math.exp((f - logits[y]) / rho) for k, f in enumerate(logits) if k != y)


@pytest.mark.parametrize("tau", TAUS)
def test_it_is_phi_of_the_sum_of_exponentials(tau):
    expected = [phi(tau, exponentials(f, y)) for f, y in zip(LOGITS.tolist(), TARGET.tolist())]
    for given in (tau, torch.tensor(tau, dtype=torch.float64)):
        assert comp_sum_loss(LOGITS, TARGET, tau=given).tolist() == pytest.approx(expected, rel=1e-12)


def test_named_members():
    """Three even classes: S = 2 and p_y = 1/3."""
    even, y = torch.zeros(1, 3, dtype=torch.float64), torch.tensor([1])
    members = {0.0: 2.0, 1.0: math.log(3), 1.7: (1 - 3**-0.7) / 0.7, 2.0: 2 / 3}
    for tau, value in members.items():
        assert comp_sum_loss(even, y, tau=tau).item() == pytest.approx(value, rel=1e-12)


def test_tau_close_to_one_has_neither_jump_nor_noise():
    """Phi is -log p - (tau - 1) (log p)^2 / 2 to first order, and so is its slope in tau."""
    log_p = torch.log_softmax(LOGITS, -1).gather(-1, TARGET[:, None]).squeeze(-1)
    for nearness in (1e-12, 1e-7, -1e-5):
        expected = -log_p - nearness * log_p**2 / 2
        for tau in (1 + nearness, torch.tensor(1 + nearness, dtype=torch.float64)):
            torch.testing.assert_close(comp_sum_loss(LOGITS, TARGET, tau=tau), expected, rtol=0, atol=1e-8)
    tau = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(comp_sum_loss(LOGITS, TARGET, tau=tau).sum(), tau)
    assert slope.item() == pytest.approx(-(log_p**2).sum().item() / 2, rel=1e-12)


@pytest.mark.parametrize("tau", [1.0, 1.005, 1.5, 2.0, 4.0])
def test_from_cross_entropy_on_it_stays_finite_where_the_model_is_sure_and_wrong(tau):
    input = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    loss = comp_sum_loss(input, torch.tensor([1, 1]), tau=tau)
    (slope,) = torch.autograd.grad(loss.sum(), input)
    assert loss.tolist() == pytest.approx([2e4 if tau == 1 else -math.expm1((1 - tau) * 2e4) / (tau - 1), 0.0])
    assert slope.isfinite().all()


@pytest.mark.parametrize(("tau", "rho", "nu"), [(1.0, 1.0, 1.0), (0.4, 2.0, 0.5), (1.6, 0.3, 3.0)])
def test_smooth_form_is_the_clean_loss_plus_the_shift_of_every_margin(tau, rho, nu):
    attacked = LOGITS.flip(-1) * 0.7
    got = smooth_adversarial_comp_sum_loss(LOGITS, TARGET, perturbed=attacked, tau=tau, rho=rho, nu=nu)
    for value, f, g, y in zip(got.tolist(), LOGITS.tolist(), attacked.tolist(), TARGET.tolist()):
        shift = math.hypot(*(g[y] - g[k] - (f[y] - f[k]) for k in range(4) if k != y))
        assert value == pytest.approx(phi(tau, exponentials(f, y, rho)) + nu * shift, rel=1e-12)


def test_without_a_shift_its_slope_is_that_of_the_clean_loss():
    input = LOGITS.clone().requires_grad_()
    both = smooth_adversarial_comp_sum_loss(input, TARGET, perturbed=input * 1.0, tau=1.5)
    (slope,) = torch.autograd.grad(both.sum(), input)
    (clean,) = torch.autograd.grad(comp_sum_loss(input, TARGET, tau=1.5).sum(), input)
    torch.testing.assert_close(slope, clean)


def test_attack_finds_the_best_corner_of_a_linear_model():
    """With two classes the margin is linear, so it shifts by epsilon ||w_0 - w_1||_1, up or down."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 2, device="meta", dtype=torch.float64).to_empty(device="cpu")
    nn.init.normal_(model.weight, generator=generator)
    nn.init.zeros_(model.bias)
    x, y = torch.rand(5, 6, generator=generator, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    moved = margin_shift_attack(model, x, y, generator=generator, epsilon=0.2, steps=10)
    shift = (model(moved) - model(x)).diff(dim=-1).squeeze(-1).abs()
    assert shift.tolist() == pytest.approx([0.2 * model.weight.diff(dim=0).abs().sum().item()] * 5)


def test_attack_serves_a_stack_of_models():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 6, 4, generator=generator)

    class Stack(nn.Module):
        def forward(self, x):
            return torch.bmm(x, weight)

    x, y = torch.rand(3, 5, 6, generator=generator), torch.zeros(3, 5, dtype=torch.int64)
    moved = margin_shift_attack(Stack(), x, y, generator=generator, epsilon=0.1)
    margins = (torch.bmm(moved - x, weight[..., :1] - weight)).norm(dim=-1)
    best = 0.1 * (weight[..., :1] - weight).abs().sum(1).norm(dim=-1)  # could every margin go to its own corner
    assert (margins <= best[:, None] + 1e-6).all()
    assert (margins >= 0.5 * best[:, None]).all()


def conditional_risk(p: np.ndarray, tau: float, scores: np.ndarray) -> float:
    """Expected loss of softmax(scores) when the classes have probabilities p."""
    input = torch.tensor(scores).expand(len(p), -1)
    return float(torch.tensor(p) @ comp_sum_loss(input, torch.arange(len(p)), tau=tau))


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5])
def test_gap_subtracts_the_least_conditional_risk_that_a_search_over_scores_finds(tau):
    rng = np.random.default_rng(0)
    for p in rng.dirichlet(np.ones(4), size=3):
        least = minimize(lambda f, p=p: conditional_risk(p, tau, f), np.log(p), options={"gtol": 1e-9}).fun
        gap = minimizability_gap(1.0, torch.tensor(p)[None], tau=tau).item()
        assert gap == pytest.approx(1.0 - least, abs=1e-6)


@pytest.mark.parametrize("tau", [2.0, 3.0])
def test_gap_from_mean_absolute_error_on_is_that_of_the_surest_score(tau):
    p = np.array([0.2, 0.5, 0.3])
    surest = min(conditional_risk(p, tau, 50.0 * np.eye(3)[k]) for k in range(3))
    assert minimizability_gap(1.0, torch.tensor(p), tau=tau).item() == pytest.approx(1.0 - surest)


def test_gap_of_constant_models_under_cross_entropy_is_the_mutual_information():
    p = torch.tensor([[0.9, 0.1], [0.3, 0.7]], dtype=torch.float64)
    mean = p.mean(0)
    best_constant = -(mean * mean.log()).sum()
    information = (p * (p / mean).log()).sum(-1).mean()
    assert minimizability_gap(best_constant, p, tau=1.0).item() == pytest.approx(information.item())


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 1.5, 1.9, 2.0])
@pytest.mark.parametrize("b", [0.05, 0.4, 0.9, 1.0])
def test_bound_is_tight_with_two_classes(tau, b):
    """The cheapest way to prefer the rarer class, found on a grid of probabilities, is worth exactly b errors."""
    s = np.linspace(1e-9, 1 - 1e-9, 400_001)
    loss = [np.array(-np.log(q) if tau == 1 else (q ** (tau - 1) - 1) / (1 - tau)) for q in (s, 1 - s)]
    risk = (1 + b) / 2 * loss[0] + (1 - b) / 2 * loss[1]
    excess = risk[s <= 0.5].min() - risk.min()
    assert h_consistency_bound(excess, tau=tau, num_classes=2).item() == pytest.approx(b, abs=2e-4)


def test_bound_in_closed_form_where_there_is_one():
    t = torch.tensor([0.0, 1e-6, 0.01, 0.3], dtype=torch.float64)
    torch.testing.assert_close(
        h_consistency_bound(t, tau=0.0, num_classes=9), (t * (2 - t)).sqrt(), rtol=1e-6, atol=1e-15
    )
    torch.testing.assert_close(
        h_consistency_bound(t, tau=2.0, num_classes=9), (9 * t).clamp(max=1), rtol=1e-9, atol=1e-15
    )
    torch.testing.assert_close(
        h_consistency_bound(t, tau=3.0, num_classes=2), 8 * t.clamp(max=1 / 8), rtol=1e-9, atol=1e-15
    )


@pytest.mark.parametrize(("tau", "square"), [(0.5, 2**0.5 * 1.5), (1.0, 2.0), (1.5, 2 * 9**0.5)])
def test_bound_lies_below_its_square_root_form(tau, square):
    """The quadratic term of the transform alone: sqrt(2^tau (2 - tau) t) up to tau = 1, then sqrt(2 n^(tau - 1) t)."""
    t = torch.linspace(1e-6, 0.2, 50, dtype=torch.float64)
    bound = h_consistency_bound(t, tau=tau, num_classes=9)
    assert (bound <= (square * t).sqrt() + 1e-6).all()
    assert bound[0].item() == pytest.approx((square * t[0].item()) ** 0.5, rel=0.5)


def test_refusals():
    with pytest.raises(ValueError, match="tau: expected a number >= 0, got -1"):
        comp_sum_loss(LOGITS, TARGET, tau=-1.0)
    with pytest.raises(ValueError, match="perturbed: expected shape"):
        smooth_adversarial_comp_sum_loss(LOGITS, TARGET, perturbed=LOGITS[:2])
    with pytest.raises(ValueError, match="steps: expected a whole number"):
        margin_shift_attack(nn.Identity(), LOGITS, TARGET, generator=torch.Generator(), steps=0)
    with pytest.raises(ValueError, match="tau: expected a number, got a tensor"):
        h_consistency_bound(0.1, tau=torch.tensor(1.0), num_classes=3)
    with pytest.raises(ValueError, match="num_classes: expected a whole number >= 2, got 1"):
        h_consistency_bound(0.1, tau=1.0, num_classes=1)
