"""LongAlign: long prompts sentence by sentence, and a preference score whose common part counts less.

CLIP reads 77 tokens; a longer prompt is cut into sentences, each encoded by itself and put one after another. To tune
a generator for alignment with a CLIP-like preference score, note that all text embeddings share a direction: the
score along it is the same whatever the text says and rates the picture as such, and a generator that is tuned on it
soon makes all pictures alike. `ReweightedPreferenceLoss` keeps a third of that part. For prompts of several
statements, and whenever a reward by cosine similarity is overfitted.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._process import over
from lossary.paper import Paper

PAPER = Paper(
    title="Improving Long-Text Alignment for Text-to-Image Diffusion Models",
    year=2025,
    helps=("guidance", "rare-modes"),
    departs=(
        "sentences end at . ! ? and ;, with blanks around them removed; the official pattern is quoted, so that ! and ;"
        " only count beside a quotation mark, and keeps the blanks",
        "T5's states, which the official code appends along the sequence, are the caller's, as are LoRA, crops and"
        " the preference model (Denscore)",
        "the claims tune small stacked networks on vectors by a preference model learnt from simulated choices",
    ),
    equation=(
        r"\mathcal R=\langle t',x\rangle,\quad t'=t-(1-\omega)\,\langle t,v\rangle\,v,\quad"
        r" v=\frac{\mathbb E[t]}{\lVert\mathbb E[t]\rVert},\quad"
        r" t=\frac1n\sum_{i=1}^n\frac{E(s_i)}{\lVert E(s_i)\rVert}"
    ),
    url="https://arxiv.org/abs/2410.11817",
)


def split_segments(prompts: Sequence[str]) -> tuple[list[str], Int[Tensor, " segments"]]:
    """Sentences of all prompts, each ending in a full stop, and which prompt each is of.

    Raises:
        ValueError: a string instead of a list of them, or no prompt.

    >>> split_segments(["A red ball. On grass!", "a cat", ""])
    (['A red ball.', 'On grass.', 'a cat.', ''], tensor([0, 0, 1, 2]))
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts: expected a list of at least one prompt, got {prompts!r}")
    segments, index = [], []
    for number, prompt in enumerate(prompts):
        sentences = [part.strip() + "." for part in re.split(r"[.!?;]", prompt) if part.strip()] or [prompt]
        segments += sentences
        index += [number] * len(sentences)
    return segments, torch.tensor(index)


@torch.no_grad()
def segment_encode(
    prompts: Sequence[str], tokenizer: Any, text_encoder: Callable[..., Any], *, length: int = 240
) -> Float[Tensor, "prompts length channels"]:
    """Token states of prompts of any length, each sentence encoded alone.

    All states but those of end-of-text and padding are kept, starts among them, in order; the rest of the length is
    filled with one vector, the mean of the last 60 padded states of the empty prompt.

    Args:
        prompts: texts.
        tokenizer: of transformers, with `model_max_length`, `pad_token_id` and `eos_token_id`.
        text_encoder: input_ids to something whose first element is the states (batch, tokens, channels), such as
            transformers' CLIPTextModel; ids go to its `device`, if it has one.
        length: L, to which states are cut or filled.

    Raises:
        ValueError: no prompts, or a length below 1.

    >>> from types import SimpleNamespace
    >>> class Tokenizer:
    ...     model_max_length, pad_token_id, eos_token_id = 4, 0, 0
    ...
    ...     def __call__(self, texts, **room):
    ...         return SimpleNamespace(input_ids=torch.tensor([[1, len(text), 0, 0] for text in texts]))
    >>> segment_encode(["One. Three."], Tokenizer(), lambda ids: [ids[..., None].float()], length=5)[0, :, 0]
    tensor([1.0000, 4.0000, 1.0000, 6.0000, 0.2500])
    """
    require.whole("length", length, at_least=1)
    segments, index = split_segments(prompts)
    device = getattr(text_encoder, "device", None)
    room = {"max_length": tokenizer.model_max_length, "truncation": True, "return_tensors": "pt"}
    ids = tokenizer(segments, padding=True, **room).input_ids.to(device)
    states = text_encoder(ids)[0]
    keep = (ids != tokenizer.pad_token_id) & (ids != tokenizer.eos_token_id)
    empty = tokenizer([""], padding="max_length", **room).input_ids.to(device)
    found = text_encoder(empty)[0][0, -60:].mean(0).repeat(len(prompts), length, 1)
    for number in range(len(prompts)):
        own = (index == number).to(ids.device)
        kept = states[own][keep[own]][:length]
        found[number, : len(kept)] = kept
    return found


def segment_mean(
    embeddings: Float[Tensor, "segments features"], index: Int[Tensor, " segments"], *, prompts: int | None = None
) -> Float[Tensor, "prompts features"]:
    """t: the mean of each prompt's segment embeddings, brought to unit norm before.

    Args:
        embeddings: of the text encoder, one for each segment.
        index: of the prompt, as `split_segments` gives it.
        prompts: how many; None is as many as the index names. One without segments is 0.

    Raises:
        ValueError: shapes or dtypes that do not fit.

    >>> segment_mean(torch.tensor([[2.0, 0.0], [0.0, 5.0], [0.0, 1.0]]), torch.tensor([0, 0, 1]))
    tensor([[0.5000, 0.5000],
            [0.0000, 1.0000]])
    """
    require.floating("embeddings", embeddings, dims=2)
    require.integers("index", index, shape=tuple(embeddings.shape[:1]))
    prompts = int(index.max()) + 1 if prompts is None else prompts
    own = (index == torch.arange(prompts, device=index.device)[:, None]).to(embeddings)
    return own @ F.normalize(embeddings, dim=-1) / own.sum(-1, keepdim=True).clamp(min=1)


