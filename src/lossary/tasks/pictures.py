"""Real digits as small pictures: one denoiser and one judge, trained once and shared by all claims.

Sizes are 8, scikit-learn's 1797 digits, and 16, 5000 of MNIST.
"""

import copy
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise, Denoiser
from lossary.diffusion._process import cosine
from lossary.tasks import task
from lossary.tasks.cache import trained
from lossary.tasks.data import digits, mnist5k
from lossary.tasks.diffusion import EDGE, HARMONICS, fit_denoiser, stacked_denoiser, v_error, waves
from lossary.tasks.seeds import Seeds
from lossary.tasks.training import minimise, spread_times


class _Block(nn.Module):
    """Twice norm, SiLU and convolution, around a shift by the embedding."""

    def __init__(self, wide: int, narrow: int, embedding: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.GroupNorm(8, wide), nn.GroupNorm(8, narrow)])
        self.convs = nn.ModuleList([nn.Conv2d(wide, narrow, 3, padding=1), nn.Conv2d(narrow, narrow, 3, padding=1)])
        self.shift = nn.Linear(embedding, narrow)
        self.through = nn.Conv2d(wide, narrow, 1) if wide != narrow else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.convs[0](F.silu(self.norms[0](x))) + self.shift(embedding)[..., None, None]
        return self.through(x) + self.convs[1](F.silu(self.norms[1](h)))  # type: ignore[no-any-return]


class Unet(nn.Module):
    """network(x_t (B, 1, H, W), t (B,), label (B,) or None) -> (B, 1, H, W): two levels, with a concatenated skip each.

    Label `classes`, or None, is no label. `ups` take what comes from below with the skip of their level behind it.
    """

    def __init__(self, *, classes: int = 10, channels: int = 16, colours: int = 1) -> None:
        super().__init__()
        wide = 2 * channels
        self.classes = classes
        self.label = nn.Embedding(classes + 1, wide)
        self.time = nn.Sequential(nn.Linear(2 * HARMONICS, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.first = nn.Conv2d(colours, channels, 3, padding=1)
        self.downs = nn.ModuleList([_Block(channels, channels, wide), _Block(channels, wide, wide)])
        self.middle = _Block(wide, wide, wide)
        self.ups = nn.ModuleList([_Block(2 * wide, wide, wide), _Block(wide + channels, channels, wide)])
        self.last = nn.Sequential(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, colours, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        t = t.expand(len(x))
        label = torch.full((len(x),), self.classes, device=x.device) if label is None else label
        embedding = F.silu(self.time(waves(t).to(x.dtype)) + self.label(label))
        h, skips = self.first(x), []
        for down in self.downs:
            h = down(h, embedding)
            skips.append(h)
            h = F.avg_pool2d(h, 2)
        h = self.middle(h, embedding)
        for up in self.ups:
            h = F.interpolate(h, scale_factor=2)
            h = up(torch.cat([h, skips.pop()], dim=1), embedding)
        return self.last(h)  # type: ignore[no-any-return]


@task(version=1)
def digit_images(size: int = 8) -> tuple[Tensor, Tensor]:
    """Digits as pictures (N, 1, size, size) from -1 to 1, and their classes: 1797 of 8x8, or 5000 of 16x16."""
    require.one_of("size", size, (8, 16))
    x, y = _images(size)
    return x.clone(), y.clone()


@functools.cache
def _images(size: int) -> tuple[Tensor, Tensor]:
    data = digits() if size == 8 else mnist5k()
    side = math.isqrt(data.x[0].numel())
    x = data.x.reshape(-1, 1, side, side)
    x = (x - x.min()) / (x.max() - x.min())
    if size == 16:
        x = F.avg_pool2d(F.pad(x, (2, 2, 2, 2)), 2)
    return 2 * x - 1, data.y.long()


@task(version=1)
def digit_denoiser(*, size: int = 8, steps: int = 1000, channels: int = 16, held_out: float = 0.0) -> Denoiser:
    """denoise(x (B, 1, size, size), sigma (, label)): a small U-Net, trained once on real digits and kept on disk.

    It predicts v under `cosine`; one label in ten is dropped in training, so it also serves without.

    Args:
        size: 8 or 16.
        steps: of Adam at batch 128.
        channels: of the first level.
        held_out: the last share of the pictures is not trained on.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Denoiser(Unet(channels=channels), cosine(), "v")

    def train(denoise: nn.Module) -> None:
        g = torch.Generator().manual_seed(1)
        x, y = digit_images(size)
        kept = round(len(x) * (1 - held_out))
        process: Any = denoise.process

        def objective() -> Tensor:
            rows = torch.randint(kept, (128,), generator=g)
            label = torch.where(torch.rand(128, generator=g) < 0.1, 10, y[rows])
            (place,) = spread_times(128, [g], dtype=torch.float32)
            sigma = process.ratio(EDGE + (1 - 2 * EDGE) * place)
            noise = torch.randn(128, 1, size, size, generator=g)
            return v_error(denoise, x[rows], sigma, noise, label).mean()

        minimise(objective, denoise.parameters(), steps=steps, lr=2e-3)

    key = f"digits {size}, {steps} steps, {channels} channels, {held_out:g} held out"
    return trained(build, train, key=key)  # type: ignore[return-value]


def drawn_digits(batch: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Rows of pixels of 8x8 digits (S, batch, 64) and their classes, one-hot (S, batch, 10), for `fit_denoiser`."""
    x, y = _images(8)
    rows = torch.stack([torch.randint(len(x), (batch,), generator=g) for g in generators])
    return x[rows].flatten(2), F.one_hot(y[rows], 10).float()


def digit_teacher(seeds: Seeds) -> Denoise:
    """`digit_denoiser` as denoise(x (S, B, 64), sigma (, classes (S, B, 10))): zeros, or none, are no class."""
    network = digit_denoiser(steps=seeds.few(1000, smoke=2))

    def denoise(x: Tensor, sigma: Tensor | float, classes: Tensor | None = None) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1]).flatten()
        label = None if classes is None else torch.where(classes.any(-1), classes.argmax(-1), 10).flatten()
        return network(x.reshape(-1, 1, 8, 8), level, label).view_as(x)  # type: ignore[no-any-return]

    return denoise


@task(version=1)
def digit_student(seeds: Seeds, *, steps: int = 500, conditions: int = 0) -> Denoiser:
    """A `stacked_denoiser` of 64 pixels, fitted once to digits; each call gives a copy, free to be trained on.

    Args:
        seeds: see `fit_denoiser`.
        steps: of the fit, 2 in a smoke run.
        conditions: 10 for classes, one-hot, of which one in ten is dropped in the fit; 0 for none.
    """
    return copy.deepcopy(_digit_student(seeds, steps, conditions))


@functools.cache
def _digit_student(seeds: Seeds, steps: int, conditions: int) -> Denoiser:
    denoise = stacked_denoiser(64, seeds, hidden=(128, 128), conditions=conditions)

    def draw(batch: int, generators: Sequence[Generator]) -> tuple[Tensor, ...]:
        x, classes = drawn_digits(batch, generators)
        kept = torch.stack([torch.rand(batch, 1, generator=g) > 0.1 for g in generators])
        return (x, classes * kept) if conditions else (x,)

    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(steps, smoke=2), batch=64)
    return denoise


