"""TempNet: do predicted temperatures give better probabilities than one, with the model or on top of a frozen one?

The contexts of the task differ in how many words may follow: their scores are spread by a factor of 0.5 to 4.
"""

from collections.abc import Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import TempNet, tau_cross_entropy
from lossary.tasks import cross_entropy, fit, log_loss, stacked_mlp

WORDS, CONTEXT, TRAIN = 50, 16, 3000


def _text(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Contexts (S, 6000, 16) and the words that follow (S, 6000); the last context number sets their spread."""
    contexts, words = [], []
    for rng in seeds.numpy("text"):
        context, meaning = rng.normal(size=(2 * TRAIN, CONTEXT)), rng.normal(size=(CONTEXT - 1, WORDS)) / 4
        spread = 0.5 * 8 ** (1 / (1 + np.exp(-3 * context[:, -1:])))
        score = spread * (context[:, :-1] @ meaning) + rng.gumbel(size=(2 * TRAIN, WORDS))
        contexts.append(torch.from_numpy(context.astype(np.float32)))
        words.append(torch.from_numpy(score.argmax(1)))
    return torch.stack(contexts), torch.stack(words)


def _plain(seeds: Seeds, lr: float) -> nn.Module:
    """A model for every seed, trained with cross-entropy."""
    (x, y), model = _text(seeds), stacked_mlp((CONTEXT, 64, WORDS), seeds)
    adam = partial(torch.optim.AdamW, lr=lr, fused=True)
    fit(model, x[:, :TRAIN], y[:, :TRAIN], loss=cross_entropy, seeds=seeds, steps=seeds.few(300), optimizer=adam)
    return model


@torch.no_grad()
def _one_temperature(seeds: Seeds, *, lr: float, tau: float) -> Tensor:
    """Log-loss on held-out words of a plain model's logits, divided by one temperature, per seed."""
    x, y = _text(seeds)
    return log_loss(_plain(seeds, lr)(x[:, TRAIN:]) / tau, y[:, TRAIN:])


def _predicted(seeds: Seeds, *, lr: float, rho: float, frozen: bool) -> Tensor:
    """Log-loss on held-out words of logits divided by TempNet's temperatures, per seed.

    One seed after another, so that none sees the others' dropout.
    """
    return torch.cat([_predicted_by_one(seeds.one(s), lr, rho, frozen) for s in range(len(seeds))])


def _predicted_by_one(seed: Seeds, lr: float, rho: float, frozen: bool) -> Tensor:
    (x, y), model = _text(seed), _plain(seed, lr) if frozen else stacked_mlp((CONTEXT, 64, WORDS), seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed.torch("tempnet")[0].initial_seed())
        tempnet = TempNet(WORDS, hidden=64, tau_min=0.1, tau_max=4.0)

        def loss(logits: Tensor, target: Tensor) -> Tensor:
            return tau_cross_entropy(logits, target, tau=tempnet(logits.detach()), rho=rho)

        def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
            groups = [{"params": tempnet.parameters(), "lr": 0.003}]
            if not frozen:
                groups.append({"params": list(parameters), "lr": lr})
            return torch.optim.AdamW(groups, fused=True)

        fit(model, x[:, :TRAIN], y[:, :TRAIN], loss=loss, seeds=seed, steps=seed.few(300), optimizer=adam)
    tempnet.eval()
    with torch.no_grad():
        logits = model(x[:, TRAIN:])
        return log_loss(logits / tempnet(logits).unsqueeze(-1), y[:, TRAIN:])


def _compare(seeds: Seeds, *, frozen: bool) -> Arms:
    ours = [{"lr": lr, "rho": rho, "frozen": frozen} for lr in (0.003, 0.01) for rho in (0.5, 1.0, 2.0)]
    theirs = [{"lr": lr, "tau": tau} for lr in (0.003, 0.01) for tau in (1.0, 1.25, 1.5)]
    method, baseline = (
        tune(score, grid, seeds, better="lower", n=2)
        for score, grid in ((_predicted, ours), (_one_temperature, theirs))
    )
    return Arms(
        _predicted(seeds, **method),
        _one_temperature(seeds, **baseline),
        {"method": method, "baseline": baseline},
    )


@claim(
    says="A model trained with TempNet predicts better than one trained with cross-entropy at its best temperature",
    kind="superiority",
    metric="log-loss",
    scale="50 synthetic words, scores spread 0.5 to 4 by context, MLP 16-64-50, 300 AdamW steps of 64; 6 settings each",
)
def tempnet_beats_one_temperature(seeds: Seeds) -> Arms:
    return _compare(seeds, frozen=False)


@claim(
    says="On top of a frozen model, TempNet predicts better than the best single temperature",
    kind="superiority",
    metric="log-loss",
    scale="50 synthetic words, scores spread 0.5 to 4 by context, MLP 16-64-50, 300 AdamW steps of 64; 6 settings each",
)
def tempnet_beats_one_temperature_on_a_frozen_model(seeds: Seeds) -> Arms:
    return _compare(seeds, frozen=True)
