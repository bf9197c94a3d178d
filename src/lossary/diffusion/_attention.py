"""diffusers' attention with the maps in sight: what a processor needs that reads or edits them.

unet.set_attn_processor(processor)  # whose __call__ ends in attend(attn, hidden_states, ..., edit=...)
"""

from collections.abc import Callable
from typing import Any

from jaxtyping import Float
from torch import Tensor

Edit = Callable[[Tensor], Tensor]
"""edit(maps (batch, heads, pixels, tokens), probabilities) -> maps of the same shape."""


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
        attn: a `diffusers.models.attention_processor.Attention`.
        hidden_states, encoder_hidden_states, attention_mask, temb: as diffusers calls a processor; without encoder
            states it is self-attention.
        edit: see `Edit`; called once. It may only look.

    Raises:
        ValueError: a layer with keys of its own for the text, which wants another processor.
    """
    if attn.add_k_proj is not None:
        raise ValueError("attn: expected a layer without added_kv_proj_dim, got one with")
    residual = hidden_states
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    picture = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
    if picture is not None:
        hidden_states = hidden_states.flatten(2).mT
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.mT).mT
    context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
    if encoder_hidden_states is not None and attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)
    query, key, value = (
        attn.head_to_batch_dim(project(states))
        for project, states in ((attn.to_q, hidden_states), (attn.to_k, context), (attn.to_v, context))
    )
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    attention_mask = attn.prepare_attention_mask(attention_mask, context.shape[1], len(context))
    maps = attn.get_attention_scores(query, key, attention_mask)
    maps = edit(maps.unflatten(0, (len(context), -1))).flatten(0, 1)
    output = attn.to_out[1](attn.to_out[0](attn.batch_to_head_dim(maps @ value)))
    if picture is not None:
        output = output.mT.unflatten(2, picture)
    if attn.residual_connection:
        output = output + residual
    return output / attn.rescale_output_factor  # type: ignore[no-any-return]
