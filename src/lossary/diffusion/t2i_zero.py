"""Multi-Concept T2I-Zero: two edits of a prompt, without training, against one concept swallowing another.

In a prompt of several objects a text encoder lets each token carry bits of the others, so that one object dominates
or properties leak. `correct_by_similarities` rebuilds a concept's embedding from those dimensions that it and its
neighbours share most; `cross_token_nms` lets, at each pixel, only the strongest of the concepts' cross-attentions
stand. They cost next to nothing and need no gradients: worth a try before methods that optimise at every step. Where
concepts should overlap, or the wrong objects come out even alone, they cannot help.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lossary import require
from lossary.diffusion._attention import attend
from lossary.paper import Paper

PAPER = Paper(
    title="Multi-Concept T2I-Zero: Tweaking Only The Text Embeddings and Nothing Else",
    year=2023,
    helps=("guidance",),
    departs=(
        "no official code was found: built from the algorithms as reviews quote them and from a re-implementation",
        "stand-ins: the threshold is a share of the largest similarity, since the paper has it between 0 and 1 (the"
        " re-implementation takes a quantile); strength 0.5; the winner is found in each head by itself",
        "beside a dimension far larger than all in every token, as in CLIP's last states, nothing passes that"
        " threshold, and it is added up over the neighbours; per_dimension is ours, against the first of the two",
        "what suppression takes away is not given to other tokens; blurring repeats the edge",
        "claims: a transformer of 58 thousand weights on 12x12 pictures, whose text encoder is random vectors with"
        " those before mixed in; no classifier-free guidance",
    ),
    equation=(
        r"\tilde f_c=(1-\alpha)f_c+\alpha\sum_i\psi_i\,\tilde S_i\odot f_i,\quad \tilde S=T_\tau(f_c\odot f);\qquad "
        r"\tilde A_{c}(p)=A_c(p)\,\mathbf 1\bigl[c=\arg\max_{c'\in C}(G*A_{c'})(p)\bigr]"
    ),
    url="https://multi-concept-t2i-zero.github.io/",
)


def correct_by_similarities(
    embeddings: Float[Tensor, "*batch tokens width"],
    concepts: Sequence[int],
    *,
    window: int = 2,
    threshold: float = 0.1,
    strength: float = 0.5,
    per_dimension: bool = False,
) -> Float[Tensor, "*batch tokens width"]:
    """The embeddings, with each concept's drawn towards sum_i S_i f_i over its neighbours i, itself among them.

    S_i = f_c f_i, number by number, over its largest value among all tokens, and 0 where that is at most `threshold`.
    All concepts are corrected from the embeddings as they came.

    Warning: the largest value is one for all dimensions. If all tokens share a dimension far larger than the rest, as
    the last states of CLIP's text encoder do, nothing else passes the threshold: the other dimensions fall to
    1 - strength, and that one grows to 1 + 2 window strength of itself, thrice at the defaults. Look at
    `embeddings.abs().amax(-2)` first, and then take `per_dimension` or a smaller window.

    Args:
        embeddings: f, of a prompt, as `encode_prompt` of a diffusers pipeline gives it.
        concepts: positions of the concepts' tokens; none changes nothing.
        window: gamma, neighbours on either side.
        threshold: tau, from 0 to 1.
        strength: alpha, from 0, no change.
        per_dimension: divide by the largest value in each dimension by itself, so that none hides the others; a large
            one that is shared is still added up over the neighbours.

    Raises:
        ValueError: a position beyond the tokens or given twice, or a number out of range.

    >>> import torch
    >>> correct_by_similarities(torch.tensor([[1.0, 0.0], [2.0, 0.1]]), [1], threshold=0.2)[1]
    tensor([2.2500, 0.0500])
    """
    require.floating("embeddings", embeddings, at_least_dims=2)
    require.whole("window", window)
    require.number("threshold", threshold, at_least=0.0, below=1.0)
    require.number("strength", strength, at_least=0.0)
    corrected = embeddings.clone()
    for c in _distinct(concepts, tokens=embeddings.shape[-2]):
        concept = embeddings[..., c, :]
        alike = concept.unsqueeze(-2) * embeddings
        highest = alike.amax(-2 if per_dimension else (-2, -1), keepdim=True)
        share = alike / torch.where(highest > 0, highest, 1.0)
        drawn = torch.where(share > threshold, share, 0.0) * embeddings
        near = drawn[..., max(0, c - window) : c + window + 1, :].sum(-2)
        corrected[..., c, :] = (1 - strength) * concept + strength * near
    return corrected


def cross_token_nms(
    attention: Float[Tensor, "*batch height width tokens"],
    concepts: Sequence[int],
    *,
    kernel: int = 3,
    sigma: float = 1.0,
    shared: bool = False,
) -> Float[Tensor, "*batch height width tokens"]:
    """Cross-attention with, at each pixel, only the concept left whose blurred map is the largest there.

    Other tokens keep theirs, so the sum over tokens falls below 1. Of equals the first in `concepts` wins.

    Args:
        attention: probabilities; each of *batch, heads among them, has winners of its own.
        concepts: positions of the concepts' tokens; fewer than two change nothing.
        kernel, sigma: of the Gaussian blur, an odd number of pixels, and its standard deviation in pixels.
        shared: instead find the winners from the mean over the last dimension of *batch, the heads.

    Raises:
        ValueError: a position beyond the tokens or given twice, an even kernel, a sigma not above 0, or no heads to
            share.

    >>> import torch
    >>> cross_token_nms(torch.tensor([[[0.2, 0.5, 0.3], [0.2, 0.3, 0.5]]]), [1, 2])
    tensor([[[0.2000, 0.5000, 0.0000],
             [0.2000, 0.0000, 0.5000]]])
    """
    require.floating("attention", attention, at_least_dims=4 if shared else 3)
    _require_blur(kernel, sigma)
    chosen = _distinct(concepts, tokens=attention.shape[-1])
    if len(chosen) < 2:
        return attention.clone()
    maps = attention[..., chosen].movedim(-1, -3)
    if shared:
        maps = maps.mean(-4, keepdim=True)
    distance = torch.arange(kernel, dtype=maps.dtype, device=maps.device) - kernel // 2
    bell = (-0.5 * (distance / sigma).square()).exp()
    weight = torch.outer(bell, bell)
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    padded = F.pad(flat, [kernel // 2] * 4, mode="replicate")
    blurred = F.conv2d(padded, (weight / weight.sum())[None, None]).reshape(maps.shape)
    won = F.one_hot(blurred.argmax(-3), len(chosen)).to(attention.dtype)
    suppressed = attention.clone()
    suppressed[..., chosen] *= won
    return suppressed


class CrossTokenNMSAttnProcessor:
    """A processor of diffusers' attention with `cross_token_nms` in cross-attention; self-attention stays as it is.

    Set one for all layers: `unet.set_attn_processor(processor)`. It computes maps out of fused kernels.

    Args:
        concepts: positions of the concepts' tokens.
        aspect: height over width of the picture.
        guided: the first half of the batch is the unconditional prompt, which is left alone.
        kernel, sigma, shared: see `cross_token_nms`.

    Attributes:
        active: whether it suppresses; a callback may switch it off after the early steps, which settle the layout.

    Raises:
        ValueError: an aspect that is not above 0, or what `cross_token_nms` refuses; when called, a position beyond the
            tokens, or an aspect that the pixels do not have.

    >>> CrossTokenNMSAttnProcessor([2, 5]).active
    True
    """

    def __init__(
        self,
        concepts: Sequence[int],
        *,
        aspect: float = 1.0,
        guided: bool = True,
        kernel: int = 3,
        sigma: float = 1.0,
        shared: bool = False,
    ) -> None:
        require.number("aspect", aspect, above=0.0)
        _require_blur(kernel, sigma)
        _distinct(concepts)
        self.concepts, self.aspect, self.guided, self.active = tuple(concepts), aspect, guided, True
        self.settings: dict[str, Any] = {"kernel": kernel, "sigma": sigma, "shared": shared}

    def __call__(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "batch pixels width"],
        encoder_hidden_states: Float[Tensor, "batch tokens wide"] | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        **ignored: Any,
    ) -> Tensor:
        """The layer's output; `attn` is a `diffusers.models.attention_processor.Attention`."""

        def suppress(maps: Tensor) -> Tensor:
            return self._suppressed(maps) if self.active and encoder_hidden_states is not None else maps

        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, edit=suppress)

    def _suppressed(self, maps: Float[Tensor, "batch heads pixels tokens"]) -> Tensor:
        height = round(math.sqrt(maps.shape[2] * self.aspect))
        if height * round(height / self.aspect) != maps.shape[2]:
            raise ValueError(f"aspect: {maps.shape[2]} pixels have no height over width of {self.aspect:g}")
        apart = maps.unflatten(2, (height, -1))
        alone, asked = apart.tensor_split([len(maps) // 2 if self.guided else 0])
        asked = cross_token_nms(asked, self.concepts, **self.settings)
        return torch.cat([alone, asked]).flatten(2, 3)


def _require_blur(kernel: int, sigma: float) -> None:
    require.whole("kernel", kernel, at_least=1)
    if kernel % 2 == 0:
        raise ValueError(f"kernel: expected an odd whole number, got {kernel}")
    require.number("sigma", sigma, above=0.0)


def _distinct(concepts: Sequence[int], *, tokens: int | None = None) -> list[int]:
    for c in concepts:
        require.whole("concepts", c, at_most=None if tokens is None else tokens - 1)
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"concepts: expected no position twice, got {list(concepts)}")
    return list(concepts)
