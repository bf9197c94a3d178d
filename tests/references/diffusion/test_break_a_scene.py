"""Break-A-Scene: losses by hand and as trainers write them, odds of subsets counted, and a diffusers network."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from lossary.diffusion import (
    CrossAttentionRecorder,
    cross_attention_mask_loss,
    masked_diffusion_loss,
    union_sampling,
)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_sizes_are_uniform_and_so_are_subsets_of_a_size():
    chosen, _ = union_sampling(torch.rand(3, 2, 2, generator=rng()), (40_000,), generator=rng())
    code = (chosen * torch.tensor([1, 2, 4])).sum(-1)
    share = torch.bincount(code, minlength=8) / 40_000
    expected = [0.0 if not c else 1 / 3 / math.comb(3, bin(c).count("1")) for c in range(8)]
    assert share.tolist() == pytest.approx(expected, abs=0.01)


def test_the_union_is_the_largest_of_the_chosen_masks():
    masks = torch.rand(4, 3, 5, generator=rng())
    chosen, union = union_sampling(masks, (2, 6), generator=rng(1))
    assert (chosen.shape, union.shape) == ((2, 6, 4), (2, 6, 3, 5))
    for i, j in product(range(2), range(6)):
        torch.testing.assert_close(union[i, j], masks[chosen[i, j]].max(0).values)
    again = union_sampling(masks, (2, 6), generator=rng(1))
    assert torch.equal(again[0], chosen)
    one, only = union_sampling(masks[:1])
    assert one.tolist() == [True]
    assert torch.equal(only, masks[0])


def test_the_masked_loss_by_hand():
    found, target = torch.randn(2, 3, 2, 4, 4, generator=rng(), dtype=torch.float64).unbind()
    coarse = torch.rand(3, 2, 2, generator=rng(1), dtype=torch.float64)
    for b in range(3):
        total = 0.0
        for c, y, x in product(range(2), range(4), range(4)):
            within = coarse[b, y // 2, x // 2].item()
            total += (within * (found - target)[b, c, y, x].item()) ** 2
        loss = masked_diffusion_loss(found, target, mask=coarse)
        assert loss[b].item() == pytest.approx(total / 32)
    fine = F.interpolate(coarse[None], (4, 4))[0]
    as_trainers = F.mse_loss(found * fine[:, None], target * fine[:, None])
    assert loss.mean().item() == pytest.approx(as_trainers.item())
    stacked = masked_diffusion_loss(found[None], target[None], mask=coarse[None])
    torch.testing.assert_close(stacked[0], loss)
    assert masked_diffusion_loss(found, target, mask=0 * coarse).tolist() == [0, 0, 0]


def test_no_gradient_comes_from_outside_the_mask():
    found = torch.zeros(1, 3, 4, 4, requires_grad=True)
    mask = torch.zeros(1, 4, 4)
    mask[0, 1:3, 2] = 1
    masked_diffusion_loss(found, torch.ones(1, 3, 4, 4), mask=mask).sum().backward()
    torch.testing.assert_close(found.grad, -2 / 48 * mask[:, None].expand(-1, 3, -1, -1))


def test_the_attention_loss_by_hand():
    attention = torch.rand(2, 3, 2, 2, generator=rng(), dtype=torch.float64)
    masks = (torch.rand(2, 3, 4, 4, generator=rng(1)) > 0.5).double()
    chosen = torch.tensor([[True, False, True], [False, True, False]])
    for b in range(2):
        total = 0.0
        for i in range(3):
            if chosen[b, i]:
                top = max(attention[b, i].flatten().tolist())
                cells = product(range(2), range(2))
                total += sum(
                    (attention[b, i, y, x].item() / top - masks[b, i, 2 * y, 2 * x].item()) ** 2 for y, x in cells
                )
        loss = cross_attention_mask_loss(attention, masks, chosen=chosen)
        assert loss[b].item() == pytest.approx(total / 4)
    every = cross_attention_mask_loss(attention, masks)
    torch.testing.assert_close(every, cross_attention_mask_loss(attention, masks, chosen=torch.ones(2, 3).bool()))
    torch.testing.assert_close(cross_attention_mask_loss(7 * attention, masks), every)  # only the shape counts
    nothing = cross_attention_mask_loss(0 * attention, masks)
    torch.testing.assert_close(nothing, masks[..., ::2, ::2].mean((-2, -1)).sum(-1))
    assert torch.autograd.gradcheck(lambda a: cross_attention_mask_loss(a, masks), (attention.requires_grad_(),))


def test_a_map_of_zeros_has_an_ordinary_gradient():
    """Its largest value is replaced by 1, so that the slope is 2 (0 - mask) / pixels."""
    attention = torch.zeros(1, 2, 2, requires_grad=True)
    mask = torch.tensor([[[1.0, 0.0], [0.5, 1.0]]])
    cross_attention_mask_loss(attention, mask).backward()
    torch.testing.assert_close(attention.grad, -2 * mask / 4)


def small_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=12,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def test_a_diffusers_network():
    unet = small_unet()
    x, noise = torch.randn(2, 2, 4, 8, 8, generator=rng()).unbind()
    t, prompt = torch.tensor([10, 500]), torch.randn(2, 5, 12, generator=rng(1), requires_grad=True)
    expected = unet(x, t, prompt).sample
    recorder = CrossAttentionRecorder()
    unet.set_attn_processor(recorder)
    found = unet(x, t, prompt).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    maps = recorder.maps((8, 8))
    assert maps.shape == (2, 5, 8, 8)
    torch.testing.assert_close(maps.sum(1), torch.ones(2, 8, 8))
    with pytest.raises(ValueError, match="size: no cross-attention of 8x8"):
        recorder.maps((8, 8))
    masks = torch.zeros(2, 32, 32)
    masks[0, :16], masks[1, 16:] = 1, 1
    chosen, union = union_sampling(masks, (2,), generator=rng())
    loss = masked_diffusion_loss(found, noise, mask=union)
    held = cross_attention_mask_loss(maps[:, [1, 3]], masks.expand(2, -1, -1, -1), chosen=chosen)
    (grad,) = torch.autograd.grad(held.sum(), prompt, retain_graph=True)
    assert grad.abs().sum() > 0
    (loss + 0.01 * held).mean().backward()
    assert prompt.grad.isfinite().all()


def test_checkpointing_changes_neither_maps_nor_gradients():
    """Three rounds; what the backward pass computes again must not be taken for layers of the next."""
    x, prompt = torch.randn(3, 2, 4, 8, 8, generator=rng()), torch.randn(2, 5, 12, generator=rng(1))
    mask, found = torch.eye(8).expand(2, 5, 8, 8), []
    for checkpointed in (False, True):
        unet, recorder = small_unet().train(), CrossAttentionRecorder()
        unet.set_attn_processor(recorder)
        if checkpointed:
            unet.enable_gradient_checkpointing()
        rounds = []
        for scene in x:
            asked = prompt.clone().requires_grad_()
            noise = unet(scene, 10, asked).sample
            maps = recorder.maps((8, 8))
            assert recorder._seen == {}
            (noise.square().mean() + cross_attention_mask_loss(maps, mask).mean()).backward()
            rounds.append((maps.detach(), asked.grad))
        found.append(rounds)
        layers = len(recorder._seen)
        assert layers == (4 if checkpointed else 0)  # computed again, or this test shows nothing
    torch.testing.assert_close(found[1], found[0])


def test_passes_without_a_look_take_no_more_memory():
    unet, recorder = small_unet(), CrossAttentionRecorder()
    unet.set_attn_processor(recorder)
    x, prompt = torch.randn(3, 1, 4, 8, 8, generator=rng()), torch.randn(1, 5, 12, generator=rng(1))
    with torch.no_grad():
        for scene in x:
            unet(scene, 10, prompt)
        held, last = len(recorder._seen), recorder.maps((8, 8))
        unet(x[-1], 10, prompt)
    assert held == 4  # cross-attentions: one downwards, one in the middle, two upwards
    torch.testing.assert_close(last, recorder.maps((8, 8)))


def test_the_recorder_averages_heads_and_layers():
    diffusers = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    layers = [diffusers.Attention(6, cross_attention_dim=4, heads=2, dim_head=3) for _ in "ab"]
    x, prompt = torch.randn(1, 6, 6, generator=rng()), torch.randn(1, 3, 4, generator=rng(1))
    recorder, total = CrossAttentionRecorder(), 0.0
    for layer in layers:
        layer.set_processor(recorder)
        layer(x, encoder_hidden_states=prompt)
        layer(x[:, :4], encoder_hidden_states=prompt)  # another size
        for head in (slice(0, 3), slice(3, 6)):
            scores = layer.to_q(x)[0, :, head] @ layer.to_k(prompt)[0, :, head].T / math.sqrt(3)
            total = total + scores.softmax(-1) / 4
    torch.testing.assert_close(recorder.maps((2, 3))[0], total.T.reshape(3, 2, 3))


def test_refusals():
    picture, mask = torch.zeros(2, 3, 4, 4), torch.zeros(2, 4, 4)
    for call, message in (
        (lambda: union_sampling(mask[:0]), "masks: expected at least one concept"),
        (lambda: union_sampling(mask, 5), "shape: expected a tuple of whole numbers, got 5"),
        (lambda: union_sampling(mask, (2, -1)), "shape: expected a whole number >= 0"),
        (lambda: union_sampling(mask[0]), "masks: expected 3 dimensions"),
        (lambda: masked_diffusion_loss(picture, picture[:1], mask=mask), "target: expected shape"),
        (lambda: masked_diffusion_loss(picture, picture, mask=mask[:1]), "mask: expected shape"),
        (lambda: masked_diffusion_loss(picture.long(), picture, mask=mask), "input: expected a floating"),
        (lambda: cross_attention_mask_loss(picture, picture[:, :2]), "masks: expected shape"),
        (lambda: cross_attention_mask_loss(picture, picture, chosen=torch.ones(2, 3)), "chosen: expected bool"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
