"""Ctrl-U: does trusting a reward by its consistency help where the reward model knows little?

Fifteen Gaussians in four dimensions, three to each of five classes; a class-conditional denoiser, half trained, is
tuned further with the reward of a classifier that saw six labels of each class and so has never met some of the
Gaussians. Samples are judged by the exact posterior of the classes, which no arm sees.
"""

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import CtrlULoss, reading_disagreement
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import auroc, fit_denoiser, minimise, sliced_wasserstein, stacked_denoiser, stacked_mlp

CLASSES, LABELS, THRESHOLD = 5, 6, 1.0
WORLD = Mixture(0.9 * torch.randn(15, 4, generator=torch.Generator().manual_seed(7)), 0.25)
SIGMAS = karras_sigmas(15, low=0.05, high=10.0).float()


def _of_class(c: int) -> Mixture:
    return Mixture(WORLD.means[c::CLASSES], 0.25)


def _data(n: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Points (S, n, 4) and their classes in one-hot form."""
    pairs = [WORLD.sample(n, generator=g) for g in generators]
    label = torch.stack([k % CLASSES for _, k in pairs])
    return torch.stack([x for x, _ in pairs]), nn.functional.one_hot(label, CLASSES).float()


def _truth(x: Tensor) -> Tensor:
    """The likeliest class, by the exact posterior."""
    return WORLD.responsibilities(x).unflatten(-1, (3, CLASSES)).sum(-2).argmax(-1)


def _start(seeds: Seeds) -> tuple[Denoiser, nn.Module]:
    """The generator before it is tuned, and the reward model."""
    denoise = stacked_denoiser(4, seeds, conditions=CLASSES)
    fit_denoiser(denoise, _data, seeds=seeds, steps=seeds.few(400, smoke=2), batch=64)
    reward = stacked_mlp((4, 32, CLASSES), seeds, activation="relu")
    label = torch.arange(CLASSES).repeat(LABELS).expand(len(seeds), -1)
    draws = [[_of_class(c).sample(LABELS, generator=g)[0] for c in range(CLASSES)] for g in seeds.torch("labels")]
    x = torch.stack([torch.stack(rows, dim=1).flatten(0, 1) for rows in draws])
    optimizer = torch.optim.Adam(reward.parameters(), lr=0.01)
    for _ in range(seeds.few(200, smoke=2)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(reward(x).flatten(0, 1), label.flatten()).mul(len(seeds)).backward()
        optimizer.step()
    return denoise, reward.requires_grad_(False)


Begun = Callable[[Seeds], tuple[Denoiser, nn.Module]]


def _levels(denoise: Denoiser, batch: int, generators: list[torch.Generator], *, below: float) -> Tensor:
    """(S, batch), at times spread evenly up to that of the level `below`."""
    last = denoise.process.time(torch.tensor(below))
    place = torch.stack([torch.rand(batch, generator=g) for g in generators])
    return denoise.process.ratio(0.001 + (last - 0.001) * place)


def _tuned(seeds: Seeds, *, weight: float, penalty: float, trust: float, lr: float, begun: Begun = _start) -> Denoiser:
    start, reward = begun(seeds)
    denoise, generators = copy.deepcopy(start), seeds.torch("tuning")
    loss = CtrlULoss(reward, threshold=THRESHOLD, weight=weight, penalty=penalty, trust=trust)

    def objective() -> Tensor:
        x, condition = _data(64, generators)
        sigma = _levels(denoise, 64, generators, below=50.0)
        other = _levels(denoise, 64, generators, below=THRESHOLD)
        noise = torch.stack([torch.randn(64, 4, generator=g) for g in generators])
        return loss(denoise, x, condition.argmax(-1), sigma, other, noise, condition).mean(-1).sum()

    minimise(objective, denoise.parameters(), steps=seeds.few(150, smoke=2), lr=lr)
    return denoise


@torch.no_grad()
def _samples(denoise: Denoiser, seeds: Seeds) -> Tensor:
    """(S, 5, n, 4), by class."""
    n = seeds.few(300, smoke=10)
    label = torch.arange(CLASSES).repeat_interleave(n).expand(len(seeds), -1)
    condition = nn.functional.one_hot(label, CLASSES).float()
    noise = torch.stack([torch.randn(CLASSES * n, 4, generator=g) for g in seeds.torch("start")])
    found = euler(lambda x, sigma: denoise(x, sigma, condition), SIGMAS[0] * noise, SIGMAS)
    return found.unflatten(1, (CLASSES, n))


def _obeyed(seeds: Seeds, **setting: object) -> list[float]:
    """Samples whose likeliest class is the one that was asked for, in percent."""
    found = _truth(_samples(_tuned(seeds, **setting), seeds))
    return (100 * (found == torch.arange(CLASSES)[:, None]).double().mean((-2, -1))).tolist()


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    """Sliced W1 to the true points of each class, averaged over classes."""
    found = _samples(_tuned(seeds, **setting), seeds)
    n, truth = found.shape[2], seeds.torch("truth")
    real = torch.stack([torch.stack([_of_class(c).sample(n, generator=g)[0] for c in range(CLASSES)]) for g in truth])
    return sliced_wasserstein(found, real).mean(-1).tolist()


RATES, FORCES = (0.001, 0.003), ((0.1, 10.0), (1.0, 1.0))
AWARE, PLAIN = (
    [{"lr": lr, "weight": w, "penalty": p, "trust": trust} for lr in RATES for w, p in FORCES] for trust in (1.0, 0.0)
)


def _compare(score, seeds: Seeds, *, better: str) -> Arms:
    score = partial(score, begun=cache(_start))  # the start is the same for all settings
    ours, theirs = (tune(score, grid, seeds, better=better) for grid in (AWARE, PLAIN))
    details = {"evaluations": 2 * [len(SIGMAS) - 1], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="Samples keep to their class more often than after tuning with the reward trusted everywhere",
    kind="superiority",
    metric="accuracy",
    scale="5 classes of 3 Gaussians in 4-D, MLP of 64, reward from 6 labels a class, 150 steps of 64; 4 settings each",
)
def keeps_to_the_condition(seeds: Seeds) -> Arms:
    return _compare(_obeyed, seeds, better="higher")


@claim(
    says="Samples of each class lie nearer the true ones than after tuning with the reward trusted everywhere",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; 5 classes of 3 Gaussians in 4-D, MLP of 64, 6 labels a class, 150 steps of 64; 4 settings each",
)
def samples_are_better(seeds: Seeds) -> Arms:
    return _compare(_distance, seeds, better="lower")


def _detected(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of one-step estimates (S, n): disagreement, entropy of the first reading, its noise level, and if it is wrong."""
    denoise, reward = _start(seeds)
    generators, n = seeds.torch("points"), seeds.few(2000, smoke=200)
    x, condition = _data(n, generators)
    noise = torch.stack([torch.randn(n, 4, generator=g) for g in generators])
    sigma, other = (_levels(denoise, n, generators, below=THRESHOLD) for _ in range(2))
    with torch.no_grad():
        first, second = (denoise(x + s[..., None] * noise, s, condition) for s in (sigma, other))
        readings = reward(first), reward(second)
    entropy = torch.distributions.Categorical(logits=readings[0]).entropy()
    return reading_disagreement(*readings), entropy, sigma, readings[0].argmax(-1) != _truth(first)


@claim(
    says="The disagreement of two readings tells where the reward model is wrong, better than the noise level does",
    kind="superiority",
    metric="AUROC",
    scale="one-step estimates of 2000 points below the threshold, 5 classes of 3 Gaussians in 4-D, 6 labels a class",
)
def disagreement_finds_wrong_rewards(seeds: Seeds) -> Arms:
    disagreement, _, sigma, wrong = _detected(seeds)
    ours, theirs = (auroc(score, wrong).tolist() for score in (disagreement, sigma))
    return Arms(ours, theirs, {"wrong, percent": (100 * wrong.double().mean(-1)).tolist()})


@claim(
    says="The disagreement of two readings tells where the reward model is wrong, better than its own entropy does",
    kind="superiority",
    metric="AUROC",
    scale="one-step estimates of 2000 points below the threshold, 5 classes of 3 Gaussians in 4-D, 6 labels a class",
)
def disagreement_beats_entropy(seeds: Seeds) -> Arms:
    disagreement, entropy, _, wrong = _detected(seeds)
    ours, theirs = (auroc(score, wrong).tolist() for score in (disagreement, entropy))
    return Arms(ours, theirs, {"wrong, percent": (100 * wrong.double().mean(-1)).tolist()})


def draw(seeds: Seeds) -> list[Panel]:
    """Two of the dimensions of one class: true points, the start, and tuned either way."""
    one = seeds.one(0)
    panels = [Panel("true", points=_of_class(0).sample(300, generator=one.torch("truth")[0])[0][:, :2].numpy())]
    models = {"start": _start(one)[0], "plain reward": _tuned(one, **PLAIN[0]), "by agreement": _tuned(one, **AWARE[0])}
    for title, model in models.items():
        panels.append(Panel(title, points=_samples(model, one)[0, 0, :, :2].numpy()))
    return panels
