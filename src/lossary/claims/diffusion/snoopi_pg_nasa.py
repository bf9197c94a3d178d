"""SNOOPI: random guidance scales against fixed ones; and what steers a one-step generator away from a negative prompt?

Distillation is of eight unevenly weighted Gaussians on a circle, four classes of two, whose perfect denoiser is the
teacher, and of 8x8 digits by a U-Net, into perceptrons on 64 pixels. Negative prompts are tried on a one-step generator
with cross-attention over words: "photo" is any of four corners, "photo left" one of the two on the left. The claim on
these was registered anew, after a result had been seen, to say what either arm costs.
"""

import copy
import functools
from collections.abc import Callable, Sequence

import torch
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    ProperGuidanceDistillation,
    negative_away_attention,
    random_guidance_scale,
    steer_away,
)
from lossary.diffusion._denoiser import Counted, Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._noise import noise
from lossary.diffusion._process import over
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.tasks import (
    Tally,
    digit_distance,
    digit_student,
    digit_teacher,
    distil,
    drawn_from,
    fit_denoiser,
    generated,
    minimise,
    sheet,
    sliced_wasserstein,
    stacked_denoiser,
    stacked_mlp,
    uneven_ring,
)

CLASSES = torch.eye(4).repeat_interleave(2, dim=0)  # of the modes, (8, 4)
LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RATES = (0.0005, 0.001, 0.002, 0.004)


def _draw(n: int, generators: Sequence[Generator]) -> tuple[Tensor, Tensor]:
    """Points and their classes, one of ten of them missing."""
    truth = uneven_ring()
    rows = [(*truth.sample(n, generator=g), torch.rand(n, 1, generator=g) > 0.1) for g in generators]
    x, mode, kept = (torch.stack(part) for part in zip(*rows))
    return x.float(), CLASSES[mode] * kept


def _teacher(truth: Mixture, x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
    """Exact for each class, and without."""
    variance = truth.scales[0].to(x) ** 2
    total = over(sigma, x) ** 2 + variance
    means, weights = truth.means.to(x), truth.weights.to(x)
    logits = weights.log() - (x.unsqueeze(-2) - means).square().sum(-1) / (2 * total)
    if condition is not None:
        logits = logits.masked_fill(condition @ CLASSES.mT < 0.5, -torch.inf)
    return x * variance / total + logits.softmax(-1) @ means * (1 - variance / total)


@functools.cache
def _fitted(seeds: Seeds) -> Denoiser:
    """Trained once; whoever trains on takes a copy."""
    denoise = stacked_denoiser(2, seeds, conditions=4)
    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(500, smoke=2))
    return denoise


def _distilled(
    seeds: Seeds, *, lr: float, low: float = 0.5, high: float = 4.0, digits: bool = False
) -> tuple[ProperGuidanceDistillation, Tally]:
    start = digit_student(seeds, conditions=10) if digits else _fitted(seeds)
    procedure = ProperGuidanceDistillation(
        OneStepGenerator(copy.deepcopy(start)),
        copy.deepcopy(start),
        digit_teacher(seeds) if digits else functools.partial(_teacher, uneven_ring()),
        levels=LEVELS,
        scales=random_guidance_scale(low, high),
    )
    tally = Tally(procedure)
    each = torch.eye(10).repeat(3, 1) if digits else torch.eye(4).repeat(16, 1)
    classes, shape = each.expand(len(seeds), -1, -1), (len(seeds), len(each), 64 if digits else 2)

    def batch(generators: Sequence[Generator]) -> dict[str, Tensor]:
        return {"latent": noise(shape, generators), "condition": classes}

    distil(procedure, batch, seeds=seeds, steps=seeds.few(200 if digits else 300, smoke=2), lr=lr)
    return procedure, tally


def _distance(seeds: Seeds, **setting: float) -> tuple[list[float], float, int]:
    """Averaged over the classes; the evaluations for a sample, and those of training."""
    (procedure, tally), truth = _distilled(seeds, **setting), uneven_ring()
    training = tally.taken()
    n, latents, truths = seeds.few(500), seeds.torch("latent"), seeds.torch("true")
    found, true = [], []
    for c in range(4):
        condition = torch.eye(4)[c].expand(len(seeds), n, -1)
        with torch.no_grad():
            found.append(procedure(noise((len(seeds), n, 2), latents), condition))
        two = slice(2 * c, 2 * c + 2)
        true += drawn_from(Mixture(truth.means[two], truth.scales[two], truth.weights[two]))(n, truths)
    return sliced_wasserstein(torch.stack(found), torch.stack(true)).mean(0).tolist(), tally.taken() / (4 * n), training


