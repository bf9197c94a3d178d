"""Score Jacobian chaining: does it lift a diffusion of views to a scene, and what does perturbing buy?

The scene is a plane of 12 x 12 voxels with a shape of three blobs, other ones for each seed; its pictures are the 16
numbers that an orthographic camera sees from some angle. A perceptron denoises such views, whatever the angle. A
new field is then optimised until its own views, from everywhere, look likely; they are held against the true ones,
and those against them, as a scene that shows one view from everywhere would not do.
"""

import math
from functools import cache

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ScoreJacobianChaining, VoxelRadianceField
from lossary.diffusion._denoiser import Counted, Denoise, Denoiser, score_of
from lossary.diffusion._distil import log_uniform, pushed
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import over
from lossary.tasks import fit_denoiser, stacked_denoiser

SIDE, PIXELS = 12, 16
LEVELS = log_uniform(0.1, 3.0)


def _rays(angles: Tensor) -> tuple[Tensor, Tensor]:
    """Of cameras at angles (S, B): origins and directions (S, B * 16, 2)."""
    way = torch.stack([angles.cos(), angles.sin()], dim=-1).unsqueeze(-2)
    across = torch.stack([-angles.sin(), angles.cos()], dim=-1).unsqueeze(-2)
    origins = torch.linspace(-0.95, 0.95, PIXELS).view(-1, 1) * across - 2 * way
    return origins.flatten(1, 2), way.expand_as(origins).flatten(1, 2)


def _views(field: VoxelRadianceField, angles: Tensor) -> Tensor:
    """(S, B, 16)."""
    return field(*_rays(angles)).colour.view(*angles.shape, PIXELS)


def _scene(seeds: Seeds) -> VoxelRadianceField:
    """Three blobs of different brightness on black."""
    field = VoxelRadianceField((SIDE, SIDE), channels=1, replicas=len(seeds), shift=0.0, colours="plain")
    axis = (torch.arange(SIDE) + 0.5) * 2 / SIDE - 1
    places = torch.stack(torch.meshgrid(axis, axis, indexing="ij")[::-1], dim=-1)
    for s, g in enumerate(seeds.torch("scene")):
        centres = 1.0 * torch.rand(3, 2, generator=g) - 0.5
        inside = (-(places - centres.view(3, 1, 1, 2)).square().sum(-1) / (2 * 0.2**2)).exp()
        bright = torch.tensor([1.0, -1.0, 0.5]).view(3, 1, 1)
        field.density.data[s, 0] = 30 * inside.amax(0) - 10
        field.colour.data[s, 0] = (inside * bright).sum(0) / inside.sum(0)
    return field.requires_grad_(False)


def _everywhere(seeds: Seeds, n: int) -> Tensor:
    return (torch.arange(n) * (2 * math.pi / n)).expand(len(seeds), -1)


@cache
def _trained(seeds: Seeds) -> Denoiser:
    known = _views(_scene(seeds), _everywhere(seeds, 96))
    denoise = stacked_denoiser(PIXELS, seeds)

    def draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
        rows = [torch.randint(96, (n,), generator=g) for g in generators]
        return (torch.stack([views[r] for views, r in zip(known, rows)]),)

    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(600, smoke=2), batch=64)
    return denoise.requires_grad_(False)


def _push(x: Tensor, denoise: Denoise, kind: str, generators: list[torch.Generator]) -> Tensor:
    """Values (S, B) whose gradient is minus sigma times a score without its merits."""
    sigma = LEVELS(tuple(x.shape[:2]), generators)
    with torch.no_grad():
        if kind == "clean":
            score = score_of(denoise, x, sigma)
        else:  # the noised render is taken away, as in score distillation sampling
            noised = x + over(sigma, x) * torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
            score = score_of(denoise, noised, sigma)
    return pushed(x, -over(sigma, x) * score).sum(-1)


def _lifted(seeds: Seeds, *, kind: str, lr: float) -> tuple[VoxelRadianceField, int]:
    """The field of each seed, and the evaluations, of all its views at once, that it took."""
    denoise, generators = Counted(_trained(seeds)), seeds.torch("cameras")
    chain = ScoreJacobianChaining(denoise, levels=LEVELS)
    field = VoxelRadianceField((SIDE, SIDE), channels=1, replicas=len(seeds), shift=0.0, colours="plain")
    for s, g in enumerate(seeds.torch("field")):
        field.colour.data[s] = 0.1 * torch.randn(1, SIDE, SIDE, generator=g)
    optimizer = torch.optim.Adam([field.density, field.colour], lr=lr)
    for _ in range(seeds.few(300, smoke=2)):
        angles = torch.stack([2 * math.pi * torch.rand(8, generator=g) for g in generators])
        x = _views(field, angles)
        optimizer.zero_grad()
        values = chain(x, batch=2, generator=generators) if kind == "averaged" else _push(x, denoise, kind, generators)
        values.sum().backward()
        optimizer.step()
    return field.requires_grad_(False), denoise.evaluations


