"""What claims about diffusion share: small denoisers, their training, and distances between samples."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary import require
from lossary.diffusion._denoiser import Denoise, Denoiser, denoising_error
from lossary.diffusion._process import Process, cosine, over
from lossary.tasks import task
from lossary.tasks.cache import trained
from lossary.tasks.data import digits, mnist5k
from lossary.tasks.models import StackedMLP, stacked_mlp
from lossary.tasks.seeds import Seeds
from lossary.tasks.training import minimise, spread_times

EDGE = 1e-3  # times are drawn from EDGE to 1 - EDGE
HARMONICS = 4


def waves(t: Tensor) -> Tensor:
    """(*batch) times in 0 to 1 to (*batch, 2 HARMONICS) features."""
    angle = t[..., None] * (math.pi / 2 * 2.0 ** torch.arange(HARMONICS, dtype=t.dtype, device=t.device))
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class StackedDenoiserNet(nn.Module):
    """network(x_t (S, B, D), t, condition (S, B, C) or None) -> (S, B, D): a stacked perceptron."""

    def __init__(self, mlp: StackedMLP, conditions: int) -> None:
        super().__init__()
        self.mlp, self.conditions = mlp, conditions

    def forward(self, x: Tensor, t: Tensor, condition: Tensor | None = None) -> Tensor:
        inputs = [x, waves(over(t, x[..., 0]).expand(x.shape[:-1]))]
        if self.conditions:
            missing = torch.zeros(*x.shape[:-1], self.conditions, dtype=x.dtype, device=x.device)
            inputs.append(missing if condition is None else condition.to(x.dtype))
        return self.mlp(torch.cat(inputs, dim=-1))  # type: ignore[no-any-return]


@task(version=1)
def stacked_denoiser(
    dimension: int,
    seeds: Seeds,
    *,
    hidden: Sequence[int] = (64, 64),
    conditions: int = 0,
    process: Process | None = None,
) -> Denoiser:
    """denoise(x (S, B, D), sigma (, condition (S, B, conditions))) for every seed: predicts v, data of about unit size.

    Args:
        dimension: D.
        seeds: stream "init".
        hidden: widths of the perceptron, SiLU between.
        conditions: width of a condition; all zeros, or None, is no condition.
        process: under which the network sees x; None is `cosine`.
    """
    sizes = (dimension + 2 * HARMONICS + conditions, *hidden, dimension)
    network = StackedDenoiserNet(stacked_mlp(sizes, seeds, activation="silu"), conditions)
    return Denoiser(network, process or cosine(), "v")


Draw = Callable[[int, Sequence[Generator]], tuple[Tensor, ...]]
"""draw(batch, generators) -> clean (S, B, ...) and whatever conditions go with it, one generator for each seed."""


def v_error(denoise: Denoise, clean: Tensor, sigma: Tensor, noise: Tensor, *conditions: Tensor) -> Tensor:
    """The squared error of v, (*batch): the plain loss of `fit_denoiser`."""
    return (1 + sigma**-2) * denoising_error(denoise, clean, sigma, noise, *conditions)


@task(version=1)
def fit_denoiser(
    denoise: Denoiser,
    draw: Draw,
    *,
    seeds: Seeds,
    steps: int,
    batch: int = 128,
    lr: float = 3e-3,
    loss: Callable[..., Tensor] = v_error,
) -> None:
    """Train a stack of denoisers in place with Adam and a cosine decay, at times spread evenly over each batch.

    Args:
        denoise: of (S, B, ...), as `stacked_denoiser` makes it.
        draw: the data.
        seeds: stream "diffusion", of data, times and noise.
        steps, batch, lr: of Adam.
        loss: loss(denoise, clean, sigma (S, B), noise, *conditions) -> (S, B), called in this order.
    """
    generators = seeds.torch("diffusion")

    def objective() -> Tensor:
        clean, *conditions = draw(batch, generators)
        noise = torch.stack([torch.randn(clean.shape[1:], generator=g) for g in generators]).to(clean)
        place = spread_times(batch, generators, dtype=torch.float32)
        sigma = denoise.process.ratio(EDGE + (1 - 2 * EDGE) * place).to(clean)
        return loss(denoise, clean, sigma, noise, *conditions).mean(-1).sum()

    minimise(objective, denoise.parameters(), steps=steps, lr=lr)


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
        embedding = F.silu(self.time(waves(t)) + self.label(label))
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


@task(version=1)
def sliced_wasserstein(x: Tensor, y: Tensor, *, directions: int = 128, generator: Generator | None = None) -> Tensor:
    """W_1 between equally many points (*replicas, N, D), averaged over random directions: (*replicas)."""
    if x.shape != y.shape:
        raise ValueError(f"y: expected as many points as x, {tuple(x.shape)}, got {tuple(y.shape)}")
    random = generator or torch.Generator().manual_seed(0)
    axes = F.normalize(torch.randn(x.shape[-1], directions, generator=random, dtype=x.dtype), dim=0)
    return ((x @ axes).sort(-2).values - (y @ axes).sort(-2).values).abs().mean((-2, -1))


@task(version=1)
def energy_distance(x: Tensor, y: Tensor) -> Tensor:
    """2 E|X - Y| - E|X - X'| - E|Y - Y'| of points (*replicas, N, D) and (*replicas, M, D): (*replicas), >= 0."""
    across = torch.cdist(x, y).mean((-2, -1))
    return 2 * across - torch.cdist(x, x).mean((-2, -1)) - torch.cdist(y, y).mean((-2, -1))
