"""SNOOPI: random guidance scales against fixed ones; and what steers a one-step generator away from a negative prompt?

Distillation is of eight unevenly weighted Gaussians on a circle, four classes of two, whose perfect denoiser is the
teacher. Negative prompts are tried on a one-step generator with cross-attention over words: "photo" is any of four
corners, "photo left" one of the two on the left.
"""

import copy
import functools

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    ProperGuidanceDistillation,
    negative_away_attention,
    random_guidance_scale,
    steer_away,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._distil import OneStepGenerator, karras_levels
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._process import over
from lossary.diffusion._samplers import heun, karras_sigmas
from lossary.roles.procedure import advance
from lossary.tasks import fit_denoiser, sliced_wasserstein, stacked_denoiser, stacked_mlp

TRUTH = ring(8, radius=1.4, scale=0.12, weights=torch.linspace(1, 4, 8, dtype=torch.float64))
CLASSES = torch.eye(4).repeat_interleave(2, dim=0)  # of the modes, (8, 4)
LEVELS = karras_levels(0.02, 20.0, first=0.02, last=0.98)
RATES = (0.0005, 0.001, 0.002, 0.004)


def _draw(n: int, generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
    """Points and their classes, one of ten of them missing."""
    rows = [(*TRUTH.sample(n, generator=g), torch.rand(n, 1, generator=g) > 0.1) for g in generators]
    x, mode, kept = (torch.stack(part) for part in zip(*rows))
    return x.float(), CLASSES[mode] * kept


def _teacher(x: Tensor, sigma: Tensor, condition: Tensor | None = None) -> Tensor:
    """Exact for each class, and without."""
    variance = TRUTH.scales[0].to(x) ** 2
    total = over(sigma, x) ** 2 + variance
    means, weights = TRUTH.means.to(x), TRUTH.weights.to(x)
    logits = weights.log() - (x.unsqueeze(-2) - means).square().sum(-1) / (2 * total)
    if condition is not None:
        logits = logits.masked_fill(condition @ CLASSES.mT < 0.5, -torch.inf)
    return x * variance / total + logits.softmax(-1) @ means * (1 - variance / total)


def _normal(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(n, 2, generator=g) for g in generators])


@functools.cache
def _fitted(seeds: Seeds) -> Denoiser:
    """Trained once; whoever trains on takes a copy."""
    denoise = stacked_denoiser(2, seeds, conditions=4)
    fit_denoiser(denoise, _draw, seeds=seeds, steps=seeds.few(500, smoke=2))
    return denoise


def _distance(seeds: Seeds, *, lr: float, low: float = 0.5, high: float = 4.0) -> list[float]:
    """Averaged over the classes."""
    start = _fitted(seeds)
    procedure = ProperGuidanceDistillation(
        OneStepGenerator(copy.deepcopy(start)),
        copy.deepcopy(start),
        _teacher,
        levels=LEVELS,
        scales=random_guidance_scale(low, high),
    )
    steps, generators = seeds.few(300, smoke=2), seeds.torch("distil")
    optimizers = {n: torch.optim.Adam(p.parameters(), lr=lr, betas=(0.0, 0.99)) for n, p in procedure.players().items()}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, steps) for o in optimizers.values()]
    classes = torch.eye(4).repeat(16, 1).expand(len(seeds), -1, -1)
    for step in range(steps):
        batch = {"latent": _normal(64, generators), "condition": classes}
        advance(procedure, batch, optimizers, step=step, generator=generators)
        for schedule in schedules:
            schedule.step()
    n, latents, truths = seeds.few(500), seeds.torch("latent"), seeds.torch("true")
    found, true = [], []
    for c in range(4):
        condition = torch.eye(4)[c].expand(len(seeds), n, -1)
        with torch.no_grad():
            found.append(procedure(_normal(n, latents), condition))
        pair = Mixture(TRUTH.means[2 * c : 2 * c + 2], 0.12, TRUTH.weights[2 * c : 2 * c + 2])
        true.append(torch.stack([pair.sample(n, generator=g)[0] for g in truths]).float())
    return sliced_wasserstein(torch.stack(found), torch.stack(true)).mean(0).tolist()


