"""Co-DETR: while a DETR trains one to one, auxiliary heads train its encoder one to many, and lend it their positives.

A DETR has one query for each object that learns anything, so its encoder hears little. Here dense heads on the
encoder's output, each with an assigner of its own, teach it at every place that belongs to an object; and the places
that they call positive become further queries, whose targets are known without matching, so that the decoder learns
more too. All of it goes at inference, which costs what it did. It helps where a DETR trains slowly; with many steps on
plenty of data the gain is about a point of average precision.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from lossary import require
from lossary.detection._assign import atss, fits, hungarian, setting, taken
from lossary.detection._heads import around, box_giou, sine_position
from lossary.detection._overlap import box_iou
from lossary.paper import Paper
from lossary.roles import assigner

PAPER = Paper(
    title="DETRs with Collaborative Hybrid Assignments Training",
    year=2023,
    helps=("training-cost", "crowded-scenes"),
    departs=(
        "each auxiliary head is two layers at every place, without centerness; the paper's are those of ATSS and"
        " Faster R-CNN on a feature pyramid",
        "auxiliary boxes are distances from the anchor's centre in units of its half side",
    ),
    equation=(
        r"\mathcal{L} = \sum_{l=1}^{L} \Bigl( \tilde{\mathcal{L}}^{\mathrm{dec}}_l"
        r" + \lambda_1 \sum_{i=1}^{K} \mathcal{L}^{\mathrm{dec}}_{i,l}"
        r" + \lambda_2 \sum_{i=1}^{K} \mathcal{L}^{\mathrm{enc}}_i \Bigr)"
    ),
    url="https://arxiv.org/abs/2211.12860",
)

Answers = Sequence[tuple[Tensor, Tensor]]


@assigner(examples=({}, {"k": 4}))
def atss_assign(
    anchors: Float[Tensor, "anchors 4"],
    truth: Float[Tensor, "*batch true 4"],
    mask: Bool[Tensor, "*batch true"] | None = None,
    *,
    k: int = 9,
    levels: tuple[int, ...] = (),
) -> Int[Tensor, "*batch anchors"]:
    """The true box that each anchor learns, -1 for none, by adaptive training sample selection (Zhang et al. 2020).

    On each level the k anchors whose centres are nearest to the true box's centre are candidates. Those belong to it
    whose IoU reaches the mean plus one standard deviation of all candidates' and whose centre lies within it; one that
    belongs to several goes to the one of largest IoU. A box without area or with a NaN gets none.

    Args:
        anchors: x1, y1, x2, y2, level after level.
        truth: true boxes.
        mask: False for rows of `truth` that only pad.
        k: candidates on a level, >= 1.
        levels: numbers of anchors, which add up to all; empty is one level.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter outside its range.

    >>> import torch
    >>> corner = torch.tensor([[0.0, 0.0], [2.0, 0.0], [6.0, 0.0], [0.0, 9.0]])
    >>> atss_assign(torch.cat([corner, corner + 4], 1), torch.tensor([[0.0, 0.0, 4.0, 4.0]]))
    tensor([ 0, -1, -1, -1])
    """
    fits(truth, mask, anchors=anchors)
    require.whole("k", k, at_least=1)
    if levels and sum(levels) != len(anchors):
        raise ValueError(f"levels: expected numbers that add up to {len(anchors)} anchors, got {levels}")
    overlap = box_iou(anchors.unsqueeze(-2), truth.unsqueeze(-3))
    return atss(anchors, truth, overlap.detach(), mask, levels=levels or (len(anchors),), k=k)


def positive_queries_from_aux(
    features: Float[Tensor, "batch anchors width"],
    anchors: Float[Tensor, "anchors 4"],
    match: Int[Tensor, "batch anchors"],
    *,
    limit: int = 300,
    generator: Generator | None = None,
) -> tuple[Float[Tensor, "batch queries 4"], Float[Tensor, "batch queries width"], Int[Tensor, "batch queries"]]:
    """Boxes, features and matches of an auxiliary head's positives, as many an image as the fullest image has.

    Images with fewer are filled up with negatives, match -1, which learn that they are background. At least nine.

    Args:
        features: what the encoder says at each anchor's place; gradients pass.
        anchors: x1, y1, x2, y2.
        match: of an assigner.
        limit: of queries an image, >= 9.
        generator: draws which negatives, and which positives where there are more than the limit; None takes the first.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a limit below 9.

    >>> import torch
    >>> features, anchors = torch.arange(20.0).view(1, 10, 2), torch.arange(40.0).view(10, 4)
    >>> match = torch.tensor([[-1, -1, 1, -1, -1, 0, -1, -1, -1, -1]])
    >>> boxes, seen, own = positive_queries_from_aux(features, anchors, match)
    >>> boxes[0, :2], seen[0, :2], own
    (tensor([[ 8.,  9., 10., 11.], [20., 21., 22., 23.]]), tensor([[ 4.,  5.], [10., 11.]]),
     tensor([[ 1,  0, -1, -1, -1, -1, -1, -1, -1]]))
    """
    require.floating("features", features, dims=3)
    require.same_shape("anchors", anchors, (features.shape[1], 4))
    require.integers("match", match, shape=features.shape[:2])
    require.whole("limit", limit, at_least=9)
    positive = match >= 0
    chance = torch.zeros(match.shape) if generator is None else torch.rand(match.shape, generator=generator)
    rank = positive + chance.to(match.device)  # a positive is above every negative
    most = int(positive.sum(1).max()) if len(match) else 0
    order = rank.argsort(dim=1, descending=True, stable=True)[:, : min(max(most, 9), limit)]
    seen = features.gather(1, order.unsqueeze(-1).expand(-1, -1, features.shape[-1]))
    return anchors[order], seen, match.gather(1, order).clamp(min=-1)


class HybridAssignmentTrainer(nn.Module):
    """A DETR and its loss in training: one to one, plus what auxiliary heads and their positives add.

    Without assigners this is plain one-to-one training. What one deploys is `model`, as it is.

    Args:
        model: has `content` (Q, width) and `reference` (Q, 4), the logits of the queries' first boxes as centre and
            size in shares of the image; `encode(x)` gives the memory (B, A, width), one vector for each anchor;
            `decode(memory, content, reference)` lists logits (B, Q, classes) and boxes (B, Q, 4) of each layer.
        anchors: (A, 4), x1, y1, x2, y2, one at each place of the memory, with area.
        size: width and height of the image, in the unit of the boxes.
        classes: of objects.
        generator: of the auxiliary weights, and in `forward` of nothing.
        assigners: one auxiliary head for each: assign(anchors, truth, mask) -> match (B, A).
        lambda1: weight of the auxiliary queries' loss, >= 0; at 0 there are none.
        lambda2: weight of the auxiliary heads' loss, >= 0.

    Raises:
        ValueError: anchors that do not fit, or a number out of range.

    >>> import torch
    >>> from lossary.tasks import transformer_detector
    >>> g = torch.Generator().manual_seed(0)
    >>> points = 8 * torch.cartesian_prod(torch.arange(8), torch.arange(8)).flip(1) + 4.0
    >>> anchors = torch.cat([points - 10, points + 10], 1)
    >>> trainer = HybridAssignmentTrainer(
    ...     transformer_detector(generator=g, inputs=3), anchors, (64, 64), 6, generator=g
    ... )
    >>> trainer(torch.rand(1, 3, 8, 8, generator=g), torch.tensor([[[8.0, 8, 30, 30]]]), torch.tensor([[2]])).shape
    torch.Size([])
    """

    anchors: Tensor
    scale: Tensor

    def __init__(
        self,
        model: Any,
        anchors: Float[Tensor, "anchors 4"],
        size: tuple[float, float],
        classes: int,
        *,
        generator: Generator,
        assigners: Sequence[Callable[[Tensor, Tensor, Tensor | None], Tensor]] = (atss_assign,),
        lambda1: float = 1.0,
        lambda2: float = 2.0,
    ) -> None:
        super().__init__()
        require.same_shape("anchors", anchors, (len(anchors), 4))
        require.whole("classes", classes, at_least=1)
        setting("lambda1", lambda1, at_least=0.0)
        setting("lambda2", lambda2, at_least=0.0)
        self.model, self.assigners, self.classes = model, tuple(assigners), classes
        self.lambda1, self.lambda2 = lambda1, lambda2
        self.register_buffer("anchors", anchors)
        self.register_buffer("scale", torch.tensor([*size, *size], dtype=anchors.dtype))
        width = model.content.shape[1]
        self.heads = nn.ModuleList(_dense(width, classes, generator) for _ in self.assigners)
        self.places = nn.ModuleList(_normed(2 * width, width, generator) for _ in self.assigners)
        self.contents = nn.ModuleList(_normed(width, width, generator) for _ in self.assigners)

    def forward(
        self,
        x: Any,
        truth: Float[Tensor, "batch true 4"],
        labels: Int[Tensor, "batch true"],
        mask: Bool[Tensor, "batch true"] | None = None,
        *,
        generator: Generator | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Args:
            x: whatever the model's `encode` takes.
            truth: true boxes.
            labels: their classes.
            mask: False for rows of `truth` that only pad.
            generator: as in `positive_queries_from_aux`.

        Raises:
            ValueError: shapes or dtypes that do not fit.
        """
        fits(truth, mask, labels=labels, anchors=self.anchors)
        memory = self.model.encode(x)
        queries = (value.expand(len(memory), -1, -1) for value in (self.model.content, self.model.reference))
        answers = self.model.decode(memory, *queries)
        total = self._decoded(answers, truth, labels, mask)
        for head, place, content, assign in zip(self.heads, self.places, self.contents, self.assigners):
            match = assign(self.anchors, truth, mask)
            total = total + self.lambda2 * len(answers) * self._dense(head(memory), truth, labels, match)
            if self.lambda1:
                boxes, seen, own = positive_queries_from_aux(memory, self.anchors, match, generator=generator)
                share = self._shares(boxes)
                query = place(sine_position(share, seen.shape[-1] // 2)) + content(seen)
                auxiliary = self.model.decode(memory, query, torch.logit(share, eps=1e-5))
                total = total + self.lambda1 * sum(self._loss(*answer, truth, labels, own) for answer in auxiliary)
        return total

    def _decoded(self, answers: Answers, truth: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor:
        """One to one: every layer's answers are matched anew, 2 focal + 5 L1 + 2 GIoU being both cost and loss."""
        total = truth.new_zeros(())
        for logits, boxes in answers:
            with torch.no_grad():
                index = labels.unsqueeze(1).expand(-1, logits.shape[1], -1)
                price = _focal(logits, torch.ones_like(logits)) - _focal(logits, torch.zeros_like(logits))
                apart = (self._shares(boxes).unsqueeze(2) - self._shares(truth).unsqueeze(1)).abs().sum(-1)
                cost = 2 * price.gather(-1, index) + 5 * apart - 2 * box_giou(boxes.unsqueeze(2), truth.unsqueeze(1))
            total = total + self._loss(logits, boxes, truth, labels, hungarian(cost, mask))
        return total

    def _loss(self, logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, match: Tensor) -> Tensor:
        """2 focal + 5 L1 + 2 (1 - GIoU), over the number of matches; boxes as centre and size in shares for L1."""
        hit = match >= 0
        found, true = boxes[hit], taken(truth, match)[hit]
        apart = (self._shares(found) - self._shares(true)).abs().sum() * 5 + 2 * (1 - box_giou(found, true)).sum()
        return (2 * _focal(logits, self._target(labels, match, logits)).sum() + apart) / hit.sum().clamp(min=1)

    def _dense(self, raw: Tensor, truth: Tensor, labels: Tensor, match: Tensor) -> Tensor:
        """Focal + 2 (1 - GIoU), over the number of matches."""
        hit = match >= 0
        half = 0.5 * (self.anchors[:, 2:] - self.anchors[:, :2]).repeat(1, 2)
        middle = 0.5 * (self.anchors[:, 2:] + self.anchors[:, :2])
        boxes = around(middle, half * raw[..., self.classes :].clamp(max=4.0).exp())
        logits = raw[..., : self.classes]
        entropy = _focal(logits, self._target(labels, match, logits)).sum()
        apart = 2 * (1 - box_giou(boxes[hit], taken(truth, match)[hit])).sum()
        return (entropy + apart) / hit.sum().clamp(min=1)

    def _target(self, labels: Tensor, match: Tensor, logits: Tensor) -> Tensor:
        return (F.one_hot(taken(labels, match), self.classes) * (match >= 0).unsqueeze(-1)).to(logits)

    def _shares(self, boxes: Tensor) -> Tensor:
        """Centres and sizes as shares of the image."""
        boxes = boxes / self.scale
        return torch.cat([0.5 * (boxes[..., :2] + boxes[..., 2:]), boxes[..., 2:] - boxes[..., :2]], -1)


def _focal(logits: Tensor, target: Tensor) -> Tensor:
    """Focal loss with alpha 0.25 and gamma 2, elementwise."""
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    wrong = (logits.sigmoid() - target).abs()
    return (0.25 * target + 0.75 * (1 - target)) * wrong.square() * entropy


def _linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, device="meta").to_empty(device=generator.device)
    for values in (layer.weight, layer.bias):
        nn.init.uniform_(values, -(inputs**-0.5), inputs**-0.5, generator=generator)
    return layer


def _normed(inputs: int, outputs: int, generator: Generator) -> nn.Sequential:
    return nn.Sequential(_linear(inputs, outputs, generator), nn.LayerNorm(outputs))


def _dense(width: int, classes: int, generator: Generator) -> nn.Sequential:
    """Memory to class logits, at first with a probability of 0.01, and the logarithms of four distances."""
    last = _linear(width, classes + 4, generator)
    with torch.no_grad():
        last.weight.mul_(0.1)
        last.bias.zero_()[:classes] = -4.6
    return nn.Sequential(nn.LayerNorm(width), _linear(width, width, generator), nn.ReLU(), last)
