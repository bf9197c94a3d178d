"""Diffusion resampling: a model whose modes weigh wrong, a discriminator of 500 real points, and who does best with it.

The data are six equal Gaussians on a ring; the model is the exact denoiser of others near them, a little wider, with
random weights. The discriminator is a perceptron of noised points. Every arm takes the same evaluations of the
denoiser; discriminator guidance also needs the discriminator's gradient at each of them. The second and third claim
are registered anew after their first results were seen: their baselines, which had no settings, are drawn by the
discriminator at the end, in four ways.

Then real digits: the model is the room's shared network, without labels, and the discriminator learns from all digits
and from 2000 of the network's samples, the same for every seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ParticleFilterSampler, discriminator_log_ratio, multinomial_resample
from lossary.diffusion._denoiser import Counted, Denoise
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.tasks import digit_denoiser, digit_distance, digit_images, minimise, sheet, sliced_wasserstein, stacked_mlp

TRUTH = ring(6, radius=3.0, scale=0.3)
LOW, HIGH, STEPS = 0.01, 40.0, 32

Ratio = Callable[[Tensor, Tensor | float], Tensor]

FILTER = [{"at": at} for at in ((15, 19, 23, 27), (11, 15, 19, 23), (7, 11, 15, 19), (13, 17))]
GUIDED = [{"weight": weight} for weight in (0.0, 0.5, 1.0, 2.0)]
ONE_OF_FOUR = [{"kept": kept, "level": level} for kept in ("best", "drawn") for level in (0.01, 0.1)]
REDRAWN = [{"kept": "redrawn", "level": level} for level in (0.01, 0.03, 0.1, 0.3)]


def _sigmas(seeds: Seeds) -> Tensor:
    return karras_sigmas(seeds.few(STEPS, smoke=4), low=LOW, high=HIGH)


class _Ring:
    """One seed's model and real points; numbers are of entries, of samples, and of the discriminator."""

    dimension, dtype, samples = 2, torch.float64, 640
    hidden, square = (64, 64), 5  # the mean square of the data, about
    denoise: Denoise

    def __init__(self, seeds: Seeds, model: Generator, real: Generator) -> None:
        means = TRUTH.means + 0.15 * torch.randn(6, 2, generator=model, dtype=torch.float64)
        weights = (0.8 * torch.randn(6, generator=model, dtype=torch.float64)).softmax(0)
        self.model = Mixture(means, 0.35, weights)
        self.denoise, self.real = self.model.denoise, TRUTH.sample(seeds.few(500), generator=real)[0]

    def drawn(self, n: int, g: Generator) -> Tensor:
        """The model's samples."""
        return self.model.sample(n, generator=g)[0]

    @staticmethod
    def distance(x: Tensor, seeds: Seeds) -> list[float]:
        truth = [TRUTH.sample(x.shape[1], generator=g)[0] for g in seeds.torch("true")]
        return sliced_wasserstein(x, torch.stack(truth)).tolist()

    def inputs(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Of the discriminator."""
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1])[..., None]
        return torch.cat([x / (self.square + level**2).sqrt(), level.log() / 2], dim=-1).float()


class _Digits(_Ring):
    """All real digits."""

    dimension, dtype, samples = 64, torch.float32, 320
    hidden, square = (128, 128), 0.7

    def __init__(self, seeds: Seeds, model: Generator, real: Generator) -> None:
        self.denoise, self.pool = _network(seeds.smoke)
        self.real = digit_images()[0].flatten(1)

    def drawn(self, n: int, g: Generator) -> Tensor:
        return self.pool[torch.randint(len(self.pool), (n,), generator=g)]

    @staticmethod
    def distance(x: Tensor, seeds: Seeds) -> list[float]:
        return digit_distance(x.unflatten(-1, (1, 8, 8))).tolist()


@cache
def _network(smoke: bool) -> tuple[Denoise, Tensor]:
    """For digits as vectors, and its samples that the discriminators see."""
    few = Seeds((0,), smoke)
    network = digit_denoiser(steps=few.few(1000, smoke=2))

    def denoise(x: Tensor, sigma: Tensor | float) -> Tensor:
        return network(x.view(-1, 1, 8, 8), sigma).view_as(x)

    noise = torch.randn(few.few(2000, smoke=16), 64, generator=Generator().manual_seed(0))
    return denoise, heun(denoise, HIGH * noise, _sigmas(few))


def _cases(seeds: Seeds, kind: type[_Ring]) -> list[_Ring]:
    return [kind(seeds, *generators) for generators in zip(seeds.torch("model"), seeds.torch("real"))]


@cache
def _ratios(seeds: Seeds, kind: type[_Ring]) -> list[Ratio]:
    """log d / (1 - d) of each seed, after 400 steps on the real data and as many of the model's per batch of 256."""
    cases = _cases(seeds, kind)
    network: nn.Module = stacked_mlp((kind.dimension + 1, *kind.hidden, 1), seeds, activation="silu")
    generators, label = seeds.torch("training"), (torch.arange(256) < 128).float()

    def objective() -> Tensor:
        batch = []
        for case, g in zip(cases, generators):
            x = case.real[torch.randint(len(case.real), (128,), generator=g)]
            clean = torch.cat([x, case.drawn(128, g)])
            noise = (math.log(LOW) + math.log(HIGH / LOW) * torch.rand(128, generator=g, dtype=x.dtype)).exp()
            noise = noise.repeat(2)
            noised = clean + noise[:, None] * torch.randn(clean.shape, generator=g, dtype=x.dtype)
            batch.append(case.inputs(noised, noise))
        logits = network(torch.stack(batch)).squeeze(-1)
        return F.binary_cross_entropy_with_logits(logits, label.expand_as(logits), reduction="none").mean(-1).sum()

    minimise(objective, network.parameters(), steps=seeds.few(400, smoke=2), lr=0.003)
    network.requires_grad_(False)

    def ratio(one: nn.Module, case: _Ring) -> Ratio:
        return lambda x, sigma: discriminator_log_ratio(one(case.inputs(x, sigma))[..., 0]).to(x)

    return [ratio(network.replica(s), case) for s, case in enumerate(cases)]


class _Guided:
    """Discriminator guidance: x_0 + weight sigma^2 times the gradient of the log ratio."""

    def __init__(self, denoise: Denoise, ratio: Ratio, weight: float) -> None:
        self.denoise, self.ratio, self.weight = denoise, ratio, weight

    def __call__(self, x: Tensor, sigma: float) -> Tensor:
        with torch.enable_grad():
            here = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self.ratio(here, sigma).sum(), here)
        return self.denoise(x, sigma) + self.weight * sigma**2 * slope


