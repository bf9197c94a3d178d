"""How much two shapes overlap: intersection over union, 0 for not at all and 1 for equal.

`BOX`, `ROTATED_BOX` and `POLYGON` are the kinds of shapes; `_suppress.suppress` and `pairwise` take any of them, and
any other `Overlap` as well. `box_iou` is the overlap of boxes with gradients, wherever the boxes are.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lossary import require


def _as_they_are(shapes: NDArray) -> NDArray:
    return shapes


def _anywhere(rows: NDArray) -> NDArray:
    return np.empty((len(rows), 0))


@dataclass(frozen=True)
class Overlap:
    """A kind of shapes and how much two of them overlap.

    Args:
        pair: pair(a, b) of two rows (Q,), a number in 0 to 1; not a number counts as 0. A plain function in the terms
            of numpy and Python's numbers, which calls no other function of its own, so that numba can compile it.
        bounds: of rows (N, Q) the bounding boxes (N, 2 D), D lower ends before D upper ends, D being what you like:
            shapes whose bounds share no inner point are never compared. The default: all are compared.
        rows: of shapes (N, P) the rows (N, Q) that `pair` takes, for what is worth computing once a shape.
        broadcasts: whether `pair` takes (Q,) and (Q, M) as well, which spares numpy a loop where numba is missing.
    """

    pair: Callable[[Any, Any], Any]
    bounds: Callable[[NDArray], NDArray] = _anywhere
    rows: Callable[[NDArray], NDArray] = _as_they_are
    broadcasts: bool = False

    def encode(self, shapes: Tensor) -> tuple[NDArray, NDArray, NDArray]:
        """Of shapes (N, P): rows (N, Q), lower ends (D, N) and upper ends (D, N), in double precision.

        Bounds that are empty, reversed or not finite become (inf, -inf), which meet nothing.
        """
        rows = np.ascontiguousarray(self.rows(shapes.detach().cpu().double().numpy()))
        with np.errstate(invalid="ignore"):
            low, high = np.split(np.ascontiguousarray(self.bounds(rows).T), 2)
        sound = (np.isfinite(low) & np.isfinite(high) & (low < high)).all(0)
        return rows, np.where(sound, low, np.inf), np.where(sound, high, -np.inf)

    def many(self, one: NDArray, others: NDArray) -> NDArray:
        """Of a row (Q,) with rows (M, Q), by numpy: (M,), 0 where it is not a number."""
        with np.errstate(all="ignore"):
            values = self.pair(one, others.T) if self.broadcasts else [self.pair(one, other) for other in others]
        return np.nan_to_num(np.asarray(values, np.float64), nan=0.0)


def pairwise(overlap: Overlap, a: Tensor, b: Tensor) -> Tensor:
    """Overlap (N, M) of each shape of a (N, P) with each of b (M, P): 0 where one of them is no shape.

    Computed on the CPU in double precision, and given in the dtype and on the device of `a`, without gradients.

    Raises:
        ValueError: not two matrices of floating-point numbers with as many columns.
    """
    require.floating("a", a, dims=2)
    require.same_shape("b", b, (len(b), a.shape[1]))
    first, second = overlap.encode(a), overlap.encode(b)
    return torch.from_numpy(_table()(*first, *second, overlap)).to(a)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes x1, y1, x2, y2, (..., 4) with (..., 4), broadcast: `box_iou(a[:, None], b)`.

    In continuous coordinates: an area is (x2 - x1)(y2 - y1). It carries gradients and stays on its device. 0 where
    both boxes are empty and where a box has its corners reversed; not a number where a coordinate is not.
    """
    side_a, side_b = a[..., 2:] - a[..., :2], b[..., 2:] - b[..., :2]
    shared = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    common = shared.clamp(min=0).prod(-1)
    union = side_a.clamp(min=0).prod(-1) + side_b.clamp(min=0).prod(-1) - common
    return common / torch.where(union == 0, torch.ones_like(union), union)


def _box(a: Any, b: Any) -> Any:
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    common = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)


