"""Clustering-based sensitivity sampling: a small weighted subset whose mean loss is that of all data.

Embed the data (any pretrained model will do), cluster the embeddings, and ask for the loss at the k centres only.
A sample's loss is then guessed as its centre's, plus lambda times its distance to the centre to a power z: an upper
bound wherever the loss is Hölder continuous in the embedding. Samples are drawn with a chance proportional to the
guess and weighed by its inverse, so that the weighted mean is unbiased for the mean loss of all data, and the more
exact the better the guess.

Use it when losses (or labels) are too dear to compute for every row and an embedding is cheap: data selection for
fine-tuning, or least squares on few rows. It gains over uniform sampling as far as the loss varies between clusters
rather than within them; if all losses are alike there is nothing to gain.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn
from torch.utils.data import Sampler

from lossary import require
from lossary.paper import Paper
from lossary.roles import selector

PAPER = Paper(
    title="Data-Efficient Learning via Clustering-Based Sensitivity Sampling: Foundation Models and Beyond",
    year=2024,
    helps=("training-cost", "few-labels"),
    departs=(
        "one round: all centres are asked for their loss at once",
        "plain k-means for every exponent z, not (k, z)-clustering",
        "the full text was not reachable; lambda, if not given, is a high quantile of the slopes between the centres"
        " (a low one bounds nothing, and on digits fell behind uniform sampling)",
    ),
    equation=(
        r"p_i=\frac{\ell(c_i)+\lambda\lVert e_i-c_i\rVert^z} "
        r"{\sum_j\bigl[\ell(c_j)+\lambda\lVert e_j-c_j\rVert^z\bigr]},\qquad "
        r"w_i=\frac1{n\,p_i},\qquad c_i:\ \text{the centre nearest to embedding }e_i"
    ),
    url="https://arxiv.org/abs/2402.17327",
)

_ROWS = 8192  # at once, for distances to the centres


def sensitivity_probabilities(
    embeddings: Float[Tensor, "n d"],
    centres: Int[Tensor, " k"],
    losses: Float[Tensor, " k"],
    *,
    holder: float,
    exponent: float = 2.0,
) -> Float[Tensor, " n"]:
    """The chance of every sample, proportional to l(c) + lambda |e - c|^z, with c the centre nearest to e.

    Args:
        embeddings: e of all n samples.
        centres: positions of the samples that are centres.
        losses: of the centres, not negative.
        holder: lambda >= 0; with |l(e) - l(c)| <= lambda |e - c|^z the guess is an upper bound.
        exponent: z > 0, in the paper 2 for k-means and 1 for k-median.

    Returns:
        (n,) numbers that sum to 1; all alike where every guess is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, no centre, holder < 0, exponent <= 0.

    >>> rows = torch.tensor([[0.0], [1.0], [10.0], [12.0]])
    >>> sensitivity_probabilities(rows, torch.tensor([0, 2]), torch.tensor([1.0, 2.0]), holder=0.5)
    tensor([0.1176, 0.1765, 0.2353, 0.4706])
    """
    require.floating("embeddings", embeddings, dims=2)
    require.integers("centres", centres)
    require.same_shape("losses", losses, (max(1, centres.numel()),))
    require.number("holder", holder, at_least=0.0)
    require.number("exponent", exponent, above=0.0)
    places = embeddings[centres]
    nearest = torch.cat([torch.cdist(rows, places).argmin(1) for rows in embeddings.split(_ROWS)])
    guess = losses[nearest] + holder * (embeddings - places[nearest]).norm(dim=1) ** exponent
    total = guess.sum()
    return torch.where(total > 0, guess / total, 1 / len(guess))


@selector(
    weighs=True,
    examples=(
        {
            "embeddings": (
                (0.0,),
                (0.1,),
                (0.3,),
                (4.0,),
                (4.1,),
                (4.4,),
                (9.0,),
                (9.1,),
                (8.8,),
                (0.2,),
                (4.2,),
                (9.3,),
            ),
            "size": 5,
            "num_clusters": 3,
            "holder": 0.5,
        },
    ),
    xfail={
        "weighs": "as a weighting it undoes the sampling, so samples that differ in nothing but index weigh differently"
    },
)
class ClusterSensitivitySampler(nn.Module, Sampler[int]):
    """Draws the subset once, by `sensitivity_probabilities`, and weighs it: a sampler and a weighting in one.

    Every epoch yields the same `size` positions, repeats among them, in an order of its own. Called on the losses of
    a batch it gives the weights 1 / (n p): their products' mean over an epoch is unbiased for the mean loss of all n
    samples. (The paper's weights 1 / (size p) are for the sum.)

        sampler = ClusterSensitivitySampler(
            embeddings, lambda centres: losses_of(data[centres]), size=500, num_clusters=50, generator=generator
        )
        for x, y, index in DataLoader(data, sampler=sampler, batch_size=64):
            losses = F.cross_entropy(model(x), y, reduction="none")
            (sampler(losses, index=index) * losses).mean().backward()

    All processes of a `torch.distributed` run draw the same subset if their generators were seeded alike, and the
    loader splits it. A `state_dict` holds the subset and resumes exactly.

    Args:
        embeddings: (n, d), finite; copied to the CPU for clustering.
        loss: loss(centres) gives the losses (k,) of the samples at these positions (k,), finite and not negative; it
            is called once. None takes all centres' losses as 1.
        size: s, samples that are drawn, with replacement.
        num_clusters: k of k-means; its centres are moved to the nearest samples, and fewer are kept where these
            coincide.
        generator: draws the clusters' beginnings, the subset and the order.
        holder: lambda >= 0. None takes the 90% quantile of |l(c) - l(c')| / |c - c'|^z over pairs of centres, 0
            where there is only one.
        exponent: z > 0.

    Attributes:
        positions: (size,) of the samples drawn; a buffer.
        weights: (n,) 1 / (n p), 0 where p is 0; a buffer.
        probabilities: (n,) p; a buffer.
        epoch: number of epochs begun; a buffer.

    Raises:
        ValueError: an argument out of range, embeddings or losses that are not finite, a negative loss; in a call,
            losses that are not (batch,), or positions that do not fit them.

    >>> rows, generator = torch.tensor([[0.0], [1.0], [10.0], [12.0]]), torch.Generator().manual_seed(0)
    >>> sampler = ClusterSensitivitySampler(
    ...     rows, lambda centres: rows[centres, 0], size=6, num_clusters=2, holder=1.0, generator=generator
    ... )
    >>> sampler.probabilities, sampler.weights
    (tensor([0.0000, 0.0400, 0.4000, 0.5600]), tensor([0.0000, 6.2500, 0.6250, 0.4464]))
    >>> list(sampler)
    [3, 2, 3, 3, 3, 3]
    """

    def __init__(
        self,
        embeddings: Float[Tensor, "n d"] | Sequence[Sequence[float]],
        loss: Callable[[Tensor], Tensor] | None = None,
        *,
        size: int,
        num_clusters: int,
        generator: Generator,
        holder: float | None = None,
        exponent: float = 2.0,
    ) -> None:
        super().__init__()
        rows = torch.as_tensor(embeddings).detach().cpu()
        require.floating("embeddings", rows, dims=2)
        if not len(rows) or not rows.isfinite().all():
            raise ValueError(
                f"embeddings: expected finite numbers for one or more samples, got shape {tuple(rows.shape)}"
            )
        require.whole("size", size, at_least=1)
        require.whole("num_clusters", num_clusters, at_least=1)
        require.number("exponent", exponent, above=0.0)
        rows = rows.double()
        centres = _centres(rows, num_clusters, generator)
        losses = torch.ones(len(centres)) if loss is None else torch.as_tensor(loss(centres)).detach().cpu()
        require.same_shape("loss", losses, (len(centres),))
        if not losses.isfinite().all() or losses.min() < 0:
            raise ValueError(
                f"loss: expected finite numbers >= 0 at the centres, got {losses.min():g} to {losses.max():g}"
            )
        losses = losses.double()
        if holder is None:
            holder = _slope(rows[centres], losses, exponent)
        p = sensitivity_probabilities(rows, centres, losses, holder=holder, exponent=exponent)
        draws = torch.rand(size, dtype=p.dtype, generator=generator)
        cumulative = p.cumsum(0)
        positions = torch.searchsorted(cumulative, draws * cumulative[-1], right=True)
        self.register_buffer("positions", positions)
        self.register_buffer("weights", torch.where(p > 0, 1 / (len(p) * p), 0.0).float())
        self.register_buffer("probabilities", p.float())
        self.register_buffer("epoch", torch.tensor(0))
        self.register_buffer("seed", torch.randint(2**62, (), generator=generator))

    @torch.no_grad()
    def forward(self, losses: Float[Tensor, " batch"], *, index: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Weigh the samples of a batch."""
        require.floating("losses", losses, dims=1)
        require.integers("index", index, shape=losses.shape)
        return self.weights.index_select(0, index).to(losses.dtype)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(int(self.seed) + int(self.epoch))
        self.epoch += 1
        yield from self.positions[torch.randperm(len(self.positions), generator=generator)].tolist()

    def __len__(self) -> int:
        return len(self.positions)


def _centres(rows: Tensor, k: int, generator: Generator) -> Tensor:
    """Positions of the samples nearest to the means of k-means, increasing, each once."""
    from sklearn.cluster import KMeans

    state = int(torch.randint(2**31, (), generator=generator))
    k = min(k, len(torch.unique(rows, dim=0)))
    means = torch.from_numpy(KMeans(k, n_init=1, random_state=state).fit(rows.numpy()).cluster_centers_)
    best = torch.full((k,), torch.inf, dtype=rows.dtype)
    nearest = torch.zeros(k, dtype=torch.int64)
    for start, part in zip(range(0, len(rows), _ROWS), rows.split(_ROWS)):
        distance, place = torch.cdist(part, means).min(0)
        nearest = torch.where(distance < best, place + start, nearest)
        best = torch.minimum(distance, best)
    return torch.unique(nearest)


def _slope(places: Tensor, losses: Tensor, exponent: float) -> float:
    """The 90% quantile of |l - l'| / |c - c'|^z over pairs of centres."""
    if len(places) < 2:
        return 0.0
    slopes = nn.functional.pdist(losses[:, None]) / nn.functional.pdist(places) ** exponent
    return float(slopes.kthvalue(max(1, round(0.9 * len(slopes)))).values)
