"""What claims about tokens share: Markov chains as texts, small stacked networks on sequences, their training."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.diffusion._chain import MarkovChain, random_chain
from lossary.diffusion._discrete import TokenProcess, rows_of
from lossary.diffusion._process import over
from lossary.tasks import task
from lossary.tasks.diffusion import HARMONICS, waves
from lossary.tasks.models import StackedMLP, stacked_mlp
from lossary.tasks.seeds import Seeds
from lossary.tasks.training import minimise, spread_times

Texts = Callable[[int, Sequence[Generator]], Tensor]
"""texts(n, generators) -> clean tokens (S, n, L), one generator for each seed."""


class StackedTokenNet(nn.Module):
    """network(x, t (S, B) or (S,)) -> (S, B, L, outputs): a stacked perceptron of tokens or their embeddings.

    x is (S, B, L) int64 below `states`, or real (S, B, L, states).
    """

    def __init__(self, mlp: StackedMLP, states: int) -> None:
        super().__init__()
        self.mlp, self.states = mlp, states

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        weights = x if x.is_floating_point() else F.one_hot(x, self.states)
        seen = weights.float().flatten(-2)
        time = waves(over(t.float(), seen[..., 0]).expand(seen.shape[:-1]))
        return self.mlp(torch.cat([seen, time], dim=-1)).unflatten(-1, (weights.shape[-2], -1))  # type: ignore[no-any-return]


@task(version=1)
def stacked_token_net(
    length: int, states: int, outputs: int, seeds: Seeds, *, hidden: Sequence[int] = (128,)
) -> StackedTokenNet:
    """A network on sequences for every seed.

    Args:
        length: L.
        states: that a place of the input can be in.
        outputs: numbers for each place of the output.
        seeds: stream "init".
        hidden: widths of the perceptron, SiLU between.
    """
    sizes = (length * states + 2 * HARMONICS, *hidden, length * outputs)
    return StackedTokenNet(stacked_mlp(sizes, seeds, activation="silu"), states)


@task(version=1)
def chains(tokens: int, length: int, seeds: Seeds, *, sharpness: float = 2.0) -> list[MarkovChain]:
    """A random Markov chain for every seed: texts of which everything is known. Stream "chain"."""
    return [random_chain(tokens, length, generator=g, sharpness=sharpness) for g in seeds.torch("chain")]


def texts_of(languages: Sequence[MarkovChain]) -> Texts:
    """The texts of each seed's chain."""
    initial = torch.stack([chain.initial for chain in languages])[:, None]
    transition = torch.stack([chain.transition for chain in languages])

    def texts(n: int, generators: Sequence[Generator]) -> Tensor:
        chance = torch.stack([torch.rand(languages[0].length, n, generator=g, dtype=torch.float64) for g in generators])
        tokens = [_inverted(initial, chance[:, 0])]
        for i in range(1, languages[0].length):
            rows = transition.gather(1, tokens[-1][..., None].expand(-1, -1, transition.shape[-1]))
            tokens.append(_inverted(rows, chance[:, i]))
        return torch.stack(tokens, dim=-1)

    return texts


def noised_tokens(process: TokenProcess, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
    """x_t (S, B, L) of clean tokens at times (S, B), each seed with its own generator."""
    chance = torch.stack([torch.rand(clean.shape[1:], generator=g, dtype=torch.float64) for g in generators])
    return _inverted(rows_of(process.cumulative(t.double()), clean), chance)


def _inverted(probabilities: Tensor, chance: Tensor) -> Tensor:
    """The token at which the cumulative probabilities (*batch, K) pass uniform numbers (*batch)."""
    passed = (chance[..., None] >= probabilities.cumsum(-1)).sum(-1)
    return passed.clamp(max=probabilities.shape[-1] - 1)


@task(version=1)
def fit_tokens(
    network: nn.Module,
    texts: Texts,
    *,
    loss: Callable[[nn.Module, Tensor, Tensor, Sequence[Generator]], Tensor],
    seeds: Seeds,
    steps: int,
    batch: int = 64,
    lr: float = 3e-3,
) -> None:
    """Train a stack of networks in place with Adam and a cosine decay.

    Args:
        network: whose parameters are trained.
        texts: the data.
        loss: loss(network, clean (S, B, L), times (S, B) spread over 0 to 1, generators) -> (S, B).
        seeds: stream "tokens", of data, times and noise.
        steps, batch, lr: of Adam.
    """
    generators = seeds.torch("tokens")

    def objective() -> Tensor:
        clean = texts(batch, generators)
        return loss(network, clean, spread_times(batch, generators), generators).mean(-1).sum()

    minimise(objective, network.parameters(), steps=steps, lr=lr)


@task(version=1)
def pair_error(found: Tensor, languages: Sequence[MarkovChain]) -> Tensor:
    """Total variation in points between the neighbouring pairs of tokens found (S, N, L) and those of the chains: (S,).

    The average over the L - 1 pairs of places; from the law itself N samples of V tokens give about 40 V / sqrt(N).
    """
    errors = []
    for x, chain in zip(found, languages):
        tokens = len(chain.initial)
        place, each = chain.initial, []
        for i in range(chain.length - 1):
            expected = place[:, None] * chain.transition
            pairs = torch.bincount(x[:, i] * tokens + x[:, i + 1], minlength=tokens**2) / len(x)
            each.append(50 * (pairs - expected.flatten()).abs().sum())
            place = expected.sum(0)
        errors.append(torch.stack(each).mean())
    return torch.stack(errors)
