"""DisBack: does the detour over the teacher's degraded copies bring the generator sooner to the data, and as near?

Eight unevenly weighted Gaussians on a circle; the teacher is a network fitted to them, of which generator, fake network
and path are copies, as in the paper. Recording takes 100 updates of one network, 5 points.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DistributionBacktracking, degradation_path, distribution_matching_gradient
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import over
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RECORDING = 100


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    return (torch.stack([TRUTH.sample(n, generator=g)[0] for g in generators]).float(),)


def _normal(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(n, 2, generator=g) for g in generators])


@functools.cache
def _fitted(seeds: Seeds) -> Denoiser:
    """Trained once; whoever trains on takes a copy."""
    denoise = stacked_denoiser(2, seeds)
    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(500, smoke=2))
    return denoise


@functools.cache
def _path(seeds: Seeds) -> list[nn.Module]:
    """Of the teacher and five copies."""
    teacher, generators, steps = _fitted(seeds), seeds.torch("record"), seeds.few(RECORDING, smoke=5)
    batches = ({"latent": _normal(64, generators)} for _ in range(steps))
    return degradation_path(
        teacher,
        OneStepGenerator(copy.deepcopy(teacher)),
        batches,
        functools.partial(torch.optim.Adam, lr=0.002),
        every=steps // 5,
        levels=LEVELS,
        random=generators,
    )


class _Evened(DistributionBacktracking):
    """With DMD's weights, of which a teacher's error decides, for both arms."""

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return distribution_matching_gradient(x, real, fake, dims=sigma.ndim)


def _distilled(seeds: Seeds, *, lr: float, interval: int = 0, steps: int = 300) -> OneStepGenerator:
    """Without an interval the teacher is the target all along."""
    path = _path(seeds) if interval else [_fitted(seeds)]
    procedure = _Evened(OneStepGenerator(copy.deepcopy(_fitted(seeds))), path, interval=max(interval, 1), levels=LEVELS)
    steps, generators = seeds.few(steps, smoke=2), seeds.torch("distil")
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for n, p in procedure.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    for step in range(steps):
        advance(procedure, {"latent": _normal(64, generators)}, optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()
    return procedure.generator


def _samples(generator: Callable[[Tensor], Tensor], seeds: Seeds) -> Tensor:
    with torch.no_grad():
        return generator(_normal(seeds.few(2000, smoke=16), seeds.torch("latent")))


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    found = _samples(_distilled(seeds, **setting), seeds)
    return sliced_wasserstein(found, *_draw(found.shape[1], seeds.torch("true"))).tolist()


def _compare(method: list[dict], baseline: list[dict], seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (method, baseline))
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), {"method": ours, "baseline": theirs})


RATES = (0.0005, 0.001, 0.002, 0.004)


@claim(
    says="After as many generator steps, backtracking ends nearer the data than the teacher as the only target",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 5 points on the path, 300 steps of 64; 4 settings each",
)
def backtracking_ends_nearer(seeds: Seeds) -> Arms:
    ours = [{"lr": lr, "interval": interval} for lr in RATES[1:3] for interval in (10, 30)]
    return _compare(ours, [{"lr": lr} for lr in RATES], seeds)


@claim(
    says="Backtracking is faster: 100 steps of it end nearer the data than 150 of plain distillation, which has 50 more"
    " for the recording's cost",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 5 points on the path, batches of 64; 4 settings each",
)
def backtracking_is_faster(seeds: Seeds) -> Arms:
    ours = [{"lr": lr, "interval": interval, "steps": 100} for lr in RATES[2:] for interval in (5, 15)]
    return _compare(ours, [{"lr": lr, "steps": 100 + RECORDING // 2} for lr in RATES], seeds)


@claim(
    says="At its samples the untrained generator's exact scores differ at most half as much from the first target's as"
    " from the teacher's",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="root mean square, times noise level, 0.2 to 20; 8 Gaussians in 2-D, MLP of 64, a path of 5; exact for a bank"
    " of 4000 samples, at 500 others",
)
def the_first_target_matches(seeds: Seeds) -> Arms:
    path, generators = _path(seeds), seeds.torch("mismatch")
    generator, levels = OneStepGenerator(_fitted(seeds)), karras_levels(0.2, 20.0)
    with torch.no_grad():
        bank, x = (generator(_normal(seeds.few(n), generators)) for n in (4000, 500))
        sigma = levels(tuple(x.shape[:-1]), generators)
        width = over(sigma, x)
        x_t = x + width * _normal(x.shape[1], generators)
        own = torch.stack([_posterior_mean(*each) for each in zip(x_t, width, bank)])
        apart = [(target(x_t, sigma) - own) / width for target in (path[-2], path[0])]
    return Arms(*(a.square().mean((1, 2)).sqrt().tolist() for a in apart))


def _posterior_mean(x_t: Tensor, sigma: Tensor, bank: Tensor) -> Tensor:
    """E[x_0 | x_t] where x_0 is any sample of the bank: (n, 2), levels (n, 1), (m, 2) -> (n, 2)."""
    square = (x_t.unsqueeze(1) - bank).square().sum(-1)
    return (-square / (2 * sigma**2)).softmax(-1) @ bank


def draw(seeds: Seeds) -> list[Panel]:
    """One-step samples after 100 steps, with the teacher as only target and with its path."""
    one = seeds.one(0)
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    found = {"start": OneStepGenerator(_fitted(one))}
    found["teacher, 100 steps"] = _distilled(one, lr=0.002, steps=100)
    found["path, 100 steps"] = _distilled(one, lr=0.002, steps=100, interval=10)
    return panels + [Panel(title, points=_samples(f, one)[0, :600].numpy()) for title, f in found.items()]
