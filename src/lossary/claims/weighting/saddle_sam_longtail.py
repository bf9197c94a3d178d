"""SAM on the long tail: do rare classes gain, were they at saddles, and what does SAM do along negative curvature?"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.optim import SAM, sam_perturbation
from lossary.tasks import StackedMLP, balanced_accuracy, cross_entropy, digits, fit, long_tail, split, stacked_mlp
from lossary.weighting import DeferredReweighting, classwise_hessian_spectrum, saddle_index_by_class

CLASSES, BATCH, STEPS = 10, 64, 400  # steps of SAM, each with two gradients; SGD takes twice as many
OURS = [{"lr": lr, "rho": rho} for lr in (0.03, 0.1) for rho in (0.2, 0.5, 0.8)]
PLAIN = [{"lr": lr, "weight_decay": decay} for lr in (0.03, 0.1) for decay in (2e-4, 2e-3, 1e-2)]
FIXED = {"lr": 0.1, "weight_decay": 2e-4}
HEAD, TAIL = (0, 1, 2), (7, 8, 9)


def _trained(
    seeds: Seeds, *, lr: float, rho: float | None = None, weight_decay: float = 2e-4
) -> tuple[StackedMLP, Tensor, Tensor]:
    """Models, training rows and test rows, after cross-entropy with DRW and SAM, or for rho None plain SGD."""
    data, model = digits(), stacked_mlp((64, 64, CLASSES), seeds)
    parts = split(data, seeds)
    rows = long_tail(data.y, 100.0, seeds, rows=parts.train)
    steps = seeds.few(2 * STEPS)
    counts = data.y[rows[0]].bincount(minlength=CLASSES).tolist()
    deferred = DeferredReweighting(counts, epochs=max(1, steps * BATCH // sum(counts)))  # all seeds' classes are alike
    options = {"lr": lr, "momentum": 0.9, "weight_decay": weight_decay}
    optimizer: Any = partial(torch.optim.SGD, **options)
    if rho is not None:
        optimizer = partial(SAM, base=torch.optim.SGD, rho=rho, replicas=True, **options)
        steps //= 2
    how = {"train": rows, "steps": steps, "batch": BATCH, "optimizer": optimizer, "weighting": deferred}
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, **how)
    return model, rows, parts.test


def _balanced_accuracy(seeds: Seeds, **setting: Any) -> Tensor:
    """Mean over classes of the test accuracy in percent, per seed."""
    model, _, test = _trained(seeds, **setting)
    data = digits()
    return balanced_accuracy(model(data.x[test]), data.y[test])


def _saddles(seeds: Seeds, rho: float | None, classes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Of the training loss of each class, the negative curvature -lambda_min and the saddle index: (S, classes)."""
    model, rows, _ = _trained(seeds, rho=rho, **FIXED)
    data, curvatures, indices = digits(), [], []
    for s, (own, generator) in enumerate(zip(rows, seeds.torch("lanczos"))):
        own = own[torch.isin(data.y[own], torch.tensor(classes))]
        spectrum, _ = classwise_hessian_spectrum(
            model.replica(s).double(),
            data.x[own].double(),
            data.y[own],
            num_classes=CLASSES,
            generator=generator,
            iterations=seeds.few(50),
        )
        curvatures.append(-spectrum[list(classes)].amin((1, 2)).clamp(max=0))
        indices.append(saddle_index_by_class(spectrum)[list(classes)])
    return torch.stack(curvatures), torch.stack(indices)


@claim(
    says="With deferred re-weighting, SAM is more accurate over classes than SGD at equal gradient evaluations",
    kind="superiority",
    metric="balanced accuracy",
    scale="digits 8x8, long tail 100:1, MLP 64-64-10, 400 steps of 64 against 800, DRW from 80%; 6 settings each",
)
def sam_helps_rare_classes(seeds: Seeds) -> Arms:
    sam, sgd = tune(_balanced_accuracy, OURS, seeds), tune(_balanced_accuracy, PLAIN, seeds)
    return Arms(_balanced_accuracy(seeds, **sam), _balanced_accuracy(seeds, **sgd), {"method": sam, "baseline": sgd})


@claim(
    says="After SGD with deferred re-weighting the three rarest classes' losses curve downwards at least twice as"
    " steeply as the three most frequent ones'",
    kind="ratio",
    metric="top Hessian eigenvalue",
    margin=0.5,
    scale="digits 8x8, long tail 100:1, MLP 64-64-10, 800 steps of 64, lr 0.1; most negative eigenvalue, 50 of Lanczos",
)
def rare_classes_end_at_saddles(seeds: Seeds) -> Arms:
    curvature, index = _saddles(seeds, None, HEAD + TAIL)
    (frequent, rare), indices = curvature.split(3, 1), index.mean(0).tolist()
    return Arms(frequent.mean(1), rare.mean(1), {"saddle index of each class": indices})


@claim(
    says="SAM leaves the three rarest classes' losses with at most half of SGD's negative curvature",
    kind="ratio",
    metric="top Hessian eigenvalue",
    margin=0.5,
    scale="digits 8x8, long tail 100:1, MLP 64-64-10, 400 steps of 64 against 800, lr 0.1, rho 0.5; most negative"
    " eigenvalue, 50 steps of Lanczos",
)
def sam_escapes_saddles(seeds: Seeds) -> Arms:
    (flat, index), (plain, plain_index) = (_saddles(seeds, rho, TAIL) for rho in (0.5, None))
    details = {"saddle index with SAM": index.mean(0).tolist(), "with SGD": plain_index.mean(0).tolist()}
    return Arms(flat.mean(1), plain.mean(1), details)


@claim(
    says="On a quadratic SAM multiplies the gradient along an eigenvector by 1 + rho lambda / |g|: negative curvature"
    " is amplified only by a rho above 2 |g| / |lambda|, and then turned round",
    kind="exact",
    metric="deviation",
    tolerance=1e-10,
    scale="saddles in 6 dimensions, rho at 1.5, 2 and 3 times |g| / |lambda_min|, relative",
)
def sam_amplifies_negative_curvature(seeds: Seeds) -> Arms:
    off = []
    for generator in seeds.torch("saddle"):
        axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
        curvature = torch.tensor([-2.0, -0.5, 0.1, 1.0, 3.0, 10.0], dtype=torch.float64)
        w = torch.randn(6, generator=generator, dtype=torch.float64)
        slope = axes @ (curvature * (axes.mT @ w))
        for times in (1.5, 2.0, 3.0):
            (climb,) = sam_perturbation([w], [slope], rho=times * slope.norm().item() / 2)
            seen = axes @ (curvature * (axes.mT @ (w + climb)))
            factor = (axes.mT @ seen) / (axes.mT @ slope)
            off.append(factor[0] - (1 - times))
    return Arms(torch.stack(off))
