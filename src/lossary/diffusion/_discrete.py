"""Noise for tokens: a Markov chain on each token by itself, towards a mask, a random token or a near one.

A process is the transition matrix between any two times. Everything else (noised tokens, the posterior of an earlier
time, the score's ratios) follows from it. Tokens are drawn in double precision: with float32 uniforms a Gumbel noise
never exceeds 16.6, rare tokens are never drawn, and samples look better than the model is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from lossary.diffusion._process import over

Predict = Callable[[Tensor, Tensor], Tensor]
"""predict(x_t (B, L), t (B,)) -> probabilities of the clean tokens (B, L, V)."""


@dataclass(frozen=True)
class TokenProcess:
    """Chains on `states` states, of which the first `tokens` are real tokens.

    Attributes:
        tokens: V.
        states: V, or V + 1 where the last one is the mask.
        between: between(s, t), times (*batch) with s <= t, gives P(x_t = j | x_s = i), (*batch, states, states).
        prior: of x at the last time, (states,).
    """

    tokens: int
    states: int
    between: Callable[[Tensor, Tensor], Tensor]
    prior: Tensor

    def cumulative(self, t: Tensor) -> Tensor:
        """P(x_t = j | x_0 = i), (*batch, states, states)."""
        return self.between(torch.zeros_like(t), t)

    def noised(self, clean: Tensor, t: Tensor, *, generator: Generator | None = None) -> Tensor:
        """x_t of tokens (*batch, L) at times (*batch), int64."""
        return draw(rows_of(self.cumulative(t.double()), clean), generator=generator)

    def likelihood(self, x: Tensor, t: Tensor) -> Tensor:
        """P(x_t = x | x_0 = v) for every token v, (*batch, L, tokens): the evidence that x gives of what was there."""
        return rows_of(self.cumulative(t.double()).mT, x)[..., : self.tokens]

    def posterior(self, x: Tensor, clean: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """P(x_s | x_t = x) where the clean tokens have probabilities `clean`, s < t: (*batch, L, states).

        sum_v clean_v P(x_s | x_t, x_0 = v), exact where `clean` is p(x_0 | x_t).

        Args:
            x: (*batch, L); clean: (*batch, L, tokens); s, t: (*batch).
        """
        s, t = s.double(), t.double()
        onward = rows_of(self.between(s, t).mT, x)  # P(x_t = x | x_s = k), (*batch, L, states)
        reached = self.likelihood(x, t)
        weight = torch.where(reached > 0, clean.double() / reached, 0.0)
        found = onward * (weight @ self.cumulative(s)[..., : self.tokens, :])
        return found / found.sum(-1, keepdim=True)


def absorbing(tokens: int, survival: Callable[[Tensor], Tensor] = lambda t: 1 - t) -> TokenProcess:
    """Tokens turn into the mask, state `tokens`, and stay it; a token is still there at t with chance survival(t)."""

    def between(s: Tensor, t: Tensor) -> Tensor:
        at_s, at_t = survival(s), survival(t)
        stay = torch.where(at_s > 0, at_t / at_s, 0.0)[..., None, None]
        onto = torch.zeros(tokens + 1, tokens + 1, dtype=s.dtype, device=s.device)
        onto[:, tokens] = 1.0
        return stay * torch.eye(tokens + 1, dtype=s.dtype, device=s.device) + (1 - stay) * onto

    prior = torch.zeros(tokens + 1, dtype=torch.float64)
    prior[tokens] = 1.0
    return TokenProcess(tokens, tokens + 1, between, prior)


def uniform(tokens: int, survival: Callable[[Tensor], Tensor] = lambda t: 1 - t) -> TokenProcess:
    """Tokens are replaced by one drawn uniformly; not yet at t with chance survival(t)."""

    def between(s: Tensor, t: Tensor) -> Tensor:
        at_s, at_t = survival(s), survival(t)
        stay = torch.where(at_s > 0, at_t / at_s, 0.0)[..., None, None]
        return stay * torch.eye(tokens, dtype=s.dtype, device=s.device) + (1 - stay) / tokens

    return TokenProcess(tokens, tokens, between, torch.full((tokens,), 1 / tokens, dtype=torch.float64))


def stepwise(tokens: int, steps: Tensor) -> TokenProcess:
    """Any chain given by its single steps (T, states, states), row-stochastic; times are whole numbers 0 to T."""
    states = steps.shape[-1]
    if steps.ndim != 3 or steps.shape[1] != states or states not in (tokens, tokens + 1):
        raise ValueError(f"steps: expected (T, {tokens}, {tokens}) or one state more, got {tuple(steps.shape)}")
    table = [torch.eye(states, dtype=torch.float64, device=steps.device)]
    for step in steps.double():
        table.append(table[-1] @ step)
    cumulative = torch.stack(table)

    def between(s: Tensor, t: Tensor) -> Tensor:
        if bool((s == 0).all()):
            return cumulative.to(t.device)[t.long()]
        if not bool((t - s == 1).all()):
            raise ValueError("s: expected 0 or t - 1 in a stepwise process")
        return steps.to(s.device).double()[s.long()]

    return TokenProcess(tokens, states, between, cumulative[-1].mean(0))


def draw(probabilities: Tensor, *, generator: Generator | None = None) -> Tensor:
    """Tokens (*batch) from probabilities (*batch, K), which need not be normalised; in double precision."""
    return multinomial(probabilities.flatten(0, -2), 1, generator=generator).view(probabilities.shape[:-1])


def multinomial(weights: Tensor, n: int, *, generator: Generator | None = None) -> Tensor:
    """n numbers out of K with replacement, (n,) or (batch, n), by weights (K,) or (batch, K) of any sum above 0.

    They are drawn in double precision where the generator is, and brought to where the weights are.
    """
    there = weights.device if generator is None else generator.device
    return torch.multinomial(weights.to(there).double(), n, replacement=True, generator=generator).to(weights.device)


def ancestral_tokens(
    predict: Predict, process: TokenProcess, x: Tensor, times: Tensor, *, generator: Generator | None = None
) -> Tensor:
    """Tokens (B, L) from x at times[0]: at each time the posterior under the predicted clean tokens is drawn.

    Args:
        times: (n + 1,), falling to 0: n evaluations of the network.
    """
    for t, s in zip(times.double(), times[1:].double()):
        here, lower = t.expand(len(x)), s.expand(len(x))
        x = draw(process.posterior(x, predict(x, here), lower, here), generator=generator)
    return x


def rows_of(matrix: Tensor, index: Tensor) -> Tensor:
    """Rows of matrices (*batch, K, J) by index (*batch, L): (*batch, L, J)."""
    spread = over(index, index[..., None]).expand(*index.shape, matrix.shape[-1])
    return matrix.gather(-2, spread)
