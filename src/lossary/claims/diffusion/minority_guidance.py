"""Minority guidance: more of the rare modes than picking the rarest of four times as many, and none the worse?

Eight Gaussians on a ring, of weights from 50% to 1% in random order. The denoiser is exact; scores are those of 2000
samples, and a perceptron learns their ten classes at all noise levels. A sample is good within three standard
deviations of a mode, and rare if that mode weighs 5% or less: four modes, 12% together.

Then real digits and the room's shared network, without labels. Scores are distances between the 32 features of a
perceptron that tells digits apart. A sample's rarity is the paper's, the mean distance to its five nearest real digits
in these features: a sample is rare if it is farther from them than nine tenths of the digits are from theirs, and not
good if it is farther than 99 in a hundred.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from statistics import mean

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import MinorityGuidance, minority_classes, minority_score
from lossary.diffusion._denoiser import Counted
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import digit_classifier, digit_denoiser, digit_images, minimise, sheet, stacked_mlp

WEIGHTS = torch.tensor([0.5, 0.22, 0.1, 0.06, 0.05, 0.04, 0.02, 0.01], dtype=torch.float64)
LEVELS, SPREAD, HIGH, STEPS = 10, 0.3, 40.0, 25

OURS = [{"sigma": sigma, "scale": scale} for sigma in (3.0, 12.0) for scale in (1.0, 3.5)]
THEIRS = [{"sigma": sigma} for sigma in (1.5, 3.0, 6.0, 12.0)]
OURS_ON_DIGITS = [{"sigma": sigma, "scale": scale} for sigma in (2.0, 6.0) for scale in (1.0, 3.5)]
THEIRS_ON_DIGITS = [{"sigma": sigma} for sigma in (1.0, 2.0, 4.0, 8.0)]

Drawn = tuple[list[Tensor], dict[str, int]]
"""Samples of each seed, and what one sample took."""


class _Ring:
    """One seed's mixture; the numbers are of samples, of their entries, and of the classifier."""

    samples, dimension, dtype = 1000, 2, torch.float64
    hidden, square = (64, 64), 8  # the mean square of the data, about
    distance = None

    def __init__(self, seeds: Seeds, order: Generator) -> None:
        self.truth = ring(8, scale=SPREAD, weights=WEIGHTS[torch.randperm(8, generator=order)])
        self.denoise = self.truth.denoise

    def data(self, seeds: Seeds, g: Generator) -> Tensor:
        return self.truth.sample(seeds.few(2000, smoke=100), generator=g)[0]

    def shares(self, x: Tensor) -> tuple[float, float]:
        """Points: good and rare; not good."""
        distance, mode = torch.cdist(x, self.truth.means).min(-1)
        good = distance < 3 * SPREAD
        return _points(good & (self.truth.weights[mode] < 0.055)), _points(~good)

    def inputs(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """Of the classifier."""
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1])[..., None]
        return torch.cat([x / (self.square + level**2).sqrt(), level.log() / 2], dim=-1).float()


class _Digits(_Ring):
    """All real digits."""

    samples, dimension, dtype = 300, 64, torch.float32
    hidden, square = (128, 128), 0.7

    def __init__(self, seeds: Seeds, order: Generator) -> None:
        network = digit_denoiser(steps=seeds.few(1000, smoke=2))
        self.denoise = lambda x, sigma: network(x.view(-1, 1, 8, 8), sigma).view_as(x)

    def data(self, seeds: Seeds, g: Generator) -> Tensor:
        return digit_images()[0].flatten(1)[: seeds.few(2000, smoke=100)]

    def distance(self, clean: Tensor, found: Tensor) -> Tensor:
        features, _, _ = _real()
        return (features(found) - features(clean)).norm(dim=-1)

    def shares(self, x: Tensor) -> tuple[float, float]:
        features, real, (rare, most) = _real()
        rarity = _rarity(features(x), real)
        return _points((rarity > rare) & (rarity <= most)), _points(rarity > most)


@cache
def _real() -> tuple[nn.Module, Tensor, Tensor]:
    """The features, those of all real digits, and the rarities that 90% and 99% of them stay below."""
    features = digit_classifier()[:-1]
    real = features(digit_images()[0])
    return features, real, _rarity(real, real, itself=True).quantile(torch.tensor([0.9, 0.99]))


def _rarity(x: Tensor, real: Tensor, *, itself: bool = False) -> Tensor:
    """Mean distance to the five nearest, of a real digit itself to the five nearest others."""
    return torch.cdist(x, real).topk(5 + itself, largest=False).values[:, int(itself) :].mean(-1)


def _points(which: Tensor) -> float:
    return 100 * which.double().mean().item()


