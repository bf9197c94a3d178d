"""SEDD against matrix exponentials, against the formula in loops, and against chains whose ratios are known."""

import itertools
import math

import pytest
import torch

from lossary.diffusion import AbsorbingGraph, SEDDSampler, UniformGraph, log_linear_noise, score_entropy_loss
from lossary.diffusion._chain import random_chain
from lossary.diffusion._discrete import absorbing, uniform

GRAPHS = {"absorbing": AbsorbingGraph(3), "uniform": UniformGraph(3)}
CHAIN = random_chain(3, 4, generator=torch.Generator().manual_seed(5))


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generator_of(name: str) -> torch.Tensor:
    """Q with Q[i, j] the rate from i to j."""
    if name == "uniform":
        return torch.full((3, 3), 1 / 3, dtype=torch.float64) - torch.eye(3, dtype=torch.float64)
    q = torch.zeros(4, 4, dtype=torch.float64)
    q[:3, 3] = 1.0
    return q - torch.diag(q.sum(1))


@pytest.mark.parametrize("name", GRAPHS)
def test_closed_forms_are_those_of_the_matrix_exponential(name):
    graph, q, sigma = GRAPHS[name], generator_of(name), torch.tensor([0.7], dtype=torch.float64)
    states, moved = torch.arange(graph.states)[None], torch.matrix_exp(0.7 * q)
    torch.testing.assert_close(graph.reached(states, sigma)[0], moved.T)  # [x, y] = P(y -> x)
    torch.testing.assert_close(graph.incoming(states)[0].double(), (q - torch.diag(q.diagonal())).T)
    score = torch.rand(1, 2, graph.states, generator=rng(), dtype=torch.float64)
    # p at an earlier time is p exp(-sigma Q), and the score is p over a number.
    torch.testing.assert_close(graph.earlier(score, sigma), score @ torch.matrix_exp(-0.7 * q))
    for clean, x in itertools.product(range(3), range(graph.states)):
        if moved[clean, x] == 0 or (name == "absorbing" and x < 3):
            continue
        found = graph.ratios(torch.tensor([[x]]), torch.tensor([[clean]]), sigma)[0, 0]
        rates = graph.incoming(torch.tensor([[x]]))[0, 0] > 0
        torch.testing.assert_close(found[rates], (moved[clean] / moved[clean, x])[rates])
    clean = torch.tensor([[0, 1, 2]]).repeat(20_000, 20)
    noised = graph.noised(clean, sigma.expand(20_000), generator=rng())
    for v in range(3):
        share = torch.bincount(noised[clean == v], minlength=graph.states) / (clean == v).sum()
        torch.testing.assert_close(share, moved[v].float(), atol=5e-3, rtol=0)
    assert graph.prior().tolist() == ([0, 0, 0, 1] if name == "absorbing" else pytest.approx([1 / 3] * 3))


@pytest.mark.parametrize("name", GRAPHS)
def test_the_loss_term_by_term(name):
    graph, q = GRAPHS[name], generator_of(name)
    sigma, rate = log_linear_noise(torch.tensor([0.4], dtype=torch.float64))
    assert sigma.item() == pytest.approx(-math.log(1 - 0.999 * 0.4))
    assert rate.item() == pytest.approx(0.999 / (1 - 0.999 * 0.4))
    moved = torch.matrix_exp(sigma * q)
    clean, x = torch.tensor([[0, 1, 2]]), torch.tensor([[graph.states - 1, 1, graph.states - 1]])
    log_score = torch.randn(1, 3, graph.states, generator=rng(), dtype=torch.float64)
    total = 0.0
    for i, y in itertools.product(range(3), range(graph.states)):
        v, here, s = clean[0, i], x[0, i], log_score[0, i, y].exp().item()
        if y == here or q[y, here] == 0:
            continue
        r = (moved[v, y] / moved[v, here]).item()
        total += q[y, here].item() * (s - r * math.log(s) + (r * (math.log(r) - 1) if r > 0 else 0.0))
    found = score_entropy_loss(log_score, clean, x, sigma=sigma, rate=rate, graph=graph)
    assert found.item() == pytest.approx(rate.item() * total / 3, rel=1e-9)
    best = graph.ratios(x, clean, sigma).clamp(min=1e-300).log()
    assert score_entropy_loss(best, clean, x, sigma=sigma, rate=rate, graph=graph).item() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "method"), [("absorbing", "analytic"), ("absorbing", "euler"), ("uniform", "analytic")]
)
def test_samples_with_the_perfect_score_are_the_chain_s(name, method):
    process = {"absorbing": absorbing, "uniform": uniform}[name](3, lambda t: 1 - 0.999 * t)

    def log_score(x, sigma):
        assert sigma.shape == (len(x),)
        return CHAIN.ratios(process, x, -(-sigma).expm1() / 0.999).clamp(min=1e-300).log()

    n, sampler = 10_000, SEDDSampler(GRAPHS[name], steps=60, method=method)
    found = sampler(log_score, sampler.start((n, 4), generator=rng(1)), generator=rng(2))
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    share = torch.bincount((found * torch.tensor([27, 9, 3, 1])).sum(-1), minlength=81) / n
    assert 0.5 * (share - CHAIN.log_prob(every).exp()).abs().sum() < 0.055  # 0.035 is chance


