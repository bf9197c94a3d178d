"""The engine of the suppressors: both forms of its loop against a plain double loop, and boxes that are no boxes."""

import math

import numpy as np
import pytest
import torch

from lossary.detection import _suppress
from lossary.detection._overlap import box_iou
from lossary.detection._suppress import hard, suppress


@pytest.fixture(params=["compiled", "numpy"])
def form(request, monkeypatch):
    """Both forms of the loop: numba's, where it is installed, and numpy's."""
    if request.param == "compiled":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(_suppress, "_loop", lambda: _suppress._picked_by_numpy)
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


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("decay", "parameter", "floor"), [(hard, 0.3, 0.0), (fading, 0.1, 0.05), (fading, 2.0, 0.0)])
def test_the_loop_does_what_its_definition_says(form, seed, decay, parameter, floor):
    boxes, scores = scene(seed, 40)
    expected_keep, expected = slow(boxes, scores, decay, parameter, floor)
    keep, decayed = suppress(boxes, scores, decay=decay, parameter=parameter, floor=floor)
    assert keep.tolist() == expected_keep
    np.testing.assert_allclose(decayed.numpy(), expected, rtol=1e-12)


def test_the_list_survives_being_swept(form):
    """Hundreds of boxes, most of which go: the survivors keep their places and their ties."""
    boxes, scores = scene(99, 400)
    expected_keep, _ = slow(boxes, scores, hard, 0.1, 0.05)
    keep, _ = suppress(boxes, scores, decay=hard, parameter=0.1, floor=0.05)
    assert keep.tolist() == expected_keep


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


def test_another_overlap_within_bounds(form):
    """Intervals on a line, as shapes of two coordinates; their bounds are boxes of height 1."""

    def interval_iou(a, b):
        common = np.maximum(np.minimum(a[1], b[1]) - np.maximum(a[0], b[0]), 0.0)
        return common / (a[1] - a[0] + b[1] - b[0] - common)

    intervals = torch.tensor([[0.0, 4.0], [1.0, 5.0], [4.0, 6.0], [3.0, 8.0]])
    bounds = torch.stack([intervals[:, 0], torch.zeros(4), intervals[:, 1], torch.ones(4)], dim=1)
    scores = torch.tensor([0.6, 0.9, 0.5, 0.8])
    keep, _ = suppress(
        intervals, scores, decay=hard, parameter=0.3, floor=0.0, overlap=interval_iou, bounds=bounds
    )  # overlaps: 1 with 3: 2/7, 1 with 0: 3/5, 3 with 0: 1/8, 3 with 2: 2/5
    assert keep.tolist() == [1, 3]


def test_inputs_are_left_alone(form):
    boxes, scores = scene(3, 30)
    before = boxes.clone(), scores.clone()
    suppress(boxes, scores, decay=hard, parameter=0.1, floor=0.0)
    flipped = boxes.T.contiguous().T  # laid out as the loop wants its copy of the bounds, which it then moves
    suppress(boxes, scores, decay=hard, parameter=0.1, floor=0.0, bounds=flipped)
    assert torch.equal(boxes, before[0])
    assert torch.equal(flipped, before[0])
    assert torch.equal(scores, before[1])


def test_box_iou_of_pairs_and_of_many():
    assert box_iou(np.array([0.0, 0.0, 2.0, 2.0]), np.array([1.0, 1.0, 3.0, 3.0])) == pytest.approx(1 / 7)
    many = np.array([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0], [0.0, 0.0, 4.0, 1.0], [5.0, 0.0, 6.0, 2.0]]).T
    np.testing.assert_allclose(box_iou(many[:, 0], many), [1, 0, 2 / 6, 0])
