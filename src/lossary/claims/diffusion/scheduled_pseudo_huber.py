"""Scheduled pseudo-Huber: nearer the clean data when one training sample in ten is foreign, and no worse when none is?

A perceptron predicts the noise of six Gaussians on a circle; outliers come from one far Gaussian. Then that of real
digits, of 64 pixels; outliers are their negatives, dark on a bright ground, and the distance is Frechet's between
features. Samples are held against clean data, in the tuning of every arm too.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import exponential_delta, scheduled_pseudo_huber_loss
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import cosine
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import digit_distance, drawn_digits, fit_denoiser, sheet, sliced_wasserstein, stacked_denoiser

CLEAN = ring(6, radius=1.2, scale=0.2)
FAR = torch.tensor([4.0, 4.0])
PROCESS = cosine()
STEPS = 30  # of DDIM


def _data(n: int, generators: Sequence[Generator], *, outliers: float = 0.0) -> tuple[Tensor]:
    batches = []
    for g in generators:
        x = CLEAN.sample(n, generator=g)[0].float()
        foreign = torch.rand(n, 1, generator=g) < outliers
        batches.append(torch.where(foreign, FAR + 0.2 * torch.randn(n, 2, generator=g), x))
    return (torch.stack(batches),)


def _digits(n: int, generators: Sequence[Generator], *, outliers: float) -> tuple[Tensor]:
    """(S, n, 64)."""
    x, _ = drawn_digits(n, generators)
    negative = torch.stack([torch.rand(n, 1, generator=g) < outliers for g in generators])
    return (torch.where(negative, -x, x),)


def _trained(
    seeds: Seeds,
    *,
    lr: float,
    outliers: float,
    smallest: float = 0.0,
    constant: float = 0.0,
    digits: bool = False,
) -> Denoiser:
    """Under the squared error, or the pseudo-Huber loss where `smallest` (scheduled) or `constant` gives its delta."""
    size, hidden, data = (64, (128, 128), _digits) if digits else (2, (64, 64), _data)
    denoise = Denoiser(stacked_denoiser(size, seeds, hidden=hidden, process=PROCESS).network, PROCESS, "noise")

    def loss(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        t = PROCESS.time(sigma)
        predicted = denoise.network(PROCESS.noised(clean, noise, t), t)
        if not smallest and not constant:
            return (predicted - noise).square().mean(-1)
        delta = exponential_delta(t, smallest=smallest) if smallest else torch.full_like(t, constant)
        return scheduled_pseudo_huber_loss(predicted, noise, delta=delta)

    draw = partial(data, outliers=outliers)
    steps = seeds.few(1000 if digits else 400, smoke=2)
    fit_denoiser(denoise, draw, seeds=seeds, steps=steps, lr=lr, loss=loss)
    return denoise


def _samples(seeds: Seeds, *, outliers: float, digits: bool = False, **setting: float) -> Tensor:
    """(S, n, 2), or (S, n, 1, 8, 8), by DDIM from shared noise."""
    denoise = _trained(seeds, outliers=outliers, digits=digits, **setting)
    sigmas = process_sigmas(PROCESS, STEPS, first=0.99)
    n, shape = (300, (1, 8, 8)) if digits else (2000, (2,))
    start = [torch.randn(seeds.few(n, smoke=16), math.prod(shape), generator=g) for g in seeds.torch("start")]
    bound = 1.0 if digits else math.inf  # of pixels, as is usual in sampling pictures

    def bounded(x: Tensor, sigma: float) -> Tensor:
        return denoise(x, sigma).clamp(-bound, bound)

    with torch.no_grad():
        return euler(bounded, sigmas[0].item() * torch.stack(start), sigmas).unflatten(-1, shape)


def _distance(seeds: Seeds, *, outliers: float = 0.1, digits: bool = False, **setting: float) -> list[float]:
    found = _samples(seeds, outliers=outliers, digits=digits, **setting)
    if digits:
        return digit_distance(found).tolist()
    (clean,) = _data(found.shape[1], seeds.torch("true"))
    return sliced_wasserstein(found, clean).tolist()


def _share(seeds: Seeds, *, outliers: float = 0.1, **setting: float) -> list[float]:
    """Samples nearer to the outliers than to the circle's centre, in percent."""
    found = _samples(seeds, outliers=outliers, **setting)
    return (100 * ((found - FAR).norm(dim=-1) < found.norm(dim=-1)).double().mean(-1)).tolist()


