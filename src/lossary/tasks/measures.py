"""Measures on stacked tensors, one value per seed: percentages run from 0 to 100.

Logits are (*S, N, classes) and targets (*S, N), or (N,) where the seeds share them; a result is (*S,). They
carry no gradient. A measure of something that the data lack, such as recall without positives, is NaN.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.tasks import task
from lossary.tasks.seeds import Seeds
from lossary.tasks.training import cross_entropy


@task(version=1)
@torch.no_grad()
def accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Percentage of rows whose largest logit is the target's."""
    return 100 * (logits.argmax(-1) == target).double().mean(-1)


@task(version=1)
@torch.no_grad()
def balanced_accuracy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the classes that occur of the percentage of their rows that are right."""
    return _accuracy_within(logits, target, target).nanmean(-1)


@task(version=1)
@torch.no_grad()
def worst_group_accuracy(logits: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """Smallest over the groups that occur of the percentage of their rows that are right.

    `group` is shaped as `target`, int64 from 0.
    """
    return _accuracy_within(logits, target, group).nan_to_num(nan=torch.inf).amin(-1)


@task(version=1)
@torch.no_grad()
def auroc(score: Tensor, target: Tensor) -> Tensor:
    """Area under the ROC curve in percent: how often a positive scores above a negative, ties counting half.

    Args:
        score: (*S, N), higher is more positive.
        target: (*S, N) or (N,), true or 1 where positive.
    """
    score = score.contiguous()
    positive = target.double().expand(score.shape)
    ordered = score.sort(-1).values
    below = torch.searchsorted(ordered, score, right=False)
    not_above = torch.searchsorted(ordered, score, right=True)
    rank = (below + not_above + 1).double() / 2
    positives = positive.sum(-1)
    wins = (rank * positive).sum(-1) - positives * (positives + 1) / 2
    return 100 * wins / (positives * (score.shape[-1] - positives))


@task(version=1)
@torch.no_grad()
def mean_average_precision(score: Tensor, target: Tensor) -> Tensor:
    """Mean over the labels that occur of their average precision in percent: of multi-label predictions.

    The average precision of a label is the mean over its positives of the precision among all rows that score at
    least as high (what scikit-learn computes).

    Args:
        score: (*S, N, labels), higher is more positive.
        target: (*S, N, labels) or (N, labels), 1 where positive.
    """
    score = score.mT.contiguous()
    positive = target.mT.expand(score.shape) > 0.5
    rows = score.shape[-1]
    found = rows - torch.searchsorted(score.sort(-1).values, score)
    right = rows - torch.searchsorted(score.masked_fill(~positive, -torch.inf).sort(-1).values, score)
    precision = (right.double() / found).masked_fill(~positive, 0.0)
    return 100 * (precision.sum(-1) / positive.sum(-1)).nanmean(-1)


@task(version=1)
@torch.no_grad()
def log_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean negative logarithm of the probability of the target, in nats."""
    return cross_entropy(logits, target.expand(logits.shape[:-1])).double().mean(-1)


@task(version=1)
def top_hessian_eigenvalue(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    loss: Callable[[Tensor, Tensor], Tensor],
    seeds: Seeds,
    iterations: int = 100,
) -> Tensor:
    """Eigenvalue of largest magnitude, with its sign, of the Hessian of each seed's mean loss: (S,).

    Power iteration on Hessian-vector products. The objective is a sum over seeds, so the Hessian is block
    diagonal and one product serves all of them. With a gap g between the two largest magnitudes, relatively,
    the error falls as (1 - g)^(2 iterations).

    Args:
        model: stacked, every parameter with S in front.
        x, y: (S, N, d) and (S, N): all rows that count, at once.
        loss: (S, N, k), (S, N) to values (S, N), twice differentiable.
        seeds: stream "hessian" gives the first direction.
        iterations: of Hessian-vector products.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    objective = loss(model(x), y).mean(-1).sum()
    gradient = torch.autograd.grad(objective, parameters, create_graph=True)
    vectors = _directions(parameters, seeds.torch("hessian"))
    for _ in range(iterations):
        norm = _dot(vectors, vectors).sqrt()
        vectors = [v / norm.view(-1, *[1] * (v.ndim - 1)) for v in vectors]
        products = torch.autograd.grad(gradient, parameters, grad_outputs=vectors, retain_graph=True)
        eigenvalue = _dot(vectors, products)
        vectors = list(products)
    return eigenvalue


def _accuracy_within(logits: Tensor, target: Tensor, cell: Tensor) -> Tensor:
    """Accuracy in percent in each cell, (*S, cells); NaN in an empty one."""
    right = (logits.argmax(-1) == target).double()
    member = F.one_hot(cell).double().expand(*right.shape, -1)
    return 100 * (right.unsqueeze(-1) * member).sum(-2) / member.sum(-2)


def _directions(parameters: Sequence[Tensor], generators: Sequence[Generator]) -> list[Tensor]:
    return [
        torch.stack([torch.randn(p.shape[1:], generator=g, dtype=torch.float64) for g in generators]).to(p)
        for p in parameters
    ]


def _dot(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """Inner product of two lists of tensors within each seed, (S,)."""
    return torch.stack([(a * b).flatten(1).sum(1) for a, b in zip(first, second)]).sum(0)
