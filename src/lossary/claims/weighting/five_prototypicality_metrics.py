"""Five prototypicality metrics: do they agree, and what do they tell about wrong labels and what to train on?

All five rate the training rows of digits, 3% of whose labels are wrong. Differential privacy: logistic regression on
images of unit length, where no sample's gradient is longer than 2, so that plain SGD with noise is DP-SGD with
clipping at 2 and without any clipping to do; 1 / noise multiplier stands for the budget.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import accuracy, auroc, cross_entropy, digits, fit, flip_labels, split, stacked_mlp
from lossary.weighting import (
    adversarial_distance_score,
    ensemble_agreement_score,
    holdout_retraining_score,
    model_confidence_score,
    privacy_training_score,
    rank_percentile,
)

SIZES, MODELS, RUNS, BATCH = (64, 64, 10), 5, 3, 64
NOISES = (64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0, 0.5)  # multipliers of the clipping bound
RATES = (0.01, 0.03, 0.1, 0.3)


class _PrivateSGD(torch.optim.SGD):
    """SGD on the mean over a batch, of whose samples none has a gradient longer than 2, with noise for each seed."""

    def __init__(self, params: Any, *, noise: float, generators: Sequence[Generator]) -> None:
        super().__init__(params, lr=0.5)
        self.deviation, self.generators = 2 * noise / BATCH, generators

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        closure()
        for group in self.param_groups:
            for p in group["params"]:
                drawn = [torch.randn(p.shape[1:], generator=g) for g in self.generators]
                p.grad += self.deviation * torch.stack(drawn)
        super().step()


def _other(seeds: Seeds, k: int) -> Seeds:
    """Seeds for initial weights and orders of their own."""
    return Seeds(tuple(i + k * 100_000 for i in seeds.ids), seeds.smoke)


def _private_logits(seeds: Seeds, x: Tensor, y: Tensor) -> Tensor:
    """Logits (S, budgets, runs, n, classes) on rows x (S, n, 64) of unit length."""
    levels = []
    for noise in NOISES:
        runs = []
        for k in range(RUNS):
            own = _other(seeds, k + 1)
            model = stacked_mlp((64, 10), own)
            optimizer = partial(_PrivateSGD, noise=noise, generators=own.torch("privacy"))
            fit(model, x, y, loss=cross_entropy, seeds=own, steps=seeds.few(100), batch=BATCH, optimizer=optimizer)
            runs.append(model(x).detach())
        levels.append(torch.stack(runs, 1))
    return torch.stack(levels, 1)


def _percentiles(seeds: Seeds) -> Tensor:
    """Percentiles of the training rows (S, 5, n) in the order adv, ret, agr, conf, priv."""
    data = digits()
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, 0.03, seeds)
    x, y = data.x[parts.train], labels.gather(1, parts.train)
    steps, logits = seeds.few(300), []
    for k in range(MODELS):
        own = _other(seeds, k + 1)
        model = stacked_mlp(SIZES, own)
        fit(model, x, y, loss=cross_entropy, seeds=own, steps=steps, batch=BATCH, lr=0.1)
        logits.append(model(x).detach())
    plain = [model.replica(s) for s in range(len(seeds))]  # of the last model
    fit(model, data.x, labels, loss=cross_entropy, seeds=own, train=parts.test, steps=steps // 3, batch=BATCH, lr=0.1)
    retrained, ensemble = model(x).detach(), torch.stack(logits, 1)
    private = _private_logits(seeds, F.normalize(x, dim=-1), y)
    budgets = [1 / noise for noise in NOISES]
    scores = [
        (
            adversarial_distance_score(plain[s], x[s]),
            holdout_retraining_score(logits[-1][s], retrained[s]),
            ensemble_agreement_score(ensemble[s]),
            model_confidence_score(ensemble[s]),
            privacy_training_score(private[s], y[s], budgets=budgets),
        )
        for s in range(len(seeds))
    ]
    return torch.stack([torch.stack([rank_percentile(score) for score in five]) for five in scores])


@claim(
    says="The five metrics are highly correlated: Spearman's coefficient is above 0.5 in the mean over all pairs",
    kind="superiority",
    metric="rank correlation",
    scale="digits 8x8, 3% of labels flipped, MLPs 64-64-10 and private logistic regression; against 50 points",
)
def the_five_metrics_are_highly_correlated(seeds: Seeds) -> Arms:
    matrix = torch.stack([torch.corrcoef(five.double()) for five in _percentiles(seeds)])
    above = torch.ones(5, 5).triu(1).bool()
    mean = 100 * matrix[:, above].mean(1)
    names = ("adv", "ret", "agr", "conf", "priv")
    pairs = {f"{names[i]}, {names[j]}": round(100 * matrix[:, i, j].mean().item(), 1) for i, j in above.nonzero()}
    return Arms(mean, torch.full_like(mean, 50.0), pairs)


@claim(
    says="Memorised wrong labels are found better by privacy-preserving training than by the ensemble's confidence",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, 3% of labels flipped, private logistic regression at 8 levels, 3 runs each; 5 MLPs 64-64-10",
)
def privacy_finds_memorised_labels(seeds: Seeds) -> Arms:
    data = digits()
    train = split(data, seeds).train
    wrong = flip_labels(data.y, 0.03, seeds)[1].gather(1, train)
    _, _, _, conf, priv = _percentiles(seeds).unbind(1)
    return Arms(auroc(-priv, wrong), auroc(-conf, wrong))


@claim(
    says="The best represented 30% of the data train a better classifier than a random 30%",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 3% of labels flipped, mean of five percentiles, MLP 64-64-10, 400 steps of 64; 4 rates each",
)
def prototypes_train_better_than_random_rows(seeds: Seeds) -> Arms:
    data = digits()
    percentiles = cache(_percentiles)

    def score(seeds: Seeds, *, rows: str, lr: float) -> Tensor:
        parts = split(data, seeds)
        labels, _ = flip_labels(data.y, 0.03, seeds)
        count = round(0.3 * parts.train.shape[1])
        if rows == "best":
            picked = percentiles(seeds).mean(1).topk(count).indices
        else:
            picked = torch.stack(
                [torch.randperm(parts.train.shape[1], generator=g)[:count] for g in seeds.torch("part")]
            )
        model, train = stacked_mlp(SIZES, seeds), parts.train.gather(1, picked)
        fit(model, data.x, labels, loss=cross_entropy, seeds=seeds, train=train, steps=seeds.few(400), lr=lr)
        return accuracy(model(data.x[parts.test]), data.y[parts.test])

    best, other = (tune(score, [{"rows": rows, "lr": lr} for lr in RATES], seeds) for rows in ("best", "random"))
    return Arms(score(seeds, **best), score(seeds, **other), {"method": best, "baseline": other})
