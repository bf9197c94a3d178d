"""TPD: does a garment beside the person come over with more of its texture than through an encoder?

Persons of 8x8 pixels wear garments of random shape and pattern; their arms and surroundings are random, too, so that
what is repainted without need is lost. All networks are one transformer block, trained for each seed: with the garment
beside the person and a learned vector in cross-attention, or with the person alone and cross-attention to an encoder
of the garment, pooled to one vector as image embeddings are, or not. Tests have a person change garments. The claim on
predicted masks is registered anew: its baseline had half the evaluations.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    SelfAttentionTransfer,
    decoupled_mask_prediction,
    spatial_concat_condition,
    spatial_concat_target,
)
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import minimise

WIDE, PROMPT = 32, 24
STEPS = 10  # evaluations of a sample
PROCESS = cosine()
BOX = torch.ones(1, 1, 8, 8)
BOX[..., 1:8, 1:7] = 0


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _patches(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, H W / 4, 4 C)."""
    return F.pixel_unshuffle(x, 2).flatten(2).mT


class _Block(nn.Module):
    """network(x (B, 8, 8, W), t (B,), prompt (B, n, PROMPT)) -> (B, 4, 8, W), W being 8 or 16."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(0.5 * torch.randn(WIDE, 4, 8))
        self.enter, self.time, self.leave = nn.Linear(32, WIDE), nn.Linear(8, WIDE), nn.Linear(WIDE, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDE) for _ in range(3)])
        self.own, self.query, self.read = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE), nn.Linear(PROMPT, 2 * WIDE)
        self.mlp = nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.SiLU(), nn.Linear(2 * WIDE, WIDE))

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor) -> Tensor:
        angle = t[:, None] * (math.pi / 2 * 2.0 ** torch.arange(4))
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, None]
        wide = x.shape[-1] // 2
        h = self.enter(_patches(x)) + self.place[..., :wide].flatten(1).T + time
        h = h + _attend(*self.own(self.norms[0](h)).chunk(3, -1))
        h = h + _attend(self.query(self.norms[1](h)), *self.read(prompt).chunk(2, -1))
        h = h + self.mlp(self.norms[2](h))
        return F.pixel_shuffle(self.leave(h).mT.unflatten(2, (4, wide)), 2)


class _TryOn(nn.Module):
    """network(x_t (B, 4, 8, W), t, condition, garment) -> x_0; W is 16 with the garment beside, otherwise 8."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.transfer = SelfAttentionTransfer(_Block(), width=PROMPT)
        if kind != "beside":
            self.place = nn.Parameter(0.5 * torch.randn(16, WIDE))
            self.first, self.last = nn.Linear(12, WIDE), nn.Linear(WIDE, PROMPT)

    def forward(self, x: Tensor, t: Tensor, condition: Tensor, garment: Tensor) -> Tensor:
        if self.kind == "beside":
            return self.transfer(x, t, condition)
        tokens = self.last(F.silu(self.first(_patches(garment)) + self.place))
        tokens = tokens.mean(1, keepdim=True) if self.kind == "pooled" else tokens
        return self.transfer.network(torch.cat([x, condition], 1), t, tokens)


def _pattern(n: int, g: Generator) -> Tensor:
    """(n, 3, 8, 8): pixels of two colours at random."""
    ink, paper = 2 * torch.rand(2, n, 3, 1, 1, generator=g) - 1
    return torch.where(torch.rand(n, 1, 8, 8, generator=g) < 0.5, ink, paper)


def _shapes(n: int, g: Generator) -> Tensor:
    """(n, 1, 8, 8), 1 where a garment is: of random width and length, with sleeves or not, within the box."""
    row, column = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    half, bottom, sleeve = (torch.randint(*ends, (n, 1, 1, 1), generator=g) for ends in ((1, 4), (4, 8), (0, 3)))
    trunk = ((column - 3.5).abs() < half) & (row >= 1) & (row <= bottom)
    sleeves = ((column - 3.5).abs() < 3) & (row >= 1) & (row <= sleeve)
    return (trunk | sleeves).float()


