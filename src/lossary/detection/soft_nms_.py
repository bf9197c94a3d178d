"""Soft-NMS: rather than deleting what overlaps a better detection, lower its score.

Suppression with a hard threshold loses every true object that overlaps a better one by more than the threshold. Here
such a detection stays, further down the list. Try it on any detector without retraining, first of all where objects
stand in crowds. It helps measures that look at the whole ranking, such as average precision; where you cut the list
at a fixed score, choose that score anew. In sparse scenes it changes little.
"""

from typing import Any, Literal

from jaxtyping import Float, Int
from torch import Tensor

from lossary import require
from lossary.detection._suppress import gaussian, hard, linear, suppress
from lossary.paper import Paper
from lossary.roles import suppressor

PAPER = Paper(
    title="Soft-NMS -- Improving Object Detection With One Line of Code",
    year=2017,
    helps=("crowded-scenes",),
    departs=(
        "continuous coordinates as in torchvision; the official code adds a pixel to each side of a box",
        "an overlap of exactly the threshold is left alone, as in the official code; eq. 1 and 2 decay it",
        "the score threshold also drops boxes that overlap nothing; the official code tests only decayed scores",
    ),
    equation=(
        r"s_i\leftarrow s_i\,\exp\bigl(-\operatorname{IoU}(M,b_i)^2/\sigma\bigr),\qquad "
        r"M:\ \text{the best box left, picked anew after each decay}"
    ),
    url="https://arxiv.org/abs/1704.04503",
)

Method = Literal["gaussian", "linear", "hard"]


@suppressor(
    examples=({}, {"method": "linear", "iou_threshold": 0.5}, {"method": "hard", "score_threshold": 0.2}),
    limits={"nms": {"method": "hard", "iou_threshold": 0.3, "score_threshold": 0.0}},
    tune={"sigma": (0.1, 0.3, 0.5, 0.7, 0.9)},
)
def soft_nms(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " n"],
    *,
    method: Method = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """Indices of the boxes that stay, best first, and their decayed scores: s_i <- s_i f(IoU(M, b_i)), fig. 2.

    M is the best box left; the next is chosen after the decay. f(o) is exp(-o^2 / sigma) for "gaussian" (eq. 3),
    1 - o above iou_threshold and else 1 for "linear" (eq. 2), 0 above it and else 1 for "hard" (eq. 1), which is
    `torchvision.ops.nms`. Of equal scores the lower index goes first. A box without area, with corners reversed or
    with a NaN overlaps nothing; a score that is NaN or below score_threshold is dropped. Without gradients.

    Args:
        boxes: x1, y1, x2, y2 with x1 < x2 and y1 < y2.
        scores: >= 0, usually probabilities.
        method: "gaussian", "linear" or "hard".
        sigma: width of the Gaussian, > 0; smaller is harsher. The others ignore it.
        iou_threshold: N_t in 0 to 1; "gaussian" ignores it.
        score_threshold: detections that fall below it are dropped, >= 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a hyper-parameter outside its range.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0], [5.0, 5.0, 6.0, 6.0]])
    >>> soft_nms(boxes, torch.tensor([0.9, 0.8, 0.7]))  # an IoU of 1/3: 0.8 exp(-(1/9) / 0.5)
    (tensor([0, 2, 1]), tensor([0.9000, 0.7000, 0.6406]))
    """
    _check(boxes, scores)
    decay, parameter = _decay(method, sigma, iou_threshold, score_threshold)
    return suppress(boxes, scores, decay=decay, parameter=parameter, floor=score_threshold)


@suppressor(
    examples=({}, {"method": "linear", "iou_threshold": 0.5}),
    limits={"nms": {"method": "hard", "iou_threshold": 0.3, "score_threshold": 0.0}},
    tune={"sigma": (0.1, 0.3, 0.5, 0.7, 0.9)},
)
def batched_soft_nms(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " n"],
    idxs: Int[Tensor, " n"],
    *,
    method: Method = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
) -> tuple[Int[Tensor, " kept"], Float[Tensor, " kept"]]:
    """`soft_nms` within each class, the results merged best first; as `torchvision.ops.batched_nms`.

    Args:
        boxes: as in `soft_nms`.
        scores: as in `soft_nms`.
        idxs: class of each box, int64; boxes of different classes leave each other alone. Numbers of images, or of
            images and classes, serve as well.
        method: as in `soft_nms`.
        sigma: as in `soft_nms`.
        iou_threshold: as in `soft_nms`.
        score_threshold: as in `soft_nms`.

    Raises:
        ValueError: as in `soft_nms`, or idxs that do not fit the scores.

    >>> import torch
    >>> boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 1.0, 2.0, 3.0]])
    >>> batched_soft_nms(boxes, torch.tensor([0.8, 0.9]), torch.tensor([0, 1]))
    (tensor([1, 0]), tensor([0.9000, 0.8000]))
    """
    _check(boxes, scores)
    require.integers("idxs", idxs, shape=scores.shape)
    decay, parameter = _decay(method, sigma, iou_threshold, score_threshold)
    return suppress(boxes, scores, decay=decay, parameter=parameter, floor=score_threshold, groups=idxs)


def _decay(method: Method, sigma: float, iou_threshold: float, score_threshold: float) -> tuple[Any, float]:
    """The decay and its parameter."""
    require.one_of("method", method, ("gaussian", "linear", "hard"))
    _number("sigma", sigma, above=0.0)
    _number("iou_threshold", iou_threshold, at_least=0.0, at_most=1.0)
    _number("score_threshold", score_threshold, at_least=0.0)
    decays = {"gaussian": (gaussian, sigma), "linear": (linear, iou_threshold), "hard": (hard, iou_threshold)}
    return decays[method]


def _number(name: str, value: Any, **bounds: float) -> None:
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor, which would get no gradient")
    require.number(name, value, **bounds)


def _check(boxes: Any, scores: Any) -> None:
    require.floating("boxes", boxes, dims=2)
    require.same_shape("boxes", boxes, (len(boxes), 4))
    require.same_shape("scores", scores, (len(boxes),))
