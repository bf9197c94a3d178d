"""Skip-Tuning against weights scaled by hand, the U-Nets of diffusers, and their own concatenations."""

import pytest
import torch
from torch import nn

from lossary.diffusion import SkipTuning, set_skip_scale


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Small(nn.Module):
    """Two levels, a linear map at each join: from below 3 channels, skips of 2 and 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.deep, self.high = nn.Conv2d(5, 3, 1), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        h = self.deep(torch.cat([x[:, :3], x[:, 3:5]], dim=1))
        return self.high(torch.cat([h, x[:, 5:]], dim=1))


def test_it_is_the_network_with_scaled_weights():
    """A linear join commutes with the factor: scaling the skip is scaling the columns that read it."""
    unet, x = Small(), torch.randn(2, 6, 3, 3, generator=rng())
    before = unet(x)
    with SkipTuning([(unet.deep, 2), (unet.high, 1)], bottom=0.6, top=0.9):
        found = unet(x)
    by_hand = Small()
    by_hand.deep.weight.data[:, 3:] *= 0.6
    by_hand.high.weight.data[:, 3:] *= 0.9
    torch.testing.assert_close(found, by_hand(x))
    assert not torch.allclose(found, before)
    assert torch.equal(unet(x), before)  # nothing stays


def test_factors_are_linear_from_the_deepest():
    joins = [(nn.Identity(), 1) for _ in range(5)]
    assert SkipTuning(joins, bottom=0.6).factors == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0])
    assert SkipTuning(joins, bottom=0.9, top=0.5).factors == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5])
    assert SkipTuning(joins[:1], bottom=0.7).factors == [0.7]


def test_hooks_leave_after_an_error_and_do_not_nest():
    unet, x = Small(), torch.randn(1, 6, 2, 2, generator=rng())
    tuning, before = SkipTuning([(unet.deep, 2)], bottom=0.5), unet(x)
    with pytest.raises(RuntimeError, match="inside"), tuning:
        raise RuntimeError("inside")
    assert torch.equal(unet(x), before)
    with tuning, pytest.raises(ValueError, match="entered once"), tuning:
        pass
    with tuning:
        once = unet(x)
    with tuning:
        torch.testing.assert_close(unet(x), once)


def test_only_some_noise_levels():
    unet, x = Small(), torch.randn(2, 6, 2, 2, generator=rng())
    tuning = SkipTuning([(unet.deep, 2), (unet.high, 1)], bottom=0.5)
    with tuning:
        scaled = unet(x)

    def denoise(x, sigma, shift, *, factor=1.0):
        return factor * unet(x) + shift

    tuned = tuning.denoiser(denoise, between=(0.5, 2.0))
    for sigma, expected in ((0.4, unet(x)), (0.5, scaled), (2.0, scaled), (2.1, unet(x))):
        torch.testing.assert_close(tuned(x, sigma, 1.0), expected + 1)
        torch.testing.assert_close(tuned(x, torch.full((2,), sigma), 0.0, factor=2.0), 2 * expected)
    torch.testing.assert_close(tuned(x, torch.tensor([1.0, 3.0]), 0.0), unet(x))
    torch.testing.assert_close(tuning.denoiser(denoise)(x, 99.0, 0.0), scaled)


def test_the_joins_of_diffusers():
    """Two widths, two skips to a level; what the deepest join gets, against its own concatenation."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        cross_attention_dim=8,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    tuning = SkipTuning(unet, bottom=0.4, top=1.0)
    assert [channels for _, channels in tuning.joins] == [16, 8, 8, 8]  # those of the encoder, backwards
    assert [module for module, _ in tuning.joins] == [r for block in unet.up_blocks for r in block.resnets]
    inputs = {"sample": torch.randn(2, 1, 8, 8, generator=rng()), "timestep": 3}
    inputs["encoder_hidden_states"] = torch.randn(2, 5, 8, generator=rng(1))
    hidden = []
    look = tuning.joins[0][0].norm1.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    with torch.no_grad():
        before = unet(**inputs).sample
        with tuning:
            after = unet(**inputs).sample
        with SkipTuning(unet, bottom=1.0):
            torch.testing.assert_close(unet(**inputs).sample, before)
        assert torch.equal(unet(**inputs).sample, before)
    look.remove()
    first, scaled = hidden[:2]
    assert torch.equal(scaled[:, :16], first[:, :16])
    torch.testing.assert_close(scaled[:, 16:], 0.4 * first[:, 16:])
    assert (after - before).abs().max() > 1e-3


def test_freeu_of_diffusers_with_flat_skips_says_the_same():
    """Where a skip is constant over the picture, FreeU's low-pass factor s is our rho, its b = 1."""
    freeu = pytest.importorskip("diffusers.utils.torch_utils")
    hidden = torch.randn(1, 4, 8, 8, generator=rng())
    skip = torch.randn(1, 3, 1, 1, generator=rng(1)).expand(-1, -1, 8, 8)
    below, scaled = freeu.apply_freeu(0, hidden, skip, s1=0.7, s2=1.0, b1=1.0, b2=1.0)
    join = nn.Identity()
    handle = set_skip_scale(join, 3, 0.7)
    torch.testing.assert_close(join(torch.cat([hidden, skip], dim=1)), torch.cat([below, scaled], dim=1))
    handle.remove()


def test_further_arguments_and_dtypes_pass():
    class Join(nn.Module):
        def forward(self, x, embedding, *, scale=1.0):
            return scale * x + embedding

    join = Join()
    handle = set_skip_scale(join, 1, 0.5)
    x = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    found = join(x, 1.0, scale=2.0)
    assert found.dtype is torch.bfloat16
    assert found[0, :, 0].tolist() == [3.0, 2.0]
    assert torch.equal(x, torch.ones_like(x))
    handle.remove()


def test_refusals():
    unet, x = Small(), torch.zeros(1, 2, 1, 1)
    for call, message in (
        (lambda: SkipTuning([], bottom=0.5), "joins: expected at least one"),
        (lambda: SkipTuning([(unet.deep, 2)], bottom=-0.1), "bottom: expected a number >= 0"),
        (lambda: SkipTuning(unet), "joins: expected a U-Net with mid_block"),
        (lambda: set_skip_scale(unet.deep, 0, 0.5), "skip_channels: expected a whole number >= 1"),
        (lambda: set_skip_scale(unet.deep, 1, float("nan")), "rho: expected a finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with SkipTuning([(unet.deep, 2)]), pytest.raises(ValueError, match="input: expected more than 2 channels"):
        unet.deep(x)
    with SkipTuning([(unet.deep, 2)]), pytest.raises(ValueError, match="input: expected as the module's first pos"):
        unet.deep(input=torch.zeros(1, 5, 1, 1))
    with pytest.raises(ValueError, match=r"between\[0\]: expected a number < 0.5"):
        SkipTuning([(unet.deep, 2)]).denoiser(lambda x, sigma: unet(x), between=(2.0, 0.5))
