"""Worst-case weights against a generic convex solver, closed forms and limits."""

import math

import cvxpy
import numpy as np
import pytest
import torch
from torch import Tensor

from lossary.weighting._worst_case import (
    chi2_ball,
    chi2_penalty,
    cvar,
    kl_ball,
    kl_penalty,
    spectral,
    spectral_penalty,
)

N = 7
LOSSES = torch.tensor([0.3, 2.0, 2.0, -1.0, 0.7, 5.0, 0.31], dtype=torch.float64)
SPECTRA = {
    "cvar": torch.tensor([0, 0, 0, 0.1, 0.3, 0.3, 0.3], dtype=torch.float64),
    "extremile": (torch.arange(1, N + 1) / N).double() ** 2 - (torch.arange(N) / N).double() ** 2,
    "uniform": torch.full((N,), 1 / N, dtype=torch.float64),
}


def solved(losses: Tensor, *, penalty=None, ball=None, cap=None, spectrum=None) -> np.ndarray:
    """The same problem, given to an interior-point solver."""
    n = len(losses)
    q = cvxpy.Variable(n)
    divergences = {"kl": cvxpy.sum(cvxpy.kl_div(n * q, np.ones(n))) / n, "chi2": n * cvxpy.sum_squares(q - 1 / n)}
    limits = [q >= 0, cvxpy.sum(q) == 1]
    objective = losses.numpy() @ q
    if penalty:
        objective = objective - penalty[1] * divergences[penalty[0]]
    if ball:
        limits.append(divergences[ball[0]] <= ball[1])
    if cap:
        limits.append(q <= cap)
    if spectrum is not None:  # q = B spectrum with a doubly stochastic B
        b = cvxpy.Variable((n, n), nonneg=True)
        limits += [q == b @ spectrum.numpy(), cvxpy.sum(b, axis=0) == 1, cvxpy.sum(b, axis=1) == 1]
    cvxpy.Problem(cvxpy.Maximize(objective), limits).solve(solver=cvxpy.CLARABEL)
    return q.value


@pytest.mark.parametrize("strength", [0.2, 1.0, 30.0])
def test_penalties(strength: float) -> None:
    assert kl_penalty(LOSSES, strength).numpy() == pytest.approx(solved(LOSSES, penalty=("kl", strength)), abs=2e-5)
    assert chi2_penalty(LOSSES, strength).numpy() == pytest.approx(solved(LOSSES, penalty=("chi2", strength)), abs=1e-6)


@pytest.mark.parametrize("radius", [1e-4, 0.05, 0.5, 1.5])
def test_balls(radius: float) -> None:
    assert kl_ball(LOSSES, radius).numpy() == pytest.approx(solved(LOSSES, ball=("kl", radius)), abs=2e-5)
    assert chi2_ball(LOSSES, radius).numpy() == pytest.approx(solved(LOSSES, ball=("chi2", radius)), abs=2e-5)


@pytest.mark.parametrize("share", [0.05, 0.3, 3 / 7, 0.9, 1.0])
def test_cvar(share: float) -> None:
    q = cvar(LOSSES, share)
    assert (q @ LOSSES).item() == pytest.approx(solved(LOSSES, cap=1 / (share * N)) @ LOSSES.numpy(), abs=1e-7)
    assert q.max() <= 1 / (share * N) + 1e-12
    assert q[1] == q[2]
    tail = LOSSES.sort(descending=True).values
    whole = math.floor(share * N + 1e-9)
    by_hand = (tail[:whole].sum() + (share * N - whole) * tail[min(whole, N - 1)]) / (share * N)
    assert (q @ LOSSES).item() == pytest.approx(by_hand.item() if share * N >= 1 else 5.0)


