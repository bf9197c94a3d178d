"""T2I-Zero: do two edits of the prompt bring both objects out, where text embeddings mix and prompts of two were rare?

A small diffusion transformer with cross-attention to a prompt is trained once on 12x12 pictures of one object, one in
three of two, of 16 kinds. Its text encoder is frozen: random vectors, each with a fading trace of those before it, so
that the first concept is found in all tokens after it, the second concept's among them. A seed is 48 prompts of two
objects; a sample is right if both are there. The other arm weighs the concepts' embeddings, as users do.
"""

import math
from collections.abc import Callable
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import correct_by_similarities, cross_token_nms
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import euler, process_sigmas
from lossary.tasks import minimise, trained

KINDS, WIDE, TOKEN, HEADS = 16, 48, 24, 4
STEPS = 20  # evaluations of a sample
CONCEPTS = (2, 5)  # their places in: start, a, first, and, a, second
PROCESS = cosine()
Edit = Callable[[Tensor], Tensor]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDE) for _ in range(3)])
        self.own, self.query, self.words = nn.Linear(WIDE, 3 * WIDE), nn.Linear(WIDE, WIDE), nn.Linear(TOKEN, 2 * WIDE)
        self.outs = nn.ModuleList([nn.Linear(WIDE, WIDE) for _ in range(2)])
        self.mlp = nn.Sequential(nn.Linear(WIDE, 2 * WIDE), nn.SiLU(), nn.Linear(2 * WIDE, WIDE))

    def forward(self, h: Tensor, text: Tensor, edit: Edit | None) -> Tensor:
        h = h + self.outs[0](_attend(*self.own(self.norms[0](h)).chunk(3, -1)))
        h = h + self.outs[1](_attend(self.query(self.norms[1](h)), *self.words(text).chunk(2, -1), edit))
        return h + self.mlp(self.norms[2](h))


def _attend(query: Tensor, key: Tensor, value: Tensor, edit: Edit | None = None) -> Tensor:
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for x in (query, key, value))
    maps = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
    if edit is not None:
        maps = edit(maps.unflatten(-2, (3, 3))).flatten(-3, -2)
    return (maps @ v).transpose(-3, -2).flatten(-2)


class _Painter(nn.Module):
    """network(x_t (B, 3, 12, 12), t (B,), text (B, 6, TOKEN), edit of the maps (B, HEADS, 3, 3, 6)) -> x_0."""

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(0.3 * torch.randn(9, WIDE))
        self.enter, self.time, self.leave = nn.Linear(48, WIDE), nn.Linear(8, WIDE), nn.Linear(WIDE, 48)
        self.blocks = nn.ModuleList([_Block(), _Block()])

    def forward(self, x: Tensor, t: Tensor, text: Tensor, edit: Edit | None = None) -> Tensor:
        angle = t[:, None] * (math.pi / 2 * 2.0 ** torch.arange(4))
        h = self.enter(_cells(x)) + self.place + self.time(torch.cat([angle.sin(), angle.cos()], -1))[:, None]
        for block in self.blocks:
            h = block(h, text, edit)
        return _joined(self.leave(h))