def decompose_preference(
    image: Float[Tensor, "*replicas batch features"],
    text: Float[Tensor, "*replicas batch features"],
    *,
    common: Float[Tensor, "*replicas features"] | None = None,
) -> tuple[Float[Tensor, "*replicas batch"], Float[Tensor, "*replicas batch"]]:
    """The score <t, x> in two parts: across the texts' common direction and along it.

    Args:
        image: embeddings, brought to unit norm here.
        text: t, of unit norm or means of such, see `segment_mean`; no gradient goes through them.
        common: a mean of texts, of any norm, such as over the batches of all devices; None is that of this batch,
            which takes at least two: of one text alone nothing would be relevant.

    Returns:
        Text-relevant <t - (t.v) v, x>, and text-irrelevant (t.v) (v.x).

    Raises:
        ValueError: shapes or dtypes that do not fit, or fewer than two texts without `common`.

    >>> text = torch.tensor([[0.8, 0.6], [0.8, -0.6]])  # v is (1, 0)
    >>> decompose_preference(torch.tensor([[3.0, 4.0], [4.0, 3.0]]), text)
    (tensor([ 0.4800, -0.3600]), tensor([0.4800, 0.6400]))
    """
    require.floating("image", image, at_least_dims=2)
    require.same_shape("text", text, tuple(image.shape))
    text = text.detach()
    if common is None:
        if text.shape[-2] < 2:
            raise ValueError(f"common: expected a mean of texts for a batch of {text.shape[-2]}, got None")
        common = text.mean(-2)
    require.same_shape("common", common, (*text.shape[:-2], text.shape[-1]))
    v = F.normalize(common.detach(), dim=-1).unsqueeze(-2)
    x, along = F.normalize(image, dim=-1), (text * v).sum(-1, keepdim=True)
    return ((text - along * v) * x).sum(-1), (along * v * x).sum(-1)


class ReweightedPreferenceLoss(nn.Module):
    """(1 - R) / 2 for each pair, R the text-relevant part of the score and `weight` times the text-irrelevant one.

    Args:
        weight: omega, 0 to 1: 1 is the plain score, 0 only what depends on the text.

    Raises:
        ValueError: weight out of range.

    >>> text = torch.tensor([[0.8, 0.6], [0.8, -0.6]])
    >>> ReweightedPreferenceLoss(0.5)(torch.tensor([[3.0, 4.0], [1.0, 0.0]]), text)
    tensor([0.1400, 0.3000])
    """

    def __init__(self, weight: float = 0.3) -> None:
        super().__init__()
        require.number("weight", weight, at_least=0.0, at_most=1.0)
        self.weight = weight

    def forward(
        self,
        image: Float[Tensor, "*replicas batch features"],
        text: Float[Tensor, "*replicas batch features"],
        *,
        common: Float[Tensor, "*replicas features"] | None = None,
    ) -> Float[Tensor, "*replicas batch"]:
        """See `decompose_preference`."""
        relevant, irrelevant = decompose_preference(image, text, common=common)
        return (1 - relevant - self.weight * irrelevant) / 2


def spaced_gradients(
    denoise: Denoise, sigmas: Float[Tensor, " levels"], *, every: int = 10, offset: int = 0
) -> Denoise:
    """The same denoiser for a sampler whose samples a loss is put on, with gradients at one step in so many.

    The network sees x as a constant, and at other steps runs without gradient: memory is that of few steps. The
    sampler's linear path in x keeps its gradient at all steps.

    Args:
        denoise: denoise(x, sigma, *conditions), the network that is tuned.
        sigmas: the levels that the sampler will take; one level at a time.
        every: steps from one with gradient to the next: 10 of 50 in the paper.
        offset: the first of them, below `every`, in the paper a new one for each run.

    Raises:
        ValueError: fewer than two levels, or numbers out of range.

    >>> shift, x = torch.zeros(1, requires_grad=True), torch.ones(1)
    >>> tuned = spaced_gradients(lambda x, sigma: x - sigma * shift, torch.tensor([4.0, 3.0, 1.0]), every=2, offset=1)
    >>> for high, low in ((4.0, 3.0), (3.0, 1.0)):
    ...     x = x + (x - tuned(x, high)) * (low - high) / high
    >>> x.backward()
    >>> shift.grad  # of the second step alone
    tensor([-2.])
    """
    require.floating("sigmas", sigmas, dims=1)
    if len(sigmas) < 2:
        raise ValueError(f"sigmas: expected at least 2 levels, got {len(sigmas)}")
    require.whole("every", every, at_least=1)
    require.whole("offset", offset, at_most=every - 1)
    levels = sigmas[:-1]

    def spaced(x: Tensor, sigma: Tensor | float, *conditions: Any, **named: Any) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        step = int((levels.to(level) - level.flatten()[0]).abs().argmin())
        still, level = x.detach(), over(level, x)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step % every == offset):
            noise = (still - denoise(still, sigma, *conditions, **named)) / level
        return x - level * noise

    return spaced
