"""Difformer: do anchor loss, normalised embeddings and more noise give better texts from embeddings?

The texts are random Markov chains, so that the pairs of words found can be held against the truth.
"""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    NormalizedEmbedding,
    decode_embeddings,
    embedding_diffusion_anchor_loss,
    noise_factor_process,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._process import over
from lossary.tasks.tokens import chains, fit_tokens, pair_error, stacked_token_net, texts_of

TOKENS, LENGTH, WIDTH = 8, 8, 8
STEPS = 20  # evaluations of a sample
RATES = (0.001, 0.003, 0.01)
FULL = {"anchor": True, "normalise": True, "factor": 4.0}


class _Model(nn.Module):
    """Embeddings and the network that denoises them, for every seed."""

    def __init__(self, seeds: Seeds, width: int, normalise: bool) -> None:
        super().__init__()
        tables = [torch.randn(TOKENS, width, generator=g) / width**0.5 for g in seeds.torch("table")]
        self.embedding = NormalizedEmbedding(torch.stack(tables), normalise=normalise)
        self.network = stacked_token_net(LENGTH, width, width, seeds)


def _trained(seeds: Seeds, *, anchor: bool, normalise: bool, factor: float, lr: float, width: int = WIDTH):
    languages, model = chains(TOKENS, LENGTH, seeds), _Model(seeds, width, normalise)
    process = noise_factor_process(factor)
    denoise = Denoiser(model.network, process, "clean")

    def loss(model: _Model, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
        z = model.embedding(clean)
        noise = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
        sigma = process.ratio(0.99 * t).float()
        found = denoise(z + over(sigma, z) * noise, sigma)
        return embedding_diffusion_anchor_loss(found, clean, embedding=model.embedding, anchor=anchor)

    fit_tokens(model, texts_of(languages), loss=loss, seeds=seeds, steps=seeds.few(500, smoke=2), lr=lr)
    return model, languages


def _pairs(seeds: Seeds, **setting: object) -> list[float]:
    model, languages = _trained(seeds, **setting)
    denoise = Denoiser(model.network, noise_factor_process(1.0), "clean")
    shape = (len(seeds), seeds.few(1000, smoke=8), LENGTH)
    found = decode_embeddings(denoise, model.embedding, shape, steps=STEPS, generator=seeds.torch("draw")[0])
    return pair_error(found, languages).tolist()


def _compare(baseline: dict, seeds: Seeds) -> Arms:
    ours, theirs = (
        tune(_pairs, [{**arm, "lr": lr} for lr in RATES], seeds, better="lower") for arm in (FULL, baseline)
    )
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_pairs(seeds, **ours), _pairs(seeds, **theirs), details)


@claim(
    says="Anchor loss, normalised embeddings and noise factor 4 together beat plain embedding diffusion",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 8, 500 steps; 3 rates each",
)
def difformer_beats_embedding_diffusion(seeds: Seeds) -> Arms:
    return _compare({"anchor": False, "normalise": False, "factor": 1.0}, seeds)


@claim(
    says="Of these, cross-entropy at the predicted embedding instead of the clean one is an improvement by itself",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 8, 500 steps; 3 rates each",
)
def anchor_beats_rounding(seeds: Seeds) -> Arms:
    return _compare({**FULL, "anchor": False}, seeds)


@claim(
    says="And so is noise multiplied by 4 in training, though not in decoding",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 8, 500 steps; 3 rates each",
)
def more_noise_beats_plain_noise(seeds: Seeds) -> Arms:
    return _compare({**FULL, "factor": 1.0}, seeds)


@claim(
    says="The factor and its variance-preserving form are one process: the same ratio of noise to data at each time",
    kind="exact",
    metric="deviation",
    tolerance=1e-12,
    scale="relative difference of sigma / alpha, factors from 1 to 16, 100 times",
)
def both_forms_are_one(seeds: Seeds) -> Arms:
    gaps = []
    for g in seeds.torch("factors"):
        factor = 1 + 15 * torch.rand((), generator=g).item()
        t = torch.linspace(0, 0.99, 100, dtype=torch.float64)
        kept = 1 - (t + 1e-4).sqrt()
        paper = kept / (factor**2 - (factor**2 - 1) * kept)  # alpha^2 of the variance-preserving form
        plain, preserving = (noise_factor_process(factor, variance_preserving=v) for v in (False, True))
        expected = ((1 - paper) / paper).sqrt()
        gaps.append(max((p.ratio(t) / expected - 1).abs().max().item() for p in (plain, preserving)))
    return Arms(gaps)


def draw(seeds: Seeds) -> list[Panel]:
    """Embeddings of two dimensions, learned by either loss."""
    panels = []
    for name, anchor in (("rounding loss", False), ("anchor loss", True)):
        setting = {"anchor": anchor, "normalise": False, "factor": 4.0, "lr": 0.003, "width": 2}
        model, _ = _trained(seeds.one(0), **setting)
        table = model.embedding.weight[0].detach()
        panels.append(Panel(name, points=table.numpy(), labels=tuple(str(v) for v in range(TOKENS))))
    return panels
