"""SEDD: does score entropy beat cross-entropy and squared ratios? and what holds with the perfect score.

The texts are random Markov chains, whose entropy and whose perfect ratios at any noise are known.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.diffusion import AbsorbingGraph, SEDDSampler, UniformGraph, log_linear_noise, score_entropy_loss
from lossary.diffusion._chain import MarkovChain
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._discrete import absorbing, uniform
from lossary.tasks.tokens import chains, fit_tokens, pair_error, spread_times, stacked_token_net, texts_of

TOKENS, LENGTH = 8, 8
MASK, ANY = AbsorbingGraph(TOKENS), UniformGraph(TOKENS)
RATES = (0.001, 0.003, 0.006, 0.01)
EDGE = 1e-3

Loss = Callable[[nn.Module, Tensor, Tensor, Sequence[Generator]], Tensor]


def _noised(clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> tuple[Tensor, Tensor, Tensor]:
    sigma, rate = log_linear_noise(EDGE + (1 - EDGE) * t)
    x = torch.stack([MASK.noised(c, s, generator=g) for c, s, g in zip(clean, sigma, generators)])
    return x, sigma, rate


def _log_score(network: nn.Module, x: Tensor, sigma: Tensor) -> Tensor:
    return MASK.log_score(network(x, -(-sigma).expm1()), x, sigma)


def _entropy(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Score entropy, the bound in nats per token."""
    x, sigma, rate = _noised(clean, t, generators)
    return score_entropy_loss(_log_score(network, x, sigma), clean, x, sigma=sigma, rate=rate, graph=MASK)


