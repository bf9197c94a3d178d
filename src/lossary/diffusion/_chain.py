"""A Markov chain of tokens: whatever is known or noised, the exact distribution of each token follows.

What `Mixture` is for vectors, this is for tokens: the forward-backward algorithm is the perfect network.
"""

import torch
from torch import Generator, Tensor

from lossary.diffusion._discrete import TokenProcess, draw


class MarkovChain:
    """Sequences of `length` tokens out of V.

    Args:
        initial: (V,) probabilities of the first token.
        transition: (V, V), rows sum to 1.
        length: L.
    """

    def __init__(self, initial: Tensor, transition: Tensor, length: int) -> None:
        self.initial, self.transition, self.length = initial.double(), transition.double(), length

    def sample(self, n: int, *, generator: Generator | None = None) -> Tensor:
        """(n, L) int64."""
        tokens = [draw(self.initial.expand(n, -1), generator=generator)]
        while len(tokens) < self.length:
            tokens.append(draw(self.transition[tokens[-1]], generator=generator))
        return torch.stack(tokens, dim=1)

    def log_prob(self, x: Tensor) -> Tensor:
        """log P of sequences (*batch, L): (*batch)."""
        return self.initial.log()[x[..., 0]] + self.transition.log()[x[..., :-1], x[..., 1:]].sum(-1)

    def posterior(self, evidence: Tensor, *, others: bool = False) -> Tensor:
        """P(token at each place | evidence), (B, L, V).

        Args:
            evidence: (B, L, V), likelihoods of what was seen given each token; ones for a mask, one-hot for what
                is known.
            others: leave out each place's own evidence.
        """
        evidence = evidence.double()
        forward = [self.initial.expand(len(evidence), -1)]  # without the place's own evidence
        for i in range(self.length - 1):
            forward.append(_normalised(forward[-1] * evidence[:, i]) @ self.transition)
        backward = [torch.ones_like(forward[0])]
        for i in range(self.length - 1, 0, -1):
            backward.append(_normalised(backward[-1] * evidence[:, i]) @ self.transition.T)
        found = torch.stack(forward, dim=1) * torch.stack(backward[::-1], dim=1)
        return _normalised(found if others else found * evidence)

    def predict(self, process: TokenProcess, x: Tensor, t: Tensor) -> Tensor:
        """P(x_0 | x_t = x) at each place, (B, L, V): what a perfect network would say."""
        return self.posterior(process.likelihood(x, t))

    def ratios(self, process: TokenProcess, x: Tensor, t: Tensor) -> Tensor:
        """The concrete score p_t(x with place i -> y) / p_t(x), (B, L, states)."""
        there = (
            self.posterior(process.likelihood(x, t), others=True)
            @ process.cumulative(t.double())[..., : process.tokens, :]
        )
        return there / there.gather(-1, x[..., None])


def random_chain(tokens: int, length: int, *, generator: Generator, sharpness: float = 2.0) -> MarkovChain:
    """A chain with random rows; the larger the sharpness, the more predictable."""
    logits = sharpness * torch.randn(tokens + 1, tokens, generator=generator, dtype=torch.float64)
    rows = logits.softmax(-1)
    return MarkovChain(rows[0], rows[1:], length)


def _normalised(values: Tensor) -> Tensor:
    return values / values.sum(-1, keepdim=True)