def _cases(seeds: Seeds, kind: type[_Ring]) -> list[_Ring]:
    return [kind(seeds, g) for g in seeds.torch("order")]


def _sigmas(seeds: Seeds) -> Tensor:
    return karras_sigmas(seeds.few(STEPS, smoke=3), low=0.02, high=HIGH)


def _starts(seeds: Seeds, kind: type[_Ring], n: int) -> list[Tensor]:
    return [HIGH * torch.randn(n, kind.dimension, generator=g, dtype=kind.dtype) for g in seeds.torch("start")]


def _guided(seeds: Seeds, kind: type[_Ring], *, sigma: float, scale: float, level: int = LEVELS - 1) -> Drawn:
    """With a classifier trained for 500 steps of 256."""
    cases, steps = _cases(seeds, kind), seeds.few(500, smoke=2)
    data, classes = [], []
    for case, g in zip(cases, seeds.torch("data")):
        x, scoring = case.data(seeds, g), Counted(case.denoise)
        data.append(x)
        scores = minority_score(scoring, x, sigma, distance=case.distance, generator=g)
        classes.append(minority_classes(scores, levels=LEVELS))
    sizes = (kind.dimension + 1, *kind.hidden, LEVELS)
    network, generators = stacked_mlp(sizes, seeds, activation="silu"), seeds.torch("training")

    def objective() -> Tensor:
        inputs, targets = [], []
        for case, x, y, g in zip(cases, data, classes, generators):
            rows = torch.randint(len(x), (256,), generator=g)
            noise = (math.log(0.02) + math.log(HIGH / 0.02) * torch.rand(256, generator=g, dtype=x.dtype)).exp()
            noisy = x[rows] + noise[:, None] * torch.randn(256, kind.dimension, generator=g, dtype=x.dtype)
            inputs.append(case.inputs(noisy, noise))
            targets.append(y[rows])
        logits = network(torch.stack(inputs))
        return F.cross_entropy(logits.flatten(0, 1), torch.cat(targets), reduction="sum").div(256)

    minimise(objective, network.parameters(), steps=steps, lr=0.005)
    network.requires_grad_(False)
    found = []
    for s, (case, x) in enumerate(zip(cases, _starts(seeds, kind, seeds.few(kind.samples, smoke=20)))):
        one, denoise = network.replica(s), Counted(case.denoise)
        classifier = Counted(lambda x, v, one=one, case=case: one(case.inputs(x, v)))
        found.append(euler(MinorityGuidance(denoise, classifier, level=level, scale=scale), x, _sigmas(seeds)))
    return found, {
        "evaluations": denoise.evaluations,
        "classifier gradients": classifier.evaluations,
        "training evaluations": scoring.evaluations + steps,
    }


@cache
def _plain(seeds: Seeds, kind: type[_Ring], n: int) -> Drawn:
    found = []
    for case, x in zip(_cases(seeds, kind), _starts(seeds, kind, n)):
        denoise = Counted(case.denoise)
        found.append(euler(denoise, x, _sigmas(seeds)))
    return found, {"evaluations": denoise.evaluations, "classifier gradients": 0, "training evaluations": 0}


def _picked(seeds: Seeds, kind: type[_Ring], *, sigma: float) -> Drawn:
    """Of four times as many plain samples the quarter with the highest minority scores."""
    found, n = [], seeds.few(kind.samples, smoke=20)
    plain, cost = _plain(seeds, kind, 4 * n)
    for case, x, g in zip(_cases(seeds, kind), plain, seeds.torch("pick")):
        scoring = Counted(case.denoise)
        scores = minority_score(scoring, x, sigma, distance=case.distance, generator=g)
        found.append(x[scores.topk(n).indices])
    return found, {**cost, "evaluations": 4 * (cost["evaluations"] + scoring.evaluations)}


def _shares(seeds: Seeds, kind: type[_Ring], samples: list[Tensor]) -> tuple[list[float], list[float]]:
    """Points: good and rare; not good."""
    rare, bad = zip(*(case.shares(x) for case, x in zip(_cases(seeds, kind), samples)))
    return list(rare), list(bad)


