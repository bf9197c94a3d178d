"""Overlaps against areas worked by hand, integer grids, half-planes cut one by one, and shapely where it is there."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import _overlap
from lossary.detection._overlap import BOX, POLYGON, ROTATED_BOX, Overlap, box_iou, pairwise


@pytest.fixture(params=["compiled", "numpy"])
def form(request, monkeypatch):
    """Both forms of the loop: numba's, where it is installed, and numpy's."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(_overlap, "_table", lambda: _overlap._table_by_numpy)
    return request.param


def polygon(*points):
    return torch.tensor([points], dtype=torch.float64)


def one(kind, a, b):
    return pairwise(kind, a, b).item()


def boxes(rng, n):
    corner = rng.integers(0, 12, (n, 2))
    return np.concatenate([corner, corner + rng.integers(1, 8, (n, 2))], axis=1)


def test_boxes_by_counting_cells(form):
    a, b = boxes(np.random.default_rng(0), 12), boxes(np.random.default_rng(1), 9)
    cells = [[{(x, y) for x in range(p[0], p[2]) for y in range(p[1], p[3])} for p in part] for part in (a, b)]
    expected = [[len(p & q) / len(p | q) for q in cells[1]] for p in cells[0]]
    found = pairwise(BOX, torch.from_numpy(a).double(), torch.from_numpy(b).double())
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    differentiable = box_iou(torch.from_numpy(a).double()[:, None], torch.from_numpy(b).double())
    np.testing.assert_allclose(differentiable.numpy(), expected, rtol=1e-12)


def test_rotated_boxes_by_hand(form):
    square = torch.tensor([[0.0, 0.0, 2.0, 2.0, 0.0]], dtype=torch.float64)
    turned = torch.tensor([[0.0, 0.0, 2.0, 2.0, math.pi / 4]], dtype=torch.float64)
    octagon = 8 * (math.sqrt(2) - 1)  # of a square and itself turned by 45 degrees
    assert one(ROTATED_BOX, square, turned) == pytest.approx(octagon / (8 - octagon), rel=1e-12)
    upright = torch.tensor([[0.0, 0.0, 1.0, 4.0, 0.0]], dtype=torch.float64)
    lying = torch.tensor([[0.0, 0.0, 4.0, 1.0, math.pi / 2]], dtype=torch.float64)
    assert one(ROTATED_BOX, upright, lying) == pytest.approx(1, rel=1e-12)  # the width runs along the angle
    along = torch.tensor([[3.0, 4.0, 10.0, 2.0, math.atan2(4, 3)]], dtype=torch.float64)
    half = torch.tensor([[1.5, 2.0, 5.0, 2.0, math.atan2(4, 3)]], dtype=torch.float64)
    assert one(ROTATED_BOX, along, half) == pytest.approx(1 / 2 * 1, rel=1e-12)


def test_rotated_boxes_that_are_not_turned_are_boxes(form):
    plain = boxes(np.random.default_rng(2), 15).astype(float)
    rotated = np.concatenate(
        [(plain[:, :2] + plain[:, 2:]) / 2, plain[:, 2:] - plain[:, :2], np.zeros((15, 1))], axis=1
    )
    a, b = torch.from_numpy(plain), torch.from_numpy(rotated)
    np.testing.assert_allclose(pairwise(ROTATED_BOX, b, b), pairwise(BOX, a, a), rtol=1e-12, atol=1e-15)


