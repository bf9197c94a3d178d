"""The engine of the assigners: which true box each anchor learns, for a whole batch of images at once.

Everything is a matrix (*batch, A, T) of A anchors, points, predictions or queries against T true boxes, and ends in
`match` (*batch, A), int64: the number of a true box, `BACKGROUND`, or `IGNORED` for an anchor that takes no part in
the loss. An assigner says how good a pair is, lets every true box choose its `best` anchors, and `settle`s whom an
anchor that was chosen twice belongs to; or it solves for the best one-to-one matching as a whole (`hungarian`).

Images of a batch have different numbers of true boxes: the rest of the T rows are padding, False in a `mask`
(*batch, T), and are never matched; no mask says that all are real. A quality, overlap or cost that is not a number
belongs to a pair that is never matched. Of equal qualities the lower index wins. Nothing carries a gradient.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossary import require
from lossary.detection._overlap import box_iou

BACKGROUND, IGNORED = -1, -2


def fits(
    truth: Any,
    mask: Any,
    *,
    labels: Any = None,
    anchors: Any = None,
    points: Any = None,
    boxes: Any = None,
    scores: Any = None,
) -> None:
    """Refuse what does not go together; None is what an assigner does not take, and a mask that says all are real.

    Args:
        truth: (*batch, T, 4).
        mask: (*batch, T) bool.
        labels: (*batch, T) int64.
        anchors: (A, 4).
        points: (A, 2).
        boxes: (*batch, A, 4).
        scores: (*batch, A, classes).

    Raises:
        ValueError: a shape or dtype other than that.
    """
    require.floating("truth", truth, at_least_dims=2)
    batch, rows = truth.shape[:-2], truth.shape[:-1]
    require.same_shape("truth", truth, (*rows, 4))
    if mask is not None and not (isinstance(mask, Tensor) and mask.dtype is torch.bool and mask.shape == rows):
        got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"mask: expected a bool tensor {tuple(rows)}, got {got}")
    if labels is not None:
        require.integers("labels", labels, shape=rows)
    number = None
    for name, value, front, last in (
        ("anchors", anchors, (), 4),
        ("points", points, (), 2),
        ("boxes", boxes, batch, 4),
        ("scores", scores, batch, None),
    ):
        if value is not None:
            require.floating(name, value, dims=len(front) + 2)
            number = value.shape[-2] if number is None else number
            require.same_shape(name, value, (*front, number, value.shape[-1] if last is None else last))


def setting(name: str, value: Any, **bounds: float) -> None:
    """A number within bounds and no tensor, which would get no gradient."""
    if isinstance(value, Tensor):
        raise ValueError(f"{name}: expected a number, got a tensor, which would get no gradient")
    require.number(name, value, **bounds)


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points (*batch, A, 2) lie strictly within boxes (*batch, T, 4): (*batch, A, T) bool."""
    points, low, high = points.unsqueeze(-2), boxes[..., None, :, :2], boxes[..., None, :, 2:]
    return ((points > low) & (points < high)).all(-1)


def best(quality: Tensor, k: int, allowed: Tensor) -> Tensor:
    """The k best anchors of each true box among those that are allowed: (*batch, A, T) bool.

    Args:
        quality: (*batch, A, T), higher is better.
        k: of each true box; fewer where fewer are allowed.
        allowed: (*batch, A, T) bool.
    """
    allowed = allowed & ~quality.isnan()
    order = quality.detach().masked_fill(~allowed, -torch.inf).argsort(dim=-2, descending=True, stable=True)
    return torch.zeros_like(allowed).scatter_(-2, order[..., :k, :], True) & allowed


def settle(chosen: Tensor, rank: Tensor) -> Tensor:
    """Each anchor goes to the one of highest rank of the true boxes that chose it: match (*batch, A).

    Args:
        chosen: (*batch, A, T) bool.
        rank: (*batch, A, T), mostly the overlap.
    """
    if not chosen.shape[-1]:
        return chosen.new_full(chosen.shape[:-1], BACKGROUND, dtype=torch.int64)
    lowest = torch.finfo(rank.dtype).min
    rank = rank.detach().nan_to_num(nan=lowest).clamp(min=lowest).masked_fill(~chosen, -torch.inf)
    return torch.where(chosen.any(-1), rank.argmax(-1), BACKGROUND)


def taken(values: Tensor, match: Tensor) -> Tensor:
    """What the matched true box has, (*batch, A, ...) of values (*batch, T, ...); zero where nothing is matched."""
    if not values.shape[match.ndim - 1]:
        return values.new_zeros(*match.shape, *values.shape[match.ndim :])
    shape = (*match.shape, *(1,) * (values.ndim - match.ndim))
    index = match.clamp(min=0).view(shape).expand(*match.shape, *values.shape[match.ndim :])
    return values.gather(match.ndim - 1, index).masked_fill((match < 0).view(shape), 0)


def alignment(scores: Tensor, overlap: Tensor, labels: Tensor, *, alpha: float, beta: float) -> Tensor:
    """How well a prediction serves a true box in class and place: score^alpha overlap^beta, (*batch, A, T).

    Args:
        scores: (*batch, A, classes), probabilities.
        overlap: (*batch, A, T), 0 to 1.
        labels: (*batch, T), classes from 0.
        alpha, beta: powers.
    """
    index = labels.clamp(min=0).unsqueeze(-2).expand(*overlap.shape)
    return scores.gather(-1, index).pow(alpha) * overlap.pow(beta)


