"""SAM: is it more accurate than momentum SGD on an equal budget of gradients, and does it end where it is flatter?"""

from functools import partial

import torch

from lossary.claims import Arms, Seeds, claim, tune
from lossary.optim import SAM
from lossary.tasks import (
    Split,
    StackedMLP,
    accuracy,
    cross_entropy,
    digits,
    fit,
    flip_labels,
    split,
    stacked_mlp,
    top_hessian_eigenvalue,
)

STEPS = 400  # of SAM, each with two gradients; SGD takes twice as many


def _trained(
    seeds: Seeds, *, lr: float, rho: float | None = None, weight_decay: float = 0.0, steps: int = STEPS
) -> tuple[StackedMLP, Split, torch.Tensor]:
    """Models, splits and noisy labels after training with SAM, or for rho None with SGD on the same budget."""
    data, model = digits(), stacked_mlp((64, 64, 10), seeds)
    parts = split(data, seeds)
    labels, _ = flip_labels(data.y, 0.4, seeds)
    options = {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay}
    optimizer = partial(torch.optim.SGD, **options)
    if rho is not None:
        optimizer = partial(SAM, base=torch.optim.SGD, rho=rho, replicas=True, **options)
    steps = seeds.few(steps if rho is not None else 2 * steps)
    fit(model, data.x, labels, loss=cross_entropy, seeds=seeds, train=parts.train, steps=steps, optimizer=optimizer)
    return model, parts, labels


def _accuracy(seeds: Seeds, **setting: float) -> torch.Tensor:
    """Clean test accuracy in percent, per seed."""
    model, parts, _ = _trained(seeds, **setting)
    data = digits()
    return accuracy(model(data.x[parts.test]), data.y[parts.test])


def _sharpness(seeds: Seeds, **setting: float) -> torch.Tensor:
    """Top eigenvalue of the Hessian of the loss on the training rows, with their noisy labels."""
    model, parts, labels = _trained(seeds, **setting)
    x, y = digits().x[parts.train], labels.gather(1, parts.train)
    if seeds.smoke:
        x, y = x[:, :50], y[:, :50]
    return top_hessian_eigenvalue(model, x, y, loss=cross_entropy, seeds=seeds, iterations=seeds.few(100))


@claim(
    says="With noisy labels SAM is more accurate than momentum SGD at equal gradient evaluations",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, MLP 64-64-10, 400 steps of 64 against 800; 6 settings each",
)
def sam_beats_sgd(seeds: Seeds) -> Arms:
    flat = [{"lr": lr, "rho": rho} for lr in (0.03, 0.1) for rho in (0.05, 0.2, 0.5)]
    plain = [{"lr": lr, "weight_decay": decay} for lr in (0.03, 0.1) for decay in (0.0, 1e-3, 1e-2)]
    sam, sgd = tune(_accuracy, flat, seeds), tune(_accuracy, plain, seeds)
    return Arms(_accuracy(seeds, **sam), _accuracy(seeds, **sgd), {"method": sam, "baseline": sgd})


@claim(
    says="SAM ends where the top Hessian eigenvalue is at most half of momentum SGD's",
    kind="ratio",
    metric="top Hessian eigenvalue",
    margin=0.5,  # the paper's networks show about a third
    scale="digits 8x8, 40% of labels flipped, MLP 64-64-10, 400 steps of 64 against 800, lr 0.1, rho 0.1",
)
def sam_ends_flatter(seeds: Seeds) -> Arms:
    return Arms(_sharpness(seeds, lr=0.1, rho=0.1), _sharpness(seeds, lr=0.1))


@claim(
    says="Control: SAM is more accurate after 400 steps than after 10",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, MLP 64-64-10, 400 steps of 64 against 10, lr 0.1, rho 0.1",
    control="planted",
)
def sam_beats_its_beginning(seeds: Seeds) -> Arms:
    return Arms(_accuracy(seeds, lr=0.1, rho=0.1), _accuracy(seeds, lr=0.1, rho=0.1, steps=10))


@claim(
    says="Control: SAM with rho 0 is its base optimizer, so it is not more accurate",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, 40% of labels flipped, MLP 64-64-10, 400 steps of 64 each; baseline under fresh seeds",
    control="A/A",
)
def rho_zero_beats_itself(seeds: Seeds) -> Arms:
    other = Seeds(tuple(i + 500_000 for i in seeds.ids), seeds.smoke)
    return Arms(_accuracy(seeds, lr=0.1, rho=0.0), _accuracy(other, lr=0.1, rho=0.0))