def _tuned(
    seeds: Seeds, kind: type[_Ring], sampled: Callable[..., Drawn], grid: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    def rare(seeds: Seeds, **setting: float) -> list[float]:
        return _shares(seeds, kind, sampled(seeds, kind, **setting)[0])[0]

    return tune(rare, grid, seeds)


def _costs(*arms: Drawn) -> dict[str, list[int]]:
    return {key: [cost[key] for _, cost in arms] for key in arms[0][1]}


def _rare(
    seeds: Seeds, kind: type[_Ring], ours: Sequence[Mapping[str, float]], theirs: Sequence[Mapping[str, float]]
) -> Arms:
    """Shares of good and rare samples under guidance, and of those that were picked."""
    best = _tuned(seeds, kind, _guided, ours), _tuned(seeds, kind, _picked, theirs)
    guided, picked = _guided(seeds, kind, **best[0]), _picked(seeds, kind, **best[1])
    plain = _plain(seeds, kind, seeds.few(kind.samples, smoke=20))
    rare, bad = zip(*(_shares(seeds, kind, x) for x, _ in (guided, picked, plain)))
    details = {"method": best[0], "baseline": best[1], "no guidance": rare[2], "not good": [mean(x) for x in bad]}
    return Arms(rare[0], rare[1], _costs(guided, picked) | details)


@claim(
    says="It draws more good samples of the rare modes than keeping the rarest quarter of four times as many",
    kind="superiority",
    metric="recall",
    scale="share of samples, points; 8 Gaussians of 50% to 1%, exact denoiser, 25 Euler steps; 4 settings each",
)
def guidance_draws_the_rare(seeds: Seeds) -> Arms:
    return _rare(seeds, _Ring, OURS, THEIRS)


@claim(
    says="No more of them are off the data than without guidance",
    kind="noninferiority",
    metric="error rate",
    scale="share beyond 3 standard deviations; 8 Gaussians, exact denoiser, 25 Euler steps; settings of the first",
)
def guidance_keeps_to_the_data(seeds: Seeds) -> Arms:
    setting = _tuned(seeds, _Ring, _guided, OURS)
    guided, plain = _guided(seeds, _Ring, **setting), _plain(seeds, _Ring, seeds.few(_Ring.samples, smoke=20))
    (_, ours), (_, theirs) = (_shares(seeds, _Ring, x) for x, _ in (guided, plain))
    return Arms(ours, theirs, _costs(guided, plain) | {"method": setting})


@claim(
    says="Of real digits, too, it draws more good rare ones than keeping the rarest quarter of four times as many",
    kind="superiority",
    metric="recall",
    scale="share of samples, points, by the 5 nearest of 1797 real digits in 32 features; one U-Net, digits 8x8, 25"
    " Euler steps, 300 samples; 4 settings each",
)
def guidance_draws_rare_digits(seeds: Seeds) -> Arms:
    return _rare(seeds, _Digits, OURS_ON_DIGITS, THEIRS_ON_DIGITS)


def _ranked(seeds: Seeds, *, sigma: float = 0.0, neighbours: int = 0) -> list[float]:
    """Rank correlation between a score and the rarity of a sample's mode, times 100; eight modes anywhere in 8-D."""
    from scipy.stats import spearmanr

    found = []
    for place, g in zip(seeds.torch("place"), seeds.torch("data")):
        truth = Mixture(torch.randn(8, 8, generator=place, dtype=torch.float64), 0.5, WEIGHTS)
        x, mode = truth.sample(seeds.few(1000, smoke=100), generator=g)
        if neighbours:
            score = torch.cdist(x, x).topk(neighbours + 1, largest=False).values.mean(-1)
        else:
            score = minority_score(truth.denoise, x, sigma, generator=g)
        found.append(100 * spearmanr(score, -truth.weights[mode]).statistic)
    return found


@claim(
    says="The minority score tells the rarity of a sample's mode better than the mean distance to its neighbours",
    kind="superiority",
    metric="rank correlation",
    scale="8 Gaussians of 50% to 1% at random in 8-D, 1000 samples, exact denoiser; 4 noise levels, 4 numbers",
)
def score_tells_rarity(seeds: Seeds) -> Arms:
    ours = tune(_ranked, [{"sigma": sigma} for sigma in (0.75, 1.5, 3.0, 6.0)], seeds)
    theirs = tune(_ranked, [{"neighbours": k} for k in (3, 10, 30, 100)], seeds)
    return Arms(_ranked(seeds, **ours), _ranked(seeds, **theirs), {"method": ours, "baseline": theirs})


def draw(seeds: Seeds) -> list[Panel]:
    """Samples without guidance, and guided to the commonest and to the rarest tenth; of the ring, and digits."""
    one, panels = seeds.one(0), []
    for kind in (_Ring, _Digits):
        found = {"no guidance": _plain(one, kind, 500)}
        for title, level in (("commonest tenth", 0), ("rarest tenth", LEVELS - 1)):
            found[title] = _guided(one, kind, sigma=3.0, scale=3.5, level=level)
        for title, ([x], _) in found.items():
            shown = {"image": sheet(x[:20].view(-1, 1, 8, 8))} if kind is _Digits else {"points": x[:500].numpy()}
            panels.append(Panel(title, **shown))
    return panels
