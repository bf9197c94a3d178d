"""Dist loss: in every batch the predictions, sorted, are also held against the labels that such a batch should have.

Where some labels are rare, a regression trained by absolute or squared error keeps its predictions close to the
frequent ones, so they spread less than the labels do. Dist loss estimates the label density once, writes down the
sorted labels that a typical batch would have (pseudo labels), and adds the distance of the sorted predictions to them.
That stretches the predictions and serves the rare labels, at some cost to the frequent ones; no sample is reweighted.
Try it for imbalanced regression whose errors at rare values count, with batches of a hundred or more, as a batch has
to show the distribution. The paper used it to tell a vascular age from the pulse wave, whose excess over the calendar
age by more than 9 years went with a higher risk.
"""

import math
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Artificial Intelligence-derived Vascular Age from Photoplethysmography: A Novel Digital Biomarker for"
    " Cardiovascular Health",
    year=2025,
    helps=("class-imbalance", "heavy-tails"),
    departs=(
        "the loss alone: no network for pulse waves, no survival analysis",
        "what rounding leaves over in the pseudo labels goes to ever further neighbours of the mode; the official code"
        " may go below 0 or beyond the ends of the grid",
        "the values of sorted predictions are dealt back to the samples that they come from; the mean is the same",
        "`build` lays the grid of pseudo labels by the labels themselves, where no other resolution is known",
    ),
    equation=(
        r"\begin{aligned} "
        r"\ell&=\frac1n\sum_{i=1}^n\lvert\hat y_i-y_i\rvert+\frac wn\sum_{r=1}^n\lvert\hat y_{(r)}-s_r\rvert\\ "
        r"&\hat y_{(r)}:\ \text{softly sorted predictions},\quad "
        r"s_r:\ \text{sorted labels of a typical batch of }n "
        r"\end{aligned}"
    ),
    url="https://arxiv.org/abs/2502.12990",
)


