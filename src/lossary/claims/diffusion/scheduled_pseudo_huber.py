"""Scheduled pseudo-Huber: nearer the clean data when one training sample in ten is foreign, and no worse when none is?

A perceptron predicts the noise of six Gaussians on a circle; outliers come from one far Gaussian. Samples are held
against clean data, in the tuning of every arm too.
"""

from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import exponential_delta, scheduled_pseudo_huber_loss
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import cosine
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

CLEAN = ring(6, radius=1.2, scale=0.2)
FAR = torch.tensor([4.0, 4.0])
PROCESS = cosine()


def _data(n: int, generators: list[torch.Generator], *, outliers: float = 0.0) -> tuple[Tensor]:
    batches = []
    for g in generators:
        x = CLEAN.sample(n, generator=g)[0].float()
        foreign = torch.rand(n, 1, generator=g) < outliers
        batches.append(torch.where(foreign, FAR + 0.2 * torch.randn(n, 2, generator=g), x))
    return (torch.stack(batches),)


def _trained(seeds: Seeds, *, lr: float, outliers: float, smallest: float = 0.0, constant: float = 0.0) -> Denoiser:
    """Under the squared error, or the pseudo-Huber loss where `smallest` (scheduled) or `constant` gives its delta."""
    denoise = Denoiser(stacked_denoiser(2, seeds, process=PROCESS).network, PROCESS, "noise")

    def loss(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        t = PROCESS.time(sigma)
        predicted = denoise.network(PROCESS.noised(clean, noise, t), t)
        if not smallest and not constant:
            return (predicted - noise).square().mean(-1)
        delta = exponential_delta(t, smallest=smallest) if smallest else torch.full_like(t, constant)
        return scheduled_pseudo_huber_loss(predicted, noise, delta=delta)

    draw = partial(_data, outliers=outliers)
    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr, loss=loss)
    return denoise


def _samples(seeds: Seeds, *, outliers: float, **setting: float) -> Tensor:
    """(S, n, 2) by DDIM in 30 evaluations, from shared noise."""
    denoise = _trained(seeds, outliers=outliers, **setting)
    sigmas = process_sigmas(PROCESS, 30, first=0.99)
    noise = torch.stack([torch.randn(seeds.few(2000, smoke=16), 2, generator=g) for g in seeds.torch("start")])
    with torch.no_grad():
        return euler(denoise, sigmas[0].item() * noise, sigmas)


def _distance(seeds: Seeds, *, outliers: float = 0.1, **setting: float) -> list[float]:
    found = _samples(seeds, outliers=outliers, **setting)
    (clean,) = _data(found.shape[1], seeds.torch("true"))
    return sliced_wasserstein(found, clean).tolist()


def _share(seeds: Seeds, *, outliers: float = 0.1, **setting: float) -> list[float]:
    """Samples nearer to the outliers than to the circle's centre, in percent."""
    found = _samples(seeds, outliers=outliers, **setting)
    return (100 * ((found - FAR).norm(dim=-1) < found.norm(dim=-1)).double().mean(-1)).tolist()


SQUARED = [{"lr": lr} for lr in (0.001, 0.003, 0.01, 0.03)]
SCHEDULED = [{"lr": lr, "smallest": d} for lr in (0.003, 0.01) for d in (0.1, 0.01)]
CONSTANT = [{"lr": lr, "constant": d} for lr in (0.003, 0.01) for d in (0.5, 0.1)]


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds, **fixed: float) -> Arms:
    tuned = partial(_distance, **fixed)
    ours, theirs = (tune(tuned, grid, seeds, better="lower") for grid in (method, baseline))
    arms = score(seeds, **ours, **fixed), score(seeds, **theirs, **fixed)
    return Arms(*arms, {"method": ours, "baseline": theirs})


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
    """Training data with outliers, and samples of each loss."""
    one = seeds.one(0)
    panels = [Panel("training data", points=_data(600, one.torch("true"), outliers=0.1)[0][0].numpy())]
    for name, setting in (("squared", {}), ("constant", {"constant": 0.1}), ("scheduled", {"smallest": 0.01})):
        found = _samples(one, lr=0.003, outliers=0.1, **setting)[0, :600]
        panels.append(Panel(f"{name} loss", points=found.numpy()))
    return panels
