"""DM-Count: does matching the density's distribution to the dots count better than regressing smoothed dots?

Crowds of up to twenty blobs of different size and brightness, half of them in a cluster. The network is a convolution
of 12x12 pixels with a stride of 4, then one of 1x1, softplus at its end: a density of 8x8 cells.

The slowest claim took 6 minutes of a busy core: a counting network is trained for each seed and setting.
"""

from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.detection import count_loss, dm_count_loss, sinkhorn_ot_loss
from lossary.tasks import fit, stacked_mlp

SIZE, STRIDE, CELLS, CONTEXT, MOST = 32, 4, 8, 12, 20
TRAIN, TEST, STEPS, BATCH = 150, 150, 200, 8
RATES = (0.001, 0.003, 0.01, 0.03)


@cache
def _crowds(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Pictures (S, N, 32, 32) and points (S, N, 20, 2), x and y in pixels, NaN where there are fewer."""
    images = seeds.few(TRAIN) + seeds.few(TEST)
    pixel = np.arange(SIZE) + 0.5
    pictures, points = [], []
    for rng in seeds.numpy("crowds"):
        spread = rng.uniform(0, SIZE, (images, MOST, 2))
        close = rng.uniform(6, SIZE - 6, (images, 1, 2)) + 4 * rng.standard_normal((images, MOST, 2))
        place = np.where(rng.random((images, MOST, 1)) < 0.5, spread, close.clip(0, SIZE - 0.01))
        there = np.arange(MOST) < rng.integers(0, MOST + 1, (images, 1))
        width, light = rng.uniform(0.7, 1.5, (images, MOST, 1)), there * rng.uniform(0.4, 1.0, (images, MOST))
        across, down = (np.exp(-((pixel - place[..., i, None]) ** 2) / (2 * width**2)) for i in (0, 1))
        picture = np.einsum("np,nph,npw->nhw", light, down, across) + 0.1 * rng.standard_normal((images, SIZE, SIZE))
        pictures.append(torch.from_numpy(picture + rng.uniform(-0.1, 0.1, (images, 1, 1))).float())
        points.append(torch.from_numpy(np.where(there[..., None], place, np.nan)).float())
    return torch.stack(pictures), torch.stack(points)


class _DensityNetwork(nn.Module):
    """(S, B, 32, 32) to densities (S, B, 8, 8)."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.layers = stacked_mlp((CONTEXT * CONTEXT, 32, 1), seeds)

    def forward(self, input: Tensor) -> Tensor:
        patches = F.unfold(input.flatten(0, 1).unsqueeze(1), CONTEXT, padding=STRIDE, stride=STRIDE)
        cells = self.layers(patches.unflatten(0, input.shape[:2]).mT.flatten(1, 2))
        return F.softplus(cells - 2).view(*input.shape[:2], CELLS, CELLS)


def _lists(points: Tensor) -> list[Tensor]:
    """Points (S, B, 20, 2) as a list of S B tensors (n, 2)."""
    flat = points.flatten(0, 1)
    return [p[:n] for p, n in zip(flat, (~flat[..., 0].isnan()).sum(1).tolist())]


def _on_dots(call: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss of densities (B, 1, h, w) and lists of points, for a stack."""
    return lambda z, points: call(z.flatten(0, 1).unsqueeze(1), _lists(points)).view(z.shape[:2])


def _responsibilities(points: Tensor, sigma: float) -> Tensor:
    """Gaussians of the cells' centres around points (..., 20, 2): (..., 20, 8, 8), 0 for those that are missing."""
    centre = STRIDE * (torch.arange(CELLS) + 0.5)
    across, down = (torch.exp(-((points[..., i, None] - centre) ** 2) / (2 * sigma**2)) for i in (0, 1))
    return (down.unsqueeze(-1) * across.unsqueeze(-2)).nan_to_num(0.0)


def _smoothed(z: Tensor, points: Tensor, *, sigma: float) -> Tensor:
    """Squared error against dots blurred by sigma pixels, each of mass 1."""
    blurred = _responsibilities(points, sigma)
    target = (blurred / blurred.sum((-2, -1), keepdim=True).clamp_min(1e-12)).sum(2)
    return (z - target).square().sum((-2, -1))


def _bayesian(z: Tensor, points: Tensor, *, sigma: float) -> Tensor:
    """Bayesian loss (Ma et al. 2019): |1 - expected count| of each point, cells belonging to points by Gaussians."""
    belongs = _responsibilities(points, sigma) + 1e-12 * ~points[..., 0, None, None].isnan()
    posterior = belongs / belongs.sum(2, keepdim=True).clamp_min(1e-30)
    expected = (posterior * z.unsqueeze(2)).sum((-2, -1))
    there = ~points[..., 0].isnan()
    none = ~there.any(2) * z.sum((-2, -1))  # a picture without points: all of it is too much
    return ((1 - expected).abs() * there).sum(2) + none


def _densities(seeds: Seeds, *, loss: str, lr: float, **hyper: float) -> tuple[Tensor, Tensor]:
    """Densities (S, n, 8, 8) of the test pictures, and their points."""
    losses = {
        "smoothed": partial(_smoothed, **hyper),
        "bayesian": partial(_bayesian, **hyper),
        "count": _on_dots(count_loss),
        "dm": _on_dots(partial(dm_count_loss, stride=STRIDE, iterations=20)),
    }
    pictures, points = _crowds(seeds)
    train, model = seeds.few(TRAIN), _DensityNetwork(seeds)
    fit(
        model,
        pictures[:, :train],
        points[:, :train],
        loss=losses[loss],
        seeds=seeds,
        steps=seeds.few(STEPS),
        batch=BATCH,
        optimizer=partial(torch.optim.Adam, lr=lr),
    )
    with torch.no_grad():
        return model(pictures[:, train:]), points[:, train:]


def _error(seeds: Seeds, *, level: int = 0, **setting: object) -> list[float]:
    """GAME(level): counts in a grid of 2^level by 2^level, their absolute errors summed, mean; at level 0 the MAE."""
    density, points = _densities(seeds, **setting)
    side = CELLS * STRIDE / 2**level
    parts = torch.arange(2**level)
    inside = [(points[..., i, None] / side).floor() == parts for i in (0, 1)]
    true = torch.einsum("snpx,snpy->snyx", inside[0].float(), inside[1].float())
    found = F.avg_pool2d(density, CELLS // 2**level, divisor_override=1)
    return (found - true).abs().sum((-2, -1)).mean(1).tolist()


def _compare(seeds: Seeds, method: list[dict], baseline: list[dict], *, level: int = 0) -> Arms:
    score = partial(_error, level=level)
    chosen, other = tune(score, method, seeds, better="lower"), tune(score, baseline, seeds, better="lower")
    return Arms(score(seeds, **chosen), score(seeds, **other), {"method": chosen, "baseline": other})


MATCHING = [{"loss": "dm", "lr": lr} for lr in RATES]


@claim(
    says="DM-Count counts better than squared error against smoothed dots",
    kind="ratio",
    metric="count error",
    margin=0.95,
    scale="synthetic crowds of 0 to 20, 32x32 px, 150 to train on, 200 steps of 8; MAE; Sinkhorn of 20; 4 settings",
)
def matching_counts_better_than_smoothed_dots(seeds: Seeds) -> Arms:
    return _compare(
        seeds, MATCHING, [{"loss": "smoothed", "sigma": s, "lr": lr} for s in (2.0, 4.0) for lr in RATES[1:3]]
    )


@claim(
    says="DM-Count counts better than the Bayesian loss",
    kind="ratio",
    metric="count error",
    margin=0.95,
    scale="synthetic crowds of 0 to 20, 32x32 px, 150 to train on, 200 steps of 8; MAE; Sinkhorn of 20; 4 settings",
)
def matching_counts_better_than_bayesian_loss(seeds: Seeds) -> Arms:
    return _compare(
        seeds, MATCHING, [{"loss": "bayesian", "sigma": s, "lr": lr} for s in (2.0, 4.0) for lr in RATES[1:3]]
    )


@claim(
    says="Transport and total variation put the count in its place: better than the count alone in 4 by 4 parts",
    kind="ratio",
    metric="count error",
    margin=0.95,
    scale="synthetic crowds of 0 to 20, 32x32 px, 150 to train on, 200 steps of 8; GAME(2); Sinkhorn of 20; 4 settings",
)
def matching_localises(seeds: Seeds) -> Arms:
    return _compare(seeds, MATCHING, [{"loss": "count", "lr": lr} for lr in RATES], level=2)


@claim(
    says="The transport term's gradient is the derivative of the entropic cost",
    kind="exact",
    metric="deviation",
    tolerance=1e-5,
    scale="8 random densities of 4x4 cells a seed, 1 to 8 points; central differences, double precision",
)
def gradient_is_the_costs(seeds: Seeds) -> Arms:
    deviations = []
    for rng in seeds.numpy("densities"):
        density = torch.from_numpy(rng.uniform(0.2, 1.0, (8, 1, 4, 4))).requires_grad_()
        points = [torch.from_numpy(rng.uniform(0, 16, (n, 2))) for n in range(1, 9)]
        cost = partial(sinkhorn_ot_loss, points=points, stride=4, iterations=500)
        (slope,) = torch.autograd.grad(cost(density).sum(), density)
        way, step = torch.from_numpy(rng.standard_normal(density.shape)), 1e-5
        with torch.no_grad():
            difference = (cost(density + step * way) - cost(density - step * way)) / (2 * step)
        deviations.append((difference - (slope * way).sum((1, 2, 3))).tolist())
    return Arms(deviations)


def draw(seeds: Seeds) -> list[Panel]:
    """Two test crowds with their dots, and the densities that three losses lead to."""
    seed = seeds.one(0)
    shown = {"smoothed dots": {"loss": "smoothed", "sigma": 2.0}, "count alone": {"loss": "count"}}
    found = {title: _densities(seed, lr=0.01, **s) for title, s in (shown | {"DM-Count": {"loss": "dm"}}).items()}
    pictures = _crowds(seed)[0][0, seed.few(TRAIN) :]
    _, points = found["DM-Count"]
    panels = []
    for i, dots in enumerate(_lists(points)[:2]):
        panels.append(Panel(f"{len(dots)} there", pictures[i].numpy(), points=dots.numpy()))
        for title, (density, _) in found.items():
            z = density[0, i]
            cells = dots.numpy() / STRIDE
            panels.append(Panel(f"{title}: {z.sum():.1f}", z.numpy(), points=cells))
    return panels
