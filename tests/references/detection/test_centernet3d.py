"""CenterNet3D against equations solved by bisection, integrals of slopes, cells counted by hand and its own targets."""

import math

import pytest
import torch
from scipy.integrate import quad
from scipy.optimize import brentq

from lossary.detection import (
    CenterBoxes,
    CenterTargets,
    center_box_loss,
    center_heatmap_loss,
    decode_center_peaks,
    gaussian_heatmap_targets,
    keypoint_sensitive_warp,
)


def targets_of(rows, *, height=24, width=30, **more):
    boxes = torch.tensor([rows], dtype=torch.float64)
    return gaussian_heatmap_targets(
        boxes, torch.ones(boxes.shape[:2], dtype=torch.bool), height=height, width=width, **more
    )


def maps_of(targets):
    """What a perfect network regresses: the numbers of each object in its cell, those of the first one elsewhere."""
    shape = targets.centers.shape[2:]
    maps = targets.regression[:, :1].mT.expand(-1, -1, shape.numel()).clone()
    for b, t in targets.mask.nonzero().tolist():
        maps[b, :, targets.cells[b, t]] = targets.regression[b, t]
    return maps.unflatten(2, shape)


@pytest.mark.parametrize(
    ("w", "h", "overlap"), [(9.0, 4.5, 0.1), (20.0, 17.0, 0.01), (6.0, 30.0, 0.7), (14.0, 14.0, 0.3)]
)
def test_radius_keeps_the_overlap(w, h, overlap):
    """CornerNet: the least of the moves of both corners that just keep the IoU, the same way, inwards and outwards."""

    def common(shared, union):
        return shared / union - overlap

    ways = (
        lambda r: common((w - r) * (h - r), 2 * w * h - (w - r) * (h - r)),
        lambda r: common((w - 2 * r) * (h - 2 * r), w * h),
        lambda r: common(w * h, (w + 2 * r) * (h + 2 * r)),
    )
    ends = min(w, h), min(w, h) / 2, 1000.0
    expected = math.floor(min(brentq(way, 0.0, end) for way, end in zip(ways, ends)))
    heat = targets_of([[40.5, 40.5, w, h, 0.3]], height=80, width=80, min_overlap=overlap).centers[0, 0]
    row = heat[40]
    assert (row > 0).nonzero().flatten().tolist() == list(range(40 - expected, 41 + expected))
    sigma = (2 * expected + 1) / 6
    assert row[41].item() == pytest.approx(math.exp(-1 / (2 * sigma**2)) if expected else 0.0)
    assert heat[40 + expected, 40 - expected].item() == pytest.approx(math.exp(-((expected / sigma) ** 2)))
    assert (heat > 0).sum() == (2 * expected + 1) ** 2


def test_corners_of_a_turned_box():
    """The sides of a 3-4-5 triangle: the corners of 10 by 5 at that angle are whole numbers about its centre."""
    targets = targets_of([[12.25, 11.75, 10.0, 5.0, math.atan2(3, 4)]])
    along, across = (4.0, 3.0), (-1.5, 2.0)
    expected = {
        (math.floor(12.25 + i * along[0] + j * across[0]), math.floor(11.75 + i * along[1] + j * across[1]))
        for i in (-1, 1)
        for j in (-1, 1)
    }
    assert expected == {(9, 6), (17, 12), (14, 16), (6, 10)}
    assert {(x, y) for y, x in (targets.corners[0, 0] == 1).nonzero().tolist()} == expected
    assert (targets.centers[0, 0] == 1).nonzero().tolist() == [[11, 12]]
    assert targets.cells.item() == 11 * 30 + 12
    assert targets.regression[0, 0].tolist() == pytest.approx([0.25, 0.75, 10.0, 5.0, 0.6, 0.8])


def test_where_gaussians_meet_the_larger_counts():
    one, two = [10.5, 10.5, 9.0, 9.0, 0.0], [13.5, 11.5, 9.0, 9.0, 0.0]
    both = targets_of([one, two])
    assert torch.equal(both.centers, torch.maximum(targets_of([one]).centers, targets_of([two]).centers))
    labels = torch.tensor([[2, 0]])
    apart = targets_of([one, two], labels=labels, classes=3)
    assert torch.equal(apart.centers[:, 2:], targets_of([one]).centers)
    assert torch.equal(apart.corners[:, :1], targets_of([two]).corners)
    assert not apart.centers[:, 1].any()
    assert not apart.corners[:, 1].any()


