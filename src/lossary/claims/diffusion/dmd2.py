"""DMD2: five fake updates against one, a discriminator against none, own inputs against noised data; which ones help?

Eight unevenly weighted Gaussians on a circle. The teacher is their perfect denoiser, or, where a discriminator is to
mend it, a network fitted for too short a time. Generator and fake network start from a fitted network.
"""

import copy
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DMD2
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._mixture import ring
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser, stacked_mlp

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
STEPS = (20.0, 4.0, 1.0, 0.3)


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    return (torch.stack([TRUTH.sample(n, generator=g)[0] for g in generators]).float(),)


def _normal(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(n, 2, generator=g) for g in generators])


@functools.cache
def _fitted(seeds: Seeds) -> Denoiser:
    """Trained once, for too short a time; whoever trains on takes a copy."""
    denoise = stacked_denoiser(2, seeds)
    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(200, smoke=2))
    return denoise


def _distilled(
    seeds: Seeds,
    *,
    lr: float,
    fake_steps: int = 5,
    gan_weight: float = 0.0,
    steps: tuple[float, ...] | None = None,
    simulated: bool = True,
    biased: bool = False,
) -> DMD2:
    start = _fitted(seeds)
    generator = copy.deepcopy(start) if steps else OneStepGenerator(copy.deepcopy(start))
    procedure = DMD2(
        generator,
        copy.deepcopy(start),
        start if biased else TRUTH.denoise,
        head=stacked_mlp((64, 1), seeds) if gan_weight else None,
        features="network.mlp.3",
        gan_weight=gan_weight,
        levels=LEVELS,
        gan_levels=LEVELS,
        steps=steps,
        simulated=simulated,
        fake_steps=fake_steps,
    )
    number, generators = seeds.few(150, smoke=2), seeds.torch("distil")
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for n, p in procedure.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, number) for o in optimizers.values()]
    for step in range(number):
        batch = {"latent": _normal(64, generators), "real": _draw(64, generators)[0]}
        advance(procedure, batch, optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()
    return procedure


def _samples(generate: Callable[..., Tensor], seeds: Seeds) -> Tensor:
    with torch.no_grad():
        return generate(_normal(seeds.few(2000, smoke=16), seeds.torch("latent")))


def _from_truth(found: Tensor, seeds: Seeds) -> list[float]:
    return sliced_wasserstein(found, *_draw(found.shape[1], seeds.torch("true"))).tolist()


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    made = _distilled(seeds, **setting)
    if made.steps is None:
        return _from_truth(_samples(made, seeds), seeds)
    return _from_truth(_samples(lambda latent: made(latent, generator=seeds.torch("renoise")), seeds), seeds)


def _compare(method: list[dict], baseline: list[dict], seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (method, baseline))
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), {"method": ours, "baseline": theirs})


RATES = (0.0005, 0.001, 0.002, 0.004)
WITH_HEAD = [{"lr": lr, "gan_weight": weight, "biased": True} for lr in RATES[1:3] for weight in (0.01, 0.1)]


@claim(
    says="Without a regression, five updates of the fake network per generator step end nearer the data than one",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 150 generator steps of 64; 4 learning rates each",
)
def two_time_scales_help(seeds: Seeds) -> Arms:
    return _compare(*([{"lr": lr, "fake_steps": n} for lr in RATES] for n in (5, 1)), seeds)


@claim(
    says="With an imperfect teacher, the discriminator ends nearer the data than scores alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, teacher of 200 steps, MLP of 64, 150 steps of 64; 4 settings each",
)
def a_discriminator_helps(seeds: Seeds) -> Arms:
    return _compare(WITH_HEAD, [{"lr": lr, "biased": True} for lr in RATES], seeds)


@claim(
    says="With a discriminator, one evaluation is nearer the data than 35 of an imperfect teacher",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, teacher of 200 steps, Heun with 18, lowest level and rho tuned; MLP of 64,"
    " 150 steps; 4 settings each",
)
def the_student_beats_its_teacher(seeds: Seeds) -> Arms:
    def sampled(seeds: Seeds, *, low: float, rho: float) -> list[float]:
        sigmas = karras_sigmas(seeds.few(18, smoke=2), low=low, high=20.0, rho=rho)
        return _from_truth(_samples(lambda latent: heun(_fitted(seeds), 20 * latent, sigmas), seeds), seeds)

    solvers = [{"low": low, "rho": rho} for low in (0.002, 0.02) for rho in (3.0, 7.0)]
    ours, theirs = tune(_distance, WITH_HEAD, seeds, better="lower"), tune(sampled, solvers, seeds, better="lower")
    return Arms(_distance(seeds, **ours), sampled(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Four steps end nearer the data when trained on their own inputs than on noised data",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, 4 evaluations, MLP of 64, 150 steps of 64; 2 settings each",
)
def backward_simulation_helps(seeds: Seeds) -> Arms:
    grids = [[{"lr": lr, "steps": STEPS, "simulated": own} for lr in RATES[1:3]] for own in (True, False)]
    return _compare(*grids, seeds)


def draw(seeds: Seeds) -> list[Panel]:
    """An imperfect teacher's samples, its students' in one evaluation without and with a discriminator, the data."""
    one = seeds.one(0)
    sigmas = karras_sigmas(one.few(18, smoke=2), low=0.02, high=20.0)
    found = {
        "teacher, 35 evaluations": lambda latent: heun(_fitted(one), 20 * latent, sigmas),
        "scores alone": _distilled(one, lr=0.002, biased=True),
        "with a discriminator": _distilled(one, lr=0.002, gan_weight=0.1, biased=True),
    }
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    return panels + [Panel(title, points=_samples(f, one)[0, :600].numpy()) for title, f in found.items()]
