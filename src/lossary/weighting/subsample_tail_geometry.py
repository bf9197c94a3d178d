"""Why throwing away data helps the worst group: the largest outlier of the majority grows with its size.

A max-margin classifier rests on the most extreme points of either side. The more points a group has, the further
its most extreme one reaches, so the boundary leans into the minority. How far the reach of n points grows with n is
a matter of the tail: not at all for bounded noise, as sqrt(2 log n) for Gaussian, as log n for Laplace and as
n^(1/a) for a power tail of index a. Discarding majority points until the groups are of one size makes the two
extremes alike and the boundary symmetric.

Try it on a linear or last-layer classifier that fits its training rows, where weights on the loss do nothing, with
rows far out in the tails. It costs little to try and trains faster; with light tails, soft margins or a small
minority in many dimensions it may discard more than it mends.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor
from torch.utils.data import Sampler

from lossary import require
from lossary.paper import Paper
from lossary.roles import selector

PAPER = Paper(
    title="Why does Throwing Away Data Improve Worst-Group Error?",
    year=2022,
    helps=("worst-group", "class-imbalance"),
    departs=(
        "the theorems' constants were not readable; threshold, errors and the limits are derived here",
        "two groups in one dimension; spurious features and groups within classes are not modelled",
        "the distance of the groups is not free but the median of the smallest that is separable, so that"
        " distributions of different scale and tail compare",
    ),
    equation=(
        r"\begin{aligned} "
        r"t&=\frac{M_1-M_2}2,\qquad "
        r"\frac t\mu\approx\frac{m_{n_1}-m_{n_2}}{m_{n_1}+m_{n_2}} "
        r"\longrightarrow\frac{r^{1/a}-1}{r^{1/a}+1},\qquad r=\frac{n_1}{n_2}\\ "
        r"&M_g:\ \text{largest noise in group }g,\quad m_n:\ \text{median of the largest of }n,\quad "
        r"a:\ \text{index of the tail} "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2205.11672",
)


@selector(
    examples=(
        {"labels": (0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 2)},
        {"labels": (5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5)},
    )
)
class BalancedSubsample(Sampler[int]):
    """As many positions of every label as the rarest has, drawn once without replacement; the rest is never seen.

    Every epoch yields the same positions in an order of its own. (To draw new ones each epoch is another method:
    over the epochs it shows all data, and with it the outliers.) `torch.utils.data.Subset(data, sampler.kept)` is
    the subset itself. With every process's generator seeded alike, a distributed loader may split the epoch.

    Args:
        labels: (N,) whole numbers, a class or a group for each row; what does not occur is passed over.
        generator: draws the subset, and then the order of every epoch.

    Attributes:
        kept: (n,) the positions that are kept, increasing.

    Raises:
        ValueError: labels other than one or more whole numbers in a row.

    >>> sampler = BalancedSubsample([0, 0, 0, 0, 1, 1], generator=torch.Generator().manual_seed(0))
    >>> sampler.kept, len(sampler)
    (tensor([2, 3, 4, 5]), 4)
    >>> list(sampler)
    [5, 4, 2, 3]
    """

    def __init__(self, labels: Sequence[int] | Tensor, *, generator: Generator) -> None:
        numbers = torch.as_tensor(labels)
        require.integers("labels", numbers)
        if numbers.ndim != 1 or not len(numbers):
            raise ValueError(f"labels: expected shape (N,), N >= 1, got {tuple(numbers.shape)}")
        _, label, counts = torch.unique(numbers.cpu(), return_inverse=True, return_counts=True)
        shuffled = torch.randperm(len(label), generator=generator)
        by_label = shuffled[label[shuffled].argsort(stable=True)]
        starts = counts.cumsum(0) - counts
        self.kept = by_label[(starts[:, None] + torch.arange(int(counts.min()))).flatten()].sort().values
        self.generator = generator

    def __iter__(self) -> Iterator[int]:
        yield from self.kept[torch.randperm(len(self.kept), generator=self.generator)].tolist()

    def __len__(self) -> int:
        return len(self.kept)


def max_margin_1d_threshold(lower: Float[Tensor, "*batch n"], upper: Float[Tensor, "*batch m"]) -> Tensor:
    """The max-margin threshold on a line, (*batch): halfway between the two groups' innermost points.

    Args:
        lower: positions of the group that lies below.
        upper: of the group that lies above.

    Returns:
        (*batch); NaN where the groups overlap or touch, as no threshold has a margin then.

    Raises:
        ValueError: not floating point, an empty group, or batches that differ.

    >>> max_margin_1d_threshold(torch.tensor([-2.0, -1.0, 0.5]), torch.tensor([1.0, 3.0]))
    tensor(0.7500)
    """
    require.floating("lower", lower, at_least_dims=1)
    require.floating("upper", upper, at_least_dims=1)
    if upper.shape[:-1] != lower.shape[:-1] or not (lower.shape[-1] and upper.shape[-1]):
        wanted = (*lower.shape[:-1], "m")
        raise ValueError(f"upper: expected shape {wanted} and a point in each group, got {tuple(upper.shape)}")
    last, first = lower.amax(-1), upper.amin(-1)
    return torch.where(last < first, (last + first) / 2, torch.nan)


def relative_displacement(noise: Any, *, majority: int, minority: int) -> float:
    """How far the max-margin threshold leans into the minority, as a share of its distance mu from the mean.

    (m_majority - m_minority) / (m_majority + m_minority), with m_n the median of the largest of n draws: the
    displacement t / mu in the typical case that can just be separated. With r = majority / minority fixed and n
    growing it tends to 0 for bounded noise, for Gaussian as log r / (4 log n), for Laplace as log r / (2 log n), and
    to (r^(1/a) - 1) / (r^(1/a) + 1) for a tail of index a. 0 is symmetric, 1 means that the minority is lost.

    Args:
        noise: a frozen distribution of `scipy.stats`, symmetric about 0, or anything with its `isf`.
        majority: draws in the larger group.
        minority: in the smaller one, at least 1.

    Raises:
        ValueError: group sizes that are not whole numbers with majority >= minority >= 1.

    >>> from scipy import stats
    >>> [round(relative_displacement(d, majority=5000, minority=50), 2) for d in (stats.norm(), stats.t(3))]
    [0.25, 0.66]
    """
    require.whole("minority", minority, at_least=1)
    require.whole("majority", majority, at_least=minority)
    larger, smaller = (float(noise.isf(_tail(np.log(2.0), n))) for n in (majority, minority))
    return (larger - smaller) / (larger + smaller)


def tail_asymmetry_experiment(
    noise: Any, *, majority: int = 5000, minority: int = 50, draws: int = 1000, generator: np.random.Generator
) -> dict[str, float]:
    """Max-margin on all data against max-margin after subsampling, for groups at -mu (majority) and mu (minority).

    With M_1 and M_2 the largest noise of either group towards the other, the groups are separable if
    M_1 + M_2 < 2 mu, the threshold is t = (M_1 - M_2) / 2, the minority errs with probability P(noise > mu - t)
    and the majority with P(noise > mu + t). mu is the median of (M_1 + M_2) / 2, so half of the draws are separable,
    and the others are left out. The subsample is part of the same majority. The largest of n draws is drawn directly.

    Args:
        noise: a frozen distribution of `scipy.stats`, symmetric about 0, or anything with its `isf` and `sf`.
        majority: points of the larger group, at least as many as in the smaller.
        minority: points of the smaller group, at least 1.
        draws: of both groups, at least 2.
        generator: draws them.

    Returns:
        "gap", mu; and means over the separable draws of "displacement", t / mu, and "error", the larger of the two
        groups' errors (0 to 1), with "subsampled displacement" and "subsampled error" for the subsample. The
        latter displacement is a little above 0, since the draws were picked as separable for the whole majority.

    Raises:
        ValueError: sizes that are not whole numbers in their range.

    >>> from scipy import stats
    >>> found = tail_asymmetry_experiment(stats.t(3), generator=np.random.default_rng(0))
    >>> round(found["displacement"], 2), round(found["error"] / found["subsampled error"], 1)
    (0.47, 6.8)
    """
    require.whole("minority", minority, at_least=1)
    require.whole("majority", majority, at_least=minority)
    require.whole("draws", draws, at_least=2)
    sizes = (minority, minority, majority - minority)
    below, above, discarded = (noise.isf(_tail(generator.standard_exponential(draws), n)) for n in sizes)
    everyone = np.maximum(below, discarded)
    mu = float(np.median(everyone + above)) / 2
    separable = everyone + above <= 2 * mu
    found = {"gap": mu}
    for prefix, reach in (("", everyone), ("subsampled ", below)):
        threshold = (reach - above)[separable] / 2
        found[f"{prefix}displacement"] = float(np.mean(threshold)) / mu
        found[f"{prefix}error"] = float(np.mean(noise.sf(mu - np.abs(threshold))))
    return found


def _tail(exponential: Any, n: int) -> Any:
    """P(noise > M) of the largest M of n draws: 1 - U^(1/n), with U = exp(-exponential); of none, 1."""
    return -np.expm1(-exponential / n) if n else np.ones_like(exponential)
