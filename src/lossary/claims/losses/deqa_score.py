"""DeQA-Score: soft labels against the nearest level, and one model for two data sets that rate on their own scales."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import score_to_soft_label, soft_label_to_score, thurstone_fidelity_loss
from lossary.tasks import cross_entropy, fit, stacked_mlp

FEATURES, TRAIN, TEST, RATERS = 12, 150, 500, 20
RATES = (0.001, 0.003, 0.01, 0.03)


def _rated(seeds: Seeds, sets: int) -> tuple[Tensor, ...]:
    """Things and their ratings: x (S, N, 12), mean rating and spread in 1 to 5, data set 0 or 1; the test parts last.

    Quality is a smooth function of x; twenty raters scatter about it, more in the middle of the scale. The second
    set holds good things only, and its raters stretch the scale unevenly. Each set is mapped to 1 to 5 by its own
    lowest and highest mean, as in the official code, so that the same thing has two scores.
    """
    made = []
    for rng in seeds.numpy("ratings"):
        inner, outer = rng.normal(size=(FEATURES, 8)) / np.sqrt(FEATURES), rng.normal(size=8) / np.sqrt(8)
        train, test = [], []
        for number in range(sets):
            x = rng.normal(size=(8 * (TRAIN + TEST), FEATURES))
            quality = np.tanh(1.5 * x @ inner) @ outer
            rows = np.flatnonzero(quality > 0 if number else quality < np.inf)[: TRAIN + TEST]
            x, quality = x[rows], quality[rows]
            spread = 0.2 + 0.4 * np.exp(-(quality**2))
            ratings = quality[:, None] + spread[:, None] * rng.normal(size=(len(x), RATERS))
            ratings = np.exp(0.8 * ratings) if number else ratings
            low, high = ratings[:TRAIN].mean(1).min(), ratings[:TRAIN].mean(1).max()
            mean = 1 + 4 * ((ratings.mean(1) - low) / (high - low)).clip(0, 1)
            table = np.column_stack([x, mean, 4 * ratings.std(1) / (high - low), np.full(len(x), number)])
            train.append(table[:TRAIN])
            test.append(table[TRAIN:])
        made.append(np.concatenate([*train, *test]))
    rated = torch.from_numpy(np.stack(made)).float()
    return rated[..., :-3], rated[..., -3], rated[..., -2], rated[..., -1].long()


def _model(seeds: Seeds, data: tuple[Tensor, ...], *, label: str, lr: float, fidelity: float = 0.0) -> Tensor:
    """Probabilities of five levels for all rows, (S, N, 5), after training on the first part of them.

    `fidelity` weighs the fidelity loss; the label's cross-entropy then has 1 - fidelity.
    """
    x, mean, std, group = data
    rows = x.shape[1] - TEST * int(group.max() + 1)
    nearest = ((mean - 1) * 5 / 4).long().clamp(0, 4)
    soft = score_to_soft_label(mean, std if label == "soft" else torch.zeros_like(std))
    given = torch.cat([soft, nearest[..., None], mean[..., None], std[..., None], group[..., None]], -1)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        if label == "nearest":
            return cross_entropy(z, y[..., 5].long())  # type: ignore[no-any-return]
        values = -(y[..., :5] * z.log_softmax(-1)).sum(-1)
        if not fidelity:
            return values
        score, _ = soft_label_to_score(z.softmax(-1))
        rank = thurstone_fidelity_loss(score, y[..., 6], target_std=y[..., 7], group=y[..., 8].long())
        return (1 - fidelity) * values + fidelity * rank

    model = stacked_mlp((FEATURES, 64, 5), seeds)
    fit(model, x[:, :rows], given[:, :rows], loss=loss, seeds=seeds, steps=seeds.few(300), batch=32, lr=lr)
    with torch.no_grad():
        probs: Tensor = model(x).softmax(-1)
    return probs


def _rank_correlation(seeds: Seeds, *, sets: int, **hyper: Any) -> Tensor:
    """A hundred times Spearman's correlation with the mean ratings on new rows, averaged over the data sets."""
    data = _rated(seeds, sets)
    score, _ = soft_label_to_score(_model(seeds, data, **hyper))
    parts = [slice(-TEST * (k + 1), -TEST * k or None) for k in range(sets)]
    ranks = [torch.stack([_ranks(score[:, part]), _ranks(data[1][:, part])]) for part in parts]
    correlations: Tensor = 100 * torch.stack([(a * b).mean(-1) for a, b in ranks]).mean(0)
    return correlations