def test_polygons_by_hand(form):
    """A square of side 4 and an L, a U and a triangle in and about it."""
    square = polygon(0, 0, 4, 0, 4, 4, 0, 4)
    ell = polygon(0, 0, 4, 0, 4, 1, 1, 1, 1, 4, 0, 4)  # an area of 7 within the square
    cup = polygon(-1, 2, 5, 2, 5, 6, 4, 6, 4, 3, 0, 3, 0, 6, -1, 6)  # an area of 12, of which 4 within
    wedge = polygon(0, 0, 8, 0, 0, 8)  # an area of 32, all of the square within
    for shape, common, area in ((ell, 7, 7), (cup, 4, 12), (wedge, 16, 32)):
        width = max(square.shape[1], shape.shape[1])
        padded = [torch.cat([s, s[:, -2:].repeat(1, (width - s.shape[1]) // 2)], dim=1) for s in (square, shape)]
        assert one(POLYGON, *padded) == pytest.approx(common / (16 + area - common), rel=1e-12)
    backwards = square.reshape(-1, 2).flip(0).reshape(1, -1)
    assert one(POLYGON, square, backwards) == pytest.approx(1, rel=1e-12)


def cut(points, a, b):
    """What of a convex polygon lies left of the line from a to b."""
    side = [(b[0] - a[0]) * (p[1] - a[1]) - (b[1] - a[1]) * (p[0] - a[0]) for p in points]
    kept = []
    for i, p in enumerate(points):
        q, s, t = points[i - 1], side[i], side[i - 1]
        if s * t < 0:
            kept.append([q[k] + (p[k] - q[k]) * t / (t - s) for k in (0, 1)])
        if s >= 0:
            kept.append(p)
    return kept


def area(points):
    return sum(points[i - 1][0] * p[1] - p[0] * points[i - 1][1] for i, p in enumerate(points)) / 2


def ring(rng, corners, spread):
    """A polygon about a random centre, its corners on a circle (spread 0) or on jagged rays."""
    angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
    radius = 3 * np.exp(spread * rng.standard_normal(corners))
    return rng.uniform(-2, 2, 2) + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_convex_polygons_by_cutting(form):
    rng = np.random.default_rng(3)
    shapes = np.stack([ring(rng, 7, 0.0) for _ in range(16)])
    found = pairwise(POLYGON, *(torch.from_numpy(part.reshape(8, -1)) for part in (shapes[:8], shapes[8:])))
    for i, p in enumerate(shapes[:8]):
        for j, q in enumerate(shapes[8:]):
            rest = p.tolist()
            for k in range(7):
                rest = cut(rest, q[k - 1], q[k])
            common = area(rest)
            assert found[i, j].item() == pytest.approx(common / (area(p) + area(q) - common), abs=1e-12)


@pytest.mark.parametrize("offset", [0.0, 1e5])
def test_jagged_polygons_by_shapely(form, offset):
    shapely = pytest.importorskip("shapely")
    rng = np.random.default_rng(4)
    shapes = offset + np.stack([ring(rng, 11, 0.5) for _ in range(16)])
    found = pairwise(POLYGON, *(torch.from_numpy(part.reshape(8, -1)) for part in (shapes[:8], shapes[8:])))
    for i, p in enumerate(map(shapely.Polygon, shapes[:8] - offset)):
        for j, q in enumerate(map(shapely.Polygon, shapes[8:] - offset)):
            expected = p.intersection(q).area / p.union(q).area
            assert found[i, j].item() == pytest.approx(expected, abs=1e-12 if offset == 0 else 1e-9)


def test_jagged_polygons_by_counting_a_fine_grid(form):
    """The even-odd rule along rows of points: an estimate that errs by about one point a crossing."""
    rng = np.random.default_rng(5)
    shapes = np.stack([ring(rng, 9, 0.4) for _ in range(2)])
    x, y = np.meshgrid(np.linspace(-12, 12, 1201), np.linspace(-12, 12, 1201))
    inside = []
    for shape in shapes:
        odd = np.zeros_like(x, bool)
        for (x1, y1), (x2, y2) in zip(shape, np.roll(shape, -1, axis=0)):
            odd ^= ((y1 > y) != (y2 > y)) & (x < x1 + (y - y1) * (x2 - x1) / (y2 - y1))
        inside.append(odd)
    expected = (inside[0] & inside[1]).sum() / (inside[0] | inside[1]).sum()
    assert one(POLYGON, *(torch.from_numpy(s.reshape(1, -1)) for s in shapes)) == pytest.approx(expected, abs=2e-3)


def test_what_is_no_shape_overlaps_nothing(form):
    nan, inf = math.nan, math.inf
    sound = [0.0, 0.0, 4.0, 4.0]
    odd = torch.tensor([sound, [1, 1, 1, 3], [3, 3, 1, 1], [nan, 0, 4, 4], [0, 0, 4, nan], [-inf, -inf, inf, inf]])
    expected = torch.zeros(6, 6)
    expected[0, 0] = 1
    assert torch.equal(pairwise(BOX, odd, odd), expected)
    assert torch.equal(box_iou(odd[:3, None], odd[:3]), expected[:3, :3])
    flat = torch.tensor([[0.0, 0, 4, 0, 2, 0], [0, 0, 4, 4, 2, 2], [0, nan, 4, 0, 2, 2], [0, 0, 4, 0, 2, 2]])
    assert torch.equal(pairwise(POLYGON, flat, flat), torch.diag(torch.tensor([0.0, 0.0, 0.0, 1.0])))
    thin = torch.tensor([[0.0, 0, 2, 0, 0.3], [0.0, 0, -2, 2, 0.3], [0.0, 0, 2, 2, nan], [0.0, 0, 2, 2, 0.3]])
    assert pairwise(ROTATED_BOX, thin, thin).count_nonzero() == 1
    assert pairwise(BOX, odd[:0], odd).shape == (0, 6)
    assert pairwise(POLYGON, flat, flat[:0]).shape == (4, 0)
    assert pairwise(ROTATED_BOX, thin[:0], thin[:0]).shape == (0, 0)


def test_the_gradient_of_box_iou():
    rng = np.random.default_rng(6)
    a, b = (torch.from_numpy(boxes(rng, 5) + 0.1 * rng.random((5, 4))).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: box_iou(a[:, None], b), (a, b))
    empty = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    box_iou(empty, empty).sum().backward()
    assert torch.equal(empty.grad, torch.zeros(1, 4, dtype=torch.float64))


def test_dtype_and_device_follow_the_first(form):
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]], dtype=torch.float32)
    assert pairwise(BOX, a, a.double()).dtype == torch.float32


def test_another_overlap_needs_no_bounds(form):
    """Cosine similarity, of rows that are made unit vectors once."""

    def dot(a, b):
        return (a * b).sum()

    cosine = Overlap(dot, rows=lambda x: x / np.linalg.norm(x, axis=1, keepdims=True))
    rows = torch.tensor([[3.0, 4.0, 0.0], [4.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    expected = [[1, 24 / 25, 0], [24 / 25, 1, 0], [0, 0, 1]]
    np.testing.assert_allclose(pairwise(cosine, rows, rows).numpy(), expected, atol=1e-7)


def test_refusals():
    with pytest.raises(ValueError, match="a: expected 2 dimensions"):
        pairwise(BOX, torch.zeros(4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"b: expected shape \(2, 4\), got \(2, 5\)"):
        pairwise(BOX, torch.zeros(1, 4), torch.zeros(2, 5))
