"""DMD2: five fake updates against one, a discriminator against none, own inputs against noised data; which ones help?

Eight unevenly weighted Gaussians on a circle. The teacher is their perfect denoiser, or, where a discriminator is to
mend it, a network fitted for too short a time. Generator and fake network start from a fitted network. On 8x8 digits
the teacher is a U-Net, the others are perceptrons on 64 pixels.

A generator step with five fake updates, a discriminator or simulated inputs takes more evaluations than one without.
The claims were registered anew, after results had been seen: all baselines but one now have as many more steps as make
up for it, and that one, with equal steps as in the paper, says so.
"""

from collections.abc import Callable, Sequence

from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DMD2
from lossary.diffusion._denoiser import Counted, Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._noise import noise
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.tasks import (
    Tally,
    digit_distance,
    digit_student,
    digit_teacher,
    distil,
    drawn_digits,
    drawn_from,
    generated,
    ring_denoiser,
    ring_distance,
    sheet,
    stacked_mlp,
    uneven_ring,
)

LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
STEPS = (20.0, 4.0, 1.0, 0.3)

Measure = Callable[..., tuple[list[float], float, int]]
"""measure(seeds, **setting) -> a number for each seed, the evaluations for a sample, and those of training."""


def _fitted(seeds: Seeds) -> Denoiser:
    """For too short a time."""
    return ring_denoiser(seeds, steps=200)


def _distilled(
    seeds: Seeds,
    *,
    lr: float,
    length: int = 150,
    fake_steps: int = 5,
    gan_weight: float = 0.0,
    steps: tuple[float, ...] | None = None,
    simulated: bool = True,
    biased: bool = False,
    digits: bool = False,
) -> tuple[DMD2, Tally]:
    start, draw, size = (digit_student, drawn_digits, 32) if digits else (_fitted, drawn_from(uneven_ring()), 64)
    teacher = digit_teacher(seeds) if digits else _fitted(seeds) if biased else uneven_ring().denoise
    procedure = DMD2(
        start(seeds) if steps else OneStepGenerator(start(seeds)),
        start(seeds),
        teacher,
        head=stacked_mlp((128 if digits else 64, 1), seeds) if gan_weight else None,
        features="network.mlp.3",
        gan_weight=gan_weight,
        levels=LEVELS,
        gan_levels=LEVELS,
        steps=steps,
        simulated=simulated,
        fake_steps=fake_steps,
    )
    tally = Tally(procedure)

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        latent = noise((len(seeds), size, 64 if digits else 2), generators)
        return {"latent": latent, "real": draw(size, generators)[0]}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(length, smoke=2), lr=lr)
    return procedure, tally


