"""How much two shapes overlap, 0 for not at all and 1 for equal.

An overlap takes the coordinates of one shape, (P,), and of another, (P,), or of M others, (P, M): coordinates come
first, so that one definition serves numba, which calls it with a pair, and numpy, which calls it with many.
"""

from typing import Any

import numpy as np


def box_iou(a: Any, b: Any) -> Any:
    """Intersection over union of boxes x1, y1, x2, y2, in continuous coordinates: areas are (x2 - x1)(y2 - y1)."""
    width = np.minimum(a[2], b[2]) - np.maximum(a[0], b[0])
    height = np.minimum(a[3], b[3]) - np.maximum(a[1], b[1])
    common = np.maximum(width, 0.0) * np.maximum(height, 0.0)
    return common / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - common)
