"""The engine of the suppressors: both forms of its loop against a plain double loop, and boxes that are no boxes.

The double loop compares all with all, so that it knows of no tree; its scores are compared to the last bit.
"""

import math

import numpy as np
import pytest
import torch

from lossary.detection import _suppress
from lossary.detection._overlap import POLYGON, ROTATED_BOX, Overlap
from lossary.detection._suppress import gaussian, hard, linear, suppress


@pytest.fixture(params=["compiled", "numpy"])
def form(request, monkeypatch):
    """Both forms of the loop: numba's, where it is installed, and numpy's."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(_suppress, "_loop", lambda dims: _suppress._picked_by_numpy)
    return request.param


def slow(boxes, scores, decay, parameter, floor):
    """By the definition, on Python's numbers: sort all that is left again before every pick."""
    left = {i: s for i, s in enumerate(scores.tolist()) if s >= floor}
    keep, decayed = [], []
    while left:
        best = sorted(left, key=lambda i: (-left[i], i))[0]
        keep.append(best)
        decayed.append(left.pop(best))
        for i in list(left):
            factor = decay(overlap(boxes[best].tolist(), boxes[i].tolist()), parameter)
            left[i] *= factor
            if factor == 0 or left[i] < floor:
                del left[i]
    return keep, decayed


def overlap(a, b):
    inside = [(min(a[k + 2], b[k + 2]), max(a[k], b[k])) for k in (0, 1)]
    common = math.prod(max(high - low, 0.0) for high, low in inside)
    return common / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - common)


