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
from lossary.tasks import cross_entropy, fit, stacked_mlp
from lossary.tasks.diffusion import digit_denoiser, digit_images

BOTTOM = [{"bottom": bottom} for bottom in (0.95, 0.9, 0.8, 0.7)]
SPACING = [{"rho": rho} for rho in (3.0, 5.0, 7.0, 10.0)]
MIDDLE = (0.3, 0.6, 1.2, 2.4)  # noise levels of the denoising errors


@functools.cache
def _network(steps: int) -> tuple[Denoiser, SkipTuning]:
    denoise = digit_denoiser(steps=steps)
    unet = denoise.network
    wide, narrow = 32, 16
    return denoise, SkipTuning([(unet.ups[0], wide), (unet.ups[1], narrow)], bottom=1.0)


@functools.cache
def _features(steps: int) -> nn.Module:
    """A perceptron 64-64-32-10 without its last layer, the same for every seed of the claims."""
    images, labels = digit_images()
    one = Seeds((0,))
    network = stacked_mlp((64, 64, 32, 10), one)
    fit(network, images.flatten(1), labels, loss=cross_entropy, seeds=one, steps=steps)
    return network.replica(0)[:-1].requires_grad_(False)


def _tuned(seeds: Seeds, bottom: float) -> Denoise:
    denoise, plain = _network(seeds.few(1000, smoke=2))
    return SkipTuning(plain.joins, bottom=bottom).denoiser(denoise)


def _frechet(x: Tensor, y: Tensor) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^1/2) of features (n, d)."""
    (c, d) = (z.T.cov() for z in (x, y))
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum()
    return ((x.mean(0) - y.mean(0)).square().sum() + c.trace() + d.trace() - 2 * cross).item()


def _samples(seeds: Seeds, *, bottom: float = 1.0, rho: float = 7.0, steps: int = 5) -> tuple[list[Tensor], int]:
    """(n, 1, 8, 8) of each seed, and the evaluations that each took."""
    counted = Counted(_tuned(seeds, bottom))
    sigmas = karras_sigmas(seeds.few(steps, smoke=2), low=0.02, high=40.0, rho=rho)
    n, found = seeds.few(300, smoke=40), []
    label = torch.arange(n) % 10
    for g in seeds.torch("start"):
        noise = torch.randn(n, 1, 8, 8, generator=g)
        found.append(heun(lambda x, sigma: counted(x, sigma, label), 40 * noise, sigmas))
    return found, counted.evaluations // len(seeds)


def _distance(seeds: Seeds, **setting: float) -> list[float]:
    features = _features(seeds.few(600, smoke=2))
    real = features(digit_images()[0].flatten(1)).double()
    return [_frechet(features(x.flatten(1)).double(), real) for x in _samples(seeds, **setting)[0]]


@claim(
    says="In nine evaluations, scaled skips bring samples nearer to the data than the network as it was trained",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; one U-Net, digits 8x8, 5 Heun steps, 300 samples; 4 settings each",
)
def scaled_skips_sample_better(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (BOTTOM, SPACING))
    _, evaluations = _samples(seeds.one(0), **ours)
    details = {"method": ours, "baseline": theirs, "evaluations": evaluations}
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), details)


def _errors(seeds: Seeds, bottom: float, *, features: bool) -> list[float]:
    """Mean squared error of the denoised digit at the middle noise levels, in pixels or in features."""
    denoise, seen = _tuned(seeds, bottom), _features(seeds.few(600, smoke=2)) if features else nn.Identity()
    images, labels = digit_images()
    found = []
    for g in seeds.torch("noise"):
        rows = torch.randint(len(images), (seeds.few(400, smoke=40),), generator=g)
        clean, total = images[rows], 0.0
        for level in MIDDLE:
            sigma = torch.full((len(rows),), level)
            x = clean + over(sigma, clean) * torch.randn(clean.shape, generator=g)
            guess = denoise(x, sigma, labels[rows])
            total += (seen(guess.flatten(1)) - seen(clean.flatten(1))).square().mean().item()
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
        (x,), _ = _samples(seeds.one(0), bottom=bottom)
        rows = x[:10, 0].clamp(-1, 1) / 2 + 0.5
        image = rows.view(2, 5, 8, 8).permute(0, 2, 1, 3).reshape(16, 40)
        panels.append(Panel(f"deepest skip times {bottom:g}", image=image.numpy()))
    return panels
