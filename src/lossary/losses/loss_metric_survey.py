"""Losses and metrics by task: forty-odd named losses in one convention, each with its range, and the metrics beside.

`loss_registry` and `metric_registry` list them by name: regression, classification, detection boxes, segmentation,
embeddings, depth, generation, language. A loss gives one value per sample and is never reduced; where torch or another
paper here has it, the entry is that one. The usual advice in a line: choose the loss for how its gradient treats
the errors you have (Huber for a few large ones, focal or Tversky for few positives, IoU losses for boxes), and report
the metric your decision rests on, which is seldom the loss. A registry is for looking up and for sweeps; a named loss
that fits your trouble better is elsewhere in this room.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from lossary import losses, require
from lossary.losses import _metrics as metrics
from lossary.losses import _torch as plain
from lossary.losses._pixels import images, lovasz_extension, ssim_map
from lossary.losses._sigmoid import binary, binary_losses
from lossary.losses._softmax import log_prob
from lossary.paper import Paper
from lossary.roles import loss

PAPER = Paper(
    title="Loss Functions and Metrics in Deep Learning",
    year=2023,
    helps=("heavy-tails",),
    departs=(
        "the names are those of abstract and abbreviation list and of the field; the survey's text was not read, and"
        " formulas follow the papers named at each entry",
        "what needs a pretrained network is left out: perceptual loss, Inception score, FID, faithfulness and relevance"
        " of retrieval-augmented answers",
        "left out as compositions of what is here: the YOLO loss, sums of several losses",
        "average precision and recall of detections are the room detection's, policy gradients the room"
        " reinforcement's",
        "A-Softmax without its annealing towards softmax",
        "SSIM over windows inside the image; no padding",
        "panoptic quality without a void label",
    ),
    equation=(
        r"\hat\theta=\argmin_\theta\frac1n\sum_{i=1}^n\ell\bigl(f_\theta(x_i),y_i\bigr),\qquad "
        r"\text{report }M\bigl(\{f_{\hat\theta}(x_i),\,y_i\}_{i=1}^n\bigr)"
    ),
    url="http://arxiv.org/abs/2307.02694v5",
)


# --- regression -----------------------------------------------------------------------------------------------


@loss(on="real")
def log_cosh_loss(input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log cosh(input - target): half the square of small errors, the size of large ones less log 2. Per sample.

    A Huber loss without a threshold to choose, but with its bend fixed at errors of about 1: scale the target.

    Args:
        input: predictions.
        target: numbers, shaped as the predictions.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> log_cosh_loss(torch.tensor([0.0, 100.0]), torch.zeros(2))
    tensor([ 0.0000, 99.3069])
    """
    _alike(input, target)
    size = (input - target).abs()
    return size + torch.log1p(torch.expm1(-2 * size) / 2)


@loss(on="real", examples=({}, {"quantile": 0.9}), tune={"quantile": (0.5,)})
def quantile_loss(
    input: Float[Tensor, "*batch"], target: Float[Tensor, "*batch"], *, quantile: float = 0.5
) -> Float[Tensor, "*batch"]:
    """Pinball loss: q d where the prediction is d too low, (1 - q) d where too high. Per sample.

    Its mean is least at the target's q-quantile (Koenker and Bassett 1978); at q = 1/2 it is half the absolute error.

    Args:
        input: predictions.
        target: numbers, shaped as the predictions.
        quantile: q, between 0 and 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, q not between 0 and 1.

    >>> quantile_loss(torch.tensor([0.0, 2.0]), torch.ones(2), quantile=0.75)
    tensor([0.7500, 0.2500])
    """
    _alike(input, target)
    require.number("quantile", quantile, above=0.0, below=1.0)
    lack = target - input
    return torch.maximum(quantile * lack, (quantile - 1) * lack)


# --- classification -------------------------------------------------------------------------------------------


@loss(on="multilabel", examples=({}, {"alpha": 0.75, "gamma": 0.0}, {"alpha": 1.0, "gamma": 1.5}))
def sigmoid_focal_loss(
    input: Float[Tensor, "*batch labels"],
    target: Float[Tensor, "*batch labels"],
    *,
    alpha: float = 0.25,
    gamma: float = 2.0,
) -> Float[Tensor, "*batch"]:
    """Sum over labels of -a (1 - q)^gamma log q, q being the probability given to the label's true value. Per sample.

    a is alpha where the label is there, 1 - alpha where not (Lin et al. 2017). Probabilities come out under-confident;
    the softmax form is `poly1_focal_loss` with epsilon 0, and two exponents has `asymmetric_loss`.

    Args:
        input: logits.
        target: 1 where a label is there, 0 where not.
        alpha: above 0, at most 1; 1/2 weighs both alike.
        gamma: 0 or at least 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range or a tensor.

    >>> sigmoid_focal_loss(torch.zeros(1, 2), torch.tensor([[1.0, 0.0]]))  # (1/4 + 3/4) log(2) / 4
    tensor([0.1733])
    """
    for name, value in (("alpha", alpha), ("gamma", gamma)):
        if isinstance(value, Tensor):
            raise ValueError(f"{name}: expected a number, got a tensor")
    require.number("alpha", alpha, above=0.0, at_most=1.0)
    require.number("gamma", gamma, at_least=0.0)
    if 0 < gamma < 1:
        raise ValueError(f"gamma: expected 0 or a number >= 1 (the slope is infinite at q = 1), got {gamma!r}")
    return alpha * binary_losses(input, target, positive=gamma, negative=gamma, negative_weight=1 / alpha - 1)


