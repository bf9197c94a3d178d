"""Break-A-Scene: several concepts out of one picture, each bound to a token of its own by masks.

Each new token should draw one of the objects that are marked in a single picture. Every step draws a random subset of
the concepts, asks for just those ("a photo of [v1] and [v3]"), and counts the denoising error within the union of
their masks only, so that the background is never learnt. That alone lets one token draw two objects; a second loss
holds each token's cross-attention to its own mask. At first only the embeddings are trained, fast, then the network
with them, slowly, beside pictures of the class that preserve what it knew. For several objects in few pictures; with
one object and a plain background, ordinary personalisation does.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor

from lossary import require
from lossary.diffusion._attention import attend
from lossary.paper import Paper

PAPER = Paper(
    title="Break-A-Scene: Extracting Multiple Concepts from a Single Image",
    year=2023,
    helps=("few-labels", "guidance"),
    departs=(
        "the loop is the caller's: 400 steps on the new embeddings alone at 5e-4, then 400 with a new optimizer on"
        " embeddings and all weights at 2e-6, the ordinary loss on pictures of the class added; so is the prompt and"
        " the order of concepts in it",
        "claims: a transformer of 56 thousand weights on 12x12 pictures that predicts x_0, trained first on 16 objects"
        " with a word each; no text encoder, no flips, handles start from random words",
    ),
    equation=(
        r"\mathcal L=\mathbb E\,\bigl\lVert(\epsilon-\epsilon_\theta(z_t,t,p_s))\odot M_s\bigr\rVert_2^2"
        r"+\lambda\sum_{i\in s}\mathbb E\,\bigl\lVert \mathrm{CA}_\theta(v_i,z_t)/\max\mathrm{CA}_\theta(v_i,z_t)"
        r"-M_i\bigr\rVert_2^2,\qquad M_s=\textstyle\bigcup_{i\in s}M_i"
    ),
    url="https://arxiv.org/abs/2305.16311",
)


def union_sampling(
    masks: Float[Tensor, "concepts height width"], shape: tuple[int, ...] = (), *, generator: Generator | None = None
) -> tuple[Bool[Tensor, "*shape concepts"], Float[Tensor, "*shape height width"]]:
    """A random subset of the concepts, never empty, and the union of its masks.

    How many is uniform from 1 to all, then which is uniform among those of that number.

    Args:
        masks: one for each concept, 0 to 1; they may overlap.
        shape: of the draws.
        generator: on the CPU.

    Returns:
        chosen: which concepts the prompt asks for.
        union: the largest of their masks, pixel by pixel.

    Raises:
        ValueError: masks without a concept, or not of three dimensions; a shape that is no tuple of whole numbers.

    >>> import torch
    >>> chosen, union = union_sampling(torch.eye(2)[:, None], (100,), generator=torch.Generator().manual_seed(0))
    >>> torch.equal(union[:, 0], chosen.float()), chosen.any(-1).all()
    (True, tensor(True))
    """
    require.floating("masks", masks, dims=3)
    n = len(masks)
    if not n:
        raise ValueError("masks: expected at least one concept, got none")
    if not isinstance(shape, tuple):
        raise ValueError(f"shape: expected a tuple of whole numbers, got {shape!r}")
    for size in shape:
        require.whole("shape", size)
    rank = torch.rand(*shape, n, generator=generator).argsort(-1).argsort(-1)
    number = torch.randint(1, n + 1, (*shape, 1), generator=generator)
    chosen = (rank < number).to(masks.device)
    return chosen, (masks * chosen[..., None, None]).amax(-3)


def masked_diffusion_loss(
    input: Float[Tensor, "*batch channels height width"],
    target: Float[Tensor, "*batch channels height width"],
    *,
    mask: Float[Tensor, "*batch mask_height mask_width"],
) -> Float[Tensor, "*batch"]:
    """|mask (input - target)|^2, the mean over channels and all pixels, those outside the mask included.

    Args:
        input: what the network predicts: noise, v or x_0.
        target: what it should.
        mask: 0 to 1, resized to the nearest pixel where its size is another; all zeros give 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> masked_diffusion_loss(torch.ones(3, 2, 2), torch.zeros(3, 2, 2), mask=torch.tensor([[1.0, 0.0]]))
    tensor(0.5000)
    """
    require.floating("input", input, at_least_dims=3)
    require.same_shape("target", target, tuple(input.shape))
    _leading("mask", mask, tuple(input.shape[:-3]))
    within = _resized(mask, tuple(input.shape[-2:])).unsqueeze(-3)
    return ((input - target) * within).square().mean((-3, -2, -1))


def cross_attention_mask_loss(
    attention: Float[Tensor, "*batch concepts height width"],
    masks: Float[Tensor, "*batch concepts mask_height mask_width"],
    *,
    chosen: Bool[Tensor, "*batch concepts"] | None = None,
) -> Float[Tensor, "*batch"]:
    """The mean square of a concept's attention over its largest value minus its mask, summed over the concepts.

    The paper weighs it by 0.01 beside the masked diffusion loss.

    Args:
        attention: of each concept's token, the mean over heads and layers, at least 0; a map of zeros stays one.
        masks: 0 to 1, resized to the nearest pixel where their size is another.
        chosen: concepts that the prompt asks for; None is all. Maps of the others are ignored.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> import torch
    >>> maps = torch.tensor([[[0.1, 0.2]], [[0.3, 0.0]]])
    >>> cross_attention_mask_loss(maps, torch.tensor([[[1.0, 1.0]], [[1.0, 0.0]]]))
    tensor(0.1250)
    """
    require.floating("attention", attention, at_least_dims=3)
    _leading("masks", masks, tuple(attention.shape[:-2]))
    highest = attention.amax((-2, -1), keepdim=True)
    highest = torch.where(highest > 0, highest, 1.0)  # a small number instead would make the gradient huge
    error = (attention / highest - _resized(masks, tuple(attention.shape[-2:]))).square().mean((-2, -1))
    if chosen is not None:
        if chosen.dtype is not torch.bool or chosen.shape != error.shape:
            raise ValueError(f"chosen: expected bool of shape {tuple(error.shape)}, got {chosen.dtype} {chosen.shape}")
        error = torch.where(chosen, error, 0.0)
    return error.sum(-1)


class CrossAttentionRecorder:
    """A processor of diffusers' attention that keeps the maps of cross-attention, with their gradients.

    Set one for all layers: `unet.set_attn_processor(recorder)`; it computes what diffusers' default processor does,
    though not in fused kernels. Of each layer the latest map of each size counts, so that passes before the last, and
    what gradient checkpointing computes again, take no more memory; call `maps` after every forward pass, before
    `backward`. Checkpointing must be of the kind without re-entry, which is diffusers' own: the other has no gradients
    outside of `backward`.

    >>> CrossAttentionRecorder().maps((16, 16))
    Traceback (most recent call last):
    ...
    ValueError: size: no cross-attention of 16x16 was seen
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, int], Tensor] = {}  # by layer and number of pixels

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

        def record(maps: Tensor) -> Tensor:
            if encoder_hidden_states is not None:
                self._seen[id(attn), maps.shape[2]] = maps.mean(1)
            return maps

        return attend(attn, hidden_states, encoder_hidden_states, attention_mask, temb, edit=record)

    def maps(self, size: tuple[int, int]) -> Float[Tensor, "batch tokens height width"]:
        """Mean over heads and the layers of that size, which is 16x16 in the paper; then forgets all.

        Raises:
            ValueError: no layer had that size.
        """
        found = [m for (_, pixels), m in self._seen.items() if pixels == math.prod(size)]
        self._seen = {}
        if not found:
            raise ValueError(f"size: no cross-attention of {size[0]}x{size[1]} was seen")
        return torch.stack(found).mean(0).mT.unflatten(-1, size)


def _leading(name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    require.floating(name, mask, at_least_dims=2)
    if tuple(mask.shape[:-2]) != shape:
        raise ValueError(f"{name}: expected shape {(*shape, 'height', 'width')}, got {tuple(mask.shape)}")


def _resized(mask: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(mask.shape[-2:]) == size:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:])
    return F.interpolate(flat, size).reshape(*mask.shape[:-2], *size)
