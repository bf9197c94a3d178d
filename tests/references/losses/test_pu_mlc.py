"""PU-MLC against its formula in scalars, the official code's numbers, and mixtures done by hand."""

import math

import pytest
import torch

from lossary.losses import _blocks, pu_mixup_consistency, pu_multilabel_loss

# Eight samples of three labels, the last of which nobody has; the first label's logits differ little.
Z = torch.sin(torch.arange(24, dtype=torch.float64) ** 2).view(8, 3) * torch.tensor([0.3, 2.0, 1.0])
Y = torch.tensor([[1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]).double()


def temperature(column: list[float], alpha: float) -> float:
    mean = sum(column) / len(column)
    return min(max(alpha * math.sqrt(sum((v - mean) ** 2 for v in column) / len(column)), 0.01), 1.0)


def loss(z: list[list[float]], y: list[list[float]], alpha: float, gamma: float) -> float:
    total = 0.0
    for scores, marks in zip(zip(*z), zip(*y)):
        tau = temperature(list(scores), alpha)
        p = [1 / (1 + math.exp(-v / tau)) for v in scores]
        mean = sum(p) / len(p)
        positives = [math.log(q) for q, mark in zip(p, marks) if mark == 1]
        total += mean**gamma * math.log(mean) - (sum(positives) / len(positives) if positives else 0.0)
    return total


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.55), (2.0, 0.85), (0.5, 0.0)])
def test_the_mean_is_the_loss_of_the_batch(alpha, gamma):
    expected = loss(Z.tolist(), Y.tolist(), alpha, gamma)
    assert pu_multilabel_loss(Z, Y, alpha=alpha, gamma=gamma).mean().item() == pytest.approx(expected, abs=1e-12)
    clips = pu_multilabel_loss(Z.view(2, 4, 3), Y.view(2, 4, 3), alpha=alpha, gamma=gamma)
    assert clips.shape == (2, 4)
    assert clips.mean().item() == pytest.approx(expected, abs=1e-12)


def test_it_is_what_the_official_code_computes():
    # TAKELAMAG/PU-MLC, src/loss_functions/vpu_loss.py: vpuLoss(gamma=0.55, alpha=1.0), which works in single precision
    assert pu_multilabel_loss(Z, Y).mean().item() == pytest.approx(1.1464501595, abs=1e-6)
    unknown = torch.where(Y == 1, 1.0, -1.0)  # absent, unknown: all the same
    assert torch.equal(pu_multilabel_loss(Z, unknown), pu_multilabel_loss(Z, Y))


def test_a_sample_owns_its_positives():
    values, constant = pu_multilabel_loss(Z, Y), pu_multilabel_loss(Z, Y)[1]  # sample 1 has no label
    tau = temperature(Z[:, 1].tolist(), 1.0)
    own = 8 / 3 * math.log1p(math.exp(-Z[3, 1].item() / tau))
    assert (values[3] - constant).item() == pytest.approx(own, abs=1e-12)


@pytest.mark.parametrize(("alpha", "gamma"), [(1.0, 0.55), (0.5, 0.0)])
def test_the_slope_takes_factor_and_temperature_as_constants(alpha, gamma, monkeypatch):
    weights = torch.linspace(0.5, 2, 8, dtype=torch.float64)
    z = Z.clone().requires_grad_()
    tau = torch.tensor([temperature(column, alpha) for column in Z.T.tolist()], dtype=torch.float64)
    p = torch.sigmoid(z / tau)
    pulled = torch.where(Y == 1, p.log(), 0.0) * 8 / Y.sum(0).clamp(min=1)
    values = (p.mean(0).detach() ** gamma * p.mean(0).log()).sum() - pulled.sum(1)
    (expected,) = torch.autograd.grad((weights * values).sum(), z)

    def slope(**how: bool) -> torch.Tensor:
        value = (weights * pu_multilabel_loss(z, Y, alpha=alpha, gamma=gamma)).sum()
        return torch.autograd.grad(value, z, **how)[0]

    assert torch.allclose(slope(), expected, rtol=1e-10)
    assert torch.allclose(slope(create_graph=True), expected, rtol=1e-10)
    monkeypatch.setattr(_blocks, "CELLS", 9)  # three rows at a time
    assert torch.allclose(slope(), expected, rtol=1e-10)
    assert pu_multilabel_loss(Z, Y, alpha=alpha, gamma=gamma).tolist() == pytest.approx(values.tolist(), abs=1e-12)


def test_with_constants_that_do_not_move_all_derivatives_agree():
    few = Z[:4].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: pu_multilabel_loss(z, Y[:4], alpha=1e6, gamma=0.0), few)
    assert torch.autograd.gradgradcheck(lambda z: pu_multilabel_loss(z, Y[:4], alpha=1e6, gamma=0.0), few)