def _digits(seeds: Seeds, **setting: float) -> tuple[Tensor, float, int]:
    """Digits (S, n, 1, 8, 8), the classes in turn; the evaluations for one, and those of training."""
    procedure, tally = _distilled(seeds, digits=True, **setting)
    training = tally.taken()

    def generate(latent: Tensor) -> Tensor:
        classes = torch.eye(10)[torch.arange(latent.shape[1]) % 10]
        return procedure(latent, classes.expand(len(latent), -1, -1))

    x = generated(generate, seeds, dimension=64)
    return x.unflatten(-1, (1, 8, 8)), tally.taken() / x.shape[1], training


def _digit_distance(seeds: Seeds, **setting: float) -> tuple[list[float], float, int]:
    x, *costs = _digits(seeds, **setting)
    return digit_distance(x).tolist(), *costs


RANDOM = [{"lr": lr} for lr in RATES]
FIXED = [{"lr": lr, "low": k, "high": k} for lr in RATES[1:3] for k in (1.0, 2.25)]


def _compare(measure: Callable[..., tuple[list[float], float, int]], seeds: Seeds) -> Arms:
    def score(seeds: Seeds, **setting: float) -> list[float]:
        return measure(seeds, **setting)[0]

    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (RANDOM, FIXED))
    values, evaluations, training = zip(*(measure(seeds, **setting) for setting in (ours, theirs)))
    costs = {"evaluations": list(evaluations), "training evaluations": list(training)}
    return Arms(*values, {**costs, "method": ours, "baseline": theirs})


@claim(
    says="Guided by random scales from 0.5 to 4, distillation ends nearer the classes' data than by a fixed scale",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1 by class; 4 classes of 2 Gaussians in 2-D, exact teacher, MLP of 64, 300 steps of 64; 4 settings"
    " each, the fixed scales being 1 and 2.25",
)
def random_scales_beat_fixed_ones(seeds: Seeds) -> Arms:
    return _compare(_distance, seeds)


@claim(
    says="On real digits, too, distillation guided by random scales from 0.5 to 4 ends nearer the data than by a fixed"
    " scale",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="Frechet distance of 32 features, all classes alike; digits 8x8, U-Net as teacher, MLP of 128, 200 steps of"
    " 30; 4 settings each, the fixed scales being 1 and 2.25",
)
def random_scales_beat_fixed_ones_on_digits(seeds: Seeds) -> Arms:
    return _compare(_digit_distance, seeds)


# Negative prompts

CORNERS = Mixture(torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=torch.float64), 0.15)
WORDS = ("photo", "left", "right", "down", "up")
MEANT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 1, 0, 1]], dtype=torch.float64)
PROMPTS = torch.eye(5, dtype=torch.bool) | (torch.arange(5) == 0)  # "photo", "photo left", ...: which words


