"""UniF2ace: do cross-entropy and score entropy together beat either alone? on texts whose law is known."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.diffusion import AbsorbingGraph, TokenSequenceMoE, dual_discrete_diffusion_loss, score_entropy_loss
from lossary.diffusion._discrete import absorbing
from lossary.tasks.tokens import chains, fit_tokens, noised_tokens, spread_times, stacked_token_net, texts_of

TOKENS, LENGTH = 8, 12
MASK = absorbing(TOKENS)
EDGE = 1e-2
RATES = (0.001, 0.003, 0.006, 0.01)


def _loss(kind: str):
    """The sum over the masked tokens instead of their mean, so that score entropy alone is the likelihood bound."""

    def loss(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
        t = (EDGE + (1 - EDGE) * t).float()
        x = noised_tokens(MASK, clean, t, generators)
        masked = x == TOKENS
        logits, share = network(x, t), masked.float().mean(-1)
        if kind == "both":
            return share * dual_discrete_diffusion_loss(logits, clean, masked=masked, t=t)
        plain = share * dual_discrete_diffusion_loss(logits, clean, masked=masked, t=t, weight=0.0)
        return plain if kind == "cross-entropy" else plain / t

    return loss


def _bound(seeds: Seeds, *, kind: str, lr: float) -> list[float]:
    """The bound on -log p of texts not trained on, nats per token."""
    texts = texts_of(chains(TOKENS, LENGTH, seeds))
    network = stacked_token_net(LENGTH, TOKENS + 1, TOKENS, seeds)
    fit_tokens(network, texts, loss=_loss(kind), seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr)
    test, generators = texts(seeds.few(2000, smoke=8), seeds.torch("test")), seeds.torch("bound")
    with torch.no_grad():
        bound = _loss("score entropy")(network, test, spread_times(test.shape[1], generators), generators)
    return bound.mean(-1).tolist()


def _compare(baseline: str, seeds: Seeds) -> Arms:
    ours, theirs = (
        tune(_bound, [{"kind": kind, "lr": lr} for lr in RATES], seeds, better="lower") for kind in ("both", baseline)
    )
    return Arms(_bound(seeds, **ours), _bound(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Cross-entropy with a hundredth of score entropy gives a lower bound than cross-entropy alone",
    kind="superiority",
    metric="log-loss",
    scale="bound per token; Markov chains of 8 tokens, length 12, MLP of 128, 400 steps; 4 learning rates each",
)
def both_beat_cross_entropy(seeds: Seeds) -> Arms:
    return _compare("cross-entropy", seeds)


@claim(
    says="Cross-entropy with a hundredth of score entropy gives a lower bound than score entropy alone",
    kind="superiority",
    metric="log-loss",
    scale="bound per token; Markov chains of 8 tokens, length 12, MLP of 128, 400 steps; 4 learning rates each",
)
def both_beat_score_entropy(seeds: Seeds) -> Arms:
    return _compare("score entropy", seeds)


@claim(
    says="Score entropy of a softmax over masked tokens is its cross-entropy over the mask rate: no second loss",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="random logits, 8 tokens, length 12, mask rates from 0.01 to 0.99; relative difference",
)
def score_entropy_is_weighted_cross_entropy(seeds: Seeds) -> Arms:
    graph, gaps = AbsorbingGraph(TOKENS), []
    for g in seeds.torch("logits"):
        clean = torch.randint(TOKENS, (50, LENGTH), generator=g)
        t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
        sigma = -torch.log1p(-t)
        x = graph.noised(clean, sigma, generator=g)
        x[:, 0] = TOKENS
        logits = torch.randn(*clean.shape, TOKENS, generator=g, dtype=torch.float64)
        log_score = graph.log_score(logits.log_softmax(-1), x, sigma)
        entropy = score_entropy_loss(log_score, clean, x, sigma=sigma, rate=1 / (1 - t), graph=graph)
        masked = x == TOKENS
        pair = [dual_discrete_diffusion_loss(logits, clean, masked=masked, t=t, weight=a) for a in (0.0, 1.0)]
        share = masked.double().mean(-1)
        gaps.append((share * (pair[1] - pair[0]) / entropy - 1).abs().max().item())
    return Arms(gaps)


@claim(
    says="Learning to generate leaves every expert and gate of understanding as it is",
    kind="exact",
    metric="deviation",
    tolerance=0.0,
    scale="largest change of any of their weights in 20 steps of SGD on random tokens, width 16, 4 experts",
)
def groups_do_not_interfere(seeds: Seeds) -> Arms:
    moved = []
    for g in seeds.torch("tokens"):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (), generator=g)))
            layer = TokenSequenceMoE(16, features=(6, 6), hidden=16)
        before = {name: p.clone() for name, p in layer.named_parameters() if "understanding" in name}
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(seeds.few(20, smoke=2)):
            y, balance = layer(torch.randn(4, 5, 16, generator=g), task="generation", generator=g)
            optimizer.zero_grad()
            (y.square().mean() + 0.01 * balance).backward()
            optimizer.step()
        after = dict(layer.named_parameters())
        moved.append(max((after[name] - old).abs().max().item() for name, old in before.items()))
    return Arms(moved)
