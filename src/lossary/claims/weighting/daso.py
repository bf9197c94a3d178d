"""DASO on long-tailed digits with few labels: against FixMatch, against similarity alone, and on its pseudo-labels."""

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import StackedMLP, balanced_accuracy, cross_entropy, digits, long_tail, split, stacked_mlp
from lossary.weighting import DASO

CLASSES, WIDTH, STEPS, RATIO = 10, 32, 400, 20.0
LABELLED, UNLABELLED = 32, 64  # rows of each seed in a step
RARE = torch.tensor([7, 8, 9])
BLENDED = [{"lr": lr, "temperature": t} for lr in (0.01, 0.03, 0.1) for t in (1.5, 0.3)]
PLAIN = [{"lr": lr, "threshold": tau} for lr in (0.01, 0.03, 0.1) for tau in (0.95, 0.8)]


class _Net(nn.Module):
    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        *encoder, self.head = stacked_mlp((64, 64, WIDTH, CLASSES), seeds)
        self.encoder = StackedMLP(*encoder)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x)).contiguous()


class _SimilarityLabels(DASO):
    """Pseudo-labels by similarity to the prototypes alone, whatever the linear classifier says."""

    def pseudo_label(self, logits: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        if self.calls < self.warmup:
            return super().pseudo_label(logits, features)
        confidence, label = self.memory(features).detach().softmax(-1).max(-1)
        return label, confidence >= self.threshold


def _rows(seeds: Seeds, tail: str) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers (S, n): labelled with a long tail, unlabelled with the "same" one or "reversed", and for the test."""
    y = digits().y
    parts = split(digits(), seeds)
    pools = []
    for own, rng in zip(parts.train.numpy(), seeds.numpy("labelled")):
        classes = [rng.permutation(own[y[own] == c]) for c in range(CLASSES)]
        cuts = [np.split(rows, [len(rows) // 4]) for rows in classes]  # a quarter may be labelled
        pools.append([np.concatenate(side) for side in zip(*cuts)])
    known, unknown = (torch.from_numpy(np.stack(side)) for side in zip(*pools))
    order = y if tail == "same" else CLASSES - 1 - y
    return long_tail(y, RATIO, seeds, rows=known), long_tail(order, RATIO, seeds, rows=unknown), parts.test


def _drawn(rows: Tensor, count: int, generators: list[Generator]) -> Tensor:
    """Some rows (S, count) of each seed."""
    places = torch.stack([torch.randint(rows.shape[1], (count,), generator=g) for g in generators])
    return rows.gather(1, places)


def _noisy(x: Tensor, spread: float, missing: float, generators: list[Generator]) -> Tensor:
    """Pixels with normal noise of this spread, each black with the probability `missing`."""
    noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
    kept = torch.stack([torch.rand(x.shape[1:], generator=g) for g in generators]) >= missing
    return (x + spread * noise) * kept


def _trained(seeds: Seeds, *, tail: str, arm: str, lr: float, **hyper: Any) -> tuple[_Net, Any, Tensor, Tensor]:
    """Networks, their pseudo-labellers, unlabelled rows and test rows, after FixMatch, "similarity" or "daso"."""
    data, model = digits(), _Net(seeds)
    labelled, unlabelled, test = _rows(seeds, tail)
    steps = seeds.few(STEPS)
    warmup = steps + 1 if arm == "fixmatch" else 3 * steps // 10
    kind = _SimilarityLabels if arm == "similarity" else DASO
    daso = kind(CLASSES, WIDTH, warmup=warmup, period=20, size=32, replicas=(len(seeds),), **hyper)
    average = copy.deepcopy(model.encoder)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4, fused=True)
    order, noise = seeds.torch("order"), seeds.torch("noise")
    weaken = partial(_noisy, spread=0.05, missing=0.0, generators=noise)
    distort = partial(_noisy, spread=0.3, missing=0.2, generators=noise)
    for _ in range(steps):
        known, unknown = _drawn(labelled, LABELLED, order), _drawn(unlabelled, UNLABELLED, order)
        x, y, u = weaken(data.x[known]), data.y[known], data.x[unknown]
        with torch.no_grad():
            daso.memory.push(average(x), y)
        features = model.encoder(torch.cat([x, weaken(u), distort(u)], dim=1))
        logits = model.head(features)
        sizes = [LABELLED, UNLABELLED, UNLABELLED]
        (_, weak, strong), (own, weak_logits, strong_logits) = features.split(sizes, 1), logits.split(sizes, 1)
        consistency, alignment = daso(weak_logits, weak, strong_logits, strong)
        values = cross_entropy(own.contiguous(), y).mean(1) + consistency.mean(1) + alignment.mean(1)
        optimizer.zero_grad()
        torch.autograd.backward(values.sum())
        optimizer.step()
        with torch.no_grad():
            for old, new in zip(average.parameters(), model.encoder.parameters()):
                old.lerp_(new, 0.01)
    return model, daso, unlabelled, test


def _balanced_accuracy(seeds: Seeds, **setting: Any) -> Tensor:
    """Mean over classes of the test accuracy in percent, per seed."""
    model, _, _, test = _trained(seeds, **setting)
    return balanced_accuracy(model(digits().x[test]), digits().y[test])


def _compare(seeds: Seeds, tail: str, baseline: str) -> Arms:
    score = partial(_balanced_accuracy, tail=tail)
    ours = tune(score, [{"arm": "daso", **setting} for setting in BLENDED], seeds)
    theirs = tune(score, [{"arm": baseline, **setting} for setting in PLAIN], seeds)
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="DASO is more accurate over classes than FixMatch where the unlabelled data have the reversed tail",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, 105 labels with a tail 20:1, 329 unlabelled with it reversed, MLP 64-64-32-10, 400 steps;"
    " 6 settings each",
)
def daso_beats_fixmatch_on_a_reversed_tail(seeds: Seeds) -> Arms:
    return _compare(seeds, "reversed", "fixmatch")


@claim(
    says="DASO is more accurate over classes than FixMatch where labelled and unlabelled data have the same tail",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, 105 labels with a tail 20:1, 329 unlabelled with the same, MLP 64-64-32-10, 400 steps;"
    " 6 settings each",
)
def daso_beats_fixmatch_on_the_same_tail(seeds: Seeds) -> Arms:
    return _compare(seeds, "same", "fixmatch")


@claim(
    says="Blended pseudo-labels are better than those by similarity to prototypes alone, over classes",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, 105 labels with a tail 20:1, 329 unlabelled with it reversed, MLP 64-64-32-10, 400 steps;"
    " 6 settings each",
)
def blending_beats_similarity(seeds: Seeds) -> Arms:
    return _compare(seeds, "reversed", "similarity")


@claim(
    says="More rows of the three rarest labelled classes get their own pseudo-label from DASO than from FixMatch",
    kind="superiority",
    metric="worst-group accuracy",
    scale="digits 8x8, 105 labels with a tail 20:1, 329 unlabelled with it reversed, MLP 64-64-32-10, 400 steps,"
    " lr 0.03; recall of pseudo-labels, confident or not, over the three classes",
)
def daso_finds_rare_classes(seeds: Seeds) -> Arms:
    arms = []
    for setting in ({"arm": "daso", "temperature": 0.3}, {"arm": "fixmatch"}):
        model, daso, unlabelled, _ = _trained(seeds, tail="reversed", lr=0.03, **setting)
        with torch.no_grad():
            features = model.encoder(digits().x[unlabelled])
            label, _ = daso.pseudo_label(model.head(features), features)
        y = digits().y[unlabelled]
        recall = [((label == c) & (y == c)).sum(1) / (y == c).sum(1) for c in RARE]
        arms.append(100 * torch.stack(recall).mean(0))
    return Arms(*arms)
