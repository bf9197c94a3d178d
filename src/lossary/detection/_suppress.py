"""The engine of the suppressors: one greedy loop, whatever the overlap and the decay.

Compiled by numba, the loop keeps the shapes in a tree. Shapes are split at the median of the coordinate of their
bounds that spreads most, until sixteen are left in a leaf; every node knows the bounds and the best score of what is
below it. So what is best is at the root, and a pick visits only the parts of the scene that it can reach: on a
scene that spreads out, a pick costs about log n. Where numba is missing numpy compares each pick with all bounds.
"""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossary.detection._overlap import BOX, Overlap

Decay = Callable[[Any, float], Any]
LEAF = 16


def hard(overlap: Any, threshold: float) -> Any:
    """Greedy non-maximum suppression: 0 above the threshold, else 1."""
    return 1.0 * (overlap <= threshold)


def linear(overlap: Any, threshold: float) -> Any:
    """1 - overlap above the threshold, else 1."""
    return 1.0 - overlap * (overlap > threshold)


def gaussian(overlap: Any, sigma: float) -> Any:
    """exp(-overlap^2 / sigma)."""
    return np.exp(-overlap * overlap / sigma)


def suppress(
    shapes: Tensor,
    scores: Tensor,
    *,
    decay: Decay,
    parameter: float,
    floor: float,
    overlap: Overlap = BOX,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Pick the best score left, multiply the others by decay(overlap, parameter), and again until none is left.

    All of it is done in double precision on the CPU. A shape whose factor is 0, or whose score falls below the floor
    or is not a number, is gone. Of equal scores the one with the lower index is picked first. Shapes whose bounds are
    empty, reversed or not finite overlap nothing: their scores decide alone. Nothing carries a gradient.

    Args:
        shapes: (N, P) floating-point, whatever the overlap takes.
        scores: (N,) floating-point, >= 0.
        decay: decay(overlap, parameter), a factor in 0 to 1 and 1 at overlap 0: `hard`, `linear`, `gaussian`, or any
            plain function in numpy's terms, which numba can compile.
        parameter: of the decay.
        floor: scores below it are gone, >= 0.
        overlap: of two shapes, see `_overlap`.
        groups: (N,) integers; shapes of different groups (classes, images) leave each other alone. None is one group.

    Returns:
        keep (K,) int64, best first, and the decayed scores (K,).
    """
    values = scores.detach().cpu().double().numpy()
    rows, low, high = overlap.encode(shapes)
    if groups is not None:
        group = np.unique(groups.cpu().numpy(), return_inverse=True)[1].astype(np.float64)
        low, high = np.vstack([low, group]), np.vstack([high, group + 1])  # unit intervals that share no inner point
    keep, decayed = _loop(len(low))(rows, low, high, values, overlap, decay, float(parameter), float(floor))
    return torch.from_numpy(keep).to(scores.device), torch.from_numpy(decayed).to(scores)


@functools.cache
def _loop(dims: int) -> Callable[..., tuple[NDArray, NDArray]]:
    """The loop for bounds of so many dimensions in machine code, or in numpy where numba is not installed."""
    try:
        from numba import float64, int64, njit, types
    except ImportError:
        return _picked_by_numpy
    vector, matrix = float64[::1], float64[:, ::1]
    factor = types.FunctionType(float64(vector, vector, float64))
    result = types.Tuple((int64[::1], vector))
    signature = result(matrix, matrix, matrix, vector, int64[::1], factor, float64, float64)
    pick = njit(signature, error_model="numpy", cache=True)(_picker(dims))
    split = njit(int64[::1](matrix), error_model="numpy", cache=True)(_split)

    def run(
        rows: NDArray, low: NDArray, high: NDArray, scores: NDArray, overlap: Overlap, decay: Decay, *numbers: float
    ) -> Any:
        order = split(np.concatenate([low, high]))
        arrays = (np.ascontiguousarray(a) for a in (rows[order], low[:, order], high[:, order], scores[order]))
        return pick(*arrays, order, _factor(overlap.pair, decay), *numbers)

    return run


@functools.cache
def _factor(pair: Callable[[Any, Any], Any], decay: Decay) -> Any:
    """What a score is multiplied by, compiled by numba.

    The loop calls it through a pointer, so that it is compiled once and its cache knows nothing of overlaps.
    """
    from numba import cfunc, float64, njit

    pair, decay = (njit(function, error_model="numpy") for function in (pair, decay))

    def factor(a, b, parameter):  # type: ignore[no-untyped-def]
        share = pair(a, b)
        return decay(share, parameter) if share > 0.0 else 1.0

    return cfunc(float64(float64[::1], float64[::1], float64), error_model="numpy")(factor)


def _split(ends):  # type: ignore[no-untyped-def]
    """The order in which the leaves hold the shapes: at every node the lower half of the widest coordinate first."""
    n = ends.shape[1]
    order = np.arange(n)
    leaves = 1
    while leaves * LEAF < n:
        leaves *= 2
    width = leaves  # of a node, in leaves
    while width > 1:
        for first in range(0, leaves, width):
            start, middle = first * n // leaves, (2 * first + width) * n // (2 * leaves)
            stop = (first + width) * n // leaves
            widest, spread = -1, 0.0
            for d in range(len(ends)):
                lowest, highest = np.inf, -np.inf
                for i in order[start:stop]:
                    lowest, highest = min(lowest, ends[d, i]), max(highest, ends[d, i])
                if highest - lowest > spread:
                    widest, spread = d, highest - lowest
            if widest < 0:
                continue
            values, stop = ends[widest], stop - 1
            while start < stop:  # Hoare's selection; numpy's would take ten seconds to compile
                pivot, i, j = values[order[(start + stop) // 2]], start, stop
                while i <= j:
                    while values[order[i]] < pivot:
                        i += 1
                    while values[order[j]] > pivot:
                        j -= 1
                    if i <= j:
                        order[i], order[j] = order[j], order[i]
                        i, j = i + 1, j - 1
                if middle <= j:
                    stop = j
                elif middle >= i:
                    start = i
                else:
                    break
        width //= 2
    return order


def _picker(dims):  # type: ignore[no-untyped-def]
    """The loop for bounds of so many dimensions, as numba compiles it: a constant, it is worth a quarter."""

    def picked(rows, low, high, scores, names, decay, parameter, floor):  # type: ignore[no-untyped-def]
        """Shapes are in the order of `_split`, and what is gone has score -1."""
        n = len(scores)
        leaves = 1
        while leaves * LEAF < n:
            leaves *= 2
        left, place = np.full(n, -1.0), np.empty(n, np.int64)
        for j in range(n):  # numba takes seconds to compile np.where, and as long for an index of indices
            place[names[j]] = j
            if scores[j] >= floor:
                left[j] = scores[j]

        # Node 1 is the root, the children of node t are 2 t and 2 t + 1, and leaf i is node leaves + i.
        node_low, node_high = np.full((dims, 2 * leaves), np.inf), np.full((dims, 2 * leaves), -np.inf)
        for d in range(dims):
            for leaf in range(leaves):
                for j in range(leaf * n // leaves, (leaf + 1) * n // leaves):
                    node_low[d, leaves + leaf] = min(node_low[d, leaves + leaf], low[d, j])
                    node_high[d, leaves + leaf] = max(node_high[d, leaves + leaf], high[d, j])
            for t in range(leaves - 1, 0, -1):
                node_low[d, t] = min(node_low[d, 2 * t], node_low[d, 2 * t + 1])
                node_high[d, t] = max(node_high[d, 2 * t], node_high[d, 2 * t + 1])
        best, first = np.full(2 * leaves, -1.0), np.zeros(2 * leaves, np.int64)

        keep, decayed, kept = np.empty(n, np.int64), np.empty(n), 0
        touched, count, stack = np.arange(leaves, 2 * leaves), leaves, np.empty(64, np.int64)
        while True:
            for t in touched[:count]:
                leaf = t - leaves
                score, name = -1.0, n
                for j in range(leaf * n // leaves, (leaf + 1) * n // leaves):
                    if left[j] >= score and (left[j] > score or names[j] < name):
                        score, name = left[j], names[j]
                best[t], first[t] = score, name
            while touched[0] > 1:  # the parents, each once, since what is touched is sorted
                parents = 0
                for t in touched[:count] // 2:
                    if parents == 0 or touched[parents - 1] != t:
                        touched[parents] = t
                        parents += 1
                        a, b = 2 * t, 2 * t + 1
                        if best[b] > best[a] or (best[b] == best[a] and first[b] < first[a]):
                            a = b
                        best[t], first[t] = best[a], first[a]
                count = parents
            if best[1] < 0.0:
                return keep[:kept], decayed[:kept]
            keep[kept], decayed[kept] = first[1], best[1]
            kept += 1
            top = place[first[1]]
            left[top] = -1.0
            shape = rows[top]

            count, depth = 0, 1
            stack[0] = 1
            home = leaves + ((top + 1) * leaves - 1) // n
            while depth > 0:
                depth -= 1
                t = stack[depth]
                meets = best[t] >= 0.0
                for d in range(dims):
                    meets = meets and node_low[d, t] < high[d, top] and node_high[d, t] > low[d, top]
                if not meets:
                    continue
                if t < leaves:
                    stack[depth], stack[depth + 1] = 2 * t + 1, 2 * t
                    depth += 2
                    continue
                touched[count] = t
                count += 1
                for j in range((t - leaves) * n // leaves, (t - leaves + 1) * n // leaves):
                    meets = left[j] >= 0.0
                    for d in range(dims):
                        meets = meets and low[d, j] < high[d, top] and high[d, j] > low[d, top]
                    if meets:
                        factor = decay(shape, rows[j], parameter)
                        left[j] *= factor
                        if not (factor > 0.0 and left[j] >= floor):
                            left[j] = -1.0
            if count == 0:  # a shape that meets nothing, not even itself
                touched[0], count = home, 1

    return picked


def _picked_by_numpy(
    rows: NDArray,
    low: NDArray,
    high: NDArray,
    scores: NDArray,
    overlap: Overlap,
    decay: Decay,
    parameter: float,
    floor: float,
) -> tuple[NDArray, NDArray]:
    """The same loop, a vector operation for each step of it."""
    left = np.where(scores >= floor, scores, -1.0)
    keep, decayed = [], []
    while left.size and left.max() >= 0.0:
        top = int(left.argmax())
        keep.append(top)
        decayed.append(left[top])
        left[top] = -1.0
        meets = (low < high[:, top, None]) & (high > low[:, top, None])
        (near,) = (meets.all(0) & (left >= 0.0)).nonzero()
        share = overlap.many(rows[top], rows[near])
        near, share = near[share > 0.0], share[share > 0.0]
        factor = decay(share, parameter)
        score = left[near] * factor
        left[near] = np.where((factor > 0.0) & (score >= floor), score, -1.0)
    return np.array(keep, np.int64), np.array(decayed, np.float64)
