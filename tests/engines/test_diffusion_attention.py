"""Attention with its maps in sight, against diffusers' own processors on layers of every kind they handle."""

import pytest
import torch

from lossary.diffusion._attention import attend, inputs, keys_and_values, outputs

diffusers = pytest.importorskip("diffusers.models.attention_processor")

TEXT = {"cross_attention_dim": 6}
LAYERS = {
    "plain": TEXT,
    "self": {},
    "text normalised by layer": TEXT | {"cross_attention_norm": "layer_norm"},
    "text normalised by group": TEXT | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3},
    "queries and keys normalised": TEXT | {"qk_norm": "layer_norm"},
    "of equal length": {"qk_norm": "rms_norm"},
    "residual": TEXT | {"residual_connection": True},
    "rescaled": {"rescale_output_factor": 1.7, "residual_connection": True},
    "groups": {"norm_num_groups": 2},
    "spatial": {"spatial_norm_dim": 3, "norm_num_groups": 2, "residual_connection": True},
    "raw scores": TEXT | {"scale_qk": False, "upcast_attention": True, "upcast_softmax": True},
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def built(**settings):
    """A layer whose norms, too, have random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = diffusers.Attention(32, heads=2, dim_head=4, **settings)
    g = rng(1)
    for weight in layer.parameters():
        weight.data.add_(0.3 * torch.randn(weight.shape, generator=g))
    return layer.requires_grad_(False)


def states(layer, *, picture: bool):
    x = torch.randn(2, 32, 3, 5, generator=rng(2))
    text = torch.randn(2, 4, 6, generator=rng(3)) if layer.is_cross_attention else None
    temb = torch.randn(2, 3, 3, 5, generator=rng(4)) if layer.spatial_norm is not None else None
    return x if picture else x.flatten(2).mT.contiguous(), text, temb


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("picture", [False, True])
def test_it_computes_what_diffusers_does(settings, picture):
    layer = built(**settings)
    x, text, temb = states(layer, picture=picture or "spatial_norm_dim" in settings)
    seen = []
    found = attend(layer, x, text, temb=temb, edit=lambda maps: seen.append(maps) or maps)
    torch.testing.assert_close(found, layer(x, encoder_hidden_states=text, temb=temb), atol=1e-5, rtol=1e-4)
    (maps,) = seen
    assert maps.shape == (2, 2, 15, 15 if text is None else 4)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 2, 15))


@pytest.mark.parametrize("settings", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("picture", [False, True])
def test_fused_attention_between_inputs_and_outputs_is_diffusers_own(settings, picture):
    layer = built(**settings)
    x, text, temb = states(layer, picture=picture or "spatial_norm_dim" in settings)
    bias = torch.randn(2, 1, 15 if text is None else 4, generator=rng(5))
    query, key, value, mask = inputs(layer, x, text, bias, temb)
    assert query.shape == (2, 2, 15, 4)
    torch.testing.assert_close(mask, bias[:, None].expand(-1, 2, -1, -1))
    found = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=layer.scale)
    expected = layer(x, encoder_hidden_states=text, attention_mask=bias, temb=temb)
    torch.testing.assert_close(outputs(layer, found, x), expected, atol=1e-5, rtol=1e-4)
    if text is not None:  # another text, attended to beside the first, is read as the first is
        for one, both in zip(keys_and_values(layer, text[:1].flip(1)), (key, value)):
            torch.testing.assert_close(one, both[:1].flip(2))


def test_masks_are_obeyed():
    layer = built(**TEXT)
    x, text, _ = states(layer, picture=False)
    bias = torch.tensor([[[0.0, -1e4, 0.0, -1e4]], [[-1e4, 0.0, 0.0, 0.0]]])
    found = attend(layer, x, text, bias, edit=lambda maps: maps)
    torch.testing.assert_close(found, layer(x, encoder_hidden_states=text, attention_mask=bias), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[:1], attend(layer, x[:1], text[:1, ::2], edit=lambda maps: maps))


def test_edited_maps_are_the_ones_used():
    """All attention of the first picture's second head on token 3, none of anything else's."""
    layer = built(**TEXT)
    x, text, _ = states(layer, picture=False)
    chosen = torch.zeros(2, 2, 15, 4)
    chosen[0, 1, :, 3] = 1
    found = attend(layer, x, text, edit=lambda maps: chosen)
    read = torch.zeros(8)
    read[4:] = layer.to_v.weight[4:] @ text[0, 3]
    torch.testing.assert_close(found[0], layer.to_out[0](read).expand(15, -1))
    torch.testing.assert_close(found[1], layer.to_out[0].bias.expand(15, -1))


def test_layers_for_other_processors_and_odd_states_are_refused():
    layer = built(added_kv_proj_dim=6)
    with pytest.raises(ValueError, match="attn: expected a layer without added_kv_proj_dim"):
        attend(layer, *states(layer, picture=False)[:2], edit=lambda maps: maps)
    layer = built(**TEXT)
    with pytest.raises(ValueError, match=r"hidden_states: expected 3 or 4 dimensions, got shape \(15, 32\)"):
        attend(layer, states(layer, picture=False)[0][0], edit=lambda maps: maps)
