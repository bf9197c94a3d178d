"""MaxQuery: a mask transformer's queries sit where ordinary pixels cluster, so a pixel that is near none is strange.

A mask transformer segments by clustering: each pixel is shared out among learned queries, each query has a class. The
largest affinity of a pixel to any query, with its sign changed, says where in an image something is that training did
not show, at no further cost. Use it for segmentation where new kinds of things may appear, such as rare tumours. A
second loss reserves queries for each kind of region, since most would otherwise settle on the large, varied
background and leave few for what one looks for. For classification of whole images it has nothing to offer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Devil is in the Queries: Advancing Mask Transformers for Real-world Medical Image Segmentation and"
    " Out-of-Distribution Localization",
    year=2023,
    helps=("strange-inputs", "class-imbalance"),
    url="https://arxiv.org/abs/2304.00212",
    departs=(
        "no code was released and only the abstract could be read: that the loss is the negative log-likelihood of the"
        " group's mass, and the sizes of the groups, are assumptions",
        "scores are not rescaled within an image, so that one threshold serves all images",
        "no network: any mask transformer's queries and pixel embeddings will do",
    ),
    equation=(
        r"\mathrm{score}_p=-\max_n s_{pn},\qquad "
        r"\ell_p=-\log\sum_{n\in G(y_p)}\operatorname{softmax}(s_p)_n,\qquad "
        r"s_{pn}=f_p^\top q_n:\ \text{pixel }p,\ \text{query }n"
    ),
)


def maxquery_score(affinity: Float[Tensor, "batch queries *space"]) -> Float[Tensor, "batch *space"]:
    """Minus the largest affinity of each pixel to a query; higher is more unusual.

    Args:
        affinity: s_pn = f_p . q_n, raw, as it enters the softmax over queries; a mask transformer's mask logits.

    Raises:
        ValueError: a shape or dtype that does not fit.

    >>> maxquery_score(torch.tensor([[[4.0, 0.5], [-1.0, 1.5]]]))  # two queries, two pixels
    tensor([[-4.0000, -1.5000]])
    """
    _check(affinity)
    return -affinity.amax(1)


def cluster_segmentation(
    affinity: Float[Tensor, "batch queries *space"], query_logits: Float[Tensor, "batch queries classes"]
) -> Float[Tensor, "batch classes *space"]:
    """Class logits of pixels: the queries' logits, shared out by the softmax of the affinity over queries.

    Args:
        affinity: s_pn = f_p . q_n.
        query_logits: class logits c_n of each query.

    Raises:
        ValueError: a shape or dtype that does not fit.

    >>> affinity = torch.tensor([[[0.0, 99.0], [0.0, -99.0]]])  # the second pixel belongs to the first query
    >>> cluster_segmentation(affinity, torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]))
    tensor([[[1., 2.],
             [2., 0.]]])
    """
    _check(affinity)
    require.floating("query_logits", query_logits, dims=3)
    if query_logits.shape[:2] != affinity.shape[:2]:
        wanted = ", ".join(map(str, affinity.shape[:2]))
        raise ValueError(f"query_logits: expected ({wanted}, classes), got shape {tuple(query_logits.shape)}")
    return torch.einsum("bn...,bnk->bk...", affinity.softmax(1), query_logits)


def query_distribution_loss(
    affinity: Float[Tensor, "batch queries *space"], target: Int[Tensor, "batch *space"], *, sizes: Sequence[int]
) -> Float[Tensor, "batch *space"]:
    """-log of the share of each pixel in the queries reserved for its kind; one value a pixel.

    The first sizes[0] queries belong to group 0, the next sizes[1] to group 1, and so on, such as 2 for the background,
    2 for an organ and 4 for its tumours of whatever class. With one query each it is cross-entropy of the affinity.

    Args:
        affinity: s_pn = f_p . q_n.
        target: each pixel's group, 0 to len(sizes) - 1.
        sizes: of the groups, at least two groups of at least one query, summing to the number of queries.

    Raises:
        ValueError: a shape, dtype or size that does not fit.

    >>> even = torch.zeros(1, 8, 2)  # each pixel has an eighth of every query
    >>> query_distribution_loss(even, torch.tensor([[0, 2]]), sizes=(2, 2, 4))  # ln 4 and ln 2
    tensor([[1.3863, 0.6931]])
    """
    _check(affinity)
    require.integers("target", target, shape=(affinity.shape[0], *affinity.shape[2:]))
    if len(sizes) < 2 or min(sizes) < 1 or sum(sizes) != affinity.shape[1]:
        raise ValueError(
            f"sizes: expected at least two whole numbers >= 1 that sum to {affinity.shape[1]}, got {tuple(sizes)}"
        )
    groups = torch.stack([part.logsumexp(1) for part in torch.split(affinity, list(sizes), 1)], 1)
    return F.cross_entropy(groups, target, reduction="none")


def _check(affinity: Tensor) -> None:
    require.floating("affinity", affinity, at_least_dims=3)
