"""YOLOv10's training: a head that learns many points an object, beside one that learns a single point and stays.

A detector taught with several points an object answers several times, and needs suppression afterwards; taught with
one it does not, but learns from little. Here two heads share a network and are taught at once, and only the second is
kept. Both choose points by the same measure of class score and overlap, so that the one point is the best of the many
and the heads do not pull apart. Use it to train any dense detector that shall do without suppression. Where speed
after the network does not matter, one-to-many training with suppression remains at least as accurate.
"""

import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.detection._assign import alignment, fits, inside, setting, taken, task_aligned
from lossary.detection._heads import box_giou
from lossary.detection._overlap import box_iou
from lossary.paper import Paper
from lossary.roles import assigner

PAPER = Paper(
    title="YOLOv10: Real-Time End-to-End Object Detection",
    year=2024,
    helps=("crowded-scenes", "inference-cost"),
    departs=(
        "assignment and loss alone, not the paper's network",
        "plain IoU in the measure, as the paper writes it, and GIoU in the loss; the official code has CIoU in both",
        "no distribution focal loss: boxes come decoded, from whatever head",
        "a point goes to the best of the boxes that chose it; in the official code to the best of all that hold it",
    ),
    equation=(
        r"m(\alpha, \beta) = s \cdot p^\alpha \cdot \mathrm{IoU}(\hat b, b)^\beta, \qquad"
        r" \alpha_{o2o} = r\,\alpha_{o2m},\ \beta_{o2o} = r\,\beta_{o2m}"
    ),
    url="https://arxiv.org/abs/2405.14458",
)

Assignment = tuple[Int[Tensor, "*batch anchors"], Float[Tensor, "*batch anchors"]]
Predictions = tuple[Float[Tensor, "*batch anchors classes"], Float[Tensor, "*batch anchors 4"]]


