"""First-hitting sampler: the same samples as many ancestral steps, better ones than few, in a twentieth of the time?

The texts are random Markov chains, so that the perfect network is known. Ancestral steps of masked diffusion draw, for
each masked token, either a token or the mask again. Texts drawn together share their evaluations; by itself a text
needs one only when it has changed.
"""

import math
import time
from collections.abc import Callable
from statistics import mean

import numpy as np
import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.diffusion import first_hitting, order_agnostic_loss, truncated_gumbel_probabilities
from lossary.diffusion._chain import MarkovChain
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._discrete import absorbing
from lossary.diffusion._discrete import draw as draw_tokens
from lossary.tasks.tokens import chains, pair_error

TOKENS, LENGTH = 6, 12
Predict = Callable[[Tensor, Tensor], Tensor]


def _perfect(chain: MarkovChain) -> Predict:
    process = absorbing(TOKENS)
    return lambda x, t: chain.predict(process, x, t.clamp(max=1 - 1e-9))


def _ancestral(predict: Predict, x: Tensor, mask: int, steps: int, generator: Generator) -> Tensor:
    """`steps` equal steps from all masks; the network is asked anew only when a token has changed."""
    guess = None
    for k in range(steps, 0, -1):
        if guess is None:
            guess = predict(x, torch.full((len(x),), k / steps, dtype=torch.float64))
        chances = torch.cat([guess / k, torch.full_like(guess[..., :1], 1 - 1 / k)], dim=-1)
        after = torch.where(x == mask, draw_tokens(chances, generator=generator), x)
        if not torch.equal(after, x):
            guess = None
        x = after
    return x


def _errors(seeds: Seeds, sampler: Callable[[Predict, Tensor, Generator], Tensor]) -> tuple[list[float], float]:
    """Of each seed, and the mean over seeds of the evaluations."""
    languages = chains(TOKENS, LENGTH, seeds)
    start = torch.full((seeds.few(500, smoke=8), LENGTH), TOKENS)
    networks = [Counted(_perfect(c)) for c in languages]
    found = [sampler(network, start, g) for network, g in zip(networks, seeds.torch("draw"))]
    return pair_error(torch.stack(found), languages).tolist(), mean(network.evaluations for network in networks)


def _first_hitting(predict: Predict, x: Tensor, generator: Generator) -> Tensor:
    return first_hitting(predict, x, mask=TOKENS, generator=generator)


def _against_ancestral(seeds: Seeds, steps: int) -> Arms:
    ours, few = _errors(seeds, _first_hitting)
    theirs, many = _errors(seeds, lambda predict, x, g: _ancestral(predict, x, TOKENS, steps, g))
    changes = steps * (1 - (1 - 1 / steps) ** LENGTH)  # expected; a token changes at any step with equal chance
    return Arms(ours, theirs, {"evaluations": [few, many], "changes of a text": [LENGTH, changes]})


@claim(
    says="One call for each token draws from the same distribution as 100 ancestral steps",
    kind="equality",
    metric="mode error",
    scale="total variation of pairs, points; Markov chains of 6 tokens, length 12, 500 texts, perfect network",
)
def equals_many_steps(seeds: Seeds) -> Arms:
    return _against_ancestral(seeds, seeds.few(100))


@claim(
    says="One token at a time, samples are nearer the truth than in 12 ancestral steps with as many evaluations",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, points; Markov chains of 6 tokens, length 12, perfect network; 500 texts together",
)
def beats_as_many_steps(seeds: Seeds) -> Arms:
    return _against_ancestral(seeds, LENGTH)


