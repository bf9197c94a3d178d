"""Heteroscedastic registration: are motions found better where a part of the images is noisy, and is that part found?

Made-up pairs: a scene of smooth blobs, and the same scene seen through a known smooth motion of a few pixels, with
noise that is ten times as strong in one region. The motion is a field for each pair, 5x5 and linear between, fitted to
its pair; the variance network is one small convolutional network for all pairs of a seed.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.roles.procedure import advance
from lossary.tasks import auroc
from lossary.uncertainty import HeteroscedasticRegistration, beta_nll_loss

SIZE, PAIRS, MARGIN = 32, 6, 4  # what moves in from outside the image is not looked at
SMOOTHNESS = (0.01, 0.03, 0.1)

Pairs = tuple[Tensor, Tensor, Tensor, Tensor]
"""Moving and fixed images (P, 1, H, W), true displacements (P, 2, H, W), and where noise is strong (P, H, W)."""


def _pairs(rng: np.random.Generator) -> Pairs:
    grid = torch.stack(torch.meshgrid(*[torch.arange(SIZE, dtype=torch.float32)] * 2, indexing="ij"))
    motion = torch.from_numpy(rng.normal(0, 1.0, (PAIRS, 2, 5, 5))).float()
    motion = F.interpolate(motion, size=(SIZE, SIZE), mode="bicubic", align_corners=True)
    centres = torch.from_numpy(rng.uniform(0, SIZE, (PAIRS, 14, 2, 1, 1))).float()
    widths = torch.from_numpy(rng.uniform(2, 3.5, (PAIRS, 14, 1, 1))).float()

    def scene(places: Tensor) -> Tensor:
        """Brightness (P, H, W) at places (P, 2, H, W), about 0 to 2."""
        apart = (places.unsqueeze(1) - centres).square().sum(2)
        return (-apart / (2 * widths.square())).exp().sum(1)

    middle = torch.from_numpy(rng.uniform(8, SIZE - 8, (PAIRS, 2, 1, 1))).float()
    strong = (grid - middle).norm(dim=1) < 9
    noise = torch.where(strong, 0.3, 0.03)
    moving, fixed = (
        (scene(places) + noise * torch.from_numpy(rng.normal(size=strong.shape)).float()).clamp_min(0).unsqueeze(1)
        for places in (grid.expand(PAIRS, -1, -1, -1), grid + motion)
    )
    return moving, fixed, motion, strong


class _Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Parameter(torch.zeros(PAIRS, 2, 5, 5))

    def forward(self, images: Tensor) -> Tensor:
        return F.interpolate(self.coarse, size=images.shape[2:], mode="bilinear", align_corners=True)


class _Likelihood(HeteroscedasticRegistration):
    """The same, with differences weighed by the inverse variance that the negative log-likelihood gives."""

    def objective(self, player: str, batch: Any, *, step: int, generator: Any = None) -> Tensor:
        whole = super().objective(player, batch, step=step)
        if player == "variance" or step < self.warm_up:
            return whole
        moving, fixed = batch
        warped, flow = self._warped(moving, fixed)
        with torch.no_grad():
            log_variance = self.variance(torch.cat([warped, fixed], dim=1))
        values = beta_nll_loss(warped, fixed, log_variance=log_variance, beta=0.0).flatten(1).mean(1)
        rough = (flow.diff(dim=2).square().flatten(1).mean(1) + flow.diff(dim=3).square().flatten(1).mean(1)) / 2
        return values + self.smoothness * rough


def _variance_network(generator: torch.Generator) -> nn.Module:
    network = nn.Sequential(
        *(nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()),
        nn.Conv2d(8, 1, 3, padding=1),
    )
    for parameter in network.parameters():
        bound = (parameter[0].numel() if parameter.ndim > 1 else 72) ** -0.5
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return network


def _registered(
    seeds: Seeds, make: Callable[..., HeteroscedasticRegistration], *, alone: bool = False, **hyper: Any
) -> list[tuple[Pairs, HeteroscedasticRegistration]]:
    """For each seed its pairs and a fitted registration; `alone` trains displacements only, without weights."""
    warm_up, together, found = seeds.few(20, smoke=2), seeds.few(40, smoke=2), []
    for rng, generator in zip(seeds.numpy("pairs"), seeds.torch("init")):
        pairs = _pairs(rng)
        model = make(_Field(), _variance_network(generator), warm_up=warm_up + together if alone else warm_up, **hyper)
        rates = {"displacement": 0.1, "variance": 0.01}
        optimizers = {name: torch.optim.Adam(p.parameters(), lr=rates[name]) for name, p in model.players().items()}
        for step in range(warm_up + together if alone else 2 * warm_up + together):
            advance(model, pairs[:2], optimizers, step=step)
        found.append((pairs, model))
    return found


@torch.no_grad()
def _error(seeds: Seeds, make: Callable[..., HeteroscedasticRegistration], **setting: Any) -> Tensor:
    """Mean distance between true and found displacement in pixels, per seed."""
    errors = []
    for (moving, fixed, motion, _), model in _registered(seeds, make, **setting):
        apart = (model(moving, fixed)[1] - motion).norm(dim=1)
        errors.append(apart[:, MARGIN:-MARGIN, MARGIN:-MARGIN].mean())
    return torch.stack(errors)


def _compare(seeds: Seeds, make: Callable[..., HeteroscedasticRegistration], **fixed: Any) -> Arms:
    ours, theirs = partial(_error, make=HeteroscedasticRegistration), partial(_error, make=make, **fixed)
    grid = [{"smoothness": value} for value in SMOOTHNESS]
    best = [tune(score, grid, seeds, better="lower") for score in (ours, theirs)]
    return Arms(ours(seeds, **best[0]), theirs(seeds, **best[1]), {"method": best[0], "baseline": best[1]})


@claim(
    says="With noise that differs from place to place, weights by the learnt signal-to-noise ratio find motions with at"
    " most 0.95 of the error of plain squared differences",
    kind="ratio",
    metric="mean absolute error",
    margin=0.95,
    scale="6 made-up pairs a seed, 32x32, noise 0.03 and 0.3; 60 displacement steps; 3 weights of smoothness each",
)
def weights_find_motions_better(seeds: Seeds) -> Arms:
    return _compare(seeds, HeteroscedasticRegistration, alone=True)


@claim(
    says="Weights by the signal-to-noise ratio find motions with at most 0.95 of the error of the likelihood's weights",
    kind="ratio",
    metric="mean absolute error",
    margin=0.95,
    scale="6 made-up pairs a seed, 32x32, noise 0.03 and 0.3; 60 displacement steps; 3 weights of smoothness each",
)
def weights_beat_the_likelihood(seeds: Seeds) -> Arms:
    return _compare(seeds, _Likelihood, beta=0.0)


@claim(
    says="The learnt variance tells noisy places from quiet ones better than the squared differences, smoothed",
    kind="superiority",
    metric="AUROC",
    scale="6 made-up pairs a seed, 32x32, noise 0.03 and 0.3; squared differences of the same registration, averaged"
    " over 3x3 to 9x9 pixels, whichever is best",
)
def variance_finds_the_noise(seeds: Seeds) -> Arms:
    windows, inside = (3, 5, 7, 9), (slice(None), slice(MARGIN, -MARGIN), slice(MARGIN, -MARGIN))

    def scores(seeds: Seeds) -> Tensor:
        """AUROC of the variance and of smoothed squares for each window, (S, 5)."""
        rows = []
        for (moving, fixed, _, strong), model in _registered(seeds, HeteroscedasticRegistration, smoothness=0.01):
            with torch.no_grad():
                warped, _, log_variance = model(moving, fixed)
            squares = (fixed - warped).square()
            smoothed = [F.avg_pool2d(squares, w, 1, w // 2, count_include_pad=False) for w in windows]
            maps = [part[:, 0][inside].flatten() for part in (log_variance, *smoothed)]
            rows.append(auroc(torch.stack(maps), strong[inside].flatten()))
        return torch.stack(rows)

    best = 1 + int(scores(seeds.tuning(1 if seeds.smoke else 4))[:, 1:].mean(0).argmax())
    measured = scores(seeds)
    return Arms(measured[:, 0], measured[:, best], {"window": windows[best - 1]})


@claim(
    says="beta moves the gradient of the mean from that of the likelihood to that of the squared error",
    kind="exact",
    metric="deviation",
    tolerance=1e-12,
    scale="gradient of beta-NLL against (mean - target) / variance^(1 - beta), 50 random entries a seed, five betas",
)
def beta_moves_the_gradient(seeds: Seeds) -> Arms:
    deviations = []
    for generator in seeds.torch("entries"):
        mean, target, log_variance = torch.randn(3, 50, generator=generator, dtype=torch.float64)
        mean.requires_grad_()
        for beta in (0.0, 0.25, 0.5, 0.75, 1.0):
            loss = beta_nll_loss(mean, target, log_variance=log_variance, beta=beta)
            (slope,) = torch.autograd.grad(loss.sum(), mean)
            deviations.append((slope - (mean - target) * ((beta - 1) * log_variance).exp()).abs().max().item())
    return Arms(np.array(deviations))
