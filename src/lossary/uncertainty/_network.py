"""The engine of estimators that train small networks of their own: a perceptron, Adam over shuffled batches, scales.

All in float64, so that a row's answer does not depend on the rows beside it, and all random numbers from generators.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.utils import check_random_state
from torch import Generator, Tensor, nn


def generator(random_state: Any) -> Generator:
    """A generator seeded from what scikit-learn calls `random_state`.

    Raises:
        ValueError: neither a whole number nor a `RandomState`.
    """
    if not isinstance(random_state, int | np.integer | np.random.RandomState):
        raise ValueError(f"random_state: expected a whole number or a RandomState, got {random_state!r}")
    return Generator().manual_seed(int(check_random_state(random_state).randint(2**31)))


def standard(table: NDArray) -> tuple[NDArray, NDArray]:
    """Mean and standard deviation of each column of a table (N, D), 1 for one that is constant but for rounding."""
    centre, scale = table.mean(0), table.std(0)
    return centre, np.where(scale > 1e-12 * np.abs(centre), scale, 1.0)


def perceptron(sizes: Sequence[int], g: Generator) -> nn.Sequential:
    """Linear layers of these widths with ReLU between, the weights drawn as torch's own would be, from `g`."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(sizes):
        linear = nn.Linear(wide, narrow, device="meta", dtype=torch.float64).to_empty(device="cpu")
        for parameter in (linear.weight, linear.bias):
            nn.init.uniform_(parameter, -1 / math.sqrt(wide), 1 / math.sqrt(wide), generator=g)
        layers += [linear, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(
    parameters: Iterable[nn.Parameter],
    objective: Callable[[Tensor], Tensor],
    rows: int,
    *,
    steps: int,
    batch: int,
    lr: float,
    g: Generator,
) -> None:
    """Minimise objective(row numbers), a scalar, by Adam whose rate falls to 0 along a cosine."""
    adam = torch.optim.Adam(parameters, fused=True)
    for step, index in zip(range(steps), _batches(rows, min(batch, rows), g)):
        adam.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        adam.zero_grad()
        with torch.enable_grad():
            objective(index).backward()
        adam.step()


def _batches(rows: int, batch: int, g: Generator) -> Iterator[Tensor]:
    """Endless batches from one permutation after another; what is left of one goes before the next."""
    pool = torch.empty(0, dtype=torch.int64)
    while True:
        while len(pool) < batch:
            pool = torch.cat([pool, torch.randperm(rows, generator=g)])
        yield pool[:batch]
        pool = pool[batch:]
