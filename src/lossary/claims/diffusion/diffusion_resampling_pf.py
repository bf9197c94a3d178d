"""Diffusion resampling: a model whose modes weigh wrong, a discriminator of 500 real points, and who does best with it.

The data are six equal Gaussians on a ring; the model is the exact denoiser of others near them, a little wider, with
random weights. The discriminator is a perceptron of noised points. Every arm takes the same evaluations of the
denoiser; discriminator guidance also needs the discriminator's gradient at each of them. The second and third claim
are registered anew after their first results were seen: their baselines, which had no settings, are drawn by the
discriminator at the end, in four ways.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ParticleFilterSampler, discriminator_log_ratio, multinomial_resample
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.tasks import sliced_wasserstein, stacked_mlp

TRUTH = ring(6, radius=3.0, scale=0.3)
LOW, HIGH = 0.01, 40.0
SIGMAS = karras_sigmas(32, low=LOW, high=HIGH)

Ratio = Callable[[Tensor, Tensor | float], Tensor]

FILTER = [{"at": at} for at in ((15, 19, 23, 27), (11, 15, 19, 23), (7, 11, 15, 19), (13, 17))]
GUIDED = [{"weight": weight} for weight in (0.0, 0.5, 1.0, 2.0)]
ONE_OF_FOUR = [{"kept": kept, "level": level} for kept in ("best", "drawn") for level in (0.01, 0.1)]
REDRAWN = [{"kept": "redrawn", "level": level} for level in (0.01, 0.03, 0.1, 0.3)]


def _models(seeds: Seeds) -> list[Mixture]:
    found = []
    for g in seeds.torch("model"):
        means = TRUTH.means + 0.15 * torch.randn(6, 2, generator=g, dtype=torch.float64)
        found.append(Mixture(means, 0.35, (0.8 * torch.randn(6, generator=g, dtype=torch.float64)).softmax(0)))
    return found


def _inputs(x: Tensor, sigma: Tensor | float) -> Tensor:
    level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1])[..., None]
    return torch.cat([x / (5 + level**2).sqrt(), level.log() / 2], dim=-1).float()


def _ratios(seeds: Seeds, models: list[Mixture]) -> list[Ratio]:
    """log d / (1 - d) of each seed, after 400 steps on 500 real points and as many of the model's per batch of 256."""
    network: nn.Module = stacked_mlp((3, 64, 64, 1), seeds, activation="silu")
    real = [TRUTH.sample(seeds.few(500), generator=g)[0] for g in seeds.torch("real")]
    generators, steps = seeds.torch("training"), seeds.few(400, smoke=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    label = (torch.arange(256) < 128).float()
    for _ in range(steps):
        batch = []
        for x, model, g in zip(real, models, generators):
            clean = torch.cat([x[torch.randint(len(x), (128,), generator=g)], model.sample(128, generator=g)[0]])
            noise = (math.log(LOW) + math.log(HIGH / LOW) * torch.rand(128, generator=g, dtype=x.dtype)).exp()
            noise = noise.repeat(2)
            batch.append(_inputs(clean + noise[:, None] * torch.randn(256, 2, generator=g, dtype=x.dtype), noise))
        optimizer.zero_grad()
        logits = network(torch.stack(batch)).squeeze(-1)
        loss = F.binary_cross_entropy_with_logits(logits, label.expand_as(logits), reduction="none")
        loss.mean(-1).sum().backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
    ones = [network.replica(s) for s in range(len(seeds))]
    return [lambda x, sigma, one=one: discriminator_log_ratio(one(_inputs(x, sigma))[..., 0]).to(x) for one in ones]


class _Guided:
    """Discriminator guidance: x_0 + weight sigma^2 times the gradient of the log ratio."""

    def __init__(self, model: Mixture, ratio: Ratio, weight: float) -> None:
        self.model, self.ratio, self.weight = model, ratio, weight

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.ratio(here, sigma).sum(), here)
        return self.model.denoise(x, sigma) + self.weight * sigma**2 * slope


def _kept(log_ratio: Tensor, kept: str, g: torch.Generator) -> Tensor:
    """Numbers of the particles (groups, N) that stay: the best one, one drawn by the ratio, or as many drawn so."""
    if kept == "best":
        return log_ratio.argmax(-1, keepdim=True)
    index = multinomial_resample(log_ratio, generator=g)
    return index[:, :1] if kept == "drawn" else index


