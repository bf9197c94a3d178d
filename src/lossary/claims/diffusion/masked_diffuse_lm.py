"""Masked-Diffuse LM: does taking important words first help, and cross-entropy instead of squared errors?

The texts are random Markov chains, some of whose words are far more frequent than others; the pairs of words found are
held against the truth. All arms have normalised embeddings of their own, the same network and the same budget.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    NormalizedEmbedding,
    SoftMaskedNoise,
    categorical_denoising_loss,
    embedding_diffusion_anchor_loss,
    soft_masked_sample,
    word_importance,
)
from lossary.tasks.tokens import chains, fit_tokens, pair_error, stacked_token_net, texts_of

TOKENS, LENGTH, WIDTH = 8, 9, 8
STEPS = 20  # evaluations of a sample
RATES = (0.001, 0.003, 0.01)
FULL = {"buckets": 3, "squares": False}


class _Model(nn.Module):
    """Embeddings and the network that names or denoises them, for every seed."""

    def __init__(self, seeds: Seeds, squares: bool) -> None:
        super().__init__()
        tables = [torch.randn(TOKENS, WIDTH, generator=g) / WIDTH**0.5 for g in seeds.torch("table")]
        self.embedding, self.squares = NormalizedEmbedding(torch.stack(tables)), squares
        self.network = stacked_token_net(LENGTH, WIDTH, WIDTH if squares else TOKENS, seeds)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits of the words."""
        found = self.network(x, t)
        return self.embedding.logits(found) if self.squares else found


def _ranking(texts: Callable[[int, Sequence[Generator]], Tensor], seeds: Seeds) -> Callable[[Tensor], Tensor]:
    """Importance by the frequencies of a corpus of each seed."""
    corpus = texts(500, seeds.torch("corpus"))
    each = [torch.bincount(c.flatten(), minlength=TOKENS) + 1 for c in corpus]
    has = [(c[:, None] == torch.arange(TOKENS)[:, None]).any(-1).sum(0) + 1 for c in corpus]
    frequency, documents = [n / n.sum() for n in each], [n / (len(corpus[0]) + 1) for n in has]

    def importance(words: Tensor) -> Tensor:
        rows = zip(words, frequency, documents)
        return torch.stack([word_importance(w, frequency=p, document_frequency=d) for w, p, d in rows])

    return importance


def _pairs(seeds: Seeds, *, buckets: int, squares: bool, lr: float) -> list[float]:
    languages, model, noise = chains(TOKENS, LENGTH, seeds), _Model(seeds, squares), SoftMaskedNoise(buckets=buckets)
    texts = texts_of(languages)
    importance = _ranking(texts, seeds)

    def loss(model: _Model, clean: Tensor, t: Tensor, generators: Sequence[Generator]) -> Tensor:
        z = model.embedding(clean)
        fresh = torch.stack([torch.randn(z.shape[1:], generator=g) for g in generators])
        x = noise.noised(z, importance(clean), t.float(), fresh)
        if squares:
            found = model.network(x, t)
            return embedding_diffusion_anchor_loss(found, clean, embedding=model.embedding, anchor=False)
        return categorical_denoising_loss(model(x, t), clean)

    fit_tokens(model, texts, loss=loss, seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr)
    shape = (seeds.few(1000, smoke=8), LENGTH, WIDTH)
    start = torch.stack([torch.randn(shape, generator=g) for g in seeds.torch("start")])
    with torch.no_grad():
        found = soft_masked_sample(
            model,
            model.embedding,
            importance,
            start,
            noise=noise,
            steps=seeds.few(STEPS, smoke=2),
            generator=seeds.torch("draw")[0],
        )
    return pair_error(found, languages).tolist()


def _compare(baseline: dict, seeds: Seeds) -> Arms:
    ours, theirs = (
        tune(_pairs, [{**arm, "lr": lr} for lr in RATES], seeds, better="lower") for arm in (FULL, baseline)
    )
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_pairs(seeds, **ours), _pairs(seeds, **theirs), details)


@claim(
    says="Important words first and cross-entropy at every step beat plain noise with squared errors of embeddings",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 9, 400 steps; 3 rates each",
)
def masked_diffuse_beats_embedding_diffusion(seeds: Seeds) -> Arms:
    return _compare({"buckets": 1, "squares": True}, seeds)


@claim(
    says="Important words first is an improvement by itself, cross-entropy in both",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 9, 400 steps; 3 rates each",
)
def order_beats_plain_noise(seeds: Seeds) -> Arms:
    return _compare({"buckets": 1, "squares": False}, seeds)


@claim(
    says="So is cross-entropy instead of squared errors, important words first in both",
    kind="superiority",
    metric="mode error",
    scale="total variation of pairs, 20 evaluations; Markov chains of 8 words, length 9, 400 steps; 3 rates each",
)
def cross_entropy_beats_squares(seeds: Seeds) -> Arms:
    return _compare({"buckets": 3, "squares": True}, seeds)


@claim(
    says="Read literally, one schedule shared by three buckets ends with 43% of the signal of the first two unspoilt",
    kind="exact",
    metric="deviation",
    tolerance=1e-3,
    scale="alpha^2 at t = 1 against (1 - sqrt(1/3)) / 0.99, (1 - sqrt(2/3)) / (1 - sqrt(1/3)) and 0; random importance",
)
def literal_noise_leaves_words_readable(seeds: Seeds) -> Arms:
    noise, gaps = SoftMaskedNoise(buckets=3, literal=True), []
    third, two = (1 / 3) ** 0.5, (2 / 3) ** 0.5
    expected = torch.tensor([(1 - third) / 0.99, (1 - two) / (1 - third), 0.0])
    for g in seeds.torch("importance"):
        importance = torch.rand(LENGTH, generator=g)
        kept = noise.kept(importance, torch.tensor(1.0))
        gaps.append((kept[importance.argsort(descending=True)] - expected.repeat_interleave(3)).abs().max().item())
    return Arms(gaps)


def draw(seeds: Seeds) -> list[Panel]:
    """How much of each word is left, time running to the right, the most important word on top."""
    panels, importance = [], torch.linspace(1, 0, LENGTH)
    for name, noise in (
        ("all words alike", SoftMaskedNoise(buckets=1)),
        ("important words first", SoftMaskedNoise()),
        ("the same, read literally", SoftMaskedNoise(literal=True)),
    ):
        kept = torch.stack([noise.kept(importance, t) for t in torch.linspace(0, 1, 3 * LENGTH)], dim=1)
        panels.append(Panel(name, image=kept.numpy()))
    return panels
