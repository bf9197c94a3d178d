"""LongAlign: does a preference score with less of its common part align better, and what is that part?

Points of eight dimensions: three pairs of them hold an attribute of three values each, the last pair is how good a
point looks. A prompt has a sentence for each attribute. A preference model, two networks and a cosine as in CLIP, is
learnt from simulated choices between two points, which go by attributes that match and by looks. A conditional
denoiser that learnt from careless prompts is then tuned by its score, through ten steps of the sampler, and judged by
the exact posterior of the attributes and the distance to the true points.
"""

import copy
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ReweightedPreferenceLoss, decompose_preference, spaced_gradients
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import auroc, fit_denoiser, minimise, sliced_wasserstein, stacked_denoiser, stacked_mlp

ATTRIBUTES, VALUES, SPREAD = 3, 3, 0.4
ANGLE = torch.arange(VALUES) * (2 * torch.pi / VALUES)
CORNERS = torch.stack([ANGLE.cos(), ANGLE.sin()], dim=1)
SIGMAS = karras_sigmas(10, low=0.1, high=10.0).float()
EVERY, BATCH = 5, 32


def _prompts(n: int, generators: list[torch.Generator]) -> Tensor:
    """Values of the attributes, (S, n, 3)."""
    return torch.stack([torch.randint(VALUES, (n, ATTRIBUTES), generator=g) for g in generators])


def _points(values: Tensor, generators: list[torch.Generator]) -> Tensor:
    """(S, n, 8): the attributes' pairs, then the looks, whose first number is what is liked."""
    around = torch.cat([CORNERS[values].flatten(-2), torch.zeros(*values.shape[:-1], 2)], dim=-1)
    return around + SPREAD * torch.stack([torch.randn(x.shape, generator=g) for x, g in zip(around, generators)])


def _condition(values: Tensor) -> Tensor:
    return F.one_hot(values, VALUES).flatten(-2).float()


