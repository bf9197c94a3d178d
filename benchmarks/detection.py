"""Suppression of boxes in clusters of 20, against ensemble-boxes and plain loops in numba; and of 100,000 apart.

The same boxes in double precision, the same boxes kept. The plain loops are what one would write for this one decay.
Where boxes spread out as thickly however many there are, the time of ten times as many is given as a multiple: a loop
over pairs takes a hundred times as long. Needs `pip install lossary[fast] ensemble-boxes`.
"""

import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from lossary.detection import soft_nms

SIZES = {1000: (9, 10), 5000: (7, 1), 20_000: (3, 1)}  # boxes -> rounds, calls in a row


def plain(boxes, scores, sigma, floor):  # type: ignore[no-untyped-def]
    """Gaussian Soft-NMS by swapping: the best to the front, what falls below the floor to the end."""
    boxes, scores, index, n = boxes.copy(), scores.copy(), np.arange(len(scores)), len(scores)
    i = 0
    while i < n:
        top = i
        for j in range(i + 1, n):
            if scores[j] > scores[top]:
                top = j
        for k in range(4):
            boxes[i, k], boxes[top, k] = boxes[top, k], boxes[i, k]
        scores[i], scores[top] = scores[top], scores[i]
        index[i], index[top] = index[top], index[i]
        x1, y1, x2, y2 = boxes[i, 0], boxes[i, 1], boxes[i, 2], boxes[i, 3]
        j = i + 1
        while j < n:
            width = min(x2, boxes[j, 2]) - max(x1, boxes[j, 0])
            height = min(y2, boxes[j, 3]) - max(y1, boxes[j, 1])
            if width > 0 and height > 0:
                common = width * height
                area = (boxes[j, 2] - boxes[j, 0]) * (boxes[j, 3] - boxes[j, 1])
                iou = common / ((x2 - x1) * (y2 - y1) + area - common)
                scores[j] *= math.exp(-iou * iou / sigma)
                if scores[j] < floor:
                    n -= 1
                    boxes[j], scores[j], index[j] = boxes[n], scores[n], index[n]
                    continue
            j += 1
        i += 1
    return index[:n], scores[:n]


def plain_hard(boxes, order, threshold):  # type: ignore[no-untyped-def]
    """Down the scores, each against those below it that are left."""
    gone, kept = np.zeros(len(boxes), np.bool_), []
    for i in range(len(order)):
        a = order[i]
        if gone[a]:
            continue
        kept.append(a)
        for j in range(i + 1, len(order)):
            b = order[j]
            if gone[b]:
                continue
            width = min(boxes[a, 2], boxes[b, 2]) - max(boxes[a, 0], boxes[b, 0])
            height = min(boxes[a, 3], boxes[b, 3]) - max(boxes[a, 1], boxes[b, 1])
            if width > 0 and height > 0:
                common = width * height
                areas = (boxes[a, 2] - boxes[a, 0]) * (boxes[a, 3] - boxes[a, 1])
                areas += (boxes[b, 2] - boxes[b, 0]) * (boxes[b, 3] - boxes[b, 1])
                gone[b] = common / (areas - common) > threshold
    return np.array(kept)


def apart(n: int) -> tuple[NDArray, NDArray]:
    """n boxes of 10 to 30 pixels on a square that grows with n, about one box in each 20 by 20 pixels, and scores."""
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 20 * math.sqrt(n), (n, 2))
    return np.concatenate([corner, corner + rng.uniform(10, 30, (n, 2))], axis=1), rng.uniform(0.01, 1, n)


def clusters(n: int) -> tuple[NDArray, NDArray]:
    """n boxes in a unit square, 20 jittered ones around each of n / 20 objects, and scores."""
    rng = np.random.default_rng(0)
    centre = rng.uniform(0.1, 0.9, (n // 20, 2)).repeat(20, axis=0) + rng.normal(0, 0.006, (n, 2))
    half = rng.uniform(0.01, 0.05, (n // 20, 2)).repeat(20, axis=0) * np.exp(rng.normal(0, 0.1, (n, 2)))
    return np.concatenate([centre - half, centre + half], axis=1), rng.uniform(0.01, 1, n)


def seconds(run: Callable[[], object], calls: int = 1) -> float:
    start = time.thread_time()  # without the time for which a busy machine puts us aside
    for _ in range(calls):
        run()
    return (time.thread_time() - start) / calls


def measure() -> list[dict[str, str | float]]:
    """How many times faster than each peer, medians over rounds in which all take turns."""
    from ensemble_boxes import nms
    from ensemble_boxes import soft_nms as peer
    from numba import njit

    loop, hard_loop = njit(plain), njit(plain_hard)
    rows: list[dict[str, str | float]] = []
    for n, (rounds, calls) in SIZES.items():
        boxes, scores = clusters(n)
        b, s, labels = torch.from_numpy(boxes), torch.from_numpy(scores), np.zeros(n)
        arms = {
            "ours": lambda b=b, s=s: soft_nms(b, s),
            "plain": lambda boxes=boxes, scores=scores: loop(boxes, scores, 0.5, 0.001),
            "peer": lambda boxes=boxes, scores=scores, labels=labels: peer(
                [boxes], [scores], [labels], sigma=0.5, thresh=0.001
            ),
            "ours, hard": lambda b=b, s=s: soft_nms(b, s, method="hard", iou_threshold=0.5, score_threshold=0.0),
            "plain, hard": lambda boxes=boxes, scores=scores: hard_loop(boxes, np.argsort(-scores, kind="stable"), 0.5),
            "peer, hard": lambda boxes=boxes, scores=scores, labels=labels: nms(
                [boxes], [scores], [labels], iou_thr=0.5
            ),
        }
        assert arms["ours"]()[0].tolist() == arms["plain"]()[0].tolist()
        assert len(arms["ours"]()[0]) == len(arms["peer"]()[0])
        assert arms["ours, hard"]()[0].tolist() == arms["plain, hard"]().tolist()
        assert len(arms["ours, hard"]()[0]) == len(arms["peer, hard"]()[0])
        times = {name: [] for name in arms}
        for _ in range(rounds):
            for name, arm in arms.items():
                times[name].append(seconds(arm, calls))
        median = {name: statistics.median(t) for name, t in times.items()}
        for name, ours, theirs, target in (
            (f"Gaussian Soft-NMS of {n:,} boxes, against a plain numba loop", "ours", "plain", ">= 1"),
            (f"Gaussian Soft-NMS of {n:,} boxes, against ensemble-boxes", "ours", "peer", ">= 7"),
            (f"hard suppression of {n:,} boxes, against ensemble-boxes", "ours, hard", "peer, hard", ">= 1.5"),
            (f"hard suppression of {n:,} boxes, against a plain numba loop", "ours, hard", "plain, hard", ">= 1"),
        ):
            rows.append(
                {"name": name, "ratio": median[theirs] / median[ours], "target": target, "unit": "times faster"}
            )
    for name, method in (("Gaussian Soft-NMS", "gaussian"), ("hard suppression", "hard")):
        few, many = (_seconds_apart(n, method) for n in (10_000, 100_000))
        rows.append(
            {
                "name": f"{name} of 100,000 boxes apart, against 10,000",
                "ratio": many / few,
                "target": "<= 30",
                "unit": "times the time",
            }
        )
    return rows


def _seconds_apart(n: int, method: str) -> float:
    boxes, scores = (torch.from_numpy(array) for array in apart(n))
    return statistics.median(seconds(lambda: soft_nms(boxes, scores, method=method)) for _ in range(3))
