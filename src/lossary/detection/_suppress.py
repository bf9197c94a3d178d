"""The engine of the suppressors: one greedy loop, whatever the overlap and the decay.

The loop looks for the neighbours of what it picks in two steps. Bounding boxes, four comparisons a pair, tell which
shapes are near at all; only for those few it calls the overlap. With n detections of which k are kept, that is at
most n k comparisons and memory for n; what later narrows the search (a grid, a sweep) only has to shorten the list
that `near` is drawn from.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossary.detection._overlap import box_iou

Overlap = Callable[[Any, Any], Any]
Decay = Callable[[Any, float], Any]


def hard(overlap: Any, threshold: float) -> Any:
    """Greedy non-maximum suppression: 0 above the threshold, else 1."""
    return 1.0 * (overlap <= threshold)


def suppress(
    shapes: Tensor,
    scores: Tensor,
    *,
    decay: Decay,
    parameter: float,
    floor: float,
    overlap: Overlap = box_iou,
    bounds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick the best score left, multiply the others by decay(overlap, parameter), and again until none is left.

    All of it is done in double precision on the CPU. A shape whose factor is 0, or whose score falls below the floor
    or is not a number, is gone. Of equal scores the one with the lower index is picked first. Bounds that are empty,
    reversed or not a number are near nothing. Nothing carries a gradient.

    Args:
        shapes: (N, P) floating-point, whatever the overlap takes.
        scores: (N,) floating-point, >= 0.
        decay: decay(overlap, parameter), a factor in 0 to 1 and 1 at overlap 0. Like the overlap it is a plain
            function in numpy's terms, which numba can compile.
        parameter: of the decay.
        floor: scores below it are gone, >= 0.
        overlap: of two shapes, see `_overlap`.
        bounds: (N, 4) bounding boxes x1, y1, x2, y2 outside of which shapes do not overlap; None says that shapes
            are such boxes.

    Returns:
        keep (K,) int64, best first, and the decayed scores (K,).
    """
    values = scores.detach().cpu().double().numpy()
    rows = np.ascontiguousarray(shapes.detach().cpu().double().numpy())
    box = rows if bounds is None else bounds.detach().cpu().double().numpy()
    edges = np.array(box.T, order="C")  # a copy: the loop moves them
    keep, decayed = _loop()(rows, edges, values, overlap, decay, float(parameter), float(floor))
    return torch.from_numpy(keep).to(scores.device), torch.from_numpy(decayed).to(scores)


@functools.cache
def _loop() -> Callable[..., tuple[NDArray, NDArray]]:
    """The loop in machine code, or in numpy where numba is not installed."""
    try:
        from numba import cfunc, float64, int64, njit, types
    except ImportError:
        return _picked_by_numpy
    vector, matrix = float64[::1], float64[:, ::1]
    pair, scalar = float64(vector, vector), float64(float64, float64)
    functions = types.FunctionType(pair), types.FunctionType(scalar)
    result = types.Tuple((int64[::1], vector))
    signature = result(matrix, matrix, vector, *functions, float64, float64)
    # The loop calls overlap and decay through pointers, so it is compiled once, and its cache knows nothing of them.
    compiled = njit(signature, error_model="numpy", cache=True)(_picked)
    pointer = functools.cache(lambda function, form: cfunc(form, error_model="numpy")(function))

    def run(rows: NDArray, edges: NDArray, scores: NDArray, overlap: Overlap, decay: Decay, *numbers: float) -> Any:
        return compiled(rows, edges, scores, pointer(overlap, pair), pointer(decay, scalar), *numbers)

    return run


def _picked(rows, edges, scores, overlap, decay, parameter, floor):  # type: ignore[no-untyped-def]
    """The loop as numba compiles it. What is gone has score -1, and is swept out when it is an eighth of the list."""
    x1, y1, x2, y2 = edges[0], edges[1], edges[2], edges[3]
    left = np.where(scores >= floor, scores, -1.0)
    index, near = np.arange(len(left)), np.empty(len(left), np.int64)
    keep, decayed = np.empty(len(left), np.int64), np.empty(len(left))
    size, gone, kept = len(left), 0, 0
    while True:
        best = -1.0
        for j in range(size):
            best = max(best, left[j])
        if best < 0.0:
            return keep[:kept], decayed[:kept]
        top = 0
        while left[top] != best:
            top += 1
        keep[kept], decayed[kept] = index[top], best
        kept += 1
        left[top] = -1.0
        gone += 1

        left_edge, lower, right, upper = x1[top], y1[top], x2[top], y2[top]
        found = 0
        for j in range(size):  # without branches, so that it runs on vectors
            near[found] = j
            found += (x1[j] < right) & (x2[j] > left_edge) & (y1[j] < upper) & (y2[j] > lower) & (left[j] >= 0.0)
        for j in near[:found]:
            factor = decay(overlap(rows[index[top]], rows[index[j]]), parameter)
            left[j] *= factor
            if not (factor > 0.0 and left[j] >= floor):
                left[j] = -1.0
                gone += 1

        if 8 * gone > size:
            to = 0
            for j in range(size):
                if left[j] >= 0.0:
                    left[to], index[to] = left[j], index[j]
                    x1[to], y1[to], x2[to], y2[to] = x1[j], y1[j], x2[j], y2[j]
                    to += 1
            size, gone = to, 0


def _picked_by_numpy(
    rows: NDArray, edges: NDArray, scores: NDArray, overlap: Overlap, decay: Decay, parameter: float, floor: float
) -> tuple[NDArray, NDArray]:
    """The same loop, a vector operation for each step of it."""
    x1, y1, x2, y2 = edges
    columns = rows.T
    left = np.where(scores >= floor, scores, -1.0)
    keep, decayed = [], []
    with np.errstate(all="ignore"):  # boxes that are not finite
        while left.size and left.max() >= 0.0:
            top = int(left.argmax())
            keep.append(top)
            decayed.append(left[top])
            left[top] = -1.0
            near = (x1 < x2[top]) & (x2 > x1[top]) & (y1 < y2[top]) & (y2 > y1[top]) & (left >= 0.0)
            (near,) = near.nonzero()
            factor = decay(overlap(columns[:, top], columns[:, near]), parameter)
            score = left[near] * factor
            left[near] = np.where((factor > 0.0) & (score >= floor), score, -1.0)
    return np.array(keep, np.int64), np.array(decayed, np.float64)