def _kept(log_ratio: Tensor, kept: str, g: torch.Generator) -> Tensor:
    """Numbers of the particles (groups, N) that stay: the best one, one drawn by the ratio, or as many drawn so."""
    if kept == "best":
        return log_ratio.argmax(-1, keepdim=True)
    index = multinomial_resample(log_ratio, generator=g)
    return index[:, :1] if kept == "drawn" else index


def _samples(
    seeds: Seeds,
    kind: type[_Ring],
    *,
    at: tuple[int, ...] = (),
    weight: float = 0.0,
    particles: int = 16,
    best: bool = False,
    kept: str | None = None,
    level: float = LOW,
    n: int | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """n samples of each seed, with best a fraction of them, the best of each group; and what each that is left took.

    With `kept` they are independent up to the end, and of each group some stay by the ratio at that noise level.
    """
    n, sigmas, found = seeds.few(n or kind.samples, smoke=32), _sigmas(seeds), []
    at = tuple(step * (len(sigmas) - 1) // STEPS for step in at)
    streams = zip(_cases(seeds, kind), _ratios(seeds, kind), seeds.torch("start"), seeds.torch("noise"))
    for case, one, start, g in streams:
        denoise, ratio = Counted(case.denoise), Counted(one)
        x = HIGH * torch.randn(n, kind.dimension, generator=start, dtype=kind.dtype)
        if weight:
            x = heun(_Guided(denoise, ratio, weight), x, sigmas)
        else:
            sampler = ParticleFilterSampler(ratio, particles=particles, at=at, keep_best=best)
            x = sampler(denoise, x, sigmas, generator=g)
            if kept is not None:
                index = _kept(ratio(x, level).view(-1, particles), kept, g)
                x = torch.take_along_dim(x.view(-1, particles, kind.dimension), index[..., None], 1).flatten(0, 1)
        found.append(x)
    share = n / len(x)
    asked = share * ratio.evaluations
    return torch.stack(found), {
        "evaluations": share * denoise.evaluations,
        "discriminator calls": 0.0 if weight else asked,
        "discriminator gradients": asked if weight else 0.0,
    }


def _mode_error(samples: Sequence[Tensor]) -> list[float]:
    share = [torch.bincount(torch.cdist(x, TRUTH.means).argmin(-1), minlength=6) / len(x) for x in samples]
    return [50 * (s - 1 / 6).abs().sum().item() for s in share]


Grid = Sequence[Mapping[str, object]]


def _compare(
    seeds: Seeds,
    ours: Grid,
    theirs: Grid,
    score: Callable[[Tensor, Seeds], list[float]] = _Ring.distance,
    kind: type[_Ring] = _Ring,
    **common: object,
) -> Arms:
    """Both arms by the settings that score least."""

    def scored(seeds: Seeds, **setting: object) -> list[float]:
        return score(_samples(seeds, kind, **common, **setting)[0], seeds)

    best = [tune(scored, grid, seeds, better="lower") for grid in (ours, theirs)]
    (x, cost), (y, price) = (_samples(seeds, kind, **common, **setting) for setting in best)
    details = {key: [cost[key], price[key]] for key in cost} | {"method": best[0], "baseline": best[1]}
    return Arms(score(x, seeds), score(y, seeds), details)


@claim(
    says="Resampled particles are nearer the data than samples with discriminator guidance, or without any",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 6 Gaussians, wrong model, groups of 16, 32 Heun steps, 640 samples; 4 settings each",
)
def filter_beats_discriminator_guidance(seeds: Seeds) -> Arms:
    return _compare(seeds, FILTER, GUIDED)


@claim(
    says="Of a network of real digits, too, resampled particles are nearer the data than samples with discriminator"
    " guidance, or without any",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; one U-Net without labels, digits 8x8, groups of 16, 32 Heun steps, 320"
    " samples; 4 settings each",
)
def filter_beats_discriminator_guidance_on_digits(seeds: Seeds) -> Arms:
    return _compare(seeds, FILTER, GUIDED, _Digits.distance, _Digits)


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
    ours = [{"best": True, **setting} for setting in FILTER]
    return _compare(seeds, ours, ONE_OF_FOUR, particles=4, n=1920)


@claim(
    says="It halves the error of the modes' weights that samples have when drawn anew by the discriminator at the end",
    kind="ratio",
    metric="mode error",
    margin=0.5,
    scale="baseline drawn with replacement by the ratio at noise 0.01 to 0.3; 6 Gaussians, wrong model, groups of 16,"
    " 32 Heun steps, 1920 samples; 4 settings each",
)
def filter_halves_the_mode_error(seeds: Seeds) -> Arms:
    return _compare(seeds, FILTER, REDRAWN, lambda x, seeds: _mode_error(x), n=1920)


@claim(
    says="With exact ratios, more particles bring the modes' weights nearer to the data's",
    kind="trend",
    metric="mode error",
    levels=(1, 2, 3, 4, 5, 6),
    scale="log2 of the particles in a group; 6 Gaussians, wrong weights, exact ratios, 32 Heun steps, 1920 samples",
)
def more_particles_are_better(seeds: Seeds) -> Arms:
    rows, evaluations = [], []
    for case, start, g in zip(_cases(seeds, _Ring), seeds.torch("start"), seeds.torch("noise")):
        model, row = Mixture(TRUTH.means, 0.3, case.model.weights), []

        def ratio(x: Tensor, sigma: float, model: Mixture = model) -> Tensor:
            return TRUTH.log_density(x, sigma) - model.log_density(x, sigma)

        x = HIGH * torch.randn(1920, 2, generator=start, dtype=torch.float64)
        for level in range(1, 7):
            sampler = ParticleFilterSampler(ratio, particles=2**level, at=FILTER[1]["at"])
            denoise = Counted(model.denoise)
            row.append(sampler(denoise, x, karras_sigmas(STEPS, low=LOW, high=HIGH), generator=g))
            evaluations.append(denoise.evaluations)
        rows.append(_mode_error(row))
    return Arms(rows, details={"evaluations": evaluations[:6]})


def draw(seeds: Seeds) -> list[Panel]:
    """Data, the model's samples, and those of groups of 16 filtered by the discriminator; then digits."""
    one = seeds.one(0)
    panels = [Panel("data", points=TRUTH.sample(480, generator=one.torch("true")[0])[0].numpy())]
    settings = {"model": (), "resampled": FILTER[1]["at"]}
    for title, at in settings.items():
        panels.append(Panel(title, points=_samples(one, _Ring, at=at, n=480)[0][0].numpy()))
    for title, at in settings.items():
        x = _samples(one, _Digits, at=at, n=32)[0][0]
        panels.append(Panel(title, image=sheet(x[:20].view(-1, 1, 8, 8))))
    return panels
