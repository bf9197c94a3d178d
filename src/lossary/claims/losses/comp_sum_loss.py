"""Comp-sum losses: is the bound ever violated, is it tight, and does the smooth adversarial form beat TRADES?"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import (
    comp_sum_loss,
    h_consistency_bound,
    margin_shift_attack,
    minimizability_gap,
    smooth_adversarial_comp_sum_loss,
)
from lossary.tasks import accuracy, digits, fit, split, stacked_mlp

TAUS = (0.0, 0.5, 1.0, 1.3, 1.7, 2.0, 3.0)


def _risks(scores: Tensor, p: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """Zero-one and surrogate estimation error plus gap, (N,), of scores (N, points, K) under probabilities p."""
    labels = torch.arange(p.shape[-1]).expand_as(p)
    values = comp_sum_loss(scores.unsqueeze(-2).expand(*p.shape, p.shape[-1]), labels, tau=tau)
    surrogate = torch.vmap(partial(minimizability_gap, tau=tau))((p * values).sum(-1).mean(-1), p)
    errors = p.amax(-1) - p.gather(-1, scores.argmax(-1, keepdim=True)).squeeze(-1)
    return errors.mean(-1), surrogate


@claim(
    says="The H-consistency bound of comp-sum losses is never violated",
    kind="exact",
    metric="deviation",
    tolerance=1e-7,
    scale="3000 distributions on 3 points for each seed and tau 0 to 3, with 2, 3 or 10 classes; half near a tie",
)
def the_bound_is_never_violated(seeds: Seeds) -> Arms:
    worst = []
    for rng in seeds.numpy("distributions"):
        for classes in (2, 3, 10):
            sharpness = rng.choice([0.1, 1.0, 10.0], size=(1000, 1, 1))
            p = torch.from_numpy(rng.standard_gamma(sharpness, size=(1000, 3, classes)) + 1e-12)
            p = p / p.sum(-1, keepdim=True)
            noise = torch.from_numpy(rng.standard_normal(p.shape) * rng.choice([1e-3, 2.0], size=(1000, 1, 1)))
            top_two = p.topk(2, -1)
            tied = p.log().scatter(-1, top_two.indices, top_two.values.mean(-1, keepdim=True).log().expand(-1, -1, 2))
            for tau in TAUS:
                errors, surrogate = _risks(tied + noise, p, tau)
                bound = h_consistency_bound(surrogate, tau=tau, num_classes=classes)
                worst.append((errors - bound).clamp_min(0).max())
    return Arms(torch.stack(worst).view(len(seeds), -1))


@claim(
    says="With two classes the H-consistency bound is tight for tau up to 2",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="one point whose classes differ in probability by 0.01 to 0.99, scores tied but for the wrong winner",
)
def the_bound_is_tight(seeds: Seeds) -> Arms:
    b = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    p = torch.stack([(1 + b) / 2, (1 - b) / 2], -1).unsqueeze(-2)
    scores = torch.tensor([0.0, 1e-9], dtype=torch.float64).expand_as(p)
    slack = []
    for tau in TAUS[:-1]:
        errors, surrogate = _risks(scores, p, tau)
        slack.append((h_consistency_bound(surrogate, tau=tau, num_classes=2) - errors).abs().max())
    return Arms(torch.stack(slack))


# Adversarial training. Both arms take the same attack budget and the same number of settings.

EPSILON, ASCENT = 0.1, {"steps": 5, "step_size": 0.03}
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]


def _ascend(shift: Callable[[Tensor], Tensor], x: Tensor, start: Tensor, *, steps: int, step_size: float) -> Tensor:
    """Inputs within EPSILON of x, from 0 to 1, that signed gradient steps find to make `shift` large."""
    moved = start.detach()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(shift(moved.requires_grad_()).sum(), moved)
        moved = (moved.detach() + step_size * slope.sign()).clamp(x - EPSILON, x + EPSILON).clamp(0, 1)
    return moved


def _trades(generator: Generator, *, beta: float) -> Objective:
    """Cross-entropy + beta KL(p(x) || p(x')), x' ascending the divergence from a point near x."""

    def divergence(clean: Tensor, moved: Tensor) -> Tensor:
        return F.kl_div(moved.log_softmax(-1), clean.log_softmax(-1), reduction="none", log_target=True).sum(-1)

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        clean = model(x)
        near = x + 0.001 * torch.randn(x.shape, generator=generator)
        moved = _ascend(lambda z: divergence(clean.detach(), model(z)), x, near, **ASCENT)
        return (comp_sum_loss(clean, y, tau=1.0) + beta * divergence(clean, model(moved))).mean(-1)

    return objective


def _smooth(generator: Generator, *, nu: float) -> Objective:
    """The smooth adversarial comp-sum loss at tau = rho = 1."""

    def objective(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        moved = margin_shift_attack(model, x, y, generator=generator, epsilon=EPSILON, **ASCENT).clamp(0, 1)
        return smooth_adversarial_comp_sum_loss(model(x), y, perturbed=model(moved), nu=nu).mean(-1)

    return objective


def _accuracies(seeds: Seeds, *, lr: float, **hyper: float) -> tuple[Tensor, Tensor]:
    """Accuracy in percent on attacked and on clean test inputs, per seed; beta means TRADES, nu the smooth loss."""
    data, model = digits(), stacked_mlp((64, 64, 10), seeds)
    parts = split(data, seeds)
    objective = (_trades if "beta" in hyper else _smooth)(seeds.torch("attack")[0], **hyper)
    fit(
        model,
        data.x,
        data.y,
        loss=lambda z, y: z.new_zeros(y.shape),  # the objective is the penalty's, which may call the model
        penalty=objective,
        seeds=seeds,
        train=parts.train,
        steps=seeds.few(200),
        lr=lr,
    )
    x, y = data.x[parts.test], data.y[parts.test]
    attacked = _ascend(lambda z: comp_sum_loss(model(z), y, tau=1.0), x, x, steps=seeds.few(20), step_size=0.02)
    return accuracy(model(attacked), y), accuracy(model(x), y)


def _against_trades(seeds: Seeds, *, which: int) -> Arms:
    """Attacked (0) or clean (1) accuracy, both arms at the setting of best attacked accuracy."""

    def attacked(seeds: Seeds, **setting: float) -> Tensor:
        return _accuracies(seeds, **setting)[0]

    rates = (0.03, 0.1)
    trades = tune(attacked, [{"beta": beta, "lr": lr} for beta in (1.0, 3.0, 6.0) for lr in rates], seeds)
    smooth = tune(attacked, [{"nu": nu, "lr": lr} for nu in (0.3, 1.0, 3.0) for lr in rates], seeds)
    measured = [_accuracies(seeds, **setting)[which] for setting in (smooth, trades)]
    return Arms(*measured, {"method": smooth, "baseline": trades})


@claim(
    says="The smooth adversarial comp-sum loss is more accurate under attack than TRADES",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, attacks of 20 steps within 0.1 per pixel, MLP 64-64-10, 200 steps of 64 x 5; 6 settings each",
)
def smooth_loss_beats_trades_under_attack(seeds: Seeds) -> Arms:
    return _against_trades(seeds, which=0)


@claim(
    says="The smooth adversarial comp-sum loss is more accurate on clean inputs than TRADES",
    kind="superiority",
    metric="accuracy",
    scale="digits 8x8, trained against attacks within 0.1 a pixel, MLP 64-64-10, 200 steps of 64 x 5; 6 settings each",
)
def smooth_loss_beats_trades_on_clean_inputs(seeds: Seeds) -> Arms:
    return _against_trades(seeds, which=1)
