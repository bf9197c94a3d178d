"""Adaptive guidance: how near to full classifier-free guidance, for how many evaluations?

Four classes of four Gaussians each, at random places in eight dimensions, which overlap: denoisers with and without the
class are exact. Then the network of real digits that the room shares. Full guidance takes 20 steps of DPM-Solver++ and
40 evaluations. The threshold is the paper's. The claim on the regression is registered anew: in its first run, by plain
least squares, weights of opposite sign multiplied each other's errors, and it ended some hundred thousand times as far
away as the baseline.
"""

import math
import statistics
from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim
from lossary.claims.draw import Panel
from lossary.diffusion import AdaptiveGuidance, LinearAG
from lossary.diffusion._denoiser import Counted, Denoiser
from lossary.diffusion._guidance import Guidance, Guided, classifier_free
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import dpm_solver_pp, karras_sigmas
from lossary.tasks import digit_denoiser, sheet, sliced_wasserstein

CLASSES, MODES, DIMENSION, SCALE, STEPS = 4, 4, 8, 3.0, 20
REPLACED = (1, 3, 5, 7, 9)  # of the first half


class _Case:
    """One seed's mixture and starts."""

    def __init__(self, where: Generator, start: Generator, n: int) -> None:
        self.means = 0.8 * torch.randn(CLASSES * MODES, DIMENSION, generator=where, dtype=torch.float64)
        self.everything, self.first = Mixture(self.means, 0.4), Mixture(self.means[:MODES], 0.4)
        self.cond, self.uncond = self.first.denoise, self.everything.denoise
        self.x = 80 * torch.randn(n, DIMENSION, generator=start, dtype=torch.float64)

    def samples(self, guidance: Guidance, *, steps: int = STEPS, rows: slice = slice(None)) -> tuple[Tensor, int]:
        """Where they end, and the evaluations it took."""
        counted = Counted(self.uncond)
        denoise = Guided(guidance, self.cond, counted)
        return dpm_solver_pp(denoise, self.x[rows], karras_sigmas(steps)), steps + counted.evaluations


class _Digits(_Case):
    """One seed's starts for the network of digits, the classes in turn."""

    def __init__(self, start: Generator, n: int, network: Denoiser) -> None:
        label = torch.arange(n) % 10
        self.cond, self.uncond = lambda x, sigma: network(x, sigma, label), network
        self.x = 80 * torch.randn(n, 1, 16, 16, generator=start)


