"""LOGIN: tell which of two objects does what to the other, and keep the predicates' directions apart.

Scene graphs name relations between pairs of objects, and most relations have a direction. Here a pair is read as three
things, subject, object and the background around both, which attend to each other and are then put together in every
order that has the subject before the object; so the head knows who is who without depending on one arrangement. Objects
and relations exchange context over the scene's graph. Attract & Repel pulls the outputs of correctly predicted
relations towards a running anchor of their predicate, which moves away from those of the others. Use it for relations
that differ by direction. For symmetric ones it does nothing.
"""

from collections.abc import Sequence
from itertools import permutations
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.paper import Paper

PAPER = Paper(
    title="Tackling the Challenges in Scene Graph Generation with Local-to-Global Interactions",
    year=2021,
    helps=("class-imbalance",),
    departs=(
        "built from the first author's repository, which calls itself unfinished",
        "its non-local block without batch normalisation and subsampling, its graph attention without dropout",
        "its masks have x and y exchanged; here they lie where the boxes are",
        "two-way recall counts a pair of objects once, however many predicates are true of it; boxes are given",
    ),
    equation=r"r = g[s; o; b] + g[s; b; o] + g[b; s; o],\qquad a_c \leftarrow"
    r" \frac{n_c a_c + \sum_{\text{pos}} e - \sum_{\text{neg}} e}{n_c + |\text{pos}| + |\text{neg}|},\qquad"
    r" \mathcal L = \sum_c \frac{1}{|\text{pos}|} \sum_{\text{pos}} (1 - \cos(a_c, e))",
)

Orders = Literal["half", "one", "all"]


def pair_masks(
    subjects: Float[Tensor, "n 4"], objects: Float[Tensor, "n 4"], size: tuple[int, int]
) -> Bool[Tensor, "3 n h w"]:
    """Which cells of the pair's union box belong to the subject, to the object, and to neither.

    Edges are rounded to cells. A box without area, with corners reversed or with a NaN has none.

    Args:
        subjects: boxes x1, y1, x2, y2.
        objects: boxes.
        size: h and w of the union's feature map.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> pair_masks(torch.tensor([[0.0, 0.0, 2.0, 1.0]]), torch.tensor([[2.0, 0.0, 4.0, 1.0]]), (1, 4)).int().squeeze()
    tensor([[1, 1, 0, 0],
            [0, 0, 1, 1],
            [0, 0, 0, 0]], dtype=torch.int32)
    """
    for name, boxes in (("subjects", subjects), ("objects", objects)):
        require.floating(name, boxes, dims=2)
        require.same_shape(name, boxes, (len(subjects), 4))
    low = torch.minimum(subjects[:, :2], objects[:, :2])
    extent = (torch.maximum(subjects[:, 2:], objects[:, 2:]) - low).clamp_min(torch.finfo(low.dtype).tiny)
    cells = torch.tensor(size[::-1], dtype=low.dtype, device=low.device)
    inside = []
    for boxes in (subjects, objects):
        first, last = ((corner - low).div(extent).mul(cells).round() for corner in boxes.split(2, 1))
        x, y = (
            (torch.arange(n, device=low.device) >= first[:, i, None])
            & (torch.arange(n, device=low.device) < last[:, i, None])
            for i, n in ((0, size[1]), (1, size[0]))
        )
        inside.append(y.unsqueeze(2) & x.unsqueeze(1))
    return torch.stack([*inside, ~(inside[0] | inside[1])])


