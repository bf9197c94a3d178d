"""Attention-RPN: detect a class from a few pictures of it, without training, by comparing everything with them.

A support picture of the wanted class acts twice. Averaged to a vector, it weights the channels of the query's features,
so that the proposal network looks for that class and not for objects in general. Then each proposal is compared with
the support in three ways that were trained to compare: as wholes, cell against cell, and patch by patch. Training
shows each proposal a support of its own class and one of another, so that it learns to tell classes apart and not only
objects from background. Use it for classes with a handful of examples that change often. With many examples, fine-tune
a detector.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Few-Shot Object Detection with Attention-RPN and Multi-Relation Detector",
    year=2020,
    helps=("few-labels",),
    departs=(
        "the proposal network and the relation head alone; backbone, anchors and suppression are the user's",
        "hard pairs are told apart by masks; the official code by their place in the batch",
        "layers start as torch's do; the official code draws them with a standard deviation of 0.01",
    ),
    equation=r"G_{chw} = \frac{1}{S^2}\sum_{i,j} X_{cij}\, Y_{chw},\qquad"
    r" m = m_{\text{global}} + m_{\text{local}} + m_{\text{patch}}",
)

RELATIONS = ("global", "local", "patch")


def support_attention(query: Float[Tensor, "b c h w"], support: Float[Tensor, "b c s t"]) -> Float[Tensor, "b c h w"]:
    """The query's features, each channel times its mean over the support: a depthwise correlation of 1 by 1.

    Args:
        query: features of images.
        support: features of the wanted class's object, a batch of one for all images; average over several examples.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> support_attention(torch.ones(1, 1, 1, 2), torch.tensor([[[[1.0, 3.0]]]]))
    tensor([[[[2., 2.]]]])
    """
    require.floating("query", query, dims=4)
    _support(support, query)
    return query * support.mean((2, 3), keepdim=True)


class AttentionRPN(nn.Module):
    """A proposal network for the class of a support: `support_attention`, a 3x3 convolution, then as in Faster R-CNN.

    It gives objectness logits (b, anchors, h, w) and box deltas (b, 4 anchors, h, w), as torchvision's RPN head does.

    Args:
        channels: of the features.
        anchors: at each place.

    Raises:
        ValueError: numbers, shapes or dtypes that do not fit.

    >>> logits, deltas = AttentionRPN(8, anchors=3)(torch.zeros(2, 8, 5, 6), torch.zeros(1, 8, 4, 4))
    >>> logits.shape, deltas.shape
    (torch.Size([2, 3, 5, 6]), torch.Size([2, 12, 5, 6]))
    """

    def __init__(self, channels: int, *, anchors: int = 1) -> None:
        super().__init__()
        require.whole("channels", channels, at_least=1)
        require.whole("anchors", anchors, at_least=1)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.cls_logits = nn.Conv2d(channels, anchors, 1)
        self.bbox_pred = nn.Conv2d(channels, 4 * anchors, 1)

    def forward(self, query: Float[Tensor, "b c h w"], support: Float[Tensor, "b c s t"]) -> tuple[Tensor, Tensor]:
        hidden = self.conv(support_attention(query, support)).relu()
        return self.cls_logits(hidden), self.bbox_pred(hidden)


class MultiRelationHead(nn.Module):
    """Compares proposals with a support in three ways and sums their logits for (match, no match); deltas beside them.

    "global": means of both over their cells, concatenated, through two layers. "local": a 1x1 convolution of both, then
    the sum over cells of their products in each channel. "patch": both maps concatenated, through three convolutions
    and two poolings to one cell, which also gives the box deltas, 0 without it.

    Args:
        channels: of the features, at least 4.
        relations: those in use.

    Raises:
        ValueError: numbers, names, shapes or dtypes that do not fit.

    >>> logits, deltas = MultiRelationHead(8)(torch.zeros(5, 8, 7, 7), torch.zeros(1, 8, 7, 7))
    >>> logits.shape, deltas.shape
    (torch.Size([5, 2]), torch.Size([5, 4]))
    """

    def __init__(self, channels: int, *, relations: Sequence[str] = RELATIONS) -> None:
        super().__init__()
        require.whole("channels", channels, at_least=4)
        if not relations:
            raise ValueError(f"relations: expected at least one of {', '.join(RELATIONS)}, got none")
        for relation in relations:
            require.one_of("relations", relation, RELATIONS)
        self.channels, self.relations = channels, tuple(relations)
        if "global" in relations:
            self.whole = nn.Sequential(
                nn.Linear(2 * channels, channels), nn.ReLU(), nn.Linear(channels, channels), nn.ReLU()
            )
        if "local" in relations:
            self.cell = nn.Conv2d(channels, channels, 1, bias=False)
        if "patch" in relations:
            narrow = channels // 4
            self.patch = nn.Sequential(
                nn.Conv2d(2 * channels, narrow, 1, bias=False),
                nn.ReLU(),
                nn.AvgPool2d(3, 1),
                nn.Conv2d(narrow, narrow, 3, bias=False),
                nn.ReLU(),
                nn.Conv2d(narrow, channels, 1, bias=False),
                nn.ReLU(),
                nn.AvgPool2d(3, 1),
                nn.Flatten(),
            )
            self.bbox_pred = nn.Linear(channels, 4)
        self.score = nn.ModuleDict({relation: nn.Linear(channels, 2) for relation in self.relations})

    def forward(
        self, proposals: Float[Tensor, "n c 7 7"], support: Float[Tensor, "n c 7 7"]
    ) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 4"]]:
        """`support` is a batch of one for all proposals, or one for each."""
        require.floating("proposals", proposals, dims=4)
        require.same_shape("proposals", proposals, (len(proposals), self.channels, 7, 7))
        _support(support, proposals)
        require.same_shape("support", support, (len(support), *proposals.shape[1:]))
        support = support.expand_as(proposals)
        seen = {}
        if "global" in self.relations:
            seen["global"] = self.whole(torch.cat([proposals.mean((2, 3)), support.mean((2, 3))], 1))
        if "local" in self.relations:
            seen["local"] = (self.cell(proposals) * self.cell(support)).sum((2, 3)).relu()
        deltas = proposals.new_zeros(len(proposals), 4)
        if "patch" in self.relations:
            seen["patch"] = self.patch(torch.cat([proposals, support], 1))
            deltas = self.bbox_pred(seen["patch"])
        return torch.stack([self.score[name](value) for name, value in seen.items()]).sum(0), deltas


def two_way_contrastive_pairs(
    logits: Float[Tensor, "n 2"], foreground: Bool[Tensor, " n"], same: Bool[Tensor, " n"]
) -> Int[Tensor, " m"]:
    """Which pairs of proposal and support to learn from: the matches, and twice and once as many hard others.

    All pairs (foreground, support of its class); of (background, the same support) at most twice as many and at most
    a quarter of all pairs; of (anything, support of another class) at most as many as the matches. Of either, those
    whose probability of matching is highest, and always one where there is one.

    Args:
        logits: of match and no match, see `MultiRelationHead`.
        foreground: the proposal covers an object of the query's class.
        same: the support is of the query's class.

    Returns:
        Indices, matches first; the first column is their right answer, the second the others'.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> match = torch.tensor([0.0, 9.0, 1.0, 2.0, -3.0, 5.0, -1.0, 0.0])
    >>> logits = torch.stack([match, torch.zeros(8)], 1)
    >>> foreground = torch.tensor([True, False, False, False, True, False, False, False])
    >>> same = torch.tensor([True, True, True, True, False, False, False, False])
    >>> two_way_contrastive_pairs(logits, foreground, same)
    tensor([0, 1, 3, 5])
    """
    require.floating("logits", logits, dims=2)
    require.same_shape("logits", logits, (len(logits), 2))
    for name, flags in (("foreground", foreground), ("same", same)):
        if not isinstance(flags, Tensor) or flags.dtype is not torch.bool or flags.shape != logits.shape[:1]:
            raise ValueError(f"{name}: expected a bool tensor of shape {tuple(logits.shape[:1])}, got {flags!r:.60}")
    likely = logits.detach().float().softmax(1)[:, 0]
    matches = (foreground & same).nonzero().squeeze(1)
    behind = max(1, min(2 * len(matches), len(logits) // 4))
    chosen = [matches]
    for others, most in ((same & ~foreground, behind), (~same, max(1, min(len(matches), behind)))):
        (rows,) = others.nonzero(as_tuple=True)
        chosen.append(rows[likely[rows].argsort(descending=True, stable=True)[:most]])
    return torch.cat(chosen)


def _support(support: Tensor, query: Tensor) -> None:
    require.floating("support", support, dims=4)
    if support.shape[1] != query.shape[1] or len(support) not in (1, len(query)):
        raise ValueError(
            f"support: expected {query.shape[1]} channels and a batch of 1 or {len(query)}, got {tuple(support.shape)}"
        )