def test_what_is_known_stays_and_the_rest_follows_it():
    process = absorbing(3, lambda t: 1 - 0.999 * t)
    x = torch.tensor([[0, 3, 3, 2]]).repeat(10_000, 1)
    found = SEDDSampler(GRAPHS["absorbing"], steps=60)(
        lambda x, sigma: CHAIN.ratios(process, x, -(-sigma).expm1() / 0.999).clamp(min=1e-300).log(),
        x,
        known=x < 3,
        generator=rng(),
    )
    assert torch.equal(found[x < 3], x[x < 3])
    expected = CHAIN.log_prob(torch.tensor([(0, a, b, 2) for a in range(3) for b in range(3)])).exp()
    share = torch.bincount(3 * found[:, 1] + found[:, 2], minlength=9) / 10_000
    assert 0.5 * (share - expected / expected.sum()).abs().sum() < 0.03


def test_what_a_poor_score_leaves_masked_is_filled_in_at_the_end():
    graph = GRAPHS["absorbing"]

    def log_score(x, sigma):  # half of the true ratios
        return graph.log_score(torch.full((*x.shape, 3), math.log(0.5 / 3)), x, sigma)

    assert SEDDSampler(graph, steps=3)(log_score, torch.full((500, 4), 3), generator=rng()).max() < 3


def test_a_jump_of_euler_s_takes_its_share_of_time():
    seen = []

    def log_score(x, sigma):
        seen.append((x == 3).double().mean().item())
        return GRAPHS["absorbing"].log_score(torch.full((*x.shape, 3), -math.log(3)), x, sigma)

    SEDDSampler(GRAPHS["absorbing"], steps=50, method="euler")(log_score, torch.full((5000, 4), 3), generator=rng())
    assert seen[10] == pytest.approx(0.8, abs=0.02)
    assert seen[25] == pytest.approx(0.5, abs=0.02)


def test_a_softmax_over_e_sigma_minus_1_is_the_score_of_masks():
    """Then score entropy is cross-entropy over e^sigma - 1."""
    graph, sigma = GRAPHS["absorbing"], torch.tensor([0.9], dtype=torch.float64)
    raw = torch.randn(1, 2, 3, generator=rng(), dtype=torch.float64).log_softmax(-1)
    clean, x = torch.tensor([[2, 0]]), torch.tensor([[3, 0]])
    log_score = graph.log_score(raw, x, sigma)
    assert log_score[0, 1, 0] == log_score[0, 0, 3] == 0
    found = score_entropy_loss(log_score, clean, x, sigma=sigma, rate=torch.ones_like(sigma), graph=graph)
    assert found.item() == pytest.approx(-raw[0, 0, 2].item() / (math.exp(0.9) - 1) / 2, rel=1e-9)
    assert GRAPHS["uniform"].log_score(raw, clean, sigma)[0, 0].tolist() == [*raw[0, 0, :2].tolist(), 0.0]


def test_refusals():
    graph, clean, one = GRAPHS["uniform"], torch.zeros(2, 4, dtype=torch.long), torch.ones(2)
    with pytest.raises(ValueError, match="log_score"):
        score_entropy_loss(torch.zeros(2, 4, 2), clean, clean, sigma=one, rate=one, graph=graph)
    with pytest.raises(ValueError, match="sigma"):
        score_entropy_loss(torch.zeros(2, 4, 3), clean, clean, sigma=torch.ones(3), rate=one, graph=graph)
    with pytest.raises(ValueError, match="method"):
        SEDDSampler(graph, steps=4, method="tweedie")
    with pytest.raises(ValueError, match="steps"):
        SEDDSampler(graph, steps=0)
    with pytest.raises(ValueError, match="known"):
        SEDDSampler(graph, steps=1)(lambda x, s: torch.zeros(2, 4, 3), clean, known=torch.ones(2, 3).bool())
    with pytest.raises(ValueError, match="eps"):
        log_linear_noise(torch.tensor(0.5), eps=0.0)
