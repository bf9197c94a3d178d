"""EnsLoss: does a fresh random loss for every batch keep a network from fitting wrong labels, and so classify better?

Odd digits against even ones, a fifth of the labels wrong, trained long enough for a network to learn them by heart.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import EnsLoss, random_calibrated_derivatives
from lossary.tasks import Data, PerSeed, accuracy, digits, fit, flip_labels, per_seed, split, stacked_mlp

RATES = (0.01, 0.03, 0.1, 0.3)
BATCH = 64


def _logistic(logit: Tensor, target: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logit, target, reduction="none")


def _hinge(logit: Tensor, target: Tensor) -> Tensor:
    return (1 - (2 * target - 1) * logit).clamp_min(0)


@cache
def _expected_slopes() -> Tensor:
    """What EnsLoss deals out to each place in a batch, from the smallest margin up, on average over 2000 draws."""
    generator, places = torch.Generator().manual_seed(0), -torch.arange(BATCH, 0, -1.0)
    return torch.stack([random_calibrated_derivatives(places, generator=generator) for _ in range(2000)]).mean(0)


def _expected(logit: Tensor, target: Tensor) -> Tensor:
    """EnsLoss without its noise."""
    margin = (2 * target - 1) * logit
    with torch.no_grad():
        places = margin.argsort(-1).argsort(-1)
        slopes = _expected_slopes().expand_as(margin).gather(-1, places) / margin.clamp_min(1)
    return slopes * margin


def _ensloss(seeds: Seeds) -> PerSeed:
    generators = seeds.torch("ensloss")
    return per_seed(lambda s: EnsLoss(generator=generators[s]), seeds)


LOSSES: dict[str, Callable[[Seeds], Callable[[Tensor, Tensor], Tensor]]] = {
    "logistic": lambda _: _logistic,
    "hinge": lambda _: _hinge,
    "expected": lambda _: _expected,
    "ensloss": _ensloss,
}


def _measured(seeds: Seeds, *, loss: str, lr: float) -> tuple[Tensor, Tensor]:
    """Clean test accuracy, and the share of wrong training labels that were learnt, in percent, per seed."""
    images = digits()
    data = Data(images.x, images.y % 2, "odd digits", 2)
    parts = split(data, seeds)
    labels, wrong = flip_labels(data.y, 0.2, seeds)
    model = stacked_mlp((64, 128, 1), seeds)
    apply = LOSSES[loss](seeds)
    fit(
        model,
        data.x,
        labels.float(),
        loss=lambda z, y: apply(z.squeeze(-1), y),
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(2000),
        batch=BATCH,
        lr=lr,
    )
    with torch.no_grad():
        # Logits of two classes, 0 and z, decide as the margin does.
        test, train = (F.pad(model(data.x[rows]), (1, 0)) for rows in (parts.test, parts.train))
    learnt = (train.argmax(-1) == labels.gather(1, parts.train)).double()
    mislabelled = wrong.gather(1, parts.train).double()
    return accuracy(test, data.y[parts.test]), 100 * (learnt * mislabelled).sum(1) / mislabelled.sum(1)


def _accuracy(seeds: Seeds, *, loss: str, lr: float) -> Tensor:
    return _measured(seeds, loss=loss, lr=lr)[0]


def _compare(seeds: Seeds, method: str, baseline: str, measure: int = 0) -> Arms:
    """Two losses at the learning rates that are best for their accuracies."""
    chosen, other = (tune(_accuracy, [{"loss": loss, "lr": lr} for lr in RATES], seeds) for loss in (method, baseline))
    ours, theirs = (_measured(seeds, **setting)[measure] for setting in (chosen, other))
    return Arms(ours, theirs, {"method": chosen, "baseline": other})


@claim(
    says="EnsLoss classifies better than the logistic loss",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8 odd or even, 20% of labels flipped, MLP 64-128-1, 2000 steps of 64; 4 learning rates each",
)
def ensloss_beats_logistic(seeds: Seeds) -> Arms:
    return _compare(seeds, "ensloss", "logistic")


@claim(
    says="EnsLoss classifies better than the hinge loss",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8 odd or even, 20% of labels flipped, MLP 64-128-1, 2000 steps of 64; 4 learning rates each",
)
def ensloss_beats_hinge(seeds: Seeds) -> Arms:
    return _compare(seeds, "ensloss", "hinge")


@claim(
    says="Trained with EnsLoss, a network learns fewer of the wrong labels by heart than with the logistic loss",
    kind="superiority",
    metric="error rate",
    scale="digits 8x8 odd or even, 20% of labels flipped, MLP 64-128-1, 2000 steps of 64; 4 learning rates each,"
    " the best by test accuracy; share of the flipped training labels that are predicted in the end",
)
def ensloss_learns_fewer_wrong_labels(seeds: Seeds) -> Arms:
    return _compare(seeds, "ensloss", "logistic", measure=1)


@claim(
    says="The randomness helps: EnsLoss classifies better than with the average of its draws in their place",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8 odd or even, 20% of labels flipped, MLP 64-128-1, 2000 steps of 64; 4 learning rates each",
)
def ensloss_beats_its_average(seeds: Seeds) -> Arms:
    return _compare(seeds, "ensloss", "expected")


@claim(
    says="Every loss that EnsLoss draws is convex and calibrated: its derivative is negative and never decreases",
    kind="exact",
    metric="deviation",
    scale="largest decrease and largest value of the derivative; 1000 batches of 64 margins, lam from -1 to 1",
    tolerance=0.0,
)
def draws_are_convex_and_calibrated(seeds: Seeds) -> Arms:
    generator = seeds.torch("draws")[0]
    worst = []
    for lam in torch.linspace(-1, 1, seeds.few(1000)).tolist():
        margin = 3 * torch.randn(BATCH, generator=generator)
        slopes = random_calibrated_derivatives(margin, generator=generator, lam=lam)[margin.argsort()]
        worst.append(torch.stack([-slopes.diff().amin(), slopes.amax()]).clamp_min(0))
    return Arms(torch.stack(worst))
