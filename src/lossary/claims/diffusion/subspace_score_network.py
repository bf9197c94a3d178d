"""Subspace score network: does it escape the ambient dimension, where a plain network pays for it?

Four Gaussians in a random plane of D dimensions, 1000 samples; the exact posterior mean is known. The plain network
sees all D coordinates and predicts v.
"""

from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import SubspaceScoreNet, subspace_distance
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

INSIDE = ring(4, radius=1.2, scale=0.3)
PROCESS = cosine()
RATES = (0.001, 0.003, 0.01)
STEPS = 40  # of DDIM


def _planes(seeds: Seeds, dimension: int) -> Tensor:
    """A, (S, D, 2)."""
    return torch.stack([torch.linalg.qr(torch.randn(dimension, 2, generator=g)).Q for g in seeds.torch("plane")])


def _data(seeds: Seeds, dimension: int, n: int, stream: str) -> Tensor:
    inside = torch.stack([INSIDE.sample(n, generator=g)[0].float() for g in seeds.torch(stream)])
    return inside @ _planes(seeds, dimension).mT


def _trained(seeds: Seeds, *, dimension: int, plane: bool, lr: float) -> Denoiser:
    pool = _data(seeds, dimension, seeds.few(1000, smoke=32), "pool")
    if plane:
        start = torch.stack([torch.randn(dimension, 2, generator=g) for g in seeds.torch("basis")])
        denoise = Denoiser(SubspaceScoreNet(stacked_denoiser(2, seeds).network, start, PROCESS), PROCESS, "score")
    else:
        denoise = stacked_denoiser(dimension, seeds, process=PROCESS)

    def draw(batch: int, generators: list[torch.Generator]) -> tuple[Tensor]:
        rows = [torch.randint(pool.shape[1], (batch,), generator=g) for g in generators]
        return (torch.stack([x[r] for x, r in zip(pool, rows)]),)

    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr)
    return denoise


def _samples(denoise: Denoiser, seeds: Seeds, dimension: int) -> Tensor:
    """By DDIM, (S, n, D)."""
    sigmas = process_sigmas(PROCESS, STEPS, first=0.99, last=0.01)
    n = seeds.few(1000, smoke=16)
    noise = torch.stack([torch.randn(n, dimension, generator=g) for g in seeds.torch("start")])
    with torch.no_grad():
        return euler(denoise, sigmas[0].item() * noise, sigmas)


def _distance(seeds: Seeds, *, dimension: int = 32, **setting: object) -> list[float]:
    found = _samples(_trained(seeds, dimension=dimension, **setting), seeds, dimension)
    return sliced_wasserstein(found, _data(seeds, dimension, found.shape[1], "true")).tolist()


def _error(seeds: Seeds, *, dimension: int, **setting: object) -> list[float]:
    """Root mean square of x_0-hat minus the exact posterior mean, relative to it, over times 0.05 to 0.95."""
    denoise = _trained(seeds, dimension=dimension, **setting)
    clean = _data(seeds, dimension, seeds.few(1000, smoke=16), "test")
    noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in seeds.torch("test noise")])
    sigma = PROCESS.ratio(torch.linspace(0.05, 0.95, clean.shape[1])).expand(clean.shape[:2])
    x, a = clean + over(sigma, clean) * noise, _planes(seeds, dimension)
    true = INSIDE.denoise((x @ a).double(), sigma.double()) @ a.double().mT
    with torch.no_grad():
        found = denoise(x, sigma)
    return ((found - true).square().sum((1, 2)) / true.square().sum((1, 2))).sqrt().tolist()


PLANE = [{"plane": True, "lr": lr} for lr in RATES]
PLAIN = [{"plane": False, "lr": lr} for lr in RATES]


@claim(
    says="In 32 dimensions the subspace network's samples are less than half as far from the truth as a plain one's",
    kind="ratio",
    metric="sample distance",
    margin=0.5,
    scale="sliced W1; 1000 samples in a plane of 32 dimensions, MLP of 64, 400 steps; DDIM, 40 evaluations; 3 rates",
)
def subspace_beats_plain(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (PLANE, PLAIN))
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), details)


@claim(
    says="The subspace network's error in 64 dimensions is at most a quarter above that in 8",
    kind="ratio",
    metric="relative error",
    margin=1.25,
    scale="of x_0-hat; 1000 samples in a plane, MLP of 64, 400 steps; each dimension tunes 3 rates",
)
def subspace_error_ignores_the_ambient_dimension(seeds: Seeds) -> Arms:
    many, few = (partial(_error, dimension=d) for d in (64, 8))
    ours, theirs = (tune(error, PLANE, seeds, better="lower") for error in (many, few))
    return Arms(many(seeds, **ours), few(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Training recovers the plane: |V V' - A A'|_F^2 <= 0.02, of 4 at most",
    kind="exact",
    metric="deviation",
    tolerance=0.02,
    scale="1000 samples in a plane of 32 dimensions, MLP of 64, 400 steps, lr 0.003",
)
def training_recovers_the_plane(seeds: Seeds) -> Arms:
    denoise = _trained(seeds, dimension=32, plane=True, lr=0.003)
    with torch.no_grad():
        return Arms(subspace_distance(denoise.network.basis, _planes(seeds, 32)))


def draw(seeds: Seeds) -> list[Panel]:
    """Samples in 32 dimensions, seen in the plane; across it there is nothing in truth."""
    one, panels = seeds.one(0), []
    a = _planes(one, 32)[0]
    panels.append(Panel("data in the plane", points=(_data(one, 32, 500, "true")[0] @ a).numpy()))
    for name, plane in (("plain network", False), ("subspace network", True)):
        found = _samples(_trained(one, dimension=32, plane=plane, lr=0.003), one, 32)[0, :500]
        across = (found - found @ a @ a.T).norm(dim=1).mean().item()
        panels.append(Panel(f"{name}, {across:.2f} off the plane", points=(found @ a).numpy()))
    return panels