def _samples(
    seeds: Seeds,
    *,
    at: tuple[int, ...] = (),
    weight: float = 0.0,
    particles: int = 16,
    best: bool = False,
    kept: str | None = None,
    level: float = LOW,
    n: int = 640,
) -> list[Tensor]:
    """n samples of each seed; with best a fraction of them, the best of each group.

    With `kept` they are independent up to the end, and of each group some stay by the ratio at that noise level.
    """
    n = seeds.few(n, smoke=32)
    models, found = _models(seeds), []
    ratios = _ratios(seeds, models)
    for model, ratio, start, g in zip(models, ratios, seeds.torch("start"), seeds.torch("noise")):
        x = HIGH * torch.randn(n, 2, generator=start, dtype=torch.float64)
        if weight:
            found.append(heun(_Guided(model, ratio, weight), x, SIGMAS))
        else:
            sampler = ParticleFilterSampler(ratio, particles=particles, at=at, keep_best=best)
            x = sampler(model.denoise, x, SIGMAS, generator=g)
            if kept is not None:
                index = _kept(ratio(x, level).view(-1, particles), kept, g)
                x = torch.take_along_dim(x.view(-1, particles, 2), index[..., None], 1).flatten(0, 1)
            found.append(x)
    return found


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    found = torch.stack(_samples(seeds, **setting))
    truth = [TRUTH.sample(found.shape[1], generator=g)[0] for g in seeds.torch("true")]
    return sliced_wasserstein(found, torch.stack(truth)).tolist()


def _mode_error(samples: list[Tensor]) -> list[float]:
    share = [torch.bincount(torch.cdist(x, TRUTH.means).argmin(-1), minlength=6) / len(x) for x in samples]
    return [50 * (s - 1 / 6).abs().sum().item() for s in share]


@claim(
    says="Resampled particles are nearer the data than samples with discriminator guidance, or without any",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 6 Gaussians, wrong model, groups of 16, 32 Heun steps, 640 samples; 4 settings each",
)
def filter_beats_discriminator_guidance(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (FILTER, GUIDED))
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Of four filtered particles the best is nearer the data than the one of four independent samples that the"
    " discriminator chooses",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 6 Gaussians, wrong model, best of four, or one drawn by its ratio, at noise 0.01 or 0.1, 32 Heun"
    " steps, 480 of 1920 samples; 4 settings each",
)
def filter_beats_best_of_four(seeds: Seeds) -> Arms:
    def distance(seeds: Seeds, **setting: object) -> list[float]:
        return _distance(seeds, particles=4, n=1920, **setting)

    ours = tune(distance, [{"best": True, **setting} for setting in FILTER], seeds, better="lower")
    theirs = tune(distance, ONE_OF_FOUR, seeds, better="lower")
    return Arms(distance(seeds, **ours), distance(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="It halves the error of the modes' weights that samples have when drawn anew by the discriminator at the end",
    kind="ratio",
    metric="mode error",
    margin=0.5,
    scale="baseline drawn with replacement by the ratio at noise 0.01 to 0.3; 6 Gaussians, wrong model, groups of 16,"
    " 32 Heun steps, 1920 samples; 4 settings each",
)
def filter_halves_the_mode_error(seeds: Seeds) -> Arms:
    def error(seeds: Seeds, **setting: object) -> list[float]:
        return _mode_error(_samples(seeds, n=1920, **setting))

    ours, theirs = (tune(error, grid, seeds, better="lower") for grid in (FILTER, REDRAWN))
    return Arms(error(seeds, **ours), error(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="With exact ratios, more particles bring the modes' weights nearer to the data's",
    kind="trend",
    metric="mode error",
    levels=(1, 2, 3, 4, 5, 6),
    scale="log2 of the particles in a group; 6 Gaussians, wrong weights, exact ratios, 32 Heun steps, 1920 samples",
)
def more_particles_are_better(seeds: Seeds) -> Arms:
    rows = []
    for wrong, start, g in zip(_models(seeds), seeds.torch("start"), seeds.torch("noise")):
        model, row = Mixture(TRUTH.means, 0.3, wrong.weights), []

        def ratio(x: Tensor, sigma: float, model: Mixture = model) -> Tensor:
            return TRUTH.log_density(x, sigma) - model.log_density(x, sigma)

        x = HIGH * torch.randn(1920, 2, generator=start, dtype=torch.float64)
        for level in range(1, 7):
            sampler = ParticleFilterSampler(ratio, particles=2**level, at=FILTER[1]["at"])
            row.append(sampler(model.denoise, x, SIGMAS, generator=g))
        rows.append(_mode_error(row))
    return Arms(rows)


def draw(seeds: Seeds) -> list[Panel]:
    """Data, the model's samples, and those of groups of 16 filtered by the discriminator."""
    one = seeds.one(0)
    panels = [Panel("data", points=TRUTH.sample(480, generator=one.torch("true")[0])[0].numpy())]
    for title, at in (("model", ()), ("resampled", FILTER[1]["at"])):
        panels.append(Panel(title, points=_samples(one, at=at, n=480)[0].numpy()))
    return panels