def _data(n: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Points with careless prompts: half of the sentences say anything."""
    values = _prompts(n, generators)
    careless = torch.stack([torch.rand(n, ATTRIBUTES, generator=g) < 0.5 for g in generators])
    said = torch.where(careless, _prompts(n, generators), values)
    return _points(values, generators), _condition(said)


class _Preference(nn.Module):
    """Embeddings of points and of sentences; a prompt's is the mean of its sentences', each of unit norm."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.image = stacked_mlp((8, 64, 16), seeds, activation="silu")
        self.sentence = stacked_mlp((ATTRIBUTES * VALUES, 32, 16), seeds, activation="silu")

    def text(self, values: Tensor) -> Tensor:
        said = F.one_hot(values + VALUES * torch.arange(ATTRIBUTES), ATTRIBUTES * VALUES).float()
        found = F.normalize(self.sentence(said.flatten(1, 2)), dim=-1)
        return found.unflatten(1, values.shape[1:]).mean(-2)


def _taught(seeds: Seeds) -> _Preference:
    """Trained on choices between two points for a prompt, by logistic utility: matches and looks."""
    model, generators = _Preference(seeds), seeds.torch("choices")

    def objective() -> Tensor:
        asked, scores, utility = _prompts(128, generators), [], []
        text = model.text(asked)
        for _ in range(2):
            same = torch.stack([torch.rand(128, ATTRIBUTES, generator=g) < 0.5 for g in generators])
            values = torch.where(same, asked, _prompts(128, generators))
            x = _points(values, generators)
            utility.append((values == asked).sum(-1) + x[..., 6] / SPREAD)
            scores.append(10 * (text * F.normalize(model.image(x), dim=-1)).sum(-1))
        chance = torch.sigmoid(2 * (utility[0] - utility[1]))
        first = torch.stack([torch.rand(128, generator=g) for g in generators]) < chance
        values = F.binary_cross_entropy_with_logits(scores[0] - scores[1], first.float(), reduction="none")
        return values.mean(-1).sum()

    minimise(objective, model.parameters(), steps=seeds.few(400, smoke=2), lr=0.005)
    return model.requires_grad_(False)


Begun = Callable[[Seeds], tuple[Denoiser, _Preference]]


def _start(seeds: Seeds) -> tuple[Denoiser, _Preference]:
    denoise = stacked_denoiser(8, seeds, conditions=ATTRIBUTES * VALUES)
    fit_denoiser(denoise, _data, seeds=seeds, steps=seeds.few(300, smoke=2), batch=64)
    return denoise, _taught(seeds)


def _tuned(seeds: Seeds, *, weight: float, lr: float, begun: Begun = _start) -> Denoiser:
    start, preference = begun(seeds)
    denoise, generators = copy.deepcopy(start), seeds.torch("tuning")
    loss = ReweightedPreferenceLoss(weight)
    steps = seeds.few(150, smoke=2)
    optimizer = torch.optim.Adam(denoise.parameters(), lr=lr)
    for step in range(steps):
        values = _prompts(BATCH, generators)
        condition = _condition(values)
        spaced = spaced_gradients(denoise, SIGMAS, every=EVERY, offset=step % EVERY)
        noise = torch.stack([torch.randn(BATCH, 8, generator=g) for g in generators])
        x = euler(lambda y, sigma: spaced(y, sigma, condition), SIGMAS[0] * noise, SIGMAS)  # noqa: B023
        optimizer.zero_grad()
        loss(preference.image(x), preference.text(values)).mean(-1).sum().backward()
        for parameter in denoise.parameters():  # the paper clips at 0.3; here by seed
            size = parameter.grad.flatten(1).norm(dim=1).clamp(min=0.3) / 0.3
            parameter.grad /= size.view(-1, *[1] * (parameter.ndim - 1))
        optimizer.step()
    return denoise


@torch.no_grad()
def _samples(denoise: Denoiser, seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Points (S, n, 8) and what was asked for."""
    generators = seeds.torch("test")
    values = _prompts(seeds.few(1000, smoke=16), generators)
    noise = torch.stack([torch.randn(values.shape[1], 8, generator=g) for g in generators])
    condition = _condition(values)
    return euler(lambda y, sigma: denoise(y, sigma, condition), SIGMAS[0] * noise, SIGMAS), values


def _aligned(denoise: Denoiser, seeds: Seeds) -> list[float]:
    """Attributes whose likeliest value is the one asked for, in percent."""
    x, values = _samples(denoise, seeds)
    likeliest = (x[..., :6].unflatten(-1, (ATTRIBUTES, 2)) @ CORNERS.mT).argmax(-1)
    return (100 * (likeliest == values).double().mean((-2, -1))).tolist()


def _distance(denoise: Denoiser, seeds: Seeds) -> list[float]:
    """Sliced W1 to as many true points for the same prompts."""
    x, values = _samples(denoise, seeds)
    return sliced_wasserstein(x, _points(values, seeds.torch("truth"))).tolist()


def _score(seeds: Seeds, *, measure=_aligned, **setting: object) -> list[float]:
    return measure(_tuned(seeds, **setting), seeds)


REWEIGHTED, PLAIN = ([{"weight": w, "lr": lr} for lr in (0.0003, 0.001, 0.003, 0.01)] for w in (0.3, 1.0))


def _compare(measure, seeds: Seeds) -> Arms:
    """Both tuned for alignment, whatever is measured then."""
    score = partial(_score, begun=cache(_start))  # the start is the same for all settings
    ours, theirs = (tune(score, grid, seeds) for grid in (REWEIGHTED, PLAIN))
    score = partial(score, measure=measure)
    details = {"evaluations": 2 * [len(SIGMAS) - 1], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="Tuned by the reweighted score, samples have more of the attributes asked for than by the plain score",
    kind="superiority",
    metric="accuracy",
    scale="3 attributes of 3 values in 8-D, MLP of 64, preference model from choices, 150 steps of 32; 4 rates each",
)
def reweighting_aligns_better(seeds: Seeds) -> Arms:
    return _compare(_aligned, seeds)


@claim(
    says="At rates that align best, samples tuned by the reweighted score stay nearer the true ones than by the plain",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="sliced W1; 3 attributes of 3 values in 8-D, MLP of 64, preference model from choices, 150 steps; 4 rates",
)
def reweighting_overfits_less(seeds: Seeds) -> Arms:
    return _compare(_distance, seeds)


def _parts(seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """Text-relevant and text-irrelevant part of true pairs and of pairs put together at random, and which is which."""
    preference, generators = _taught(seeds), seeds.torch("pairs")
    n = seeds.few(4000, smoke=100)
    values = _prompts(n, generators)
    paired = torch.arange(n) % 2 > 0
    x = _points(torch.where(paired[:, None], values, _prompts(n, generators)), generators)
    return *decompose_preference(preference.image(x), preference.text(values)), paired


@claim(
    says="The text-relevant part of the score tells true pairs from random ones better than the whole score",
    kind="superiority",
    metric="AUROC",
    scale="4000 pairs of prompt and point, 3 attributes of 3 values in 8-D, preference model from choices",
)
def relevant_part_tells_pairs(seeds: Seeds) -> Arms:
    relevant, irrelevant, paired = _parts(seeds)
    return Arms(auroc(relevant, paired).tolist(), auroc(relevant + irrelevant, paired).tolist())


@claim(
    says="The text-irrelevant part of the score tells true pairs from random ones no better than chance",
    kind="equality",
    metric="AUROC",
    scale="4000 pairs of prompt and point, 3 attributes of 3 values in 8-D, preference model from choices",
)
def irrelevant_part_does_not(seeds: Seeds) -> Arms:
    _, irrelevant, paired = _parts(seeds)
    return Arms(auroc(irrelevant, paired).tolist(), [50.0] * len(seeds))


def draw(seeds: Seeds) -> list[Panel]:
    """First attribute against looks (to the right is what is liked): true points, the start, tuned either way."""
    one = seeds.one(0)
    start, _ = _start(one)
    models = {"start": start, "plain score": _tuned(one, **PLAIN[1]), "reweighted": _tuned(one, **REWEIGHTED[1])}
    found = {title: _samples(model, one)[0][0] for title, model in models.items()}
    found = {"true": _points(_prompts(400, one.torch("drawn")), one.torch("truth"))[0], **found}
    return [Panel(title, points=x[:400, [6, 0]].numpy()) for title, x in found.items()]
