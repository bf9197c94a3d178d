"""DMD: do scores and pairs together beat either alone, and does one evaluation beat four of the teacher's?

Eight unevenly weighted Gaussians on a circle, whose perfect denoiser is the teacher where nothing else is said. 500
pairs of a seed are made once, with 35 evaluations each. Generator and fake network start, as in the paper, from a
denoiser fitted to the data. On 8x8 digits the teacher is a U-Net, the others are perceptrons on 64 pixels.

Arms take equally many steps, as in the paper, though not equally many evaluations: the two claims that this concerns
were registered anew, after a result had been seen, to say so. The claim on digits was made shorter, for time alone,
after values of two of its seeds had been seen.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DistributionMatchingDistillation, distribution_matching_gradient, ode_pairs
from lossary.diffusion._denoiser import Counted, Denoise
from lossary.diffusion._distil import OneStepGenerator, karras_levels, pushed
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._noise import noise
from lossary.diffusion._samplers import dpm_solver_pp, karras_sigmas
from lossary.tasks import (
    Tally,
    digit_distance,
    digit_student,
    digit_teacher,
    distil,
    drawn_from,
    generated,
    ring_denoiser,
    ring_distance,
    sheet,
    uneven_ring,
)

LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RATES = (0.0005, 0.001, 0.002, 0.004)

Measure = Callable[..., tuple[list[float], float, int]]
"""measure(seeds, **setting) -> a number for each seed, the evaluations for a sample, and those of training."""


class _RegressionAlone(DistributionMatchingDistillation):
    """Without scores."""

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def generator_loss(
        self, x: Tensor, x_t: Tensor, sigma: Tensor, batch: Mapping[str, Tensor], generator: object
    ) -> Tensor:
        found = self.generator(batch["pair_latent"])
        return self.regression_weight * (found - batch["pair_target"]).square().mean(-1)


def _distilled(
    seeds: Seeds,
    *,
    lr: float,
    weight: float = 0.25,
    scores: bool = True,
    teacher: Denoise | None = None,
    digits: bool = False,
) -> tuple[DistributionMatchingDistillation, Tally]:
    kind = DistributionMatchingDistillation if scores else _RegressionAlone
    start, width, size = (digit_student, 64, 32) if digits else (ring_denoiser, 2, 64)
    teacher = teacher or (digit_teacher(seeds) if digits else uneven_ring().denoise)
    generator = OneStepGenerator(start(seeds))
    procedure = kind(generator, start(seeds), teacher, regression_weight=weight, levels=LEVELS)
    tally = Tally(procedure)
    latent = noise((len(seeds), seeds.few(200 if digits else 500), width), seeds.torch("pairs"))
    sigmas = karras_sigmas(seeds.few(10 if digits else 18, smoke=2), low=0.02, high=20.0)
    target = ode_pairs(procedure.teacher, latent, sigmas) if weight else latent  # without weight they are not looked at
    which = torch.arange(len(seeds))[:, None]

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        rows = torch.stack([torch.randint(latent.shape[1], (size,), generator=g) for g in generators])
        pairs = {"pair_latent": latent[which, rows], "pair_target": target[which, rows]}
        return {"latent": noise((len(seeds), size, width), generators), **pairs}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(300 if digits else 400, smoke=2), lr=lr)
    return procedure, tally


def _made(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[Tensor, float, int]:
    """Samples, the evaluations that one takes, and those of training."""
    procedure, tally = _distilled(seeds, digits=digits, **setting)
    training, x = tally.taken(), generated(procedure, seeds, dimension=64 if digits else 2)
    return x, tally.taken() / x.shape[1], training


def _distance(seeds: Seeds, *, digits: bool = False, **setting: object) -> tuple[list[float], float, int]:
    x, *costs = _made(seeds, digits=digits, **setting)
    found = digit_distance(x.unflatten(-1, (1, 8, 8))) if digits else ring_distance(x, seeds)
    return found.tolist(), *costs


def _mode_error(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
    """Total variation between the shares of samples nearest to each mode and the true weights, in percent."""
    (found, *costs), truth = _made(seeds, **setting), uneven_ring()
    nearest = torch.cdist(found, truth.means.float().expand(len(seeds), -1, -1)).argmin(-1)
    share = torch.nn.functional.one_hot(nearest, 8).double().mean(1)
    return (50 * (share - truth.weights).abs().sum(-1)).tolist(), *costs


BOTH = [{"lr": lr, "weight": weight} for lr in RATES[1:3] for weight in (0.25, 1.0)]
SCORES = [{"lr": lr, "weight": 0.0} for lr in RATES]
PAIRS = [{"lr": lr, "scores": False} for lr in RATES]


def _compare(seeds: Seeds, *arms: tuple[Measure, list[dict]]) -> Arms:
    best = []
    for measure, grid in arms:
        best.append(tune(lambda *a, measure=measure, **setting: measure(*a, **setting)[0], grid, seeds, better="lower"))
    values, evaluations, training = zip(*(measure(seeds, **setting) for (measure, _), setting in zip(arms, best)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": best[0], "baseline": best[1]})


@claim(
    says="Scores and pairs together end nearer the data than regression on the same pairs alone, after as many steps",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, 500 pairs, MLP of 64, 400 steps of 64, each of 6 evaluations"
    " against 2; 4 settings each",
)
def dmd_beats_regression(seeds: Seeds) -> Arms:
    return _compare(seeds, (_distance, BOTH), (_distance, PAIRS))


@claim(
    says="After as many steps on real digits, too, scores and pairs together end nearer the data than the pairs alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; digits 8x8, U-Net as teacher, 200 pairs of 19 evaluations, MLP of 128, 300"
    " steps of 32, each of 6 evaluations against 2; 4 settings each",
)
def dmd_beats_regression_on_digits(seeds: Seeds) -> Arms:
    both, pairs = ([{**setting, "digits": True} for setting in grid] for grid in (BOTH, PAIRS))
    return _compare(seeds, (_distance, both), (_distance, pairs))


@claim(
    says="With the regression the generator loses fewer modes than by scores alone, after as many steps",
    kind="superiority",
    metric="mode error",
    scale="8 uneven Gaussians in 2-D, exact teacher, 500 pairs, MLP of 64, 400 steps of 64, with pairs 1.34 times the"
    " evaluations; 4 settings each",
)
def regression_keeps_modes(seeds: Seeds) -> Arms:
    return _compare(seeds, (_mode_error, BOTH), (_mode_error, SCORES))


@claim(
    says="One evaluation ends nearer the data than four of the teacher, a network, by DPM-Solver++",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 pairs, 400 steps of 64; levels of 4 steps: 4 settings each",
)
def one_evaluation_beats_four(seeds: Seeds) -> Arms:
    def ours(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
        return _distance(seeds, teacher=ring_denoiser(seeds), **setting)

    def theirs(seeds: Seeds, *, low: float, rho: float) -> tuple[list[float], float, int]:
        teacher, sigmas = Counted(ring_denoiser(seeds)), karras_sigmas(4, low=low, high=20.0, rho=rho)
        found = generated(lambda latent: dpm_solver_pp(teacher, 20 * latent, sigmas), seeds)
        return ring_distance(found, seeds).tolist(), teacher.evaluations, 0

    solvers = [{"low": low, "rho": rho} for low in (0.1, 0.3) for rho in (3.0, 7.0)]
    return _compare(seeds, (ours, BOTH), (theirs, solvers))


@claim(
    says="With exact scores DMD's push, its weight taken out, is the gradient of the noised KL divergence",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="largest difference of gradients by mean and scale of a Gaussian generator in 2-D, one Gaussian as data",
)
def scores_descend_the_divergence(seeds: Seeds) -> Arms:
    deviations = []
    points = 2 * torch.cat([torch.eye(4), -torch.eye(4)]).double()  # they share all second moments with normals
    for g in seeds.torch("problem"):
        numbers = torch.randn(6, generator=g, dtype=torch.float64)
        mean, scale = numbers[:2].requires_grad_(), numbers[2].exp().detach().requires_grad_()
        truth, sigma = Mixture(numbers[None, 3:5].detach(), 0.5), numbers[5].exp().item()
        x = mean + scale * points[:, :2]
        x_t = (x + sigma * points[:, 2:]).detach()
        fake = Mixture(mean[None].detach(), scale.detach()).denoise(x_t, sigma)
        d, real = x.detach(), truth.denoise(x_t, sigma)
        weight = (d - real).abs().mean(-1, keepdim=True) / sigma**2
        push = distribution_matching_gradient(d, real, fake) * weight
        wide, true = scale**2 + sigma**2, 0.25 + sigma**2
        gap = (mean - truth.means[0]).square().sum()
        divergence = (wide / true).log().neg() + wide / true - 1 + gap / (2 * true)
        found, exact = (
            torch.cat([v.flatten() for v in torch.autograd.grad(value, (mean, scale))])
            for value in (pushed(x, push).sum(-1).mean(), divergence)
        )
        deviations.append((found - exact).abs().max().item())
    return Arms(deviations)


def draw(seeds: Seeds) -> list[Panel]:
    """One-step samples by regression, by scores, by both, beside the data; and digits, by regression and by both."""
    one = seeds.one(0)
    panels = [Panel("data", points=drawn_from(uneven_ring())(600, one.torch("true"))[0][0].numpy())]
    for title, setting in (("pairs alone", PAIRS[2]), ("scores alone", SCORES[2]), ("both: DMD", BOTH[2])):
        panels.append(Panel(title, points=_made(one, **setting)[0][0, :600].numpy()))
    for title, setting in (("pairs alone", PAIRS[2]), ("both: DMD", BOTH[2])):
        x, *_ = _made(one, digits=True, **setting)
        panels.append(Panel(title, image=sheet(x[0, :15].unflatten(-1, (1, 8, 8)))))
    return panels
