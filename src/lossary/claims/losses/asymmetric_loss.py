"""Asymmetric loss: does it rank better than cross-entropy and the focal loss where labels are rare and some are missed?

Pictures show one to three of ten digits; in training the digits form a long tail, and a tenth of the labels is missing.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import AdaptiveAsymmetricLoss, asymmetric_loss
from lossary.tasks import digit_sets, fit, hide_positives, mean_average_precision, per_seed, stacked_mlp

RATES = (0.03, 0.1, 0.2)
PLAIN = [{"gamma_neg": 0.0, "weight_decay": decay, "lr": lr} for decay in (0.0, 0.01) for lr in RATES]
FOCAL = [{"gamma_neg": gamma, "gamma_pos": gamma, "lr": lr} for gamma in (1.0, 2.0) for lr in RATES]
ASYMMETRIC = [{"gamma_neg": gamma, "clip": 0.05, "lr": lr} for gamma in (2.0, 4.0) for lr in RATES]
ADAPTIVE = [{"target_gap": gap, "lr": lr} for gap in (0.1, 0.2) for lr in RATES]


def _precision(seeds: Seeds, *, lr: float, weight_decay: float = 0.0, clip: float = 0.0, **loss: float) -> Tensor:
    """Mean average precision in percent on the test pictures, per seed."""
    train, test = digit_sets(seeds, seeds.few(2000, smoke=100), ratio=20.0, test=seeds.few(1000, smoke=100))
    seen, model = hide_positives(train.y, 0.1, seeds), stacked_mlp((256, 64, 10), seeds)
    values: Callable[[Tensor, Tensor], Tensor] = partial(asymmetric_loss, clip=clip, **loss)
    if "target_gap" in loss:
        values = per_seed(lambda s: AdaptiveAsymmetricLoss(**loss), seeds)
    steps = seeds.few(400)
    fit(model, train.x, seen, loss=values, seeds=seeds, steps=steps, lr=lr, weight_decay=weight_decay)
    return mean_average_precision(model(test.x), test.y)


def _compare(seeds: Seeds, method: list[dict], baseline: list[dict]) -> Arms:
    ours, theirs = tune(_precision, method, seeds), tune(_precision, baseline, seeds)
    return Arms(_precision(seeds, **ours), _precision(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="The asymmetric loss ranks better than binary cross-entropy with weight decay",
    kind="superiority",
    metric="average precision",
    scale="2000 digit sets of a tail 20:1, 10% of labels missing, MLP 256-64-10, 400 steps of 64; 6 settings each",
)
def asymmetric_loss_beats_cross_entropy(seeds: Seeds) -> Arms:
    return _compare(seeds, ASYMMETRIC, PLAIN)


@claim(
    says="The asymmetric loss ranks better than the focal loss, which fades positives as fast as negatives",
    kind="superiority",
    metric="average precision",
    scale="2000 digit sets of a tail 20:1, 10% of labels missing, MLP 256-64-10, 400 steps of 64; 6 settings each",
)
def asymmetric_loss_beats_focal_loss(seeds: Seeds) -> Arms:
    return _compare(seeds, ASYMMETRIC, FOCAL)


@claim(
    says="Adapting the exponent to a gap of confidence ranks no worse than choosing it",
    kind="noninferiority",
    metric="average precision",
    scale="2000 digit sets of a tail 20:1, 10% of labels missing, MLP 256-64-10, 400 steps of 64; 6 settings each",
)
def the_adaptive_exponent_keeps_up(seeds: Seeds) -> Arms:
    return _compare(seeds, ADAPTIVE, ASYMMETRIC)


@claim(
    says="A negative whose probability is below the margin costs nothing and has no gradient",
    kind="exact",
    metric="deviation",
    tolerance=0.0,
    scale="10000 random negatives with p below 0.05, gamma_neg 0 to 4; largest loss or slope",
)
def negatives_below_the_margin_are_discarded(seeds: Seeds) -> Arms:
    worst = []
    for g in seeds.torch("logits"):
        p = 0.0499 * torch.rand(10_000, 1, generator=g, dtype=torch.float64)
        for gamma in (0.0, 1.0, 2.0, 4.0):
            z = p.logit().requires_grad_()
            value = asymmetric_loss(z, torch.zeros_like(z), gamma_neg=gamma, clip=0.05)
            (slope,) = torch.autograd.grad(value.sum(), z)
            worst.append(torch.stack([value.detach().abs().max(), slope.abs().max()]))
    return Arms(torch.stack(worst).view(len(seeds), -1))


def _fastest(loss: Callable[[Tensor, Tensor], Tensor], z: Tensor, y: Tensor) -> float:
    """CPU seconds of the fastest of seven turns, forward and backward."""
    seconds = []
    for _ in range(7):
        z.grad = None
        start = time.process_time()
        loss(z, y).sum().backward()
        seconds.append(time.process_time() - start)
    return min(seconds)


@claim(
    says="The asymmetric loss costs at most a fifth more than binary cross-entropy",
    kind="ratio",
    metric="time",
    margin=1.2,
    scale="forward and backward on 2048 x 1000 logits in single precision, one thread, fastest of 7 turns",
)
def the_cost_is_that_of_cross_entropy(seeds: Seeds) -> Arms:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times = []
    for g in seeds.torch("logits"):
        z = torch.randn(seeds.few(2048), 1000, generator=g).requires_grad_()
        y = (torch.rand(z.shape, generator=g) < 0.05).float()
        plain = partial(F.binary_cross_entropy_with_logits, reduction="none")
        times.append([_fastest(loss, z, y) for loss in (asymmetric_loss, plain)])
    torch.set_num_threads(threads)
    ours, theirs = zip(*times)
    return Arms(list(ours), list(theirs))
