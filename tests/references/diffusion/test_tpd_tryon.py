"""TPD: channel by channel, holes by a flood fill of its own, zero weights that change nothing, a diffusers network."""

import pytest
import torch
from torch import nn

from lossary.diffusion import (
    SelfAttentionTransfer,
    decoupled_mask_prediction,
    spatial_concat_condition,
    spatial_concat_target,
    widened_convolution,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_every_pixel_of_the_wide_pictures():
    person, garment, pose, dense = torch.randn(4, 2, 3, 5, 4, generator=rng()).unbind()
    mask = (torch.rand(2, 1, 5, 4, generator=rng(1)) < 0.5).float()
    target = spatial_concat_target(person, garment, mask)
    told = spatial_concat_condition(person * mask, garment, mask, [pose, dense])
    assert target.shape == (2, 4, 5, 8)
    assert told.shape == (2, 10, 5, 8)
    for left, right, found in (
        (person, garment, target[:, :3]),
        (mask, torch.ones(2, 1, 5, 4), target[:, 3:]),
        (person * mask, garment, told[:, :3]),
        (mask, torch.ones(2, 1, 5, 4), told[:, 3:4]),
        (pose, garment, told[:, 4:7]),
        (dense, garment, told[:, 7:]),
    ):
        assert torch.equal(found[..., :4], left)
        assert torch.equal(found[..., 4:], right)


def flooded(below):
    """Regions of True cells that touch by their sides, as sets of cells."""
    left, regions = {(i, j) for i, row in enumerate(below) for j, b in enumerate(row) if b}, []
    while left:
        edge, region = [left.pop()], set()
        while edge:
            i, j = edge.pop()
            region.add((i, j))
            near = {(i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)} & left
            left -= near
            edge += near
        regions.append(region)
    return regions


@pytest.mark.parametrize("dilation", [0, 2])
def test_the_second_mask_by_flood_fill(dilation):
    predicted = torch.rand(6, 1, 9, 16, generator=rng(3))
    worn = (torch.rand(6, 1, 9, 8, generator=rng(1)) < 0.9).float()
    found = decoupled_mask_prediction(predicted, worn, threshold=0.45, dilation=dilation)
    for b in range(6):
        regions = flooded((predicted[b, 0, :, :8] < 0.45).tolist())
        sizes = sorted(map(len, regions))
        assert sizes[-1] > sizes[-2]  # else the largest is a matter of taste
        largest = max(regions, key=len)
        for i in range(9):
            for j in range(8):
                hit = any(abs(i - k) <= dilation and abs(j - m) <= dilation for k, m in largest)
                assert found[b, 0, i, j] == (0 if hit else worn[b, 0, i, j])


def test_holes_of_any_size():
    worn = torch.ones(1, 1, 4, 4)
    worn[..., 0, 0] = 0
    none = torch.ones(1, 1, 4, 8)
    none[..., 4:] = 0  # a hole beside the garment does not count
    assert torch.equal(decoupled_mask_prediction(none, worn), worn)
    assert decoupled_mask_prediction(0 * none, worn, dilation=0).sum() == 0  # larger than its surroundings
    at_threshold = torch.full((1, 1, 4, 8), 0.5)
    assert torch.equal(decoupled_mask_prediction(at_threshold, worn), worn)


def test_new_channels_change_nothing_at_first():
    torch.manual_seed(0)
    first, last = nn.Conv2d(5, 6, 3, padding=1), nn.Conv2d(6, 4, 3, stride=2, bias=False)
    wide = widened_convolution(widened_convolution(first, inputs=1, at=2), inputs=3)
    x = torch.randn(2, 9, 6, 6, generator=rng())
    torch.testing.assert_close(wide(x), first(x[:, [0, 1, 3, 4, 5]]))
    longer = widened_convolution(last, outputs=1)
    y = torch.randn(2, 6, 7, 7, generator=rng())
    torch.testing.assert_close(longer(y)[:, :4], last(y))
    assert longer(y)[:, 4].abs().max() == 0
    assert widened_convolution(first, outputs=2).bias[6:].tolist() == [0, 0]
    wide(x).sum().backward()
    assert wide.weight.grad[:, 2].abs().sum() > 0
    wide.weight.data.zero_()
    assert first.weight.abs().sum() > 0  # a copy


def test_a_diffusers_inpainting_network_becomes_one():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=9,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    person, garment, pose, dense = torch.randn(4, 2, 4, 8, 8, generator=rng()).unbind()
    mask, t = torch.ones(2, 1, 8, 8), torch.tensor([3, 700])
    target = spatial_concat_target(person, garment, mask)
    told = spatial_concat_condition(person, garment, mask, [pose, dense])
    before = unet(torch.cat([target[:, :4], told[:, :5]], 1), t, torch.zeros(2, 1, 12)).sample
    unet.conv_in = widened_convolution(widened_convolution(unet.conv_in, inputs=1, at=4), inputs=8)
    unet.conv_out = widened_convolution(unet.conv_out, outputs=1)
    model = SelfAttentionTransfer(lambda x, t, prompt: unet(x, t, prompt).sample, width=12)
    found = model(target, t, told)
    assert found.shape == (2, 5, 8, 16)
    torch.testing.assert_close(found[:, :4], before)
    found.square().mean().backward()
    assert model.prompt.grad.abs().sum() > 0
    moved = told.clone()
    moved[..., 15] += 1  # of the garment
    changed = (model(target, t, moved) - found).abs().amax((0, 1, 2))
    assert changed[0] > 0  # of the person, far away


def test_the_module_keeps_its_network():
    network = nn.Module()
    network.weight = nn.Parameter(torch.ones(1))
    model = SelfAttentionTransfer(network, width=3)
    assert set(model.state_dict()) == {"prompt", "network.weight"}
    seen = []
    network.forward = lambda x, t, prompt: seen.extend([x, t, prompt]) or x
    x, told = torch.randn(2, 2, 1, 4), torch.randn(2, 5, 1, 4)
    model(x, 0.3, told)
    assert torch.equal(seen[0], torch.cat([x, told], 1))
    assert seen[1] == 0.3
    assert seen[2].shape == (2, 1, 3)


def test_refusals():
    x, mask = torch.zeros(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    model = SelfAttentionTransfer(lambda x, t, prompt: x)
    for call, message in (
        (lambda: spatial_concat_target(x, x[..., :2], mask), "garment: expected shape"),
        (lambda: spatial_concat_target(x[0], x[0], mask), "person: expected 4 dimensions"),
        (lambda: spatial_concat_target(x, x, x), "worn: expected shape"),
        (lambda: spatial_concat_condition(x, x, mask[:1]), "mask: expected shape"),
        (lambda: spatial_concat_condition(x, x, mask, [mask]), "poses: expected shape"),
        (lambda: model(x, 0.5, mask[..., :2]), "condition: expected the batch and size of x"),
        (lambda: SelfAttentionTransfer(lambda x, t, prompt: x, width=0), "width: expected a whole number >= 1"),
        (lambda: widened_convolution(nn.Conv2d(4, 4, 1, groups=2)), "conv: expected one group"),
        (lambda: widened_convolution(nn.Conv2d(4, 4, 1), inputs=1, at=5), "at: expected a whole number"),
        (lambda: decoupled_mask_prediction(mask, mask), "predicted: expected shape"),
        (lambda: decoupled_mask_prediction(torch.ones(2, 1, 4, 8), mask, dilation=-1), "dilation: expected a whole"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