def _made(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[Tensor, float, int]:
    """Samples, the evaluations that one takes, and those of training."""
    made, tally = _distilled(seeds, digits=digits, **setting)
    training, random = tally.taken(), seeds.torch("renoise")
    x = generated(lambda latent: made(latent, generator=random), seeds, dimension=64 if digits else 2)
    return x, tally.taken() / x.shape[1], training


def _distance(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[list[float], float, int]:
    x, *costs = _made(seeds, digits=digits, **setting)
    found = digit_distance(x.unflatten(-1, (1, 8, 8))) if digits else ring_distance(x, seeds)
    return found.tolist(), *costs


def _compare(seeds: Seeds, *arms: tuple[Measure, list[dict]]) -> Arms:
    best = []
    for measure, grid in arms:
        best.append(tune(lambda *a, measure=measure, **setting: measure(*a, **setting)[0], grid, seeds, better="lower"))
    values, evaluations, training = zip(*(measure(seeds, **setting) for (measure, _), setting in zip(arms, best)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": best[0], "baseline": best[1]})


RATES = (0.0005, 0.001, 0.002, 0.004)
AHEAD = [{"lr": lr, "fake_steps": 5} for lr in RATES]
WITH_HEAD = [{"lr": lr, "gan_weight": weight, "biased": True} for lr in RATES[1:3] for weight in (0.01, 0.1)]


@claim(
    says="Without a regression, after as many generator steps, five updates of the fake network for each end nearer the"
    " data than one",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 150 generator steps of 64, each of 13 evaluations"
    " against 5; 4 learning rates each",
)
def two_time_scales_help(seeds: Seeds) -> Arms:
    return _compare(seeds, (_distance, AHEAD), (_distance, [{"lr": lr, "fake_steps": 1} for lr in RATES]))


@claim(
    says="With as many evaluations, too, five updates of the fake network per generator step end nearer the data than"
    " one",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 150 generator steps of 64 against 390; 4 learning"
    " rates each",
)
def two_time_scales_help_at_equal_cost(seeds: Seeds) -> Arms:
    longer = [{"lr": lr, "fake_steps": 1, "length": 390} for lr in RATES]
    return _compare(seeds, (_distance, AHEAD), (_distance, longer))


@claim(
    says="With an imperfect teacher and as many evaluations, the discriminator ends nearer the data than scores alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, teacher of 200 steps, MLP of 64, 150 steps of 64 against 277; 4 settings"
    " each",
)
def a_discriminator_helps(seeds: Seeds) -> Arms:
    alone = [{"lr": lr, "biased": True, "length": 277} for lr in RATES]
    return _compare(seeds, (_distance, WITH_HEAD), (_distance, alone))


@claim(
    says="With a U-Net of real digits as the teacher, too, the discriminator ends nearer the data than scores alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; digits 8x8, MLP of 128, 150 steps of 32 against 277, as many evaluations;"
    " 4 settings each",
)
def a_discriminator_helps_on_digits(seeds: Seeds) -> Arms:
    head = [{"lr": lr, "gan_weight": weight, "digits": True} for lr in RATES[1:3] for weight in (0.01, 0.1)]
    alone = [{"lr": lr, "digits": True, "length": 277} for lr in RATES]
    return _compare(seeds, (_distance, head), (_distance, alone))


@claim(
    says="With a discriminator, one evaluation is nearer the data than 35 of an imperfect teacher",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, teacher of 200 steps, Heun with 18, lowest level and rho tuned; MLP of 64,"
    " 150 steps; 4 settings each",
)
def the_student_beats_its_teacher(seeds: Seeds) -> Arms:
    def sampled(seeds: Seeds, *, low: float, rho: float) -> tuple[list[float], float, int]:
        teacher = Counted(_fitted(seeds))
        sigmas = karras_sigmas(seeds.few(18, smoke=2), low=low, high=20.0, rho=rho)
        found = generated(lambda latent: heun(teacher, 20 * latent, sigmas), seeds)
        return ring_distance(found, seeds).tolist(), teacher.evaluations, 0

    solvers = [{"low": low, "rho": rho} for low in (0.002, 0.02) for rho in (3.0, 7.0)]
    return _compare(seeds, (_distance, WITH_HEAD), (sampled, solvers))


@claim(
    says="With as many evaluations in training, four steps end nearer the data when trained on their own inputs than on"
    " noised data",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, 4 evaluations, MLP of 64, 150 steps of 64 against 358; 2"
    " settings each",
)
def backward_simulation_helps(seeds: Seeds) -> Arms:
    own, noised = {"simulated": True, "length": 150}, {"simulated": False, "length": 358}
    grids = ([{"lr": lr, "steps": STEPS, **arm} for lr in RATES[1:3]] for arm in (own, noised))
    return _compare(seeds, *((_distance, grid) for grid in grids))


def draw(seeds: Seeds) -> list[Panel]:
    """What teacher, students without and with a discriminator make, beside the data: an imperfect teacher, digits."""
    one = seeds.one(0)
    sigmas = karras_sigmas(one.few(18, smoke=2), low=0.02, high=20.0)
    panels = [Panel("data", points=drawn_from(uneven_ring())(600, one.torch("true"))[0][0].numpy())]
    teacher = _fitted(one)
    x = generated(lambda latent: heun(teacher, 20 * latent, sigmas), one)
    panels.append(Panel("teacher, 35 evaluations", points=x[0, :600].numpy()))
    arms = {"scores alone": {"length": 277}, "with a discriminator": {"gan_weight": 0.1}}
    for title, setting in arms.items():
        panels.append(Panel(title, points=_made(one, lr=0.002, biased=True, **setting)[0][0, :600].numpy()))
    for title, setting in arms.items():
        x, *_ = _made(one, lr=0.002, digits=True, **setting)
        panels.append(Panel(title, image=sheet(x[0, :15].unflatten(-1, (1, 8, 8)))))
    return panels
