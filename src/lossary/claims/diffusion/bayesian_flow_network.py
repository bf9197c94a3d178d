"""Bayesian flow networks: a lower bound than masks on text? and what the theory says, with the perfect network.

The texts are random Markov chains, whose entropy and whose perfect guess from any beliefs are known.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ContinuousBFN, DiscreteBFN
from lossary.diffusion._chain import MarkovChain
from lossary.diffusion._discrete import absorbing
from lossary.diffusion._mixture import ring
from lossary.tasks.tokens import chains, fit_tokens, noised_tokens, spread_times, stacked_token_net, texts_of

TOKENS, LENGTH = 8, 8
FLOW = DiscreteBFN(TOKENS, accuracy=2.0)
MASK = absorbing(TOKENS)
EDGE = 1e-3  # of the masked model's times

Loss = Callable[[nn.Module, Tensor, Tensor, Sequence[Generator]], Tensor]


def _flow_loss(accuracy: float) -> Loss:
    bfn = DiscreteBFN(TOKENS, accuracy=accuracy)

    def loss(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
        beliefs = torch.stack([bfn.beliefs(c, s, generator=g) for c, s, g in zip(clean, t, generators)])
        return bfn.loss(network(TOKENS * beliefs - 1, t), clean, t)

    return loss


def _mask_loss(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
    """The cross-entropy of masked tokens over t, nats per token: the bound of masked diffusion in continuous time."""
    t = EDGE + (1 - EDGE) * t
    x = noised_tokens(MASK, clean, t, generators)
    missed = F.cross_entropy(network(x, t).flatten(0, -2), clean.flatten(), reduction="none").view(clean.shape)
    return (missed * (x == TOKENS)).mean(-1) / t


def _bound(seeds: Seeds, *, kind: str, lr: float, accuracy: float = 2.0) -> list[float]:
    """The continuous-time bound on texts not trained on, nats per token."""
    texts = texts_of(chains(TOKENS, LENGTH, seeds))
    loss = _mask_loss if kind == "mask" else _flow_loss(accuracy)
    network = stacked_token_net(LENGTH, TOKENS + (kind == "mask"), TOKENS, seeds)
    fit_tokens(network, texts, loss=loss, seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr)
    test, generators = texts(seeds.few(4000, smoke=8), seeds.torch("test")), seeds.torch("bound")
    with torch.no_grad():
        total = loss(network, test, spread_times(test.shape[1], generators), generators)
        if kind == "flow":
            bfn = DiscreteBFN(TOKENS, accuracy=accuracy)
            total = total + bfn.final_loss(lambda x, t: network(TOKENS * x - 1, t), test, generator=generators[0])
    return total.mean(-1).tolist()


@claim(
    says="Bayesian flow gives a lower bound on text than masked diffusion",
    kind="superiority",
    metric="log-loss",
    scale="bound per token, no steps; Markov chains of 8 tokens, length 8, MLP of 128, 400 steps; 4 settings each",
)
def flow_beats_masks(seeds: Seeds) -> Arms:
    masks = [{"kind": "mask", "lr": lr} for lr in (0.001, 0.003, 0.006, 0.01)]
    flows = [{"kind": "flow", "lr": lr, "accuracy": a} for lr in (0.003, 0.01) for a in (1.5, 3.0)]
    ours, theirs = (tune(_bound, grid, seeds, better="lower") for grid in (flows, masks))
    return Arms(_bound(seeds, **ours), _bound(seeds, **theirs), {"method": ours, "baseline": theirs})


def _perfect(chain: MarkovChain) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda beliefs, t: chain.posterior(beliefs).clamp(min=1e-300).log()


@claim(
    says="With the perfect network, the continuous loss and the final one add up to the entropy of the text",
    kind="equality",
    metric="log-loss",
    scale="nats per token, 4000 texts; Markov chains of 8 tokens, length 8, accuracy 2; no training",
)
def perfect_flow_costs_the_entropy(seeds: Seeds) -> Arms:
    found, entropy = [], []
    for chain, g in zip(chains(TOKENS, LENGTH, seeds), seeds.torch("cost")):
        clean = chain.sample(seeds.few(4000), generator=g)
        t = spread_times(len(clean), [g])[0]
        logits = _perfect(chain)(FLOW.beliefs(clean, t, generator=g), t)
        cost = FLOW.loss(logits, clean, t) + FLOW.final_loss(_perfect(chain), clean, generator=g)
        found.append(cost.mean().item())
        entropy.append(-chain.log_prob(clean).mean().item() / LENGTH)
    return Arms(found, entropy)


@claim(
    says="More messages cost less: the bound falls from 2 to 64 of them",
    kind="trend",
    metric="log-loss",
    levels=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0),
    scale="log2 of messages; nats per token with the perfect network, 2000 texts; Markov chains of 8 tokens, length 8",
)
def more_messages_cost_less(seeds: Seeds) -> Arms:
    rows = []
    for chain, g in zip(chains(TOKENS, LENGTH, seeds), seeds.torch("cost")):
        clean = chain.sample(seeds.few(2000), generator=g)
        end = FLOW.final_loss(_perfect(chain), clean, generator=g).mean()
        row = []
        for power in range(1, 7):
            step = torch.arange(len(clean)) % 2**power + 1
            cost = FLOW.step_loss(_perfect(chain), clean, step, steps=2**power, generator=g)
            row.append((cost.mean() + end).item())
        rows.append(row)
    return Arms(rows)


@claim(
    says="Updating beliefs about numbers is DDPM's posterior step: the mean and variance of each of 30 steps agree",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="sigma 0.01, 30 steps from random beliefs and guesses; relative to the guess's distance and to the variance",
)
def belief_update_is_a_ddpm_step(seeds: Seeds) -> Arms:
    bfn, n = ContinuousBFN(0.01), 30
    gaps = []
    for g in seeds.torch("steps"):
        for i in range(2, n + 1):
            before, after = torch.tensor([i - 1, i]).double() / n
            accuracy = 0.01 ** (-2 * i / n) * (1 - 0.01 ** (2 / n))  # of message i, alpha_i
            precision = 0.01 ** (-2 * (i - 1) / n)  # of the belief, rho
            mu, guess = torch.randn(2, generator=g, dtype=torch.float64)
            mean = (precision * mu + accuracy * guess) / (precision + accuracy)
            variance = accuracy / (precision + accuracy) ** 2
            # In the sampler's coordinates, mu / gamma.
            sigma, lower = bfn.process.ratio(before), bfn.process.ratio(after)
            share = (lower / sigma) ** 2
            x = mu / bfn.process.alpha(before)
            step = guess + share * (x - guess), lower**2 * (1 - share)
            gamma = bfn.process.alpha(after)
            gaps.append(max(abs(mean / gamma - step[0]).item(), abs(variance / gamma**2 / step[1] - 1).item()))
    return Arms(gaps)


def draw(seeds: Seeds) -> list[Panel]:
    """A ring of Gaussians by its perfect network, after few and many messages."""
    truth, g = ring(8), seeds.one(0).torch("draw")[0]
    panels = [Panel("data", points=truth.sample(500, generator=g)[0].numpy())]
    for steps in (5, 20, 100):
        found = ContinuousBFN().sample(truth.denoise, (500, 2), steps=steps, generator=g)
        panels.append(Panel(f"{steps} messages", points=found.numpy()))
    return panels
