"""diffusers' attention in three parts, of which a processor may replace the middle one.

unet.set_attn_processor(processor)  # whose __call__ asks for inputs, attends, and returns outputs; or ends in attend
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""edit(maps (batch, heads, pixels, tokens), probabilities) -> maps of the same shape."""


def inputs(
    attn: Any,
    hidden_states: Float[Tensor, "batch pixels width"] | Float[Tensor, "batch width height columns"],
    encoder_hidden_states: Float[Tensor, "batch tokens wide"] | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries (batch, heads, pixels, d), keys and values (batch, heads, tokens, d), and what is added to scores.

    Args:
        attn: a `diffusers.models.attention_processor.Attention`.
        hidden_states, encoder_hidden_states, attention_mask, temb: as diffusers calls a processor; without encoder
            states it is self-attention.

    Returns:
        After the layer's norms and projections; the mask is None, or fits (batch, heads, pixels, tokens).

    Raises:
        ValueError: states that are neither a sequence nor pictures, or a layer with keys of its own for the text,
            which wants another processor.
    """
    if attn.add_k_proj is not None:
        raise ValueError("attn: expected a layer without added_kv_proj_dim, got one with")
    if hidden_states.ndim not in (3, 4):
        raise ValueError(f"hidden_states: expected 3 or 4 dimensions, got shape {tuple(hidden_states.shape)}")
    states = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
    if states.ndim == 4:
        states = states.flatten(2).mT
    if attn.group_norm is not None:
        states = attn.group_norm(states.mT).mT
    query = _split(attn, attn.to_q(states), attn.norm_q)
    if encoder_hidden_states is None:
        key, value = _keys_and_values(attn, states)
    else:
        key, value = keys_and_values(attn, encoder_hidden_states)
    mask = attn.prepare_attention_mask(attention_mask, key.shape[2], len(key))
    return query, key, value, None if mask is None else mask.view(len(key), attn.heads, -1, mask.shape[-1])


def keys_and_values(attn: Any, text: Float[Tensor, "batch tokens wide"]) -> tuple[Tensor, Tensor]:
    """A layer's keys and values (batch, heads, tokens, d) of a text, after its norms."""
    return _keys_and_values(attn, text if attn.norm_cross is None else attn.norm_encoder_hidden_states(text))


def outputs(
    attn: Any,
    found: Float[Tensor, "batch heads pixels d"],
    hidden_states: Float[Tensor, "batch pixels width"] | Float[Tensor, "batch width height columns"],
) -> Tensor:
    """What a layer returns, of the shape of `hidden_states`: what was found, projected; residual and rescaling."""
    output = attn.to_out[1](attn.to_out[0](found.transpose(1, 2).flatten(2)))
    if hidden_states.ndim == 4:
        output = output.mT.unflatten(2, hidden_states.shape[2:])
    if attn.residual_connection:
        output = output + hidden_states
    return output / attn.rescale_output_factor  # type: ignore[no-any-return]


def attend(
    attn: Any,
    hidden_states: Float[Tensor, "batch pixels width"] | Float[Tensor, "batch width height columns"],
    encoder_hidden_states: Float[Tensor, "batch tokens wide"] | None = None,
    attention_mask: Tensor | None = None,
    temb: Tensor | None = None,
    *,
    edit: Edit,
) -> Tensor:
    """The output of a layer of diffusers, norms, residual and rescaling included, with its maps edited on the way.

    With an edit that changes nothing it is what diffusers' default processor computes, out of fused kernels.

    Args:
        attn, hidden_states, encoder_hidden_states, attention_mask, temb: as `inputs` takes them.
        edit: see `Edit`; called once. It may only look.

    Raises:
        ValueError: what `inputs` refuses.
    """
    query, key, value, mask = inputs(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
    flat = None if mask is None else mask.flatten(0, 1)
    maps = attn.get_attention_scores(query.flatten(0, 1), key.flatten(0, 1), flat)
    return outputs(attn, edit(maps.unflatten(0, query.shape[:2])) @ value, hidden_states)


def _keys_and_values(attn: Any, states: Tensor) -> tuple[Tensor, Tensor]:
    return _split(attn, attn.to_k(states), attn.norm_k), _split(attn, attn.to_v(states), None)


def _split(attn: Any, projected: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(batch, places, width) to (batch, heads, places, width / heads)."""
    heads = projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    return heads if norm is None else norm(heads)
