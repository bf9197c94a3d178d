"""Pitfalls of second-order losses: numbers by hand, sampled expectations, and the theorems on fitted Dirichlets."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Dirichlet, kl_divergence

from lossary.criterion import Criterion
from lossary.uncertainty import dirichlet_collapse_test, inner_loss, outer_loss, second_order_risk

COUNTS = torch.tensor([[1, 0, 0], [3, 7, 0], [3, 7, 10], [300, 700, 1000]])


def sampled(alpha: torch.Tensor, y: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The log and the Brier score of two million draws of theta, and of their mean."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = Dirichlet(alpha).sample((2_000_000,))
    errors = (theta - F.one_hot(torch.tensor(y), len(alpha))).square().sum(-1)
    return -theta[:, y].log().mean(), errors.mean()


@pytest.mark.parametrize("y", [0, 2])
def test_inner_losses_are_means_over_draws(y):
    alpha = torch.tensor([2.0, 0.8, 5.0], dtype=torch.float64)
    log, brier = sampled(alpha, y)
    target = torch.tensor(y)
    assert inner_loss(alpha.log(), target).item() == pytest.approx(log.item(), abs=3e-3)
    assert inner_loss(alpha.log(), target, score="brier").item() == pytest.approx(brier.item(), abs=1e-3)


def test_outer_losses_are_those_of_the_softmax():
    g = torch.Generator().manual_seed(0)
    z, y = torch.randn(5, 4, generator=g, dtype=torch.float64), torch.tensor([0, 3, 1, 1, 2])
    torch.testing.assert_close(outer_loss(z, y), F.cross_entropy(z, y, reduction="none"))
    squared = F.mse_loss(z.softmax(-1), F.one_hot(y, 4).double(), reduction="none").sum(-1)
    torch.testing.assert_close(outer_loss(z, y, score="brier"), squared)
    # the precision is free: adding a constant to the logits multiplies alpha and changes nothing
    torch.testing.assert_close(outer_loss(z + 3, y), outer_loss(z, y))


@pytest.mark.parametrize("loss", [inner_loss, outer_loss])
@pytest.mark.parametrize("score", ["log", "brier"])
def test_the_kl_is_that_to_the_flat_dirichlet(loss, score):
    alpha, y = torch.tensor([[0.4, 3.0, 8.0], [1.0, 1.0, 1.0]], dtype=torch.float64), torch.tensor([1, 1])
    kl = kl_divergence(Dirichlet(alpha), Dirichlet(torch.ones(3, dtype=torch.float64)))
    weight = torch.tensor([0.2, 0.5], dtype=torch.float64)
    added = loss(alpha.log(), y, score=score, kl_weight=weight) - loss(alpha.log(), y, score=score)
    torch.testing.assert_close(added, weight * kl, rtol=1e-9, atol=1e-12)


def test_risk_by_hand():
    alpha, shares = torch.tensor([2.0, 1.0]).double(), torch.tensor([0.25, 0.75]).double()
    # psi(3) - psi(2) = 1/2 and psi(3) - psi(1) = 3/2
    assert second_order_risk(inner_loss, alpha.log(), shares).item() == pytest.approx(0.25 * 0.5 + 0.75 * 1.5)
    assert second_order_risk(F.cross_entropy, torch.zeros(2), torch.tensor([0.5, 0.5])).item() == pytest.approx(
        math.log(2)
    )
    pairs = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    assert second_order_risk(inner_loss, alpha.log(), pairs).tolist() == pytest.approx([0.5, 1.5])


@pytest.mark.parametrize("score", ["log", "brier"])
def test_inner_losses_collapse_onto_the_frequencies_whatever_n(score):
    alpha, fitted, bayes = dirichlet_collapse_test(partial(inner_loss, score=score), COUNTS[1:])
    assert (fitted < 1e-6).all()
    assert (bayes > 1e-4).all()
    shares = COUNTS[1:] / COUNTS[1:].sum(-1, keepdim=True).double()
    torch.testing.assert_close(alpha / alpha.sum(-1, keepdim=True), shares, atol=1e-4, rtol=0)


@pytest.mark.parametrize("start", [0.1, 20.0])
def test_outer_losses_keep_the_spread_that_they_began_with(start):
    alpha, _, _ = dirichlet_collapse_test(outer_loss, COUNTS[2:], start=start)
    shares = torch.tensor([0.15, 0.35, 0.5], dtype=torch.float64)
    # the gradient is orthogonal to a common shift of the logits: their mean never moves
    scale = (math.log(start) - shares.log().mean()).exp()
    torch.testing.assert_close(alpha, (scale * shares).expand(2, 3), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", [1.0, 0.1, 0.01])
def test_the_kl_weight_alone_sets_the_spread(weight):
    alpha, _, _ = dirichlet_collapse_test(partial(inner_loss, kl_weight=weight), COUNTS)
    shares = COUNTS / COUNTS.sum(-1, keepdim=True).double()
    torch.testing.assert_close(alpha, 1 + shares / weight, rtol=1e-5, atol=0)


def test_a_weight_of_one_over_n_is_bayes():
    weight = 1 / COUNTS.sum(-1).double()
    stacked = partial(inner_loss, kl_weight=weight.unsqueeze(-1))  # one for each row, whatever the outcome
    alpha, fitted, bayes = dirichlet_collapse_test(stacked, COUNTS)
    torch.testing.assert_close(alpha, 1.0 + COUNTS, rtol=1e-5, atol=0, check_dtype=False)
    torch.testing.assert_close(fitted, bayes, rtol=1e-5, atol=0, check_dtype=False)
    # Dir(4, 8): 4/12 * 8/12 / 13 for either class
    beta = dirichlet_collapse_test(partial(inner_loss, kl_weight=0.1), torch.tensor([3, 7]))
    assert [x.item() for x in beta[1:]] == pytest.approx([2 * (4 / 12) * (8 / 12) / 13] * 2, rel=1e-6)


def test_a_loss_of_ones_own_can_be_tested():
    def sharp(input, target):  # asks for alpha_0 = 5
        return (input.logsumexp(-1) - math.log(5)).square() + outer_loss(input, target)

    alpha, _, _ = dirichlet_collapse_test(sharp, torch.tensor([20, 80]))
    assert alpha.tolist() == pytest.approx([1.0, 4.0], rel=1e-5)


def test_refusals():
    z, y = torch.zeros(2, 3), torch.tensor([0, 1])
    for wrong, message in (
        ({"score": "hinge"}, "score: expected one of"),
        ({"kl_weight": -0.1}, "kl_weight: expected a number >= 0"),
    ):
        with pytest.raises(ValueError, match=message):
            inner_loss(z, y, **wrong)
    with pytest.raises(ValueError, match="frequencies: expected 3 classes last"):
        second_order_risk(inner_loss, z, torch.ones(2))
    with pytest.raises(ValueError, match="counts: expected an int64 tensor"):
        dirichlet_collapse_test(inner_loss, torch.ones(2, 3))
    with pytest.raises(ValueError, match="counts: expected at least two classes"):
        dirichlet_collapse_test(inner_loss, torch.ones(2, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="start: expected a number > 0"):
        dirichlet_collapse_test(inner_loss, COUNTS, start=0.0)


def test_it_trains_a_model_as_a_criterion():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=g)
    y = (x[:, 0] > 0).long()
    weight = torch.zeros(3, 2, requires_grad=True)
    criterion = Criterion(inner_loss, kl_weight=0.1)
    optimizer = torch.optim.SGD([weight], lr=1.0)
    before = criterion(x @ weight, y).item()
    for _ in range(50):
        optimizer.zero_grad()
        criterion(x @ weight, y).backward()
        optimizer.step()
    assert ((x @ weight).argmax(-1) == y).double().mean() > 0.9
    assert criterion(x @ weight, y).item() < before