@claim(
    says="Sampling takes a twentieth of the time of 1024 ancestral steps that reuse the network's last output",
    kind="ratio",
    metric="time",
    margin=0.05,
    scale="processor time; one text of 32 tokens out of 300, a network of one matrix",
)
def twenty_times_faster(seeds: Seeds) -> Arms:
    tokens, length, steps = seeds.few(300), seeds.few(32), seeds.few(1024)
    ours, theirs, evaluations = [], [], []
    for g in seeds.torch("time"):
        weight = torch.randn(tokens + 1, tokens, generator=g)
        start = torch.full((1, length), tokens)

        def predict(x: Tensor, t: Tensor, weight: Tensor = weight) -> Tensor:
            around = weight[x].cumsum(-2) / length**0.5
            return (weight[x] + around).softmax(-1)

        one, many = Counted(predict), Counted(predict)
        ours.append(_seconds(lambda p=one, g=g, x=start: first_hitting(p, x, mask=tokens, generator=g)))
        theirs.append(_seconds(lambda p=many, g=g, x=start: _ancestral(p, x, tokens, steps, g)))
        evaluations.append((one.evaluations, many.evaluations))
    return Arms(ours, theirs, {"evaluations": [mean(arm) for arm in zip(*evaluations)]})


def _seconds(call: Callable[[], Tensor]) -> float:
    start = time.process_time()
    call()
    return max(time.process_time() - start, 1e-6)


def _unmasked(p: Tensor, steps: int, bound: float) -> Tensor:
    """What a token turns into that is unmasked in one of `steps` ancestral steps, averaged over 50 of them, exactly."""
    found = torch.zeros_like(p)
    for k in torch.linspace(steps, 1, 50).round().tolist():
        law = torch.cat([p / k, torch.tensor([1 - 1 / k], dtype=p.dtype)])
        chance = truncated_gumbel_probabilities(law, bound=bound)[:-1]
        found += chance / chance.sum() / 50
    return found


@claim(
    says="Categories drawn from 32-bit uniform numbers miss the tail of the distribution, from 64-bit ones they do not",
    kind="superiority",
    metric="mode error",
    scale="total variation, points; 5000 tokens by a noisy Zipf law, 50 of 1000 ancestral steps, by the exact formula",
)
def double_precision_keeps_the_tail(seeds: Seeds) -> Arms:
    single, double, entropies = [], [], []
    for g in seeds.torch("law"):
        noise = 0.5 * torch.randn(seeds.few(5000), generator=g, dtype=torch.float64)
        p = (noise - torch.arange(1, len(noise) + 1).double().log()).softmax(-1)
        found = [_unmasked(p, seeds.few(1000), bits * math.log(2)) for bits in (24, 53)]
        for errors, q in zip((single, double), found):
            errors.append(50 * (q - p).abs().sum().item())
        entropies.append([torch.special.entr(q).sum().item() for q in (p, *found)])
    return Arms(double, single, {"entropy in nats: truth, 32 bits, 64 bits": np.mean(entropies, 0).tolist()})


@claim(
    says="The mean cross-entropy at a uniform number of masks is the bound of masked diffusion in continuous time",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="any network (a table of random logits), length 5, 4 tokens, all 31 masks; absolute difference in nats",
)
def training_needs_no_time(seeds: Seeds) -> Arms:
    length, tokens = 5, 4
    patterns = torch.arange(2**length)[:, None] >> torch.arange(length) & 1 > 0
    number = patterns.sum(-1)
    exponent = number.double()
    nodes, weights = np.polynomial.legendre.leggauss(8)  # exact for polynomials up to degree 15
    gaps = []
    for g in seeds.torch("table"):
        logits = torch.randn(2**length, length, tokens, generator=g, dtype=torch.float64)
        clean = torch.randint(tokens, (length,), generator=g).expand(2**length, -1)
        per_token = order_agnostic_loss(logits, clean, masked=patterns)
        share = [1 / (length * math.comb(length, n)) if n else 0.0 for n in range(length + 1)]
        agnostic = (torch.tensor(share, dtype=torch.float64)[number] * per_token).sum()
        bound = 0.0
        for node, weight in zip((nodes + 1) / 2, weights / 2):
            chance = node**exponent * (1 - node) ** (length - exponent)
            bound += weight * (chance * per_token * number / length / node).sum()
        gaps.append(abs(agnostic - bound).item())
    return Arms(gaps)
