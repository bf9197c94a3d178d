"""InfoBatch: skip half of the samples that are already learned, and count those kept twice.

The last loss of every sample is remembered. An epoch leaves out each sample whose loss is below the mean with
probability r, and weighs the survivors among them by 1 / (1 - r), so that the expected gradient is that of
the full data up to a constant. The last epochs run on everything, to remove the variance that is left. Use it
when training is long and most samples are soon easy: the paper saves about 40% of the cost on CIFAR and
ImageNet. It saves little in the first epochs, while all losses are alike, and nothing in one-epoch training;
losses must be per sample. A step-based learning-rate schedule has to follow the shorter epochs.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.utils.data import Sampler

from lossary import require
from lossary.paper import Paper
from lossary.roles import selector
from lossary.weighting._memory import record

PAPER = Paper(
    title="InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data Pruning",
    year=2024,
    helps=("training-cost",),
    departs=(
        "samples are skipped independently, as in the paper; the official code skips an exact share of them",
        "no percentile in place of the mean",
        "under data parallelism the loader splits the epoch among the processes, not the sampler",
    ),
    equation=(
        r"\Pr(i\text{ left out})=\begin{cases}r&s_i<\bar s\\0&\text{else}\end{cases}\qquad "
        r"w_i=\begin{cases}1/(1-r)&s_i<\bar s\\1&\text{else}\end{cases}\qquad "
        r"s_i:\ \text{last loss}"
    ),
    url="https://openreview.net/forum?id=C61sk5LsK6",
)


@selector(
    weighs=True,
    examples=({"epochs": 4}, {"epochs": 3, "ratio": 0.25, "delta": 1.0}),
    tune={"ratio": (0.3, 0.5, 0.7)},
)
class InfoBatch(nn.Module, Sampler[int]):
    """The sampler of an epoch's positions, and the weighting of the batches they form, in one object.

    Iterating it yields an epoch in random order. Calling it on a batch's losses records them in training mode
    and returns the weights, 1 / (1 - ratio) for samples that were below the mean when the epoch began and 1
    for the others. Over an epoch their sum is N in expectation; within a batch they are not normalised.

        sampler = InfoBatch(len(data), epochs=200, generator=generator)
        for epoch in range(200):
            for x, y, index in DataLoader(data, sampler=sampler, batch_size=128):
                losses = F.cross_entropy(model(x), y, reduction="none")
                (sampler(losses, index=index) * losses).mean().backward()

    All processes of a `torch.distributed` run yield the same epoch if their generators were seeded alike, and
    the loader splits it, as accelerate's does; recorded losses are gathered from all. A `state_dict` taken
    between epochs resumes exactly. In an endless stream of epochs, a batch that spans two of them is weighed as
    the later one.

    Args:
        num_samples: length of the data, N.
        epochs: C, length of the training, of which the first int(delta * epochs) are pruned.
        generator: gives the seed from which all epochs are drawn.
        ratio: r, probability that a sample below the mean is left out, 0 <= r < 1.
        delta: share of the epochs that are pruned, 0 to 1.

    Attributes:
        scores: (N,), last loss of every sample, 1 before the first; a buffer.
        weights: (N,), weights of this epoch; a buffer.
        epoch: number of epochs begun; a buffer.

    Raises:
        ValueError: an argument out of range; losses that are not (batch,), or positions that do not fit them.

    >>> sampler = InfoBatch(6, epochs=2, delta=0.5, ratio=0.5, generator=torch.Generator().manual_seed(4))
    >>> sampler(torch.tensor([9.0, 0.1, 0.1, 0.1, 0.1, 0.1]), index=torch.arange(6))
    tensor([1., 1., 1., 1., 1., 1.])
    >>> list(sampler), sampler.weights
    ([4, 0, 3], tensor([1., 2., 2., 2., 2., 2.]))
    >>> len(sampler), len(list(sampler))  # delta: the second epoch is whole
    (6, 6)
    """

    def __init__(
        self, num_samples: int, *, epochs: int, generator: Generator, ratio: float = 0.5, delta: float = 0.875
    ) -> None:
        super().__init__()
        require.whole("num_samples", num_samples, at_least=1)
        require.whole("epochs", epochs, at_least=1)
        require.number("ratio", ratio, at_least=0.0, below=1.0)
        require.number("delta", delta, at_least=0.0, at_most=1.0)
        self.ratio, self.pruned_epochs = ratio, int(delta * epochs)
        self.register_buffer("scores", torch.ones(num_samples))
        self.register_buffer("weights", torch.ones(num_samples))
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("seed", torch.randint(2**62, (), generator=generator))

    @torch.no_grad()
    def forward(self, losses: Float[Tensor, " batch"], *, index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Record the losses, in training mode, and weigh the samples."""
        require.floating("losses", losses, dims=1)
        require.integers("index", index, shape=losses.shape)
        if self.training:
            record(self.scores, index, losses)
        return self.weights.index_select(0, index).to(losses.dtype)

    def __iter__(self) -> Iterator[int]:
        kept, weights = self._next_epoch()
        self.epoch += 1
        self.weights.copy_(weights)
        yield from kept.tolist()

    def __len__(self) -> int:
        """How many positions the next epoch would yield if it began now."""
        return len(self._next_epoch()[0])

    def _next_epoch(self) -> tuple[Tensor, Tensor]:
        """Positions in order, and weights; drawn from the epoch's own generator, so asking changes nothing."""
        generator = torch.Generator().manual_seed(int(self.seed) + int(self.epoch))
        scores = self.scores.cpu()
        order = torch.randperm(len(scores), generator=generator)
        prunable = (scores < scores.mean()) & (int(self.epoch) < self.pruned_epochs)
        left_out = prunable & (torch.rand(len(scores), generator=generator) < self.ratio)
        return order[~left_out[order]], torch.where(prunable, 1 / (1 - self.ratio), 1.0)