class DirectionalRelationHead(nn.Module):
    """Union features and boxes of pairs to one vector each, which changes when subject and object change places.

    The features masked by subject, object and background attend to each other over all their cells (a non-local block
    with residual), are averaged over cells to s, o and b, and go through one network g in several orders, summed.

    Args:
        channels: of the features, at least 2.
        hidden: width of g's hidden layer.
        out: width of the result.
        orders: "half" are the three orders with the subject before the object, the paper's; "one" is s, o, b alone;
            "all" are all six, which cannot tell the two directions apart by the order.

    Raises:
        ValueError: a number out of range, shapes or dtypes that do not fit.

    >>> head = DirectionalRelationHead(8, hidden=16, out=5)
    >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 1.0], [2.0, 0.0, 4.0, 1.0]])
    >>> head(torch.zeros(2, 8, 7, 7), boxes, boxes.flip(0)).shape
    torch.Size([2, 5])
    """

    def __init__(self, channels: int, *, hidden: int, out: int, orders: Orders = "half") -> None:
        super().__init__()
        require.whole("channels", channels, at_least=2)
        require.whole("hidden", hidden, at_least=1)
        require.whole("out", out, at_least=1)
        require.one_of("orders", orders, ("half", "one", "all"))
        inner = channels // 2
        self.query, self.key, self.value = (nn.Linear(channels, inner) for _ in range(3))
        self.back = nn.Linear(inner, channels)
        nn.init.zeros_(self.back.weight)  # at first the block changes nothing
        nn.init.zeros_(self.back.bias)
        self.g = nn.Sequential(nn.Linear(3 * channels, hidden), nn.ReLU(), nn.Linear(hidden, out))
        every = list(permutations(range(3)))  # of subject, object, background
        chosen = {"half": [p for p in every if p.index(0) < p.index(1)], "one": every[:1], "all": every}
        self.orders = chosen[orders]

    def forward(
        self, features: Float[Tensor, "n c h w"], subjects: Float[Tensor, "n 4"], objects: Float[Tensor, "n 4"]
    ) -> Float[Tensor, "n out"]:
        require.floating("features", features, dims=4)
        require.same_shape("features", features, (len(features), self.query.in_features, *features.shape[2:]))
        require.same_shape("subjects", subjects, (len(features), 4))
        masks = pair_masks(subjects, objects, (features.shape[2], features.shape[3]))
        parts = (features * masks.unsqueeze(2)).flatten(3).movedim(0, 2)  # n, c, 3, h w
        cells = parts.flatten(2).mT
        weight = (self.query(cells) @ self.key(cells).mT).softmax(-1)
        cells = cells + self.back(weight @ self.value(cells))
        s_o_b = cells.unflatten(1, (3, -1)).mean(2)
        return sum((self.g(s_o_b[:, p].flatten(1)) for p in self.orders), start=features.new_zeros(()))


def relation_adjacency(num_objects: int, pairs: Int[Tensor, "m 2"]) -> Bool[Tensor, "n+m n+m"]:
    """Who attends to whom in a scene of n objects and m relations, objects first; symmetric.

    Objects of a pair to each other, a relation and its two objects, a relation and its reverse, everything to itself.

    Args:
        num_objects: n.
        pairs: numbers of subject and object of each relation, 0 to n - 1; for several scenes, number through.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> relation_adjacency(2, torch.tensor([[0, 1]])).int()
    tensor([[1, 1, 1],
            [1, 1, 1],
            [1, 1, 1]], dtype=torch.int32)
    """
    require.whole("num_objects", num_objects)
    require.integers("pairs", pairs, shape=(len(pairs), 2))
    size = num_objects + len(pairs)
    linked = torch.eye(size, dtype=torch.bool, device=pairs.device)
    relation = torch.arange(num_objects, size, device=pairs.device)
    for a, b in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 0], relation), (pairs[:, 1], relation)):
        linked[a, b] = linked[b, a] = True
    linked[num_objects:, num_objects:] |= (pairs.unsqueeze(1) == pairs.flip(1)).all(2)
    return linked