def test_balanced_l1_is_the_integral_of_its_slope():
    """Libra R-CNN defines it by its slope: a log(b |d| + 1) below 1 and 1.5 beyond, a = 0.5, b = e^3 - 1."""
    targets = targets_of([[3.5, 2.5, 4.0, 3.0, 0.4, 1.0, 2.0]], height=5, width=7)
    perfect = maps_of(targets)

    def expected(d):
        slope = quad(lambda t: 0.5 * math.log((math.exp(3) - 1) * t + 1), 0.0, min(d, 1.0))[0]
        return slope + 1.5 * max(d - 1.0, 0.0)

    for channel, share in enumerate([1 / 2, 1 / 2, 2 / 3, 2 / 3, 0.5 / 2, 0.5 / 2, 1.0, 2 / 3]):
        for d in (0.3, -0.9, 2.5):
            wrong = perfect.clone()
            wrong[0, channel, 2, 3] += d
            assert center_box_loss(wrong, targets).item() == pytest.approx(share * expected(abs(d)), rel=1e-6)
    elsewhere = perfect.clone()
    elsewhere[:, :, 0, 0] = 9.0
    assert center_box_loss(elsewhere, targets).item() == 0.0
    flat = targets_of([[3.5, 2.5, 4.0, 3.0, 0.4], [1.5, 1.5, 4.0, 3.0, 0.4]], height=5, width=7)
    shifted = maps_of(flat)
    shifted[0, 4, 1, 1] += 2.0  # one of two objects
    assert center_box_loss(shifted, flat, yaw=3.0).item() == pytest.approx(3.0 * expected(2.0) / 2 / 2, rel=1e-6)


def test_heatmap_losses_by_hand():
    target = torch.tensor([[[[1.0, 0.5], [0.0, 1.0]]], [[[0.0, 0.2], [0.0, 0.0]]]], dtype=torch.float64)
    p = torch.tensor([0.8, 0.3, 0.1, 0.6], dtype=torch.float64).expand(2, 4).reshape(2, 1, 2, 2)
    square = center_heatmap_loss(p.logit(), target)
    assert square.tolist() == pytest.approx([(0.04 + 0.04 + 0.01 + 0.16) / 2.5, 0.64 + 0.01 + 0.01 + 0.36])
    focal = center_heatmap_loss(p.logit(), target, kind="focal")
    first = 0.04 * math.log(0.8) + 0.5**4 * 0.09 * math.log(0.7) + 0.01 * math.log(0.9) + 0.16 * math.log(0.6)
    second = sum(w * q * q * math.log(1 - q) for w, q in ((1, 0.8), (0.8**4, 0.3), (1, 0.1), (1, 0.6)))
    assert focal.tolist() == pytest.approx([-first / 2, -second])
    far = torch.full((1, 1, 1, 1), -300.0, requires_grad=True)
    center_heatmap_loss(far, torch.ones(1, 1, 1, 1), kind="focal").sum().backward()
    assert far.grad.item() == pytest.approx(-1.0)  # of -log p, where a probability of 0 would give infinity


def test_perfect_maps_give_the_boxes_back():
    rows = [[5.3, 6.2, 8.0, 3.0, -2.9], [20.7, 15.1, 7.0, 4.0, 1.2], [21.9, 5.0, 9.0, 3.5, 3.1]]
    solid = [[*row, 0.5 * k, 1.5] for k, row in enumerate(rows)]
    targets = targets_of(solid, labels=torch.tensor([[1, 0, 1]]), classes=2)
    scores = targets.centers * torch.tensor([0.9, 0.5]).view(1, 2, 1, 1)
    assert isinstance(targets, CenterTargets)
    found = decode_center_peaks(scores, maps_of(targets), threshold=0.4)[0]
    assert isinstance(found, CenterBoxes)
    assert found.labels.tolist() == [0, 1, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.5, 0.5])
    expected = torch.tensor([solid[1], solid[2], solid[0]], dtype=torch.float64)  # of equal ones the upper cell first
    torch.testing.assert_close(found.boxes, expected)
    assert len(decode_center_peaks(scores, maps_of(targets), threshold=0.5)[0].scores) == 1  # above it only
    assert len(decode_center_peaks(scores, maps_of(targets), limit=2)[0].scores) == 2


