"""COMIC: does correcting, refocusing and balancing help where labels are on a long tail and half of them are missing?

Fifteen classes have normal concepts of 32 dimensions; a sample's features are the sum of one to four of them, drawn
with a chance that falls fiftyfold from the first to the last, and noise. Half of the labels that are there are not
given. The test has all classes alike often and all labels. Every network is a linear layer to 64 and a cosine
classifier. The plain arms are one network under binary cross-entropy or the asymmetric loss, with the missing labels
as negatives; "unbalanced" is one network with the other two parts of COMIC, "uncorrected" all without the correction.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import asymmetric_loss
from lossary.tasks import PerSeed, fit, hide_positives, mean_average_precision, per_seed
from lossary.weighting import (
    HeadTailBalancedClassifier,
    ReflectiveLabelCorrectorLoss,
    class_aware_label_correction,
    head_tail_balanced_loss,
    multi_focal_modifier_loss,
)

CLASSES, SIZE, WIDE = 15, 32, 64
TRAIN, TEST, RATIO, NOISE, HIDDEN = 1500, 2000, 50.0, 1.5, 0.5
RATES = (0.001, 0.003, 0.006, 0.012)


def _draw(rng: np.random.Generator, concepts: np.ndarray, n: int, ratio: float) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, 32) and labels (n, 15)."""
    keys = -np.log(ratio) * np.arange(CLASSES) / (CLASSES - 1) + rng.gumbel(size=(n, CLASSES))
    order = np.argsort(np.argsort(-keys, axis=1), axis=1)
    labels = (order < rng.integers(1, 5, (n, 1))).astype(float)
    return labels @ concepts + NOISE * rng.standard_normal((n, SIZE)), labels


class _Networks(nn.Module):
    """Three networks under the classifier: (batch, 32) to five sets of logits (5, batch, 15), the balanced first.

    Alone, the first network with its classifier: to (1, batch, 15).
    """

    def __init__(self, *, alone: bool) -> None:
        super().__init__()
        self.embed = nn.ModuleList(nn.Linear(SIZE, WIDE) for _ in range(3))
        self.classifier = HeadTailBalancedClassifier(WIDE, CLASSES, attention=0.0 if alone else 0.1)
        self.alone = alone

    def forward(self, x: Tensor) -> Tensor:
        embed = [self.embed[0]] * 3 if self.alone else self.embed
        logits = torch.stack(self.classifier(torch.stack([layer(x) for layer in embed])))
        return logits[:1] if self.alone else logits


def _comic(counts: Sequence[int], *, correct: bool) -> Any:
    """The loss of one seed, from logits (5, batch, classes) or (1, batch, classes) and labels, to values (batch)."""
    correctors = [ReflectiveLabelCorrectorLoss(counts) for _ in range(3)]

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        still, moved = logits[:3], logits[[0, 3, 4]] if len(logits) == 5 else logits
        values = multi_focal_modifier_loss(still, target.expand(still.shape), class_counts=counts).sum(0)
        if correct:
            values = values + 0.2 * torch.stack([c(z, target) for c, z in zip(correctors, moved)]).sum(0)
        if len(moved) == 3:
            values = values + head_tail_balanced_loss(*moved, target, class_counts=counts)
        return values

    return loss


def _plain(logits: Tensor, target: Tensor, *, arm: str) -> Tensor:
    if arm == "asymmetric":
        return asymmetric_loss(logits.squeeze(1), target, detach_focus=True)
    return F.binary_cross_entropy_with_logits(logits.squeeze(1), target, reduction="none").sum(-1)


def _run(seeds: Seeds, *, arm: str, lr: float) -> tuple[Tensor, Tensor]:
    """Test mean average precision and, of training labels recalled in the end, the share that is right, in percent."""
    drawn = []
    for rng in seeds.numpy("concepts"):
        concepts = rng.standard_normal((CLASSES, SIZE))
        drawn.append((*_draw(rng, concepts, TRAIN, RATIO), *_draw(rng, concepts, TEST, 1.0)))
    x, y, test_x, test_y = (torch.from_numpy(np.stack(part)).float() for part in zip(*drawn))
    given = hide_positives(y, HIDDEN, seeds)

    def networks(s: int) -> _Networks:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seeds.torch("init")[s].initial_seed())
            return _Networks(alone=arm not in ("comic", "uncorrected"))

    model = per_seed(networks, seeds)
    loss: Any = partial(_plain, arm=arm)
    if arm not in ("bce", "asymmetric"):
        loss = PerSeed([_comic(counts, correct=arm != "uncorrected") for counts in given.sum(1).int().tolist()])
    adam = partial(torch.optim.Adam, lr=lr)
    fit(model, x, given, loss=loss, seeds=seeds, steps=seeds.few(200), optimizer=adam)
    model.eval()
    with torch.no_grad():
        seen, unseen = model(x)[:, 0], model(test_x)[:, 0]
    recalled = torch.stack([class_aware_label_correction(*each) for each in zip(seen, given)]) - given
    right = 100 * (recalled * y).sum((1, 2)) / recalled.sum((1, 2))
    return mean_average_precision(unseen, test_y), right


def _score(seeds: Seeds, **setting: Any) -> Tensor:
    return _run(seeds, **setting)[0]


def _compare(seeds: Seeds, baseline: str) -> Arms:
    chosen, other = (tune(_score, [{"arm": arm, "lr": lr} for lr in RATES], seeds, n=2) for arm in ("comic", baseline))
    method, right = _run(seeds, **chosen)
    details = {"method": chosen, "baseline": other, "recalled labels that are right": right.nanmean().item()}
    return Arms(method, _score(seeds, **other), details)


@claim(
    says="COMIC ranks better than binary cross-entropy that takes missing labels as negatives",
    kind="superiority",
    metric="average precision",
    scale="15 synthetic classes in a tail of 50, 1500 rows, half the labels hidden, 200 steps of 64; 4 settings each",
)
def comic_beats_bce(seeds: Seeds) -> Arms:
    return _compare(seeds, "bce")


@claim(
    says="COMIC ranks better than the asymmetric loss",
    kind="superiority",
    metric="average precision",
    scale="15 synthetic classes in a tail of 50, 1500 rows, half the labels hidden, 200 steps of 64; 4 settings each",
)
def comic_beats_asymmetric_loss(seeds: Seeds) -> Arms:
    return _compare(seeds, "asymmetric")


@claim(
    says="COMIC ranks better than its loss and correction on a single network",
    kind="superiority",
    metric="average precision",
    scale="15 synthetic classes in a tail of 50, 1500 rows, half the labels hidden, 200 steps of 64; 4 settings each",
)
def comic_needs_its_balancer(seeds: Seeds) -> Arms:
    return _compare(seeds, "unbalanced")


@claim(
    says="COMIC ranks better than without its label correction",
    kind="superiority",
    metric="average precision",
    scale="15 synthetic classes in a tail of 50, 1500 rows, half the labels hidden, 200 steps of 64; 4 settings each",
)
def comic_needs_its_correction(seeds: Seeds) -> Arms:
    return _compare(seeds, "uncorrected")
