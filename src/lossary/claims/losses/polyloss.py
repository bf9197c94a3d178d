"""PolyLoss: does moving the first coefficient beat cross-entropy, when both may tune four settings?"""

from functools import partial

import torch

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import poly1_cross_entropy
from lossary.tasks import accuracy, cross_entropy, digits, fit, flip_labels, split, stacked_mlp


def _accuracy(seeds: Seeds, *, epsilon: float | None, lr: float) -> torch.Tensor:
    """Clean test accuracy in percent, per seed; epsilon None is cross-entropy."""
    data, model = digits(), stacked_mlp((64, 64, 10), seeds)
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, 0.3, seeds)
    loss = cross_entropy if epsilon is None else partial(poly1_cross_entropy, epsilon=epsilon)
    fit(model, data.x, labels, loss=loss, seeds=seeds, train=parts.train, steps=seeds.few(400), lr=lr)
    return accuracy(model(data.x[parts.test]), data.y[parts.test])


@claim(
    says="Poly-1 classifies better than cross-entropy",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 30% of labels flipped, MLP 64-64-10, 400 steps of 64; 4 settings each",
)
def poly1_beats_cross_entropy(seeds: Seeds) -> Arms:
    plain = tune(_accuracy, [{"epsilon": None, "lr": lr} for lr in (0.01, 0.03, 0.1, 0.3)], seeds)
    poly = tune(_accuracy, [{"epsilon": e, "lr": lr} for e in (-1.0, 2.0) for lr in (0.03, 0.1)], seeds)
    return Arms(_accuracy(seeds, **poly), _accuracy(seeds, **plain), {"method": poly, "baseline": plain})


@claim(
    says="Control: Poly-1 with epsilon 0 is cross-entropy, so it cannot classify better",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 30% of labels flipped, MLP 64-64-10, 400 steps of 64; baseline under fresh seeds",
    control="A/A",
)
def epsilon_zero_beats_cross_entropy(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_accuracy(seeds, epsilon=0.0, lr=0.1), _accuracy(other, epsilon=None, lr=0.1))


@claim(
    says="Planted: a fair learning rate beats one that is too small to get anywhere in 400 steps",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 30% of labels flipped, MLP 64-64-10, 400 steps of 64; cross-entropy, lr 0.03 against 0.0003",
    control="planted",
)
def planted_learning_rate(seeds: Seeds) -> Arms:
    return Arms(_accuracy(seeds, epsilon=None, lr=0.03), _accuracy(seeds, epsilon=None, lr=0.0003))
