"""What diffusions of token embeddings share: the square-root schedule of noise."""

import torch
from torch import Tensor

from lossary.diffusion._process import Process

LEAST = 1e-5  # of alpha^2: the schedule's own end is below 0


def square_root(*, factor: float = 1.0, offset: float = 1e-4) -> Process:
    """alpha^2 = 1 - sqrt(t + offset), sigma = factor sqrt(1 - alpha^2), t from 0 to 1.

    Words are still recognisable under strong noise, so it rises fast: sigma^2 is 0.01 at once, 0.5 at t = 1/4.
    """

    def kept(t: Tensor) -> Tensor:
        return (1 - (t + offset).sqrt()).clamp(min=LEAST)

    def time(ratio: Tensor) -> Tensor:
        square = (ratio / factor).square()
        return ((square / (1 + square)).square() - offset).clamp(0, 1)

    return Process(lambda t: kept(t).sqrt(), lambda t: factor * (1 - kept(t)).sqrt(), time)


def embedded(table: Tensor, tokens: Tensor) -> Tensor:
    """Rows of a table (V, D) by tokens (*batch, L), or of each of (S, V, D) by (S, B, L): (*batch, L, D)."""
    if table.ndim == 2:
        return table[tokens]
    rows = torch.arange(len(table), device=table.device).view(-1, *[1] * (tokens.ndim - 1))
    return table[rows, tokens]
