"""Prospect against the official code's iterates, generic solvers, and spectra integrated numerically."""

import copy
import io
from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import minimize
from torch import nn

from lossary.tasks import wine
from lossary.weighting import Prospect, penalized_permutahedron_max, spectral_risk_weights

N = 12
STEP = torch.arange(N, dtype=torch.float64)
X = torch.stack([torch.sin(1.7 * STEP), torch.cos(2.3 * STEP + 0.4), torch.sin(0.9 * STEP + 1)], 1)
Y = torch.sin(3.1 * STEP) + 0.5 * STEP / N
EXTREMILE = spectral_risk_weights(N, risk="extremile", level=2.0)


def squares(w):
    return lambda index: (X[index] @ w - Y[index]) ** 2 / 2


def weights(*shape):
    return nn.Parameter(torch.zeros(shape, dtype=torch.float64))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("risk", "level", "density"),
    [
        ("cvar", 0.3, lambda t: (t >= 0.3) / 0.7),
        ("extremile", 2.5, lambda t: 2.5 * t**1.5),
        ("esrm", 4.0, lambda t: 4 * np.exp(4 * t) / (np.exp(4) - 1)),
    ],
)
def test_spectra_integrate_their_densities(risk, level, density):
    got = spectral_risk_weights(7, risk=risk, level=level)
    expected = [quad(density, k / 7, (k + 1) / 7, points=[0.3])[0] for k in range(7)]
    assert got.tolist() == pytest.approx(expected, abs=1e-7)
    assert (got.diff() >= -1e-15).all()


def test_the_extremile_is_the_mean_of_the_larger_of_two_draws():
    losses = torch.tensor([3.0, 0.5, 2.0, 7.0], dtype=torch.float64)
    pairs = [max(a, b) for a in losses.tolist() for b in losses.tolist()]
    value, _ = penalized_permutahedron_max(losses, spectral_risk_weights(4, risk="extremile", level=2.0), nu=0.0)
    assert value.item() == pytest.approx(sum(pairs) / 16)


@pytest.mark.parametrize("nu", [0.05, 0.6, 5.0])
def test_the_maximum_is_that_over_mixtures_of_permutations(nu):
    """A generic solver over the 24 mixture weights of a permutahedron's corners."""
    losses = np.array([0.3, 1.9, -0.4, 1.1])
    sigma = spectral_risk_weights(4, risk="esrm", level=3.0)
    corners = np.array(list(permutations(sigma.tolist())))
    found = minimize(
        lambda m: -(m @ corners @ losses) + nu * 4 * ((m @ corners - 0.25) ** 2).sum(),
        np.full(24, 1 / 24),
        bounds=[(0, 1)] * 24,
        constraints={"type": "eq", "fun": lambda m: m.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-13, "maxiter": 500},
    )
    value, q = penalized_permutahedron_max(torch.from_numpy(losses), sigma, nu=nu)
    assert value.item() == pytest.approx(-found.fun, abs=1e-6)
    assert q.tolist() == pytest.approx((found.x @ corners).tolist(), abs=1e-3)


def test_weights_are_those_of_the_official_code():
    """get_smooth_weights with the spectrum get_esrm_weights(5, 1.0) and a shift cost of 0.8, twice nu."""
    losses = torch.tensor([1.0, 4.0, 2.0, 3.0, 2.5], dtype=torch.float64)
    _, q = penalized_permutahedron_max(losses, spectral_risk_weights(5, risk="esrm", level=1.0), nu=0.4)
    assert q.tolist() == pytest.approx([0.1289, 0.2868, 0.1574, 0.2348, 0.1922], abs=1e-4)


def test_the_maximums_gradient_is_its_weights():
    losses = torch.tensor([[0.3, 1.9, -0.4, 1.1], [1.0, 1.0, 1.0, 1.0]], dtype=torch.float64, requires_grad=True)
    value, q = penalized_permutahedron_max(losses, spectral_risk_weights(4, level=0.25), nu=0.5)
    assert not q.requires_grad
    value.sum().backward()
    assert torch.equal(losses.grad, q)
    assert q[1].tolist() == pytest.approx([0.25] * 4)  # equal losses
    assert torch.autograd.gradcheck(
        lambda z: penalized_permutahedron_max(z, spectral_risk_weights(4, level=0.25), nu=0.5)[0], (losses[:1],)
    )


def test_infinite_losses():
    losses, sigma = torch.tensor([1.0, torch.inf, 0.0]), spectral_risk_weights(3, level=0.5)
    for nu in (0.0, 0.1):
        value, q = penalized_permutahedron_max(losses, sigma, nu=nu)
        assert value == torch.inf
        assert q.tolist() == pytest.approx([1 / 3, 2 / 3, 0.0])


def test_iterates_are_those_of_the_official_code(monkeypatch):
    """ronakdm/prospect on these data: shift_cost 1, l2_reg 1, lrp 0.05, the indices of seed_grad 25."""
    drawn = [4, 10, 6, 7, 2, 8, 4, 9, 4, 5, 1, 7, 3, 8, 7, 3, 4, 3, 1, 6]
    order = iter(drawn)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.tensor([next(order)] + [0] * (n - 1)))
    w = weights(3)
    prospect = Prospect([w], EXTREMILE, nu=0.5, lr=0.05, weight_decay=1 / N, generator=generator())
    for _ in drawn:
        prospect.step(squares(w))
    expected = [-0.00040454877417765646, 0.022836678811607267, -0.0436159582469501]
    assert w.tolist() == pytest.approx(expected, abs=1e-14)


