"""Second-order scoring rules: probabilities by hand, expectations by simulation, verdicts that are known."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Dirichlet

from lossary.uncertainty import check_second_order_propriety, inner_loss, outer_loss, second_order_expected_score

MEAN = (0.2, 0.3, 0.5)


def pairs(input, target):
    """-log probability of two outcomes of one theta under Dir(exp(input)), from Gamma functions."""
    alpha = input.exp()
    counts = torch.nn.functional.one_hot(target, alpha.shape[-1]).sum(-2)
    rise = torch.lgamma(alpha + counts) - torch.lgamma(alpha)
    total = alpha.sum(-1)
    return -(rise.sum(-1) - torch.lgamma(total + 2) + torch.lgamma(total))


@pytest.mark.parametrize("draws", [1, 2])
def test_expected_score_is_the_mean_over_simulated_outcomes(draws):
    loss = inner_loss if draws == 1 else pairs
    truth, forecast = torch.tensor([0.6, 1.5, 3.0]).double(), torch.tensor([2.0, 1.0, 4.0]).double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theta = Dirichlet(truth).sample((400_000,))
        outcomes = torch.stack([torch.multinomial(theta, 1)[:, 0] for _ in range(draws)], -1)
    target = outcomes[:, 0] if draws == 1 else outcomes
    simulated = loss(forecast.log().expand(len(theta), 3), target).mean().item()
    got = second_order_expected_score(loss, forecast.log(), truth, draws=draws).item()
    assert got == pytest.approx(simulated, abs=5e-3)


def test_outcomes_of_a_uniform_coin_by_hand():
    def is_pair(input, target):  # the probability of two alike, then of heads and tails in this order
        alike = (target[..., 0] == target[..., 1]).double()
        return alike + 10.0 * ((target[..., 0] == 0) & (target[..., 1] == 1))

    z = torch.zeros(2, dtype=torch.float64)
    # theta uniform: E[theta^2 + (1 - theta)^2] = 2/3 and E[theta (1 - theta)] = 1/6; at precision 200 nearly 1/2, 1/4
    assert second_order_expected_score(is_pair, z, torch.ones(2).double(), draws=2).item() == pytest.approx(
        2 / 3 + 10 / 6
    )
    narrow = second_order_expected_score(is_pair, z, torch.full((2,), 100.0).double(), draws=2).item()
    assert narrow == pytest.approx(101 / 201 + 10 * 50 / 201)
    three = second_order_expected_score(
        lambda _, y: (y.sum(-1) == 0).double(), z, torch.tensor([2.0, 1.0]).double(), draws=3
    )
    assert three.item() == pytest.approx(2 * 3 * 4 / (3 * 4 * 5))  # E[theta^3]


def test_one_outcome_sees_the_mean_only_and_two_see_more():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(7, 3, generator=g, dtype=torch.float64)
    wide, narrow = (c * torch.tensor(MEAN, dtype=torch.float64) for c in (2.0, 100.0))
    for loss in (inner_loss, partial(inner_loss, score="brier", kl_weight=0.3), outer_loss):
        torch.testing.assert_close(
            second_order_expected_score(loss, z, wide), second_order_expected_score(loss, z, narrow), rtol=1e-12, atol=0
        )
    apart = second_order_expected_score(pairs, z, wide, draws=2) - second_order_expected_score(
        pairs, z, narrow, draws=2
    )
    assert (apart.abs() > 1e-3).all()
    assert second_order_expected_score(outer_loss, z[:, None], torch.stack([wide, narrow])).shape == (7, 2)


def precise(wanted):
    """A loss whose favourite precision is `wanted`."""
    return lambda z, y: (z.logsumexp(-1) - math.log(wanted)).square()


@pytest.mark.parametrize(
    ("loss", "verdict"),
    [
        (inner_loss, "certainty"),
        (partial(inner_loss, score="brier"), "certainty"),
        (outer_loss, "indifferent"),
        (partial(outer_loss, score="brier"), "indifferent"),
        (partial(inner_loss, kl_weight=0.1), "fixed"),
        (partial(outer_loss, kl_weight=0.1), "fixed"),
        (lambda z, y: z.logsumexp(-1), "ignorance"),
        (precise(40.0), "fixed"),
    ],
)
def test_verdicts_of_losses_that_see_one_outcome(loss, verdict):
    assert check_second_order_propriety(loss, MEAN)[0] == verdict


def test_the_favourite_is_found_and_is_faithful_only_by_luck():
    assert check_second_order_propriety(precise(40.0), MEAN)[1] == pytest.approx([40.0] * 3, rel=0.06)
    assert check_second_order_propriety(precise(40.0), MEAN, precisions=(40.0,))[0] == "faithful"
    # flat mean: the best alpha is 1 + 1 / (3 weight) each, whose mean is the given one
    flat = check_second_order_propriety(partial(inner_loss, kl_weight=0.1), (1 / 3,) * 3)[1]
    assert flat == pytest.approx([13.0] * 3, rel=0.06)
    assert all(math.isnan(c) for c in check_second_order_propriety(outer_loss, MEAN)[1])


def test_pairs_are_faithful_and_a_penalty_spoils_it():
    verdict, best = check_second_order_propriety(pairs, MEAN, draws=2)
    assert verdict == "faithful"
    assert best == pytest.approx([2.0, 10.0, 100.0], rel=0.06)
    spoiled = check_second_order_propriety(lambda z, y: pairs(z, y) + 0.01 * precise(2.0)(z, y), MEAN, draws=2)
    assert spoiled[0] == "unfaithful"
    assert spoiled[1][2] < 90


def test_refusals():
    z = torch.zeros(3)
    with pytest.raises(ValueError, match="truth: expected 3 classes last"):
        second_order_expected_score(inner_loss, z, torch.ones(2))
    with pytest.raises(ValueError, match="draws: expected a whole number >= 1"):
        second_order_expected_score(inner_loss, z, torch.ones(3), draws=0)
    with pytest.raises(ValueError, match="input: expected a floating-point tensor"):
        second_order_expected_score(inner_loss, z.long(), torch.ones(3))
    for mean in ((1.0,), (0.5, 0.6), (0.0, 1.0)):
        with pytest.raises(ValueError, match="mean: expected at least two probabilities"):
            check_second_order_propriety(inner_loss, mean)
    with pytest.raises(ValueError, match="precisions: expected at least one"):
        check_second_order_propriety(inner_loss, MEAN, precisions=())
    with pytest.raises(ValueError, match="precisions: expected a number > 0"):
        check_second_order_propriety(inner_loss, MEAN, precisions=(0.0,))
