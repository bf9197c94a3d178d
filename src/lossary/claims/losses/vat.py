"""Virtual adversarial training: with forty labels, do the other inputs teach a network where it should be smooth?

Every step sees labelled digits and as many unlabelled ones, on which the penalty acts.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import conditional_entropy_loss, vat_loss
from lossary.tasks import accuracy, cross_entropy, digits, fit, split, stacked_mlp

BATCH = 64
RATES = (0.03, 0.1)
PLAIN: list[dict[str, Any]] = [{"lr": lr, "weight_decay": decay} for lr in (0.01, 0.03, 0.1) for decay in (0.0, 0.01)]
VAT: list[dict[str, Any]] = [{"epsilon": epsilon, "lr": lr} for epsilon in (0.5, 1.0, 2.0) for lr in RATES]
RANDOM: list[dict[str, Any]] = [
    {"epsilon": epsilon, "steps": 0, "lr": lr} for epsilon in (1.0, 2.0, 4.0) for lr in RATES
]


def _labelled(y: Tensor, train: Tensor, seeds: Seeds) -> Tensor:
    """Four rows of each class of the training part, (S, 40)."""
    chosen = []
    for rows, rng in zip(train, seeds.numpy("labelled")):
        shuffled = rows[torch.from_numpy(rng.permutation(len(rows)))]
        chosen.append(torch.cat([shuffled[y[shuffled] == c][:4] for c in range(10)]))
    return torch.stack(chosen)


def _batches(x: Tensor, train: Tensor, generators: list[Generator]) -> Iterator[Tensor]:
    """Endless batches (S, BATCH, d) of the training part, with replacement."""
    while True:
        picks = torch.stack([torch.randint(train.shape[1], (BATCH,), generator=g) for g in generators])
        yield x[train.gather(1, picks)]


def _accuracy(
    seeds: Seeds,
    *,
    lr: float,
    weight_decay: float = 0.0,
    epsilon: float | None = None,
    steps: int = 1,
    entropy: float = 0.0,
) -> Tensor:
    """Test accuracy in percent, per seed; epsilon None trains on the labelled rows alone."""
    data, model = digits(), stacked_mlp((64, 128, 10), seeds)
    parts = split(data, seeds)
    unlabelled = _batches(data.x, parts.train, seeds.torch("unlabelled"))
    smooth = None if epsilon is None else partial(vat_loss, epsilon=epsilon, steps=steps, generator=seeds.torch("vat"))

    def penalty(model: nn.Module, *_: Tensor) -> Tensor:
        x = next(unlabelled)
        logits = model(x)
        return (smooth(model, x, logits=logits) + entropy * conditional_entropy_loss(logits)).mean(1)

    fit(
        model,
        data.x,
        data.y,
        loss=cross_entropy,
        seeds=seeds,
        train=_labelled(data.y, parts.train, seeds),
        steps=seeds.few(500),
        batch=BATCH,
        lr=lr,
        weight_decay=weight_decay,
        penalty=None if smooth is None else penalty,
    )
    with torch.no_grad():
        return accuracy(model(data.x[parts.test]), data.y[parts.test])


def _compare(seeds: Seeds, method: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Arms:
    chosen, other = tune(_accuracy, method, seeds), tune(_accuracy, baseline, seeds)
    return Arms(_accuracy(seeds, **chosen), _accuracy(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="With few labels and many unlabelled inputs, VAT classifies better than training on the labels alone",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 4 labels a class, MLP 64-128-10, 500 steps of 64 and 64; 6 settings each, with weight decay",
)
def vat_beats_labels_alone(seeds: Seeds) -> Arms:
    return _compare(seeds, VAT, PLAIN)


@claim(
    says="The adversarial direction matters: VAT classifies better than the same penalty in random directions",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 4 labels a class, MLP 64-128-10, 500 steps of 64 and 64; 6 settings each",
)
def vat_beats_random_directions(seeds: Seeds) -> Arms:
    return _compare(seeds, VAT, RANDOM)


@claim(
    says="Entropy minimisation adds to VAT: together they classify better than VAT alone",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 4 labels a class, MLP 64-128-10, 500 steps of 64 and 64; 6 settings each",
)
def entropy_minimisation_adds_to_vat(seeds: Seeds) -> Arms:
    return _compare(seeds, [{**setting, "entropy": 1.0} for setting in VAT], VAT)


@claim(
    says="One power iteration is enough: VAT with one classifies no worse than with four",
    kind="noninferiority",
    metric="accuracy",
    scale="digits 8x8, 4 labels a class, MLP 64-128-10, 500 steps of 64 and 64; 6 settings each",
)
def one_power_iteration_is_enough(seeds: Seeds) -> Arms:
    return _compare(seeds, VAT, [{**setting, "steps": 4} for setting in VAT])
