"""Co-DETR: every term of its loss re-derived on Python's numbers, for a model whose answers are known."""

import itertools
import math
import statistics

import pytest
import torch
from torch import nn

from lossary.detection import HybridAssignmentTrainer, atss_assign, positive_queries_from_aux
from lossary.detection._heads import sine_position

SIZE = (40.0, 20.0)


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return math.prod(sides) / (sum(areas) - math.prod(sides))


def giou(a, b):
    hull = math.prod(max(a[i + 2], b[i + 2]) - min(a[i], b[i]) for i in (0, 1))
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    union = sum(areas) / (1 + iou(a, b))
    return iou(a, b) - (hull - union) / hull


def focal(logit, target):
    p = 1 / (1 + math.exp(-logit))
    return -0.25 * (1 - p) ** 2 * math.log(p) if target else -0.75 * p**2 * math.log(1 - p)


def l1(a, b):
    def shares(box):
        x1, y1, x2, y2 = (v / s for v, s in zip(box, SIZE * 2))
        return ((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1)

    return sum(abs(u - v) for u, v in zip(shares(a), shares(b)))


def loss(logits, boxes, truth, labels, match):
    """2 focal + 5 L1 + 2 (1 - GIoU) of one image, not yet divided."""
    total = 0.0
    for query, own in enumerate(match):
        for c, logit in enumerate(logits[query]):
            total += 2 * focal(logit, own >= 0 and c == labels[own])
        if own >= 0:
            total += 5 * l1(boxes[query], truth[own]) + 2 * (1 - giou(boxes[query], truth[own]))
    return total


def matched(logits, boxes, truth, labels):
    """The cheapest of all ways to give each true box a query of its own."""

    def cost(query, t):
        logit = logits[query][labels[t]]
        price = 2 * (focal(logit, True) - focal(logit, False))
        return price + 5 * l1(boxes[query], truth[t]) - 2 * giou(boxes[query], truth[t])

    ways = itertools.permutations(range(len(boxes)), len(truth))
    best = min(ways, key=lambda way: sum(cost(query, t) for t, query in enumerate(way)))
    return [best.index(query) if query in best else -1 for query in range(len(boxes))]


class Known(nn.Module):
    """Two layers whose logits are the first of the content, plus the layer, and whose boxes stay where they are."""

    def __init__(self):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.content = nn.Parameter(torch.randn(4, 8, generator=g, dtype=torch.float64))
        self.reference = nn.Parameter(torch.randn(4, 4, generator=g, dtype=torch.float64) - 0.5)

    def encode(self, x):
        return 2 * x

    def decode(self, memory, content, reference):
        centre, half = reference.sigmoid().split(2, -1)
        scale = torch.tensor(SIZE * 2, dtype=torch.float64)
        boxes = torch.cat([centre - half / 2, centre + half / 2], -1) * scale
        return [(content[..., :3] + layer + memory.mean(), boxes) for layer in (0.0, 0.5)]


@pytest.fixture
def scene():
    x = torch.randn(2, 32, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x1, y1 = torch.meshgrid(torch.arange(8) * 5.0, torch.arange(4) * 5.0, indexing="xy")
    corner = torch.stack([x1.flatten(), y1.flatten()], 1).double()
    anchors = torch.cat([corner - 2, corner + 7], 1)
    truth = torch.tensor(
        [[[2, 2, 13, 12], [20, 4, 38, 18]], [[5, 6, 14, 17], [0, 0, 0, 0]]],
        dtype=torch.float64,
    )
    return x, anchors, truth, torch.tensor([[2, 0], [1, 0]]), torch.tensor([[True, True], [True, False]])


def trainer(anchors, **options):
    g = torch.Generator().manual_seed(5)
    return HybridAssignmentTrainer(Known(), anchors, SIZE, 3, generator=g, **options).double()


def numbers(logits, boxes, truth, labels, mask, image):
    count = int(mask[image].sum())
    return logits[image].tolist(), boxes[image].tolist(), truth[image, :count].tolist(), labels[image, :count].tolist()


def test_without_auxiliary_heads_it_is_the_loss_of_a_detr(scene):
    x, anchors, truth, labels, mask = scene
    plain = trainer(anchors, assigners=())
    model, expected = plain.model, 0.0
    for logits, boxes in model.decode(2 * x, model.content.expand(2, -1, -1), model.reference.expand(2, -1, -1)):
        for image in range(2):
            values = numbers(logits, boxes, truth, labels, mask, image)
            expected += loss(*values, matched(*values)) / 3
    assert plain(x, truth, labels, mask).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("lambda1", "lambda2"), [(1.0, 0.0), (0.0, 2.0), (0.5, 3.0)])
def test_what_the_auxiliary_head_adds(scene, lambda1, lambda2):
    x, anchors, truth, labels, mask = scene
    plain, hybrid = trainer(anchors, assigners=()), trainer(anchors, lambda1=lambda1, lambda2=lambda2)
    added = (hybrid(x, truth, labels, mask) - plain(x, truth, labels, mask)).item()

    match = atss_assign(anchors, truth, mask)
    positives = int((match >= 0).sum())
    assert positives > 4
    raw, dense = hybrid.heads[0](2 * x), 0.0
    for image in range(2):
        for a, own in enumerate(match[image].tolist()):
            for c in range(3):
                dense += focal(raw[image, a, c].item(), own >= 0 and c == labels[image, own])
            if own >= 0:
                x1, y1, x2, y2 = anchors[a].tolist()
                left, top, right, bottom = (4.5 * math.exp(v) for v in raw[image, a, 3:].tolist())
                box = [(x1 + x2) / 2 - left, (y1 + y2) / 2 - top, (x1 + x2) / 2 + right, (y1 + y2) / 2 + bottom]
                dense += 2 * (1 - giou(box, truth[image, own].tolist()))

    boxes, seen, own = positive_queries_from_aux(2 * x, anchors, match)
    shares = torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], -1)
    shares = shares / torch.tensor(SIZE * 2, dtype=torch.float64)
    query = hybrid.places[0](sine_position(shares, 4)) + hybrid.contents[0](seen)
    decoded = 0.0
    for logits, found in hybrid.model.decode(2 * x, query, torch.logit(shares, eps=1e-5)):
        for image in range(2):
            decoded += loss(*numbers(logits, found, truth, labels, mask, image), own[image].tolist())
    # Two decoder layers: the head's own loss counts once for each.
    assert added == pytest.approx((lambda1 * decoded + 2 * lambda2 * dense) / positives, rel=1e-9)


