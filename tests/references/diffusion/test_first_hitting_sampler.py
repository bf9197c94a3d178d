"""First-hitting sampler against all texts of a small chain, the waiting times of its definition, and simulation."""

import itertools
import math

import pytest
import torch
from scipy.integrate import quad

from lossary.diffusion import (
    first_hitting,
    mask_uniformly,
    order_agnostic_loss,
    truncated_gumbel_probabilities,
)
from lossary.diffusion._chain import random_chain
from lossary.diffusion._discrete import absorbing
from lossary.diffusion.first_hitting_sampler import _FLOAT32_GUMBEL


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CHAIN = random_chain(3, 4, generator=rng(5))


def perfect(x, t):
    return CHAIN.predict(absorbing(3), x, torch.full_like(t, 0.5))


def test_samples_with_the_perfect_network_are_the_chain_s():
    found = first_hitting(perfect, torch.full((20_000, 4), 3), mask=3, generator=rng())
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    share = torch.bincount((found * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81) / 20_000
    assert 0.5 * (share - CHAIN.log_prob(every).exp()).abs().sum() < 0.03  # 0.02 is chance


def test_a_gap_is_filled_in_given_the_rest():
    x = torch.tensor([[0, 3, 3, 2], [1, 2, 3, 0]]).repeat(10_000, 1)
    found = first_hitting(perfect, x, mask=3, generator=rng())
    assert torch.equal(found[x != 3], x[x != 3])
    every = torch.tensor([(0, a, b, 2) for a in range(3) for b in range(3)])
    expected = CHAIN.log_prob(every).exp()
    share = torch.bincount(3 * found[::2, 1] + found[::2, 2], minlength=9) / 10_000
    assert 0.5 * (share - expected / expected.sum()).abs().sum() < 0.02


def test_times_and_places_are_those_of_independent_tokens():
    """n uniform numbers, each token's own time, sorted downwards; the token with the latest time comes first."""
    times, masks = [], []

    def predict(x, t):
        times.append(t)
        masks.append(x == 1)
        return torch.tensor([1.0, 0.0]).expand(*x.shape, 2)

    first_hitting(predict, torch.ones(50_000, 3, dtype=torch.long), mask=1, generator=rng())
    assert [t.mean().item() for t in times] == pytest.approx([3 / 4, 2 / 4, 1 / 4], abs=0.005)
    assert [t.square().mean().item() for t in times] == pytest.approx([3 / 5, 3 / 10, 1 / 10], abs=0.005)
    assert [m.sum(-1).unique().tolist() for m in masks] == [[3], [2], [1]]
    torch.testing.assert_close((~masks[1]).double().mean(0), torch.full((3,), 1 / 3).double(), atol=0.01, rtol=0)
    late = first_hitting(predict, torch.tensor([[1, 0, 1]]), mask=1, time=lambda share: 7 + 0 * share)
    assert late.tolist() == [[0, 0, 0]]
    assert times[-1].item() == 7


def test_several_tokens_in_a_call():
    calls = []

    def predict(x, t):
        calls.append(x)
        return perfect(x, t)

    x = torch.tensor([[3, 3, 3, 3], [3, 0, 3, 3], [0, 1, 2, 0]])
    found = first_hitting(predict, x, mask=3, per_call=3, generator=rng())
    assert len(calls) == 2
    assert [(c == 3).sum(-1).tolist() for c in calls] == [[4, 3, 0], [1, 0, 0]]
    assert found.max() < 3
    assert torch.equal(found[2], x[2])
    zeros = first_hitting(
        lambda x, t: torch.tensor([1.0, 0.0, 0.0]).expand(*x.shape, 3), torch.tensor([[3, 2, 3], [2, 1, 2]]), mask=3
    )
    assert zeros.tolist() == [[0, 2, 0], [2, 1, 2]]
    assert first_hitting(predict, torch.empty(0, 4, dtype=torch.long), mask=3).shape == (0, 4)


def test_masks_are_uniform_in_number():
    masked = mask_uniformly(torch.zeros(60_000, 3, dtype=torch.long), mask=9, generator=rng()) == 9
    number = torch.bincount(masked.sum(-1), minlength=4) / 60_000
    torch.testing.assert_close(number, torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]), atol=0.01, rtol=0)
    torch.testing.assert_close(masked.double().mean(0), torch.full((3,), 2 / 3).double(), atol=0.01, rtol=0)


