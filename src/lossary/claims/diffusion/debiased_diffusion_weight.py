"""Debiased weight: does 1 / sqrt(SNR) give better samples, and better x_0 in deep noise, than constant weights?

A perceptron predicts the noise of eight unevenly weighted Gaussians on a circle, under the linear schedule of the
paper; the exact posterior mean is known. Then the noise of real digits, of 64 pixels; their distance is Frechet's
between features.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import snr_weight
from lossary.diffusion._denoiser import Denoiser, denoising_error
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import over, variance_preserving
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import digit_distance, drawn_digits, fit_denoiser, sheet, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
PROCESS = variance_preserving()
RATES = (0.001, 0.003, 0.01)


def _trained(seeds: Seeds, *, kind: str, lr: float, gamma: float | None = None, digits: bool = False) -> Denoiser:
    size, hidden, draw = (64, (128, 128), _digits) if digits else (2, (64, 64), _draw)
    denoise = Denoiser(stacked_denoiser(size, seeds, hidden=hidden, process=PROCESS).network, PROCESS, "noise")

    def loss(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        weight = snr_weight(sigma**-2, kind=kind, prediction="clean", gamma=gamma)
        return weight * denoising_error(denoise, clean, sigma, noise)

    steps = seeds.few(1000 if digits else 500, smoke=2)
    fit_denoiser(denoise, draw, seeds=seeds, steps=steps, lr=lr, loss=loss)
    return denoise


def _draw(n: int, generators: Sequence[Generator]) -> tuple[Tensor]:
    return (torch.stack([TRUTH.sample(n, generator=g)[0] for g in generators]).float(),)


def _digits(n: int, generators: Sequence[Generator]) -> tuple[Tensor]:
    return drawn_digits(n, generators)[:1]


def _samples(denoise: Denoiser, seeds: Seeds, evaluations: int, *, digits: bool = False) -> Tensor:
    """(S, n, 2), or (S, n, 1, 8, 8), by DDIM from shared noise."""
    sigmas = process_sigmas(PROCESS, evaluations)
    n, shape = (300, (1, 8, 8)) if digits else (2000, (2,))
    start = [torch.randn(seeds.few(n, smoke=16), math.prod(shape), generator=g) for g in seeds.torch("start")]
    bound = 1.0 if digits else math.inf  # of pixels, as is usual in sampling pictures

    def bounded(x: Tensor, sigma: float) -> Tensor:
        return denoise(x, sigma).clamp(-bound, bound)

    with torch.no_grad():
        return euler(bounded, sigmas[0].item() * torch.stack(start), sigmas).unflatten(-1, shape)


def _distance(seeds: Seeds, *, evaluations: int, digits: bool = False, **setting: object) -> list[float]:
    found = _samples(_trained(seeds, digits=digits, **setting), seeds, evaluations, digits=digits)
    if digits:
        return digit_distance(found).tolist()
    (true,) = _draw(found.shape[1], seeds.torch("true"))
    return sliced_wasserstein(found, true).tolist()


def _bias(seeds: Seeds, **setting: object) -> list[float]:
    """Root mean square of x_0-hat minus the exact posterior mean over the noisiest quarter of the steps."""
    denoise = _trained(seeds, **setting)
    (clean,) = _draw(seeds.few(2000, smoke=16), seeds.torch("test"))
    noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in seeds.torch("test noise")])
    sigma = PROCESS.ratio(torch.linspace(0.75, 0.999, clean.shape[1])).expand(clean.shape[:2])
    x = clean + over(sigma, clean) * noise
    with torch.no_grad():
        error = denoise(x, sigma).double() - TRUTH.denoise(x.double(), sigma.double())
    return error.square().mean((1, 2)).sqrt().tolist()


CONSTANT = [{"kind": "constant", "lr": lr} for lr in RATES]
DEBIASED = [{"kind": "debiased", "lr": lr} for lr in RATES]
DIGITS = {kind: [{"kind": kind, "lr": lr} for lr in (0.003, 0.01, 0.03, 0.1)] for kind in ("debiased", "constant")}


def _compare(
    method: list[dict], baseline: list[dict], seeds: Seeds, *, evaluations: int = 50, digits: bool = False
) -> Arms:
    score = partial(_distance, evaluations=evaluations, digits=digits)
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (method, baseline))
    details = {"evaluations": [evaluations, evaluations], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="Weighting noise errors by 1 / sqrt(SNR) gives samples nearer the truth than constant weights, in 50 steps",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 128; DDIM, 50 evaluations; 3 learning rates each",
)
def debiased_beats_constant(seeds: Seeds) -> Arms:
    return _compare(DEBIASED, CONSTANT, seeds)


@claim(
    says="The same in 10 steps",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 128; DDIM, 10 evaluations; 3 learning rates each",
)
def debiased_beats_constant_in_few_steps(seeds: Seeds) -> Arms:
    return _compare(DEBIASED, CONSTANT, seeds, evaluations=10)


@claim(
    says="On real digits its samples are nearer the data than those of constant weights, in 50 steps",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="Frechet distance of 32 features; digits 8x8, MLP of 128, 1000 steps of 128; DDIM, 50 evaluations, 300"
    " samples; 4 learning rates each",
)
def debiased_beats_constant_on_digits(seeds: Seeds) -> Arms:
    return _compare(DIGITS["debiased"], DIGITS["constant"], seeds, digits=True)


@claim(
    says="In deep noise, debiased training brings x_0-hat at least a fifth nearer to the exact posterior mean",
    kind="ratio",
    metric="relative error",
    margin=0.8,
    scale="root mean square over the noisiest quarter of times; 8 Gaussians in 2-D, MLP of 64, 500 steps; lr 0.003",
)
def debiased_estimates_are_nearer_the_posterior_mean(seeds: Seeds) -> Arms:
    setting = {"lr": 0.003}
    return Arms(_bias(seeds, kind="debiased", **setting), _bias(seeds, kind="constant", **setting))


@claim(
    says="Debiased weights give samples nearer the truth than min-SNR weights",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 128; DDIM, 50 evaluations each; 3 settings each",
)
def debiased_beats_min_snr(seeds: Seeds) -> Arms:
    return _compare(DEBIASED, [{"kind": "min_snr", "gamma": 5.0, "lr": lr} for lr in RATES], seeds)


def draw(seeds: Seeds) -> list[Panel]:
    """Samples in 10 steps, beside the truth; digits in 50."""
    one = seeds.one(0)
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    for kind in ("constant", "debiased"):
        found = _samples(_trained(one, kind=kind, lr=0.003), one, 10)[0, :600]
        panels.append(Panel(f"{kind} weights, 10 evaluations", points=found.numpy()))
    for kind in ("constant", "debiased"):
        found = _samples(_trained(one, kind=kind, lr=0.03, digits=True), one, 50, digits=True)[0, :20]
        panels.append(Panel(f"{kind} weights, 50 evaluations", image=sheet(found)))
    return panels
