"""DeeDiff: do exits by certainty beat the same network cut at one depth, and does their training help the whole?

Residual perceptrons of six blocks predict the noise on eight Gaussians in the plane. Thresholds are those of 12 whose
mean depth on tuning seeds is nearest to three blocks; samples take 25 steps of DPM-Solver++ and 25 evaluations, whole
or not; what is saved is blocks. A fixed depth is the mean one, rounded up.
"""

import math
from statistics import mean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import UncertaintyExitHead, deediff_loss, early_exit_denoise
from lossary.diffusion._denoiser import Counted, Denoise, Denoiser
from lossary.diffusion._mixture import ring
from lossary.diffusion._process import cosine, over
from lossary.diffusion._samplers import dpm_solver_pp, process_sigmas
from lossary.tasks import fit_denoiser, sliced_wasserstein
from lossary.tasks.models import StackedLinear

TRUTH = ring(8, radius=1.0, scale=0.1)
BLOCKS, WIDTH = 6, 64
THRESHOLDS = [0.2 + 0.065 * k for k in range(12)]
RATES = [{"lr": lr} for lr in (0.002, 0.006)]


class _Block(nn.Module):
    def __init__(self, linear: StackedLinear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, h: Tensor) -> Tensor:
        return h + nn.functional.silu(self.linear(h))


class _Net(nn.Module):
    """Noise from (S, B, 2) at times (S, B): after all blocks, after `depth` of them, or by `threshold`."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        generators = seeds.torch("init")

        def linear(wide: int, narrow: int) -> StackedLinear:
            return StackedLinear(wide, narrow, generators=generators)

        self.first, self.last = linear(2 + 8, WIDTH), linear(WIDTH, 2)
        self.blocks = nn.ModuleList([_Block(linear(WIDTH, WIDTH)) for _ in range(BLOCKS)])
        self.heads = nn.ModuleList([_head(linear(WIDTH, 2)) for _ in range(BLOCKS)])
        self.depth, self.threshold = BLOCKS, 1.0
        self.depths: list[Tensor] = []

    def _embedded(self, x: Tensor, t: Tensor) -> Tensor:
        angle = over(t, x[..., 0]).expand(x.shape[:-1])[..., None] * (math.pi / 2 * 2.0 ** torch.arange(4))
        return self.first(torch.cat([x, angle.sin(), angle.cos()], dim=-1))

    def layers(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and certainties of all blocks, (BLOCKS, S, B, 2)."""
        h, predictions, certainties = self._embedded(x, t), [], []
        for block, head in zip(self.blocks, self.heads):
            h = block(h)
            predictions.append(self.last(h))
            certainties.append(head(h))
        return torch.stack(predictions), torch.stack(certainties)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        blocks, heads = self.blocks[: self.depth], self.heads[: self.depth]
        found, depth = early_exit_denoise(
            blocks, heads, self.last, self._embedded(x, t), threshold=self.threshold, batch_dims=2
        )
        self.depths.append(depth.double().mean(-1))
        return found


def _head(linear: StackedLinear) -> UncertaintyExitHead:
    """A head for every seed: the part with its linear layer stacked."""
    head = UncertaintyExitHead(WIDTH, 2)
    head.linear = linear
    return head


def _trained(seeds: Seeds, *, lr: float, exits: bool = True, layers: bool = True) -> Denoiser:
    denoise = Denoiser(_Net(seeds), cosine(), "noise")

    def loss(denoise: Denoise, clean: Tensor, sigma: Tensor, noise: Tensor) -> Tensor:
        process = denoise.process
        t = process.time(sigma)
        predictions, certainties = denoise.network.layers(process.noised(clean, noise, t), t)
        weights = {"certainty_weight": float(exits), "layer_weight": float(exits and layers)}
        return deediff_loss(predictions, certainties, noise, batch_dims=2, **weights)

    def draw(batch: int, generators: list[torch.Generator]) -> tuple[Tensor]:
        return (torch.stack([TRUTH.sample(batch, generator=g)[0].float() for g in generators]),)

    fit_denoiser(denoise, draw, seeds=seeds, steps=seeds.few(400, smoke=2), lr=lr, loss=loss)
    return denoise.requires_grad_(False)


class _Samples(NamedTuple):
    """x (S, n, 2), the mean number of blocks of each seed, and the evaluations."""

    x: Tensor
    depths: list[float]
    evaluations: int


def _samples(denoise: Denoiser, seeds: Seeds, *, threshold: float = 1.0, depth: int = BLOCKS) -> _Samples:
    network, counted = denoise.network, Counted(denoise)
    network.threshold, network.depth, network.depths = threshold, depth, []
    sigmas = process_sigmas(cosine(), seeds.few(25, smoke=3), first=0.98, last=0.01)
    noise = torch.stack([torch.randn(seeds.few(1000, smoke=16), 2, generator=g) for g in seeds.torch("start")])
    x = dpm_solver_pp(counted, sigmas[0].item() * noise, sigmas)
    return _Samples(x, torch.stack(network.depths).mean(0).tolist(), counted.evaluations)


