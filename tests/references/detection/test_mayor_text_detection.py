"""MAYOR's parts by hand: there is no code to compare with, and only the abstract's words to hold them to."""

import math

import pytest
import torch

from lossary.detection import MLPMaskDecoder, adaptive_anchor_assign, instance_aware_mask_loss


def test_decoder_is_its_layers():
    torch.manual_seed(0)
    decoder = MLPMaskDecoder(channels=2, size=3, squeezed=2, hidden=5, mask=4).double()
    x = torch.randn(2, 2, 3, 3, dtype=torch.float64)
    squeeze, _, first, _, second, _ = decoder.decode
    seen = torch.einsum("oc,nchw->nohw", squeeze.weight[..., 0, 0], x) + squeeze.bias[:, None, None]
    hidden = (seen.reshape(2, 18) @ first.weight.T + first.bias).clamp(min=0)
    expected = (hidden @ second.weight.T + second.bias).reshape(2, 4, 4)
    torch.testing.assert_close(decoder(x), expected)


def test_every_pixel_sees_the_whole_region():
    torch.manual_seed(0)
    decoder = MLPMaskDecoder(channels=3, size=6, squeezed=4, hidden=64, mask=8)
    x = torch.randn(1, 3, 6, 6, requires_grad=True)
    for row, column in ((0, 0), (7, 7), (3, 4)):
        (gradient,) = torch.autograd.grad(decoder(x)[0, row, column], x)
        assert (gradient.abs().sum(1) > 0).all()


def test_convolutions_come_first():
    decoder = MLPMaskDecoder(channels=3, size=6, convolutions=2, squeezed=4, hidden=8, mask=5)
    kinds = [type(module).__name__ for module in decoder.decode]
    assert kinds == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d", "Flatten", "Linear", "ReLU", "Linear", "Unflatten"]
    assert sum(p.numel() for p in MLPMaskDecoder().parameters()) == (
        256 * 64 + 64 + 14 * 14 * 64 * 1024 + 1024 + 1024 * 784 + 784
    )


def test_mask_loss_by_hand():
    logits = torch.tensor([[math.log(3.0), 0.0, -math.log(3.0)]], dtype=torch.float64)  # 3/4, 1/2, 1/4
    target = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64)
    expected = 1 - (2 * 1.0 + 1) / (9 / 16 + 1 / 4 + 1 / 16 + 2 + 1)
    assert instance_aware_mask_loss(logits, target).item() == pytest.approx(expected)
    sure = 50 * (2 * target - 1)
    assert instance_aware_mask_loss(sure, target).item() == pytest.approx(0.0, abs=1e-12)
    assert instance_aware_mask_loss(-sure, target).item() == pytest.approx(1 - 1 / 4)
    nothing = torch.zeros(1, 3, dtype=torch.float64)
    assert instance_aware_mask_loss(nothing - 50, nothing).item() == pytest.approx(0.0)  # nothing there, nothing seen


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0.0) for i in (0, 1)]
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    return math.prod(sides) / (sum(areas) - math.prod(sides))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("k", [0, 1, 5])
def test_assignment_is_its_definition(seed, k):
    g = torch.Generator().manual_seed(seed)
    ticks = 6 * torch.arange(6, dtype=torch.float64)
    corner = torch.cartesian_prod(ticks, ticks) + 0.01 * torch.rand(36, 2, generator=g, dtype=torch.float64)
    anchors = torch.cat([corner, corner + 10], 1)
    low = 20 * torch.rand(4, 2, generator=g, dtype=torch.float64)
    truth = torch.cat([low, low + torch.tensor([[10.0, 10], [9, 11], [20, 4], [3, 18]])], 1)
    truth[0] = anchors[14] + 0.5
    table = [[iou(a, t) for t in truth.tolist()] for a in anchors.tolist()]
    suitors = {a: {t for t in range(4) if table[a][t] >= 0.6} for a in range(36)}
    for t in range(4):
        for a in sorted(range(36), key=lambda a: -table[a][t])[:k]:
            if table[a][t] > 0:
                suitors[a].add(t)
    expected = []
    for a in range(36):
        if suitors[a]:
            expected.append(max(suitors[a], key=lambda t: table[a][t]))
        else:
            expected.append(-2 if max(table[a]) >= 0.2 else -1)
    assert {-1, 0} | ({-2} if k < 5 else set()) <= set(expected)
    assert adaptive_anchor_assign(anchors, truth, k=k, positive=0.6, negative=0.2).tolist() == expected


def test_a_long_box_gets_anchors_where_a_threshold_gives_none():
    """A box of 88 by 8 has an IoU of 128 / (256 + 704 - 128) = 2/13 with a square of 16 that it runs through."""
    corner = torch.tensor([[8.0 * i, 0.0] for i in range(10)])
    anchors = torch.cat([corner, corner + 16], 1)
    long = torch.tensor([[0.0, 4.0, 88.0, 12.0]])
    assert (adaptive_anchor_assign(anchors, long) == 0).sum() == 9
    assert (adaptive_anchor_assign(anchors, long, k=0) == -1).all()
    far = torch.tensor([[500.0, 4.0, 588.0, 12.0]])
    assert (adaptive_anchor_assign(anchors, far) == -1).all()  # nothing is near


def test_refusals():
    anchors, truth = torch.rand(5, 4), torch.rand(2, 4)
    with pytest.raises(ValueError, match="negative"):
        adaptive_anchor_assign(anchors, truth, positive=0.3, negative=0.5)
    with pytest.raises(ValueError, match="k"):
        adaptive_anchor_assign(anchors, truth, k=-1)
    with pytest.raises(ValueError, match="hidden"):
        MLPMaskDecoder(hidden=0)
    with pytest.raises(ValueError, match="input"):
        MLPMaskDecoder(channels=2, size=3, hidden=4)(torch.rand(1, 2, 4, 4))
    with pytest.raises(ValueError, match="target"):
        instance_aware_mask_loss(torch.rand(2, 3), torch.rand(2, 4))
