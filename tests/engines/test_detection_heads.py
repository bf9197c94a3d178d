"""What heads on boxes share, by hand."""

import math

import pytest
import torch

from lossary.detection._heads import around, box_giou, corners, sine_position


def test_decoding():
    points = torch.tensor([[4.0, 8.0], [12.0, 8.0]])
    sides = torch.tensor([[[1.0, 2, 3, 4], [0, 0, 0, 0]]])
    assert around(points, sides).tolist() == [[[3.0, 6, 7, 12], [12, 8, 12, 8]]]
    assert corners(torch.tensor([5.0, 6, 4, 2])).tolist() == [3.0, 5, 7, 7]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ((0, 0, 2, 2), (0, 0, 2, 2), 1.0),
        ((0, 0, 2, 2), (1, 0, 3, 2), 1 / 3),  # a hull that is covered whole
        ((0, 0, 1, 1), (1, 1, 2, 2), -0.5),
        ((0, 0, 2, 2), (1, 1, 3, 3), 1 / 7 - 2 / 9),
        ((0, 0, 1, 1), (9, 0, 10, 1), -0.8),
        ((1, 1, 1, 1), (1, 1, 1, 1), 0.0),
        ((0, 0, 0, 2), (4, 0, 4, 2), -1.0),  # two lines: nothing of the hull is covered
    ],
)
def test_giou_by_hand(a, b, expected):
    first, second = (torch.tensor(box, dtype=torch.float64, requires_grad=True) for box in (a, b))
    value = box_giou(first, second)
    assert value.item() == pytest.approx(expected, abs=1e-12)
    assert box_giou(second, first).item() == pytest.approx(expected, abs=1e-12)
    value.backward()
    assert first.grad.isfinite().all()


def test_giou_broadcasts():
    boxes = torch.tensor([[0.0, 0, 1, 1], [1, 1, 2, 2], [0, 0, 2, 2]])
    table = box_giou(boxes[:, None], boxes)
    torch.testing.assert_close(table, torch.tensor([[1, -0.5, 0.25], [-0.5, 1, 0.25], [0.25, 0.25, 1]]))


def test_sine_position_by_hand():
    found = sine_position(torch.tensor([0.25, 1.0], dtype=torch.float64), 4, temperature=100.0)
    angles = [2 * math.pi * v / t for v in (0.25, 1.0) for t in (1.0, 10.0)]
    sines, cosines = map(math.sin, angles), map(math.cos, angles)
    (s0, s1, s2, s3), (c0, c1, c2, c3) = sines, cosines
    assert found.tolist() == pytest.approx([s0, s1, c0, c1, s2, s3, c2, c3])