def test_equal_logits_and_single_samples_stay_finite():
    z = torch.full((4, 1), 0.02, requires_grad=True)
    value = pu_multilabel_loss(z, torch.tensor([[1.0], [0.0], [0.0], [0.0]]), gamma=0.0)
    # at tau = 0.01 p is sigmoid(2) for all
    log_p = -math.log1p(math.exp(-2))
    assert value.tolist() == pytest.approx([log_p - 4 * log_p, log_p, log_p, log_p], rel=1e-4)
    assert torch.autograd.grad(value.sum(), z)[0].isfinite().all()
    hopeless = pu_multilabel_loss(torch.tensor([[-1e4], [1e4]]), torch.tensor([[1.0], [0.0]]), gamma=0.0)
    assert (hopeless[0] - hopeless[1]).item() == pytest.approx(2 * 1e4, rel=1e-6)  # -log p does not stop where p does
    alone = pu_multilabel_loss(torch.tensor([[0.3]]), torch.tensor([[1.0]]), gamma=0.0)
    assert alone.item() == pytest.approx(0.0, abs=1e-6)  # tau is 1, log p less log p
    buried = torch.full((64, 1), -1e4, requires_grad=True)
    value = pu_multilabel_loss(buried, torch.zeros(64, 1), gamma=0.0)
    assert value.tolist() == pytest.approx([math.log(1e-10)] * 64)
    assert torch.autograd.grad(value.sum(), buried)[0].isfinite().all()


def mixing(n: int, mix_alpha: float) -> tuple[list[int], float]:
    """What a generator seeded with 3 gives: the order of the first half, and lam."""
    generator = torch.Generator().manual_seed(3)
    order = torch.randperm(n // 2, generator=generator).tolist()
    concentration = torch.full((2,), mix_alpha, dtype=torch.float64)
    return order, torch._sample_dirichlet(concentration, generator)[0].item()


@pytest.mark.parametrize("n", [8, 7])
def test_consistency_by_hand(n):
    w = torch.tensor([[0.7, -1.1, 0.4]], dtype=torch.float64, requires_grad=True)
    x, y = Z[:n, :1], Y[:n]
    value = pu_mixup_consistency(
        lambda x: x @ w, x, y, x @ w, generator=torch.Generator().manual_seed(3), mix_alpha=0.8
    )
    order, lam = mixing(n, 0.8)

    def sigmoid(v: float) -> float:
        return 1 / (1 + math.exp(-v))

    def soft(i: int, c: int) -> float:
        return 1.0 if y[i, c] == 1 else sigmoid(x[i, 0].item() * w[0, c].item())

    half, expected = n // 2, 0.0
    for k, first in enumerate(order):
        second = n - half + k
        for c in range(3):
            t = lam * soft(first, c) + (1 - lam) * soft(second, c)
            mixture = lam * x[first, 0].item() + (1 - lam) * x[second, 0].item()
            expected += (math.log(t + 1e-10) - math.log(sigmoid(mixture * w[0, c].item()) + 1e-10)) ** 2 / half
    assert value.item() == pytest.approx(expected, abs=1e-10)


def test_the_gradient_flows_through_the_soft_target_too():
    w = torch.tensor([[0.7, -1.1, 0.4]], dtype=torch.float64, requires_grad=True)

    def value(w: torch.Tensor) -> torch.Tensor:
        x = Z[:, :1]
        return pu_mixup_consistency(lambda x: x @ w, x, Y, x @ w, generator=torch.Generator().manual_seed(3))

    assert torch.autograd.gradcheck(value, w)


def test_mixing_weights_are_beta_distributed():
    """Variance 1 / (4 (2 a + 1)): a model that returns its inputs as probabilities tells lam."""
    seen: list[float] = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(x[0, 0].item())
        return x

    generator = torch.Generator().manual_seed(0)
    x, y = torch.tensor([[1.0], [0.0]]), torch.zeros(2, 1)
    for _ in range(2000):
        pu_mixup_consistency(model, x, y, x, generator=generator, mix_alpha=0.3)
    lam = torch.tensor(seen, dtype=torch.float64)
    assert lam.mean().item() == pytest.approx(0.5, abs=0.036)  # four standard errors
    assert lam.var().item() == pytest.approx(1 / (4 * 1.6), abs=0.008)


def test_refusals():
    x, g = Z[:, :1], torch.Generator()
    with pytest.raises(ValueError, match="alpha: expected a number > 0"):
        pu_multilabel_loss(Z, Y, alpha=0.0)
    with pytest.raises(ValueError, match="gamma: expected a number, got a tensor"):
        pu_multilabel_loss(Z, Y, gamma=torch.tensor(1.0))
    with pytest.raises(ValueError, match="x: expected as many rows as input, at least two, got 1 and 1"):
        pu_mixup_consistency(torch.nn.Identity(), x[:1], Y[:1], Z[:1], generator=g)
    with pytest.raises(ValueError, match="x: expected as many rows as input, at least two, got 7 and 8"):
        pu_mixup_consistency(torch.nn.Identity(), x[:7], Y, Z, generator=g)
    with pytest.raises(ValueError, match="target: expected shape"):
        pu_mixup_consistency(torch.nn.Identity(), x, Y[:, :2], Z, generator=g)
    with pytest.raises(ValueError, match="mix_alpha: expected a number > 0"):
        pu_mixup_consistency(torch.nn.Identity(), x, Y, Z, generator=g, mix_alpha=0.0)
