"""The denoiser of low-rank Gaussians, against full covariances, principal components and brute force."""

import itertools

import pytest
import torch

from lossary.diffusion import MoLRGDenoiser, sample_molrg, subspace_recovery_error


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planes(number: int = 3, dimension: int = 6, rank: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(number, dimension, rank, generator=rng(seed), dtype=torch.float64)).Q


@pytest.mark.parametrize("sigma", [0.1, 1.0, 4.0])
def test_it_is_tweedies_formula_for_the_full_covariances(sigma):
    """x + sigma^2 grad log p(x), p a mixture of N(0, U U' + sigma^2 I)."""
    u, pi = planes(), (0.2, 0.5, 0.3)
    x = (torch.randn(8, 6, generator=rng(1), dtype=torch.float64) * 1.5).requires_grad_()
    parts = [
        torch.distributions.MultivariateNormal(
            torch.zeros(6).double(), b @ b.T + sigma**2 * torch.eye(6).double()
        ).log_prob(x)
        + torch.tensor(p).double().log()
        for b, p in zip(u, pi)
    ]
    (score,) = torch.autograd.grad(torch.stack(parts).logsumexp(0).sum(), x)
    denoise = MoLRGDenoiser(u, weights=[10 * p for p in pi])
    torch.testing.assert_close(denoise(x, sigma).detach(), (x + sigma**2 * score).detach(), rtol=1e-6, atol=1e-6)


def test_with_one_subspace_training_is_principal_components():
    u = planes(1, 8, 3)
    x, _ = sample_molrg(u, 40, generator=rng(1))
    x = x + 0.3 * torch.randn(x.shape, generator=rng(2), dtype=x.dtype)  # so that the axes are not exact
    axes = torch.linalg.svd(x.T).U[None, :, :3]
    denoise = MoLRGDenoiser(planes(1, 8, 3, seed=5))
    optimizer = torch.optim.Adam(denoise.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    for _ in range(300):  # without noise in x: its mean effect on the loss does not depend on the basis
        optimizer.zero_grad()
        (denoise(x, 0.8) - x).square().sum().backward()
        optimizer.step()
        schedule.step()
    assert subspace_recovery_error(denoise.bases.detach(), axes).item() < 1e-4
    assert subspace_recovery_error(denoise.bases.detach(), u).item() > 0.05


def test_samples_have_the_covariance():
    u = planes(2, 4, 2)
    x, k = sample_molrg(u, 100_000, weights=(1.0, 3.0), generator=rng(1))
    assert k.double().mean().item() == pytest.approx(0.75, abs=0.005)
    for number in range(2):
        torch.testing.assert_close(x[k == number].T.cov(), u[number] @ u[number].T, atol=0.03, rtol=0)


def test_the_error_is_that_of_the_best_assignment():
    found, true = planes(3, 6, 2, seed=1), planes(3, 6, 2, seed=2)
    projections = [[b @ b.T for b in bases] for bases in (found, true)]
    brute = min(
        max((projections[0][i] - projections[1][j]).norm().item() for i, j in enumerate(order))
        for order in itertools.permutations(range(3))
    )
    assert subspace_recovery_error(found, true).item() == pytest.approx(brute)
    stacked = subspace_recovery_error(torch.stack([found, true]), torch.stack([true, true[[1, 2, 0]] * 2]))
    assert stacked[0].item() == pytest.approx(brute)
    assert stacked[1].item() == pytest.approx(0, abs=1e-12)


def test_replicas_and_levels():
    bases = torch.stack([planes(seed=s) for s in range(2)]).float()
    x, sigma = torch.randn(2, 5, 6, generator=rng()), torch.rand(2, 5, generator=rng(1)) + 0.2
    stacked = MoLRGDenoiser(bases)(x, sigma)
    for s in range(2):
        for i in range(5):
            one = MoLRGDenoiser(bases[s])(x[s, i : i + 1], sigma[s, i].item())
            torch.testing.assert_close(stacked[s, i : i + 1], one)
    assert set(MoLRGDenoiser(bases).state_dict()) == {"free", "log_weights"}


def test_refusals():
    u = planes()
    for call, message in (
        (lambda: MoLRGDenoiser(u.mT), r"bases: expected \(\*replicas, K, D, d\) with d <= D"),
        (lambda: MoLRGDenoiser(u, weights=(1.0, 0.0, 1.0)), "weights: expected 3 numbers > 0"),
        (lambda: sample_molrg(u[0], 3), "bases: expected 3 dimensions"),
        (lambda: sample_molrg(u, 0), "n: expected a whole number >= 1"),
        (lambda: subspace_recovery_error(u, u[:2]), "true: expected shape"),
        (lambda: subspace_recovery_error(planes(7), planes(7)), "found: expected at most 6 subspaces"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
