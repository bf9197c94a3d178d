"""Directional consistency: do eight points of a new domain keep all modes of the old, and how steady is the loss?

Source: eight Gaussians on a ring. Target: the ring turned by ten degrees, moved, its Gaussians tighter, of which
eight points are known, some modes twice and some not at all. Every arm starts from the same denoiser of the source,
which may look at a source sample beside the noised one, and makes target samples of source samples noised to 0.6.
"""

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from itertools import cycle

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    PhasicContentFusion,
    directional_distribution_consistency_loss,
    phasic_adaptation_loss,
)
from lossary.diffusion._denoiser import Denoiser
from lossary.diffusion._mixture import Mixture, ring
from lossary.diffusion._noise import noise
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import ancestral, process_sigmas
from lossary.tasks import minimise, sliced_wasserstein, stacked_mlp

SOURCE = ring(8, radius=1.5, scale=0.15)
TURN = math.radians(10)
TURNED = SOURCE.means @ torch.tensor([[math.cos(TURN), math.sin(TURN)], [-math.sin(TURN), math.cos(TURN)]]).double()
TARGET = Mixture(TURNED + torch.tensor([1.5, 0.5]), 0.08)
SHOTS, BATCH, START = 8, 32, 0.6
SIGMAS = process_sigmas(cosine(), 15, first=START).float()
STEPS = 200  # of adapting; one on a consistency sees a generated and a target sample, a plain one the target's alone
PROJECTION = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))


def _encode(x: Tensor) -> Tensor:
    """A fixed random network in the place of CLIP's."""
    return torch.tanh(0.5 * x @ PROJECTION)


class _Network(nn.Module):
    """v from (x_t, t), with a source sample noised alike and fused in the middle where there is one."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.into, self.middle, self.out = (
            stacked_mlp(sizes, seeds, activation="silu") for sizes in ((6, 64), (128, 64, 64), (64, 64, 2))
        )
        self.fusion = PhasicContentFusion(self.middle, dim=-1)
        self.generators = seeds.torch("content")

    def _features(self, x: Tensor, t: Tensor) -> Tensor:
        angle = math.pi * t[..., None]
        waves = [angle.sin(), angle.cos(), (2 * angle).sin(), (2 * angle).cos()]
        return F.silu(self.into(torch.cat([x, *waves], dim=-1)))

    def forward(self, x: Tensor, t: Tensor, content: Tensor | None = None) -> Tensor:
        t = over(t, x[..., 0]).expand(x.shape[:-1])
        features = self._features(x, t)
        if content is not None:
            with torch.no_grad():
                noised = cosine().noised(content, noise(content, self.generators), t)
                beside = self._features(noised, t)
            features = features + self.fusion(features, beside, t, generator=self.generators)
        return self.out(features)


def _source(n: int, generators: list[torch.Generator]) -> Tensor:
    return torch.stack([SOURCE.sample(n, generator=g)[0].float() for g in generators])


def _shots(seeds: Seeds) -> Tensor:
    """The few target points, (S, 8, 2)."""
    return torch.stack([TARGET.sample(SHOTS, generator=g)[0].float() for g in seeds.torch("shots")])


def _start(seeds: Seeds) -> Denoiser:
    """Trained on the source, in every second step with the sample itself as content."""
    denoise, generators = Denoiser(_Network(seeds), cosine(), "v"), seeds.torch("source")
    shown = cycle((False, True))  # the sample itself

    def objective() -> Tensor:
        x = _source(96, generators)
        t = 0.001 + 0.799 * torch.stack([torch.rand(96, generator=g) for g in generators])
        sigma = denoise.process.ratio(t)
        found = denoise(x + over(sigma, x) * noise(x, generators), sigma, *([x] if next(shown) else []))
        return ((1 + sigma**-2) * (found - x).square().mean(-1)).mean(-1).sum()

    minimise(objective, denoise.parameters(), steps=seeds.few(800, smoke=2), lr=0.006)
    return denoise


def _pairwise(made: Tensor, source: Tensor) -> Tensor:
    """Divergence of the batch's cosine similarities from those of the source, as earlier papers keep diversity."""

    def likeness(features: Tensor) -> Tensor:
        unit = F.normalize(features, dim=-1)
        own = torch.eye(features.shape[-2], dtype=torch.bool)
        return (unit @ unit.mT).masked_fill(own, -1e9).log_softmax(-1)

    want, have = likeness(source), likeness(made)
    return (want.exp() * (want - have)).sum(-1)


def _directional(seeds: Seeds) -> Callable[[Tensor, Tensor], Tensor]:
    mean = _encode(SOURCE.sample(5000, generator=torch.Generator().manual_seed(4))[0].float()).mean(0)
    direction = _encode(_shots(seeds)).mean(1, keepdim=True) - mean
    return partial(directional_distribution_consistency_loss, direction=direction)


def _times(batch: int, generators: list[torch.Generator]) -> Tensor:
    """Half of each phase: 0 to 0.3 and 0.3 to 0.8."""
    place = torch.stack([torch.rand(batch, generator=g) for g in generators]).clamp(min=0.005)
    late = torch.arange(batch) % 2 > 0
    return torch.where(late, 0.3 * place, 0.3 + 0.5 * place)


