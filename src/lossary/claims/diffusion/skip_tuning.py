"""Skip-Tuning on one small U-Net of 8x8 digits: better samples in nine evaluations, at a price in pixels?

Two skips, the deeper one scaled most, on the network of `digit_denoiser`; digits of all classes in equal parts. The
distance is Frechet's between 32 features of a perceptron that tells real digits apart. Either arm also has the other's
knob at its default: ours tunes the deepest factor, the baseline the spacing of its noise levels.
"""

import functools

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import SkipTuning
from lossary.diffusion._denoiser import Counted, Denoise, Denoiser
from lossary.diffusion._process import over
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.tasks import digit_classifier, digit_denoiser, digit_distance, digit_images, sheet

BOTTOM = [{"bottom": bottom} for bottom in (0.95, 0.9, 0.8, 0.7)]
SPACING = [{"rho": rho} for rho in (3.0, 5.0, 7.0, 10.0)]
MIDDLE = (0.3, 0.6, 1.2, 2.4)  # noise levels of the denoising errors


@functools.cache
def _network(steps: int) -> tuple[Denoiser, SkipTuning]:
    denoise = digit_denoiser(steps=steps)
    unet = denoise.network
    wide, narrow = 32, 16
    return denoise, SkipTuning([(unet.ups[0], wide), (unet.ups[1], narrow)], bottom=1.0)


def _tuned(seeds: Seeds, bottom: float) -> Denoise:
    denoise, plain = _network(seeds.few(1000, smoke=2))
    return SkipTuning(plain.joins, bottom=bottom).denoiser(denoise)


def _samples(seeds: Seeds, *, bottom: float = 1.0, rho: float = 7.0, steps: int = 5) -> tuple[Tensor, int]:
    """(S, n, 1, 8, 8), and the evaluations that each seed took."""
    counted = Counted(_tuned(seeds, bottom))
    sigmas = karras_sigmas(seeds.few(steps, smoke=2), low=0.02, high=40.0, rho=rho)
    n, found = seeds.few(300, smoke=40), []
    label = torch.arange(n) % 10
    for g in seeds.torch("start"):
        noise = torch.randn(n, 1, 8, 8, generator=g)
        found.append(heun(lambda x, sigma: counted(x, sigma, label), 40 * noise, sigmas))
    return torch.stack(found), counted.evaluations // len(seeds)


def _distance(seeds: Seeds, **setting: float) -> list[float]:
    return digit_distance(_samples(seeds, **setting)[0]).tolist()


@claim(
    says="In nine evaluations, scaled skips bring samples nearer to the data than the network as it was trained",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; one U-Net, digits 8x8, 5 Heun steps, 300 samples; 4 settings each",
)
def scaled_skips_sample_better(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (BOTTOM, SPACING))
    found, evaluations = zip(*(_samples(seeds, **setting) for setting in (ours, theirs)))
    details = {"evaluations": list(evaluations), "method": ours, "baseline": theirs}
    return Arms(*(digit_distance(x).tolist() for x in found), details)


def _errors(seeds: Seeds, bottom: float, *, features: bool) -> list[float]:
    """Mean squared error of the denoised digit at the middle noise levels, in pixels or in features."""
    denoise, seen = _tuned(seeds, bottom), digit_classifier()[:-1] if features else nn.Identity()
    images, labels = digit_images()
    found = []
    for g in seeds.torch("noise"):
        rows = torch.randint(len(images), (seeds.few(400, smoke=40),), generator=g)
        clean, total = images[rows], 0.0
        for level in MIDDLE:
            sigma = torch.full((len(rows),), level)
            x = clean + over(sigma, clean) * torch.randn(clean.shape, generator=g)
            guess = denoise(x, sigma, labels[rows])
            total += (seen(guess) - seen(clean)).square().mean().item()
        found.append(total / len(MIDDLE))
    return found


@claim(
    says="Scaling the deepest skip by 0.8 raises the denoising error in pixels",
    kind="ratio",
    metric="mean squared error",
    margin=0.99,
    scale="untouched over scaled; one U-Net, 400 digits 8x8 at noise levels 0.3 to 2.4",
)
def scaling_costs_pixels(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, 1.0, features=False), _errors(seeds, 0.8, features=False))


@claim(
    says="It lowers the denoising error in features at intermediate noise",
    kind="ratio",
    metric="mean squared error",
    margin=0.99,
    scale="scaled by 0.8 over untouched; 32 features of a perceptron, one U-Net, 400 digits 8x8, levels 0.3 to 2.4",
)
def scaling_gains_features(seeds: Seeds) -> Arms:
    return Arms(_errors(seeds, 0.8, features=True), _errors(seeds, 1.0, features=True))


def draw(seeds: Seeds) -> list[Panel]:
    """Ten digits in nine evaluations from the same noise, with less and less of the deepest skip."""
    panels = []
    for bottom in (1.0, 0.9, 0.8, 0.7):
        [x], _ = _samples(seeds.one(0), bottom=bottom)
        panels.append(Panel(f"deepest skip times {bottom:g}", image=sheet(x[:10])))
    return panels
