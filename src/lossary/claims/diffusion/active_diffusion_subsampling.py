"""Active diffusion subsampling: four pixels of 64, chosen while sampling, by variance beforehand, or at random.

Pictures are drawn from Gaussians of standard deviation 0.15 around 30 real digits of 8x8, another 30 for each seed, so
that the denoiser is exact; 8 pictures for each seed, 8 particles each, 60 steps of the paper's cosine schedule. Fixed
patterns are measured before the first step. The first three claims are registered anew after their first results
were seen, with stronger pulls: the strongest of the first grid, 2, had been chosen throughout.
"""

import math

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ActiveDiffusionSampler, max_entropy_acquisition
from lossary.diffusion._mixture import Mixture
from lossary.tasks.diffusion import digit_images

BUDGET, PARTICLES = 4, 8
WEIGHTS = [{"weight": weight} for weight in (2.0, 4.0, 8.0, 16.0)]


def _levels(steps: int) -> Tensor:
    """sigma / alpha at evenly spaced angles, alpha from 0.02 to 0.95, then 0."""
    angle = torch.linspace(math.acos(0.02), math.acos(0.95), steps)
    return torch.cat([angle.tan(), torch.zeros(1)])


class _Case:
    """One seed's digits, pictures and starts."""

    def __init__(self, which: torch.Generator, target: torch.Generator, start: torch.Generator, n: int) -> None:
        images, _ = digit_images()
        rows = torch.randperm(len(images), generator=which)[:30]
        self.truth = Mixture(images[rows].flatten(1), 0.15)
        self.target, self.mode = self.truth.sample(n, generator=target)
        self.start, self.which = start, which

    def places(self, policy: str) -> Tensor | None:
        """(n, BUDGET) chosen beforehand."""
        if policy == "active":
            return None
        if policy == "variance":
            fixed = self.truth.means.var(0).topk(BUDGET).indices
            return fixed.expand(len(self.target), -1)
        return torch.stack([torch.randperm(64, generator=self.which)[:BUDGET] for _ in self.target])

    def run(self, seeds: Seeds, *, policy: str, weight: float):
        initial = self.places(policy)
        budget = 0 if policy != "active" else BUDGET
        sampler = ActiveDiffusionSampler(lambda x: x.unsqueeze(-1), budget=budget, weight=weight, data_dims=1)
        sigmas = _levels(seeds.few(60, smoke=6))
        noise = torch.randn(len(self.target), PARTICLES, 64, generator=self.start)
        return sampler(
            self.truth.denoise,
            sigmas[0].item() * noise,
            sigmas,
            lambda place: self.target.gather(1, place[:, None]),
            initial=initial,
        )


def _cases(seeds: Seeds) -> list[_Case]:
    streams = zip(seeds.torch("digits"), seeds.torch("pictures"), seeds.torch("start"))
    return [_Case(*generators, seeds.few(8, smoke=2)) for generators in streams]


def _error(seeds: Seeds, *, policy: str, weight: float) -> list[float]:
    """Mean absolute error of the particles' mean."""
    found = []
    for case in _cases(seeds):
        guess = case.run(seeds, policy=policy, weight=weight).particles.mean(1)
        found.append((guess - case.target).abs().mean().item())
    return found


def _recognised(seeds: Seeds, *, policy: str, weight: float) -> list[float]:
    """Share of particles whose digit is the picture's, points."""
    found = []
    for case in _cases(seeds):
        particles = case.run(seeds, policy=policy, weight=weight).particles
        right = case.truth.responsibilities(particles).argmax(-1) == case.mode[:, None]
        found.append(100 * right.double().mean().item())
    return found


def _compare(seeds: Seeds, score, other: str) -> Arms:
    """The weight of the pull is tuned for the error, whatever is reported."""
    arms, chosen = [], {}
    for policy in ("active", other):
        best = tune(
            lambda seeds, weight, p=policy: _error(seeds, policy=p, weight=weight), WEIGHTS, seeds, better="lower"
        )
        arms.append(score(seeds, policy=policy, **best))
        chosen[policy] = best
    return Arms(*arms, chosen)


@claim(
    says="Four pixels chosen by the particles leave a smaller error than the four of the largest variance in the data",
    kind="ratio",
    metric="mean absolute error",
    margin=0.9,
    scale="4 of 64 pixels; exact denoiser of 30 digits with noise 0.15, 8 particles, 60 steps; 4 settings each",
)
def active_beats_variance(seeds: Seeds) -> Arms:
    return _compare(seeds, _error, "variance")


@claim(
    says="They leave a smaller error than four random ones",
    kind="ratio",
    metric="mean absolute error",
    margin=0.8,
    scale="4 of 64 pixels; exact denoiser of 30 digits with noise 0.15, 8 particles, 60 steps; 4 settings each",
)
def active_beats_random(seeds: Seeds) -> Arms:
    return _compare(seeds, _error, "random")


@claim(
    says="More particles are of the right digit than with the pixels of the largest variance",
    kind="superiority",
    metric="accuracy",
    scale="one of 30 digits by 4 of 64 pixels; exact denoiser, 8 particles, 60 steps; settings of the first claim",
)
def active_recognises_more(seeds: Seeds) -> Arms:
    return _compare(seeds, _recognised, "variance")


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
    """A picture, and the mean of the particles after four pixels of each policy, which are marked."""
    one = seeds.one(0)
    (case,) = _cases(one)
    panels = [Panel("picture", image=(case.target[0].view(8, 8) / 2 + 0.5).numpy())]
    for policy in ("random", "variance", "active"):
        (case,) = _cases(one)
        found = case.run(one, policy=policy, weight=4.0)
        points = torch.stack([found.order[0] % 8, found.order[0] // 8], dim=1) + 0.5
        image = found.particles[0].mean(0).view(8, 8) / 2 + 0.5
        panels.append(Panel(policy, image=image.numpy(), points=points.numpy()))
    return panels