def aligned_weight(quality: Tensor, overlap: Tensor, match: Tensor) -> Tensor:
    """The soft target of each matched anchor, (*batch, A) in 0 to 1, and 0 elsewhere.

    It is the quality, scaled within each true box so that the best of its anchors gets the box's highest overlap.
    """
    mine = match.unsqueeze(-1) == torch.arange(quality.shape[-1], device=match.device)
    quality, overlap = (value.detach().nan_to_num(nan=0.0) * mine for value in (quality, overlap))
    if not quality.numel():
        return quality.new_zeros(match.shape)
    most = quality.amax(-2, keepdim=True)
    return (quality * (overlap.amax(-2, keepdim=True) / most.masked_fill(most == 0, 1.0))).sum(-1)


def task_aligned(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    truth: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    *,
    k: int,
    alpha: float,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Match and weight, both (*batch, A): every true box takes the k points within it whose predictions serve it best.

    By `alignment`; a point that several boxes take goes to the one that its prediction overlaps most.

    Args:
        scores: (*batch, A, classes), probabilities.
        boxes: (*batch, A, 4), predicted.
        points: (A, 2).
        truth, labels, mask: (*batch, T, 4), (*batch, T), (*batch, T).
        k, alpha, beta: points of each true box, powers of score and overlap.
    """
    overlap = box_iou(boxes.detach().unsqueeze(-2), truth.unsqueeze(-3))
    quality = alignment(scores.detach(), overlap, labels, alpha=alpha, beta=beta)
    within = inside(points, truth)
    match = settle(best(quality, k, within if mask is None else within & mask.unsqueeze(-2)), overlap)
    return match, aligned_weight(quality, overlap, match)


def by_overlap(overlap: Tensor, mask: Tensor | None = None, *, positive: float, negative: float, k: int = 0) -> Tensor:
    """An anchor belongs to a true box that it overlaps enough, or to one among whose k best it is: match (*batch, A).

    Of the others those that overlap something by `negative` or more are ignored. With k = 1 this is how Faster R-CNN
    and RetinaNet assign, if one anchor alone may be a box's best.

    Args:
        overlap: (*batch, A, T), 0 to 1.
        mask: (*batch, T) bool.
        positive: an overlap from which on an anchor belongs to the box.
        negative: an overlap below which an anchor is background, at most `positive`.
        k: best anchors that each true box gets in any case, as far as they overlap it at all.
    """
    real = torch.ones_like(overlap, dtype=torch.bool) if mask is None else mask.unsqueeze(-2).expand_as(overlap)
    match = settle((real & (overlap >= positive)) | best(overlap, k, real & (overlap > 0)), overlap)
    unclear = (real & (overlap >= negative)).any(-1)
    return torch.where((match == BACKGROUND) & unclear, IGNORED, match)


def atss(
    anchors: Tensor, truth: Tensor, overlap: Tensor, mask: Tensor | None = None, *, levels: Sequence[int], k: int
) -> Tensor:
    """Adaptive training sample selection: match (*batch, A).

    On each level the k anchors whose centres are nearest to the true box's centre are candidates; those belong to it
    whose overlap reaches the mean plus one standard deviation of all candidates' and whose centre lies within it.

    Args:
        anchors: (A, 4) or (*batch, A, 4).
        truth: (*batch, T, 4).
        overlap: (*batch, A, T), of anchors and true boxes.
        mask: (*batch, T) bool.
        levels: numbers of anchors, which add up to A.
        k: candidates on each level.
    """
    real = ~overlap.isnan() if mask is None else mask.unsqueeze(-2) & ~overlap.isnan()
    centres, middles = (0.5 * (boxes[..., :2] + boxes[..., 2:]) for boxes in (anchors, truth))
    nearness = -(centres.unsqueeze(-2) - middles.unsqueeze(-3)).square().sum(-1)
    pairs = zip(nearness.split(list(levels), -2), real.split(list(levels), -2))
    near = torch.cat([best(near, k, allowed) for near, allowed in pairs], -2)
    count = near.sum(-2, keepdim=True)
    values = overlap.masked_fill(~near, 0.0)
    mean = values.sum(-2, keepdim=True) / count
    spread = ((values - mean).square() * near).sum(-2, keepdim=True) / (count - 1)  # as torch.std has it
    return settle(near & (overlap >= mean + spread.sqrt()) & inside(centres, truth), overlap)


def hungarian(cost: Tensor, mask: Tensor | None = None) -> Tensor:
    """The one-to-one matching of least total cost: match (*batch, A), with min(A, real T) anchors matched.

    Pairs whose cost is not finite are matched to nobody. Solved on the CPU.

    Args:
        cost: (*batch, A, T).
        mask: (*batch, T) bool.
    """
    from scipy.optimize import linear_sum_assignment

    costs = cost.detach().double().numpy(force=True).reshape(math.prod(cost.shape[:-2]), *cost.shape[-2:])
    real = np.ones(costs.shape[::2], bool) if mask is None else mask.numpy(force=True).reshape(costs.shape[::2])
    match = np.full(costs.shape[:2], BACKGROUND)
    for image, matrix in enumerate(costs):
        (columns,) = real[image].nonzero()
        matrix = matrix[:, columns]
        finite = np.isfinite(matrix)
        if not finite.all():  # dearer than any detour through finite pairs, so taken only where nothing else is left
            matrix = np.where(finite, matrix, 1.0 + 2.0 * min(matrix.shape) * np.abs(matrix[finite]).max(initial=0.0))
        rows, chosen = linear_sum_assignment(matrix)
        allowed = finite[rows, chosen]
        match[image, rows[allowed]] = columns[chosen[allowed]]
    return torch.from_numpy(match.reshape(cost.shape[:-1])).to(cost.device)
