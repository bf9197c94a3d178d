"""The engine of the assigners against slow derivations on Python's numbers, and by hand."""

import itertools
import math
import statistics

import pytest
import torch

from lossary.detection import _assign
from lossary.detection._assign import BACKGROUND, IGNORED

NAN = float("nan")


def test_inside_is_strict_and_a_box_without_area_holds_nothing():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 1, 3], [3, 3, 1, 1], [0, 0, NAN, 4]])
    points = torch.tensor([[1.0, 2], [4, 2], [2, 2], [0, 0]])
    assert _assign.inside(points, boxes).tolist() == [
        [True, False, False, False],
        [False] * 4,
        [True, False, False, False],
        [False] * 4,
    ]


def test_best_takes_the_lower_index_of_equals_and_nothing_that_is_not_allowed_or_not_a_number():
    quality = torch.tensor([[0.5, 0.9], [0.5, NAN], [0.5, 0.1], [0.9, -torch.inf]])
    allowed = torch.tensor([[True, True], [True, True], [True, True], [False, True]])
    assert _assign.best(quality, 2, allowed).T.tolist() == [[True, True, False, False], [True, False, True, False]]
    assert _assign.best(quality, 9, allowed).T.tolist() == [[True, True, True, False], [True, False, True, True]]
    assert not _assign.best(quality, 0, allowed).any()


def test_settle_asks_only_those_that_chose():
    chosen = torch.tensor([[True, True, False], [False, False, False], [False, True, True], [True, False, False]])
    rank = torch.tensor([[0.2, 0.6, 0.9], [0.9, 0.9, 0.9], [0.1, 0.5, 0.5], [NAN, 0.9, 0.9]])
    assert _assign.settle(chosen, rank).tolist() == [1, BACKGROUND, 1, 0]
    assert _assign.settle(chosen[:, :0], rank[:, :0]).tolist() == [BACKGROUND] * 4


def test_taken():
    match = torch.tensor([[1, BACKGROUND, 0], [IGNORED, 1, 1]])
    values = torch.arange(1.0, 9.0).view(2, 2, 2)
    assert _assign.taken(values, match).tolist() == [[[3, 4], [0, 0], [1, 2]], [[0, 0], [7, 8], [7, 8]]]
    assert _assign.taken(torch.tensor([[5, 6], [7, 8]]), match).tolist() == [[6, 0, 5], [0, 8, 8]]
    assert _assign.taken(torch.empty(2, 0, 4), match).tolist() == torch.zeros(2, 3, 4).tolist()


