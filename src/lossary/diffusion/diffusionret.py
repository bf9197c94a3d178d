"""DiffusionRet: rerank a candidate list by diffusing its relevances, all of them together.

A dual encoder finds candidates by cosine; a small attention network then takes noise for their relevances to a
one-hot list, seeing query and candidates at every step, and what it ends with is added to the cosine. Candidates are
judged against each other, not one by one. For retrieval whose first stage is frozen, a few dozen candidates a query.
A diffusion learned perfectly would draw the relevant item from its posterior, not name the likeliest: several draws
and their mean are safer than one.
"""

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lossary import require
from lossary.diffusion._noise import Randomness, noise
from lossary.diffusion._process import Process, cosine, over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.paper import Paper

PAPER = Paper(
    title="DiffusionRet: Generative Text-Video Retrieval with Diffusion Model",
    year=2023,
    helps=("uncertainty",),
    departs=(
        "the encoders and their contrastive training are the caller's; this is the generative stage",
        "continuous time from 0 to 1 under a cosine schedule; the official code has 50 or 1000 steps",
        "masked frames get no weight and the others share all of it; the official code does not share it out anew",
        "starts just below time 1, where the noise still is finite",
    ),
    equation=(
        r"\hat x_0=\mathrm{MLP}\bigl([e,c_j]\bigr)+a_j,\qquad a=\operatorname{softmax}_j\bigl("
        r"W_q(q+\tau)\cdot W_k(c_j+\tau)+x_{t,j}\bigr),\qquad e=W_o\sum_j a_jW_v(c_j+\tau)"
    ),
    url="https://github.com/jpthu17/DiffusionRet",
)

Frames = Literal["candidates", "query"]

Relevance = Callable[..., Tensor]
"""model(x_t (*batch, C), t (*batch), query, candidates), with a mask behind where one is given, -> clean relevances
(*batch, C)."""

_FIRST = 0.99  # time from which samples start


