"""Debiased weight: does 1 / sqrt(SNR) give better samples, and better x_0 in deep noise, than constant weights?

A perceptron predicts the noise of eight unevenly weighted Gaussians on a circle, under the linear schedule of the
paper; the exact posterior mean is known.
"""

from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import snr_weight
from lossary.diffusion._denoiser import Denoiser, denoising_error
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import over, variance_preserving
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
PROCESS = variance_preserving()
RATES = (0.001, 0.003, 0.01)


def _trained(seeds: Seeds, *, kind: str, lr: float, gamma: float | None = None) -> Denoiser:
    denoise = Denoiser(stacked_denoiser(2, seeds, process=PROCESS).network, PROCESS, "noise")

    def loss(denoise: Denoiser, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        weight = snr_weight(sigma**-2, kind=kind, prediction="clean", gamma=gamma)
        return weight * denoising_error(denoise, clean, sigma, noise)

    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(500, smoke=2), lr=lr, loss=loss)
    return denoise


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    return (torch.stack([TRUTH.sample(n, generator=g)[0] for g in generators]).float(),)


def _samples(denoise: Denoiser, seeds: Seeds, evaluations: int) -> Tensor:
    """(S, n, 2) by DDIM from shared noise."""
    sigmas = process_sigmas(PROCESS, evaluations)
    noise = torch.stack([torch.randn(seeds.few(2000, smoke=16), 2, generator=g) for g in seeds.torch("start")])
    with torch.no_grad():
        return euler(denoise, sigmas[0].item() * noise, sigmas)


def _distance(seeds: Seeds, *, evaluations: int = 50, **setting: object) -> list[float]:
    found = _samples(_trained(seeds, **setting), seeds, evaluations)
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


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds) -> Arms:
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (method, baseline))
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Weighting noise errors by 1 / sqrt(SNR) gives samples nearer the truth than constant weights, in 50 steps",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 128; DDIM, 50 evaluations; 3 learning rates each",
)
def debiased_beats_constant(seeds: Seeds) -> Arms:
    return _compare(_distance, DEBIASED, CONSTANT, seeds)


@claim(
    says="The same in 10 steps",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 128; DDIM, 10 evaluations; 3 learning rates each",
)
def debiased_beats_constant_in_few_steps(seeds: Seeds) -> Arms:
    return _compare(partial(_distance, evaluations=10), DEBIASED, CONSTANT, seeds)


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
    return _compare(_distance, DEBIASED, [{"kind": "min_snr", "gamma": 5.0, "lr": lr} for lr in RATES], seeds)


def draw(seeds: Seeds) -> list[Panel]:
    """Samples in 10 steps, beside the truth."""
    one = seeds.one(0)
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    for kind in ("constant", "debiased"):
        found = _samples(_trained(one, kind=kind, lr=0.003), one, 10)[0, :600]
        panels.append(Panel(f"{kind} weights, 10 evaluations", points=found.numpy()))
    return panels