@loss(
    on="real",
    couples=True,
    examples=(
        {"pseudo_labels": (-1.0, -0.5, 0.0, 0.25, 0.5, 2.0)},
        {"pseudo_labels": (-2.0, -1.0, 0.0, 0.0, 1.0, 3.0), "weight": 0.5, "distance": "l2", "strength": 4.0},
    ),
    tune={"weight": (0.5, 1.0, 2.0)},
    limits={"l1_loss": {"weight": 0.0, "distance": "l1"}, "mse_loss": {"weight": 0.0, "distance": "l2"}},
)
class DistLoss(nn.Module):
    """d(p_i, y_i) + weight * d(q_r, s_r), r being the rank of p_i among the batch's predictions. Per sample.

    q are the predictions sorted by `soft_sort`, s the pseudo labels. All batches must have as many samples as there
    are pseudo labels (`drop_last=True`).

        loss = DistLoss(kde_pseudo_labels(y_train, 256, low=21, high=100))  # ages in years
        loss = DistLoss.build(y_train, 256)  # or where no range and no resolution are given
        loss(model(x).squeeze(-1), y).mean().backward()

    Args:
        pseudo_labels: s (batch,), ascending, in the target's units, as `kde_pseudo_labels` gives them; kept as a
            buffer. (*replicas, batch) serves a stack of batches.
        weight: w, of the distance between distributions, at least 0.
        distance: d, "l1", "l2" (the square), or an elementwise function of two tensors.
        strength: of `soft_sort`, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, pseudo labels that are not ascending, a number out of range,
            another `distance`.

    >>> loss = DistLoss((0.0, 10.0))
    >>> loss(torch.tensor([6.0, 5.0]), torch.tensor([9.0, 5.0]))  # 3 + |6 - 10|, 0 + |5 - 0|
    tensor([7., 5.])
    """

    pseudo_labels: Tensor

    def __init__(
        self,
        pseudo_labels: Sequence[float] | Float[Tensor, "*batch"],
        *,
        weight: float | Tensor = 1.0,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "l1",
        strength: float | Tensor = 0.1,
    ) -> None:
        super().__init__()
        if not isinstance(pseudo_labels, Tensor):
            pseudo_labels = torch.tensor(pseudo_labels)
        require.floating("pseudo_labels", pseudo_labels, at_least_dims=1)
        if not bool((pseudo_labels.diff() >= 0).all()):
            raise ValueError("pseudo_labels: expected ascending numbers, got some that descend")
        require.number("weight", weight, at_least=0.0)
        require.number("strength", strength, above=0.0)
        if not callable(distance):
            require.one_of("distance", distance, ("l1", "l2"))
        self.register_buffer("pseudo_labels", pseudo_labels)
        self.weight, self.distance, self.strength = weight, distance, strength

    @classmethod
    def build(cls, labels: Float[Tensor, " samples"], batch_size: int, **hyper: Any) -> "DistLoss":
        """With the pseudo labels of training labels, on a grid over their range in tenths of their deviation.

        Args:
            labels: of the training samples; of two values at least.
            batch_size: of every batch, at least 1.
            **hyper: what the class takes besides.

        Raises:
            ValueError: what `kde_pseudo_labels` and the class raise.
        """
        require.floating("labels", labels, dims=1)
        if len(labels) < 2 or not bool(labels.min() < labels.max()):
            raise ValueError("labels: expected two different values at least")
        low, high, step = labels.min().item(), labels.max().item(), labels.std().item() / 10
        return cls(kde_pseudo_labels(labels, batch_size, low=low, high=high, step=step), **hyper)

    def forward(self, input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """The loss of predictions `input`, a whole batch of them."""
        require.floating("input", input, at_least_dims=1)
        require.same_shape("target", target, tuple(input.shape))
        batch = self.pseudo_labels.shape[-1]
        if input.shape[-1] != batch or self.pseudo_labels.shape != input.shape[-self.pseudo_labels.ndim :]:
            raise ValueError(
                f"input: expected (*, {', '.join(map(str, self.pseudo_labels.shape))}), like the pseudo labels,"
                f" got {tuple(input.shape)}; drop_last=True leaves out shorter batches"
            )
        q, order = _soft_sorted(input, self.strength)
        apart = self._apart(q, self.pseudo_labels.to(input).expand(input.shape))
        return self._apart(input, target) + self.weight * torch.zeros_like(input).scatter(-1, order, apart)

    def _apart(self, input: Tensor, target: Tensor) -> Tensor:
        if callable(self.distance):
            return self.distance(input, target)
        miss = input - target
        return miss.abs() if self.distance == "l1" else miss.square()

    def extra_repr(self) -> str:
        return f"batch={self.pseudo_labels.shape[-1]}, weight={self.weight}, distance={self.distance!r}"


def kde_pseudo_labels(
    target: Float[Tensor, " samples"],
    batch_size: int,
    *,
    low: float,
    high: float,
    step: float = 1.0,
    bandwidth: float = 0.5,
) -> Float[Tensor, " batch_size"]:
    """The labels of a typical batch, ascending: whole counts of the values low, low + step, ..., high.

    The counts are batch_size times a Gaussian kernel density at these values, normalised to sum 1 over them, and
    rounded. The tails, where less than one label is to be expected, are gathered: at either end the first value by
    which one has accumulated stands for all beyond it. What then lacks or exceeds batch_size is added to or taken
    from the most frequent value and its neighbours, one each, the nearest first.

    Args:
        target: labels of the training samples; those outside [low, high] do not count.
        batch_size: at least 1.
        low, high: ends of the grid, low < high: what labels there could be, not what there are.
        step: of the grid, above 0: the resolution that matters, 1 for an age in years.
        bandwidth: standard deviation of the kernel in units of the labels', above 0.

    Raises:
        ValueError: a target that is not (samples,), floating-point and of two values at least between low and high,
            a number out of range.

    >>> kde_pseudo_labels(torch.tensor([1.0, 3.0, 3.0, 4.0]), 8, low=0.0, high=6.0)
    tensor([1., 1., 2., 3., 3., 3., 4., 4.])
    """
    require.floating("target", target, dims=1)
    require.whole("batch_size", batch_size, at_least=1)
    _check("low", low)
    _check("high", high, above=low)
    _check("step", step, above=0.0)
    _check("bandwidth", bandwidth, above=0.0)
    labels = target[(target >= low) & (target <= high)].double()
    if not len(labels) or not bool(labels.min() < labels.max()):
        raise ValueError(f"target: expected two different values between {low:g} and {high:g} at least")
    grid = low + step * torch.arange(round((high - low) / step) + 1, dtype=torch.float64)
    width = bandwidth * labels.std()
    density = torch.stack([((value - labels) / width).square().div(-2).exp().mean() for value in grid.to(labels)])
    counts = _whole_counts(density / density.sum(), batch_size)
    return grid.repeat_interleave(counts).to(target)


def soft_sort(input: Float[Tensor, "*batch n"], *, strength: float | Tensor = 0.1) -> Float[Tensor, "*batch n"]:
    """The numbers in ascending order, those too far apart drawn together, so that the result is smooth in them.

    The Euclidean projection of (1, ..., n) / strength onto the permutahedron of the input, the convex hull of its n!
    orderings (Blondel et al., 2020). Where no two neighbours in order are further apart than 1 / strength it is the
    plain sort; a block that is too wide becomes its mean plus steps of 1 / strength. Forward O(n log n), and a pass
    for each round of merging blocks, of which there are few unless outliers are extreme; backward O(n).

    Args:
        input: sorted along its last dimension.
        strength: epsilon, of the regularisation, above 0, in inverse units of the input.

    Raises:
        ValueError: an input that is not floating-point, strength not above 0.

    >>> soft_sort(torch.tensor([2.0, 0.0, 0.5]), strength=1.0)  # gaps of 1 at most: 0.5 and 2 draw together
    tensor([0.0000, 0.7500, 1.7500])
    """
    require.floating("input", input, at_least_dims=1)
    require.number("strength", strength, above=0.0)
    return _soft_sorted(input, strength)[0]


def _soft_sorted(input: Tensor, strength: float | Tensor) -> tuple[Tensor, Tensor]:
    """The soft sort, and the order of the plain one."""
    values, order = input.sort(-1)
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    block, places = _blocks(wide.detach(), strength)
    sizes = block.bincount()
    mean = wide.new_zeros(len(sizes)).index_add(0, block, wide.flatten()) / sizes
    middle = wide.new_zeros(len(sizes)).index_add(0, block, places) / sizes
    return (mean[block] + (places - middle[block]) / strength).view(values.shape).to(values), order


@torch.no_grad()
def _blocks(values: Tensor, strength: float | Tensor) -> tuple[Tensor, Tensor]:
    """The block of each number, counted through all rows, and its place in its row: both flat.

    Isotonic regression of places / strength - values by pooling adjacent violators, all of a round at once: two
    neighbouring blocks whose means are further apart than their middles are allow belong together in the end.
    """
    n = max(1, values.shape[-1])
    flat = values.flatten()
    index = torch.arange(len(flat), device=flat.device)
    places = (index % n).to(flat)
    begins = torch.ones_like(index, dtype=torch.bool)
    while True:
        block = begins.cumsum(0) - 1
        sizes = block.bincount()
        mean = flat.new_zeros(len(sizes)).index_add_(0, block, flat) / sizes
        middle = flat.new_zeros(len(sizes)).index_add_(0, block, places) / sizes
        first = begins.nonzero().squeeze(-1)[1:]
        merge = (mean.diff() > middle.diff() / strength) & (first % n != 0)
        if not merge.any():
            return block, places
        begins[first[merge]] = False


def _whole_counts(share: Tensor, total: int) -> Tensor:
    """Whole numbers >= 0 that sum to `total`, close to total * share, with no count beyond the tails' first."""
    expected = total * share
    below, above = expected.cumsum(0), expected.flip(0).cumsum(0).flip(0)
    last = len(share) - 1
    start, end = min(int((below < 1).sum()), last), max(int((above >= 1).sum()) - 1, 0)
    counts = torch.zeros_like(expected)
    counts[start + 1 : end] = expected[start + 1 : end].round()
    counts[start], counts[end] = below[start].round(), above[end].round()
    left, mode = total - int(counts.sum()), int(counts.argmax())
    more = 1 if left > 0 else -1
    nearest = cycle(sorted(range(len(share)), key=lambda i: (abs(i - mode), i)))
    while left:
        place = next(nearest)
        if counts[place] + more >= 0:
            counts[place] += more
            left -= more
    return counts.long()


def _check(name: str, value: float, *, above: float = -math.inf) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor; labels are counted, which passes no gradient back")
    require.number(name, value, above=above)