def _distance(field: VoxelRadianceField, seeds: Seeds) -> list[float]:
    """Mean of the distances from views to their nearest true views and back, relative to the true views' norm."""
    true = _views(_scene(seeds), _everywhere(seeds, 96))
    found = _views(field, _everywhere(seeds, 96) + 0.01)
    apart = torch.cdist(found, true)
    nearest = (apart.amin(-1).mean(-1) + apart.amin(-2).mean(-1)) / 2
    return (nearest / true.norm(dim=-1).mean(-1)).tolist()


def _compare(baseline: str, seeds: Seeds) -> Arms:
    grids = [[{"kind": kind, "lr": lr} for lr in (0.03, 0.1)] for kind in ("averaged", baseline)]

    def distance(seeds: Seeds, **setting: object) -> list[float]:
        return _distance(_lifted(seeds, **setting)[0], seeds)

    ours, theirs = (tune(distance, grid, seeds, better="lower") for grid in grids)
    (ahead, often), (behind, others) = (_lifted(seeds, **setting) for setting in (ours, theirs))
    details = {"evaluations": [often, others], "method": ours, "baseline": theirs}
    return Arms(_distance(ahead, seeds), _distance(behind, seeds), details)


@claim(
    says="Perturbed and averaged scores bring a scene's views nearer the true ones than scores at the clean render",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="to the nearest view, both ways; 12x12 field, views of 16, MLP of 64, 300 steps of 8 cameras; 2 rates each",
)
def averaging_beats_the_clean_render(seeds: Seeds) -> Arms:
    return _compare("clean", seeds)


@claim(
    says="Taking the render away from the denoised one brings views nearer than taking away the noised render",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="to the nearest view, both ways; 12x12 field, views of 16, MLP of 64, 300 steps of 8 cameras; 2 rates each",
)
def taking_away_the_render_helps(seeds: Seeds) -> Arms:
    return _compare("noised", seeds)


@claim(
    says="With exact scores near true views, taking away the render has at most half the variance",
    kind="ratio",
    metric="variance",
    margin=0.5,
    scale="of score times sigma over 500 draws, sigma 0.1, 0.3, 1 and 3; 24 views of 16 with noise 0.05, off by 0.1",
)
def taking_away_the_render_is_quieter(seeds: Seeds) -> Arms:
    views = _views(_scene(seeds), _everywhere(seeds, 24)).double()
    quiet, loud = [], []
    for known, g in zip(views, seeds.torch("noise")):
        truth = Mixture(known, 0.05)
        x = known + 0.1 * torch.randn(known.shape, generator=g, dtype=known.dtype)
        rows = []
        for sigma in (0.1, 0.3, 1.0, 3.0):
            n = torch.randn(seeds.few(500, smoke=10), *x.shape, generator=g, dtype=x.dtype)
            noised = sigma * truth.score(x + sigma * n, sigma)
            rows.append([scores.var(0).sum(-1).mean().item() for scores in (noised + n, noised)])
        mean = torch.tensor(rows).mean(0).tolist()
        quiet.append(mean[0])
        loud.append(mean[1])
    return Arms(quiet, loud)


@claim(
    says="Averaged scores climb a lower bound: the noised point's mean log-density is below that at sqrt(2) sigma",
    kind="exact",
    metric="deviation",
    tolerance=0.01,
    scale="amount by which it is above, in nats; ring of 5 Gaussians, 50 points, noise 0.3, 1 and 3, 4000 draws each",
)
def averaging_climbs_a_lower_bound(seeds: Seeds) -> Arms:
    truth, above = ring(5), []
    for g in seeds.torch("noise"):
        x = truth.sample(50, generator=g)[0] + 0.5 * torch.randn(50, 2, generator=g, dtype=torch.float64)
        for sigma in (0.3, 1.0, 3.0):
            n = torch.randn(seeds.few(4000, smoke=500), 50, 2, generator=g, dtype=torch.float64)
            bound = truth.log_density(x + sigma * n, sigma).mean(0)
            above.append((bound - truth.log_density(x, 2**0.5 * sigma)).clamp(min=0).max().item())
    return Arms(above)


def draw(seeds: Seeds) -> list[Panel]:
    """All views of the true scene, an angle a row, and of the lifted ones."""
    one = seeds.one(0)
    angles = _everywhere(one, 48)
    fields = {"true scene": _scene(one)}
    for name, kind in (("averaged scores", "averaged"), ("at the clean render", "clean")):
        fields[name], _ = _lifted(one, kind=kind, lr=0.1)
    return [Panel(name, image=(_views(field, angles)[0] / 2 + 0.5).numpy()) for name, field in fields.items()]
