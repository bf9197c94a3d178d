"""Consistent dual assignment against its definition on Python's numbers, one point and one box after another."""

import math

import pytest
import torch

from lossary.detection import DualAssignmentLoss, consistent_dual_assign, task_aligned_assign, task_aligned_metric


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return math.prod(sides) / (sum(areas) - math.prod(sides))


def scene(seed, points=40, true=5):
    """Predictions close to some true box, so that points are claimed by several."""
    g = torch.Generator().manual_seed(seed)
    corner = 14 * torch.rand(true, 2, generator=g, dtype=torch.float64)
    truth = torch.cat([corner, corner + 5 + 8 * torch.rand(true, 2, generator=g, dtype=torch.float64)], 1)
    spots = 26 * torch.rand(points, 2, generator=g, dtype=torch.float64)
    source = torch.randint(true, (points,), generator=g)
    boxes = truth[source] + 0.7 * torch.randn(points, 4, generator=g, dtype=torch.float64)
    scores = torch.rand(points, 3, generator=g, dtype=torch.float64)
    return scores, boxes, spots, truth, torch.randint(3, (true,), generator=g)


def slowly(scores, boxes, points, truth, labels, k, alpha, beta):
    """Match and weight by the text of sec. 3.1 and of task-aligned assignment."""
    measure, overlap = {}, {}
    for a, (x, y) in enumerate(points.tolist()):
        for t, (x1, y1, x2, y2) in enumerate(truth.tolist()):
            if x1 < x < x2 and y1 < y < y2:
                overlap[a, t] = iou(boxes[a].tolist(), truth[t].tolist())
                measure[a, t] = scores[a, labels[t]].item() ** alpha * overlap[a, t] ** beta
    suitors = {}
    for t in range(len(truth)):
        ranked = sorted((a for a, own in measure if own == t), key=lambda a: -measure[a, t])
        for a in ranked[:k]:
            suitors.setdefault(a, []).append(t)
    match = {a: max(those, key=lambda t: overlap[a, t]) for a, those in suitors.items()}
    weight = {}
    for a, t in match.items():
        mates = [b for b in match if match[b] == t]
        top = max(measure[b, t] for b in mates) or 1.0
        weight[a] = measure[a, t] / top * max(overlap[b, t] for b in mates)
    count = range(len(points))
    return [match.get(a, -1) for a in count], [weight.get(a, 0.0) for a in count]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("k", "alpha", "beta"), [(10, 0.5, 6.0), (1, 0.5, 6.0), (3, 1.0, 2.0)])
def test_assignment_is_its_definition(seed, k, alpha, beta):
    inputs = scene(seed)
    match, weight = task_aligned_assign(*inputs, k=k, alpha=alpha, beta=beta)
    expected, weights = slowly(*inputs, k, alpha, beta)
    assert match.tolist() == expected
    assert weight.tolist() == pytest.approx(weights, rel=1e-9)
    assert max(expected) > 0


def test_defaults_are_the_official_ones():
    """tal_topk 10 and 1, alpha 0.5, beta 6.0 in ultralytics/utils/loss.py of THU-MIG/yolov10; gains 0.5 and 7.5."""
    inputs = scene(0)
    assert task_aligned_assign(*inputs)[0].tolist() == slowly(*inputs, 10, 0.5, 6.0)[0]
    many, one = consistent_dual_assign(inputs[:2], inputs[:2], *inputs[2:])
    assert many[0].tolist() == slowly(*inputs, 10, 0.5, 6.0)[0]
    assert one[0].tolist() == slowly(*inputs, 1, 0.5, 6.0)[0]
    assert "class_gain=0.5, box_gain=7.5" in repr(DualAssignmentLoss())


@pytest.mark.parametrize("seed", range(6))
def test_each_head_is_assigned_by_what_it_predicts(seed):
    first, second = scene(seed), scene(seed + 6)
    places = first[2:]
    many, one = consistent_dual_assign(first[:2], second[:2], *places, k=4, alpha=2.0, beta=2.0, ratio=0.1)
    assert many[0].tolist() == slowly(*first[:2], *places, 4, 2.0, 2.0)[0]
    expected, weights = slowly(*second[:2], *places, 1, 0.2, 0.2)
    assert one[0].tolist() == expected
    assert one[1].tolist() == pytest.approx(weights)