def test_alignment_by_hand():
    scores = torch.tensor([[0.25, 0.64], [1.0, 0.0]])
    overlap = torch.tensor([[0.5, 0.8, 0.1], [0.9, 1.0, 0.3]])
    found = _assign.alignment(scores, overlap, torch.tensor([1, 0, 1]), alpha=0.5, beta=2.0)
    expected = torch.tensor([[0.8 * 0.25, 0.5 * 0.64, 0.8 * 0.01], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_aligned_weight_gives_the_best_anchor_of_a_box_its_highest_overlap():
    quality = torch.tensor([[0.2, 0.9], [0.4, 0.0], [0.1, 0.3], [0.8, 0.8]])
    overlap = torch.tensor([[0.9, 0.1], [0.6, 0.2], [0.3, 0.5], [1.0, 1.0]])
    weight = _assign.aligned_weight(quality, overlap, torch.tensor([0, 0, 1, BACKGROUND]))
    torch.testing.assert_close(weight, torch.tensor([0.9 * 0.2 / 0.4, 0.9, 0.5, 0.0]))
    nothing = _assign.aligned_weight(torch.zeros(2, 1), torch.zeros(2, 1), torch.tensor([0, BACKGROUND]))
    assert nothing.tolist() == [0.0, 0.0]
    assert _assign.aligned_weight(quality[:, :0], overlap[:, :0], torch.full((4,), BACKGROUND)).tolist() == [0.0] * 4


def test_by_overlap_by_hand():
    overlap = torch.tensor([[0.8, 0.75], [0.4, 0.0], [0.2, 0.0], [0.0, 0.2], [NAN, 0.1]])
    thresholds = {"positive": 0.7, "negative": 0.3}
    assert _assign.by_overlap(overlap, **thresholds).tolist() == [0, IGNORED, -1, -1, -1]
    assert _assign.by_overlap(overlap, **thresholds, k=2).tolist() == [0, 0, -1, 1, -1]
    assert _assign.by_overlap(overlap, torch.tensor([False, True]), **thresholds, k=1).tolist() == [1, -1, -1, -1, -1]


def test_by_overlap_at_the_thresholds():
    overlap = torch.tensor([[0.5], [0.25], [0.125]])
    assert _assign.by_overlap(overlap, positive=0.5, negative=0.25).tolist() == [0, IGNORED, BACKGROUND]


@pytest.mark.parametrize("seed", range(6))
def test_atss_is_its_definition(seed):
    """One true box after another, the candidates sorted in Python, mean and deviation from `statistics`."""
    g = torch.Generator().manual_seed(seed)
    levels, k = (16, 4), 3
    step = torch.tensor([4.0] * 16 + [8.0] * 4, dtype=torch.float64)
    grid = [torch.cartesian_prod(*[torch.arange(0, 16, s, dtype=torch.float64) + s / 2] * 2) for s in (4, 8)]
    centre = torch.cat(grid)
    anchors = torch.cat([centre - step[:, None], centre + step[:, None]], 1)
    corner = 8 * torch.rand(4, 2, generator=g, dtype=torch.float64)
    truth = torch.cat([corner, corner + 3 + 5 * torch.rand(4, 2, generator=g, dtype=torch.float64)], 1)
    overlap = torch.tensor([[iou(a, t) for t in truth.tolist()] for a in anchors.tolist()], dtype=torch.float64)

    claims = {}
    for t, (x1, y1, x2, y2) in enumerate(truth.tolist()):
        candidates, start = [], 0
        for size in levels:
            far = {a: math.dist(centre[a].tolist(), ((x1 + x2) / 2, (y1 + y2) / 2)) for a in range(start, start + size)}
            candidates += sorted(far, key=far.__getitem__)[:k]
            start += size
        values = [overlap[a, t].item() for a in candidates]
        bound = statistics.mean(values) + statistics.stdev(values)
        for a, value in zip(candidates, values):
            x, y = centre[a].tolist()
            if value >= bound and x1 < x < x2 and y1 < y < y2:
                claims.setdefault(a, []).append((value, t))
    expected = [max(claims[a])[1] if a in claims else BACKGROUND for a in range(20)]
    assert set(expected) > {BACKGROUND}
    assert _assign.atss(anchors, truth, overlap, levels=levels, k=k).tolist() == expected


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    return math.prod(sides) / (sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - math.prod(sides))


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (1, 2)])
def test_hungarian_is_the_cheapest_of_all_matchings(shape):
    anchors, truths = shape
    cost = torch.randn(6, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    match = _assign.hungarian(cost)
    for matrix, found in zip(cost, match.tolist()):
        few, many = sorted(shape)
        wide = matrix if anchors <= truths else matrix.T
        cheapest = min(sum(wide[i, p[i]].item() for i in range(few)) for p in itertools.permutations(range(many), few))
        pairs = [(a, t) for a, t in enumerate(found) if t >= 0]
        assert [len(pairs), len({t for _, t in pairs})] == [few, few]
        assert sum(matrix[a, t].item() for a, t in pairs) == pytest.approx(cheapest, abs=1e-12)


def test_hungarian_leaves_out_padding_and_what_is_not_finite():
    cost = torch.tensor([[NAN, 5.0, -9.0], [torch.inf, 100.0, -9.0], [1.0, -100.0, -9.0]])
    mask = torch.tensor([True, True, False])
    assert _assign.hungarian(cost, mask).tolist() == [1, BACKGROUND, 0]
    assert _assign.hungarian(torch.full((2, 2), NAN)).tolist() == [BACKGROUND] * 2
    assert _assign.hungarian(cost[:, :0]).tolist() == [BACKGROUND] * 3
    assert _assign.hungarian(cost[:0]).tolist() == []


def test_a_batch_with_padding_is_each_image_alone():
    g = torch.Generator().manual_seed(3)
    overlap = torch.rand(4, 12, 5, generator=g)
    counts = (5, 3, 1, 0)
    mask = torch.tensor([[t < n for t in range(5)] for n in counts])
    corner = 10 * torch.rand(4, 17, 2, generator=g)
    boxes = torch.cat([corner, corner + 6], -1)
    anchors, truth = boxes[:, :12], boxes[:, 12:]

    def by_overlap(a, t, o, m):
        return _assign.by_overlap(o, m, positive=0.8, negative=0.4, k=1)

    def atss(a, t, o, m):
        return _assign.atss(a, t, o, m, levels=(8, 4), k=3)

    def hungarian(a, t, o, m):
        return _assign.hungarian(-o, m)

    for assign in (by_overlap, atss, hungarian):
        whole = assign(anchors, truth, overlap, mask)
        assert {BACKGROUND, 0} <= set(whole.flatten().tolist())
        for i, n in enumerate(counts):
            alone = assign(anchors[i], truth[i, :n], overlap[i, :, :n], None)
            assert torch.equal(whole[i], alone)
