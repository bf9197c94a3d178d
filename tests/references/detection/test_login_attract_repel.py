"""LOGIN against loops over cells, nodes and relations, and scenes small enough to see through."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from lossary.detection import (
    AttractRepelLoss,
    DirectionalRelationHead,
    RelationGraphAttention,
    bidirectional_relationship_recall,
    pair_masks,
    relation_adjacency,
)


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = make()
        for p in made.parameters():  # nothing stays at 0, or half of it would be untested
            nn.init.normal_(p, std=0.5)
    return made.double()


@pytest.fixture
def pairs_of_boxes():
    rng = np.random.default_rng(0)
    corner, size = rng.uniform(0, 10, (2, 6, 2)), rng.uniform(3, 8, (2, 6, 2))
    return [torch.from_numpy(np.concatenate([c, c + s], 1)) for c, s in zip(corner, size)]


def test_masks_by_cells(pairs_of_boxes):
    subjects, objects = pairs_of_boxes
    got = pair_masks(subjects, objects, (5, 7))
    for n, (s, o) in enumerate(zip(subjects.tolist(), objects.tolist())):
        left, top = min(s[0], o[0]), min(s[1], o[1])
        wide, high = max(s[2], o[2]) - left, max(s[3], o[3]) - top
        for row, column in itertools.product(range(5), range(7)):
            inside = [
                round((b[0] - left) / wide * 7) <= column < round((b[2] - left) / wide * 7)
                and round((b[1] - top) / high * 5) <= row < round((b[3] - top) / high * 5)
                for b in (s, o)
            ]
            assert got[:, n, row, column].tolist() == [*inside, not any(inside)]


def test_degenerate_boxes_have_no_cells():
    boxes = torch.tensor([[3.0, 3.0, 3.0, 9.0], [9.0, 0.0, 1.0, 5.0], [math.nan, 0.0, 1.0, 1.0]])
    masks = pair_masks(boxes, torch.tensor([[0.0, 0.0, 10.0, 10.0]] * 3), (4, 4))
    assert not masks[0].any()
    assert masks[1, :2].all()


@pytest.mark.parametrize(
    ("orders", "arrangements"),
    [("one", ["sob"]), ("half", ["sob", "sbo", "bso"]), ("all", ["sob", "sbo", "bso", "osb", "obs", "bos"])],
)
def test_head_by_loops_over_cells(pairs_of_boxes, orders, arrangements):
    head = seeded(lambda: DirectionalRelationHead(4, hidden=6, out=3, orders=orders))
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 4, 3, 3)))
    got = head(features, *pairs_of_boxes)
    masks = pair_masks(*pairs_of_boxes, (3, 3))
    for n in range(6):
        cells = [features[n, :, i, j] * masks[part, n, i, j] for part in range(3) for i in range(3) for j in range(3)]
        mixed = []
        for cell in cells:
            weights = torch.stack([head.query(cell) @ head.key(other) for other in cells]).softmax(0)
            seen = sum(w * head.value(other) for w, other in zip(weights, cells))
            mixed.append(cell + head.back(seen))
        parts = dict(zip("sob", (sum(mixed[9 * k : 9 * k + 9]) / 9 for k in range(3))))
        expected = sum(head.g(torch.cat([parts[letter] for letter in order])) for order in arrangements)
        torch.testing.assert_close(got[n], expected)


def test_all_six_orders_cannot_tell_the_directions_apart_and_half_of_them_can(pairs_of_boxes):
    subjects, objects = pairs_of_boxes
    features = torch.from_numpy(np.random.default_rng(1).standard_normal((6, 4, 3, 3)))
    free, half = (seeded(lambda o=o: DirectionalRelationHead(4, hidden=6, out=3, orders=o)) for o in ("all", "half"))
    torch.testing.assert_close(free(features, subjects, objects), free(features, objects, subjects))
    assert not torch.allclose(half(features, subjects, objects), half(features, objects, subjects), atol=0.05)


def test_a_fresh_head_does_not_attend():
    with torch.random.fork_rng():
        head = DirectionalRelationHead(4, hidden=6, out=3)
    assert not head.back.weight.any()
    assert not head.back.bias.any()


def test_adjacency_of_a_scene():
    pairs = torch.tensor([[0, 1], [1, 0], [1, 2]])
    links = {(0, 1), (1, 2)}  # objects of a pair
    links |= {(0, 4), (1, 4), (0, 5), (1, 5), (1, 6), (2, 6)}  # objects and relations
    links |= {(4, 5)}  # there and back; the fourth object has no relation
    expected = torch.eye(7, dtype=torch.bool)
    for a, b in links:
        expected[a, b] = expected[b, a] = True
    assert torch.equal(relation_adjacency(4, pairs), expected)


def test_graph_attention_by_loops():
    layer = seeded(lambda: RelationGraphAttention(4, heads=2))
    rng = np.random.default_rng(2)
    objects, relations = (torch.from_numpy(rng.standard_normal((n, 4))) for n in (3, 2))
    pairs = torch.tensor([[0, 1], [1, 0]])
    got = torch.cat(layer(objects, relations, pairs))
    x, linked = torch.cat([objects, relations]), relation_adjacency(3, pairs)
    for i in range(5):
        neighbours = [j for j in range(5) if linked[i, j]]
        for head in range(2):
            wide, narrow = slice(4 * head, 4 * head + 4), slice(2 * head, 2 * head + 2)
            strength = [(layer.query(x[i])[wide] @ layer.key(x[j])[wide]).relu() for j in neighbours]
            weights = torch.stack(strength).softmax(0)
            expected = sum(w * layer.value(x[j])[narrow] for w, j in zip(weights, neighbours)).relu()
            torch.testing.assert_close(got[i, narrow], expected)


def test_anchors_and_values_by_hand():
    loss = AttractRepelLoss(3).double()
    logits = torch.tensor([[3.0, 0, 0], [2.0, 1, 0], [0.0, 4, 0], [5.0, 0, 0]], dtype=torch.float64)
    target = torch.tensor([0, 0, 1, 2])  # the last is wrong
    values = loss(logits, target)
    first = (torch.tensor([5.0, 1, 0]) - torch.tensor([0.0, 4, 0])) / 3
    second = (torch.tensor([0.0, 4, 0]) - torch.tensor([5.0, 1, 0])) / 3
    torch.testing.assert_close(loss.anchors, torch.stack([first, second, torch.zeros(3)]).double())
    assert loss.counts.tolist() == [3.0, 3.0, 0.0]

    def cosine(a, b):
        return float(a @ b / a.norm() / b.norm())

    expected = [(1 - cosine(first, logits[i].float())) / 2 for i in (0, 1)] + [
        1 - cosine(second, logits[2].float()),
        0.0,
    ]
    assert values.tolist() == pytest.approx(expected, abs=1e-6)

    again = logits[:2].clone()
    loss(again, target[:2])
    torch.testing.assert_close(loss.anchors[0], ((3 * first + torch.tensor([5.0, 1, 0])) / 5).double())
    torch.testing.assert_close(loss.anchors[1], second.double())
    assert loss.counts.tolist() == [5.0, 3.0, 0.0]


def test_anchors_are_state_without_gradient_and_rest_in_evaluation():
    loss = AttractRepelLoss(2, width=3)
    embeddings = torch.tensor([[1.0, 0, 0], [1.0, 1, 0]], requires_grad=True)
    logits, target = torch.tensor([[1.0, 0], [1.0, 0]]), torch.tensor([0, 0])
    loss(logits, target, embeddings=embeddings).sum().backward()
    assert embeddings.grad.abs().sum() > 0
    assert not loss.anchors.requires_grad
    other = AttractRepelLoss(2, width=3)
    other.load_state_dict(loss.state_dict())
    before = loss.anchors.clone()
    loss.eval()
    other.eval()
    turned = embeddings.detach().flip(1)  # would move the anchors
    torch.testing.assert_close(loss(logits, target, embeddings=turned), other(logits, target, embeddings=turned))
    assert torch.equal(loss.anchors, before)


def test_nothing_predicted_right_is_nothing_to_attract():
    loss = AttractRepelLoss(2)
    values = loss(torch.tensor([[1.0, 0.0]], requires_grad=True), torch.tensor([1]))
    values.sum().backward()
    assert values.tolist() == [0.0]
    assert not loss.counts.any()


def test_recall_ranks_pairs_by_both_directions_and_wants_both_right():
    pairs = torch.tensor([[0, 2], [2, 0], [0, 1], [1, 0], [1, 2], [2, 1], [3, 0]])
    best = [[0.6, 0.0], [0.5, 0.0], [0.9, 0.0], [0.0, 0.3], [0.4, 0.0], [0.0, 0.4], [1.0, 0.0]]
    scores = torch.tensor(best)  # pairs 01: 1.2, 02: 1.1, 12: 0.8
    truth = [(0, 1, 0), (1, 0, 1), (0, 2, 0), (2, 0, 1), (1, 2, 0), (2, 1, 1), (2, 1, 0), (0, 3, 0)]
    recall = [bidirectional_relationship_recall(scores, pairs, truth, k=k) for k in (1, 2, 3, 9)]
    assert recall == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
    assert math.isnan(bidirectional_relationship_recall(scores, pairs, [(0, 1, 0)], k=1))


def test_refusals(pairs_of_boxes):
    boxes, _ = pairs_of_boxes
    with pytest.raises(ValueError, match=r"objects: expected shape \(6, 4\)"):
        pair_masks(boxes, boxes[:5], (2, 2))
    with pytest.raises(ValueError, match="orders: expected one of 'half', 'one', 'all', got 'none'"):
        DirectionalRelationHead(4, hidden=2, out=2, orders="none")
    with pytest.raises(ValueError, match="width: expected a multiple of 3 heads, got 4"):
        RelationGraphAttention(4, heads=3)
    with pytest.raises(ValueError, match="pairs: expected an int64 tensor"):
        relation_adjacency(2, torch.zeros(1, 2))
    with pytest.raises(ValueError, match=r"input: expected shape \(2, 3\)"):
        AttractRepelLoss(3)(torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="target: expected shape"):
        AttractRepelLoss(3)(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="k: expected a whole number >= 1"):
        bidirectional_relationship_recall(torch.zeros(1, 2), torch.tensor([[0, 1]]), [], k=0)
