"""TempNet's losses against the adversary they are the dual of, solved by scipy; the network written out in numpy."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize

from lossary.losses import TempNet, ldr_kl_loss, robust_temperature_loss, tau_cross_entropy

LOGITS = [[1.0, -0.5, 0.25, 2.0], [0.0, 0.3, -0.2, 0.1]]
TARGET = [0, 3]


def tensors():
    return torch.tensor(LOGITS, dtype=torch.float64), torch.tensor(TARGET)


def test_at_temperature_one_it_is_cross_entropy_less_log_classes_plus_rho():
    z, y = tensors()
    expected = F.cross_entropy(z, y, reduction="none") - math.log(4) + 0.3
    torch.testing.assert_close(tau_cross_entropy(z, y, rho=0.3), expected, rtol=0, atol=1e-14)


def test_at_a_fixed_temperature_it_is_label_distributionally_robust_kl():
    z, y = tensors()
    tau = torch.tensor([0.4, 2.0], dtype=torch.float64)
    for row in range(2):
        expected = ldr_kl_loss(z[row], y[row], lam=tau[row].item(), margin=0.0) + 0.7 * tau[row]
        torch.testing.assert_close(tau_cross_entropy(z, y, tau=tau, rho=0.7)[row], expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rho", [0.05, 0.4, 1.0])
def test_its_minimum_over_temperature_is_what_an_adversary_in_a_kl_ball_gains(rho):
    """The primal problem by a general solver: weights p on the simplex with KL(p, uniform) <= rho."""
    got = robust_temperature_loss(*tensors(), rho=rho)
    for value, z, y in zip(got.tolist(), LOGITS, TARGET):
        gaps = np.array(z) - z[y]
        found = minimize(
            lambda p, gaps=gaps: -p @ gaps,
            np.full(4, 0.25) + np.array([0.01, -0.01, 0.01, -0.01]),
            method="SLSQP",
            bounds=[(1e-9, 1)] * 4,
            constraints=[
                {"type": "eq", "fun": lambda p: p.sum() - 1},
                {"type": "ineq", "fun": lambda p: rho - (p * np.log(4 * p)).sum()},
            ],
            options={"maxiter": 500, "ftol": 1e-12},
        )
        assert value == pytest.approx(-found.fun, abs=1e-6)


def test_no_temperature_in_range_is_better():
    z, y = tensors()
    best = robust_temperature_loss(z, y, rho=0.4, tau_min=0.3, tau_max=1.5)
    grid = torch.stack([tau_cross_entropy(z, y, tau=t, rho=0.4) for t in np.linspace(0.3, 1.5, 2001).tolist()])
    assert (best <= grid + 1e-12).all()
    torch.testing.assert_close(best, grid.amin(0), rtol=0, atol=1e-6)


def test_a_ball_that_holds_everything_leaves_the_worst_gap():
    z, y = tensors()
    worst = z.amax(1) - z[torch.arange(2), y]
    got = robust_temperature_loss(z, y, rho=math.log(4), tau_min=1e-4)
    torch.testing.assert_close(got, worst, rtol=0, atol=1e-6)


def test_the_network_written_out_in_numpy():
    torch.manual_seed(0)
    tempnet = TempNet(4, hidden=3, tau_min=0.2, tau_max=1.2).double().eval()
    state = {name: value.numpy() for name, value in tempnet.state_dict().items()}
    state["log_scale"][...] = -0.7
    state["pool.weight"][...] = [[1.5, -0.5, 1.0]]
    for row, tau in zip(LOGITS, tempnet(tensors()[0]).tolist()):
        x = np.array(row) - max(row)
        x = x / math.sqrt((x**2).sum())
        inner = 1 / (1 + np.exp(-(state["project.0.weight"] @ x + state["project.0.bias"])))
        z = state["project.3.weight"] @ inner + state["project.3.bias"]
        a = np.exp(z / math.exp(-0.7))
        u = state["pool.weight"][0] @ ((a / a.sum() - 1 / 3) * z) + state["pool.bias"][0]
        assert tau == pytest.approx(0.2 + 1.0 / (1 + math.exp(-u)), abs=1e-14)


def test_the_network_sees_the_shape_of_the_logits_only():
    torch.manual_seed(0)
    tempnet = TempNet(4, hidden=3).double().eval()
    z, _ = tensors()
    torch.testing.assert_close(tempnet(5 * z + 2), tempnet(z), rtol=0, atol=1e-14)


def test_it_serves_transformers_as_a_logits_processor():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tempnet = TempNet(5, hidden=4).eval()
    scores = torch.tensor([[2.0, 0.0, 1.0, -1.0, 0.5]])
    processors = transformers.LogitsProcessorList([tempnet.process_logits])
    torch.testing.assert_close(processors(torch.zeros(1, 3, dtype=torch.int64), scores), scores / tempnet(scores))
