"""Adaptive logit adjustment: does a margin that follows the learning status beat one that follows frequency?

Fourteen labels of 32 normal features, present in 40% down to 2% of the rows. A label is whether a random direction's
value plus noise is high; the noise, from 0.3 to 2, is dealt out anew in each seed, so difficulty and frequency
disagree. The status is taken on 1000 validation rows after every 50 steps. Predictions use the default threshold, and
every arm chooses its learning rate by macro F1.
"""

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import fit, per_seed, stacked_mlp
from lossary.weighting import AdaptiveLogitAdjustedLoss, LearningStatusTracker

LABELS, FEATURES = 14, 32
TRAIN, VALIDATION, TEST = 2000, 1000, 4000
RATES = (0.05, 0.1, 0.2, 0.5)


def _data(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Features (S, N, 32) and 0/1 labels (S, N, 14), the most frequent first."""
    frequency = np.geomspace(0.4, 0.02, LABELS)
    x, y = [], []
    for rng in seeds.numpy("labels"):
        features = rng.standard_normal((TRAIN + VALIDATION + TEST, FEATURES))
        directions = rng.standard_normal((FEATURES, LABELS)) / np.sqrt(FEATURES)
        noise = rng.permutation(np.geomspace(0.3, 2.0, LABELS))
        values = features @ directions + noise * rng.standard_normal((len(features), LABELS))
        x.append(features)
        y.append(values > [np.quantile(column, 1 - f) for column, f in zip(values.T, frequency)])
    return torch.from_numpy(np.stack(x)).float(), torch.from_numpy(np.stack(y)).float()


def _f1(positive: Tensor, target: Tensor) -> Tensor:
    """F1 of each label in percent, from 0/1 tensors (..., N, labels); 0 where a label is never named nor met."""
    hits, named = (positive * target).sum(-2), (positive + target).sum(-2)
    return 200 * hits / named.clamp(min=1)


def _thresholds(logits: Tensor, target: Tensor) -> Tensor:
    """For each label the threshold (S, 1, labels) of best F1 on these rows."""
    candidates = torch.linspace(-5, 2, 57)
    scores = torch.stack([_f1((logits > t).float(), target) for t in candidates])
    return candidates[scores.argmax(0)].unsqueeze(1)


def _macro_f1(seeds: Seeds, *, arm: str, lr: float) -> Tensor:
    """Macro F1 in percent, per seed, of "plain" training, a "static" or "adaptive" margin, or chosen "thresholds"."""
    x, y = _data(seeds)
    model = stacked_mlp((FEATURES, 64, LABELS), seeds)
    counts = [[1] * LABELS if arm in ("plain", "thresholds") else row.int().tolist() for row in y[:, :TRAIN].sum(1)]
    criteria = per_seed(lambda s: AdaptiveLogitAdjustedLoss(counts[s]), seeds)
    checked = slice(TRAIN, TRAIN + VALIDATION)

    def follow() -> None:
        for criterion, logits, target in zip(criteria, model(x[:, checked]), y[:, checked]):
            status = LearningStatusTracker(LABELS)
            status.update(logits, target)
            criterion.update(status.compute())

    steps = 0

    def followed(input: Tensor, target: Tensor) -> Tensor:
        nonlocal steps
        if steps and steps % seeds.few(50, smoke=4) == 0:
            follow()
        steps += 1
        return criteria(input, target)

    loss = followed if arm == "adaptive" else criteria
    fit(model, x[:, :TRAIN], y[:, :TRAIN], loss=loss, seeds=seeds, steps=seeds.few(600), lr=lr)
    with torch.no_grad():
        logits = model(x)
    cut = _thresholds(logits[:, checked], y[:, checked]) if arm == "thresholds" else 0.0
    test = slice(TRAIN + VALIDATION, None)
    return _f1((logits[:, test] > cut).float(), y[:, test]).mean(-1)


def _compare(seeds: Seeds, baseline: str) -> Arms:
    chosen, other = (tune(_macro_f1, [{"arm": arm, "lr": lr} for lr in RATES], seeds) for arm in ("adaptive", baseline))
    return Arms(_macro_f1(seeds, **chosen), _macro_f1(seeds, **other), {"method": chosen, "baseline": other})


@claim(
    says="Where difficulty and frequency disagree, a margin that follows the learning status gives a better macro F1"
    " than one that follows frequency",
    kind="superiority",
    metric="F1",
    scale="14 synthetic labels of 40% to 2%, 2000 rows, MLP 32-64-14, 600 steps of 64; 4 settings each",
)
def adaptive_beats_static_adjustment(seeds: Seeds) -> Arms:
    return _compare(seeds, "static")


@claim(
    says="Adaptive logit adjustment gives a better macro F1 than cross-entropy",
    kind="superiority",
    metric="F1",
    scale="14 synthetic labels of 40% to 2%, 2000 rows, MLP 32-64-14, 600 steps of 64; 4 settings each",
)
def adaptive_beats_plain_training(seeds: Seeds) -> Arms:
    return _compare(seeds, "plain")


@claim(
    says="Adaptive logit adjustment gives a better macro F1 than cross-entropy with a threshold for each label chosen"
    " on the validation rows",
    kind="superiority",
    metric="F1",
    scale="14 synthetic labels of 40% to 2%, 2000 rows, MLP 32-64-14, 600 steps of 64; 4 settings each",
)
def adaptive_beats_chosen_thresholds(seeds: Seeds) -> Arms:
    return _compare(seeds, "thresholds")
