"""Active diffusion subsampling: four pixels of 64, chosen while sampling, by variance beforehand, or at random.

Pictures are drawn from Gaussians of standard deviation 0.15 around 30 real digits of 8x8, another 30 for each seed, so
that the denoiser is exact; 8 pictures for each seed, 8 particles each, 60 steps of the paper's cosine schedule. Fixed
patterns are measured before the first step. The first three claims are registered anew after their first results
were seen, with stronger pulls: the strongest of the first grid, 2, had been chosen throughout.

Then real digits that the room's shared network was not trained on, eight pixels of each. Their fixed pattern is a good
one: pixel by pixel, the one after which a linear regression leaves the least variance of the whole digit. The pulls
lie around the best of this pattern on two tuning seeds.
"""

import math
from collections.abc import Callable
from statistics import mean

import torch
from torch import Generator, Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ActiveDiffusionSampler, max_entropy_acquisition
from lossary.diffusion._denoiser import Counted, Denoise
from lossary.diffusion._mixture import Mixture
from lossary.tasks import digit_denoiser, digit_images

BUDGET, PARTICLES, STEPS = 4, 8, 60
HELD_OUT = 0.2  # of the digits, from the network
WEIGHTS = (2.0, 4.0, 8.0, 16.0)  # of the pull


def _levels(steps: int) -> Tensor:
    """sigma / alpha at evenly spaced angles, alpha from 0.02 to 0.95, then 0."""
    angle = torch.linspace(math.acos(0.02), math.acos(0.95), steps)
    return torch.cat([angle.tan(), torch.zeros(1)])


class _Case:
    """One seed's pictures (n, 64), from Gaussians around digits of its own, and its starts."""

    budget, weights = BUDGET, WEIGHTS
    denoise: Denoise

    def __init__(self, seeds: Seeds, which: Generator, target: Generator, start: Generator) -> None:
        images, _ = digit_images()
        rows = torch.randperm(len(images), generator=which)[:30]
        self.truth = Mixture(images[rows].flatten(1), 0.15)
        self.target, self.mode = self.truth.sample(seeds.few(8, smoke=2), generator=target)
        self.denoise, self.start, self.which = self.truth.denoise, start, which

    def fixed(self) -> Tensor:
        """The pixels of the largest variance."""
        return self.truth.means.var(0).topk(self.budget).indices

    def places(self, policy: str) -> Tensor | None:
        """(n, budget) chosen beforehand."""
        if policy == "active":
            return None
        if policy == "fixed":
            return self.fixed().expand(len(self.target), -1)
        return torch.stack([torch.randperm(64, generator=self.which)[: self.budget] for _ in self.target])

    def run(self, seeds: Seeds, *, policy: str, weight: float):
        """What the sampler leaves, and the evaluations that it took."""
        initial, counted = self.places(policy), Counted(self.denoise)
        budget = 0 if policy != "active" else self.budget
        sampler = ActiveDiffusionSampler(lambda x: x.unsqueeze(-1), budget=budget, weight=weight, data_dims=1)
        sigmas = _levels(seeds.few(STEPS, smoke=self.budget + 2))
        noise = torch.randn(len(self.target), PARTICLES, 64, generator=self.start)
        found = sampler(
            counted,
            sigmas[0].item() * noise,
            sigmas,
            lambda place: self.target.gather(1, place[:, None]),
            initial=initial,
        )
        return found, counted.evaluations


class _Digits(_Case):
    """One seed's real digits, none of which the network has seen."""

    budget, weights = 8, (0.5, 1.0, 2.0, 4.0)

    def __init__(self, seeds: Seeds, which: Generator, target: Generator, start: Generator) -> None:
        network = digit_denoiser(steps=seeds.few(1000, smoke=2), held_out=HELD_OUT)
        images = digit_images()[0].flatten(1)
        kept = round(len(images) * (1 - HELD_OUT))
        self.known, new = images[:kept], images[kept:]
        self.target = new[torch.randperm(len(new), generator=target)[: seeds.few(16, smoke=2)]]
        self.denoise = lambda x, sigma: network(x.reshape(-1, 1, 8, 8), sigma).view_as(x)
        self.start, self.which = start, which

    def fixed(self) -> Tensor:
        """One after another, those whose squared covariances with all pixels, over their variance, sum to the most."""
        left, places = self.known.T.double().cov(), []
        for _ in range(self.budget):
            explained = left.square().sum(0) / left.diagonal().clamp(min=1e-9)
            place = explained.argmax()
            left = left - left[place].outer(left[place]) / left[place, place]
            places.append(place)
        return torch.stack(places)


def _cases(seeds: Seeds, kind: type[_Case] = _Case) -> list[_Case]:
    streams = zip(seeds.torch("digits"), seeds.torch("pictures"), seeds.torch("start"))
    return [kind(seeds, *generators) for generators in streams]


def _error(case: _Case, particles: Tensor) -> float:
    """Mean absolute error of the particles' mean."""
    return (particles.mean(1) - case.target).abs().mean().item()