def test_the_loss_is_the_bound_in_continuous_time():
    """Length 2: the integral of E[sum of masked -log p] / t over t, by quadrature."""
    logits = torch.randn(4, 2, 3, generator=rng(), dtype=torch.float64)  # one guess for each pattern of masks
    clean = torch.tensor([1, 2])
    cost = -logits.log_softmax(-1)[:, [0, 1], clean]
    patterns = [(0, 0), (1, 0), (0, 1), (1, 1)]

    def rate(t):
        chance = [math.prod(t if m else 1 - t for m in pattern) for pattern in patterns]
        return sum(c * sum(v for v, m in zip(row, p) if m) for c, row, p in zip(chance, cost.tolist(), patterns)) / t

    expected = quad(rate, 0, 1)[0] / 2
    values = [order_agnostic_loss(z, clean, masked=torch.tensor(p).bool()).item() for z, p in zip(logits, patterns)]
    assert values[0] == 0
    assert (values[1] + values[2]) / 4 + values[3] / 2 == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("bound", [0.5, 2.0, 5.0])
def test_cut_off_noise_by_integration_and_by_simulation(bound):
    p = torch.tensor([0.05, 0.6, 0.0, 0.35], dtype=torch.float64)
    found = truncated_gumbel_probabilities(p, bound=bound)
    top = math.exp(-math.exp(-bound))

    def below(value):
        return min(1.0, math.exp(-math.exp(-value)) / top)

    live = [0, 1, 3]
    for i in live:
        others = [math.log(p[i].item() / p[j].item()) for j in live if j != i]
        wins = quad(
            lambda g, o=others: math.exp(-g - math.exp(-g)) / top * math.prod(below(g + shift) for shift in o),
            -6,
            bound,
            limit=200,
        )[0]
        assert found[i].item() == pytest.approx(wins, abs=1e-6)
    assert found[2] == 0
    uniform = top * torch.rand(200_000, 4, generator=rng(), dtype=torch.float64)
    drawn = torch.bincount((p.log() - (-uniform.log()).log()).argmax(-1), minlength=4) / 200_000
    torch.testing.assert_close(found.float(), drawn, atol=0.005, rtol=0)


def test_64_bits_are_enough_and_32_are_not():
    largest = torch.tensor(1 - 2.0**-24)  # of torch.rand in float32
    assert torch.nextafter(largest, torch.tensor(2.0)) >= 1 - 2.0**-25
    assert pytest.approx(-(-largest.double().log()).log().item(), rel=1e-9) == _FLOAT32_GUMBEL
    rare = torch.tensor([1 - 1e-8, 1e-8], dtype=torch.float64)
    assert truncated_gumbel_probabilities(rare)[1] < 1e-9
    assert truncated_gumbel_probabilities(rare, bound=53 * math.log(2))[1].item() == pytest.approx(1e-8, rel=1e-4)


def test_refusals():
    with pytest.raises(ValueError, match="x:"):
        first_hitting(perfect, torch.zeros(4, dtype=torch.long), mask=3)
    with pytest.raises(ValueError, match="per_call"):
        first_hitting(perfect, torch.zeros(1, 4, dtype=torch.long), mask=3, per_call=0)
    with pytest.raises(ValueError, match="masked"):
        order_agnostic_loss(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), masked=torch.ones(2))
    with pytest.raises(ValueError, match="clean"):
        mask_uniformly(torch.zeros(2), mask=1)
    with pytest.raises(ValueError, match="bound"):
        truncated_gumbel_probabilities(torch.ones(1), bound=0.0)