def _adapted(seeds: Seeds, *, loss: str, lr: float, weight: float = 1.0, begun=_start, steps: int = STEPS) -> Denoiser:
    denoise, generators, shots = copy.deepcopy(begun(seeds)), seeds.torch("adapting"), _shots(seeds)
    consistency = _pairwise if loss == "pairwise" else _directional(seeds)

    def objective() -> Tensor:
        x, t = _source(BATCH, generators), _times(BATCH, generators)
        rows = torch.stack([torch.randint(SHOTS, (BATCH,), generator=g) for g in generators])
        target = shots.gather(1, rows[..., None].expand(-1, -1, 2))
        if loss == "plain":
            sigma = denoise.process.ratio(t)
            found = denoise(target + over(sigma, target) * noise(target, generators), sigma)
            values = (found - target).abs().mean(-1) / sigma
        else:
            values = phasic_adaptation_loss(
                denoise,
                x,
                target,
                t,
                process=denoise.process,
                encode=_encode,
                consistency=lambda made, source: weight * consistency(made, source),
                generator=generators,
            )
        return values.mean(-1).sum()

    minimise(objective, denoise.parameters(), steps=seeds.few(steps, smoke=2), lr=lr)
    return denoise


@torch.no_grad()
def _samples(denoise: Denoiser, seeds: Seeds, *, content: bool) -> Tensor:
    """(S, n, 2), each of a source sample."""
    generators = seeds.torch("test")
    x = _source(seeds.few(1000, smoke=16), generators)
    start = x + SIGMAS[0] * noise(x, generators)
    shown = [x] if content else []
    return ancestral(lambda y, sigma: denoise(y, sigma, *shown), start, SIGMAS, eta=0.0)


def _made(seeds: Seeds, **setting: object) -> Tensor:
    return _samples(_adapted(seeds, **setting), seeds, content=setting["loss"] != "plain")


def _mode_error(seeds: Seeds, **setting: object) -> list[float]:
    """Total variation to an eighth in each target mode, in percent; further than 0.5 from all is a mode of its own."""
    found = _made(seeds, **setting)
    distance, nearest = torch.cdist(found, TARGET.means.float().expand(len(seeds), -1, -1)).min(-1)
    share = F.one_hot(torch.where(distance > 0.5, 8, nearest), 9).double().mean(1)
    return (50 * (share - torch.tensor([1 / 8] * 8 + [0.0])).abs().sum(-1)).tolist()


def _distance(seeds: Seeds, **setting: object) -> list[float]:
    """Sliced W1 to the target domain."""
    found = _made(seeds, **setting)
    truth = torch.stack([TARGET.sample(found.shape[1], generator=g)[0].float() for g in seeds.torch("truth")])
    return sliced_wasserstein(found, truth).tolist()


DIRECTIONAL, PAIRWISE = (
    [{"loss": loss, "lr": lr, "weight": w} for lr in (0.001, 0.003) for w in (3.0, 30.0)]
    for loss in ("directional", "pairwise")
)
PLAIN = [{"loss": "plain", "lr": lr} for lr in (0.0003, 0.001, 0.003, 0.01)]


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds) -> Arms:
    score = partial(score, begun=cache(_start))  # the start is the same for all settings
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in (method, baseline))
    training = [STEPS if setting["loss"] == "plain" else 2 * STEPS for setting in (ours, theirs)]
    details = {"evaluations": 2 * [len(SIGMAS) - 1], "training evaluations": training}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details | {"method": ours, "baseline": theirs})


@claim(
    says="Directional consistency keeps more of the modes from eight points than plain fine-tuning on them",
    kind="superiority",
    metric="mode error",
    scale="ring of 8 Gaussians in 2-D, turned and moved, MLP of 64, 200 steps of 32, of two evaluations against one;"
    " 4 settings each",
)
def keeps_the_modes(seeds: Seeds) -> Arms:
    return _compare(_mode_error, DIRECTIONAL, PLAIN, seeds)


@claim(
    says="Directional consistency comes nearer the new domain than a loss on pairwise similarities in its place",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1; ring of 8 Gaussians in 2-D, turned and moved, 8 points, MLP of 64, 200 steps of 32; 4 settings",
)
def beats_pairwise_similarity(seeds: Seeds) -> Arms:
    return _compare(_distance, DIRECTIONAL, PAIRWISE, seeds)


@claim(
    says="Directional consistency's gradient varies at most half as much between batches as pairwise similarities'",
    kind="ratio",
    metric="variance",
    margin=0.5,
    scale="over the squared mean; 100 batches of 4, at a generator that plain tuning on 8 points has collapsed",
)
def gradients_are_steadier(seeds: Seeds) -> Arms:
    denoise = _adapted(seeds, loss="plain", lr=0.003)
    parameters, rows = list(denoise.parameters()), []
    for consistency in (_directional(seeds), _pairwise):
        generators, total, square = seeds.torch("batches"), 0.0, 0.0
        batches = seeds.few(100, smoke=2)
        denoise.network.generators = seeds.torch("content of batches")
        for _ in range(batches):
            x = _source(4, generators)
            t = 0.3 + 0.5 * torch.stack([torch.rand(4, generator=g) for g in generators])
            sigma = denoise.process.ratio(t)
            made = denoise(x + over(sigma, x) * noise(x, generators), sigma, x)
            value = consistency(_encode(made), _encode(x)).mean(-1).sum()
            slopes = torch.cat([g.flatten(1) for g in torch.autograd.grad(value, parameters)], dim=1).double()
            total, square = total + slopes, square + slopes.square().sum(-1)
        mean = (total / batches).square().sum(-1)
        rows.append(((square / batches - mean) / mean).tolist())
    return Arms(*rows)


def draw(seeds: Seeds) -> list[Panel]:
    """The target, the eight points, and what plain tuning and directional consistency make of the source."""
    one = seeds.one(0)
    panels = [
        Panel("target", points=TARGET.sample(400, generator=one.torch("truth")[0])[0].numpy()),
        Panel("eight points", points=_shots(one)[0].numpy()),
    ]
    for title, setting in (("plain", PLAIN[1]), ("directional", DIRECTIONAL[1])):
        panels.append(Panel(title, points=_made(one, **setting)[0, :400].numpy()))
    return panels