@pytest.mark.parametrize("name", SPECTRA)
def test_spectral(name: str) -> None:
    spectrum = SPECTRA[name]
    q = spectral(LOSSES, spectrum)
    assert (q @ LOSSES).item() == pytest.approx((LOSSES.sort().values @ spectrum).item())
    assert q[1].item() == q[2].item() == pytest.approx(spectrum[4:6].mean().item())
    for strength in (0.01, 0.3, 3.0):
        expected = solved(LOSSES, penalty=("chi2", strength), spectrum=spectrum)
        assert spectral_penalty(LOSSES, spectrum, strength).numpy() == pytest.approx(expected, abs=2e-5)
    assert torch.equal(spectral_penalty(LOSSES, spectrum, 0.0), q)


def test_a_spectrum_of_one_sample_leaves_the_simplex() -> None:
    """The permutahedron of (0, ..., 0, 1) is the whole simplex, so the penalised form meets the plain one."""
    corner = torch.eye(N, dtype=torch.float64)[-1]
    torch.testing.assert_close(spectral_penalty(LOSSES, corner, 0.7), chi2_penalty(LOSSES, 0.7))


ALL = [
    lambda v: kl_penalty(v, 0.5),
    lambda v: kl_ball(v, 0.3),
    lambda v: chi2_penalty(v, 0.5),
    lambda v: chi2_ball(v, 0.3),
    lambda v: cvar(v, 0.3),
    lambda v: spectral(v, SPECTRA["extremile"].to(v)),
    lambda v: spectral_penalty(v, SPECTRA["extremile"].to(v), 0.5),
]


@pytest.mark.parametrize("weights", ALL)
def test_every_row_is_a_problem_of_its_own(weights) -> None:
    stack = torch.stack([LOSSES, LOSSES.flip(0) * 3, torch.ones(N)]).double().view(3, 1, N)
    got = weights(stack)
    torch.testing.assert_close(got.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    for row, expected in zip(stack[:, 0], got[:, 0]):
        torch.testing.assert_close(weights(row), expected)
    torch.testing.assert_close(got[2, 0], torch.full((N,), 1 / N, dtype=torch.float64))  # equal losses
    assert weights(LOSSES.float()).dtype == torch.float32
    assert not weights(LOSSES.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize("weights", ALL)
def test_infinite_losses_are_the_limit_of_large_ones(weights) -> None:
    infinite = LOSSES.clone()
    infinite[[0, 3]] = math.inf
    large = LOSSES.clone()
    large[[0, 3]] = 1e9
    torch.testing.assert_close(weights(infinite), weights(large), atol=1e-6, rtol=0)


def test_ends_of_the_balls() -> None:
    top = torch.tensor([1.0, 3.0, 3.0, 0.0], dtype=torch.float64)
    for ball, far in ((kl_ball, math.log(2)), (chi2_ball, 1.0)):  # as far as the two largest
        torch.testing.assert_close(ball(top, 0.0), torch.full((4,), 0.25, dtype=torch.float64))
        for radius in (far, far + 1e-9, 50.0):
            torch.testing.assert_close(ball(top, radius), torch.tensor([0, 0.5, 0.5, 0], dtype=torch.float64))
        near = ball(top, far * 0.999)
        assert 0 < near[0] < 0.01
    assert kl_ball(torch.tensor([2.0]), 0.5).item() == 1


def test_scale_and_shift_of_losses_leave_balls_alone() -> None:
    for ball in (kl_ball, chi2_ball):
        for scale in (1e-8, 1e8):
            torch.testing.assert_close(ball(scale * (LOSSES + 7), 0.4), ball(LOSSES, 0.4), atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("named", "call"),
    [
        ("losses", lambda: kl_penalty(torch.zeros(0), 1.0)),
        ("losses", lambda: cvar(torch.zeros(3, dtype=torch.int64), 0.5)),
        ("strength", lambda: chi2_penalty(LOSSES, 0.0)),
        ("radius", lambda: kl_ball(LOSSES, -1.0)),
        ("share", lambda: cvar(LOSSES, 0.0)),
        ("spectrum", lambda: spectral(LOSSES, torch.ones(3))),
    ],
)
def test_refusals(named: str, call) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        call()
