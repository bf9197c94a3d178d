"""Error norm truncation: does it learn a language from noisy text better than likelihood, or than cutting high losses?

The language has 32 tokens and a memory of two. After half of the tokens the next one is nearly certain, after the
others many may follow, which is where a high loss and a large error say different things. In the training text
40% of the next tokens are replaced by random ones. What is scored is the exact expected log-loss on clean text.
"""

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import auroc, cross_entropy, fit, stacked_mlp
from lossary.weighting import ErrorNormTruncationLoss, error_norm

TOKENS, NOISE, TRAIN, TEST = 32, 0.4, 4000, 1000
RATES = (0.003, 0.01, 0.03)
PLAIN = [{"lr": lr, "weight_decay": decay} for lr in RATES for decay in (0.0, 0.001, 0.01, 0.1)]
BY_NORM = [{"lr": lr, "threshold": cut} for lr in RATES for cut in (1.05, 1.1, 1.15, 1.2)]
BY_LOSS = [{"lr": lr, "dropped": share} for lr in RATES for share in (0.1, 0.2, 0.3, 0.4)]


def _language(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Contexts x (S, N, 64), what follows (S, N), whether it was replaced, and its true distribution (S, N, 32)."""
    rows = TRAIN + TEST
    drawn: list[tuple[np.ndarray, ...]] = []
    for rng in seeds.numpy("language"):
        context = rng.integers(TOKENS, size=(rows, 2))
        effects = rng.standard_normal((2, TOKENS, TOKENS))
        sharpness = np.where(np.arange(TOKENS) % 2, 4.0, 0.7)[context[:, 1], None]
        logits = sharpness * (effects[0, context[:, 0]] + effects[1, context[:, 1]])
        truth = np.exp(logits - logits.max(1, keepdims=True))
        truth /= truth.sum(1, keepdims=True)
        token = (truth.cumsum(1) < rng.random((rows, 1))).sum(1).clip(max=TOKENS - 1)
        replaced = rng.random(rows) < NOISE
        drawn.append((context, np.where(replaced, rng.integers(TOKENS, size=rows), token), replaced, truth))
    context, token, replaced, truth = (torch.from_numpy(np.stack(values)) for values in zip(*drawn))
    return F.one_hot(context, TOKENS).flatten(-2).float(), token, replaced, truth


def _dropping(share: float, start: int) -> Callable[[Tensor], Tensor]:
    """Loss truncation: weights that leave out this share of a batch, the highest losses, once the start is over."""
    calls = count()

    def weights(losses: Tensor) -> Tensor:
        if next(calls) < start:
            return torch.ones_like(losses)
        return (losses <= losses.quantile(1 - share, dim=-1, keepdim=True)).to(losses.dtype)

    return weights


def _trained(
    seeds: Seeds, *, lr: float, weight_decay: float = 0.0, threshold: float | None = None, dropped: float = 0.0
) -> tuple[torch.nn.Module, Tensor, Tensor, Tensor, Tensor]:
    """A model of the noisy text, and the language. Both kinds of truncation set in after a quarter of the steps."""
    x, token, replaced, truth = _language(seeds)
    model = stacked_mlp((2 * TOKENS, 128, TOKENS), seeds)
    steps = seeds.few(400)
    fit(
        model,
        x[:, :TRAIN],
        token[:, :TRAIN],
        loss=cross_entropy if threshold is None else ErrorNormTruncationLoss(threshold=threshold, warmup=steps // 4),
        seeds=seeds,
        steps=steps,
        batch=128,
        optimizer=partial(torch.optim.Adam, lr=lr, weight_decay=weight_decay),
        weighting=_dropping(dropped, steps // 4) if dropped else None,
    )
    return model, x, token, replaced, truth


@torch.no_grad()
def _log_loss(seeds: Seeds, **setting: Any) -> Tensor:
    """Expected log-loss of the next token in clean text, in nats, per seed."""
    model, x, _, _, truth = _trained(seeds, **setting)
    log_p = model(x[:, TRAIN:]).double().log_softmax(-1)
    return -(truth[:, TRAIN:] * log_p).sum(-1).mean(-1)


def _compare(seeds: Seeds, baseline: list[dict[str, float]]) -> Arms:
    cut, other = (tune(_log_loss, grid, seeds, better="lower") for grid in (BY_NORM, baseline))
    return Arms(_log_loss(seeds, **cut), _log_loss(seeds, **other), {"method": cut, "baseline": other})


@claim(
    says="Trained on noisy text, truncation by error norm predicts clean text better than maximum likelihood",
    kind="superiority",
    metric="log-loss",
    scale="second-order language of 32 tokens, 40% of them random, MLP 64-128-32, 400 steps of 128; 12 settings each",
)
def error_norm_truncation_beats_likelihood(seeds: Seeds) -> Arms:
    return _compare(seeds, PLAIN)


@claim(
    says="Trained on noisy text, truncation by error norm predicts clean text better than dropping the highest losses",
    kind="superiority",
    metric="log-loss",
    scale="second-order language of 32 tokens, 40% of them random, MLP 64-128-32, 400 steps of 128; 12 settings each",
)
def error_norm_truncation_beats_loss_truncation(seeds: Seeds) -> Arms:
    return _compare(seeds, BY_LOSS)


@claim(
    says="Under a model trained with maximum likelihood, the error norm finds replaced tokens better than the loss",
    kind="superiority",
    metric="AUROC",
    scale="second-order language of 32 tokens, 40% of them random, MLP 64-128-32, 400 steps of 128, Adam at 0.01",
)
def the_error_norm_finds_wrong_tokens(seeds: Seeds) -> Arms:
    model, x, token, replaced, _ = _trained(seeds, lr=0.01)
    with torch.no_grad():
        logits = model(x[:, TRAIN:])
    token, replaced = token[:, TRAIN:], replaced[:, TRAIN:]
    return Arms(auroc(error_norm(logits, token), replaced), auroc(cross_entropy(logits, token), replaced))
