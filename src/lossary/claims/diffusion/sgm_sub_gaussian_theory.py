"""Tilted Gaussians: does a network's score error stay put as dimensions are added, where a kernel estimate's does not?

The tilt is a shallow ReLU network, 2 relu(u - 1/2) + 2 relu(-u - 1/2) along a random direction, which makes two modes.
Both arms see the same 2000 samples; errors are against the exact posterior mean.
"""

from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import RidgeTilt
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

PROCESS = cosine()
MANY, FEW = 32, 2
STEPS = 40  # of DDIM


def _tilt(u: Tensor) -> Tensor:
    return 2 * (u - 0.5).relu() + 2 * (-u - 0.5).relu()


def _targets(seeds: Seeds, dimension: int) -> list[RidgeTilt]:
    return [RidgeTilt(torch.randn(dimension, generator=g), _tilt) for g in seeds.torch("direction")]


def _data(seeds: Seeds, dimension: int, n: int, stream: str) -> Tensor:
    return torch.stack([f.sample(n, generator=g) for f, g in zip(_targets(seeds, dimension), seeds.torch(stream))])


def _trained(seeds: Seeds, *, dimension: int, lr: float) -> Denoiser:
    pool = _data(seeds, dimension, seeds.few(2000, smoke=32), "pool")
    denoise = stacked_denoiser(dimension, seeds, process=PROCESS)

    def draw(batch: int, generators: list[torch.Generator]) -> tuple[Tensor]:
        rows = [torch.randint(pool.shape[1], (batch,), generator=g) for g in generators]
        return (torch.stack([x[r] for x, r in zip(pool, rows)]),)

    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(500, smoke=2), lr=lr)
    return denoise


def _error(seeds: Seeds, *, dimension: int, lr: float = 0.0, bandwidth: float = 0.0) -> list[float]:
    """Root mean square of a coordinate of the error of x_0-hat, times 0.2 to 0.8; kernel estimate if bandwidth."""
    n = seeds.few(400, smoke=8)
    clean = _data(seeds, dimension, n, "test")
    noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in seeds.torch("test noise")])
    sigma = PROCESS.ratio(torch.linspace(0.2, 0.8, n)).expand(clean.shape[:2])
    x = clean + over(sigma, clean) * noise
    true = torch.stack([f.denoise(*xs) for f, *xs in zip(_targets(seeds, dimension), x, sigma)])
    if bandwidth:
        pool = _data(seeds, dimension, seeds.few(2000, smoke=32), "pool")
        found = torch.stack(
            [
                torch.cat([Mixture(p, bandwidth).denoise(*part) for part in zip(xs.split(50), s.split(50))])
                for p, xs, s in zip(pool, x, sigma)
            ]
        )
    else:
        denoise = _trained(seeds, dimension=dimension, lr=lr)
        with torch.no_grad():
            found = denoise(x, sigma)
    return (found - true).square().mean((1, 2)).sqrt().tolist()


NETWORK = [{"lr": lr} for lr in (0.001, 0.003, 0.01)]
KERNEL = [{"bandwidth": h} for h in (0.3, 0.6, 0.9)]


def _tuned(score, grid: list[dict], seeds: Seeds) -> tuple[list[float], dict]:
    best = tune(score, grid, seeds, better="lower")
    return score(seeds, **best), best


@claim(
    says="In 32 dimensions a network's score has at most half the error of a kernel estimate's",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="of x_0-hat at middle noise; 2000 samples of a normal tilted along a direction, MLP of 64; 3 settings each",
)
def network_beats_kernel_estimate(seeds: Seeds) -> Arms:
    score = partial(_error, dimension=MANY)
    (ours, best), (theirs, other) = (_tuned(score, grid, seeds) for grid in (NETWORK, KERNEL))
    return Arms(ours, theirs, {"method": best, "baseline": other})


@claim(
    says="A coordinate's error in 32 dimensions is at most half again that in 2, of as many samples",
    kind="ratio",
    metric="relative error",
    margin=1.5,
    scale="of x_0-hat at middle noise; 2000 samples of a normal tilted along a direction, MLP of 64; 3 rates each",
)
def network_error_ignores_the_dimension(seeds: Seeds) -> Arms:
    many, few = (_tuned(partial(_error, dimension=d), NETWORK, seeds) for d in (MANY, FEW))
    return Arms(many[0], few[0], {"method": many[1], "baseline": few[1]})


def _along(seeds: Seeds, dimension: int, lr: float) -> tuple[Tensor, Tensor]:
    """Samples of DDIM and true ones, both along the tilted direction, (S, n, 1)."""
    sigmas, n = process_sigmas(PROCESS, STEPS, first=0.99), seeds.few(2000, smoke=16)
    noise = torch.stack([torch.randn(n, dimension, generator=g) for g in seeds.torch("start")])
    denoise = _trained(seeds, dimension=dimension, lr=lr)
    with torch.no_grad():
        found = euler(denoise, sigmas[0].item() * noise, sigmas)
    w = torch.stack([f.direction for f in _targets(seeds, dimension)]).unsqueeze(-1)
    return found @ w, _data(seeds, dimension, n, "true") @ w


def _distance(seeds: Seeds, *, dimension: int, lr: float) -> list[float]:
    return sliced_wasserstein(*_along(seeds, dimension, lr)).tolist()


@claim(
    says="Along the tilted direction samples are at most half again as far from the truth in 32 dimensions as in 2",
    kind="ratio",
    metric="sample distance",
    margin=1.5,
    scale="W1 along it; 2000 training samples, MLP of 64, 500 steps; DDIM, 40 evaluations; 3 rates each",
)
def samples_along_the_tilt_ignore_the_dimension(seeds: Seeds) -> Arms:
    many, few = (_tuned(partial(_distance, dimension=d), NETWORK, seeds) for d in (MANY, FEW))
    return Arms(many[0], few[0], {"evaluations": [STEPS, STEPS], "method": many[1], "baseline": few[1]})


def draw(seeds: Seeds) -> list[Panel]:
    """Along the tilted direction and across it, in 32 dimensions: truth and samples of a trained network."""
    one = seeds.one(0)
    found, true = (side[0, :500] for side in _along(one, MANY, 0.003))
    side = torch.randn(len(found), 1, generator=one.torch("panel")[0])
    return [
        Panel(name, points=torch.cat([points, side], 1).numpy())
        for name, points in (("data along the tilt", true), ("samples along the tilt", found))
    ]