def _cells(x: Tensor) -> Tensor:
    """(B, 3, 12, 12) to (B, 9, 48)."""
    return x.unflatten(-1, (3, 4)).unflatten(-3, (3, 4)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _joined(cells: Tensor) -> Tensor:
    return cells.unflatten(1, (3, 3)).unflatten(3, (3, 4, 4)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


GLYPHS = (0x0660, 0x9669, 0xF99F, 0x6996, 0xCC33, 0xA5A5, 0x1248, 0xF00F)  # 4x4, one bit a pixel


@cache
def _objects() -> Tensor:
    """(KINDS, 48): a glyph in one colour on a square of another."""
    g = Generator().manual_seed(1)
    glyph = torch.tensor([[code >> bit & 1 for bit in range(16)] for code in GLYPHS]).float().repeat(2, 1)[:, None]
    ink, paper = 2 * torch.rand(2, KINDS, 3, 1, generator=g) - 1
    return (glyph * ink + (1 - glyph) * paper).flatten(1)


def _text(kinds: Tensor, two: Tensor) -> Tensor:
    """Embeddings (n, 6, TOKEN) of "a first and a second", or of "a first" and three ends."""
    table = torch.randn(4 + KINDS, TOKEN, generator=Generator().manual_seed(2))
    start, a, conjunction, end = (torch.full_like(kinds[:, 0], k) for k in range(4))
    rest = torch.where(two[:, None], torch.stack([conjunction, a, 4 + kinds[:, 1]], 1), end[:, None])
    own = table[torch.cat([torch.stack([start, a, 4 + kinds[:, 0]], 1), rest], 1)]
    lag = torch.arange(6)[:, None] - torch.arange(6)
    return torch.where(lag > 0, 0.8**lag, (lag == 0).float()) @ own


def _pictures(kinds: Tensor, two: Tensor, g: Generator) -> Tensor:
    """The objects in cells drawn at random, before a plain background."""
    n = len(kinds)
    ground = (0.6 * torch.rand(n, 1, 3, 1, generator=g) - 0.3).expand(-1, 9, -1, 16).flatten(2)
    masks = F.one_hot(torch.rand(n, 9, generator=g).argsort(-1)[:, :2], 9).float()
    masks[:, 1] *= two[:, None]
    return _joined(masks.mT @ _objects()[kinds] + (1 - masks.sum(1))[..., None] * ground)


@cache
def _painter(steps: int) -> _Painter:
    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return _Painter()

    @torch.enable_grad()
    def train(network: nn.Module) -> None:
        g = Generator().manual_seed(3)

        def objective() -> Tensor:
            kinds, two = torch.randint(KINDS, (64, 2), generator=g), torch.rand(64, generator=g) < 0.35
            x, t = _pictures(kinds, two, g), torch.rand(64, generator=g).clamp(1e-3, 1 - 1e-3)
            x_t = PROCESS.noised(x, torch.randn(x.shape, generator=g), t)
            return (network(x_t, t, _text(kinds, two)) - x).square().mean()

        minimise(objective, network.parameters(), steps=steps, lr=3e-3)

    return trained(build, train, key=f"t2i-zero, {steps} steps")


@torch.no_grad()
def _drawn(
    seeds: Seeds,
    *,
    weight: float = 1.0,
    strength: float = 0.0,
    threshold: float = 0.1,
    until: float = 0.0,
    shared: bool = False,
) -> tuple[Tensor, Tensor]:
    """Samples (S, n, 3, 12, 12) and the kinds asked for, (S, n, 2); maps are suppressed at times above 1 - until."""
    painter, n = _painter(seeds.few(800, smoke=2)), seeds.few(48, smoke=2)
    kinds = torch.stack([torch.rand(n, KINDS, generator=g).argsort(-1)[:, :2] for g in seeds.torch("prompts")])
    start = torch.stack([torch.randn(n, 3, 12, 12, generator=g) for g in seeds.torch("start")])
    text = _text(kinds.flatten(0, 1), torch.ones(len(seeds) * n, dtype=torch.bool))
    text = correct_by_similarities(text, CONCEPTS, threshold=threshold, strength=strength)
    text[:, CONCEPTS] *= weight
    sigmas = process_sigmas(PROCESS, seeds.few(STEPS, smoke=2), first=0.99)
    suppress = partial(cross_token_nms, concepts=CONCEPTS, shared=shared)

    def denoise(x: Tensor, sigma: float) -> Tensor:
        t = PROCESS.time(torch.full(x.shape[:1], sigma))
        edit = suppress if t[0] > 1 - until else None
        return painter(over(PROCESS.alpha(t), x) * x, t, text, edit)

    x = euler(denoise, start.flatten(0, 1) * float(sigmas[0]), sigmas)
    return x.unflatten(0, (len(seeds), n)), kinds


SAME = 0.1  # mean squared error of an object and a cell, above which it is another


def _both(seeds: Seeds, **setting: object) -> list[float]:
    """Percent of samples that show both objects."""
    x, kinds = _drawn(seeds, **setting)
    cells = _cells(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    errors = (cells[:, :, None] - _objects()[kinds][:, :, :, None]).square().mean(-1)
    return (100 * (errors.amin(-1) < SAME).all(-1).float().mean(1)).tolist()


WEIGHTED = [{"weight": weight} for weight in (1.0, 1.1, 1.25, 1.5)]
SUPPRESSED = [{"until": until, "shared": shared} for until in (0.5, 1.0) for shared in (False, True)]
CORRECTED = [{"strength": strength, "threshold": tau} for strength in (0.25, 0.5) for tau in (0.02, 0.1)]
EDITED = [{"strength": strength, "until": until} for strength in (0.25, 0.5) for until in (0.5, 1.0)]


def _compare(seeds: Seeds, method: list[dict]) -> Arms:
    ours, theirs = (tune(_both, grid, seeds) for grid in (method, WEIGHTED))
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_both(seeds, **ours), _both(seeds, **theirs), details)


@claim(
    says="Both edits together bring two objects out more often than the prompt as it is, or weighted",
    kind="superiority",
    metric="accuracy",
    scale="samples with both of two objects; 12x12 pictures, 58k weights, 48 prompts, 20 steps; 4 settings each",
)
def edits_bring_both_objects_out(seeds: Seeds) -> Arms:
    return _compare(seeds, EDITED)


@claim(
    says="Suppressing the weaker concept's attention at each pixel does so by itself",
    kind="superiority",
    metric="accuracy",
    scale="samples with both of two objects; 12x12 pictures, 58k weights, 48 prompts, 20 steps; 4 settings each",
)
def suppression_brings_both_objects_out(seeds: Seeds) -> Arms:
    return _compare(seeds, SUPPRESSED)


@claim(
    says="Correcting embeddings by similarities does so by itself",
    kind="superiority",
    metric="accuracy",
    scale="samples with both of two objects; 12x12 pictures, 58k weights, 48 prompts, 20 steps; 4 settings each",
)
def correction_brings_both_objects_out(seeds: Seeds) -> Arms:
    return _compare(seeds, CORRECTED)


def draw(seeds: Seeds) -> list[Panel]:
    """Two prompts: the objects, the sample of the prompt as it is, and with each edit."""
    arms = {"plain": {}, "corrected": {"strength": 0.5}, "suppressed": {"until": 1.0}}
    found = {name: _drawn(seeds.one(0), **setting) for name, setting in arms.items()}
    panels = []
    for k in range(2):
        pair = _objects()[found["plain"][1][0, k]].view(2, 3, 4, 4)
        pictures = {"asked for": torch.cat(list(pair), -1)} | {name: x[0, k] for name, (x, _) in found.items()}
        panels += [
            Panel(name, image=(x.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()) for name, x in pictures.items()
        ]
    return panels