@pytest.mark.parametrize("levels", [(), (20, 12)])
@pytest.mark.parametrize("k", [9, 3])
def test_atss_is_its_definition(scene, levels, k):
    _, anchors, truth, _, _ = scene
    truth = truth.flatten(0, 1)[:3]
    suitors = {}
    for t, (x1, y1, x2, y2) in enumerate(truth.tolist()):
        candidates, start = [], 0
        for size in levels or (32,):
            level = range(start, start + size)
            centre = {a: ((anchors[a, :2] + anchors[a, 2:]) / 2).tolist() for a in level}
            candidates += sorted(level, key=lambda a: math.dist(centre[a], ((x1 + x2) / 2, (y1 + y2) / 2)))[:k]
            start += size
        values = {a: iou(anchors[a].tolist(), truth[t].tolist()) for a in candidates}
        bound = statistics.mean(values.values()) + statistics.stdev(values.values())
        for a, value in values.items():
            x, y = ((anchors[a, :2] + anchors[a, 2:]) / 2).tolist()
            if value >= bound and x1 < x < x2 and y1 < y < y2:
                suitors.setdefault(a, []).append((value, t))
    expected = [max(suitors[a])[1] if a in suitors else -1 for a in range(32)]
    assert atss_assign(anchors, truth, k=k, levels=levels).tolist() == expected


def test_positive_queries_by_hand():
    features = torch.arange(60.0).view(2, 15, 2).requires_grad_()
    anchors = torch.arange(60.0).view(15, 4)
    match = torch.full((2, 15), -1)
    match[0, [3, 7]] = torch.tensor([1, 0])
    match[1, 2:14] = 0
    match[1, 0] = -2
    boxes, seen, own = positive_queries_from_aux(features, anchors, match)
    assert own.tolist() == [[1, 0] + [-1] * 10, [0] * 12]
    assert torch.equal(boxes[0], anchors[[3, 7, 0, 1, 2, 4, 5, 6, 8, 9, 10, 11]])
    assert torch.equal(seen[1], features[1, 2:14])
    seen.sum().backward()
    assert features.grad[1, :, 0].tolist() == [0.0] * 2 + [1.0] * 12 + [0.0]
    drawn = [
        positive_queries_from_aux(features, anchors, match, limit=9, generator=torch.Generator().manual_seed(s))
        for s in range(2)
    ]
    few = positive_queries_from_aux(features[:1], anchors, match[:1])[2]
    assert few.tolist() == [[1, 0] + [-1] * 7]  # never fewer than nine
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert all(set(own[0, :2].tolist()) == {0, 1} for _, _, own in drawn)


def test_what_is_deployed_is_the_model(scene):
    x, anchors, truth, labels, mask = scene
    hybrid = trainer(anchors)
    hybrid(x, truth, labels, mask).backward()
    assert all(p.grad is not None for p in hybrid.parameters())
    fresh = Known()
    fresh.load_state_dict(hybrid.model.state_dict())
    assert torch.equal(fresh.content, hybrid.model.content)
    assert sum(p.numel() for p in hybrid.parameters()) > sum(p.numel() for p in fresh.parameters())


def test_images_without_boxes(scene):
    x, anchors, truth, labels, mask = scene
    hybrid = trainer(anchors)
    none = hybrid(x, truth[:, :0], labels[:, :0])
    padded = hybrid(x, truth, labels, torch.zeros_like(mask))
    assert none.item() == pytest.approx(padded.item())
    none.backward()
    assert all(p.grad.isfinite().all() for p in hybrid.parameters() if p.grad is not None)


def test_refusals(scene):
    x, anchors, truth, labels, mask = scene
    for name, options in (("lambda1", {"lambda1": -1.0}), ("lambda2", {"lambda2": math.nan})):
        with pytest.raises(ValueError, match=name):
            trainer(anchors, **options)
    with pytest.raises(ValueError, match="anchors"):
        trainer(anchors[:, :2])
    with pytest.raises(ValueError, match="labels"):
        trainer(anchors)(x, truth, labels[:, :1], mask)
    with pytest.raises(ValueError, match="levels"):
        atss_assign(anchors, truth, levels=(30,))
    with pytest.raises(ValueError, match="limit"):
        positive_queries_from_aux(x, anchors, torch.full((2, 32), -1), limit=8)
