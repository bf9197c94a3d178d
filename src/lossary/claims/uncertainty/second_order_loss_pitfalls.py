"""Pitfalls of second-order losses: what do they reward, what sets the spread, and does it shrink with the data?

The first three claims are the theorems, on Dirichlets fitted to class counts. The last asks the same of networks.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import cross_entropy, fit, gaussian_blobs, log_loss, stacked_mlp
from lossary.uncertainty import dirichlet_collapse_test, inner_loss, outer_loss, second_order_risk
from lossary.uncertainty._dirichlet import mutual_information

FEW, MANY, TEST = 32, 512, 500
MEMBERS = 5


def _drawn(seeds: Seeds, n: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Logits of Dirichlets and class frequencies, (S, n, classes) each, float64."""
    logits = [2 * torch.randn(n, classes, generator=g, dtype=torch.float64) for g in seeds.torch("logits")]
    shares = [torch.randn(n, classes, generator=g, dtype=torch.float64).softmax(-1) for g in seeds.torch("shares")]
    return torch.stack(logits), torch.stack(shares)


@claim(
    says="More precision about the same mean lowers every inner loss, right or wrong the mean; outer losses ignore it",
    kind="exact",
    metric="deviation",
    scale="slope of the risk by log alpha_0 at 500 random Dirichlets over 4 classes, log and Brier score; 0 if rising",
    tolerance=1e-12,
)
def only_certainty_is_rewarded(seeds: Seeds) -> Arms:
    logits, shares = _drawn(seeds, seeds.few(500))
    deviations = {}
    for score in ("log", "brier"):
        for loss in (inner_loss, outer_loss):
            z = logits.clone().requires_grad_()
            risk = second_order_risk(partial(loss, score=score), z, shares)
            slope = torch.autograd.grad(risk.sum(), z)[0].sum(-1)
            deviations[loss.__name__, score] = slope.clamp(min=0) if loss is inner_loss else slope.abs()
    return Arms(torch.stack(list(deviations.values())))


def _counts(seeds: Seeds) -> list[Tensor]:
    """For each seed class counts (5, 3) of 1 to 10,000 outcomes of one random distribution."""
    found = []
    for rng in seeds.numpy("counts"):
        truth = rng.dirichlet(np.ones(3))
        found.append(torch.from_numpy(np.stack([rng.multinomial(10**e, truth) for e in range(5)])))
    return found


@claim(
    says="With a KL to the flat Dirichlet at a fixed weight, the fitted alpha is 1 + frequency / weight, whatever n",
    kind="exact",
    metric="deviation",
    scale="log alpha fitted to counts of 1 to 10,000 outcomes in 3 classes, log score, weights 1, 0.1 and 0.01",
    tolerance=1e-4,
)
def the_weight_sets_the_spread(seeds: Seeds) -> Arms:
    method, stated = [], []
    for counts in _counts(seeds):
        shares = counts / counts.sum(-1, keepdim=True).double()
        for weight in (1.0, 0.1, 0.01):
            method.append(dirichlet_collapse_test(partial(inner_loss, kl_weight=weight), counts)[0].log())
            stated.append((1 + shares / weight).log())
    return Arms(torch.stack(method), torch.stack(stated))


@claim(
    says="Only a weight that knows n will do: with 1 / n the fitted alpha is Bayes' posterior, 1 + counts",
    kind="exact",
    metric="deviation",
    scale="log alpha fitted to counts of 1 to 10,000 outcomes in 3 classes, log score, weight 1 / n",
    tolerance=1e-4,
)
def one_over_n_is_bayes(seeds: Seeds) -> Arms:
    method = []
    for counts in _counts(seeds):
        weight = 1 / counts.sum(-1, keepdim=True).double()
        method.append(dirichlet_collapse_test(partial(inner_loss, kl_weight=weight), counts)[0].log())
    return Arms(torch.stack(method), torch.stack([(1.0 + counts).double().log() for counts in _counts(seeds)]))


def _network(
    seeds: Seeds, n: int, loss: Callable[..., Tensor], *, lr: float, weight_decay: float, members: int
) -> tuple[Tensor, Tensor]:
    """Logits (S, members, TEST, 2) of networks trained on the same n rows, and the labels (S, TEST)."""
    blobs = gaussian_blobs(seeds, MANY + TEST, distance=2.0)
    stack = Seeds(tuple(100 * i + m for i in seeds.ids for m in range(members)), seeds.smoke)  # init and order
    x, y = (t.repeat_interleave(members, 0) for t in (blobs.x, blobs.y))
    model = stacked_mlp((2, 32, 2), stack, activation="tanh")
    steps = seeds.few(400)
    fit(model, x[:, :n], y[:, :n], loss=loss, seeds=stack, steps=steps, batch=32, lr=lr, weight_decay=weight_decay)
    with torch.no_grad():
        return model(x[:, MANY:]).unflatten(0, (len(seeds), members)), blobs.y[:, MANY:]


def _evidential(seeds: Seeds, n: int, *, kl_weight: float, lr: float) -> tuple[Tensor, Tensor]:
    """Mean mutual information, and log-loss, per seed."""
    loss = partial(inner_loss, kl_weight=kl_weight)
    logits, y = _network(seeds, n, loss, lr=lr, weight_decay=0.0, members=1)
    return mutual_information(logits[:, 0].double().exp()).mean(-1), log_loss(logits[:, 0], y)


def _ensemble(seeds: Seeds, n: int, *, weight_decay: float, lr: float) -> tuple[Tensor, Tensor]:
    """Mean mutual information, and log-loss, per seed."""
    logits, y = _network(seeds, n, cross_entropy, lr=lr, weight_decay=weight_decay, members=MEMBERS)
    p = logits.double().softmax(-1)
    apart = torch.special.entr(p.mean(1)).sum(-1) - torch.special.entr(p).sum(-1).mean(1)
    return apart.mean(-1), log_loss(p.mean(1).log(), y)


@claim(
    says="Sixteen times the data shrink an ensemble's mutual information at least twice as much as an evidential net's",
    kind="ratio",
    metric="variance",
    margin=0.5,
    scale="two Gaussian classes, 32 and 512 rows, MLP 2-32-2, 400 steps of 32, 5 members; 4 settings each, by log-loss",
)
def ensembles_learn_that_they_have_learned(seeds: Seeds) -> Arms:
    rates = (0.03, 0.1)
    evidential = tune(
        lambda s, **setting: _evidential(s, MANY, **setting)[1],
        [{"kl_weight": w, "lr": lr} for w in (0.01, 0.1) for lr in rates],
        seeds,
        better="lower",
    )
    ensemble = tune(
        lambda s, **setting: _ensemble(s, MANY, **setting)[1],
        [{"weight_decay": w, "lr": lr} for w in (0.0, 1e-3) for lr in rates],
        seeds,
        better="lower",
    )
    many, few = [_ensemble(seeds, n, **ensemble)[0] for n in (MANY, FEW)]
    plain_many, plain_few = [_evidential(seeds, n, **evidential)[0] for n in (MANY, FEW)]
    details = {"method": ensemble, "baseline": evidential, "Bayes would give about": FEW / MANY}
    return Arms(many / few, plain_many / plain_few, details)