def _distance(x: Tensor, seeds: Seeds) -> list[float]:
    truth = [TRUTH.sample(x.shape[1], generator=g)[0].float() for g in seeds.torch("true")]
    return sliced_wasserstein(x, torch.stack(truth)).tolist()


def _whole(seeds: Seeds, **setting: float) -> list[float]:
    return _distance(_samples(_trained(seeds, **setting), seeds).x, seeds)


def _calibrated(seeds: Seeds, **setting: float) -> float:
    """The threshold that half the blocks are nearest to, on tuning seeds."""
    tuning = seeds.tuning(1 if seeds.smoke else 4)
    denoise = _trained(tuning, **setting)

    def excess(threshold: float) -> float:
        return abs(mean(_samples(denoise, tuning, threshold=threshold).depths) - BLOCKS / 2)

    return min(THRESHOLDS[:2] if seeds.smoke else THRESHOLDS, key=excess)


def _cost(ours: _Samples, theirs: _Samples) -> dict[str, list[float]]:
    return {
        "evaluations": [ours.evaluations, theirs.evaluations],
        "blocks of an evaluation": [mean(ours.depths), mean(theirs.depths)],
    }


@claim(
    says="At about half the blocks, samples with exits are nearer the data than with the network cut at that depth",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1; 8 Gaussians in 2-D, 6 residual blocks of 64, 400 steps; cut at the mean depth, rounded up",
)
def exits_beat_a_fixed_depth(seeds: Seeds) -> Arms:
    best = tune(_whole, RATES, seeds, better="lower")
    threshold = _calibrated(seeds, **best)
    denoise = _trained(seeds, **best)
    exits = _samples(denoise, seeds, threshold=threshold)
    rounded = [math.ceil(d) for d in exits.depths]
    cuts = {d: _samples(denoise, seeds, depth=d) for d in sorted(set(rounded))}
    x = torch.stack([cuts[d].x[s] for s, d in enumerate(rounded)])
    cut = _Samples(x, [float(d) for d in rounded], cuts[rounded[0]].evaluations)
    details = {**_cost(exits, cut), "threshold": threshold, "mean depths": exits.depths, **best}
    return Arms(_distance(exits.x, seeds), _distance(cut.x, seeds), details)


@claim(
    says="They are hardly farther from the data than with all blocks: by a tenth at most",
    kind="ratio",
    metric="sample distance",
    margin=1.1,
    scale="sliced W1; 8 Gaussians in 2-D, about 3 of 6 residual blocks of 64, 400 steps; both arms one network",
)
def exits_cost_little(seeds: Seeds) -> Arms:
    best = tune(_whole, RATES, seeds, better="lower")
    threshold = _calibrated(seeds, **best)
    denoise = _trained(seeds, **best)
    exits, whole = _samples(denoise, seeds, threshold=threshold), _samples(denoise, seeds)
    details = {**_cost(exits, whole), "threshold": threshold, "mean depths": exits.depths, **best}
    return Arms(_distance(exits.x, seeds), _distance(whole.x, seeds), details)


@claim(
    says="Training with exits improves the whole network",
    kind="ratio",
    metric="sample distance",
    margin=0.95,
    scale="sliced W1 with all blocks, against the plain loss in as many steps, which needs no heads and no outputs of"
    " single blocks; 8 Gaussians in 2-D, 6 blocks of 64, 400 steps; 2 rates",
)
def training_improves_the_whole(seeds: Seeds) -> Arms:
    grids = [[rate | {"exits": exits} for rate in RATES] for exits in (True, False)]
    ours, theirs = (tune(_whole, grid, seeds, better="lower") for grid in grids)
    exits, plain = (_samples(_trained(seeds, **setting), seeds) for setting in (ours, theirs))
    details = {**_cost(exits, plain), "method": ours, "baseline": theirs}
    return Arms(_distance(exits.x, seeds), _distance(plain.x, seeds), details)


@claim(
    says="Without the loss on all layers, exits at about half the blocks are farther from the data",
    kind="ratio",
    metric="sample distance",
    margin=0.8,
    scale="sliced W1; 8 Gaussians in 2-D, 6 residual blocks of 64, 400 steps, thresholds for 3 blocks; rate 0.006",
)
def layers_need_their_loss(seeds: Seeds) -> Arms:
    arms, chosen = [], {}
    for layers in (True, False):
        setting = {"lr": 0.006, "layers": layers}
        threshold = _calibrated(seeds, **setting)
        arms.append(_samples(_trained(seeds, **setting), seeds, threshold=threshold))
        chosen["with" if layers else "without"] = {"threshold": threshold, "mean depths": arms[-1].depths}
    return Arms(*(_distance(arm.x, seeds) for arm in arms), {**_cost(*arms), **chosen})


def draw(seeds: Seeds) -> list[Panel]:
    """Samples of all blocks, with exits at about half of them, and cut at three."""
    one = seeds.one(0)
    denoise = _trained(one, lr=0.006)
    threshold = _calibrated(one, lr=0.006)
    panels = []
    for title, setting in (("all blocks", {}), ("exits", {"threshold": threshold}), ("three blocks", {"depth": 3})):
        found = _samples(denoise, one, **setting)
        panels.append(Panel(f"{title}, {found.depths[0]:.1f} blocks", points=found.x[0].numpy()))
    return panels