def minimiser(losses, shape, sigma, nu, decay):
    """By scipy's L-BFGS on the whole objective."""

    def objective(flat):
        w = torch.from_numpy(flat).view(shape).requires_grad_()
        value = penalized_permutahedron_max(losses(w), sigma, nu=nu)[0] + decay / 2 * w.square().sum()
        value.backward()
        return value.item(), w.grad.flatten().numpy()

    found = minimize(
        objective, np.zeros(int(np.prod(shape))), jac=True, method="L-BFGS-B", options={"ftol": 1e-16, "gtol": 1e-10}
    )
    return torch.from_numpy(found.x).view(shape)


@pytest.mark.parametrize(("batch", "steps"), [(1, 1500), (3, 900)])
def test_it_finds_the_minimum_of_least_squares(batch, steps):
    every = torch.arange(N)
    best = minimiser(lambda w: squares(w)(every), (3,), EXTREMILE, 0.5, 0.3)
    w = weights(3)
    how = {"nu": 0.5, "lr": 0.05 * batch, "weight_decay": 0.3, "batch_size": batch}
    prospect = Prospect([w], EXTREMILE, generator=generator(), **how)
    for _ in range(steps):
        risk = prospect.step(squares(w))
    assert (w - best).abs().max() < 1e-7
    value, _ = penalized_permutahedron_max(squares(best)(every), EXTREMILE, nu=0.5)
    assert risk.item() == pytest.approx(value.item(), abs=1e-7)


def test_it_finds_the_minimum_of_logistic_regression_with_a_module():
    data = wine()
    x, y = data.x[::9].double(), data.y[::9]
    n, sigma = len(y), spectral_risk_weights(len(y), level=0.5)
    model = nn.Linear(13, 3, dtype=torch.float64, device="meta").to_empty(device="cpu")
    for p in model.parameters():
        nn.init.zeros_(p)
    groups = [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.2}]
    prospect = Prospect(groups, sigma, nu=1.0, lr=0.3, weight_decay=0.5, batch_size=5, generator=generator(1))
    for _ in range(300):
        prospect.step(lambda index: nn.functional.cross_entropy(model(x[index]), y[index], reduction="none"))
    wide = torch.cat([x, torch.ones(n, 1, dtype=torch.float64)], 1)
    best = minimiser(
        lambda w: nn.functional.cross_entropy(wide @ w.T, y, reduction="none"), (3, 14), sigma, nu=1.0, decay=0.5
    )
    assert (torch.cat([model.weight, model.bias[:, None]], 1) - best).abs().max() < 1e-6


def test_a_run_resumes_from_its_state():
    w, other = weights(3), weights(3)
    running = Prospect([w], EXTREMILE, lr=0.05, generator=generator())
    for _ in range(10):
        running.step(squares(w))
    saved = io.BytesIO()
    torch.save(running.state_dict(), saved)
    saved.seek(0)
    resumed = Prospect([other], EXTREMILE, lr=0.5, generator=generator())
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    resumed.generator.set_state(running.generator.get_state())
    copied, third = copy.deepcopy((running, w))
    with torch.no_grad():
        other.copy_(w)
    for _ in range(10):
        for prospect, p in ((running, w), (resumed, other), (copied, third)):
            prospect.step(squares(p))
    assert torch.equal(w, other)
    assert torch.equal(w, third)


def test_a_schedule_takes_effect():
    w = weights(3)
    prospect = Prospect([w], EXTREMILE, lr=0.05, generator=generator())
    schedule = torch.optim.lr_scheduler.StepLR(prospect, 1, gamma=0.0)
    prospect.step(squares(w))
    before = w.detach().clone()
    schedule.step()
    prospect.step(squares(w))
    assert torch.equal(w, before)
    assert not torch.equal(before, torch.zeros(3, dtype=torch.float64))


def test_a_parameter_added_later_joins():
    w, offset = weights(3), weights()
    prospect = Prospect([w], EXTREMILE, lr=0.05, generator=generator())
    prospect.step(squares(w))
    prospect.add_param_group({"params": [offset]})
    for _ in range(20):
        prospect.step(lambda index: (X[index] @ w + offset - Y[index]) ** 2 / 2)
    assert offset != 0


def test_refusals():
    w = weights(3)
    with pytest.raises(ValueError, match="lr: expected a number > 0, got 0"):
        Prospect([w], EXTREMILE, lr=0.0, generator=generator())
    with pytest.raises(ValueError, match="nu: expected a number, got a tensor"):
        penalized_permutahedron_max(Y, EXTREMILE, nu=torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"oracle: expected losses of shape \(12,\), got \(\)"):
        Prospect([w], EXTREMILE, generator=generator()).step(lambda index: squares(w)(index).mean())
    with pytest.raises(ValueError, match=r"spectrum: expected shape \(12,\), got \(5,\)"):
        penalized_permutahedron_max(Y, EXTREMILE[:5], nu=1.0)
    with pytest.raises(ValueError, match=r"level: expected a number >= 1, got 0\.5"):
        spectral_risk_weights(3, risk="extremile", level=0.5)
    with pytest.raises(ValueError, match="risk: expected one of 'cvar', 'extremile', 'esrm', got 'var'"):
        spectral_risk_weights(3, risk="var")