def _polygon(a: Any, b: Any) -> Any:
    """A polygon is the signed sum of the trapezoids under its edges, down to a base below all of it.

    So the common area of two polygons is the signed sum, over pairs of edges, of the common area of their trapezoids,
    which is an integral of min(u, v) = (u + v - |u - v|) / 2 of two straight lines over the x that both span.
    """
    base = min(a[1::2].min(), b[1::2].min())
    areas, common = 0.0, 0.0
    for shape in (a, b):
        area = 0.0
        for i in range(0, len(shape), 2):
            area += (shape[i] - shape[i - 2]) * (shape[i + 1] + shape[i - 1] - 2.0 * base)
        areas += abs(area) / 2.0
    for i in range(0, len(a), 2):
        left_a, right_a = min(a[i - 2], a[i]), max(a[i - 2], a[i])
        if left_a == right_a:
            continue
        slope_a = (a[i + 1] - a[i - 1]) / (a[i] - a[i - 2])
        for j in range(0, len(b), 2):
            left, right = max(left_a, min(b[j - 2], b[j])), min(right_a, max(b[j - 2], b[j]))
            if left >= right:
                continue
            slope_b = (b[j + 1] - b[j - 1]) / (b[j] - b[j - 2])
            u, v = a[i + 1] - base + slope_a * (left - a[i]), b[j + 1] - base + slope_b * (left - b[j])
            u_end, v_end = a[i + 1] - base + slope_a * (right - a[i]), b[j + 1] - base + slope_b * (right - b[j])
            gap, gap_end = u - v, u_end - v_end
            apart = abs(gap + gap_end)  # twice the mean of |u - v|
            if gap * gap_end < 0.0:
                apart = (gap * gap + gap_end * gap_end) / (abs(gap) + abs(gap_end))
            piece = (right - left) * (u + v + u_end + v_end - apart) / 4.0
            common += piece if (a[i] > a[i - 2]) == (b[j] > b[j - 2]) else -piece
    common = min(abs(common), areas / 2.0)
    return common / (areas - common) if areas > 0.0 else 0.0


def _polygon_bounds(rows: NDArray) -> NDArray:
    x, y = rows[:, ::2], rows[:, 1::2]
    return np.stack([x.min(1), y.min(1), x.max(1), y.max(1)], axis=1)


def _corners(boxes: NDArray) -> NDArray:
    """Of cx, cy, width, height, angle the four corners: nowhere if a side is not above 0."""
    x, y, width, height, angle = boxes.T
    half_width, half_height = (np.where(side > 0, side, np.nan) / 2 for side in (width, height))
    right = half_width * np.stack([np.cos(angle), np.sin(angle)])
    up = half_height * np.stack([-np.sin(angle), np.cos(angle)])
    centre = np.stack([x, y])
    return np.concatenate([centre - right - up, centre + right - up, centre + right + up, centre - right + up]).T


BOX = Overlap(_box, bounds=_as_they_are, broadcasts=True)
"""x1, y1, x2, y2 with x1 < x2 and y1 < y2."""

POLYGON = Overlap(_polygon, bounds=_polygon_bounds)
"""Simple polygons, convex or not: x1, y1, x2, y2, ..., either way round. Repeat the last corner to fill a row."""

ROTATED_BOX = Overlap(_polygon, bounds=_polygon_bounds, rows=_corners)
"""cx, cy, width, height, angle in radians; the width runs along (cos, sin) of the angle."""


@functools.cache
def _table() -> Callable[..., NDArray]:
    """The loop of `pairwise` in machine code, or in numpy where numba is not installed."""
    try:
        from numba import cfunc, float64, njit, types
    except ImportError:
        return _table_by_numpy
    matrix, pair = float64[:, ::1], float64(float64[::1], float64[::1])
    loop = njit(matrix(*[matrix] * 6, types.FunctionType(pair)), error_model="numpy", cache=True)(_table_by_loop)
    compiled = functools.cache(cfunc(pair, error_model="numpy"))
    return lambda *arrays: loop(*arrays[:-1], compiled(arrays[-1].pair))


def _table_by_loop(rows_a, low_a, high_a, rows_b, low_b, high_b, pair):  # type: ignore[no-untyped-def]
    table = np.zeros((len(rows_a), len(rows_b)))
    for i in range(len(rows_a)):
        for j in range(len(rows_b)):
            near = True
            for d in range(len(low_a)):
                near &= (low_a[d, i] < high_b[d, j]) & (low_b[d, j] < high_a[d, i])
            if near:
                value = pair(rows_a[i], rows_b[j])
                table[i, j] = value if value == value else 0.0
    return table


def _table_by_numpy(rows_a, low_a, high_a, rows_b, low_b, high_b, overlap):  # type: ignore[no-untyped-def]
    table = np.zeros((len(rows_a), len(rows_b)))
    for i, row in enumerate(rows_a):
        near = ((low_a[:, i, None] < high_b) & (low_b < high_a[:, i, None])).all(0)
        table[i, near] = overlap.many(row, rows_b[near])
    return table