def task_aligned_metric(
    scores: Float[Tensor, "*batch anchors classes"],
    boxes: Float[Tensor, "*batch anchors 4"],
    points: Float[Tensor, "anchors 2"],
    truth: Float[Tensor, "*batch true 4"],
    labels: Int[Tensor, "*batch true"],
    *,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Float[Tensor, "*batch anchors true"]:
    """How well the prediction at each point serves each true box: m = s p^alpha IoU^beta, eq. 1, in 0 to 1.

    p is the score of the true box's class, and s is 1 if the point lies within the box, else 0. With gradients.

    Args:
        scores: probabilities of the classes.
        boxes: predicted, x1, y1, x2, y2.
        points: x, y.
        truth: true boxes.
        labels: their classes, int64.
        alpha: power of the score, >= 0.
        beta: power of the overlap, >= 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a power outside its range.

    >>> import torch
    >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    >>> point, label = torch.tensor([[2.0, 2.0]]), torch.tensor([0])
    >>> task_aligned_metric(torch.tensor([[0.25]]), box / 2, point, box, label, beta=2.0)  # 0.25^0.5 (4 / 16)^2
    tensor([[0.0312]])
    """
    fits(truth, None, labels=labels, points=points, boxes=boxes, scores=scores)
    setting("alpha", alpha, at_least=0.0)
    setting("beta", beta, at_least=0.0)
    overlap = box_iou(boxes.unsqueeze(-2), truth.unsqueeze(-3))
    return alignment(scores, overlap, labels, alpha=alpha, beta=beta) * inside(points, truth)


@assigner(examples=({}, {"k": 1}, {"k": 4, "alpha": 1.0, "beta": 2.0}), tune={"k": (1, 5, 10, 13)})
def task_aligned_assign(
    scores: Float[Tensor, "*batch anchors classes"],
    boxes: Float[Tensor, "*batch anchors 4"],
    points: Float[Tensor, "anchors 2"],
    truth: Float[Tensor, "*batch true 4"],
    labels: Int[Tensor, "*batch true"],
    mask: Bool[Tensor, "*batch true"] | None = None,
    *,
    k: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """The true box that each point learns, -1 for none, and the score that it learns for the box's class.

    A true box takes the k points of highest `task_aligned_metric` within it; a point that several take goes to the one
    that its prediction overlaps most. The score, 0 to 1, is the metric, scaled for each true box so that the best of
    its points gets the highest overlap among them. A true box that holds no point, has no area or is not a number
    teaches nothing. Without gradients.

    Args:
        scores: as in `task_aligned_metric`.
        boxes: as in `task_aligned_metric`.
        points: as in `task_aligned_metric`.
        truth: as in `task_aligned_metric`.
        labels: as in `task_aligned_metric`.
        mask: False for rows of `truth` that only pad.
        k: points of a true box, >= 1.
        alpha: as in `task_aligned_metric`.
        beta: as in `task_aligned_metric`.

    Raises:
        ValueError: as in `task_aligned_metric`.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 4.0, 2.0], [8.0, 8.0, 9.0, 9.0]])
    >>> points, scores = torch.tensor([[1.0, 1.0], [3.0, 3.0], [8.5, 8.5]]), torch.ones(3, 1)
    >>> task_aligned_assign(scores, boxes, points, boxes[:1], torch.tensor([0]), beta=1.0)
    (tensor([ 0,  0, -1]), tensor([1.0000, 0.5000, 0.0000]))
    """
    fits(truth, mask, labels=labels, points=points, boxes=boxes, scores=scores)
    require.whole("k", k, at_least=1)
    setting("alpha", alpha, at_least=0.0)
    setting("beta", beta, at_least=0.0)
    return task_aligned(scores, boxes, points, truth, labels, mask, k=k, alpha=alpha, beta=beta)


def consistent_dual_assign(
    many: Predictions,
    one: Predictions,
    points: Float[Tensor, "anchors 2"],
    truth: Float[Tensor, "*batch true 4"],
    labels: Int[Tensor, "*batch true"],
    mask: Bool[Tensor, "*batch true"] | None = None,
    *,
    k: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
    ratio: float = 1.0,
) -> tuple[Assignment, Assignment]:
    """`task_aligned_assign` for both heads, each by its own predictions: k points a true box, and one point.

    The second head's powers are `ratio` times the first's. Then m_one = m_many^ratio, so that heads that predict the
    same agree on the best point, which makes the gap between what they learn as small as it can be (sec. 3.1).

    Args:
        many: scores and boxes of the one-to-many head.
        one: scores and boxes of the one-to-one head.
        points: as in `task_aligned_metric`.
        truth: as in `task_aligned_metric`.
        labels: as in `task_aligned_metric`.
        mask: as in `task_aligned_assign`.
        k: points of a true box in the first head.
        alpha: of the first head.
        beta: of the first head.
        ratio: r > 0.

    Raises:
        ValueError: as in `task_aligned_assign`, or a ratio out of range.

    >>> import torch
    >>> box = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    >>> points, boxes = torch.tensor([[1.0, 1.0], [2.0, 2.0]]), torch.cat([box / 2, box])
    >>> head = (torch.ones(2, 1), boxes)
    >>> (many, _), (one, _) = consistent_dual_assign(head, head, points, box, torch.tensor([0]))
    >>> many, one
    (tensor([0, 0]), tensor([-1,  0]))
    """
    setting("ratio", ratio, above=0.0)
    places = (points, truth, labels, mask)
    return (
        task_aligned_assign(*many, *places, k=k, alpha=alpha, beta=beta),
        task_aligned_assign(*one, *places, k=1, alpha=ratio * alpha, beta=ratio * beta),
    )


class DualAssignmentLoss(nn.Module):
    """The losses of both heads, added.

    Each is class_gain times the binary cross-entropy of all logits against the assigned scores, plus box_gain times
    1 - GIoU of the assigned boxes weighted by these scores, over the sum of the scores in the batch (at least 1).
    What the one-to-one head reads should be detached from the network, as in the official code: then the network
    learns from the one-to-many head alone.

    Args:
        k: as in `consistent_dual_assign`.
        alpha: as in `consistent_dual_assign`.
        beta: as in `consistent_dual_assign`.
        ratio: as in `consistent_dual_assign`.
        class_gain: of the cross-entropy.
        box_gain: of 1 - GIoU.

    >>> import torch
    >>> points = torch.tensor([[2.0, 2.0], [6.0, 2.0]])
    >>> head = (torch.zeros(1, 2, 1), torch.tensor([[[0.0, 0.0, 4.0, 4.0], [4.0, 0.0, 8.0, 4.0]]]))
    >>> loss = DualAssignmentLoss(class_gain=1.0)
    >>> loss(head, head, points, torch.tensor([[[0.0, 0.0, 4.0, 4.0]]]), torch.tensor([[0]]))  # 2 heads x 2 ln 2
    tensor(2.7726)
    """

    def __init__(
        self,
        *,
        k: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
        ratio: float = 1.0,
        class_gain: float = 0.5,
        box_gain: float = 7.5,
    ) -> None:
        super().__init__()
        setting("class_gain", class_gain, at_least=0.0)
        setting("box_gain", box_gain, at_least=0.0)
        self.how = {"k": k, "alpha": alpha, "beta": beta, "ratio": ratio}
        self.class_gain, self.box_gain = class_gain, box_gain

    def forward(
        self,
        many: Predictions,
        one: Predictions,
        points: Float[Tensor, "anchors 2"],
        truth: Float[Tensor, "*batch true 4"],
        labels: Int[Tensor, "*batch true"],
        mask: Bool[Tensor, "*batch true"] | None = None,
    ) -> Float[Tensor, ""]:
        """A scalar, of logits where `consistent_dual_assign` takes scores: `many` and `one` are (logits, boxes)."""
        likely = [(logits.sigmoid(), boxes) for logits, boxes in (many, one)]
        assignments = consistent_dual_assign(*likely, points, truth, labels, mask, **self.how)  # type: ignore[arg-type]
        losses = [self._head(*head, truth, labels, *assignment) for head, assignment in zip((many, one), assignments)]
        return losses[0] + losses[1]

    def _head(
        self, logits: Tensor, boxes: Tensor, truth: Tensor, labels: Tensor, match: Tensor, score: Tensor
    ) -> Tensor:
        target = F.one_hot(taken(labels, match), logits.shape[-1]) * score.unsqueeze(-1)
        entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="sum")
        chosen = match >= 0
        apart = (1 - box_giou(boxes[chosen], taken(truth, match)[chosen])) * score[chosen]
        return (self.class_gain * entropy + self.box_gain * apart.sum()) / score.sum().clamp(min=1)

    def extra_repr(self) -> str:
        gains = {"class_gain": self.class_gain, "box_gain": self.box_gain}
        return ", ".join(f"{name}={value}" for name, value in {**self.how, **gains}.items())
