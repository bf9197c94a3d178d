"""SiD: nearer the data than the plain difference of scores, and one evaluation as good as the teacher's thirty-five?

Eight unevenly weighted Gaussians on a circle, whose perfect denoiser is the teacher where nothing else is said.
Generator and fake network start, as in the paper, from a denoiser fitted to the data. On 8x8 digits the teacher is a
U-Net, the others are perceptrons on 64 pixels.

SiD differentiates through both denoisers, the difference of scores through neither; that claim was registered anew,
after a result had been seen, to say so. Of the claim on digits values of two of its seeds were seen before its run.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ScoreIdentityDistillation, distribution_matching_gradient, score_identity_loss
from lossary.diffusion._denoiser import Counted, Denoise
from lossary.diffusion._distil import OneStepGenerator, ScoreDistillation, karras_levels
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._noise import noise
from lossary.diffusion._samplers import heun, karras_sigmas
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

LEVELS = karras_levels(0.02, 20.0)
RATES = (0.0005, 0.002)

Measure = Callable[..., tuple[list[float], float, int]]
"""measure(seeds, **setting) -> a number for each seed, the evaluations for a sample, and those of training."""


class _Evened(ScoreDistillation):
    """The difference of scores, evened over noise levels by the teacher's error, as DMD has it."""

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return distribution_matching_gradient(x, real, fake, dims=sigma.ndim)


def _distilled(
    seeds: Seeds,
    *,
    lr: float,
    alpha: float | None = None,
    evened: bool = False,
    teacher: Denoise | None = None,
    digits: bool = False,
) -> tuple[ScoreDistillation, Tally]:
    """SiD with an alpha, otherwise the plain difference of scores."""
    start, width, size = (digit_student, 64, 32) if digits else (ring_denoiser, 2, 64)
    teacher = teacher or (digit_teacher(seeds) if digits else uneven_ring().denoise)
    parts = OneStepGenerator(start(seeds)), start(seeds), teacher
    if alpha is not None:
        procedure = ScoreIdentityDistillation(*parts, alpha=alpha, levels=LEVELS)
    else:
        procedure = (_Evened if evened else ScoreDistillation)(*parts, levels=LEVELS)
    tally = Tally(procedure)

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        return {"latent": noise((len(seeds), size, width), generators)}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(300 if digits else 500, smoke=2), lr=lr)
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