@task(version=1)
def digit_classifier(*, size: int = 8, steps: int = 2000) -> nn.Sequential:
    """classifier(x (B, 1, size, size)) -> logits (B, 10): a perceptron 64-32 of real digits, kept on disk.

    `classifier[:-1]` gives 32 features.

    Args:
        size: 8 or 16.
        steps: of Adam at batch 128.
    """

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            hidden = nn.Linear(size * size, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU()
            return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(32, 10))

    def train(network: nn.Module) -> None:
        g = torch.Generator().manual_seed(1)
        x, y = digit_images(size)

        def objective() -> Tensor:
            rows = torch.randint(len(x), (128,), generator=g)
            return F.cross_entropy(network(x[rows]), y[rows])

        minimise(objective, network.parameters(), steps=steps, lr=3e-3)

    return trained(build, train, key=f"classifier {size}, {steps} steps")  # type: ignore[return-value]


@functools.cache
def _real_features(size: int) -> tuple[nn.Module, Tensor]:
    features = digit_classifier(size=size)[:-1]
    return features, features(digit_images(size)[0]).double()


@task(version=1)
@torch.no_grad()
def digit_distance(x: Tensor) -> Tensor:
    """Frechet's distance between pictures (*replicas, N, 1, size, size) and all real digits of that size: (*replicas).

    |m - m'|^2 + tr(C + C' - 2 (C C')^1/2) for means and covariances of the 32 features of `digit_classifier`. Few
    pictures seem farther than many, so compare equal numbers.
    """
    network, real = _real_features(x.shape[-1])
    found = network(x.flatten(0, -4)).double().unflatten(0, x.shape[:-3])
    return frechet_distance(found, real)


@task(version=1)
def frechet_distance(x: Tensor, y: Tensor) -> Tensor:
    """Between normal laws of the moments of points (*replicas, N, D) and (M, D), squared: (*replicas), >= 0."""
    (m, c), (n, d) = ((z.mean(-2), _covariance(z)) for z in (x, y))
    values, vectors = torch.linalg.eigh(c)
    root = vectors * values.clamp(min=0).sqrt().unsqueeze(-2) @ vectors.mT
    cross = torch.linalg.eigvalsh(root @ d @ root).clamp(min=0).sqrt().sum(-1)
    traces = (c.diagonal(dim1=-2, dim2=-1) + d.diagonal(dim1=-2, dim2=-1)).sum(-1)
    squared = (m - n).square().sum(-1) + traces - 2 * cross
    return squared.clamp(min=0)  # type: ignore[no-any-return]  # rounding


def _covariance(points: Tensor) -> Tensor:
    centred = points - points.mean(-2, keepdim=True)
    return centred.mT @ centred / (points.shape[-2] - 1)


def sheet(x: Tensor, *, columns: int = 5) -> NDArray[np.float32]:
    """Pictures (N, 1, H, W) from -1 to 1 in rows, (ceil(N / columns) H, columns W) from 0 to 1: for `draw`."""
    blank = x.new_full((-len(x) % columns, *x.shape[1:]), -1.0)
    rows = torch.cat([x, blank]).view(-1, columns, *x.shape[-2:]).transpose(1, 2)
    found: NDArray[np.float32] = (rows.flatten(2).flatten(0, 1) / 2 + 0.5).clamp(0, 1).numpy()
    return found
