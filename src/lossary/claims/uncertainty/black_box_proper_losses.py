"""Black-box proper losses: are they right on average, and what does that buy?

Models and targets are random distributions over a few symbols, so every expectation can be summed over all samples.
"""

import itertools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.uncertainty import (
    black_box_power_loss,
    black_box_squared_loss,
    poisson_cross_entropy_loss,
    sequential_cross_entropy_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]


def _pairs(seeds: Seeds, classes: int) -> Iterator[tuple[NDArray, NDArray]]:
    """A random model and target for each seed."""
    for rng in seeds.numpy("distributions"):
        yield rng.dirichlet(np.ones(classes)), rng.dirichlet(np.ones(classes))


def _samples(classes: int, draws: int) -> Tensor:
    return torch.tensor(list(itertools.product(range(classes), repeat=draws)))


def _likely(p: Tensor, samples: Tensor) -> Tensor:
    return p[samples].prod(-1)


def _table(loss: Loss, classes: int, m: int, n: int) -> Tensor:
    """The loss of every pair of samples."""
    x, y = _samples(classes, m), _samples(classes, n)
    every = loss(x.repeat_interleave(len(y), 0), y.repeat(len(x), 1))
    return every.view(len(x), len(y))


def _expected(table: Tensor, p: Tensor, q: Tensor, m: int, n: int) -> Tensor:
    return _likely(p, _samples(len(p), m)) @ table @ _likely(q, _samples(len(q), n))


def _plug_in(model_samples: Tensor, target_samples: Tensor) -> Tensor:
    """The squared distance of the frequencies."""
    classes = int(max(model_samples.max(), target_samples.max())) + 1
    a, b = (torch.nn.functional.one_hot(s, classes).double().mean(-2) for s in (model_samples, target_samples))
    return (a - b).square().sum(-1)


@claim(
    says="With as many draws as the power, the mean of a black-box loss is the distance of the distributions to it",
    kind="exact",
    metric="deviation",
    scale="sum over all samples: power 2 from 2 draws and 2 outcomes of 4 symbols, power 4 from 4 and 4 of 3",
    tolerance=1e-12,
)
def the_mean_is_the_distance(seeds: Seeds) -> Arms:
    found, stated = [], []
    for loss, classes, power in ((black_box_squared_loss, 4, 2), (black_box_power_loss, 3, 4)):
        table = _table(loss, classes, power, power)
        for p, q in _pairs(seeds, classes):
            found.append(_expected(table, torch.from_numpy(p), torch.from_numpy(q), power, power))
            stated.append(((p - q) ** power).sum())
    return Arms(torch.stack(found), np.array(stated))


@claim(
    says="A model that minimises the black-box loss of two draws is the target; its frequencies would mislead it",
    kind="exact",
    metric="deviation",
    scale="softmax over 4 symbols fitted by L-BFGS to the exact mean loss of 2 draws and 2 outcomes",
    tolerance=1e-5,
)
def the_best_model_is_the_target(seeds: Seeds) -> Arms:
    proper, naive = (_table(loss, 4, 2, 2) for loss in (black_box_squared_loss, _plug_in))
    found, misled, targets = [], [], []
    for _, target in _pairs(seeds, 4):
        q = torch.from_numpy(0.05 + 0.8 * target)
        targets.append(q)
        found.append(_fitted(proper, q))
        misled.append((_fitted(naive, q) - q).abs().max().item())
    return Arms(torch.stack(found), torch.stack(targets), {"largest deviation of the frequencies' best": misled})


def _fitted(table: Tensor, q: Tensor) -> Tensor:
    """The softmax whose mean loss of two draws and two outcomes is least."""
    z = torch.zeros(len(q), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [z], max_iter=100, tolerance_grad=1e-10, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        mean = _expected(table, z.softmax(0), q, 2, 2)
        mean.backward()
        return mean

    optimizer.step(objective)
    return z.detach().softmax(0)


@claim(
    says="The mean of any loss of m draws is a polynomial of degree m in the model, which cross-entropy is not",
    kind="exact",
    metric="deviation",
    scale="difference of order m + 1 between two models over 3 symbols, m = 1 to 4, 20 random losses each",
    tolerance=1e-10,
)
def every_mean_is_a_polynomial(seeds: Seeds) -> Arms:
    deviations, cross_entropy = [], []
    for (p, q), rng in zip(_pairs(seeds, 3), seeds.numpy("losses")):
        for m in range(1, 5):
            order = m + 1
            signs = torch.tensor([(-1.0) ** (order - i) * math.comb(order, i) for i in range(order + 1)]).double()
            path = [torch.from_numpy(p + i / order * (q - p)) for i in range(order + 1)]
            losses = torch.from_numpy(rng.standard_normal((20, 3**m)))
            means = torch.stack([losses @ _likely(point, _samples(3, m)) for point in path], -1)
            deviations.append((means @ signs).abs().max())
            cross_entropy.append((signs @ -torch.stack(path)[:, 0].log()).abs().item())
    return Arms(torch.stack(deviations), details={"median difference of -log p": float(np.median(cross_entropy))})


@claim(
    says="Over a Poisson number of draws, the mean of the Poisson loss is the cross-entropy",
    kind="exact",
    metric="deviation",
    scale="sum over 0 to 349 misses, rate 20, of 5 symbols each at least 0.08 likely",
    tolerance=1e-8,
)
def poisson_mean_is_the_cross_entropy(seeds: Seeds) -> Arms:
    n = torch.arange(350)
    values = poisson_cross_entropy_loss(n, rate=20.0)
    found, stated = [], []
    for p, q in _pairs(seeds, 5):
        model, target = torch.from_numpy(0.08 + 0.6 * p), torch.from_numpy(q)
        mean = 20.0 * (1 - model).unsqueeze(1)
        log_likely = n * mean.log() - mean - torch.lgamma(n.double() + 1)
        found.append((log_likely + values.log()).exp().sum(1) @ target)
        stated.append(-model.log() @ target)
    return Arms(torch.stack(found), torch.stack(stated))


def _entropy_error(seeds: Seeds, *, pseudo_count: float | None) -> NDArray:
    """Relative error of the mean loss over 20,000 outcomes of 10 symbols; None is the sequential loss, per seed.

    Frequencies get as many draws for each outcome as the sequential loss takes on average.
    """
    errors, outcomes = [], seeds.few(20_000, smoke=200)
    for (p, q), rng in zip(_pairs(seeds, 10), seeds.numpy("draws")):
        p = 0.02 + 0.8 * p
        likely = p[rng.choice(10, outcomes, p=q)]
        if pseudo_count is None:
            values = sequential_cross_entropy_loss(torch.from_numpy(rng.geometric(likely))).numpy()
        else:
            m = max(1, round((q / p).sum()))
            values = -np.log((rng.binomial(m, likely) + pseudo_count) / (m + 10 * pseudo_count))
        truth = -(q * np.log(p)).sum()
        errors.append(abs(values.mean() - truth) / truth)
    return np.array(errors)


@claim(
    says="Waiting for the outcome halves the error of a cross-entropy from as many draws' smoothed frequencies",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="10 symbols at least 0.02 likely, 20,000 outcomes; the pseudo-count is the best of 4, nothing else to tune",
)
def waiting_beats_frequencies(seeds: Seeds) -> Arms:
    grid = [{"pseudo_count": count} for count in (0.1, 0.25, 0.5, 1.0)]
    baseline = tune(_entropy_error, grid, seeds, better="lower")
    return Arms(_entropy_error(seeds, pseudo_count=None), _entropy_error(seeds, **baseline), {"baseline": baseline})
