"""SiD: nearer the data than the plain difference of scores, and one evaluation as good as the teacher's thirty-five?

Eight unevenly weighted Gaussians on a circle, whose perfect denoiser is the teacher where nothing else is said.
Generator and fake network start, as in the paper, from a denoiser fitted to the data.
"""

import copy
import functools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ScoreIdentityDistillation, distribution_matching_gradient, score_identity_loss
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, ScoreDistillation, karras_levels
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
LEVELS = karras_levels(0.02, 20.0)
RATES = (0.0005, 0.002)


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor]:
    return (torch.stack([TRUTH.sample(n, generator=g)[0] for g in generators]).float(),)


def _normal(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(n, 2, generator=g) for g in generators])


@functools.cache
def _fitted(seeds: Seeds) -> Denoiser:
    """Trained once; whoever trains on takes a copy."""
    denoise = stacked_denoiser(2, seeds)
    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(500, smoke=2))
    return denoise


class _Evened(ScoreDistillation):
    """The difference of scores, evened over noise levels by the teacher's error, as DMD has it."""

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return distribution_matching_gradient(x, real, fake, dims=sigma.ndim)


def _distilled(
    seeds: Seeds, *, lr: float, alpha: float | None = None, evened: bool = False, teacher: object = TRUTH.denoise
) -> OneStepGenerator:
    """SiD with an alpha, otherwise the plain difference of scores."""
    start = _fitted(seeds)
    parts = OneStepGenerator(copy.deepcopy(start)), copy.deepcopy(start), teacher
    if alpha is not None:
        procedure = ScoreIdentityDistillation(*parts, alpha=alpha, levels=LEVELS)
    else:
        procedure = (_Evened if evened else ScoreDistillation)(*parts, levels=LEVELS)
    steps, generators = seeds.few(500, smoke=2), seeds.torch("distil")
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for n, p in procedure.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    for step in range(steps):
        batch = {"latent": _normal(64, generators)}
        advance(procedure, batch, optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()
    return procedure.generator


def _samples(generator: Callable[[Tensor], Tensor], seeds: Seeds) -> Tensor:
    with torch.no_grad():
        return generator(_normal(seeds.few(2000, smoke=16), seeds.torch("latent")))


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    return _from_truth(_samples(_distilled(seeds, **setting), seeds), seeds)


def _from_truth(found: Tensor, seeds: Seeds) -> list[float]:
    return sliced_wasserstein(found, *_draw(found.shape[1], seeds.torch("true"))).tolist()


SID = [{"alpha": alpha, "lr": lr} for alpha in (1.0, 1.2) for lr in RATES]
PLAIN = [{"evened": evened, "lr": lr} for evened in (False, True) for lr in RATES]


@claim(
    says="SiD ends nearer the data than distillation by the plain difference of scores, after as many steps",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 500 steps of 64, 1 evaluation; 4 settings each",
)
def sid_beats_the_difference_of_scores(seeds: Seeds) -> Arms:
    ours, theirs = (tune(_distance, grid, seeds, better="lower") for grid in (SID, PLAIN))
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="One evaluation of the SiD generator is as near the data as 35 of its teacher, a network: at most 1.1 times",
    kind="ratio",
    metric="sample distance",
    margin=1.1,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 steps of 64 from a network fitted in 500; Heun, 18 steps,"
    " lowest level and rho tuned; 4 settings each",
)
def one_evaluation_matches_the_teacher(seeds: Seeds) -> Arms:
    def score(seeds: Seeds, **setting: object) -> list[float]:
        return _distance(seeds, teacher=_fitted(seeds), **setting)

    def sampled(seeds: Seeds, *, low: float, rho: float) -> list[float]:
        sigmas = karras_sigmas(seeds.few(18, smoke=2), low=low, high=20.0, rho=rho)
        return _from_truth(_samples(lambda latent: heun(_fitted(seeds), 20 * latent, sigmas), seeds), seeds)

    solvers = [{"low": low, "rho": rho} for low in (0.002, 0.02) for rho in (3.0, 7.0)]
    ours, theirs = tune(score, SID, seeds, better="lower"), tune(sampled, solvers, seeds, better="lower")
    return Arms(score(seeds, **ours), sampled(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="alpha = 1.2 ends nearer the data than alpha = 0, whose value alone is unbiased: at most 0.8 times as far",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, MLP of 64, 500 steps of 64; 2 learning rates each",
)
def a_large_alpha_is_needed(seeds: Seeds) -> Arms:
    arms, details = [], {}
    for alpha in (1.2, 0.0):
        score = partial(_distance, alpha=alpha)
        best = tune(score, [{"lr": lr} for lr in RATES], seeds, better="lower")
        details[f"alpha {alpha:g}"] = best
        arms.append(score(seeds, **best))
    return Arms(*arms, details)


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
    """One-step samples: of the start, of the plain difference of scores, of SiD; beside the data."""
    one = seeds.one(0)
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    panels.append(Panel("start", points=_samples(OneStepGenerator(_fitted(one)), one)[0, :600].numpy()))
    for title, setting in (("difference of scores", {"evened": True}), ("SiD", {"alpha": 1.2})):
        panels.append(Panel(title, points=_samples(_distilled(one, lr=0.002, **setting), one)[0, :600].numpy()))
    return panels