def scene(seed, n):
    """Whole coordinates and scores in tenths, so that ties abound."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 30, (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(1, 15, (n, 2))], axis=1).astype(float)
    return torch.from_numpy(boxes), torch.from_numpy(rng.integers(0, 11, n) / 10)


def fading(overlap, power):
    return (1.0 - overlap) ** power


DECAYS = [(hard, 0.3, 0.0), (linear, 0.3, 0.05), (fading, 2.0, 0.0), (gaussian, 0.5, 0.001)]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("decay", "parameter", "floor"), DECAYS)
def test_the_loop_does_what_its_definition_says(form, seed, decay, parameter, floor):
    boxes, scores = scene(seed, 40)
    expected_keep, expected = slow(boxes, scores, decay, parameter, floor)
    keep, decayed = suppress(boxes, scores, decay=decay, parameter=parameter, floor=floor)
    assert keep.tolist() == expected_keep
    np.testing.assert_allclose(decayed.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("n", [1, 15, 16, 17, 33, 400])
def test_trees_of_all_sizes(form, n):
    """From one leaf to thirty-two, leaves of unequal size, most of what is in them gone in the end."""
    boxes, scores = scene(99, n)
    for decay, parameter, floor in DECAYS:
        expected_keep, expected = slow(boxes, scores, decay, parameter, floor)
        keep, decayed = suppress(boxes, scores, decay=decay, parameter=parameter, floor=floor)
        assert keep.tolist() == expected_keep
        np.testing.assert_allclose(decayed.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("layout", ["clusters", "apart", "mixed sizes", "one place", "grid"])
@pytest.mark.parametrize(("decay", "parameter", "floor"), DECAYS)
def test_the_tree_changes_nothing(layout, decay, parameter, floor):
    """A thousand boxes: the compiled loop gives what numpy gives, which compares a pick with all that is left."""
    pytest.importorskip("numba")
    rng = np.random.default_rng(7)
    n = 1000
    corner, side = rng.uniform(0, 1000, (n, 2)), rng.uniform(10, 30, (n, 2))
    if layout == "clusters":
        corner = corner[:50].repeat(20, axis=0) + rng.normal(0, 3, (n, 2))
    elif layout == "mixed sizes":
        side = np.exp(rng.uniform(0, 7, (n, 2)))
    elif layout == "one place":
        corner, side = np.zeros((n, 2)), np.full((n, 2), 5.0)
    elif layout == "grid":
        corner, side = rng.integers(0, 60, (n, 2)), np.full((n, 2), 3.0)
    boxes = torch.from_numpy(np.concatenate([corner, corner + side], axis=1))
    scores = torch.from_numpy(rng.integers(1, 50, n) / 50)  # twenty of each
    hyper = {"decay": decay, "parameter": parameter, "floor": floor}
    keep, decayed = suppress(boxes, scores, **hyper)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_suppress, "_loop", lambda dims: _suppress._picked_by_numpy)
        expected_keep, expected = suppress(boxes, scores, **hyper)
    assert torch.equal(keep, expected_keep)
    if decay in (hard, linear):  # numpy's powers and exponentials may differ from the compiler's in the last bit
        assert torch.equal(decayed, expected)
    torch.testing.assert_close(decayed, expected, rtol=1e-12, atol=0)


def test_groups_leave_each_other_alone(form):
    boxes, scores = scene(5, 60)
    groups = torch.from_numpy(np.random.default_rng(5).integers(-2, 2, 60)) * 10**15
    keep, decayed = suppress(boxes, scores, decay=linear, parameter=0.2, floor=0.05, groups=groups)
    alone = {}
    for number in groups.unique():
        (mine,) = torch.where(groups == number)
        kept, left = slow(boxes[mine], scores[mine], linear, 0.2, 0.05)
        alone |= dict(zip(mine[kept].tolist(), left, strict=True))
    ranked = sorted(alone, key=lambda i: (-alone[i], i))
    assert keep.tolist() == ranked
    assert decayed.tolist() == pytest.approx([alone[i] for i in ranked], rel=1e-12)


def test_tens_of_thousands_at_one_place():
    """One pick removes them all: no list of pairs is ever made."""
    pytest.importorskip("numba")
    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(50_000, 1), torch.linspace(0.1, 0.9, 50_000)
    keep, _ = suppress(boxes, scores, decay=hard, parameter=0.5, floor=0.0)
    assert keep.tolist() == [49_999]
    keep, decayed = suppress(boxes, scores, decay=gaussian, parameter=0.5, floor=0.01)  # each pick leaves exp(-2)
    assert keep.tolist() == [49_999, 49_998, 49_997]
    assert decayed.tolist() == pytest.approx([scores[-1 - k].item() * math.exp(-2 * k) for k in range(3)], rel=1e-5)


def test_no_boxes(form):
    keep, decayed = suppress(torch.zeros(0, 4), torch.zeros(0), decay=hard, parameter=0.5, floor=0.0)
    assert (keep.shape, keep.dtype, decayed.shape) == ((0,), torch.int64, (0,))
    keep, _ = suppress(
        torch.zeros(0, 4), torch.zeros(0), decay=hard, parameter=0.5, floor=0.0, groups=torch.zeros(0).long()
    )
    assert keep.shape == (0,)


def test_degenerate_boxes_overlap_nothing(form):
    nan, inf = math.nan, math.inf
    boxes = torch.tensor(
        [[0, 0, 4, 4], [1, 1, 1, 3], [1, 1, 1, 3], [3, 3, 1, 1], [nan, 0, 4, 4], [0, 0, 4, 4], [-inf, -inf, inf, inf]]
    )
    scores = torch.linspace(0.9, 0.3, 7)
    keep, decayed = suppress(boxes, scores, decay=hard, parameter=0.5, floor=0.0)
    assert keep.tolist() == [0, 1, 2, 3, 4, 6]  # but 5 is 0 again
    assert torch.equal(decayed, scores[keep])


def test_scores_that_are_no_scores_are_dropped(form):
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0]]) + 5 * torch.arange(4.0)[:, None]
    keep, _ = suppress(boxes, torch.tensor([0.2, math.nan, -0.5, 0.0]), decay=hard, parameter=0.5, floor=0.0)
    assert keep.tolist() == [0, 3]


def interval_iou(a, b):
    common = np.maximum(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0.0)
    return common / (a[1] - a[0] + b[1] - b[0] - common)


INTERVALS = torch.tensor([[0.0, 4.0], [1.0, 5.0], [4.0, 6.0], [3.0, 8.0]])


@pytest.mark.parametrize(
    "overlap",
    [Overlap(interval_iou), Overlap(interval_iou, bounds=lambda rows: rows), Overlap(interval_iou, broadcasts=True)],
    ids=["no bounds", "bounds", "broadcasts"],
)
def test_another_overlap(form, overlap):
    """Intervals on a line. Overlaps: 1 with 3: 2/7, 1 with 0: 3/5, 3 with 0: 1/8, 3 with 2: 2/5, 1 with 2: 1/5."""
    scores = torch.tensor([0.6, 0.9, 0.5, 0.8])
    keep, _ = suppress(INTERVALS, scores, decay=hard, parameter=0.3, floor=0.0, overlap=overlap)
    assert keep.tolist() == [1, 3]
    keep, decayed = suppress(INTERVALS, scores, decay=linear, parameter=0.0, floor=0.0, overlap=overlap)
    assert keep.tolist() == [1, 3, 2, 0]
    last = 0.6 * (1 - 3 / 5) * (1 - 1 / 8)
    assert decayed.tolist() == pytest.approx([0.9, 0.8 * 5 / 7, 0.5 * 4 / 5 * 3 / 5, last], rel=1e-6)


def test_boxes_in_space(form):
    """Cuboids x1 y1 z1 x2 y2 z2, apart only in z, or in a group of their own."""

    def cuboid_iou(a, b):
        common = 1.0
        for k in range(3):
            common *= max(min(a[k + 3], b[k + 3]) - max(a[k], b[k]), 0.0)
        areas = (a[3] - a[0]) * (a[4] - a[1]) * (a[5] - a[2]) + (b[3] - b[0]) * (b[4] - b[1]) * (b[5] - b[2])
        return common / (areas - common)

    space = Overlap(cuboid_iou, bounds=lambda rows: rows)
    shapes = torch.tensor([[0.0, 0, 0, 2, 2, 2], [0, 0, 2, 2, 2, 4], [0, 0, 0, 2, 2, 3], [0, 0, 0, 2, 2, 2]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    hyper = {"decay": hard, "parameter": 0.5, "floor": 0.0, "overlap": space}
    assert suppress(shapes, scores, **hyper)[0].tolist() == [0, 1]
    assert suppress(shapes, scores, **hyper, groups=torch.tensor([0, 0, 1, 2]))[0].tolist() == [0, 1, 2, 3]


def test_shapes_that_are_no_boxes(form):
    """Two long boxes that cross share little, though their bounding boxes are the same; so do two triangles."""
    crossed = torch.tensor([[0.0, 0.0, 10.0, 1.0, math.pi / 4], [0.0, 0.0, 10.0, 1.0, -math.pi / 4]])
    scores = torch.tensor([0.5, 0.6])
    hyper = {"decay": linear, "parameter": 0.0, "floor": 0.0}
    keep, decayed = suppress(crossed, scores, overlap=ROTATED_BOX, **hyper)
    assert keep.tolist() == [1, 0]
    assert decayed[1].item() == pytest.approx(0.5 * (1 - 1 / 19), rel=1e-6)
    halves = torch.tensor([[0.0, 0, 4, 0, 0, 4], [4.0, 0, 4, 4, 0, 4]])
    assert suppress(halves, scores, overlap=POLYGON, **hyper)[1].tolist() == pytest.approx([0.6, 0.5], rel=1e-6)


def test_an_overlap_that_is_not_a_number_counts_as_none(form):
    def undefined(a, b):
        return (a[0] - b[0]) / 0.0 if a[0] != b[0] else math.nan

    keep, _ = suppress(
        torch.zeros(3, 1),
        torch.tensor([0.1, 0.3, 0.2]),
        decay=hard,
        parameter=0.5,
        floor=0.0,
        overlap=Overlap(undefined),
    )
    assert keep.tolist() == [1, 2, 0]


def test_inputs_are_left_alone(form):
    boxes, scores = scene(3, 30)
    boxes, scores = boxes.requires_grad_(), scores.requires_grad_()
    before = boxes.clone(), scores.clone()
    _, decayed = suppress(boxes, scores, decay=linear, parameter=0.1, floor=0.0)
    assert torch.equal(boxes, before[0])
    assert torch.equal(scores, before[1])
    assert not decayed.requires_grad