def test_metric_by_hand():
    box = torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=torch.float64)
    points = torch.tensor([[1.0, 1.0], [4.0, 1.0], [3.0, 1.0]], dtype=torch.float64)  # the second on the side
    boxes = torch.tensor([[0.0, 0, 4, 2], [0, 0, 4, 4], [2, 0, 6, 4]], dtype=torch.float64)
    scores = torch.tensor([[0.1, 0.5], [0.1, 0.9], [0.1, 0.8]], dtype=torch.float64)
    found = task_aligned_metric(scores, boxes, points, box, torch.tensor([1]), alpha=2.0, beta=3.0)
    assert found[:, 0].tolist() == pytest.approx([0.25 / 8, 0.0, 0.64 / 27])


def test_one_to_one_gap_is_least_at_the_best_of_the_many():
    """The gap t_one - [i in many] t_many_i + sum of t_many over the others, for one box and every choice i."""
    scores, boxes, points, truth, labels = scene(3, true=1)
    (_, weight), (match, own) = consistent_dual_assign((scores, boxes), (scores, boxes), points, truth, labels)
    gap = own.max() - 2 * weight + weight.sum()
    assert match.argmax() == gap.argmin()
    assert match.argmax() == weight.argmax()


def test_loss_by_hand():
    """Two points, one box, found by the first point with an IoU of 1/2: its GIoU is 1/2, the target 1/2."""
    points = torch.tensor([[2.0, 1.0], [9.0, 9.0]], dtype=torch.float64)
    truth = torch.tensor([[[0.0, 0.0, 4.0, 4.0]]], dtype=torch.float64)
    boxes = torch.tensor([[[0.0, 0.0, 4.0, 2.0], [8.0, 8.0, 9.0, 9.0]]], dtype=torch.float64)
    logits = torch.tensor([[[math.log(3.0)], [0.0]]], dtype=torch.float64)
    labels = torch.tensor([[0]])
    # Scores 3/4 and 1/2; the sum of the targets, 1/2, counts as 1.
    entropy = -0.5 * math.log(0.75) - 0.5 * math.log(0.25) + math.log(2.0)
    one = 3.0 * entropy + 5.0 * 0.5 * 0.5
    loss = DualAssignmentLoss(class_gain=3.0, box_gain=5.0)
    assert loss((logits, boxes), (logits, boxes), points, truth, labels).item() == pytest.approx(2 * one)
    # Four such images: the sum of the targets is 2, and so is the divisor.
    four = [value.repeat(4, 1, 1) for value in (logits, boxes, truth)]
    found = loss(tuple(four[:2]), tuple(four[:2]), points, four[2], labels.repeat(4, 1))
    assert found.item() == pytest.approx(2 * 4 * one / 2)


def test_targets_carry_no_gradient():
    scores, boxes, points, truth, labels = scene(4)
    logits = torch.logit(scores).requires_grad_()
    sides = boxes.requires_grad_()
    loss = DualAssignmentLoss()((logits, sides), (logits.detach(), sides.detach()), points, truth, labels)
    loss.backward()
    match, weight = task_aligned_assign(scores, boxes.detach(), points, truth, labels)
    target = torch.nn.functional.one_hot(labels, 3)[match.clamp(min=0)] * weight.unsqueeze(1)
    expected = 0.5 * (scores - target) / weight.sum().clamp(min=1)
    torch.testing.assert_close(logits.grad, expected)
    assert sides.grad[match < 0].abs().max() == 0
    assert (sides.grad[match >= 0].abs().amax(1) > 0).any()


def test_no_boxes_and_boxes_that_are_none():
    scores, boxes, points, truth, labels = scene(0)
    loss = DualAssignmentLoss()
    nothing = loss((scores, boxes), (scores, boxes), points, truth[:0], labels[:0])
    entropy = torch.nn.functional.softplus(scores).sum().item()
    assert nothing.item() == pytest.approx(2 * 0.5 * entropy)
    odd = torch.tensor([[5.0, 5, 5, 9], [9, 9, 4, 4], [0, 0, math.nan, 9]], dtype=torch.float64)
    match, weight = task_aligned_assign(scores, boxes, points, odd, labels[:3])
    assert set(match.tolist()) == {-1}
    assert not weight.any()


def test_refusals():
    scores, boxes, points, truth, labels = scene(0)
    for name, value in (("k", 0), ("alpha", -1.0), ("beta", math.inf)):
        with pytest.raises(ValueError, match=name):
            task_aligned_assign(scores, boxes, points, truth, labels, **{name: value})
    with pytest.raises(ValueError, match="ratio"):
        consistent_dual_assign((scores, boxes), (scores, boxes), points, truth, labels, ratio=0.0)
    with pytest.raises(ValueError, match="box_gain"):
        DualAssignmentLoss(box_gain=-1.0)
    with pytest.raises(ValueError, match="scores"):
        task_aligned_metric(scores[:-1], boxes, points, truth, labels)
