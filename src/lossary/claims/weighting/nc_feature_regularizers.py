"""Neural collapse on a long tail: do the two regularisers bring it back, and does accuracy on rare classes follow?"""

from typing import Any

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import (
    Split,
    StackedMLP,
    balanced_accuracy,
    cross_entropy,
    digits,
    fit,
    long_tail,
    split,
    stacked_mlp,
)
from lossary.weighting import NC1Loss, nc2_loss, neural_collapse_metrics

CLASSES, WIDTH = 10, 32
OURS = [
    {"lr": lr, "lambda_1": first, "lambda_2": second}
    for lr in (0.03, 0.1)
    for first, second in ((0.01, 0.1), (0.05, 0.1), (0.01, 0.5))
]
PLAIN = [{"lr": lr, "weight_decay": decay} for lr in (0.03, 0.1) for decay in (0.0, 5e-4, 5e-3)]


class _Net(nn.Module):
    """A perceptron that remembers the features of its last batch, with a learnable mean for every class."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        *trunk, self.head = stacked_mlp((64, 64, WIDTH, CLASSES), seeds)
        self.trunk = StackedMLP(*trunk)
        self.nc1 = NC1Loss(CLASSES, WIDTH, generator=seeds.torch("means"))

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.trunk(x)
        return self.head(self.features).contiguous()


def _trained(
    seeds: Seeds,
    *,
    balanced: bool,
    lr: float,
    weight_decay: float = 5e-4,
    lambda_1: float = 0.0,
    lambda_2: float = 0.0,
) -> tuple[_Net, Split, Tensor]:
    """Models, splits and training rows, with cross-entropy or balanced softmax; lambda_1 0 leaves out NC1 and NC2."""
    data, model = digits(), _Net(seeds)
    parts = split(data, seeds)
    rows = long_tail(data.y, 100.0, seeds, rows=parts.train)
    prior = data.y[rows[0]].bincount(minlength=CLASSES).log() if balanced else torch.zeros(CLASSES)

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return cross_entropy(z + prior, y)

    def penalty(model: Any, x: Tensor, y: Tensor) -> Tensor:
        return lambda_1 * model.nc1(model.features, y) + lambda_2 * nc2_loss(model.nc1.means)

    def optimizer(_: Any) -> torch.optim.Optimizer:
        network: dict[str, Any] = {"params": [*model.trunk.parameters(), *model.head.parameters()]}
        if not lambda_1:
            groups = [network]
        else:  # the means learn as in the official code
            groups = [
                network,
                {"params": [model.nc1.means], "lr": 0.5 / lambda_1, "momentum": 0.0, "weight_decay": 0.0},
            ]
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=weight_decay, fused=True)

    how: dict[str, Any] = {"train": rows, "steps": seeds.few(600), "optimizer": optimizer}
    fit(model, data.x, data.y, loss=loss, seeds=seeds, penalty=penalty if lambda_1 else None, **how)
    return model, parts, rows


def _balanced_accuracy(seeds: Seeds, **setting: Any) -> Tensor:
    """Mean over classes of the test accuracy in percent, per seed."""
    model, parts, _ = _trained(seeds, **setting)
    data = digits()
    return balanced_accuracy(model(data.x[parts.test]), data.y[parts.test])


def _compare(seeds: Seeds, balanced: bool) -> Arms:
    method = tune(_balanced_accuracy, [{"balanced": balanced, **setting} for setting in OURS], seeds)
    baseline = tune(_balanced_accuracy, [{"balanced": balanced, **setting} for setting in PLAIN], seeds)
    details = {"method": method, "baseline": baseline}
    return Arms(_balanced_accuracy(seeds, **method), _balanced_accuracy(seeds, **baseline), details)


@claim(
    says="Cross-entropy with NC1 and NC2 is more accurate over classes than cross-entropy",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 100:1, MLP 64-64-32-10, 600 steps of 64; 6 settings each",
)
def nc_helps_cross_entropy(seeds: Seeds) -> Arms:
    return _compare(seeds, balanced=False)


@claim(
    says="Balanced softmax with NC1 and NC2 is more accurate over classes than balanced softmax",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 100:1, MLP 64-64-32-10, 600 steps of 64; 6 settings each",
)
def nc_helps_balanced_softmax(seeds: Seeds) -> Arms:
    return _compare(seeds, balanced=True)


@claim(
    says="NC1 and NC2 bring the within-class variation of training features to at most half of cross-entropy's",
    kind="ratio",
    metric="variance",
    margin=0.5,
    scale="digits 8x8, long tail 100:1, MLP 64-64-32-10, 600 steps of 64, lr 0.1, lambdas 0.01 and 0.1",
)
def nc_collapses_features(seeds: Seeds) -> Arms:
    arms = []
    for setting in ({"lambda_1": 0.01, "lambda_2": 0.1}, {}):
        model, _, rows = _trained(seeds, balanced=False, lr=0.1, **setting)
        data = digits()
        with torch.no_grad():
            model(data.x[rows])
        arms.append([neural_collapse_metrics(h, data.y[own]) for h, own in zip(model.features, rows)])
    method, baseline = ([found["nc1"].item() for found in arm] for arm in arms)
    gaps = [torch.stack([found["cosine_gap"] for found in arm]).mean().item() for arm in arms]
    return Arms(method, baseline, {"cosine gap of both": gaps})
