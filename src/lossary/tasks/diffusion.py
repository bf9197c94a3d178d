"""What claims about diffusion share: small denoisers, their training and distillation, distances between samples."""

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.diffusion._denoiser import Denoise, Denoiser, denoising_error
from lossary.diffusion._distil import ScoreDistillation
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._noise import noise
from lossary.diffusion._process import Process, cosine, over
from lossary.roles.procedure import Procedure, advance
from lossary.tasks import task
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
        inputs = [x, waves(over(t, x[..., 0]).expand(x.shape[:-1])).to(x.dtype)]
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


def drawn_from(mixture: Mixture) -> Draw:
    """draw(batch, generators) -> points of the mixture, (S, B, D) in single precision, for `fit_denoiser`."""

    def draw(batch: int, generators: Sequence[Generator]) -> tuple[Tensor]:
        return (torch.stack([mixture.sample(batch, generator=g)[0] for g in generators]).float(),)

    return draw


@task(version=1)
def uneven_ring() -> Mixture:
    """Eight Gaussians in the plane, 0.12 wide, on a circle of radius 1.4; the last weighs four times the first."""
    return ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))


@task(version=1)
def ring_denoiser(seeds: Seeds, *, steps: int = 500) -> Denoiser:
    """A `stacked_denoiser` that was fitted to `uneven_ring` once; each call gives a copy, free to be trained on."""
    return copy.deepcopy(_ring_denoiser(seeds, steps))


@functools.cache
def _ring_denoiser(seeds: Seeds, steps: int) -> Denoiser:
    denoise = stacked_denoiser(2, seeds)
    fit_denoiser(denoise, drawn_from(uneven_ring()), seeds=seeds, steps=seeds.few(steps, smoke=2))
    return denoise


@task(version=1)
def distil(
    procedure: Procedure,
    batch: Callable[[Sequence[Generator]], Mapping[str, Tensor]],
    *,
    seeds: Seeds,
    steps: int,
    lr: float,
) -> None:
    """Train the players of a procedure in place, each with an Adam (betas 0 and 0.99) and a cosine decay to 0.

    Args:
        procedure: of stacked players; one whose turn never comes stays as it is.
        batch: batch(generators) -> what its objective takes, one generator for each seed.
        seeds: stream "distil", of the batches and of the procedure's own random numbers.
        steps: of the procedure; the learning rates decay from one to the next, not within.
        lr: of all players.
    """
    generators = seeds.torch("distil")
    called = {name for step in range(steps) for name in procedure.turns(step)}
    optimizers = {
        name: torch.optim.Adam(player.parameters(), lr=lr, betas=(0.0, 0.99))
        for name, player in procedure.players().items()
        if name in called
    }
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers.values()]
    for step in range(steps):
        advance(procedure, batch(generators), optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()


class Tally:
    """Counts from now on what a distillation asks its networks: an evaluation for each sample (S, B, ...) of a seed.

    Networks are the generator, the fake one, the teacher, perfect or not, and a discriminator's encoder.
    """

    def __init__(self, procedure: ScoreDistillation) -> None:
        self._evaluations = 0
        for name in ("generator", "fake", "teacher", "encoder"):
            network = getattr(procedure, name, None)
            if isinstance(network, nn.Module):
                network.register_forward_pre_hook(lambda module, inputs: self._see(inputs[0]))
            elif network is not None:
                setattr(procedure, name, self._seen(network))

    def _see(self, x: Tensor) -> None:
        self._evaluations += x.shape[1]

    def _seen(self, denoise: Denoise) -> Denoise:
        def asked(x: Tensor, *rest: Any) -> Tensor:
            self._see(x)
            return denoise(x, *rest)

        return asked

    def taken(self) -> int:
        """Evaluations of a seed since this was asked last."""
        evaluations, self._evaluations = self._evaluations, 0
        return evaluations


@task(version=1)
def generated(generate: Callable[[Tensor], Tensor], seeds: Seeds, *, dimension: int = 2) -> Tensor:
    """What a generator makes of standard normals (S, 2000, dimension), 16 in a smoke run, of stream "latent"."""
    latent = noise((len(seeds), seeds.few(2000, smoke=16), dimension), seeds.torch("latent"))
    with torch.no_grad():
        return generate(latent)


@task(version=1)
def ring_distance(found: Tensor, seeds: Seeds) -> Tensor:
    """`sliced_wasserstein` from points (S, N, 2) to as many of `uneven_ring`, of stream "true": (S,)."""
    return sliced_wasserstein(found, *drawn_from(uneven_ring())(found.shape[1], seeds.torch("true")))
