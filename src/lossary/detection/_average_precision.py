"""Average precision and recall of detections, as COCO defines them and as pycocotools computes them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from lossary import require
from lossary.detection._overlap import BOX, Overlap, pairwise

COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
RECALLS = np.linspace(0.0, 1.0, 101)
ALL, SMALL, MEDIUM, LARGE = (0.0, 1e10), (0.0, 32.0**2), (32.0**2, 96.0**2), (96.0**2, 1e10)  # areas in pixels
Images = Sequence[Tensor]


def average_precision(
    boxes: Images,
    scores: Images,
    truth: Images,
    *,
    labels: Images | None = None,
    truth_labels: Images | None = None,
    crowd: Images | None = None,
    areas: Images | None = None,
    area_range: tuple[float, float] = ALL,
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    limit: int = 100,
    overlap: Overlap = BOX,
) -> float:
    """Mean over classes and IoU thresholds of the interpolated average precision, in percent; NaN without true boxes.

    Within an image and class detections choose in the order of their scores: each takes the free true box that it
    overlaps most, if by the threshold at least, and is then right. Over all images, in the order of the scores, the
    precision at a recall is the best one at this recall or beyond; it is averaged over the recalls 0, 0.01, ..., 1.
    Of equal scores the earlier image and the earlier detection go first; of equal overlaps the later true box.

    True boxes that mark crowds, or whose area is outside the range, are ignored: nobody has to find them, and who
    finds nothing else but one of them is neither right nor wrong, nor is a detection outside the range that finds
    nothing. The overlap with a crowd is the share of the detection within it, and any number may find it.
    Boxes without area, with corners reversed or with a NaN overlap nothing: they are wrong, or not found
    (pycocotools ignores a detection of negative area).

    Args:
        boxes: of each image the detections (D, 4), x1, y1, x2, y2, or what the overlap takes.
        scores: (D,).
        truth: the true boxes (T, 4).
        labels: class of each detection (D,) int64; None is one class.
        truth_labels: class of each true box (T,) int64. A class counts if some true box of it is not ignored.
        crowd: whether a true box marks a crowd (T,) bool; None is none.
        areas: of the true boxes (T,), those of their masks in COCO; None is the boxes' own.
        area_range: smallest and largest area in pixels that count; of boxes only.
        thresholds: of the IoU; COCO's are 0.5, 0.55, ..., 0.95.
        limit: so many of the best detections of an image and class count.
        overlap: of two shapes.

    Raises:
        ValueError: lists of different lengths, shapes that do not fit, a score that is not a number, or crowds or
            areas of shapes that are not boxes.
    """
    if area_range != ALL and overlap is not BOX:
        raise ValueError(f"area_range: expected {ALL} for shapes that are not boxes, got {area_range}")
    classes = _classes(boxes, scores, truth, labels, truth_labels, crowd, areas, limit, overlap)
    return _mean(precision for precision, _ in _curves(classes, thresholds, area_range, limit))


def coco_summary(
    boxes: Images,
    scores: Images,
    truth: Images,
    *,
    labels: Images | None = None,
    truth_labels: Images | None = None,
    crowd: Images | None = None,
    areas: Images | None = None,
) -> dict[str, float]:
    """COCO's twelve numbers in percent, arguments as in `average_precision`; NaN where no true box counts.

    AP is the average precision at all thresholds and at most 100 detections of an image and class, AP50 and AP75 at
    one threshold, AR1, AR10 and AR100 the recall at so many detections, averaged over thresholds and classes. APs,
    APm, APl and ARs, ARm, ARl are of objects below 32^2 pixels, up to 96^2 and above.
    """
    classes = _classes(boxes, scores, truth, labels, truth_labels, crowd, areas, 100, BOX)
    found = {}
    for name, area_range in (("", ALL), ("s", SMALL), ("m", MEDIUM), ("l", LARGE)):
        curves = _curves(classes, COCO_THRESHOLDS, area_range, 100)
        found[f"AP{name}"] = _mean(precision for precision, _ in curves)
        found[f"AR{name or 100}"] = _mean(recall for _, recall in curves)
        if not name:
            found |= {f"AP{50 + 5 * k}": _mean(precision[k] for precision, _ in curves) for k in (0, 5)}
    for limit in (1, 10):
        found[f"AR{limit}"] = _mean(recall for _, recall in _curves(classes, COCO_THRESHOLDS, ALL, limit))
    return {name: found[name] for name in "AP AP50 AP75 APs APm APl AR1 AR10 AR100 ARs ARm ARl".split()}


@dataclass(frozen=True)
class _Image:
    """Detections of one class, best first, and its true boxes: overlaps (D, T) and what each is like."""

    overlaps: NDArray
    scores: NDArray
    sizes: NDArray
    areas: NDArray
    crowd: NDArray


def _classes(
    boxes: Images,
    scores: Images,
    truth: Images,
    labels: Images | None,
    truth_labels: Images | None,
    crowd: Images | None,
    areas: Images | None,
    limit: int,
    overlap: Overlap,
) -> list[list[_Image]]:
    """For each class that has true boxes its images."""
    if (labels is None) != (truth_labels is None):
        raise ValueError("labels, truth_labels: expected both or neither")
    if crowd is not None and overlap is not BOX:
        raise ValueError("crowd: expected None for shapes that are not boxes")
    given = {"scores": scores, "truth": truth, "labels": labels, "truth_labels": truth_labels, "crowd": crowd}
    for name, images in {**given, "areas": areas}.items():
        if images is not None and len(images) != len(boxes):
            raise ValueError(f"{name}: expected one entry for each of {len(boxes)} images, got {len(images)}")
    found: dict[int, list[_Image]] = {}
    for i, (shapes, score, true) in enumerate(zip(boxes, scores, truth)):
        columns = 4 if overlap is BOX else shapes.shape[-1]
        require.same_shape("boxes", shapes, (len(score), columns))
        require.same_shape("truth", true, (len(true), columns))
        if score.isnan().any():
            raise ValueError(f"scores: expected numbers, got nan in image {i}")
        mine = np.zeros(len(score), int) if labels is None else _array("labels", labels[i], len(score))
        theirs = (
            np.zeros(len(true), int) if truth_labels is None else _array("truth_labels", truth_labels[i], len(true))
        )
        shapes, true = shapes.double().cpu(), true.double().cpu()
        values = score.double().numpy(force=True)
        marked = np.zeros(len(true), bool) if crowd is None else _array("crowd", crowd[i], len(true)).astype(bool)
        size, own = (_areas(part.numpy(force=True)) for part in (shapes, true))
        area = own if areas is None else _array("areas", areas[i], len(true))
        for label in np.union1d(mine, theirs).tolist():
            best, to = np.flatnonzero(mine == label), np.flatnonzero(theirs == label)
            best = best[np.argsort(-values[best], kind="stable")][:limit]
            overlaps = _overlaps(overlap, shapes[best], true[to], size[best], own[to], marked[to])
            found.setdefault(label, []).append(_Image(overlaps, values[best], size[best], area[to], marked[to]))
    return [images for images in found.values() if any(image.areas.size for image in images)]


def _array(name: str, values: Tensor, length: int) -> NDArray:
    if tuple(values.shape) != (length,):
        raise ValueError(f"{name}: expected shape {(length,)}, got {tuple(values.shape)}")
    return values.numpy(force=True)


def _areas(shapes: NDArray) -> NDArray:
    """Of boxes; of other shapes they are not looked at."""
    return np.maximum(shapes[:, 2] - shapes[:, 0], 0) * np.maximum(shapes[:, 3] - shapes[:, 1], 0)


def _overlaps(
    overlap: Overlap, shapes: Tensor, true: Tensor, size: NDArray, true_size: NDArray, crowd: NDArray
) -> NDArray:
    """(D, T), 0 where it is not a number; with a crowd the share of the detection."""
    if not overlap.broadcasts:
        return pairwise(overlap, shapes, true).numpy()
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = overlap.pair(shapes.numpy().T[:, :, None], true.numpy().T[:, None, :])
        if crowd.any():
            common = iou * (size[:, None] + true_size) / (1 + iou)
            iou = np.where(crowd, common / size[:, None], iou)
    return np.nan_to_num(iou, nan=0.0)


def _curves(
    classes: list[list[_Image]], thresholds: Sequence[float], area_range: tuple[float, float], limit: int
) -> list[tuple[NDArray, NDArray]]:
    """For each class that has something to find the average precision and the recall at each threshold."""
    curves = []
    for images in classes:
        lost = [image.crowd | (image.areas < area_range[0]) | (image.areas > area_range[1]) for image in images]
        total = sum(int((~ignored).sum()) for ignored in lost)
        if not total:
            continue
        matched = [
            _matched(image, ignored, np.asarray(thresholds), area_range, limit) for image, ignored in zip(images, lost)
        ]
        order = np.argsort(-np.concatenate([image.scores[:limit] for image in images]), kind="stable")
        right, void = (np.concatenate(part, axis=1)[:, order] for part in zip(*matched))
        curves.append(_areas_under(right & ~void, ~right & ~void, total))
    return curves


def _matched(
    image: _Image, ignored: NDArray, thresholds: NDArray, area_range: tuple[float, float], limit: int
) -> tuple[NDArray, NDArray]:
    """Whether each detection, best first, finds a true box, and whether it counts for nothing: (thresholds, D)."""
    sizes = image.sizes[:limit]
    right = np.zeros((len(thresholds), len(sizes)), bool)
    void = right.copy()
    if image.areas.size:
        free = np.ones((len(thresholds), len(ignored)), bool)
        rows, least = np.arange(len(thresholds)), np.minimum(thresholds, 1 - 1e-10)
        for d, overlaps in enumerate(image.overlaps[:limit]):
            for wanted in (~ignored, ignored) if ignored.any() else (~ignored,):
                open_to_me = np.where(free & wanted, overlaps, -1.0)
                choice = open_to_me.shape[1] - 1 - open_to_me[:, ::-1].argmax(1)
                hit = (open_to_me[rows, choice] >= least) & ~right[:, d]
                right[:, d] |= hit
                void[:, d] |= hit & ignored[choice]
                free[rows, choice] &= ~hit | image.crowd[choice]
    void |= ~right & ((sizes < area_range[0]) | (sizes > area_range[1]))
    return right, void


def _areas_under(right: NDArray, wrong: NDArray, total: int) -> tuple[NDArray, NDArray]:
    """Interpolated average precision and final recall of hits and misses, best first: (thresholds,) each."""
    hits, misses = right.cumsum(1), wrong.cumsum(1)
    precision = hits / np.maximum(hits + misses, 1)
    best_beyond = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    nothing = np.zeros((len(right), 1))
    reached = [
        np.searchsorted(row / total, RECALLS) for row in hits
    ]  # the first detection at which the recall is there
    area = np.take_along_axis(np.concatenate([best_beyond, nothing], axis=1), np.array(reached), axis=1).mean(1)
    return area, np.concatenate([nothing, hits], axis=1)[:, -1] / total


def _mean(values: Iterator[NDArray]) -> float:
    collected = list(values)
    return 100 * float(np.mean(collected)) if collected else float("nan")