class _Painter(nn.Module):
    """latent (S, B, 2) and words (S or 1, B, 5) to points: one query, cross-attention over words, a perceptron."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.query = stacked_mlp((2, 64, 32), seeds, activation="silu")
        self.words = nn.Parameter(
            torch.stack([0.5 * torch.randn(2, 5, 32, generator=g) for g in seeds.torch("words")]).transpose(0, 1)
        )
        self.last = stacked_mlp((32, 64, 64, 2), seeds, activation="silu")

    def forward(self, latent: Tensor, words: Tensor, *, away: int = 0, alpha: float = 0.0) -> Tensor:
        query = self.query(latent)
        key, value = (w.unsqueeze(1).expand(-1, latent.shape[1], -1, -1) for w in self.words)
        mask = torch.zeros(words.shape).masked_fill(~words, -torch.inf).unsqueeze(-2)
        negative = PROMPTS[away]
        seen = negative_away_attention(
            query.unsqueeze(-2), key, value, key[:, :, negative], value[:, :, negative], alpha=alpha, mask=mask
        )
        return self.last(query + seen.squeeze(-2))


@functools.cache
def _painter(seeds: Seeds) -> _Painter:
    """Learns the exact flow from noise to points of each prompt."""
    painter, generators = _Painter(seeds), seeds.torch("painter")
    pool = seeds.few(500)
    latent = noise((len(seeds), pool, 2), generators)
    sigmas = karras_sigmas(20, low=0.02, high=20.0)
    target = torch.stack(
        [heun(Mixture(CORNERS.means, 0.15, w + 1e-30).denoise, 20 * latent.double(), sigmas).float() for w in MEANT]
    )
    which = torch.arange(len(seeds))[:, None]
    prompt = torch.arange(100) % 5

    def objective() -> Tensor:
        rows = torch.stack([torch.randint(pool, (100,), generator=g) for g in generators])
        found = painter(latent[which, rows], PROMPTS[prompt].expand(len(seeds), -1, -1))
        return (found - target[prompt, which, rows]).square().mean((1, 2)).sum()

    minimise(objective, painter.parameters(), steps=seeds.few(600, smoke=2), lr=0.003)
    return painter


def _painted(seeds: Seeds, *, alpha: float = 0.0, scale: float = 1.0) -> tuple[Tensor, float]:
    """Points of "photo" without each other word in turn, (4, S, n, 2), by attention or by guiding the output.

    And the evaluations that each takes.
    """
    painter, latent = Counted(_painter(seeds)), noise((len(seeds), seeds.few(500), 2), seeds.torch("latent"))
    photo, shape = PROMPTS[0], (len(seeds), latent.shape[1], 5)
    found = []
    for away in range(1, 5):
        with torch.no_grad():
            x = painter(latent, photo.expand(shape), away=away, alpha=alpha)
            if scale != 1:
                bad = painter(latent, PROMPTS[away].expand(shape))
                x = bad + scale * (x - bad)
        found.append(x)
    return torch.stack(found), painter.evaluations / len(found)


def _failures(seeds: Seeds, **setting: float) -> tuple[list[float], float]:
    """Percentage of points that show what was not wanted, or are further than 0.6 from what was; evaluations."""
    found, evaluations = _painted(seeds, **setting)
    bad = torch.zeros(len(seeds))
    for x, meant in zip(found, MEANT[1:]):
        wanted = CORNERS.means[meant == 0].float().expand(len(seeds), -1, -1)
        bad += (torch.cdist(x, wanted).amin(-1) > 0.6).float().mean(-1) / 4
    return (100 * bad).tolist(), evaluations


@claim(
    says="Subtracting the negative prompt's attention removes it more often than guiding the one-step output",
    kind="superiority",
    metric="error rate",
    scale="points that show the unwanted or nothing; 4 corners in 2-D, 5 words, one-step network of 64, 1 evaluation"
    " against 2; the same negative prompts, 4 scales each",
)
def attention_removes_what_guidance_blurs(seeds: Seeds) -> Arms:
    def score(seeds: Seeds, **setting: float) -> list[float]:
        return _failures(seeds, **setting)[0]

    ours = tune(score, [{"alpha": alpha} for alpha in (0.1, 0.2, 0.5, 1.0)], seeds, better="lower")
    theirs = tune(score, [{"scale": scale} for scale in (1.5, 2.5, 4.0, 7.5)], seeds, better="lower")
    errors, evaluations = zip(*(_failures(seeds, **setting) for setting in (ours, theirs)))
    return Arms(*errors, {"evaluations": list(evaluations), "method": ours, "baseline": theirs})


@claim(
    says="Steering attention away from a negative prompt costs at most 1.89% more arithmetic, not twice as much",
    kind="exact",
    metric="deviation",
    tolerance=0.0,
    scale="floating-point operations beyond 1.89%, counted on the network of Stable Diffusion 1.5, 64x64 latents",
)
def it_costs_next_to_nothing(seeds: Seeds) -> Arms:
    from diffusers import UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    width = (32, 64, 128, 128) if seeds.smoke else (320, 640, 1280, 1280)
    with torch.device("meta"):
        unet = UNet2DConditionModel(block_out_channels=width, cross_attention_dim=768, attention_head_dim=8)
        counts = []
        for negative in (None, torch.zeros(1, 77, 768)):
            if negative is not None:
                steer_away(unet, negative)
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                unet(torch.zeros(1, 4, 64, 64), torch.zeros(1), torch.zeros(1, 77, 768))
            counts.append(counter.get_total_flops())
    more = counts[1] / counts[0] - 1
    return Arms([max(0.0, more - 0.0189)], None, {"more": more})


def draw(seeds: Seeds) -> list[Panel]:
    """A "photo" as it is, without "left" by guiding the output, and by attention; and one-step digits by guidance."""
    one = seeds.one(0)
    found = {"photo": {}, "guided away from left": {"scale": 2.5}, "NASA, away from left": {"alpha": 0.5}}
    panels = [Panel(title, points=_painted(one, **setting)[0][0, 0].numpy()) for title, setting in found.items()]
    for title, setting in (("random scales", RANDOM[2]), ("fixed scale 2.25", FIXED[3])):
        x, *_ = _digits(one, **setting)
        panels.append(Panel(title, image=sheet(x[0, :15])))
    return panels