def _compare(seeds: Seeds, *arms: tuple[Measure, list[dict]]) -> Arms:
    best = []
    for measure, grid in arms:
        best.append(tune(lambda *a, measure=measure, **setting: measure(*a, **setting)[0], grid, seeds, better="lower"))
    values, evaluations, training = zip(*(measure(seeds, **setting) for (measure, _), setting in zip(arms, best)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": best[0], "baseline": best[1]})


SID = [{"alpha": alpha, "lr": lr} for alpha in (1.0, 1.2) for lr in RATES]
PLAIN = [{"evened": evened, "lr": lr} for evened in (False, True) for lr in RATES]


@claim(
    says="SiD ends nearer the data than distillation by the plain difference of scores, after as many steps",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 500 steps of 64, SiD's alone with gradients through"
    " teacher and fake network, 1 evaluation; 4 settings each",
)
def sid_beats_the_difference_of_scores(seeds: Seeds) -> Arms:
    return _compare(seeds, (_distance, SID), (_distance, PLAIN))


@claim(
    says="On real digits, too, SiD ends nearer the data than the plain difference of scores, after as many steps",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="Frechet distance of 32 features; digits 8x8, U-Net as teacher, MLP of 128, 300 steps of 32, SiD's alone with"
    " gradients through teacher and fake network, 1 evaluation; 4 settings each",
)
def sid_beats_the_difference_of_scores_on_digits(seeds: Seeds) -> Arms:
    sid, plain = ([{**setting, "digits": True} for setting in grid] for grid in (SID, PLAIN))
    return _compare(seeds, (_distance, sid), (_distance, plain))


@claim(
    says="One evaluation of the SiD generator is as near the data as 35 of its teacher, a network: at most 1.1 times",
    kind="ratio",
    metric="sample distance",
    margin=1.1,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 64 from a network fitted in 500; Heun, 18 steps,"
    " lowest level and rho tuned; 4 settings each",
)
def one_evaluation_matches_the_teacher(seeds: Seeds) -> Arms:
    def student(seeds: Seeds, **setting: object) -> tuple[list[float], float, int]:
        return _distance(seeds, teacher=ring_denoiser(seeds), **setting)

    def sampled(seeds: Seeds, *, low: float, rho: float) -> tuple[list[float], float, int]:
        teacher = Counted(ring_denoiser(seeds))
        sigmas = karras_sigmas(seeds.few(18, smoke=2), low=low, high=20.0, rho=rho)
        found = generated(lambda latent: heun(teacher, 20 * latent, sigmas), seeds)
        return ring_distance(found, seeds).tolist(), teacher.evaluations, 0

    solvers = [{"low": low, "rho": rho} for low in (0.002, 0.02) for rho in (3.0, 7.0)]
    return _compare(seeds, (student, SID), (sampled, solvers))


@claim(
    says="alpha = 1.2 ends nearer the data than alpha = 0, whose value alone is unbiased: at most 0.8 times as far",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 500 steps of 64; 2 learning rates each",
)
def a_large_alpha_is_needed(seeds: Seeds) -> Arms:
    grids = ([{"alpha": alpha, "lr": lr} for lr in RATES] for alpha in (1.2, 0.0))
    return _compare(seeds, *((_distance, grid) for grid in grids))


def _gaussian_loss(mean: Tensor, scale: Tensor, truth: Mixture, sigma: float, *, alpha: float | None) -> Tensor:
    """Exact mean of SiD's loss for x = mean + scale z in 2-D, by points that share all second moments with normals.

    Without alpha the squared difference of the denoisers, through the fake one's dependence on the generator, too.
    """
    points = 2 * torch.cat([torch.eye(4), -torch.eye(4)]).double()
    x = mean + scale * points[:, :2]
    x_t = x + sigma * points[:, 2:]
    own = (mean, scale) if alpha is None else (mean.detach(), scale.detach())
    fake, real = Mixture(own[0][None], own[1]).denoise(x_t, sigma), truth.denoise(x_t, sigma)
    if alpha is None:
        return (real - fake).square().sum(-1).mean() / 2
    return score_identity_loss(x, real, fake, alpha=alpha).mean()


@claim(
    says="With an exact fake network, alpha = 1/2 has half the exact gradient of the squared difference of denoisers",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="largest difference of gradients by mean and scale of a Gaussian generator in 2-D, one Gaussian as data",
)
def alpha_a_half_is_the_exact_gradient(seeds: Seeds) -> Arms:
    deviations = []
    for g in seeds.torch("problem"):
        numbers = torch.randn(6, generator=g, dtype=torch.float64)
        mean, scale = numbers[:2].requires_grad_(), numbers[2].exp().detach().requires_grad_()
        truth, sigma = Mixture(numbers[None, 3:5].detach(), 0.5), numbers[5].exp().item()
        found, exact = (
            torch.cat([v.flatten() for v in torch.autograd.grad(loss, (mean, scale))])
            for loss in (_gaussian_loss(mean, scale, truth, sigma, alpha=alpha) for alpha in (0.5, None))
        )
        deviations.append((found - exact).abs().max().item())
    return Arms(deviations)


def draw(seeds: Seeds) -> list[Panel]:
    """One-step samples: of the start, of the plain difference of scores, of SiD; beside the data. And digits."""
    one = seeds.one(0)
    panels = [Panel("data", points=drawn_from(uneven_ring())(600, one.torch("true"))[0][0].numpy())]
    panels.append(Panel("start", points=generated(OneStepGenerator(ring_denoiser(one)), one)[0, :600].numpy()))
    arms = {"difference of scores": {"evened": True}, "SiD": {"alpha": 1.2}}
    for title, setting in arms.items():
        panels.append(Panel(title, points=_made(one, lr=0.002, **setting)[0][0, :600].numpy()))
    for title, setting in arms.items():
        x, *_ = _made(one, lr=0.002, digits=True, **setting)
        panels.append(Panel(title, image=sheet(x[0, :15].unflatten(-1, (1, 8, 8)))))
    return panels