def test_a_peak_is_not_exceeded_by_eight_neighbours():
    scores = torch.rand(2, 2, 9, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    maps = torch.ones(2, 6, 9, 11, dtype=torch.float64)
    for image, found in zip(scores, decode_center_peaks(scores, maps, limit=99, threshold=0.6)):
        expected = [
            (image[c, y, x].item(), c, 1.0 + x, 1.0 + y)
            for c in range(2)
            for y in range(9)
            for x in range(11)
            if image[c, y, x] > 0.6 and image[c, y, x] == image[c, max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max()
        ]
        got = zip(found.scores.tolist(), found.labels.tolist(), *found.boxes[:, :2].T.tolist())
        assert list(got) == sorted(expected, reverse=True)


def test_warped_scores_look_the_corners_up():
    """A slow loop with complex numbers: corners are the centre plus half the diagonals, turned."""
    rng = torch.Generator().manual_seed(1)
    maps = torch.rand(2, 6, 6, 8, generator=rng, dtype=torch.float64)
    maps[:, 2:4] = 1 + 5 * maps[:, 2:4]
    maps[:, 4:] = 2 * maps[:, 4:] - 1
    centers, corners = torch.rand(2, 2, 3, 6, 8, generator=rng, dtype=torch.float64)
    got = keypoint_sensitive_warp(centers, corners, maps)
    for b in range(2):
        for y in range(6):
            for x in range(8):
                dx, dy, w, h, sine, cosine = maps[b, :, y, x].tolist()
                turn = complex(cosine, sine) / abs(complex(cosine, sine))
                seen = torch.zeros(3, dtype=torch.float64)
                for half in (complex(w, h), complex(w, -h), complex(-w, h), complex(-w, -h)):
                    at = complex(x + dx, y + dy) + turn * half / 2
                    u, v = (min(max(math.floor(z), 0), n - 1) for z, n in ((at.real, 8), (at.imag, 6)))
                    seen += corners[b, :, v, u] / 4
                torch.testing.assert_close(got[b, :, y, x], centers[b, :, y, x] + seen)
    alike = targets_of([[12.25, 11.75, 10.0, 5.0, 0.64]])
    best = keypoint_sensitive_warp(alike.centers, alike.corners, maps_of(alike))
    assert best.max().item() == best[0, 0, 11, 12].item() == 2.0  # a true box under true heatmaps


def test_degenerate_input():
    good, nan = [6.5, 6.5, 6.0, 3.0, 0.0], math.nan
    bad = [[6.5, 9.5, 0.0, 3.0, 0.0], [-0.1, 5.0, 6.0, 3.0, 0.0], [30.0, 5.0, 6.0, 3.0, 0.0], [nan, 5.0, 6.0, 3.0, 0.0]]
    targets, alone = targets_of([*bad, good]), targets_of([good])
    assert targets.mask.tolist() == [[False] * 4 + [True]]
    assert torch.equal(targets.centers, alone.centers)
    assert torch.equal(targets.corners, alone.corners)
    assert not targets.regression[:, :4].any()
    assert not targets.cells[:, :4].any()
    maps = maps_of(alone).requires_grad_()
    assert center_box_loss(maps, targets).item() == 0.0
    none = gaussian_heatmap_targets(torch.zeros(1, 0, 5), torch.zeros(1, 0, dtype=torch.bool), height=4, width=5)
    empty = center_box_loss(torch.full((1, 6, 4, 5), nan), none)
    assert empty.tolist() == [0.0]
    assert none.centers.shape == (1, 1, 4, 5)
    assert not none.centers.any()
    edge = targets_of([[0.5, 0.5, 6.0, 6.0, 0.0]])  # three corners lie outside of the map
    assert (edge.corners == 1).nonzero()[:, 2:].tolist() == [[3, 3]]

    scores = alone.centers.clone()
    assert decode_center_peaks(torch.zeros(1, 1, 24, 30), torch.ones(1, 6, 24, 30))[0].boxes.shape == (0, 5)
    scores[0, 0, 6, 7] = nan
    assert not len(decode_center_peaks(scores, maps)[0].scores)
    for channel, value in ((2, 0.0), (5, nan), (0, math.inf)):
        broken = maps.detach().clone()
        broken[0, channel, 6, 6] = value
        assert not len(decode_center_peaks(alone.centers, broken, threshold=0.9)[0].scores)
        warped = keypoint_sensitive_warp(alone.centers, alone.corners, broken)
        assert warped[0, 0, 6, 6].isnan().item() == (channel != 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    exact = targets_of([[12.25, 11.75, 10.0, 5.0, 0.64]])
    maps, heat, edge = (t.to(dtype) for t in (maps_of(exact), exact.centers, exact.corners))
    found = decode_center_peaks(keypoint_sensitive_warp(heat, edge, maps), maps)[0]
    assert found.boxes[0].tolist() == pytest.approx([12.25, 11.75, 10.0, 5.0, 0.64], abs=0.01)
    assert found.scores.dtype == dtype
    assert found.scores[0].item() == 2.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: targets_of([[1.0] * 6]), "boxes: expected 5 or 7 columns"),
        (lambda: targets_of([[1.0] * 5], min_overlap=0.0), "min_overlap: expected a number > 0"),
        (lambda: targets_of([[1.0] * 5], height=0), "height: expected a whole number"),
        (lambda: targets_of([[1.0] * 5], labels=torch.zeros(1, 2, dtype=torch.int64)), "labels: expected shape"),
        (lambda: center_heatmap_loss(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 3)), "target: expected shape"),
        (lambda: center_heatmap_loss(*torch.zeros(2, 1, 1, 2, 2), kind="l1"), "kind: expected one of"),
        (lambda: center_box_loss(torch.zeros(1, 8, 24, 30), targets_of([[1.0] * 5])), "input: expected shape"),
        (lambda: center_box_loss(torch.zeros(1, 7, 24, 30), targets_of([[1.0] * 5])), "input: expected 6 or 8"),
        (lambda: decode_center_peaks(torch.zeros(1, 1, 2, 2), torch.zeros(1, 6, 2, 3)), "scores: expected shape"),
        (lambda: decode_center_peaks(torch.zeros(1, 1, 2, 2), torch.zeros(1, 6, 2, 2), limit=0), "limit: expected"),
        (
            lambda: keypoint_sensitive_warp(*torch.zeros(2, 1, 1, 2, 2), torch.zeros(1, 6, 2, 3)),
            "centers: expected shape",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
