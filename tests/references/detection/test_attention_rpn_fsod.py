"""Attention-RPN against grouped convolutions, as the official code writes correlations, and pairs picked by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lossary.detection import AttentionRPN, MultiRelationHead, support_attention, two_way_contrastive_pairs

C = 8


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().double()


def features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_attention_is_a_depthwise_convolution_with_the_pooled_support():
    query, support = features(2, C, 5, 6), features(1, C, 7, 7, seed=1)
    kernel = F.adaptive_avg_pool2d(support, 1).permute(1, 0, 2, 3)
    torch.testing.assert_close(support_attention(query, support), F.conv2d(query, kernel, groups=C))
    each = features(2, C, 7, 7, seed=2)
    alone = [support_attention(query[i : i + 1], each[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(support_attention(query, each), torch.cat(alone))


def test_proposals_follow_the_support():
    rpn = seeded(lambda: AttentionRPN(C, anchors=3))
    query, support = features(2, C, 5, 6), features(1, C, 7, 7, seed=1)
    logits, deltas = rpn(query, support)
    hidden = F.conv2d(query * support.mean((2, 3), keepdim=True), rpn.conv.weight, rpn.conv.bias, padding=1).clamp_min(
        0
    )
    weight = torch.cat([rpn.cls_logits.weight, rpn.bbox_pred.weight])
    bias = torch.cat([rpn.cls_logits.bias, rpn.bbox_pred.bias])
    torch.testing.assert_close(torch.cat([logits, deltas], 1), F.conv2d(hidden, weight, bias))
    blind = rpn(query, torch.zeros_like(support))[0]
    torch.testing.assert_close(blind, blind[:, :, :1, :1].expand_as(blind), atol=1e-12, rtol=0)


def test_relations_by_functional_calls_and_their_sum():
    head = seeded(lambda: MultiRelationHead(C))
    x, support = features(3, C, 7, 7), features(1, C, 7, 7, seed=1)
    both = torch.cat([F.avg_pool2d(x, 7), F.avg_pool2d(support, 7).expand(3, -1, -1, -1)], 1).flatten(1)
    first, second = (layer for layer in head.whole if isinstance(layer, nn.Linear))
    whole = F.relu(second(F.relu(first(both))))
    near, other = F.conv2d(x, head.cell.weight), F.conv2d(support, head.cell.weight)
    local = F.relu(F.conv2d(near, other.permute(1, 0, 2, 3), groups=C)).flatten(1)
    one, two, three = (layer.weight for layer in head.patch if isinstance(layer, nn.Conv2d))
    maps = F.relu(F.conv2d(torch.cat([x, support.expand(3, -1, -1, -1)], 1), one))
    maps = F.relu(F.conv2d(F.avg_pool2d(maps, 3, 1), two))
    patch = F.avg_pool2d(F.relu(F.conv2d(maps, three)), 3, 1).flatten(1)
    logits, deltas = head(x, support)
    expected = head.score["global"](whole) + head.score["local"](local) + head.score["patch"](patch)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(deltas, head.bbox_pred(patch))


@pytest.mark.parametrize("relation", ["global", "local", "patch"])
def test_one_relation_alone_is_its_share_of_the_sum(relation):
    head = seeded(lambda: MultiRelationHead(C))
    alone = MultiRelationHead(C, relations=(relation,)).double()
    alone.load_state_dict(head.state_dict(), strict=False)
    x, support = features(3, C, 7, 7), features(3, C, 7, 7, seed=1)
    parts = {name: MultiRelationHead(C, relations=(name,)).double() for name in ("global", "local", "patch")}
    for part in parts.values():
        part.load_state_dict(head.state_dict(), strict=False)
    torch.testing.assert_close(sum(part(x, support)[0] for part in parts.values()), head(x, support)[0])
    assert alone(x, support)[1].any() == (relation == "patch")


def test_gradients_of_all_weights_and_inputs():
    head = seeded(lambda: MultiRelationHead(C))
    x, support = features(2, C, 7, 7).requires_grad_(), features(1, C, 7, 7, seed=1).requires_grad_()
    torch.autograd.gradcheck(lambda *_: head(x, support), (x, support, *head.parameters()), fast_mode=True)


def test_pairs_are_one_two_one_hardest_first():
    match = torch.tensor([0.1, 0.2, 0.9, 0.3, 0.8, 0.7, 0.6, 0.5, 0.4, 0.95, 0.05, 0.99, 0.3, 0.2, 0.6, 0.1])
    logits = torch.stack([match.log(), (1 - match).log()], 1)
    foreground = torch.tensor([True, True] + [False] * 6 + [True, True] + [False] * 6)
    same = torch.arange(16) < 8
    assert two_way_contrastive_pairs(logits, foreground, same).tolist() == [0, 1, 2, 4, 5, 6, 11, 9]
    # with one match fewer: two of background, one of another class
    foreground[1] = False
    assert two_way_contrastive_pairs(logits, foreground, same).tolist() == [0, 2, 4, 11]


def test_background_is_at_most_a_quarter_and_never_none():
    logits = torch.zeros(8, 2)
    same = torch.ones(8, dtype=torch.bool)
    foreground = torch.tensor([True] * 4 + [False] * 4)
    assert two_way_contrastive_pairs(logits, foreground, same).tolist() == [0, 1, 2, 3, 4, 5]
    assert two_way_contrastive_pairs(logits, torch.zeros_like(same), same).tolist() == [0]
    assert two_way_contrastive_pairs(logits[:0], same[:0], same[:0]).tolist() == []


def test_half_precision_and_no_proposals():
    head = MultiRelationHead(C).bfloat16()
    logits, deltas = head(features(3, C, 7, 7).bfloat16(), features(1, C, 7, 7).bfloat16())
    assert logits.dtype == deltas.dtype == torch.bfloat16
    assert logits.isfinite().all()
    empty = head(torch.zeros(0, C, 7, 7).bfloat16(), features(1, C, 7, 7).bfloat16())
    assert [part.shape for part in empty] == [(0, 2), (0, 4)]


def test_refusals():
    x = torch.zeros(3, C, 7, 7)
    with pytest.raises(ValueError, match="support: expected 8 channels and a batch of 1 or 3"):
        support_attention(x, torch.zeros(2, C, 7, 7))
    with pytest.raises(ValueError, match=r"proposals: expected shape \(3, 8, 7, 7\), got \(3, 8, 5, 5\)"):
        MultiRelationHead(C)(x[..., :5, :5], x[:1])
    with pytest.raises(ValueError, match=r"support: expected shape \(1, 8, 7, 7\)"):
        MultiRelationHead(C)(x, x[:1, :, :5])
    with pytest.raises(ValueError, match="relations: expected one of 'global', 'local', 'patch', got 'both'"):
        MultiRelationHead(C, relations=("both",))
    with pytest.raises(ValueError, match="relations: expected at least one"):
        MultiRelationHead(C, relations=())
    with pytest.raises(ValueError, match="anchors: expected a whole number >= 1"):
        AttentionRPN(C, anchors=0)
    with pytest.raises(ValueError, match=r"same: expected a bool tensor of shape \(3,\)"):
        two_way_contrastive_pairs(torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), torch.zeros(3))
