"""Stable distribution propagation: is the output's distribution right, and does it tell when not to answer?

The networks are classifiers of digits, trained as usual. Moment matching goes layer by layer with units taken for
independent, as it is usually done. The distance to samples is total variation over twenty bins, as many samples in
each, averaged over logits.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import auroc, cross_entropy, digits, fit, split, stacked_mlp
from lossary.uncertainty import GaussianSDP, propagate_distribution

SPREADS = (0.03, 0.1, 0.3, 1.0)  # of the pixels, which run from 0 to 1
KNOWN = 7  # digits from 7 on are strange


@claim(
    says="No Gaussian is closer to a rectified Gaussian in total variation than what SDP makes of it",
    kind="exact",
    metric="deviation",
    tolerance=1e-4,
    scale="10 random means and spreads a seed, each against 200 other Gaussians about SDP's and moment matching's;"
    " also the distance itself against Phi(-|mean| / spread); integrals on a grid",
)
def relu_is_total_variation_optimal(seeds: Seeds) -> Arms:
    relu, deviations = nn.Sequential(nn.ReLU()), []
    for rng in seeds.numpy("gaussians"):
        for _ in range(seeds.few(10, smoke=1)):
            m, s = rng.normal(), rng.uniform(0.3, 2)
            x = torch.tensor([[m]], dtype=torch.float64)
            ours, matched = (
                [part.item() for part in propagate_distribution(relu, x, s, method=method)]
                for method in ("sdp", "moments")
            )
            distance = _total_variation(m, s, *ours)
            centres = np.array([ours, matched])[rng.integers(0, 2, 200)]
            others = centres + rng.normal(size=(200, 2)) * rng.choice([0.03, 0.3, 1.0], (200, 1))
            best = min(_total_variation(m, s, mean, abs(std) + 0.02) for mean, std in others)
            deviations += [max(distance - best, 0), abs(distance - stats.norm.cdf(-abs(m) / s))]
    return Arms(np.array(deviations))


def _total_variation(m: float, s: float, mean: float, std: float) -> float:
    """Between max(X, 0) with X from N(m, s) and N(mean, std), or the point `mean` where std is 0."""
    atom = stats.norm.cdf(-m / s)
    if std == 0:
        return float(1 - atom if mean == 0 else 1)
    x = np.linspace(0, max(m + 7 * s, mean + 7 * std), 4_001)
    apart = np.abs(_density((x - m) / s) / s - _density((x - mean) / std) / std)
    return float(atom + stats.norm.cdf(-mean / std) + np.trapezoid(apart, x)) / 2


def _density(x: NDArray) -> NDArray:
    return np.exp(-x * x / 2) / np.sqrt(2 * np.pi)


def _networks(seeds: Seeds, widths: Sequence[int], classes: int) -> tuple[list[nn.Module], Tensor, Tensor]:
    """A classifier for each seed of the digits below `classes`; rows (S, m, 64) and digits (S, m) it has not seen."""
    data = digits()
    parts = split(data, seeds)
    rows = [part[data.y[part] < classes] for part in parts.train]
    fewest = min(map(len, rows))
    train = torch.stack([part[:fewest] for part in rows])
    model = stacked_mlp((64, *widths, classes), seeds)
    fit(model, data.x, data.y, loss=cross_entropy, seeds=seeds, steps=seeds.few(400), lr=0.1, train=train)
    singles = [model.replica(s).requires_grad_(False) for s in range(len(seeds))]
    return singles, data.x[parts.test], data.y[parts.test]


def _distances(seeds: Seeds, widths: Sequence[int], spread: float, methods: Sequence[str]) -> list[NDArray]:
    """For each method the mean distance between its Gaussians and 10,000 samples, at 6 images a seed."""
    models, x, _ = _networks(seeds, widths, 10)
    n = seeds.few(10_000, smoke=200)
    found: list[list[float]] = [[] for _ in methods]
    for model, images, generator in zip(models, x[:, :6], seeds.torch("noise")):
        noisy = images.unsqueeze(1) + spread * torch.randn(len(images), n, 64, generator=generator)
        samples = model(noisy).sort(1).values
        edges = samples[:, n // 20 - 1 :: n // 20][:, :19]  # (6, 19, 10), between samples of rank n / 20, n / 10, ...
        for distances, method in zip(found, methods):
            mean, std = propagate_distribution(model, images, spread, method=method)
            below = torch.special.ndtr((edges - mean.unsqueeze(1)) / std.unsqueeze(1).clamp_min(1e-12))
            mass = below.diff(dim=1, prepend=torch.zeros_like(below[:, :1]), append=torch.ones_like(below[:, :1]))
            distances.append((mass - 1 / 20).abs().sum(1).mean().item() / 2)
    return [np.array(distances) for distances in found]


@claim(
    says="SDP's Gaussians are at most 0.9 times as far from samples of the output as those of moment matching",
    kind="ratio",
    metric="deviation",
    margin=0.9,
    scale="digits 8x8 with Gaussian noise of 0.1 on pixels from 0 to 1, MLP 64-64-64-64-10, 400 steps",
)
def closer_than_moment_matching(seeds: Seeds) -> Arms:
    methods, hidden = ("sdp", "moments", "marginal"), (64, 64, 64)
    sdp, moments, marginal = _distances(seeds, hidden, 0.1, methods)
    details: dict[str, Any] = {"distance of marginal SDP": marginal.mean()}
    others = ((hidden, 0.03), (hidden, 0.3), (hidden, 1.0), ((64,), 0.1), ((64,) * 6, 0.1))
    for widths, spread in others[: seeds.few(5, smoke=1)]:
        means = [distance.mean() for distance in _distances(seeds, widths, spread, methods)]
        details[f"{len(widths)} hidden layers, noise {spread}"] = dict(zip(methods, means))
    return Arms(sdp, moments, details)


def _tells_strangers(seeds: Seeds, *, method: str, spread: float) -> Tensor:
    """AUROC, in percent, of confidence between digits the network knows and those it does not, per seed."""
    models, x, y = _networks(seeds, (64, 64), KNOWN)
    return torch.stack(
        [auroc(_confidence(model, rows, method, spread), own < KNOWN) for model, rows, own in zip(models, x, y)]
    )


def _confidence(model: nn.Module, x: Tensor, method: str, spread: float) -> Tensor:
    """The chance that the winning logit exceeds its strongest rival; the largest probability for "softmax"."""
    if method == "softmax":
        probability: Tensor = (model(x) / spread).softmax(-1).amax(-1)
        return probability
    if method == "sdp":
        pairs = GaussianSDP(model).pairwise_probabilities(x, spread)
    else:
        mean, std = propagate_distribution(model, x, spread, method=method)
        apart = mean.unsqueeze(-1) - mean.unsqueeze(-2)
        pairs = torch.special.ndtr(apart / (std.unsqueeze(-1) ** 2 + std.unsqueeze(-2) ** 2).sqrt())
    least = (pairs + torch.eye(pairs.shape[-1])).amin(-1)  # a class is no rival of its own
    return least.amax(-1)


def _against(seeds: Seeds, method: str, settings: Sequence[float]) -> Arms:
    arms = {"sdp": SPREADS, method: settings}
    chosen = {
        name: tune(partial(_tells_strangers, method=name), [{"spread": s} for s in grid], seeds)
        for name, grid in arms.items()
    }
    scores = {name: _tells_strangers(seeds, method=name, **setting) for name, setting in chosen.items()}
    return Arms(scores["sdp"], scores[method], {"method": chosen["sdp"], "baseline": chosen[method]})


@claim(
    says="SDP's confidence tells digits never seen from known ones better than that of moment matching",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, MLP 64-64-64-7 trained on 0 to 6, 400 steps, strangers 7 to 9; 4 spreads of the pixels each",
)
def tells_strangers_better_than_moment_matching(seeds: Seeds) -> Arms:
    return _against(seeds, "moments", SPREADS)


@claim(
    says="SDP's confidence tells digits never seen from known ones better than the softmax",
    kind="superiority",
    metric="AUROC",
    scale="digits 8x8, MLP 64-64-64-7 trained on 0 to 6, 400 steps, strangers 7 to 9; 4 spreads against 4 temperatures",
)
def tells_strangers_better_than_softmax(seeds: Seeds) -> Arms:
    return _against(seeds, "softmax", (0.5, 1.0, 2.0, 10.0))