def _ranks(values: Tensor) -> Tensor:
    """Standardised ranks."""
    rank = values.argsort(-1).argsort(-1).double()
    standard: Tensor = (rank - rank.mean(-1, keepdim=True)) / rank.std(-1, correction=0, keepdim=True)
    return standard


def _compare(seeds: Seeds, sets: int, method: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> Arms:
    def score(seeds: Seeds, **setting: Any) -> Tensor:
        return _rank_correlation(seeds, sets=sets, **setting)

    ours, theirs = tune(score, method, seeds), tune(score, baseline, seeds)
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Trained on soft labels a model ranks things better than trained on their nearest level",
    kind="superiority",
    metric="rank correlation",
    scale="made-up ratings by 20 people, 150 things for training, MLP 12-64-5, 300 steps of 32; 4 settings each",
)
def soft_label_beats_nearest_level(seeds: Seeds) -> Arms:
    soft, nearest = ([{"label": label, "lr": lr} for lr in RATES] for label in ("soft", "nearest"))
    return _compare(seeds, 1, soft, nearest)


@claim(
    says="The spread of the ratings in the label ranks better than the two levels nearest to their mean",
    kind="superiority",
    metric="rank correlation",
    scale="as soft_label_beats_nearest_level",
)
def spread_beats_two_levels(seeds: Seeds) -> Arms:
    soft, two = ([{"label": label, "lr": lr} for lr in RATES] for label in ("soft", "two"))
    return _compare(seeds, 1, soft, two)


@claim(
    says="On two data sets with scales of their own, soft labels with the fidelity loss rank better than alone",
    kind="superiority",
    metric="rank correlation",
    scale="made-up ratings, two sets of 150 things for training, MLP 12-64-5, 300 steps of 32; 4 settings each",
)
def fidelity_beats_soft_label_alone(seeds: Seeds) -> Arms:
    both = [{"label": "soft", "lr": lr, "fidelity": f} for lr in (0.01, 0.03) for f in (0.5, 0.95)]
    return _compare(seeds, 2, both, [{"label": "soft", "lr": lr} for lr in RATES])


@claim(
    says="A soft label is at most a tenth as far from the mean rating as the nearest level's centre is",
    kind="ratio",
    metric="mean absolute error",
    scale="150 things rated by 20 people, made up; the label's mean against the mean rating, no model",
    margin=0.1,
)
def soft_label_keeps_the_mean(seeds: Seeds) -> Arms:
    _, mean, std, _ = _rated(seeds, 1)
    soft, _ = soft_label_to_score(score_to_soft_label(mean, std))
    nearest = ((mean - 1) * 5 / 4).long().clamp(0, 4) + 1
    return Arms((soft - mean).abs().mean(-1), (nearest - mean).abs().mean(-1))


@claim(
    says="The predicted distribution is at most half as far from people's as that learnt from nearest levels",
    kind="ratio",
    metric="deviation",
    scale="as soft_label_beats_nearest_level; Jensen-Shannon divergence of normals, approximated as in the paper",
    margin=0.5,
)
def predicts_the_distribution(seeds: Seeds) -> Arms:
    def divergence(seeds: Seeds, **setting: Any) -> Tensor:
        data = _rated(seeds, 1)
        mean, std = soft_label_to_score(_model(seeds, data, **setting)[:, -TEST:])
        return _divergence(mean, std, data[1][:, -TEST:], data[2][:, -TEST:]).mean(-1)

    chosen = {
        label: tune(divergence, [{"label": label, "lr": lr} for lr in RATES], seeds, better="lower")
        for label in ("soft", "nearest")
    }
    soft, nearest = chosen["soft"], chosen["nearest"]
    details = {"method": soft, "baseline": nearest}
    return Arms(divergence(seeds, **soft), divergence(seeds, **nearest), details)


def _divergence(mean: Tensor, std: Tensor, true_mean: Tensor, true_std: Tensor) -> Tensor:
    """Half the sum of KL to the normal halfway, whose mean and variance are the averages, from either side."""
    middle, variance = (mean + true_mean) / 2, (std**2 + true_std**2) / 2

    def side(m: Tensor, s: Tensor) -> Tensor:
        return variance.log() / 2 - s.log() + (s**2 + (m - middle) ** 2) / (2 * variance) - 0.5

    return (side(mean, std) + side(true_mean, true_std)) / 2