SQUARED = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03)]
SCHEDULED = [{"lr": lr, "smallest": d} for lr in (0.003, 0.01) for d in (0.1, 0.01)]
CONSTANT = [{"lr": lr, "constant": d} for lr in (0.003, 0.01) for d in (0.5, 0.1)]


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds, **fixed: object) -> Arms:
    tuned = partial(_distance, **fixed)
    ours, theirs = (tune(tuned, grid, seeds, better="lower") for grid in (method, baseline))
    arms = score(seeds, **ours, **fixed), score(seeds, **theirs, **fixed)
    return Arms(*arms, {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs})


@claim(
    says="With a tenth of outliers in training, the scheduled loss samples nearer the clean data than squared error",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 6 Gaussians in 2-D and one far off, MLP of 64, 400 steps; DDIM, 30 evaluations; 4 settings each",
)
def scheduled_beats_squared_error(seeds: Seeds) -> Arms:
    return _compare(_distance, SCHEDULED, SQUARED, seeds)


@claim(
    says="It draws outliers less often, by at least a point",
    kind="superiority",
    metric="mode error",
    scale="percent of samples at the outliers, of which training has 10%; otherwise as for the distance",
)
def scheduled_draws_fewer_outliers(seeds: Seeds) -> Arms:
    return _compare(_share, SCHEDULED, SQUARED, seeds)


@claim(
    says="With a tenth of negatives in training, its samples are nearer real digits than those of squared error",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; digits 8x8, MLP of 128, 1000 steps; DDIM, 30 evaluations, 300 samples;"
    " 6 settings each",
)
def scheduled_beats_squared_error_on_digits(seeds: Seeds) -> Arms:
    scheduled = [{"lr": lr, "smallest": d} for lr in (0.01, 0.03, 0.1) for d in (0.3, 0.03)]
    squared = [{"lr": lr} for lr in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)]
    return _compare(_distance, scheduled, squared, seeds, digits=True)


@claim(
    says="The schedule is better than a constant delta",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 6 Gaussians in 2-D and one far off, MLP of 64, 400 steps; DDIM, 30 evaluations; 4 settings each",
)
def scheduled_beats_constant(seeds: Seeds) -> Arms:
    return _compare(_distance, SCHEDULED, CONSTANT, seeds)


@claim(
    says="On clean data the scheduled loss keeps the quality of squared error, within a tenth",
    kind="ratio",
    metric="sample distance",
    margin=1.1,
    scale="sliced W1; 6 Gaussians in 2-D, no outliers, MLP of 64, 400 steps; DDIM, 30 evaluations; 4 settings each",
)
def scheduled_keeps_quality_on_clean_data(seeds: Seeds) -> Arms:
    return _compare(_distance, SCHEDULED, SQUARED, seeds, outliers=0.0)


def draw(seeds: Seeds) -> list[Panel]:
    """Training data with outliers, and samples of each loss; digits of two."""
    one = seeds.one(0)
    panels = [Panel("training data", points=_data(600, one.torch("true"), outliers=0.1)[0][0].numpy())]
    for name, setting in (("squared", {}), ("constant", {"constant": 0.1}), ("scheduled", {"smallest": 0.01})):
        found = _samples(one, lr=0.003, outliers=0.1, **setting)[0, :600]
        panels.append(Panel(f"{name} loss", points=found.numpy()))
    for name, setting in (("squared", {}), ("scheduled", {"smallest": 0.01})):
        found = _samples(one, lr=0.03, outliers=0.1, digits=True, **setting)[0, :20]
        panels.append(Panel(f"{name} loss", image=sheet(found)))
    return panels
