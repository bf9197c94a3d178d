"""D3PM against eq. 4 written out in loops, and against texts whose law is known."""

import itertools
import math

import pytest
import torch

from lossary.diffusion import (
    D3PM,
    absorbing_transition,
    cosine_rates,
    discretized_gaussian_transition,
    uniform_transition,
)

RATES = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
MATRICES = {"uniform": uniform_transition, "absorbing": absorbing_transition, "near": discretized_gaussian_transition}


def by_hand(matrices, logits, clean: int, x: int, t: int, k: int) -> float:
    """The divergence of one token, from products of python floats."""
    steps, states = matrices.tolist(), matrices.shape[-1]

    def path(start: int, end: int, times: range) -> float:
        """q(x_end | x_start) by summing over all paths."""
        between = itertools.product(range(states), repeat=max(len(times) - 1, 0))
        if not times:
            return float(start == end)
        return math.fsum(
            math.prod(steps[s][a][b] for s, (a, b) in zip(times, itertools.pairwise((start, *mid, end))))
            for mid in between
        )

    guess = [math.exp(z) for z in logits]
    guess = [g / sum(guess) for g in guess]
    q = [steps[t - 1][j][x] * path(clean, j, range(t - 1)) for j in range(states)]
    if t == 1:
        p = [*guess, 0.0][:states]
    else:
        p = [
            math.fsum(guess[v] * steps[t - 1][j][x] * path(v, j, range(t - 1)) for v in range(k)) for j in range(states)
        ]
    q, p = [a / sum(q) for a in q], [a / sum(p) for a in p]
    return math.fsum(a * math.log(a / b) for a, b in zip(q, p) if a > 0)


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("t", [1, 2, 3])
def test_the_loss_is_the_divergence_over_all_paths_and_the_cross_entropy(name, t):
    matrices = MATRICES[name](3, RATES)
    logits = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
    clean, x = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0, 1, 2, 2]])
    x = torch.full_like(x, 3) if name == "absorbing" else x.flip(-1) if t > 1 else x
    expected = [by_hand(matrices, logits[0, i].tolist(), int(clean[0, i]), int(x[0, i]), t, 3) for i in range(4)]
    cross = [-logits[0, i].log_softmax(-1)[clean[0, i]].item() for i in range(4)]
    found = D3PM(3, matrices, hybrid=0.25).loss(logits, clean, x, torch.tensor([t]))
    assert found.item() == pytest.approx(sum(expected) / 4 + 0.25 * sum(cross) / 4, rel=1e-10)


@pytest.mark.parametrize("name", MATRICES)
def test_the_bound_of_the_perfect_network_is_the_entropy(name):
    """One token of known law: eq. 4 with the law itself as the guess is the exact reverse chain."""
    law = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    matrices = MATRICES[name](3, torch.tensor([0.3, 0.6, 1.0]))
    model = D3PM(3, matrices, hybrid=0.0)
    clean = torch.arange(3)[:, None]

    def predict(x, t):
        own = model.process.likelihood(x, t) if t[0] == 1 else 1.0
        return (own * law).log().expand(*x.shape, 3)

    reached = model.process.cumulative(torch.tensor(3.0, dtype=torch.float64))[:3]
    prior = model.process.prior
    total = (law[:, None] * torch.special.xlogy(reached, reached / prior).nan_to_num()).sum()
    for t in (1, 2, 3):
        time = torch.full((3,), t)
        for state in range(model.process.states):
            x = torch.full((3, 1), state)
            chance = law * model.process.cumulative(time.double()[0])[:3, state]
            seen = chance > 0
            if not seen.any():
                continue
            value = model.loss(predict(x[seen], time[seen]), clean[seen], x[seen], time[seen])
            total = total + (chance[seen] * value).sum()
    last = law @ reached
    short = torch.special.xlogy(last, last / prior).nan_to_num().sum()  # the chain has not quite reached its prior
    assert total.item() == pytest.approx((short - (law * law.log()).sum()).item(), abs=1e-6)
    many = clean[torch.multinomial(law, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))]
    estimate = model.bound(predict, many, generator=torch.Generator().manual_seed(1)).mean()
    assert estimate.item() == pytest.approx(total.item(), abs=0.02)
    chance = prior
    for t in (3, 2, 1):
        x, time = torch.arange(model.process.states)[:, None], torch.full((model.process.states,), t)
        step = model.reverse(predict(x, time), x, time)[:, 0]
        chance = chance[: model.process.states] @ torch.where(chance[:, None] > 0, step, 0.0)
    samples = model.sample(predict, (40_000, 1), generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        torch.bincount(samples[:, 0], minlength=model.process.states) / 40_000, chance.float(), atol=0.01, rtol=0
    )


def test_matrices():
    near = discretized_gaussian_transition(5, RATES)
    torch.testing.assert_close(near.sum(-1), torch.ones(3, 5, dtype=torch.float64))
    torch.testing.assert_close(near.sum(-2), torch.ones(3, 5, dtype=torch.float64))
    weight = [math.exp(-4 * n * n / (16 * 0.5)) for n in range(-4, 5)]
    assert near[1, 1, 3].item() == pytest.approx(math.exp(-4 * 4 / (16 * 0.5)) / sum(weight))
    masked = D3PM(3, absorbing_transition(3, 1 / torch.arange(6, 0, -1.0))).process
    share = masked.cumulative(torch.arange(7.0))[:, 0, 3]
    torch.testing.assert_close(share, torch.arange(7.0, dtype=torch.float64) / 6, rtol=1e-6, atol=1e-6)
    kept = (1 - cosine_rates(10)[:5]).prod()  # (cos at 0.508 / 1.008) / (cos at 0.008 / 1.008)
    assert kept.item() == pytest.approx(math.cos(math.pi / 2 * 0.508 / 1.008) / math.cos(math.pi / 2 * 0.008 / 1.008))
    assert cosine_rates(10)[-1] == 0.999
    assert uniform_transition(4, RATES)[2, 0, 1].item() == pytest.approx(0.9 / 4)


def test_gradients_reach_the_logits_and_stacks_are_batches():
    model = D3PM(3, discretized_gaussian_transition(3, RATES))
    g = torch.Generator().manual_seed(0)
    clean, t = torch.randint(3, (2, 5, 4), generator=g), torch.randint(1, 4, (2, 5), generator=g)
    x = model.noised(clean, t, generator=g)
    logits = (1e3 * torch.randn(2, 5, 4, 3, generator=g)).requires_grad_()
    found = model.loss(logits, clean, x, t)
    torch.testing.assert_close(found[1, 3], model.loss(logits[1, 3], clean[1, 3], x[1, 3], t[1, 3]))
    found.sum().backward()
    assert logits.grad.isfinite().all()


def test_refusals():
    model = D3PM(3, uniform_transition(3, RATES))
    clean, t = torch.zeros(2, 4, dtype=torch.long), torch.ones(2, dtype=torch.long)
    with pytest.raises(ValueError, match="logits"):
        model.loss(torch.zeros(2, 4, 4), clean, clean, t)
    with pytest.raises(ValueError, match="t:"):
        model.noised(clean, t.double())
    with pytest.raises(ValueError, match="steps"):
        D3PM(4, uniform_transition(3, RATES))
    with pytest.raises(ValueError, match="rates"):
        uniform_transition(3, torch.tensor(0.5))
    with pytest.raises(ValueError, match="transitions"):
        D3PM(3, uniform_transition(3, 3 * RATES))
    with pytest.raises(ValueError, match="tokens"):
        absorbing_transition(1, RATES)