def _squares(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
    """The squared error of the ratios under the same rates, in units of 1 / (e^sigma - 1)."""
    x, sigma, rate = _noised(clean, t, generators)
    miss = _log_score(network, x, sigma).exp() - MASK.ratios(x, clean, sigma)
    scale = rate * sigma.expm1()
    return scale * (MASK.incoming(x).to(miss) * miss.square()).sum(-1).mean(-1)


def _cross_entropy(network: nn.Module, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
    """Masked diffusion that guesses the clean token by a softmax: the same bound, cross-entropy over e^sigma - 1."""
    x, sigma, rate = _noised(clean, t, generators)
    logits = network(x, -(-sigma).expm1())
    missed = F.cross_entropy(logits.flatten(0, -2), clean.flatten(), reduction="none").view(clean.shape)
    return rate / sigma.expm1() * (missed * (x == TOKENS)).mean(-1)


LOSSES: dict[str, Loss] = {"entropy": _entropy, "squares": _squares, "cross-entropy": _cross_entropy}


def _trained(seeds: Seeds, *, loss: str, lr: float):
    languages = chains(TOKENS, LENGTH, seeds)
    network = stacked_token_net(LENGTH, TOKENS + 1, TOKENS, seeds)
    fit_tokens(network, texts_of(languages), loss=LOSSES[loss], seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr)
    return network, languages


def _bound(seeds: Seeds, *, loss: str, lr: float) -> list[float]:
    network, languages = _trained(seeds, loss=loss, lr=lr)
    test = texts_of(languages)(seeds.few(2000, smoke=8), seeds.torch("test"))
    generators = seeds.torch("bound")
    with torch.no_grad():
        return LOSSES[loss](network, test, spread_times(test.shape[1], generators), generators).mean(-1).tolist()


def _pairs(seeds: Seeds, *, loss: str, lr: float) -> tuple[list[float], int]:
    """Errors, and the evaluations that a text takes."""
    network, languages = _trained(seeds, loss=loss, lr=lr)
    counted = Counted(lambda x, sigma: _log_score(network, x, sigma))
    start = torch.full((len(seeds), seeds.few(1000, smoke=8), LENGTH), TOKENS)
    found = SEDDSampler(MASK, steps=seeds.few(32, smoke=2))(counted, start, generator=seeds.torch("draw")[0])
    return pair_error(found, languages).tolist(), counted.evaluations


def _tuned(score: Callable[..., list[float]], losses: Sequence[str], seeds: Seeds) -> list[dict]:
    return [tune(score, [{"loss": loss, "lr": lr} for lr in RATES], seeds, better="lower") for loss in losses]


@claim(
    says="Learning ratios by score entropy gives a lower bound than guessing clean tokens by cross-entropy",
    kind="superiority",
    metric="log-loss",
    scale="bound per token, masks; Markov chains of 8 tokens, length 8, MLP of 128, 400 steps; 4 learning rates each",
)
def score_entropy_beats_cross_entropy(seeds: Seeds) -> Arms:
    ours, theirs = _tuned(_bound, ("entropy", "cross-entropy"), seeds)
    return Arms(_bound(seeds, **ours), _bound(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Score entropy gives samples nearer the truth than the squared error of the ratios",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 33 evaluations; Markov chains of 8 tokens, length 8, 400 steps; 4 settings each",
)
def score_entropy_beats_squares(seeds: Seeds) -> Arms:
    ours, theirs = _tuned(lambda *a, **setting: _pairs(*a, **setting)[0], ("entropy", "squares"), seeds)
    errors, evaluations = zip(*(_pairs(seeds, **setting) for setting in (ours, theirs)))
    return Arms(*errors, {"evaluations": list(evaluations), "method": ours, "baseline": theirs})


@claim(
    says="The score entropy of the perfect ratios is the entropy of the text",
    kind="equality",
    metric="log-loss",
    scale="nats per token, masks, 4000 texts; Markov chains of 8 tokens, length 8; no training",
)
def perfect_ratios_cost_the_entropy(seeds: Seeds) -> Arms:
    process = absorbing(TOKENS, lambda t: 1 - (1 - 1e-3) * t)
    found, entropy = [], []
    for chain, g in zip(chains(TOKENS, LENGTH, seeds), seeds.torch("cost")):
        clean = chain.sample(seeds.few(4000), generator=g)
        t = spread_times(len(clean), [g])[0]
        sigma, rate = log_linear_noise(t)
        x = MASK.noised(clean, sigma, generator=g)
        log_score = chain.ratios(process, x, t).clamp(min=1e-300).log()
        cost = score_entropy_loss(log_score, clean, x, sigma=sigma, rate=rate, graph=MASK)
        found.append(cost.mean().item())
        entropy.append(-chain.log_prob(clean).mean().item() / LENGTH)
    return Arms(found, entropy)


def _perfect(chain: MarkovChain, method: str, steps: int, n: int, generator: Generator) -> tuple[Tensor, int]:
    """Texts, and the evaluations that each takes."""
    process = uniform(TOKENS, lambda t: 1 - (1 - 1e-3) * t)

    def log_score(x: Tensor, sigma: Tensor) -> Tensor:
        return chain.ratios(process, x, -(-sigma).expm1() / (1 - 1e-3)).log()

    sampler, counted = SEDDSampler(ANY, steps=steps, method=method), Counted(log_score)
    found = sampler(counted, sampler.start((n, LENGTH), generator=generator), generator=generator)
    return found, counted.evaluations


@claim(
    says="In 16 steps the analytic sampler is nearer the truth than Euler's",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 17 evaluations each; uniform noise, perfect ratios; Markov chains of 8 tokens",
)
def analytic_beats_euler(seeds: Seeds) -> Arms:
    languages, n = chains(TOKENS, LENGTH, seeds), seeds.few(2000, smoke=8)
    arms, evaluations = [], []
    for method in ("analytic", "euler"):
        made = [_perfect(c, method, seeds.few(16), n, g) for c, g in zip(languages, seeds.torch("draw"))]
        found, taken = zip(*made)
        arms.append(pair_error(torch.stack(found), languages).tolist())
        evaluations.append(sum(taken) / len(seeds))
    return Arms(*arms, {"evaluations": evaluations})
