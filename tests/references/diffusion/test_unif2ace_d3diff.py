"""UniF2ace's loss against score entropy summed out and a Markov chain's posterior, its experts against a loop over
tokens."""

import itertools
import math

import pytest
import torch

from lossary.diffusion import TokenSequenceMoE, dual_discrete_diffusion_loss
from lossary.diffusion._chain import random_chain
from lossary.diffusion._discrete import absorbing


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("t", [0.05, 0.5, 1.0])
def test_the_loss_is_cross_entropy_and_score_entropy_summed_out(t):
    logits = torch.randn(1, 3, 4, generator=rng(), dtype=torch.float64)
    target, masked = torch.tensor([[2, 0, 3]]), torch.tensor([[True, False, True]])
    total = 0.0
    for i in (0, 2):
        p = logits[0, i].softmax(-1).tolist()
        total -= math.log(p[target[0, i]])
        for y in range(4):
            s, r = p[y] / t, (1 / t if y == target[0, i] else 0.0)
            total += 0.3 * (s - r * math.log(s) + (r * (math.log(r) - 1) if r else 0.0))
    found = dual_discrete_diffusion_loss(
        logits, target, masked=masked, t=torch.tensor([t], dtype=torch.float64), weight=0.3
    )
    assert found.item() == pytest.approx(total / 2, rel=1e-12)
    nothing = torch.zeros_like(masked)
    assert (
        dual_discrete_diffusion_loss(logits, target, masked=nothing, t=torch.tensor([t], dtype=torch.float64)).item()
        == 0
    )


def test_a_chains_posterior_minimises_it():
    """Summed over all texts that fit what is seen: no slope, and the least value is entropy times 1 + a / t."""
    chain = random_chain(3, 4, generator=rng())
    x, t = torch.tensor([[3, 1, 3, 3]]), torch.tensor([0.6], dtype=torch.float64)
    masked = x == 3
    best = chain.predict(absorbing(3), x, t)
    logits = torch.where(masked[..., None], best.log(), 0.0).requires_grad_()  # of what is seen, nothing is asked
    texts = torch.tensor([c for c in itertools.product(range(3), repeat=4) if c[1] == 1])
    chance = chain.log_prob(texts).softmax(0)
    many = (len(texts), -1)
    values = dual_discrete_diffusion_loss(
        logits.expand(*many, -1), texts, masked=masked.expand(many), t=t.expand(len(texts)), weight=0.2
    )
    expected = (chance * values).sum()
    expected.backward()
    assert logits.grad.abs().max().item() < 1e-12
    entropy = -(best * best.log()).sum(-1)[masked].mean()
    assert expected.item() == pytest.approx((1 + 0.2 / 0.6) * entropy.item(), rel=1e-9)


def test_default_weight_and_stacks():
    logits = torch.randn(2, 3, 5, 4, generator=rng())
    target, t = torch.randint(4, (2, 3, 5), generator=rng()), torch.rand(2, 3, generator=rng()) + 0.1
    masked = torch.rand(2, 3, 5, generator=rng(1)) < 0.5
    found = dual_discrete_diffusion_loss(logits, target, masked=masked, t=t)
    one = dual_discrete_diffusion_loss(logits[1, 2], target[1, 2], masked=masked[1, 2], t=t[1, 2], weight=0.01)
    torch.testing.assert_close(found[1, 2], one)


def layer_of(seed: int = 0) -> TokenSequenceMoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TokenSequenceMoE(4, features=(3, 5), experts=3, active=2, hidden=6).double()


def by_hand(layer, x, task, ways):
    """One sequence (L, D), token by token."""
    tokens, counts, gates = [], [0.0] * 3, torch.zeros(3, dtype=torch.float64)
    for token in x:
        gate = (layer.token_gate[task].weight @ token).softmax(-1)
        order = sorted(range(3), key=lambda i: -gate[i])[:2]
        out = layer.shared[task](token) + sum(gate[i] * layer.routed[task][i](token) for i in order)
        tokens.append(out)
        gates += gate
        for i in order:
            counts[i] += 1
    h = torch.stack(tokens)
    gate = (layer.sequence_gate[task].weight @ h.mean(0)).softmax(-1)
    order = sorted(range(3), key=lambda i: -gate[i])[:2]
    made = ways(h)
    y = sum(gate[i] * made[i] for i in order) / sum(gate[i] for i in order)
    balance = sum(3 * c / (2 * len(x)) * g.item() / len(x) for c, g in zip(counts, gates))
    return y, balance, frozenset(order)


def test_generation_in_a_loop():
    layer, x = layer_of(), torch.randn(1, 5, 4, generator=rng(), dtype=torch.float64)
    with torch.no_grad():
        layer.kept.copy_(torch.tensor([0.3, 0.6, 0.8]))
    noise = torch.randn(1, 5, 4, generator=rng(7), dtype=torch.float64)[0]
    used = set()
    for seed in range(12):  # other gates choose other ways
        with torch.no_grad():
            layer.sequence_gate["generation"].weight.normal_(generator=rng(seed))
            y, balance = layer(x, task="generation", generator=rng(7))
            expected = by_hand(layer, x[0], "generation", lambda h: [h, 0 * h, 0.3 * h + 0.7 * noise])
        torch.testing.assert_close(y[0], expected[0])
        used.add(expected[2])
        assert balance.item() == pytest.approx(expected[1])
    assert len(used) == 3


def test_understanding_in_a_loop():
    layer, x = layer_of(), torch.randn(1, 5, 4, generator=rng(), dtype=torch.float64)
    features = [torch.randn(1, 2, width, generator=rng(width), dtype=torch.float64) for width in (3, 5)]
    with torch.no_grad():
        layer.kept.copy_(torch.tensor([0.3, 0.6, 0.8]))

    def ways(h):
        mixed = []
        for w, key, value, f in zip((0.6, 0.8), layer.keys, layer.values, features):
            attention = (h @ key(f[0]).T / 2).softmax(-1) @ value(f[0])  # sqrt(4) = 2
            mixed.append(w * h + (1 - w) * attention)
        return [h, *mixed]

    for seed in range(4):
        with torch.no_grad():
            layer.sequence_gate["understanding"].weight.normal_(generator=rng(seed))
            y, _ = layer(x, task="understanding", features=tuple(features))
            expected = by_hand(layer, x[0], "understanding", ways)
        torch.testing.assert_close(y[0], expected[0])
    again = layer_of(1)
    again.load_state_dict(layer.state_dict())
    torch.testing.assert_close(again(x, task="understanding", features=tuple(features))[0], y)


def test_refusals():
    layer, x = layer_of(), torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="task"):
        layer(x, task="both")
    with pytest.raises(ValueError, match="features"):
        layer(x, task="understanding")
    with pytest.raises(ValueError, match="active"):
        TokenSequenceMoE(4, features=(3, 5), experts=2, active=3)
    target, masked = torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2)
    with pytest.raises(ValueError, match="masked"):
        dual_discrete_diffusion_loss(x, target, masked=masked, t=torch.ones(1))
    with pytest.raises(ValueError, match="t:"):
        dual_discrete_diffusion_loss(x, target, masked=masked.bool(), t=torch.ones(2))