class RelationGraphAttention(nn.Module):
    """One round of context among the objects and relations of a scene, with several heads side by side.

    A head gives node i the ReLU of sum_j w_ij W x_j, w the softmax over its neighbours j of ReLU(F x_i . H x_j).

    Args:
        width: of the features, divisible by the heads.
        heads: number of heads.

    Raises:
        ValueError: numbers, shapes or dtypes that do not fit.

    >>> layer = RelationGraphAttention(16, heads=4)
    >>> objects, relations = layer(torch.zeros(3, 16), torch.zeros(2, 16), torch.tensor([[0, 1], [2, 1]]))
    >>> objects.shape, relations.shape
    (torch.Size([3, 16]), torch.Size([2, 16]))
    """

    def __init__(self, width: int, *, heads: int = 8) -> None:
        super().__init__()
        require.whole("heads", heads, at_least=1)
        require.whole("width", width, at_least=heads)
        if width % heads:
            raise ValueError(f"width: expected a multiple of {heads} heads, got {width}")
        self.heads = heads
        self.query, self.key = (nn.Linear(width, heads * width) for _ in range(2))
        self.value = nn.Linear(width, width)

    def forward(
        self, objects: Float[Tensor, "n d"], relations: Float[Tensor, "m d"], pairs: Int[Tensor, "m 2"]
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"]]:
        require.same_shape("objects", objects, (len(objects), self.value.in_features))
        require.same_shape("relations", relations, (len(pairs), self.value.in_features))
        x = torch.cat([objects, relations])
        query, key, value = (
            f(x).unflatten(1, (self.heads, -1)).movedim(1, 0) for f in (self.query, self.key, self.value)
        )
        strength = (query @ key.mT).relu().where(relation_adjacency(len(objects), pairs), -torch.inf)
        context = (strength.softmax(-1) @ value).relu().movedim(0, 1).flatten(1)
        return context[: len(objects)], context[len(objects) :]


class AttractRepelLoss(nn.Module):
    """1 - cos(a_c, e) of each correctly predicted relation e of predicate c, over the number of them; 0 for the others.

    Its sum is the paper's term, of weight 1, beside cross-entropy. In training mode each call first moves the anchors:
    a_c <- (n a_c + sum of c's - sum of the other correct ones) / (n + their number), n counting what went in before.
    Anchors carry no gradient.

    Args:
        num_classes: predicates.
        width: of the embeddings; None is num_classes, the logits themselves, as in the official code.

    Raises:
        ValueError: numbers, shapes or dtypes that do not fit.

    >>> loss = AttractRepelLoss(2)
    >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    >>> loss(logits, torch.tensor([0, 0, 1]))  # two are right, and point the anchor's way
    tensor([0., 0., 0.])
    """

    anchors: Tensor
    counts: Tensor

    def __init__(self, num_classes: int, *, width: int | None = None) -> None:
        super().__init__()
        require.whole("num_classes", num_classes, at_least=2)
        width = num_classes if width is None else width
        require.whole("width", width, at_least=1)
        self.register_buffer("anchors", torch.zeros(num_classes, width))
        self.register_buffer("counts", torch.zeros(num_classes))

    def forward(
        self, input: Float[Tensor, "n k"], target: Int[Tensor, " n"], *, embeddings: Float[Tensor, "n d"] | None = None
    ) -> Float[Tensor, " n"]:
        """Values for logits `input`, predicates `target` and their `embeddings`, the logits if None."""
        require.classes(input, target)
        require.same_shape("input", input, (len(input), len(self.counts)))
        e = input if embeddings is None else embeddings
        require.same_shape("embeddings", e, (len(input), self.anchors.shape[1]))
        mine = F.one_hot(target, len(self.counts)) * (input.argmax(1) == target).unsqueeze(1)
        mine = mine.to(self.anchors)
        if self.training:
            self._move(e.detach().to(self.anchors), mine)
        cosine = F.cosine_similarity(self.anchors[target].to(e), e, dim=1)
        right = mine.sum(1)
        share = right / (mine @ mine.sum(0)).clamp_min(1)
        return (1 - cosine) * share.to(e)

    @torch.no_grad()
    def _move(self, e: Tensor, mine: Tensor) -> None:
        seen = mine.sum(0) > 0  # of the other predicates the anchors stay
        total = mine.sum() * seen
        signed = 2 * mine.T @ e - (mine.sum(1) @ e)
        after = self.counts + total
        moved = (self.counts.unsqueeze(1) * self.anchors + signed) / after.clamp_min(1).unsqueeze(1)
        self.anchors.copy_(moved.where(seen.unsqueeze(1), self.anchors))
        self.counts.copy_(after)


def bidirectional_relationship_recall(
    scores: Float[Tensor, "m k"], pairs: Int[Tensor, "m 2"], truth: Sequence[tuple[int, int, int]], *, k: int
) -> float:
    """Share of a scene's two-way pairs whose both predicates are right, among the k pairs ranked first; NaN for none.

    Two objects are a two-way pair where a predicate is true of either direction. Predicted pairs are ranked by the sum
    of their two directions' best scores; of equal ones the earlier goes first.

    Args:
        scores: of each predicate for each directed pair.
        pairs: numbers of subject and object, each directed pair once.
        truth: (subject, object, predicate) that are true; several predicates of a pair are all right.
        k: so many pairs count.

    Raises:
        ValueError: shapes or dtypes that do not fit, k out of range.

    >>> scores = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
    >>> bidirectional_relationship_recall(scores, torch.tensor([[0, 1], [1, 0]]), [(0, 1, 0), (1, 0, 1)], k=1)
    1.0
    """
    require.floating("scores", scores, dims=2)
    require.integers("pairs", pairs, shape=(len(scores), 2))
    require.whole("k", k, at_least=1)
    right: dict[tuple[int, int], set[int]] = {}
    for subject, object_, predicate in truth:
        right.setdefault((subject, object_), set()).add(predicate)
    wanted = {pair for pair in right if pair[0] < pair[1] and pair[::-1] in right}
    if not wanted:
        return float("nan")
    best = scores.max(1)
    found = {
        (s, o): (value, predicate)
        for (s, o), value, predicate in zip(pairs.tolist(), best.values.tolist(), best.indices.tolist())
    }
    both = [pair for pair in found if pair[0] < pair[1] and pair[::-1] in found]
    both.sort(key=lambda pair: -(found[pair][0] + found[pair[::-1]][0]))
    hits = [p for p in both[:k] if p in wanted and all(found[d][1] in right[d] for d in (p, p[::-1]))]
    return len(hits) / len(wanted)