def _garments(n: int, g: Generator) -> tuple[Tensor, Tensor]:
    """Pictures on white (n, 3, 8, 8) and shapes."""
    shape = _shapes(n, g)
    return torch.where(shape > 0, _pattern(n, g), 1.0), shape


def _inputs(kind: str, person: Tensor, garment: Tensor, worn: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """What is diffused, and the condition."""
    if kind == "beside":
        return spatial_concat_target(person, garment, worn), spatial_concat_condition(person * mask, garment, mask)
    return torch.cat([person, worn], 1), torch.cat([person * mask, mask], 1)


def _lessons(kind: str, n: int, g: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """x_0, condition and garment. The region to repaint is the box, or the garment's and some other shape's."""
    garment, shape = _garments(n, g)
    person = torch.where(shape > 0, garment, _pattern(n, g))
    near = F.max_pool2d(shape, 3, stride=1, padding=1) * (torch.rand(n, 1, 1, 1, generator=g) < 0.5)
    distorted = torch.maximum(1 - shape.maximum(near).maximum(_shapes(n, g)), BOX)
    mask = torch.where(torch.rand(n, 1, 1, 1, generator=g) < 0.4, BOX, distorted)
    return *_inputs(kind, person, garment, 1 - shape, mask), garment


class _Stack(nn.Module):
    """A network for each seed: (S, B, ...)."""

    def __init__(self, kind: str, seeds: Seeds) -> None:
        super().__init__()
        made = []
        for id in seeds.ids:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(id)
                made.append(_TryOn(kind))
        self.kind, self.plain = kind, [made[0]]
        weights, _ = stack_module_state(made)
        self.names, self.weights = list(weights), nn.ParameterList(weights.values())

    def forward(self, *inputs: Tensor) -> Tensor:
        def one(weights: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            return functional_call(self.plain[0], weights, inputs)

        return vmap(one)(dict(zip(self.names, self.weights)), *inputs)


@cache
def _trained(seeds: Seeds, *, kind: str, lr: float) -> _Stack:
    model, streams, batch = _Stack(kind, seeds), seeds.torch("noise"), 12
    pools = [_lessons(kind, seeds.few(2000), g) for g in seeds.torch("lessons")]

    def objective() -> Tensor:
        rows = [torch.randint(len(pool[0]), (batch,), generator=g) for pool, g in zip(pools, streams)]
        columns = zip(*([value[row] for value in pool] for pool, row in zip(pools, rows)))
        x, condition, garment = (torch.stack(column) for column in columns)
        t = torch.stack([torch.rand(batch, generator=g) for g in streams]).clamp(1e-3, 1 - 1e-3)
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in streams])
        return (model(PROCESS.noised(x, noise, t), t, condition, garment) - x).square().mean((1, 2, 3, 4)).sum()

    minimise(objective, model.parameters(), steps=seeds.few(350, smoke=2), lr=lr)
    return model


@torch.no_grad()
def _repainted(
    model: _Stack, person: Tensor, garment: Tensor, mask: Tensor, seeds: Seeds, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """The person with what is masked repainted (S, n, 3, 8, 8), and all that was drawn, (S, n, 4, 8, W)."""
    flat = (value.flatten(0, 1) for value in (person, garment, mask, mask))
    x, condition = (value.unflatten(0, person.shape[:2]) for value in _inputs(model.kind, *flat))
    sigmas = process_sigmas(PROCESS, seeds.few(steps, smoke=2), first=0.99)
    start = torch.stack([torch.randn(x.shape[1:], generator=g) for g in seeds.torch("start")])

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = PROCESS.time(torch.full(x.shape[:2], sigma))
        return model(over(PROCESS.alpha(t), x) * x, t, condition, garment)

    drawn = euler(denoise, start * float(sigmas[0]), sigmas)
    return torch.where(mask > 0, person, drawn[..., :3, :, :8]), drawn


def _changes(seeds: Seeds) -> tuple[Tensor, ...]:
    """Persons (S, n, ...), the mask of what they wear, new garments, their shapes, and persons that wear them."""
    rows = []
    for g in seeds.torch("test"):
        n = seeds.few(32, smoke=2)
        (old, worn), (new, shape), arms = _garments(n, g), _garments(n, g), _pattern(n, g)
        rows.append((torch.where(worn > 0, old, arms), 1 - worn, new, shape, torch.where(shape > 0, new, arms)))
    return tuple(torch.stack(column) for column in zip(*rows))


def _garment_error(seeds: Seeds, *, kind: str, lr: float) -> list[float]:
    """Mean squared error of the new garment's pixels, the whole box being repainted."""
    person, _, new, shape, truth = _changes(seeds)
    found, _ = _repainted(_trained(seeds, kind=kind, lr=lr), person, new, BOX.expand_as(shape), seeds)
    error = ((found - truth).square().mean(2, keepdim=True) * shape).sum((1, 2, 3, 4))
    return (error / shape.sum((1, 2, 3, 4))).tolist()


def _compare(seeds: Seeds, baseline: str) -> Arms:
    grids = [[{"kind": kind, "lr": lr} for lr in (0.005, 0.015)] for kind in ("beside", baseline)]
    ours, theirs = (tune(_garment_error, grid, seeds, better="lower", n=2) for grid in grids)
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_garment_error(seeds, **ours), _garment_error(seeds, **theirs), details)


@claim(
    says="Beside the person, a garment's texture comes over better than through one vector of an encoder",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="of the garment's pixels; 8x8 pictures, one block of width 32, 350 steps of 12, 10 to sample; 2 rates each",
)
def beats_a_pooled_encoder(seeds: Seeds) -> Arms:
    return _compare(seeds, "pooled")


@claim(
    says="It comes over no worse than through all tokens of an encoder, which takes further weights",
    kind="ratio",
    metric="mean squared error",
    margin=1.05,
    scale="of the garment's pixels; 8x8 pictures, one block of width 32, 350 steps of 12, 10 to sample; 2 rates each",
)
def needs_no_encoder(seeds: Seeds) -> Arms:
    return _compare(seeds, "tokens")


def _masked_twice(model: _Stack, seeds: Seeds) -> tuple[Tensor, Tensor, Tensor]:
    """After the first pass, after the second, and the predicted mask between them."""
    person, worn, new, shape, _ = _changes(seeds)
    first, drawn = _repainted(model, person, new, BOX.expand_as(shape), seeds)
    flat = decoupled_mask_prediction(drawn[:, :, 3:].flatten(0, 1), worn.flatten(0, 1), dilation=0)
    mask = flat.unflatten(0, worn.shape[:2])
    return first, _repainted(model, person, new, mask, seeds)[0], mask


@claim(
    says="A second pass with the predicted mask is nearer the truth than repainting the whole box in as many steps",
    kind="ratio",
    metric="mean squared error",
    margin=0.9,
    scale="where the truth is known, arms included; 8x8 pictures, one block of width 32, 350 steps of 12; twice 10 to"
    " sample against once 20",
)
def predicted_masks_improve_fidelity(seeds: Seeds) -> Arms:
    model = _trained(seeds, kind="beside", lr=0.01)
    person, worn, new, shape, truth = _changes(seeds)
    _, twice, _ = _masked_twice(model, seeds)
    once, _ = _repainted(model, person, new, BOX.expand_as(shape), seeds, steps=2 * STEPS)
    known = shape.maximum(worn)
    arms = [((found - truth).square().mean(2, keepdim=True) * known).sum((1, 2, 3, 4)) for found in (twice, once)]
    evaluations = {"evaluations": [2 * STEPS, 2 * STEPS]}
    return Arms(*((values / known.sum((1, 2, 3, 4))).tolist() for values in arms), evaluations)


def draw(seeds: Seeds) -> list[Panel]:
    """A person, the new garment, the two passes and the mask between them, and the truth."""
    one = seeds.one(0)
    person, _, new, _, truth = _changes(one)
    first, second, mask = _masked_twice(_trained(one, kind="beside", lr=0.01), one)
    pictures = {"person": person, "garment": new, "first pass": first, "predicted mask": mask.expand_as(person)}
    pictures |= {"second pass": second, "truth": truth}
    images = {name: x[0, 0].permute(1, 2, 0) / 2 + 0.5 for name, x in pictures.items()}
    return [Panel(name, image=image.clamp(0, 1).numpy()) for name, image in images.items()]