@claim(
    says="Guided by random scales from 0.5 to 4, distillation ends nearer the classes' data than by a fixed scale",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1 by class; 4 classes of 2 Gaussians in 2-D, exact teacher, MLP of 64, 300 steps of 64; 4 settings"
    " each, the fixed scales being 1 and 2.25",
)
def random_scales_beat_fixed_ones(seeds: Seeds) -> Arms:
    ours = tune(_distance, [{"lr": lr} for lr in RATES], seeds, better="lower")
    fixed = [{"lr": lr, "low": k, "high": k} for lr in RATES[1:3] for k in (1.0, 2.25)]
    theirs = tune(_distance, fixed, seeds, better="lower")
    return Arms(_distance(seeds, **ours), _distance(seeds, **theirs), {"method": ours, "baseline": theirs})


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
    steps, pool = seeds.few(600, smoke=2), seeds.few(500)
    latent = _normal(pool, generators)
    sigmas = karras_sigmas(20, low=0.02, high=20.0)
    target = torch.stack(
        [heun(Mixture(CORNERS.means, 0.15, w + 1e-30).denoise, 20 * latent.double(), sigmas).float() for w in MEANT]
    )
    optimizer = torch.optim.Adam(painter.parameters(), lr=0.003)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    which = torch.arange(len(seeds))[:, None]
    prompt = torch.arange(100) % 5
    for _ in range(steps):
        rows = torch.stack([torch.randint(pool, (100,), generator=g) for g in generators])
        found = painter(latent[which, rows], PROMPTS[prompt].expand(len(seeds), -1, -1))
        optimizer.zero_grad()
        (found - target[prompt, which, rows]).square().mean((1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    return painter


def _painted(seeds: Seeds, *, alpha: float = 0.0, scale: float = 1.0) -> Tensor:
    """Points of "photo" without each other word in turn, (4, S, n, 2): by attention, or by guiding the output."""
    painter, latent = _painter(seeds), _normal(seeds.few(500), seeds.torch("latent"))
    photo, shape = PROMPTS[0], (len(seeds), latent.shape[1], 5)
    found = []
    for away in range(1, 5):
        with torch.no_grad():
            x = painter(latent, photo.expand(shape), away=away, alpha=alpha)
            if scale != 1:
                bad = painter(latent, PROMPTS[away].expand(shape))
                x = bad + scale * (x - bad)
        found.append(x)
    return torch.stack(found)


def _failures(seeds: Seeds, **setting: float) -> list[float]:
    """Percentage of points that show what was not wanted, or are further than 0.6 from what was."""
    found = _painted(seeds, **setting)
    bad = torch.zeros(len(seeds))
    for x, meant in zip(found, MEANT[1:]):
        wanted = CORNERS.means[meant == 0].float().expand(len(seeds), -1, -1)
        bad += (torch.cdist(x, wanted).amin(-1) > 0.6).float().mean(-1) / 4
    return (100 * bad).tolist()


@claim(
    says="Subtracting the negative prompt's attention removes it more often than guiding the one-step output",
    kind="superiority",
    metric="error rate",
    scale="points that show the unwanted or nothing; 4 corners in 2-D, 5 words, one-step network of 64; the same"
    " negative prompts, 4 scales each",
)
def attention_removes_what_guidance_blurs(seeds: Seeds) -> Arms:
    ours = tune(_failures, [{"alpha": alpha} for alpha in (0.1, 0.2, 0.5, 1.0)], seeds, better="lower")
    theirs = tune(_failures, [{"scale": scale} for scale in (1.5, 2.5, 4.0, 7.5)], seeds, better="lower")
    return Arms(_failures(seeds, **ours), _failures(seeds, **theirs), {"method": ours, "baseline": theirs})


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
    """A "photo" as it is, without "left" by guiding the output, and by attention."""
    one = seeds.one(0)
    found = {"photo": {}, "guided away from left": {"scale": 2.5}, "NASA, away from left": {"alpha": 0.5}}
    return [Panel(title, points=_painted(one, **setting)[0, 0].numpy()) for title, setting in found.items()]
