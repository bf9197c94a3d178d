"""Minority guidance: more of the rare modes than picking the rarest of four times as many, and none the worse?

Eight Gaussians on a ring, of weights from 50% to 1% in random order. The denoiser is exact; scores are those of 2000
samples, and a perceptron learns their ten classes at all noise levels. A sample is good within three standard
deviations of a mode, and rare if that mode weighs 5% or less: four modes, 12% together.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import MinorityGuidance, minority_classes, minority_score
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import stacked_mlp

WEIGHTS = torch.tensor([0.5, 0.22, 0.1, 0.06, 0.05, 0.04, 0.02, 0.01], dtype=torch.float64)
LEVELS, SPREAD, HIGH = 10, 0.3, 40.0
SIGMAS = karras_sigmas(25, low=0.02, high=HIGH)

OURS = [{"sigma": sigma, "scale": scale} for sigma in (3.0, 12.0) for scale in (1.0, 3.5)]
THEIRS = [{"sigma": sigma} for sigma in (1.5, 3.0, 6.0, 12.0)]


def _mixtures(seeds: Seeds) -> list[Mixture]:
    return [ring(8, scale=SPREAD, weights=WEIGHTS[torch.randperm(8, generator=g)]) for g in seeds.torch("order")]


def _starts(seeds: Seeds, n: int) -> list[Tensor]:
    return [HIGH * torch.randn(n, 2, generator=g, dtype=torch.float64) for g in seeds.torch("start")]


def _inputs(x: Tensor, sigma: Tensor | float) -> Tensor:
    level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1])[..., None]
    return torch.cat([x / (8 + level**2).sqrt(), level.log() / 2], dim=-1).float()


def _guided(seeds: Seeds, *, sigma: float, scale: float, level: int = LEVELS - 1) -> list[Tensor]:
    """Samples of each seed, with a classifier trained for 500 steps of 256."""
    truths = _mixtures(seeds)
    data, classes = [], []
    for truth, g in zip(truths, seeds.torch("data")):
        x, _ = truth.sample(seeds.few(2000, smoke=100), generator=g)
        data.append(x)
        classes.append(minority_classes(minority_score(truth.denoise, x, sigma, generator=g), levels=LEVELS))
    network, generators = stacked_mlp((3, 64, 64, LEVELS), seeds, activation="silu"), seeds.torch("training")
    steps = seeds.few(500, smoke=2)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        inputs, targets = [], []
        for x, y, g in zip(data, classes, generators):
            rows = torch.randint(len(x), (256,), generator=g)
            noise = (math.log(0.02) + math.log(HIGH / 0.02) * torch.rand(256, generator=g, dtype=x.dtype)).exp()
            noisy = x[rows] + noise[:, None] * torch.randn(256, 2, generator=g, dtype=x.dtype)
            inputs.append(_inputs(noisy, noise))
            targets.append(y[rows])
        optimizer.zero_grad()
        logits = network(torch.stack(inputs))
        F.cross_entropy(logits.flatten(0, 1), torch.cat(targets), reduction="sum").div(256).backward()
        optimizer.step()
        schedule.step()
    network.requires_grad_(False)
    found = []
    for s, (truth, x) in enumerate(zip(truths, _starts(seeds, seeds.few(1000, smoke=20)))):
        one = network.replica(s)
        guided = MinorityGuidance(truth.denoise, lambda x, v, one=one: one(_inputs(x, v)), level=level, scale=scale)
        found.append(euler(guided, x, SIGMAS))
    return found


def _plain(seeds: Seeds, n: int) -> list[Tensor]:
    return [euler(truth.denoise, x, SIGMAS) for truth, x in zip(_mixtures(seeds), _starts(seeds, n))]


def _picked(seeds: Seeds, *, sigma: float) -> list[Tensor]:
    """Of four times as many plain samples the quarter with the highest minority scores."""
    found, n = [], seeds.few(1000, smoke=20)
    for truth, x, g in zip(_mixtures(seeds), _plain(seeds, 4 * n), seeds.torch("pick")):
        found.append(x[minority_score(truth.denoise, x, sigma, generator=g).topk(n).indices])
    return found


def _shares(seeds: Seeds, samples: list[Tensor]) -> tuple[list[float], list[float]]:
    """Points: good and rare; not good."""
    rare, bad = [], []
    for truth, x in zip(_mixtures(seeds), samples):
        distance, mode = torch.cdist(x, truth.means).min(-1)
        good = distance < 3 * SPREAD
        rare.append(100 * (good & (truth.weights[mode] < 0.055)).double().mean().item())
        bad.append(100 * (~good).double().mean().item())
    return rare, bad


def _rare_guided(seeds: Seeds, **setting: float) -> list[float]:
    return _shares(seeds, _guided(seeds, **setting))[0]


def _rare_picked(seeds: Seeds, **setting: float) -> list[float]:
    return _shares(seeds, _picked(seeds, **setting))[0]


@claim(
    says="It draws more good samples of the rare modes than keeping the rarest quarter of four times as many",
    kind="superiority",
    metric="recall",
    scale="share of samples, points; 8 Gaussians of 50% to 1%, exact denoiser, 25 Euler steps; 4 settings each",
)
def guidance_draws_the_rare(seeds: Seeds) -> Arms:
    ours, theirs = tune(_rare_guided, OURS, seeds), tune(_rare_picked, THEIRS, seeds)
    rare = [_rare_guided(seeds, **ours), _rare_picked(seeds, **theirs)]
    plain, _ = _shares(seeds, _plain(seeds, seeds.few(1000, smoke=20)))
    return Arms(*rare, {"method": ours, "baseline": theirs, "no guidance": plain})


@claim(
    says="No more of them are off the data than without guidance",
    kind="noninferiority",
    metric="error rate",
    scale="share beyond 3 standard deviations; 8 Gaussians, exact denoiser, 25 Euler steps; settings of the first",
)
def guidance_keeps_to_the_data(seeds: Seeds) -> Arms:
    setting = tune(_rare_guided, OURS, seeds)
    _, ours = _shares(seeds, _guided(seeds, **setting))
    _, theirs = _shares(seeds, _plain(seeds, seeds.few(1000, smoke=20)))
    return Arms(ours, theirs, {"method": setting})


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
    """Samples without guidance, and guided to the commonest and to the rarest tenth."""
    one = seeds.one(0)
    panels = [Panel("no guidance", points=_plain(one, 500)[0].numpy())]
    for title, level in (("commonest tenth", 0), ("rarest tenth", LEVELS - 1)):
        (x,) = _guided(one, sigma=3.0, scale=3.5, level=level)
        panels.append(Panel(title, points=x[:500].numpy()))
    return panels