class RetrievalDiffusion(nn.Module):
    """Noisy relevances of a list to clean ones, given query and candidates; the order of candidates does not matter.

    Args:
        width: d of the embeddings, even.
        frames: which side may be a sequence, "candidates" (videos for a text) or "query" (texts for a video). It is
            pooled for each pair, by softmax of the products with the other side.
        temperature: of that pooling.

    Raises:
        ValueError: an odd width, or a temperature that is not above 0.

    >>> model = RetrievalDiffusion(8)
    >>> model(torch.randn(2, 5), torch.ones(2), torch.randn(2, 8), torch.randn(2, 5, 3, 8)).shape  # 3 frames each
    torch.Size([2, 5])
    """

    def __init__(self, width: int, *, frames: Frames = "candidates", temperature: float = 1.0) -> None:
        super().__init__()
        require.whole("width", width, at_least=2)
        if width % 2:
            raise ValueError(f"width: expected an even number, got {width}")
        require.one_of("frames", frames, get_args(Frames))
        require.number("temperature", temperature, above=0.0)
        self.frames, self.temperature = frames, temperature
        self.query, self.key, self.value = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.decoder = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 1))

    def forward(
        self,
        x: Float[Tensor, "*batch C"],
        t: Float[Tensor, "*batch"],
        query: Float[Tensor, "..."],
        candidates: Float[Tensor, "..."],
        mask: Bool[Tensor, "..."] | None = None,
    ) -> Float[Tensor, "*batch C"]:
        """Clean relevances.

        Args:
            x: noisy relevances.
            t: their times, 0 to 1.
            query: (*batch, d), or (*batch, frames, d) where `frames` is "query".
            candidates: (*batch, C, d), or (*batch, C, frames, d) where `frames` is "candidates".
            mask: True for frames that count, at least one of each sequence; its shape without d.

        Raises:
            ValueError: candidates that do not fit x.
        """
        if tuple(candidates.shape[: x.ndim]) != tuple(x.shape):
            raise ValueError(f"candidates: expected {tuple(x.shape)} in front, got {tuple(candidates.shape)}")
        if self.frames == "candidates" and candidates.ndim == x.ndim + 2:
            match = torch.einsum("...d,...cfd->...cf", query, candidates)
            candidates = torch.einsum("...cf,...cfd->...cd", self._shares(match, mask), candidates)
        if self.frames == "query":
            match = torch.einsum("...cd,...fd->...cf", candidates, query)
            share = self._shares(match, None if mask is None else mask.unsqueeze(-2))
            query = torch.einsum("...cf,...fd->...cd", share, query)
        else:
            query = query.unsqueeze(-2)
        width = self.query.in_features
        falling = (-math.log(10_000.0) / width * torch.arange(0, width, 2, dtype=t.dtype, device=t.device)).exp()
        angle = 1000 * t.unsqueeze(-1) * falling
        tau = self.time(torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(-2)).unsqueeze(-2)
        weight = ((self.query(query + tau) * self.key(candidates + tau)).sum(-1) + x).softmax(-1)
        context = self.out((weight.unsqueeze(-1) * self.value(candidates + tau)).sum(-2))
        pairs = torch.cat([context.unsqueeze(-2).expand_as(candidates), candidates], dim=-1)
        return self.decoder(pairs).squeeze(-1) + weight  # type: ignore[no-any-return]

    def _shares(self, match: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            match = match.masked_fill(~mask, -math.inf)
        return (match / self.temperature).softmax(-1)


def relevance_diffusion_loss(
    model: Relevance,
    query: Float[Tensor, "..."],
    candidates: Float[Tensor, "..."],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    batch: int = 1,
    negative: float = 0.0,
    temperature: float = 100.0,
    process: Process | None = None,
    generator: Randomness = None,
) -> Float[Tensor, "*batch"]:
    """Cross-entropy of temperature times the predicted relevances, the relevant candidate being the first.

    Relevances are 1 for it and `negative` for the others, noised at a random time.

    Args:
        model: `RetrievalDiffusion`.
        query: *batch in front.
        candidates: (*batch, C, ...), the relevant one at 0, then hard negatives.
        mask: for the model, True for frames that count.
        batch: number of leading dimensions.
        negative: relevance of the others, 0 or -1 in the official code.
        temperature: 100 in the official code.
        process: of the noise, its time from 0 to 1; None is `cosine()`.
        generator: of times and noise; a sequence has one for each replica.

    Raises:
        ValueError: fewer than two candidates, or a temperature that is not above 0.

    >>> knows = lambda x, t, query, candidates: torch.tensor([[1.0, 0.0, 0.0]])
    >>> relevance_diffusion_loss(knows, torch.zeros(1, 4), torch.zeros(1, 3, 4), temperature=1.0)  # log(1 + 2 / e)
    tensor([0.5514])
    """
    require.floating("candidates", candidates, at_least_dims=batch + 2)
    require.number("negative", negative)
    require.number("temperature", temperature, above=0.0)
    if candidates.shape[batch] < 2:
        raise ValueError(f"candidates: expected at least 2 of them, got shape {tuple(candidates.shape)}")
    process = process or cosine()
    clean = candidates.new_full(candidates.shape[: batch + 1], negative)
    clean[..., 0] = 1.0
    t = noise(clean[..., 0], generator, kind=torch.rand)
    inputs = (query, candidates) if mask is None else (query, candidates, mask)
    found = model(process.noised(clean, noise(clean, generator), t), t, *inputs)
    return -(temperature * found).log_softmax(-1)[..., 0]


@torch.no_grad()
def diffusion_rerank(
    model: Relevance,
    similarity: Float[Tensor, "*replicas B N"],
    query: Float[Tensor, "..."],
    items: Float[Tensor, "..."],
    *,
    mask: Bool[Tensor, "..."] | None = None,
    top: int = 32,
    alpha: float = 1.0,
    steps: int = 50,
    draws: int = 1,
    process: Process | None = None,
    generator: Randomness = None,
) -> Float[Tensor, "*replicas B N"]:
    """Similarities, with alpha softmax(relevances) added for the `top` items of each query; `steps` evaluations a draw.

    Args:
        model: `RetrievalDiffusion`.
        similarity: cosines of the first stage.
        query: (*replicas, B, ...), items: (*replicas, N, ...), embeddings or sequences of them, for the model.
        mask: True for frames that count, (*replicas, N, frames) of items or, where query has more dimensions than
            those, (*replicas, B, frames) of queries; handed on to the model for its candidates.
        top: candidates that are reranked; all where there are fewer.
        alpha: weight of the relevances.
        steps: of DDIM, from noise, predictions cut to -1..1.
        draws: of which the mean is taken; 1 in the paper.
        process: as in training, its time from 0 to 1.
        generator: of the noise; a sequence has one for each replica.

    Raises:
        ValueError: shapes that do not fit, or numbers below 1.

    >>> second = lambda x, t, query, candidates: torch.tensor([[-1.0, 1.0]])
    >>> table = torch.tensor([[0.1, 0.5, 0.6]])  # the third is best; of it and the second, the second
    >>> diffusion_rerank(second, table, torch.zeros(1, 4), torch.zeros(3, 4), top=2)
    tensor([[0.1000, 1.3808, 0.7192]])
    """
    require.floating("similarity", similarity, at_least_dims=2)
    for name, value in (("top", top), ("steps", steps), ("draws", draws)):
        require.whole(name, value, at_least=1)
    require.number("alpha", alpha)
    lead, (rows, count) = tuple(similarity.shape[:-2]), similarity.shape[-2:]
    for name, tensor, wanted in (("query", query, (*lead, rows)), ("items", items, (*lead, count))):
        if tuple(tensor.shape[: len(wanted)]) != wanted:
            raise ValueError(f"{name}: expected {wanted} in front, got {tuple(tensor.shape)}")
    process = process or cosine()
    chosen = similarity.topk(min(top, count), dim=-1).indices
    inputs = [query, _taken(items, chosen)]
    if mask is not None:
        of_query = query.ndim > items.ndim
        wanted = tuple((query if of_query else items).shape[:-1])
        if tuple(mask.shape) != wanted or mask.ndim < similarity.ndim:
            raise ValueError(f"mask: expected sequences and shape {wanted}, got {tuple(mask.shape)}")
        inputs.append(mask if of_query else _taken(mask, chosen))

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = process.time(torch.full_like(x[..., 0], sigma))
        return model(over(process.alpha(t), x) * x, t, *inputs).clamp(-1, 1)

    sigmas, total = process_sigmas(process, steps, first=_FIRST), torch.zeros_like(similarity)
    blank = similarity.new_zeros(chosen.shape)
    for _ in range(draws):
        found = euler(denoise, sigmas[0].item() * noise(blank, generator), sigmas)
        total = total.scatter_add(-1, chosen, F.softmax(found, dim=-1))
    return similarity + alpha / draws * total


def _taken(items: Tensor, chosen: Tensor) -> Tensor:
    """For each query the chosen ones of its replica's items: (*replicas, B, C, ...)."""
    lead = chosen.ndim - 2
    flat = items.flatten(lead + 1)
    index = chosen.flatten(-2).unsqueeze(-1).expand(*chosen.shape[:lead], -1, flat.shape[-1])
    return flat.gather(-2, index).reshape(*chosen.shape, *items.shape[lead + 1 :])