class _Watched:
    """A guidance that keeps what it was given and made."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance, self.calls = guidance, []
        if hasattr(guidance, "needs"):
            self.needs = guidance.needs

    def __call__(self, cond: Tensor, uncond: Tensor | None, state: object) -> tuple[Tensor, object]:
        guided, after = self.guidance(cond, uncond, state)
        self.calls.append((cond, uncond, state))
        return guided, after


def _cases(seeds: Seeds, n: int) -> list[_Case]:
    return [_Case(a, b, n) for a, b in zip(seeds.torch("places"), seeds.torch("start"))]


def _digits(seeds: Seeds) -> list[_Digits]:
    network = digit_denoiser(size=16, steps=seeds.few(1000, smoke=2))
    return [_Digits(g, seeds.few(50), network) for g in seeds.torch("start")]


def _adaptive(case: _Case) -> tuple[Tensor, float]:
    """Samples, and the mean over them of the evaluations that each needs by itself."""
    watched = _Watched(AdaptiveGuidance(SCALE))
    x, _ = case.samples(watched)
    spared = sum(state.double().mean().item() for _, _, state in watched.calls if state is not None)
    return x, 2 * STEPS - spared


def _gap(x: Tensor, target: Tensor) -> float:
    return ((x - target).flatten(1).norm(dim=-1).mean() / target.flatten(1).norm(dim=-1).mean()).item()


def _at_equal_cost(cases: Sequence[_Case]) -> Arms:
    """Distances to full guidance: of adaptive guidance, and of full guidance in as many steps as that cost allows."""
    ours, theirs, evaluations = [], [], []
    for case in cases:
        full, _ = case.samples(classifier_free(SCALE))
        found, cost = _adaptive(case)
        fewer, taken = case.samples(classifier_free(SCALE), steps=math.ceil(cost / 2))
        ours.append(_gap(found, full))
        theirs.append(_gap(fewer, full))
        evaluations.append((cost, taken))
    return Arms(ours, theirs, {"evaluations": [statistics.mean(arm) for arm in zip(*evaluations)]})


@claim(
    says="Adaptive guidance takes at most three quarters of the evaluations of classifier-free guidance",
    kind="ratio",
    metric="network evaluations",
    margin=0.75,
    scale="mean over samples; exact denoisers of 4 classes of 4 Gaussians in 8-D, 20 steps, scale 3, threshold 0.991",
)
def adaptive_saves_a_quarter(seeds: Seeds) -> Arms:
    return Arms([_adaptive(case)[1] for case in _cases(seeds, seeds.few(500))], [2.0 * STEPS] * len(seeds))


@claim(
    says="With as many evaluations it ends nearer to full guidance than classifier-free guidance in fewer steps",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="distance to the result of 20 guided steps; exact denoisers in 8-D, fewer steps rounded up",
)
def adaptive_beats_fewer_steps(seeds: Seeds) -> Arms:
    return _at_equal_cost(_cases(seeds, seeds.few(500)))


@claim(
    says="On a network of real digits, too, it takes at most three quarters of the evaluations",
    kind="ratio",
    metric="network evaluations",
    margin=0.75,
    scale="mean over 50 samples; one U-Net, digits 16x16, 20 steps, scale 3, threshold 0.991",
)
def adaptive_saves_on_digits(seeds: Seeds) -> Arms:
    return Arms([_adaptive(case)[1] for case in _digits(seeds)], [2.0 * STEPS] * len(seeds))


@claim(
    says="There, too, it ends nearer to full guidance than classifier-free guidance in fewer steps",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="distance to the result of 20 guided steps; one U-Net, digits 16x16, 50 samples, fewer steps rounded up",
)
def adaptive_beats_fewer_steps_on_digits(seeds: Seeds) -> Arms:
    return _at_equal_cost(_digits(seeds))


@claim(
    says="Its samples are no farther from the class than those of full guidance, by more than a twentieth",
    kind="ratio",
    metric="sample distance",
    margin=1.05,
    scale="sliced W1 to the class; exact denoisers of 4 classes of 4 Gaussians in 8-D, 20 steps, 1000 samples",
)
def adaptive_keeps_the_quality(seeds: Seeds) -> Arms:
    errors, costs, n = [], [], seeds.few(1000)
    for case, g in zip(_cases(seeds, n), seeds.torch("true")):
        truth, _ = case.first.sample(n, generator=g)
        found, cost = zip(_adaptive(case), case.samples(classifier_free(SCALE)))
        errors.append([sliced_wasserstein(x, truth).item() for x in found])
        costs.append(cost)
    return Arms(*zip(*errors), {"evaluations": [statistics.mean(arm) for arm in zip(*costs)]})


def _linear(case: _Case) -> LinearAG:
    """Fitted on the first twenty starts, which no result is taken of."""
    watched = _Watched(classifier_free(SCALE))
    case.samples(watched, rows=slice(20))
    cond, uncond = (torch.stack(part) for part in list(zip(*watched.calls))[:2])
    return LinearAG.fitted(cond, uncond, scale=SCALE, replaced=REPLACED)


class _Repeating:
    """Classifier-free, with the last unconditional prediction again at the same steps."""

    def needs(self, state: tuple | None) -> bool:
        return state is None or state[0] not in REPLACED

    def __call__(self, cond: Tensor, uncond: Tensor | None, state: tuple | None) -> tuple[Tensor, tuple]:
        step, last = state or (0, None)
        last = last if uncond is None else uncond
        return classifier_free(SCALE)(cond, last, None)[0], (step + 1, last)


@claim(
    says="Regression estimates early unconditional predictions: the end is nearer than with the last one repeated",
    kind="ratio",
    metric="relative error",
    margin=0.5,
    scale="distance to full guidance, 5 of 20 steps estimated, fitted on 20 runs; exact denoisers in 8-D; singular"
    " values cut at 1e-3; plain least squares diverges",
)
def regression_beats_repetition(seeds: Seeds) -> Arms:
    ours, theirs = [], []
    rest = slice(20, None)
    for case in _cases(seeds, 20 + seeds.few(500)):
        full, _ = case.samples(classifier_free(SCALE), rows=rest)
        for errors, guidance in ((ours, _linear(case)), (theirs, _Repeating())):
            errors.append(_gap(case.samples(guidance, rows=rest)[0], full))
    return Arms(ours, theirs, {"evaluations": 2 * [2 * STEPS - len(REPLACED)]})


def _recognised(case: _Case, x: Tensor) -> float:
    """Percent of samples whose likeliest class is the first."""
    share = case.everything.responsibilities(x).unflatten(-1, (CLASSES, MODES)).sum(-1)
    return 100 * (share.argmax(-1) == 0).double().mean().item()


@claim(
    says="Planted: samples under guidance are recognised as their class more often than samples without a condition",
    kind="superiority",
    metric="accuracy",
    scale="500 samples; exact denoisers of 4 classes of 4 Gaussians in 8-D, 20 steps of DPM-Solver++, scale 3",
    control="planted",
)
def guidance_beats_none(seeds: Seeds) -> Arms:
    guided, free = [], []
    for case in _cases(seeds, seeds.few(500)):
        guided.append(_recognised(case, case.samples(classifier_free(SCALE))[0]))
        free.append(_recognised(case, dpm_solver_pp(case.everything.denoise, case.x, karras_sigmas(STEPS))))
    return Arms(guided, free, {"evaluations": [2 * STEPS, STEPS]})


@claim(
    says="Control: samples of the same sampler from other noise are the same, so these cannot be recognised more often",
    kind="superiority",
    metric="accuracy",
    scale="500 samples from other noise; exact denoisers of 4 classes of 4 Gaussians in 8-D, 20 steps of DPM-Solver++",
    control="A/A",
)
def sampling_beats_itself(seeds: Seeds) -> Arms:
    both: list[list[float]] = [[], []]
    for case in _cases(seeds, 2 * seeds.few(500)):
        x = dpm_solver_pp(case.first.denoise, case.x, karras_sigmas(STEPS))
        for found, half in zip(both, x.chunk(2)):
            found.append(_recognised(case, half))
    return Arms(*both, {"evaluations": [STEPS, STEPS]})


def draw(seeds: Seeds) -> list[Panel]:
    """First two coordinates of the same starts under full guidance, with fewer evaluations, and without guidance."""
    (case,) = _cases(seeds.one(0), 420)
    panels = []
    guidances = {
        "full": classifier_free(SCALE),
        "adaptive": AdaptiveGuidance(SCALE),
        "linear": _linear(case),
    }
    for title, guidance in guidances.items():
        x, evaluations = case.samples(guidance, rows=slice(20, None))
        panels.append(Panel(f"{title}, {evaluations} evaluations", points=x[:, :2].numpy()))
    plain = dpm_solver_pp(case.first.denoise, case.x[20:], karras_sigmas(STEPS))
    panels.append(Panel(f"conditional, {STEPS} evaluations", points=plain[:, :2].numpy()))
    (digits,) = _digits(seeds.one(0))
    for title in ("full", "adaptive"):
        x, evaluations = digits.samples(guidances[title])
        panels.append(Panel(f"{title}, {evaluations} evaluations", image=sheet(x[:20])))
    return panels