@loss(on="multilabel")
def hinge_loss(
    input: Float[Tensor, "*batch labels"], target: Float[Tensor, "*batch labels"]
) -> Float[Tensor, "*batch"]:
    """Sum over labels of max(0, 1 - z) where the label is there, max(0, 1 + z) where not. Per sample.

    The support vector machine's (Cortes and Vapnik 1995): nothing is gained beyond the margin, and there are no
    probabilities. One-of-K classes have `torch.nn.functional.multi_margin_loss`.

    Args:
        input: scores z.
        target: 1 where a label is there, 0 where not.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> hinge_loss(torch.tensor([[0.5, 0.5, 3.0]]), torch.tensor([[1.0, 0.0, 1.0]]))
    tensor([2.])
    """
    binary(input, target)
    return (1 - (2 * target - 1) * input).clamp(min=0).sum(-1)


# --- detection boxes ------------------------------------------------------------------------------------------


def iou_loss(input: Float[Tensor, "*batch 4"], target: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """1 - IoU of boxes x1, y1, x2, y2 with x1 < x2, y1 < y2, 0 to 1. Per box; flat, without gradient, where apart.

    Areas below the dtype's epsilon count as this epsilon, here and in the three losses below: the loss of an empty box
    is 1, even against itself.

    Args:
        input: predicted boxes.
        target: true boxes, shaped as the predicted ones.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> iou_loss(torch.tensor([[0.0, 0.0, 2.0, 2.0]]), torch.tensor([[1.0, 0.0, 3.0, 2.0]]))  # 1 - 2/6
    tensor([0.6667])
    """
    return 1 - _overlap(input, target)[0]


def giou_loss(input: Float[Tensor, "*batch 4"], target: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """1 - IoU plus the share of the smallest enclosing box that neither covers, 0 to 2. Rezatofighi et al. 2019.

    Boxes that are apart are first stretched towards each other, then moved.

    Args:
        input: predicted boxes, x1, y1, x2, y2.
        target: true boxes, shaped as the predicted ones.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> giou_loss(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))  # 1 + 1/3
    tensor([1.3333])
    """
    iou, union, hull = _overlap(input, target)
    area = hull.prod(-1).clamp(min=torch.finfo(hull.dtype).eps)
    return 1 - iou + (area - union) / area


def diou_loss(input: Float[Tensor, "*batch 4"], target: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """1 - IoU plus the squared distance of the centres over the squared diagonal of the enclosing box, 0 to 2.

    Zheng et al. 2020: boxes that are apart move straight towards each other.

    Args:
        input: predicted boxes, x1, y1, x2, y2.
        target: true boxes, shaped as the predicted ones.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> diou_loss(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))  # 1 + 4/10
    tensor([1.4000])
    """
    iou, _, hull = _overlap(input, target)
    apart = (input[..., :2] + input[..., 2:] - target[..., :2] - target[..., 2:]).square().sum(-1) / 4
    return 1 - iou + apart / hull.square().sum(-1).clamp(min=torch.finfo(hull.dtype).eps)


def ciou_loss(input: Float[Tensor, "*batch 4"], target: Float[Tensor, "*batch 4"]) -> Float[Tensor, "*batch"]:
    """The DIoU loss plus a v, where v = (4 / pi^2) (difference of arctan(w / h))^2 and a = v / (1 - IoU + v).

    Zheng et al. 2020: the shape counts more as the overlap grows. a passes no gradient, as in the official code.

    Args:
        input: predicted boxes, x1, y1, x2, y2.
        target: true boxes, shaped as the predicted ones.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> ciou_loss(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([[2.0, 0.0, 3.0, 1.0]]))  # alike in shape
    tensor([1.4000])
    """
    distance_loss = diou_loss(input, target)
    eps = torch.finfo(input.dtype).eps
    angles = [torch.atan2(b[..., 2] - b[..., 0], (b[..., 3] - b[..., 1]).clamp(min=eps)) for b in (input, target)]
    v = 4 / math.pi**2 * (angles[0] - angles[1]).square()
    with torch.no_grad():
        a = v / (1 - _overlap(input, target)[0] + v).clamp(min=eps)
    return distance_loss + a * v


# --- segmentation ---------------------------------------------------------------------------------------------


@loss(on="multilabel", examples=({}, {"alpha": 0.5, "beta": 0.5, "smooth": 0.1}))
def tversky_loss(
    input: Float[Tensor, "*batch pixels"],
    target: Float[Tensor, "*batch pixels"],
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    smooth: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """1 - (TP + s) / (TP + alpha FP + beta FN + s) of each image's mask, counts being sums of probabilities.

    Salehi et al. 2017: beta above alpha asks for recall. 1/2 and 1/2 is the Dice loss, 1 and 1 the Jaccard loss. An
    image without positives pushes its pixels down, the less so the larger s.

    Args:
        input: logits, the pixels of an image in the last dimension.
        target: 1 inside the mask, 0 outside.
        alpha: weight of false positives, at least 0.
        beta: weight of false negatives, at least 0.
        smooth: s, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> tversky_loss(torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 0.0, 0.0]]))  # 1 - 2 / (1 + 0.3 + 0.7 + 1)
    tensor([0.3333])
    """
    binary(input, target)
    require.number("alpha", alpha, at_least=0.0)
    require.number("beta", beta, at_least=0.0)
    require.number("smooth", smooth, above=0.0)
    p = torch.sigmoid(input)
    right = (p * target).sum(-1)
    wrong = alpha * (p * (1 - target)).sum(-1) + beta * ((1 - p) * target).sum(-1)
    return wrong / (right + wrong + smooth)


@loss(on="multilabel")
def lovasz_hinge_loss(
    input: Float[Tensor, "*batch pixels"], target: Float[Tensor, "*batch pixels"]
) -> Float[Tensor, "*batch"]:
    """The Jaccard loss of each image's mask, extended to hinge errors max(0, 1 - z) and max(0, 1 + z). Per image.

    Berman et al. 2018. At margins of 1 and beyond it is 1 - IoU of the masks where z > 0. An image without positives
    costs its largest error.

    Args:
        input: scores z, the pixels of an image in the last dimension.
        target: 1 inside the mask, 0 outside.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> lovasz_hinge_loss(torch.tensor([[3.0, 0.0, -3.0]]), torch.tensor([[1.0, 1.0, 0.0]]))  # one of two missed
    tensor([0.5000])
    """
    binary(input, target)
    return lovasz_extension((1 - (2 * target - 1) * input).clamp(min=0), target)


def lovasz_softmax_loss(
    input: Float[Tensor, "*batch pixels classes"], target: Int[Tensor, "*batch pixels"]
) -> Float[Tensor, "*batch"]:
    """Mean over the classes an image has of their Jaccard loss, extended to errors |y - p|. Per image, 0 to 1.

    Berman et al. 2018, p being the softmax. Where p is 0 or 1 it is 1 - mean IoU. Pixels count together, hence the
    value per image.

    Args:
        input: logits.
        target: class numbers of the pixels.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> z = torch.tensor([[9.0, -9.0], [9.0, -9.0], [-9.0, 9.0]])
    >>> lovasz_softmax_loss(99 * z, torch.tensor([0, 1, 1]))  # both IoUs are 1/2
    tensor(0.5000)
    """
    require.floating("input", input, at_least_dims=2)
    require.classes(input, target)
    there = F.one_hot(target, input.shape[-1]).mT.to(input.dtype)
    each = lovasz_extension((there - torch.softmax(input, -1).mT).abs(), there)
    present = there.amax(-1)
    return (each * present).sum(-1) / present.sum(-1)


# --- embeddings -----------------------------------------------------------------------------------------------


@loss(on="classes", examples=({"scale": 5.0}, {"margin": 2, "scale": 1.0}))
def a_softmax_loss(
    input: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    *,
    margin: int = 4,
    scale: float | Tensor = 30.0,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy at logits scale * cos t_j, with (-1)^k cos(m t_y) - 2 k, k = floor(m t_y / pi), for the true class.

    SphereFace (Liu et al. 2017): the angle to the own class must be m times smaller. Per sample.

    Args:
        input: cosines of the angles t_j between feature and class weights, -1 to 1.
        target: class numbers.
        margin: m, a whole number from 1; 1 leaves the angle.
        scale: above 0; a tensor (*batch) with the features' norms is the paper's own form.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> a_softmax_loss(torch.tensor([[0.5, 0.0]]), torch.tensor([0]), margin=2, scale=1.0)  # cos 2t = -1/2
    tensor([0.9741])
    """
    require.whole("margin", margin, at_least=1)

    def stretched(cosine: Tensor) -> Tensor:
        cosine = cosine.clamp(-1, 1)
        before, power = torch.ones_like(cosine), cosine
        for _ in range(margin - 1):  # Chebyshev: cos((m + 1) t) = 2 cos t cos(m t) - cos((m - 1) t)
            before, power = power, 2 * cosine * power - before
        k = (margin / math.pi * torch.acos(cosine.detach())).floor().clamp(max=margin - 1)
        return (1 - 2 * (k % 2)) * power - 2 * k

    return _angular(input, target, scale, stretched)


@loss(
    on="classes", examples=({}, {"margin": 0.2, "scale": 2.0}), limits={"cross_entropy": {"margin": 0.0, "scale": 1.0}}
)
def cosface_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, margin: float = 0.35, scale: float = 64.0
) -> Float[Tensor, "*batch"]:
    """Cross-entropy at logits scale * cos t_j with cos t_y - margin for the true class. Per sample. Wang et al. 2018.

    Args:
        input: cosines between feature and class weights, -1 to 1.
        target: class numbers.
        margin: at least 0.
        scale: above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> cosface_loss(torch.tensor([[0.5, 0.15]]), torch.tensor([0]), scale=1.0)  # log 2: the margin eats the lead
    tensor([0.6931])
    """
    require.number("margin", margin, at_least=0.0)
    return _angular(input, target, scale, lambda cosine: cosine - margin)


@loss(on="classes", examples=({"scale": 4.0}, {"margin": 0.2}), limits={"cross_entropy": {"margin": 0.0, "scale": 1.0}})
def arcface_loss(
    input: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"], *, margin: float = 0.5, scale: float = 64.0
) -> Float[Tensor, "*batch"]:
    """Cross-entropy at logits scale * cos t_j with cos(t_y + margin) for the true class. Per sample. Deng et al. 2019.

    Where t_y + margin exceeds pi the cosine would rise again; there it is cos t_y - margin sin(margin), as in the
    authors' first code.

    Args:
        input: cosines of the angles t_j between feature and class weights, -1 to 1.
        target: class numbers.
        margin: radians, 0 to pi / 2.
        scale: above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> arcface_loss(torch.tensor([[0.5, -0.5]]), torch.tensor([0]), margin=math.pi / 3, scale=1.0)  # cos 120 degrees
    tensor([0.6931])
    """
    require.number("margin", margin, at_least=0.0, at_most=math.pi / 2)
    m = torch.as_tensor(margin, dtype=input.dtype)

    def turned(cosine: Tensor) -> Tensor:
        sine = (1 - cosine.square()).clamp(min=torch.finfo(cosine.dtype).eps).sqrt()
        return torch.where(cosine > -m.cos(), cosine * m.cos() - sine * m.sin(), cosine - m * m.sin())

    return _angular(input, target, scale, turned)


def center_loss(
    input: Float[Tensor, "*batch dim"], target: Int[Tensor, "*batch"], *, centers: Float[Tensor, "classes dim"]
) -> Float[Tensor, "*batch"]:
    """Half the squared distance of a feature from its class's centre, beside a softmax loss. Wen et al. 2016.

    Make the centres a parameter with a learning rate of its own; the authors move them by the mean over the class's
    samples in the batch.

    Args:
        input: features.
        target: class numbers.
        centers: of the classes, learned.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> center_loss(torch.tensor([[1.0, 1.0]]), torch.tensor([1]), centers=torch.tensor([[9.0, 9.0], [0.0, 1.0]]))
    tensor([0.5000])
    """
    require.floating("input", input, at_least_dims=1)
    require.integers("target", target, shape=tuple(input.shape[:-1]))
    require.floating("centers", centers, dims=2)
    require.same_shape("centers", centers, (len(centers), input.shape[-1]))
    return (input - centers[target]).square().sum(-1) / 2


def contrastive_loss(
    input: Float[Tensor, "*batch dim"],
    target: Float[Tensor, "*batch dim"],
    *,
    same: Bool[Tensor, "*batch"],
    margin: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Of a pair at distance d: d^2 / 2 if they belong together, else max(0, margin - d)^2 / 2. Hadsell et al. 2006.

    Args:
        input: embeddings.
        target: the other embeddings of the pairs. At distance 0 a pair that should be apart has no gradient.
        same: whether the two belong together.
        margin: the distance from which strangers are far enough, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a margin not above 0.

    >>> contrastive_loss(torch.zeros(2, 1), torch.full((2, 1), 0.5), same=torch.tensor([True, False]), margin=2.0)
    tensor([0.1250, 1.1250])
    """
    _alike(input, target, at_least_dims=1)
    if same.dtype is not torch.bool or same.shape != input.shape[:-1]:
        raise ValueError(f"same: expected bool {tuple(input.shape[:-1])}, got {same.dtype} {tuple(same.shape)}")
    require.number("margin", margin, above=0.0)
    distance = torch.linalg.vector_norm(input - target, dim=-1)
    return torch.where(same, distance, (margin - distance).clamp(min=0)).square() / 2


def circle_loss(
    input: Float[Tensor, "batch dim"], target: Int[Tensor, "batch"], *, margin: float = 0.25, gamma: float = 256.0
) -> Float[Tensor, "batch"]:
    """log(1 + sum_n exp(gamma a_n (s_n - m)) * sum_p exp(-gamma a_p (s_p - 1 + m))) of each sample as the anchor.

    Sun et al. 2020. s are its cosines with the others of its class (p) and of other classes (n), and the weights
    a_n = max(0, s_n + m), a_p = max(0, 1 + m - s_p), which pass no gradient, pull hardest where it is worst. An
    anchor without others of its class, or with no other class, costs 0.

    Args:
        input: embeddings, of any length.
        target: class numbers.
        margin: m, between 0 and 1.
        gamma: scale, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> circle_loss(torch.eye(3)[[0, 0, 1]], torch.tensor([0, 0, 1]), gamma=16.0)  # log(1 + exp(-2)), and no pair
    tensor([0.1269, 0.1269, 0.0000])
    """
    require.floating("input", input, dims=2)
    require.integers("target", target, shape=tuple(input.shape[:1]))
    require.number("margin", margin, above=0.0, below=1.0)
    require.number("gamma", gamma, above=0.0)
    unit = F.normalize(input, dim=-1)
    s, same = unit @ unit.T, target.unsqueeze(1) == target
    others = same & ~torch.eye(len(same), dtype=torch.bool, device=same.device)
    held = s.detach()
    push = gamma * (held + margin).clamp(min=0) * (s - margin)
    pull = -gamma * (1 + margin - held).clamp(min=0) * (s - 1 + margin)
    push = push.masked_fill(same, -torch.inf).logsumexp(1)
    pull = pull.masked_fill(~others, -torch.inf).logsumexp(1)
    return F.softplus(push + pull)


def barlow_twins_loss(
    input: Float[Tensor, "batch dim"], target: Float[Tensor, "batch dim"], *, redundancy: float = 0.005
) -> Float[Tensor, "batch"]:
    """sum_i (1 - C_ii)^2 + redundancy * sum_{i != j} C_ij^2, C being the correlations of two views' features.

    Zbontar et al. 2021. Per sample as each one's share: C is the batch's mean of products c = a_i b_j of standardised
    features, so (C - I)^2 is that of (C - I) (c - I). The mean over samples is the loss; a share may be negative.

    Args:
        input: embeddings of one view, at least two samples.
        target: those of the other.
        redundancy: lambda, at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a redundancy below 0.

    >>> a = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    >>> barlow_twins_loss(a, a.flip(1), redundancy=0.5).mean()  # C is the identity with its columns swapped: 2 + 1
    tensor(3.0000)
    """
    require.floating("input", input, dims=2)
    require.same_shape("target", target, tuple(input.shape))
    require.number("redundancy", redundancy, at_least=0.0)
    a, b = ((x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt() for x in (input, target))
    identity = torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
    excess = (a.T @ b / len(a) - identity) * (redundancy + (1 - redundancy) * identity)
    share: Tensor = torch.linalg.vecdot(a @ excess, b) - excess.trace()
    return share


def simsiam_loss(input: Float[Tensor, "*batch dim"], target: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """Minus the cosine of a prediction with the other view's projection, which gets no gradient; -1 to 1. Per sample.

    Chen and He 2021: without the stopped gradient everything collapses. Call it both ways round and take the mean.

    Args:
        input: the predictor's output for one view.
        target: the projection of the other view.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> simsiam_loss(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
    tensor([-0.6000])
    """
    _alike(input, target, at_least_dims=1)
    return -F.cosine_similarity(input, target.detach(), dim=-1)


# --- depth and images -----------------------------------------------------------------------------------------


def scale_invariant_log_loss(
    input: Float[Tensor, "*batch pixels"], target: Float[Tensor, "*batch pixels"], *, ratio: float = 0.5
) -> Float[Tensor, "*batch"]:
    """mean d^2 - ratio * (mean d)^2 of d = log input - log target, over the pixels. Per image. Eigen et al. 2014.

    With ratio 1 a common factor costs nothing.

    Args:
        input: depths above 0.
        target: depths above 0; drop pixels without one beforehand.
        ratio: lambda, 0 to 1.

    Raises:
        ValueError: shapes or dtypes that do not fit, a ratio out of range.

    >>> scale_invariant_log_loss(torch.tensor([[math.e, 1.0]]), torch.ones(1, 2))  # 1/2 - 1/8
    tensor([0.3750])
    """
    _alike(input, target, at_least_dims=1)
    require.number("ratio", ratio, at_least=0.0, at_most=1.0)
    d = input.log() - target.log()
    return d.square().mean(-1) - ratio * d.mean(-1).square()


def photometric_loss(
    input: Float[Tensor, "n c h w"], target: Float[Tensor, "n c h w"], *, alpha: float = 0.85, data_range: float = 1.0
) -> Float[Tensor, "n"]:
    """alpha * (1 - SSIM) / 2 + (1 - alpha) * mean |input - target|, SSIM over 3x3 windows. Per image.

    Godard et al. 2017, between a view and the one that the predicted depth makes of another.

    Args:
        input: images of at least 3x3 pixels.
        target: images, shaped alike.
        alpha: weight of the SSIM, 0 to 1.
        data_range: largest possible value less the smallest, above 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a number out of range.

    >>> photometric_loss(torch.zeros(1, 1, 3, 3), torch.ones(1, 1, 3, 3)).item()  # 0.85 / 2 + 0.15, but for 1e-4
    0.5749...
    """
    images(input, target, window=3)
    require.number("alpha", alpha, at_least=0.0, at_most=1.0)
    require.number("data_range", data_range, above=0.0)
    similarity = ssim_map(input, target, torch.full_like(input[0, 0, :3, :3], 1 / 9), data_range).mean((1, 2, 3))
    return alpha * (1 - similarity) / 2 + (1 - alpha) * (input - target).abs().mean((1, 2, 3))


def smoothness_loss(input: Float[Tensor, "n 1 h w"], image: Float[Tensor, "n c h w"]) -> Float[Tensor, "n"]:
    """Mean of |dx d| exp(-|dx I|) plus mean of |dy d| exp(-|dy I|): depth may jump where the image does. Per image.

    Godard et al. 2017; |dI| is the mean over channels. Divide disparities by their mean beforehand, or shrinking them
    is the way to be smooth.

    Args:
        input: disparities d.
        image: I, at the same places.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> smoothness_loss(torch.tensor([[[[0.0, 1.0], [0.0, 1.0]]]]), torch.zeros(1, 3, 2, 2))
    tensor([1.])
    """
    require.floating("input", input, dims=4)
    require.floating("image", image, dims=4)
    n, _, height, width = image.shape
    require.same_shape("input", input, (n, 1, height, width))
    along = [input.diff(dim=d).abs() * (-image.diff(dim=d).abs().mean(1, keepdim=True)).exp() for d in (2, 3)]
    return along[0].mean((1, 2, 3)) + along[1].mean((1, 2, 3))


# --- generation -----------------------------------------------------------------------------------------------


def gaussian_kl_loss(
    input: Float[Tensor, "*batch dim"], log_variance: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch"]:
    """KL divergence of N(mean, exp(log_variance)) from N(0, 1): sum (mean^2 + var - 1 - log var) / 2, in nats.

    Per sample. Kingma and Welling 2014.

    Args:
        input: means.
        log_variance: logarithms of the variances, shaped alike.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> gaussian_kl_loss(torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2))
    tensor([0.5000])
    """
    require.floating("input", input, at_least_dims=1)
    require.same_shape("log_variance", log_variance, tuple(input.shape))
    return (input.square() + log_variance.expm1() - log_variance).sum(-1) / 2


def negative_elbo_loss(
    input: Float[Tensor, "*batch pixels"],
    target: Float[Tensor, "*batch pixels"],
    *,
    mean: Float[Tensor, "*batch dim"],
    log_variance: Float[Tensor, "*batch dim"],
    beta: float = 1.0,
) -> Float[Tensor, "*batch"]:
    """Binary cross-entropy of the reconstruction, summed over pixels, plus beta * KL of the code. Per sample, in nats.

    Kingma and Welling 2014; beta other than 1 is Higgins et al. 2017. At 1 it bounds -log p(target) from above.

    Args:
        input: the decoder's logits.
        target: pixels, 0 to 1.
        mean: of the encoder's Gaussian.
        log_variance: of the same, logarithm.
        beta: at least 0.

    Raises:
        ValueError: shapes or dtypes that do not fit, a beta below 0.

    >>> negative_elbo_loss(torch.zeros(1, 2), torch.ones(1, 2), mean=torch.ones(1, 1), log_variance=torch.zeros(1, 1))
    tensor([1.8863])
    """
    binary(input, target)
    require.number("beta", beta, at_least=0.0)
    return plain.bce(input, target) + beta * gaussian_kl_loss(mean, log_variance)


def gradient_penalty(
    critic: Callable[[Tensor], Tensor],
    real: Float[Tensor, "n ..."],
    fake: Float[Tensor, "n ..."],
    *,
    generator: Generator,
) -> Float[Tensor, "n"]:
    """(|slope of the critic| - 1)^2 at a random point between each real sample and a fake one. Per sample.

    WGAN-GP (Gulrajani et al. 2017), who add 10 times its mean to mean critic(fake) - mean critic(real).

    Args:
        critic: of samples (n, ...) gives scores (n) or (n, 1), each of its own sample alone: no batch norm.
        real: samples.
        fake: samples, shaped alike.
        generator: draws the points.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> gradient_penalty(lambda x: 3 * x.sum(1), torch.ones(2, 1), torch.zeros(2, 1), generator=Generator())
    tensor([4., 4.])
    """
    require.floating("real", real, at_least_dims=2)
    require.same_shape("fake", fake, tuple(real.shape))
    place = torch.rand(len(real), generator=generator, dtype=real.dtype, device=generator.device).to(real.device)
    point = fake.detach().lerp(real.detach(), place.view(-1, *[1] * (real.ndim - 1))).requires_grad_()
    (slope,) = torch.autograd.grad(critic(point).sum(), point, create_graph=True)
    steepness: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (steepness - 1).square()


# --- the registries -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RegistryEntry:
    """A named loss or metric.

    Attributes:
        call: the function; hyper-parameters are its keywords.
        task: "regression", "classification", "detection", "segmentation", "embedding", "depth", "generation" or
            "language".
        takes: what to give it, as `loss_registry` words it.
        range: infimum and supremum at default hyper-parameters.
        better: "lower" or "higher".
        home: where the function lives: a torch name, or a part of this room.
        source: who proposed it.

    >>> RegistryEntry(F.mse_loss, "regression", "real", (0.0, math.inf), "lower", "torch", "Gauss").better
    'lower'
    """

    call: Callable[..., Any]
    task: str
    takes: str
    range: tuple[float, float]
    better: str
    home: str
    source: str


def loss_registry() -> Mapping[str, RegistryEntry]:
    """Name -> loss by task: squared error to Huber, focal, IoU, Dice, Lovasz, ArcFace, ELBO, CTC. One value per sample.

    What `takes` means, input first, then target; further tensors are keywords that the function documents:
    "real" numbers (*batch) twice; "classes" logits (*batch, classes) and class numbers (*batch); "soft classes" logits
    and probabilities (*batch, classes); "labels" logits and 0/1 (*batch, labels), summed over labels; "binary" logits
    and 0/1 (*batch); "boxes" x1, y1, x2, y2 (*batch, 4) twice; "mask" logits and 0/1 (*batch, pixels), a value per
    image; "class map" logits (*batch, pixels, classes) and class numbers (*batch, pixels), a value per image; "cosines"
    (*batch, classes) and class numbers; "embeddings" (*batch, dim), or (batch, dim) where the batch counts together;
    "depths" (*batch, pixels) twice; "images" (n, c, h, w) twice; "other" what the function documents.

    `lossary.criterion.Criterion(entry.call, reduction="mean", **hyper)` makes a module of any with input and target.

    >>> entry = loss_registry()["huber"]
    >>> entry.call(torch.tensor([0.0, 3.0]), torch.zeros(2), delta=1.0), entry.home
    (tensor([0.0000, 2.5000]), 'torch')
    """
    each, rows, inf = partial(partial, plain.each), partial(partial, plain.rows), math.inf
    tasks: dict[str, dict[str, tuple[Any, ...]]] = {
        "regression": {
            "mse": (each(F.mse_loss), "real", 0, inf, "torch", "Gauss 1809"),
            "mae": (each(F.l1_loss), "real", 0, inf, "torch", "Laplace 1774"),
            "huber": (each(F.huber_loss), "real", 0, inf, "torch", "Huber 1964"),
            "log_cosh": (log_cosh_loss, "real", 0, inf, "here", "folklore"),
            "quantile": (quantile_loss, "real", 0, inf, "here", "Koenker and Bassett 1978"),
            "poisson_nll": (each(F.poisson_nll_loss), "real", -inf, inf, "torch", "likelihood"),
        },
        "classification": {
            "bce": (plain.bce, "labels", 0, inf, "torch", "likelihood"),
            "weighted_bce": (plain.weighted_bce, "labels", 0, inf, "torch", "likelihood"),
            "cross_entropy": (rows(F.cross_entropy), "classes", 0, inf, "torch", "likelihood"),
            "soft_cross_entropy": (rows(F.cross_entropy), "soft classes", 0, inf, "torch", "likelihood"),
            "label_smoothing": (plain.smoothed_cross_entropy, "classes", 0, inf, "torch", "Szegedy et al. 2016"),
            "focal": (sigmoid_focal_loss, "labels", 0, inf, "here", "Lin et al. 2017"),
            "softmax_focal": (_softmax_focal, "classes", 0, inf, "polyloss", "Lin et al. 2017"),
            "poly1": (losses.poly1_cross_entropy, "classes", 0, inf, "polyloss", "Leng et al. 2022"),
            "hinge": (hinge_loss, "labels", 0, inf, "here", "Cortes and Vapnik 1995"),
            "multiclass_hinge": (rows(F.multi_margin_loss), "classes", 0, inf, "torch", "Weston and Watkins 1999"),
        },
        "detection": {
            "smooth_l1": (plain.box_smooth_l1, "boxes", 0, inf, "torch", "Girshick 2015"),
            "iou": (iou_loss, "boxes", 0, 1, "here", "Yu et al. 2016, as 1 - IoU"),
            "giou": (giou_loss, "boxes", 0, 2, "here", "Rezatofighi et al. 2019"),
            "diou": (diou_loss, "boxes", 0, 2, "here", "Zheng et al. 2020"),
            "ciou": (ciou_loss, "boxes", 0, 2.5, "here", "Zheng et al. 2020"),
        },
        "segmentation": {
            "dice": (_mask_dice, "mask", 0, 1, "dice-sed", "Milletari et al. 2016"),
            "tversky": (tversky_loss, "mask", 0, 1, "here", "Salehi et al. 2017"),
            "lovasz_hinge": (lovasz_hinge_loss, "mask", 0, inf, "here", "Berman et al. 2018"),
            "lovasz_softmax": (lovasz_softmax_loss, "class map", 0, 1, "here", "Berman et al. 2018"),
        },
        "embedding": {
            "a_softmax": (a_softmax_loss, "cosines", 0, inf, "here", "Liu et al. 2017"),
            "cosface": (cosface_loss, "cosines", 0, inf, "here", "Wang et al. 2018"),
            "arcface": (arcface_loss, "cosines", 0, inf, "here", "Deng et al. 2019"),
            "center": (center_loss, "embeddings", 0, inf, "here", "Wen et al. 2016"),
            "contrastive": (contrastive_loss, "embeddings", 0, inf, "here", "Hadsell et al. 2006"),
            "triplet": (each(F.triplet_margin_loss), "other", 0, inf, "torch", "Schroff et al. 2015"),
            "circle": (circle_loss, "embeddings", 0, inf, "here", "Sun et al. 2020"),
            "barlow_twins": (barlow_twins_loss, "embeddings", -inf, inf, "here", "Zbontar et al. 2021"),
            "simsiam": (simsiam_loss, "embeddings", -1, 1, "here", "Chen and He 2021"),
        },
        "depth": {
            "scale_invariant_log": (scale_invariant_log_loss, "depths", 0, inf, "here", "Eigen et al. 2014"),
            "photometric": (photometric_loss, "images", 0, 1, "here", "Godard et al. 2017"),
            "smoothness": (smoothness_loss, "other", 0, inf, "here", "Godard et al. 2017"),
        },
        "generation": {
            "gaussian_kl": (gaussian_kl_loss, "other", 0, inf, "here", "Kingma and Welling 2014"),
            "negative_elbo": (negative_elbo_loss, "labels", 0, inf, "here", "Kingma and Welling 2014"),
            "adversarial": (
                each(F.binary_cross_entropy_with_logits),
                "binary",
                0,
                inf,
                "torch",
                "Goodfellow et al. 2014",
            ),
            "gradient_penalty": (gradient_penalty, "other", 0, inf, "here", "Gulrajani et al. 2017"),
        },
        "language": {
            "token_cross_entropy": (rows(F.cross_entropy), "classes", 0, inf, "torch", "likelihood"),
            "ctc": (each(F.ctc_loss), "other", 0, inf, "torch", "Graves et al. 2006"),
        },
    }
    return MappingProxyType(
        {
            name: RegistryEntry(call, task, takes, (low, high), "lower", home, source)
            for task, entries in tasks.items()
            for name, (call, takes, low, high, home, source) in entries.items()
        }
    )


def metric_registry() -> Mapping[str, RegistryEntry]:
    """Name -> metric by task: RMSE and R2, precision to PR-AUC, IoU, panoptic quality, PSNR, SSIM, BLEU, ROUGE-L.

    What `takes` means, input first, then target: "real" numbers (*batch, n) twice, "scores" (*batch, n) and 0/1
    integers, a value for each of *batch; "classes" logits (*batch, classes) and class numbers, one value in all;
    "boxes" (*batch, 4) twice; "images" (n, c, h, w) twice, "masks" bool (n, h, w) twice, a value per image; "other" as
    the function documents. Fractions, not percent. Recall is also TPR, precision TDR, the F1 of a mask its Dice.

    >>> call = metric_registry()["precision"].call
    >>> call(torch.tensor([0.9, 0.7, 0.1]), torch.tensor([1, 0, 1]), threshold=0.5)
    tensor(0.5000)
    """
    score, rate, inf = partial(partial, metrics.regression_score), partial(partial, metrics.binary_rate), math.inf
    tasks: dict[str, dict[str, tuple[Any, ...]]] = {
        "regression": {
            "mse": (score(score="mse"), "real", 0, inf, "lower", "Gauss 1809"),
            "mae": (score(score="mae"), "real", 0, inf, "lower", "Laplace 1774"),
            "rmse": (score(score="rmse"), "real", 0, inf, "lower", "Gauss 1809"),
            "mape": (score(score="mape"), "real", 0, inf, "lower", "forecasting"),
            "smape": (score(score="smape"), "real", 0, 2, "lower", "Makridakis 1993"),
            "r2": (score(score="r2"), "real", -inf, 1, "higher", "Wright 1921"),
            "adjusted_r2": (_adjusted_r2, "real", -inf, 1, "higher", "Ezekiel 1930"),
        },
        "classification": {
            "accuracy": (metrics.class_accuracy, "classes", 0, 1, "higher", "counting"),
            "precision": (rate(rate="precision"), "scores", 0, 1, "higher", "counting"),
            "recall": (rate(rate="recall"), "scores", 0, 1, "higher", "counting"),
            "f1": (rate(rate="f1"), "scores", 0, 1, "higher", "van Rijsbergen 1979"),
            "fpr": (rate(rate="fpr"), "scores", 0, 1, "lower", "counting"),
            "npv": (rate(rate="npv"), "scores", 0, 1, "higher", "counting"),
            "fdr": (rate(rate="fdr"), "scores", 0, 1, "lower", "counting"),
            "roc_auc": (metrics.roc_auc, "scores", 0, 1, "higher", "Hanley and McNeil 1982"),
            "pr_auc": (metrics.pr_auc, "scores", 0, 1, "higher", "average precision"),
        },
        "detection": {"box_iou": (_box_iou, "boxes", 0, 1, "higher", "Jaccard 1901")},
        "segmentation": {
            "pixel_accuracy": (metrics.class_accuracy, "classes", 0, 1, "higher", "counting"),
            "iou": (rate(rate="iou"), "scores", 0, 1, "higher", "Jaccard 1901"),
            "dice": (rate(rate="f1"), "scores", 0, 1, "higher", "Dice 1945"),
            "boundary_f1": (metrics.boundary_f1, "masks", 0, 1, "higher", "Csurka et al. 2013"),
            "panoptic_quality": (metrics.panoptic_quality, "other", 0, 1, "higher", "Kirillov et al. 2019"),
        },
        "generation": {
            "psnr": (metrics.psnr, "images", -inf, inf, "higher", "signal processing"),
            "ssim": (metrics.ssim, "images", -1, 1, "higher", "Wang et al. 2004"),
        },
        "language": {
            "bleu": (metrics.bleu, "other", 0, 1, "higher", "Papineni et al. 2002"),
            "rouge_l": (metrics.rouge_l, "other", 0, 1, "higher", "Lin 2004"),
            "perplexity": (metrics.perplexity, "classes", 1, inf, "lower", "Jelinek et al. 1977"),
        },
    }
    return MappingProxyType(
        {
            name: RegistryEntry(call, task, takes, (low, high), better, "here", source)
            for task, entries in tasks.items()
            for name, (call, takes, low, high, better, source) in entries.items()
        }
    )


# --- helpers --------------------------------------------------------------------------------------------------


def _alike(input: Tensor, target: Tensor, *, at_least_dims: int = 0) -> None:
    require.floating("input", input, at_least_dims=at_least_dims)
    require.same_shape("target", target, tuple(input.shape))


def _softmax_focal(input: Tensor, target: Tensor, *, gamma: float = 2.0) -> Tensor:
    focal: Tensor = losses.poly1_focal_loss(input, target, gamma=gamma, epsilon=0.0)
    return focal


def _mask_dice(input: Tensor, target: Tensor, *, smooth: float = 1.0) -> Tensor:
    dice: Tensor = losses.multilabel_dice_loss(input, target, smooth=smooth, dims=(-1,))
    return dice


def _box_iou(input: Tensor, target: Tensor) -> Tensor:
    return _overlap(input, target)[0]


def _adjusted_r2(input: Tensor, target: Tensor, *, predictors: int) -> Tensor:
    """`predictors`: how many the model has."""
    return metrics.regression_score(input, target, score="r2", predictors=predictors)


def _overlap(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """IoU, area of the union, and sides (*batch, 2) of the enclosing box."""
    _alike(input, target, at_least_dims=1)
    if input.shape[-1] != 4:
        raise ValueError(f"input: expected boxes x1, y1, x2, y2 in the last dimension, got shape {tuple(input.shape)}")
    low, high = input[..., :2], input[..., 2:]
    low_true, high_true = target[..., :2], target[..., 2:]
    common = (torch.minimum(high, high_true) - torch.maximum(low, low_true)).clamp(min=0).prod(-1)
    union = (high - low).prod(-1) + (high_true - low_true).prod(-1) - common
    hull = torch.maximum(high, high_true) - torch.minimum(low, low_true)
    union = union.clamp(min=torch.finfo(union.dtype).eps)
    return common / union, union, hull


def _angular(
    input: Tensor, target: Tensor, scale: float | Tensor, moved: Callable[[Tensor], Tensor]
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of scaled cosines, the true class's cosine moved."""
    require.classes(input, target)
    require.number("scale", scale, above=0.0)
    cosine = input.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    return -log_prob(input, target, temperature=1 / scale, margin=scale * (cosine - moved(cosine)))
