"""DisBack: does the detour over the teacher's degraded copies bring the generator sooner to the data, and as near?

Eight unevenly weighted Gaussians on a circle, or 8x8 digits; the teacher is a network fitted to them, of which
generator, fake network and path are copies, as in the paper. Recording takes 100 updates of one network, 5 points. A
step of distillation has two updates, so plain distillation has 50 steps more; `backtracking_ends_nearer` was registered
anew, after a result had been seen, with these.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DistributionBacktracking, degradation_path, distribution_matching_gradient
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over
from lossary.tasks import (
    Tally,
    digit_distance,
    digit_student,
    distil,
    drawn_from,
    generated,
    ring_denoiser,
    ring_distance,
    sheet,
    uneven_ring,
)

LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RECORDING, BATCH = 100, 64


def _batch(generators: Sequence[Generator], digits: bool) -> dict[str, Tensor]:
    return {"latent": noise((len(generators), BATCH, 64 if digits else 2), generators)}


def _fitted(seeds: Seeds, digits: bool) -> Denoiser:
    return digit_student(seeds) if digits else ring_denoiser(seeds)


@functools.cache
def _path(seeds: Seeds, digits: bool = False) -> list[nn.Module]:
    """Of the teacher and five copies."""
    generators, steps = seeds.torch("record"), seeds.few(RECORDING, smoke=5)
    return degradation_path(
        _fitted(seeds, digits),
        OneStepGenerator(_fitted(seeds, digits)),
        (_batch(generators, digits) for _ in range(steps)),
        functools.partial(torch.optim.Adam, lr=0.002),
        every=steps // 5,
        levels=LEVELS,
        random=generators,
    )


class _Evened(DistributionBacktracking):
    """With DMD's weights, of which a teacher's error decides, for both arms."""

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return distribution_matching_gradient(x, real, fake, dims=sigma.ndim)


def _distilled(
    seeds: Seeds, *, lr: float, interval: int = 0, steps: int = 300, digits: bool = False
) -> tuple[DistributionBacktracking, Tally]:
    """Without an interval the teacher is the target all along."""
    path = _path(seeds, digits) if interval else [_fitted(seeds, digits)]
    generator = OneStepGenerator(_fitted(seeds, digits))
    procedure = _Evened(generator, path, interval=max(interval, 1), levels=LEVELS)
    tally = Tally(procedure)
    batch = functools.partial(_batch, digits=digits)
    distil(procedure, batch, seeds=seeds, steps=seeds.few(steps, smoke=2), lr=lr)
    return procedure, tally


def _made(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[Tensor, float, int]:
    """Samples, the evaluations that one takes, and those of training; recording asks generator and copy."""
    procedure, tally = _distilled(seeds, digits=digits, **setting)
    recording = 2 * seeds.few(RECORDING, smoke=5) * BATCH if setting.get("interval") else 0
    training, x = recording + tally.taken(), generated(procedure, seeds, dimension=64 if digits else 2)
    return x, tally.taken() / x.shape[1], training


def _distance(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[list[float], float, int]:
    x, *costs = _made(seeds, digits=digits, **setting)
    found = digit_distance(x.unflatten(-1, (1, 8, 8))) if digits else ring_distance(x, seeds)
    return found.tolist(), *costs


def _compare(seeds: Seeds, method: list[dict], baseline: list[dict]) -> Arms:
    def score(seeds: Seeds, **setting: object) -> list[float]:
        return _distance(seeds, **setting)[0]

    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (method, baseline))
    values, evaluations, training = zip(*(_distance(seeds, **setting) for setting in (ours, theirs)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": ours, "baseline": theirs})


RATES = (0.0005, 0.001, 0.002, 0.004)
PATHS = [{"lr": lr, "interval": interval} for lr in RATES[1:3] for interval in (10, 30)]
PLAIN = [{"lr": lr, "steps": 350} for lr in RATES]


@claim(
    says="After as many updates, those of the recording included, backtracking ends nearer the data than the teacher as"
    " the only target",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 5 points on the path, 300 steps of 64 against 350; 4 settings"
    " each",
)
def backtracking_ends_nearer(seeds: Seeds) -> Arms:
    return _compare(seeds, PATHS, PLAIN)


@claim(
    says="On real digits, too, backtracking ends nearer the data than the teacher as the only target, after as many"
    " updates",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; digits 8x8, MLP of 128, 5 points on the path, 300 steps of 64 against 350;"
    " 4 settings each",
)
def backtracking_ends_nearer_on_digits(seeds: Seeds) -> Arms:
    return _compare(seeds, *([{**setting, "digits": True} for setting in grid] for grid in (PATHS, PLAIN)))


@claim(
    says="Backtracking is faster: 100 steps of it end nearer the data than 150 of plain distillation, which has 50 more"
    " for the recording's cost",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 5 points on the path, batches of 64; 4 settings each",
)
def backtracking_is_faster(seeds: Seeds) -> Arms:
    ours = [{"lr": lr, "interval": interval, "steps": 100} for lr in RATES[2:] for interval in (5, 15)]
    return _compare(seeds, ours, [{"lr": lr, "steps": 100 + RECORDING // 2} for lr in RATES])


@claim(
    says="At its samples the untrained generator's exact scores differ at most half as much from the first target's as"
    " from the teacher's",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="root mean square, times noise level, 0.2 to 20; 8 Gaussians in 2-D, MLP of 64, a path of 5; exact for a bank"
    " of 4000 samples, at 500 others",
)
def the_first_target_matches(seeds: Seeds) -> Arms:
    path, generators = _path(seeds), seeds.torch("mismatch")
    generator, levels = OneStepGenerator(ring_denoiser(seeds)), karras_levels(0.2, 20.0)
    with torch.no_grad():
        bank, x = (generator(noise((len(seeds), seeds.few(n), 2), generators)) for n in (4000, 500))
        sigma = levels(tuple(x.shape[:-1]), generators)
        width = over(sigma, x)
        x_t = x + width * noise(x, generators)
        own = torch.stack([_posterior_mean(*each) for each in zip(x_t, width, bank)])
        apart = [(target(x_t, sigma) - own) / width for target in (path[-2], path[0])]
    return Arms(*(a.square().mean((1, 2)).sqrt().tolist() for a in apart))


def _posterior_mean(x_t: Tensor, sigma: Tensor, bank: Tensor) -> Tensor:
    """E[x_0 | x_t] where x_0 is any sample of the bank: (n, 2), levels (n, 1), (m, 2) -> (n, 2)."""
    square = (x_t.unsqueeze(1) - bank).square().sum(-1)
    return (-square / (2 * sigma**2)).softmax(-1) @ bank


def draw(seeds: Seeds) -> list[Panel]:
    """One-step samples after 100 steps, with the teacher as only target and with its path; of digits after all."""
    one = seeds.one(0)
    panels = [Panel("data", points=drawn_from(uneven_ring())(600, one.torch("true"))[0][0].numpy())]
    panels.append(Panel("start", points=generated(OneStepGenerator(ring_denoiser(one)), one)[0, :600].numpy()))
    for title, setting in (("teacher, 100 steps", {}), ("path, 100 steps", {"interval": 10})):
        panels.append(Panel(title, points=_made(one, lr=0.002, steps=100, **setting)[0][0, :600].numpy()))
    for title, setting in (("teacher, 350 steps", PLAIN[2]), ("path, 300 steps", PATHS[2])):
        x, *_ = _made(one, digits=True, **setting)
        panels.append(Panel(title, image=sheet(x[0, :15].unflatten(-1, (1, 8, 8)))))
    return panels
