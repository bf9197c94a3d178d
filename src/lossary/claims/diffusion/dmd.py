"""DMD: do scores and pairs together beat either alone, and does one evaluation beat four of the teacher's?

Eight unevenly weighted Gaussians on a circle, whose perfect denoiser is the teacher where nothing else is said. 500
pairs of a seed are made once, with 35 evaluations each. Generator and fake network start, as in the paper, from a
denoiser fitted to the data.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import DistributionMatchingDistillation, distribution_matching_gradient, ode_pairs
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels, pushed
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import dpm_solver_pp, karras_sigmas
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RATES = (0.0005, 0.001, 0.002, 0.004)


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


class _RegressionAlone(DistributionMatchingDistillation):
    """Without scores."""

    def turns(self, step: int) -> Sequence[str]:
        return ("generator",)

    def push(self, x: Tensor, x_t: Tensor, sigma: Tensor, real: Tensor, fake: Tensor, *condition: Tensor) -> Tensor:
        return torch.zeros_like(x)


def _distilled(
    seeds: Seeds, *, lr: float, weight: float = 0.25, scores: bool = True, teacher: object = TRUTH.denoise
) -> OneStepGenerator:
    kind = DistributionMatchingDistillation if scores else _RegressionAlone
    start = _fitted(seeds)
    procedure = kind(
        OneStepGenerator(copy.deepcopy(start)), copy.deepcopy(start), teacher, regression_weight=weight, levels=LEVELS
    )
    latent = _normal(seeds.few(500), seeds.torch("pairs"))
    target = ode_pairs(teacher, latent, karras_sigmas(seeds.few(18, smoke=2), low=0.02, high=20.0))
    steps, generators = seeds.few(400, smoke=2), seeds.torch("distil")
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for n, p in procedure.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    which = torch.arange(len(seeds))[:, None]
    for step in range(steps):
        rows = torch.stack([torch.randint(latent.shape[1], (64,), generator=g) for g in generators])
        batch = {"latent": _normal(64, generators)}
        batch |= {"pair_latent": latent[which, rows], "pair_target": target[which, rows]}
        advance(procedure, batch, optimizers, step=step, generator=generators)
        for optimizer, schedule in zip(optimizers.values(), schedules):
            if optimizer.state:
                schedule.step()
    return procedure.generator


def _samples(generator: Callable[[Tensor], Tensor], seeds: Seeds) -> Tensor:
    with torch.no_grad():
        return generator(_normal(seeds.few(2000, smoke=16), seeds.torch("latent")))


def _from_truth(found: Tensor, seeds: Seeds) -> list[float]:
    return sliced_wasserstein(found, *_draw(found.shape[1], seeds.torch("true"))).tolist()


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    return _from_truth(_samples(_distilled(seeds, **setting), seeds), seeds)


def _mode_error(seeds: Seeds, **setting: object) -> list[float]:
    """Total variation between the shares of samples nearest to each mode and the true weights, in percent."""
    found = _samples(_distilled(seeds, **setting), seeds)
    nearest = torch.cdist(found, TRUTH.means.float().expand(len(seeds), -1, -1)).argmin(-1)
    share = torch.nn.functional.one_hot(nearest, 8).double().mean(1)
    return (50 * (share - TRUTH.weights).abs().sum(-1)).tolist()


BOTH = [{"lr": lr, "weight": weight} for lr in RATES[1:3] for weight in (0.25, 1.0)]
SCORES = [{"lr": lr, "weight": 0.0} for lr in RATES]
PAIRS = [{"lr": lr, "scores": False} for lr in RATES]


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds) -> Arms:
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (method, baseline))
    return Arms(score(seeds, **ours), score(seeds, **theirs), {"method": ours, "baseline": theirs})


@claim(
    says="Scores and pairs together end nearer the data than regression on the same pairs alone",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, exact teacher, 500 pairs, MLP of 64, 400 steps of 64; 4 settings each",
)
def dmd_beats_regression(seeds: Seeds) -> Arms:
    return _compare(_distance, BOTH, PAIRS, seeds)


@claim(
    says="With the regression the generator loses fewer modes than by scores alone",
    kind="superiority",
    metric="mode error",
    scale="8 uneven Gaussians in 2-D, exact teacher, 500 pairs, MLP of 64, 400 steps of 64; 4 settings each",
)
def regression_keeps_modes(seeds: Seeds) -> Arms:
    return _compare(_mode_error, BOTH, SCORES, seeds)


@claim(
    says="One evaluation ends nearer the data than four of the teacher, a network, by DPM-Solver++",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, MLP of 64, 500 pairs, 400 steps of 64; levels of 4 steps: 4 settings each",
)
def one_evaluation_beats_four(seeds: Seeds) -> Arms:
    def ours(seeds: Seeds, **setting: object) -> list[float]:
        return _distance(seeds, teacher=_fitted(seeds), **setting)

    def theirs(seeds: Seeds, *, low: float, rho: float) -> list[float]:
        sigmas = karras_sigmas(4, low=low, high=20.0, rho=rho)
        return _from_truth(_samples(lambda latent: dpm_solver_pp(_fitted(seeds), 20 * latent, sigmas), seeds), seeds)

    solvers = [{"low": low, "rho": rho} for low in (0.1, 0.3) for rho in (3.0, 7.0)]
    grids = ((ours, BOTH), (theirs, solvers))
    best = [tune(score, grid, seeds, better="lower") for score, grid in grids]
    return Arms(ours(seeds, **best[0]), theirs(seeds, **best[1]), {"method": best[0], "baseline": best[1]})


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
    """One-step samples by regression, by scores, by both; beside the data."""
    one = seeds.one(0)
    panels = [Panel("data", points=_draw(600, one.torch("true"))[0][0].numpy())]
    for title, setting in (("pairs alone", PAIRS[2]), ("scores alone", SCORES[2]), ("both: DMD", BOTH[2])):
        panels.append(Panel(title, points=_samples(_distilled(one, **setting), one)[0, :600].numpy()))
    return panels
