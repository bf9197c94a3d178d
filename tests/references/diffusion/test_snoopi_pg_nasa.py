"""SNOOPI: guided pushes by hand, attention against explicit softmax, and in a real diffusers network."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from lossary.diffusion import (
    NegativeAwaySteerAttention,
    ProperGuidanceDistillation,
    negative_away_attention,
    random_guidance_scale,
    steer_away,
)
from lossary.diffusion._mixture import Mixture


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normals(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def at(value):
    return lambda shape, generator: torch.full(shape, value, dtype=torch.float64)


class Line(nn.Module):
    """denoise = keep x + gain condition."""

    def __init__(self, keep, gain):
        super().__init__()
        self.keep = nn.Parameter(torch.tensor(keep, dtype=torch.float64))
        self.gain = nn.Parameter(torch.tensor(gain, dtype=torch.float64))

    def forward(self, x, sigma, condition=None):
        return self.keep * x + (0 if condition is None else self.gain * condition)


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, latent, condition):
        return self.mean + latent


def made(**settings):
    return ProperGuidanceDistillation(Shift(), Line(0.3, 2.0), Line(0.5, 1.0), **{"levels": at(0.7)} | settings)


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
def test_both_are_guided_by_the_same_scale(scale):
    """real^k = x / 2 + k c, fake^k = 0.3 x + 2 k c; the push is their difference over sigma^2."""
    procedure = made(scales=random_guidance_scale(scale, scale))
    x, x_t, condition = normals(3, 2, 5, 4).unbind()
    x = x.requires_grad_()
    sigma = torch.full((2, 5), 0.7, dtype=torch.float64)
    values = procedure.generator_loss(x, x_t, sigma, {"condition": condition}, rng())
    push = (-0.2 * x_t + scale * condition) / 0.49
    torch.testing.assert_close(values, push.square().sum(-1) / 2)
    torch.testing.assert_close(torch.autograd.grad(values.sum(), x)[0], push)


class Exact(nn.Module):
    """A mixture whose first two components are class 0 and whose others are class 1: its denoiser and densities."""

    def __init__(self, means, scale):
        super().__init__()
        self.whole, *self.classes = (Mixture(part, scale) for part in (means, means[:2], means[2:]))

    def forward(self, x, sigma, condition=None):
        if condition is None:
            return self.whole.denoise(x, sigma)
        return torch.where(condition == 1, *(part.denoise(x, sigma) for part in self.classes[::-1]))

    def log_density(self, x, sigma, condition, scale):
        given = torch.where(condition[:, 0] == 1, *(part.log_density(x, sigma) for part in self.classes[::-1]))
        return (1 - scale) * self.whole.log_density(x, sigma) + scale * given


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])
def test_the_push_is_the_gradient_of_sharpened_densities(scale):
    """Of log q(x)^(1-k) q(x|c)^k less the same of the data, at noised samples: by autograd of exact log-densities."""
    data, own = Exact(normals(4, 2), 0.4), Exact(normals(4, 2, seed=1), 0.6)
    scales = random_guidance_scale(scale, scale)
    procedure = ProperGuidanceDistillation(Shift(), own, data, levels=at(0.7), scales=scales)
    x, x_t = normals(2, 50, 2, seed=2).requires_grad_().unbind()
    sigma, condition = torch.full((50,), 0.7, dtype=torch.float64), torch.arange(50)[:, None] % 2
    apart = own.log_density(x_t, sigma, condition, scale) - data.log_density(x_t, sigma, condition, scale)
    values = procedure.generator_loss(x, x_t, sigma, {"condition": condition}, rng())
    push, expected = (torch.autograd.grad(f.sum(), where)[0] for f, where in ((values, x), (apart, x_t)))
    torch.testing.assert_close(push, expected)


def test_null_and_negative_conditions():
    """Without = with null n: real^k = x / 2 + (1 - k) n + k c; a negative replaces n for the teacher alone."""
    procedure = made(scales=random_guidance_scale(3.0, 3.0))
    x, x_t, condition, null, negative = normals(5, 6, 4).unbind()
    sigma = torch.full((6,), 0.7, dtype=torch.float64)
    batch = {"condition": condition, "null": null, "negative": negative}
    values = procedure.generator_loss(x, x_t, sigma, batch, rng())
    real, fake = 0.5 * x_t - 2 * negative + 3 * condition, 0.3 * x_t - 4 * null + 6 * condition
    torch.testing.assert_close(values, ((fake - real) / 0.49).square().sum(-1) / 2)


def test_scales_are_uniform_one_for_all_or_one_for_each():
    scales = random_guidance_scale()
    one = scales((3, 50), [rng(k) for k in range(3)])
    assert one.shape == (3, 50)
    assert all(row.unique().numel() == 1 for row in one)
    assert one[:, 0].unique().numel() == 3
    torch.testing.assert_close(one[2], scales((50,), rng(2)))
    each = random_guidance_scale(0.5, 3.0, per_sample=True)((40_000,), rng())
    assert each.mean().item() == pytest.approx(1.75, abs=0.02)
    assert each.std().item() == pytest.approx(2.5 / 12**0.5, abs=0.02)
    assert 0.5 <= each.min() < 0.51
    assert 2.99 < each.max() <= 3.0
    many = torch.cat([scales((1,), g) for g in [rng(5)] for _ in range(4000)])
    assert many.mean().item() == pytest.approx(2.25, abs=0.05)
    assert many.max() > 3.9


@pytest.mark.parametrize("drop", [0.0, 0.25, 1.0])
def test_the_fake_network_also_learns_without(drop):
    procedure = made(drop=drop)
    x, x_t, condition, null = normals(4, 20_000, 2).unbind()
    sigma = torch.full((20_000,), 0.7, dtype=torch.float64)
    for batch, empty in (({}, 0.0), ({"null": null}, 2 * null)):
        values = procedure.fake_loss(x, x_t, sigma, {"condition": condition} | batch, rng())
        with_it, without = (
            (1 + 1 / 0.49) * (0.3 * x_t + c - x).square().mean(-1) for c in (2 * condition, torch.as_tensor(empty))
        )
        dropped = (values - without).abs() < 1e-9
        torch.testing.assert_close(values[~dropped], with_it[~dropped])
        assert dropped.double().mean().item() == pytest.approx(drop, abs=0.01)


def test_a_round_of_turns():
    procedure = made()
    batch = {"latent": normals(7, 2), "condition": normals(7, 2, seed=1)}
    for player in procedure.turns(0):
        values = procedure.objective(player, batch, step=0, generator=rng())
        assert values.shape == (7,)
        assert values.requires_grad
    torch.testing.assert_close(procedure(batch["latent"], batch["condition"]), batch["latent"])


def test_attention_as_the_paper_writes_it():
    query, key, value = normals(2, 3, 4, 5), normals(2, 3, 6, 5, seed=1), normals(2, 3, 6, 7, seed=2)
    away_key, away_value = normals(2, 3, 8, 5, seed=3), normals(2, 3, 8, 7, seed=4)
    expected = torch.softmax(query @ key.mT / 5**0.5, -1) @ value
    expected = expected - 0.3 * torch.softmax(query @ away_key.mT / 5**0.5, -1) @ away_value
    found = negative_away_attention(query, key, value, away_key, away_value, alpha=0.3)
    torch.testing.assert_close(found, expected)
    same = negative_away_attention(query, key, value, key, value, alpha=1.0)
    assert same.abs().max() < 1e-12
    mask = torch.tensor([0, 0, 0, -torch.inf, -torch.inf, -torch.inf], dtype=torch.float64)
    masked = negative_away_attention(query, key, value, away_key, away_value, mask=mask.expand(4, 6))
    shorter = negative_away_attention(query, key[..., :3, :], value[..., :3, :], away_key, away_value)
    torch.testing.assert_close(masked, shorter)


def test_a_layer_of_diffusers():
    attention = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    options = {"residual_connection": True, "rescale_output_factor": 2.0, "bias": True}
    layer = attention.Attention(12, cross_attention_dim=10, heads=3, dim_head=4, **options).double()
    x, prompt, negative = normals(2, 7, 12), normals(2, 5, 10, seed=1), normals(1, 6, 10, seed=2)
    plain, away = layer(x, prompt), layer(x, negative.expand(2, -1, -1))
    empty = (x + layer.to_out[0].bias) / 2  # what attention to nothing would give
    layer.set_processor(NegativeAwaySteerAttention(negative, alpha=0.4))
    torch.testing.assert_close(layer(x, prompt), plain - 0.4 * (away - empty))
    keep = torch.tensor([[True, True, False, False, False]]).expand(2, -1)
    bias = torch.where(keep, 0.0, -torch.inf).double()[:, None]
    layer.set_processor(NegativeAwaySteerAttention(negative, alpha=0.4))
    torch.testing.assert_close(layer(x, prompt, attention_mask=bias), layer(x, prompt[:, :2]))
    with pytest.raises(ValueError, match="only cross-attention"):
        layer(x)


@pytest.mark.parametrize("place", ["tokens", "pictures", "spatial norm"])
def test_without_strength_it_is_the_layer_as_it_was(place):
    """Group norm in front of the queries, pictures (B, C, H, W) instead of tokens, a norm that sees the embedding."""
    attention = pytest.importorskip("diffusers.models.attention_processor")
    torch.manual_seed(0)
    spatial = {"spatial_norm_dim": 3} if place == "spatial norm" else {}
    options = {"norm_num_groups": 4, "residual_connection": True, **spatial}
    layer = attention.Attention(32, cross_attention_dim=10, heads=4, dim_head=8, **options).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = normals(2, 6, 32) if place == "tokens" else normals(2, 32, 2, 3)
    prompt, negative, temb = normals(2, 5, 10, seed=1), normals(1, 6, 10, seed=2), normals(2, 3, 2, 3, seed=3)
    plain = layer(x, prompt, temb=temb)
    layer.set_processor(NegativeAwaySteerAttention(negative, alpha=0.0))
    torch.testing.assert_close(layer(x, prompt, temb=temb), plain)
    layer.set_processor(NegativeAwaySteerAttention(negative, alpha=0.5))
    assert (layer(x, prompt, temb=temb) - plain).abs().max() > 1e-2
    with pytest.raises(ValueError, match="hidden_states: expected 3 or 4 dimensions"):
        layer(x[0, 0], prompt)


def test_a_network_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=6,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()
    x, prompt, negative = torch.randn(2, 1, 8, 8), torch.randn(2, 5, 6), torch.randn(1, 4, 6)

    def run():
        with torch.no_grad():
            return unet(x, 10, prompt).sample

    plain = run()
    before = steer_away(unet, negative, alpha=0.0)
    torch.testing.assert_close(run(), plain)
    unet.set_attn_processor(before)
    before = steer_away(unet, negative, alpha=0.5)
    steered = [name for name, p in unet.attn_processors.items() if isinstance(p, NegativeAwaySteerAttention)]
    assert steered == [name for name in before if "attn2" in name] != []
    assert (run() - plain).abs().max() > 1e-4
    unet.set_attn_processor(before)
    torch.testing.assert_close(run(), plain)


def test_refusals():
    x = torch.zeros(1, 2, 3)

    class Empty:
        attn_processors: ClassVar = {}

    for call, message in (
        (lambda: random_guidance_scale(4.0, 0.5), "high: expected a number >= 4"),
        (lambda: made(drop=1.5), "drop: expected a number"),
        (lambda: made().objective("fake", {"latent": x}, step=0), "batch: expected 'condition'"),
        (lambda: negative_away_attention(x.long(), x, x, x, x), "query: expected a floating"),
        (lambda: negative_away_attention(x, x, x, x, x, alpha=float("nan")), "alpha"),
        (lambda: negative_away_attention(x, x[..., 1:], x, x, x), "^key: expected shape"),
        (lambda: negative_away_attention(x, x, x[:, 1:], x, x), "^value: expected shape"),
        (lambda: negative_away_attention(x, x, x, x[0], x), "^negative_key: expected shape"),
        (lambda: negative_away_attention(x, x, x, x[..., 1:], x), "^negative_key: expected shape"),
        (lambda: negative_away_attention(x, x, x, x, x[..., 1:]), "^negative_value: expected shape"),
        (lambda: negative_away_attention(x, x, x, x, x[:, 1:]), "^negative_value: expected shape"),
        (lambda: NegativeAwaySteerAttention(x[0]), "negative: expected 3 dimensions"),
        (lambda: steer_away(Empty(), x), "model: expected cross-attention"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
