"""Adversarial adaptive sampling: does it solve a peaked Poisson problem better at the same number of points?

-Laplace u = f on the unit square with u = 0 on its boundary, where u is a Gaussian peak, at another place for each
seed, times a product b of two parabolas. Networks b(x) N(x) meet the boundary exactly. All arms train for as many steps
on 64 points; uniform ones and those drawn by residual or by the flow are renewed at the same times, and whoever looks
at residuals to place points looks at 500 each time. Settings are chosen by the error of the solution.
"""

from typing import Any

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import StackedLinear, stacked_mlp
from lossary.weighting import AdversarialAdaptiveSampler

POINTS, POOL, STAGES = 64, 500, 10
WIDTH = 0.1

ADVERSARIAL = [{"arm": "adversarial", "lr": lr, "beta": beta} for lr in (0.01, 0.02) for beta in (0.001, 0.01)]
BY_RESIDUAL = [{"arm": "by residual", "lr": lr, "power": power} for lr in (0.01, 0.02) for power in (1.0, 2.0)]
REFINED = [{"arm": "refined", "lr": lr} for lr in (0.005, 0.01, 0.02, 0.04)]
UNIFORM = [{"arm": "uniform", "lr": lr} for lr in (0.005, 0.01, 0.02, 0.04)]


def _product(value: Tensor, slope: Tensor, curvature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value, gradient and Laplacian of f(x_0) f(x_1) from those of f at both coordinates (..., 2)."""
    other = value.flip(-1)
    return value.prod(-1), slope * other, (curvature * other).sum(-1)


def _parabola(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return 4 * x * (1 - x), 4 - 8 * x, torch.full_like(x, -8.0)


def _truth(x: Tensor, centre: Tensor) -> tuple[Tensor, Tensor]:
    """The solution and its Laplacian at x (S, n, 2), with peaks at centre (S, 1, 2)."""
    a, slope, curvature = _parabola(x)
    t = (x - centre) / WIDTH
    bell = (-t.square() / 2).exp()
    factor = bell * a, bell * (slope - a * t / WIDTH)
    bent = bell * (curvature - 2 * slope * t / WIDTH + a * (t.square() - 1) / WIDTH**2)
    value, _, laplacian = _product(*factor, bent)
    return value, laplacian


def _network(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """b N and its Laplacian at x (S, n, 2): value, gradient and Laplacian go through the tanh layers together."""
    stack, n, _ = x.shape
    value, laplacian = x, torch.zeros_like(x)
    gradient = torch.eye(2).to(x).view(1, 2, 1, 2).expand(stack, 2, n, 2)
    for layer in model.children():
        if isinstance(layer, StackedLinear):
            mapped = torch.cat([value, gradient.flatten(1, 2), laplacian], 1) @ layer.weight.mT
            value, steep, laplacian = mapped.split([n, 2 * n, n], dim=1)
            value, gradient = value + layer.bias.unsqueeze(1), steep.unflatten(1, (2, n))
        else:
            value = value.tanh()
            slope = 1 - value.square()
            laplacian = slope * (laplacian - 2 * value * gradient.square().sum(1))
            gradient = slope.unsqueeze(1) * gradient
    b, b_gradient, b_laplacian = _product(*_parabola(x))
    value, laplacian = value.squeeze(-1), laplacian.squeeze(-1)
    mixed = (b_gradient * gradient.squeeze(-1).movedim(1, -1)).sum(-1)
    return b * value, b_laplacian * value + 2 * mixed + b * laplacian


def _evenly(n: int, generators: list[Generator]) -> Tensor:
    return torch.stack([torch.rand(n, 2, generator=g) for g in generators])


def _solve(seeds: Seeds, *, arm: str, lr: float, beta: float = 0.01, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """Relative L2 error of the solution, and variance of r^2 over the squared mean of r^2, both on a grid, per seed.

    The second is n times the relative variance of a mean of r^2 over n even points.
    """
    model = stacked_mlp((2, 24, 24, 1), seeds, activation="tanh")
    centre = torch.stack([0.3 + 0.4 * torch.rand(1, 2, generator=g) for g in seeds.torch("centre")])
    draws = seeds.torch("points")
    stages, steps, pool = seeds.few(STAGES, smoke=3), seeds.few(100, smoke=2), seeds.few(POOL, smoke=POINTS)

    def residual(x: Tensor) -> Tensor:
        return _truth(x, centre)[1] - _network(model, x)[1]

    sampler = AdversarialAdaptiveSampler(
        (0.0, 0.0), (1.0, 1.0), beta=beta, replicas=(len(seeds),), generator=seeds.torch("flow")
    )
    ascent = torch.optim.Adam(sampler.parameters(), lr=0.03, fused=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, stages * steps)
    added = POINTS // 2 // (stages - 1)

    x = _evenly(POINTS - added * (stages - 1) if arm == "refined" else POINTS, draws)
    for stage in range(stages):
        if stage and arm == "adversarial":
            with torch.no_grad():
                sampler.update(residual, ascent, points=pool, generator=draws)
            x = sampler.sample(POINTS, generator=draws)
        elif stage and arm == "uniform":
            x = _evenly(POINTS, draws)
        elif stage:
            candidates = _evenly(pool, draws)
            with torch.no_grad():
                size = residual(candidates).abs()
            if arm == "refined":
                rows = size.topk(added, dim=1).indices
            else:
                chance = size**power / (size**power).mean(1, keepdim=True) + 1
                rows = torch.stack([c.multinomial(POINTS, generator=g) for c, g in zip(chance, draws)])
            chosen = candidates.gather(1, rows.unsqueeze(-1).expand(-1, -1, 2))
            x = torch.cat([x, chosen], dim=1) if arm == "refined" else chosen
        _, wanted = _truth(x, centre)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward((_network(model, x)[1] - wanted).square().mean(1).sum())
            optimizer.step()
            schedule.step()

    side = (torch.arange(40) + 0.5) / 40
    grid = torch.cartesian_prod(side, side).expand(len(seeds), -1, -1)
    with torch.no_grad():
        found, (truth, _), squared = _network(model, grid)[0], _truth(grid, centre), residual(grid).square()
    error = (found - truth).norm(dim=1) / truth.norm(dim=1)
    return error, squared.var(1) / squared.mean(1).square()


def _error(seeds: Seeds, **setting: Any) -> Tensor:
    return _solve(seeds, **setting)[0]


def _compare(seeds: Seeds, grid: list[dict[str, Any]], measure: int = 0) -> Arms:
    """The adversarial sampler against another arm, each at its best setting."""
    method, baseline = (tune(_error, settings, seeds, better="lower") for settings in (ADVERSARIAL, grid))
    values, others = _solve(seeds, **method), _solve(seeds, **baseline)
    means = {"mean errors": [float(arm[0].mean()) for arm in (values, others)]}
    return Arms(values[measure], others[measure], {"method": method, "baseline": baseline, **means})


@claim(
    says="Adversarial sampling leaves at most 0.9 of the error that drawing by the size of the residual (RAD) leaves",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="2-D Poisson, peak of width 0.1, 64 points renewed 9 times, tanh MLP 2-24-24-1, 1000 steps; 4 settings each",
)
def adversarial_beats_residual_based(seeds: Seeds) -> Arms:
    return _compare(seeds, BY_RESIDUAL)


@claim(
    says="Adversarial sampling leaves at most 0.9 of the error that adding points of large residual (RAR) leaves",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="2-D Poisson, peak of width 0.1, 64 points renewed 9 times, tanh MLP 2-24-24-1, 1000 steps; 4 settings each",
)
def adversarial_beats_refinement(seeds: Seeds) -> Arms:
    return _compare(seeds, REFINED)


@claim(
    says="Adversarial sampling leaves at most 0.9 of the error that uniform points leave",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="2-D Poisson, peak of width 0.1, 64 points renewed 9 times, tanh MLP 2-24-24-1, 1000 steps; 4 settings each",
)
def adversarial_beats_uniform(seeds: Seeds) -> Arms:
    return _compare(seeds, UNIFORM)


@claim(
    says="Adversarial sampling flattens the residual: the relative variance of its square is at most 0.9 of that"
    " under uniform points",
    kind="ratio",
    metric="variance",
    margin=0.9,
    scale="2-D Poisson, peak of width 0.1, 64 points renewed 9 times, tanh MLP 2-24-24-1, 1000 steps; 4 settings each",
)
def adversarial_flattens_the_residual(seeds: Seeds) -> Arms:
    return _compare(seeds, UNIFORM, measure=1)
