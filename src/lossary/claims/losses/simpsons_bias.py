"""Simpson's bias: does it cost F1 to train on the sample-level Dice, and how fast does the bias fall with the batch?

The task is to find the good wines (quality 7 and 8, 14%), which tasters' disagreement blurs.
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import batch_dice_loss, sample_dice_loss, simpsons_bias
from lossary.tasks import cross_entropy, fit, per_seed, split, stacked_mlp, winequality_red
from lossary.tasks.data import Data, Split
from lossary.tasks.models import StackedMLP

BATCH = [{"loss": "batch", "smooth": smooth, "lr": lr} for smooth in (0.1, 1.0) for lr in (0.1, 0.3)]
SAMPLE = [{"loss": "sample", "smooth": smooth, "lr": lr} for smooth in (0.3, 1.0) for lr in (0.3, 1.0)]
PLAIN = [{"loss": "cross_entropy", "weight_decay": decay, "lr": lr} for decay in (0.0, 0.001) for lr in (0.1, 0.3)]


def _good_wines(seeds: Seeds) -> tuple[Data, Split]:
    data = winequality_red()
    data = replace(data, y=(data.y >= 4).long(), classes=2)
    return data, split(data, seeds, test=0.5)


def _fitted(seeds: Seeds, *, loss: str, lr: float, smooth: float = 1.0, weight_decay: float = 0.0) -> StackedMLP:
    (data, parts), model = _good_wines(seeds), stacked_mlp((11, 32, 2), seeds)
    losses = {
        "cross_entropy": cross_entropy,
        "sample": partial(sample_dice_loss, smooth=smooth),
        "batch": per_seed(lambda s: partial(batch_dice_loss, smooth=smooth), seeds),
    }
    fit(
        model,
        data.x,
        data.y,
        loss=losses[loss],
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(400),
        batch=256,
        lr=lr,
        weight_decay=weight_decay,
    )
    return model


@torch.no_grad()
def _f1(seeds: Seeds, *, own_threshold: bool = False, **setting) -> Tensor:
    """F1 of the good wines in percent on the test rows, per seed: at p > 1/2, or at the training rows' best p."""
    (data, parts), model = _good_wines(seeds), _fitted(seeds, **setting)
    scores = {name: (z := model(data.x[rows]))[..., 1] - z[..., 0] for name, rows in vars(parts).items()}
    threshold = torch.zeros(len(seeds), 1)
    if own_threshold:
        candidates = scores["train"].quantile(torch.linspace(0, 1, 101), dim=1).mT
        hits = scores["train"].unsqueeze(1) > candidates.unsqueeze(2)
        best = _f1_of(hits, data.y[parts.train].unsqueeze(1)).argmax(1, keepdim=True)
        threshold = candidates.gather(1, best)
    return _f1_of(scores["test"] > threshold, data.y[parts.test])


def _f1_of(hits: Tensor, y: Tensor) -> Tensor:
    return 200 * (hits * y).sum(-1).double() / (hits.sum(-1) + y.sum(-1))


@claim(
    says="Training on the Dice of batches gives a higher F1 than training on the Dice of samples",
    kind="superiority",
    metric="F1",
    scale="red wines of quality 7 or 8 (14%), 800 for training, MLP 11-32-2, 400 steps of 256; F1 at p > 0.5;"
    " 4 settings each",
)
def batch_dice_beats_sample_dice(seeds: Seeds) -> Arms:
    batch = tune(_f1, BATCH, seeds)
    sample = tune(_f1, SAMPLE, seeds)
    return Arms(_f1(seeds, **batch), _f1(seeds, **sample), {"method": batch, "baseline": sample})


@claim(
    says="Training on the Dice of batches gives a higher F1 than cross-entropy with a threshold chosen for F1",
    kind="superiority",
    metric="F1",
    scale="red wines of quality 7 or 8 (14%), 800 for training, MLP 11-32-2, 400 steps of 256; thresholds"
    " chosen on the training rows; 4 settings each",
)
def batch_dice_beats_cross_entropy_at_its_best_threshold(seeds: Seeds) -> Arms:
    at_best = partial(_f1, own_threshold=True)
    batch, plain = tune(at_best, BATCH, seeds), tune(at_best, PLAIN, seeds)
    return Arms(at_best(seeds, **batch), at_best(seeds, **plain), {"method": batch, "baseline": plain})


@torch.no_grad()
def _rows(seeds: Seeds) -> list[tuple[Tensor, Tensor]]:
    """Probability of a good wine and label of all rows in a random order, float64, from a model for each seed."""
    (data, _), model = _good_wines(seeds), _fitted(seeds, loss="cross_entropy", lr=0.1)
    p = model(data.x.expand(len(seeds), -1, -1)).double().softmax(-1)[..., 1]
    orders = [torch.randperm(len(data.y), generator=g) for g in seeds.torch("parts")]
    return [(own[order], data.y[order].double()) for own, order in zip(p, orders)]


def _dice(p: Tensor, y: Tensor) -> Tensor:
    return 1 - 2 * (p * y).sum() / (p.square().sum() + y.sum())


@claim(
    says="The bias of the Dice of batches is at most a quarter at 256 samples of what it is at 16",
    kind="ratio",
    metric="relative error",
    margin=0.25,
    scale="red wines of quality 7 or 8, MLP 11-32-2 trained with cross-entropy; bias over 20 partitions of 1599 rows",
)
def the_bias_falls_with_the_batch(seeds: Seeds) -> Arms:
    biases = []
    for (p, y), g in zip(_rows(seeds), seeds.torch("shuffles")):
        orders = [torch.randperm(len(p), generator=g) for _ in range(seeds.few(20))]
        biases.append(sum(simpsons_bias(_dice, p[order], y[order], sizes=(16, 256)) for order in orders).abs())
    small, large = torch.stack(biases).T
    return Arms(large, small)


@claim(
    says="The bias of a ratio of sums is minus the covariance of denominator and ratio over the mean denominator",
    kind="exact",
    metric="deviation",
    tolerance=1e-10,
    scale="Dice of a trained model's probabilities, red wines of quality 7 or 8, 1584 rows in parts of 1 to 528",
)
def the_bias_is_a_covariance(seeds: Seeds) -> Arms:
    deviations = []
    for p, y in _rows(seeds):
        p, y = p[:1584], y[:1584]
        for size in (1, 4, 16, 48, 144, 528):
            (bias,) = simpsons_bias(_dice, p, y, sizes=(size,)).tolist()
            b = (p.square() + y).view(-1, size).sum(1).numpy()
            a = (p - y).square().view(-1, size).sum(1).numpy()
            deviations.append(bias + np.cov(b, a / b, ddof=0)[0, 1] / b.mean())
    return Arms(np.array(deviations))
