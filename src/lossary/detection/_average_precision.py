"""Average precision of detections of one class, as COCO defines it."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lossary import require
from lossary.detection._overlap import _box as box_iou

COCO_THRESHOLDS = tuple(0.5 + 0.05 * k for k in range(10))
RECALLS = np.linspace(0.0, 1.0, 101)


def average_precision(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    limit: int = 100,
) -> float:
    """Mean over IoU thresholds of the interpolated average precision, in percent; NaN without true boxes.

    Within an image detections choose in the order of their scores: each takes the free true box that it overlaps
    most, if by the threshold at least, and is then right. Over all images, in the order of the scores, the precision
    at a recall is the best one at this recall or beyond; it is averaged over the recalls 0, 0.01, ..., 1. Of equal
    scores the earlier image and the earlier detection go first.

    Args:
        boxes: of each image the detections (D_i, 4), x1, y1, x2, y2.
        scores: (D_i,).
        truth: the true boxes (T_i, 4).
        thresholds: of the IoU; COCO's are 0.5, 0.55, ..., 0.95.
        limit: so many of the best detections of an image count.

    Raises:
        ValueError: lists of different lengths, or shapes that do not fit.
    """
    if not len(boxes) == len(scores) == len(truth):
        raise ValueError(f"truth: expected one entry for each image, got {len(boxes)}, {len(scores)} and {len(truth)}")
    right, ranks, total = [], [], 0
    for found, score, true in zip(boxes, scores, truth):
        require.same_shape("boxes", found, (len(score), 4))
        require.same_shape("truth", true, (len(true), 4))
        best = score.argsort(descending=True, stable=True)[:limit]
        iou = _iou(found[best].double().numpy(force=True), true.double().numpy(force=True))
        right.append(_matched(iou, np.asarray(thresholds)))
        ranks.append(score[best].double().numpy(force=True))
        total += len(true)
    if not total:
        return float("nan")
    order = np.argsort(-np.concatenate(ranks), kind="stable")
    return 100 * float(np.mean([_area(hits[order], total) for hits in np.concatenate(right, axis=1)]))


def _iou(found: NDArray, true: NDArray) -> NDArray:
    """(D, T), 0 where a union is empty."""
    with np.errstate(invalid="ignore"):
        return np.nan_to_num(box_iou(found.T[:, :, None], true.T[:, None, :]), nan=0.0)


def _matched(iou: NDArray, thresholds: NDArray) -> NDArray:
    """Whether each detection, best first, finds a true box: (thresholds, D)."""
    right = np.zeros((len(thresholds), len(iou)), bool)
    if not iou.size:
        return right
    free = np.ones((len(thresholds), iou.shape[1]), bool)
    rows = np.arange(len(thresholds))
    for d, overlaps in enumerate(iou):
        open_to_me = np.where(free, overlaps, -1.0)
        choice = open_to_me.argmax(1)
        right[:, d] = open_to_me[rows, choice] >= thresholds
        free[rows, choice] &= ~right[:, d]
    return right


def _area(right: NDArray, total: int) -> float:
    """Interpolated average precision of hits and misses, best first."""
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(hits) + 1)
    best_beyond = np.maximum.accumulate(precision[::-1])[::-1]
    reached = np.searchsorted(hits / total, RECALLS)  # the first detection at which the recall is there
    return float(np.append(best_beyond, 0.0)[reached].mean())