def _recognised(case: _Case, particles: Tensor) -> float:
    """Share of particles whose digit is the picture's, points."""
    right = case.truth.responsibilities(particles).argmax(-1) == case.mode[:, None]
    return 100 * right.double().mean().item()


def _compare(
    seeds: Seeds, other: str, score: Callable[[_Case, Tensor], float] = _error, kind: type[_Case] = _Case
) -> Arms:
    """The weight of the pull is tuned for the error, whatever is reported."""

    def runs(seeds: Seeds, policy: str, weight: float) -> list[tuple]:
        return [(case, *case.run(seeds, policy=policy, weight=weight)) for case in _cases(seeds, kind)]

    def chosen(policy: str) -> dict[str, float]:
        def error(seeds: Seeds, weight: float) -> list[float]:
            return [_error(case, found.particles) for case, found, _ in runs(seeds, policy, weight)]

        return tune(error, [{"weight": weight} for weight in kind.weights], seeds, better="lower")

    settings = {policy: chosen(policy) for policy in ("active", other)}
    arms = [runs(seeds, policy, **setting) for policy, setting in settings.items()]
    details = {"evaluations": [mean(evaluations for *_, evaluations in arm) for arm in arms], **settings}
    return Arms(*([score(case, found.particles) for case, found, _ in arm] for arm in arms), details)


@claim(
    says="Four pixels chosen by the particles leave a smaller error than the four of the largest variance in the data",
    kind="ratio",
    metric="mean absolute error",
    margin=0.9,
    scale="4 of 64 pixels; exact denoiser of 30 digits with noise 0.15, 8 particles, 60 steps; 4 settings each",
)
def active_beats_variance(seeds: Seeds) -> Arms:
    return _compare(seeds, "fixed")


@claim(
    says="They leave a smaller error than four random ones",
    kind="ratio",
    metric="mean absolute error",
    margin=0.8,
    scale="4 of 64 pixels; exact denoiser of 30 digits with noise 0.15, 8 particles, 60 steps; 4 settings each",
)
def active_beats_random(seeds: Seeds) -> Arms:
    return _compare(seeds, "random")


@claim(
    says="More particles are of the right digit than with the pixels of the largest variance",
    kind="superiority",
    metric="accuracy",
    scale="one of 30 digits by 4 of 64 pixels; exact denoiser, 8 particles, 60 steps; settings of the first claim",
)
def active_recognises_more(seeds: Seeds) -> Arms:
    return _compare(seeds, "fixed", _recognised)


@claim(
    says="Of a real digit, eight pixels chosen by the particles leave a smaller error than eight good fixed ones",
    kind="ratio",
    metric="mean absolute error",
    margin=0.9,
    scale="8 of 64 pixels, fixed ones by regression; one U-Net, 16 digits 8x8 that it has not seen, 8 particles, 60"
    " steps; 4 settings each",
)
def active_beats_fixed_on_digits(seeds: Seeds) -> Arms:
    return _compare(seeds, "fixed", kind=_Digits)


@claim(
    says="A wide kernel of either sign asks for the place where the particles vary most",
    kind="exact",
    metric="deviation",
    tolerance=1e-6,
    scale="relative loss of variance; 500 problems, 16 normal particles, 64 places, width 1000, both kernels",
)
def wide_kernels_take_the_variance(seeds: Seeds) -> Arms:
    losses = []
    for g in seeds.torch("particles"):
        particles = torch.randn(seeds.few(500), 16, 64, 1, generator=g, dtype=torch.float64)
        variance = particles.squeeze(-1).var(1)
        none = torch.zeros(len(particles), 64, dtype=torch.bool)
        worst = 0.0
        for kernel in ("positive", "negative"):
            place = max_entropy_acquisition(particles, none, sigma=1000.0, kernel=kernel)
            kept = variance.gather(1, place[:, None]).squeeze(1) / variance.amax(1)
            worst = max(worst, (1 - kept).max().item())
        losses.append(worst)
    return Arms(losses)


def draw(seeds: Seeds) -> list[Panel]:
    """A picture, and the mean of the particles after four pixels of each policy, which are marked; a real digit."""
    one, panels = seeds.one(0), []
    policies = {_Case: {"random": "random", "variance": "fixed", "active": "active"}}
    policies[_Digits] = {"fixed": "fixed", "active": "active"}
    for kind, titles in policies.items():
        (case,) = _cases(one, kind)
        panels.append(Panel("picture", image=(case.target[0].view(8, 8) / 2 + 0.5).numpy()))
        for title, policy in titles.items():
            (case,) = _cases(one, kind)
            found, _ = case.run(one, policy=policy, weight=kind.weights[1])
            points = torch.stack([found.order[0] % 8, found.order[0] // 8], dim=1) + 0.5
            image = found.particles[0].mean(0).view(8, 8) / 2 + 0.5
            panels.append(Panel(title, image=image.clamp(0, 1).numpy(), points=points.numpy()))
    return panels
