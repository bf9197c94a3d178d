"""Distributional alignment: does it set the shares of a biased generator, and is it the loss or the gradient?

The generator is the perfect denoiser of four Gaussians in the plane, right or left by its attribute, of which the
left has a tenth, above or below by what should stay as it is; a small network beside it is tuned. The classifier is
logistic in x and as sure of itself at the modes as real ones are. Samples that lie between modes fool it, so they
count as a mode of their own when shares are held against those that were asked for.
"""

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import (
    adjusted_direct_finetune,
    distributional_alignment_loss,
    optimal_target_assignment,
)
from lossary.diffusion._denoiser import Denoise
from lossary.diffusion._mixture import Mixture
from lossary.diffusion._samplers import euler, karras_sigmas
from lossary.tasks import sliced_wasserstein, stacked_denoiser

PLACES = torch.tensor([[-1.5, 1.0], [-1.5, -1.0], [1.5, 1.0], [1.5, -1.0]])
SPREAD, BATCH = 0.3, 32
SIGMAS = karras_sigmas(12, low=0.05, high=10.0).float()


def _world(left: float) -> Mixture:
    return Mixture(PLACES, SPREAD, torch.tensor([left, left, 1 - left, 1 - left]))


BIASED = _world(0.1)


class _Tuned(nn.Module):
    """The frozen denoiser and a network beside it that says nothing at first."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.beside = stacked_denoiser(2, seeds)
        last = self.beside.network.mlp[-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        level = torch.as_tensor(sigma, dtype=x.dtype).expand(x.shape[:-1])
        shrink = (1 + level.square()).rsqrt()[..., None]
        time = self.beside.process.time(level)
        said = self.beside.network(shrink * x, time)
        return BIASED.denoise(x, level) + level[..., None] * shrink * said


def _logits(x: Tensor) -> Tensor:
    """Of left and right."""
    return torch.stack([-2 * x[..., 0], 2 * x[..., 0]], dim=-1)


def _noise(seeds: Seeds, n: int, stream: str) -> Tensor:
    return SIGMAS[0] * torch.stack([torch.randn(n, 2, generator=g) for g in seeds.torch(stream)])


def _trained(seeds: Seeds, *, loss: str, adjusted: bool, lr: float, keep: float, left: float = 0.5) -> _Tuned:
    model, asked = _Tuned(seeds), torch.tensor([left, 1 - left])
    steps = seeds.few(150, smoke=2)
    noise = _noise(seeds, steps * BATCH, "training").view(len(seeds), steps, BATCH, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    through: Denoise = adjusted_direct_finetune(model, SIGMAS) if adjusted else model
    for step in range(steps):
        z = noise[:, step]
        with torch.no_grad():
            before = euler(BIASED.denoise, z, SIGMAS)
        x = euler(through, z, SIGMAS)
        drift = 1 - (-(x - before).square().sum(-1) / 2).exp()
        logits = _logits(x)
        if loss == "aligned":
            target, uncertainty = optimal_target_assignment(logits.softmax(-1), asked)
            seen = _logits(before).argmax(-1)
            values = distributional_alignment_loss(
                logits, target, uncertainty=uncertainty, drift=drift, original=seen, weight=keep
            ).mean(-1)
        else:
            mean = logits.softmax(-1).mean(1)
            values = (asked * (asked / mean.clamp(min=1e-6)).log()).sum(-1) + keep * drift.mean(-1)
        optimizer.zero_grad()
        values.sum().backward()
        for parameter in model.parameters():  # gradients are clipped seed by seed: full ones may explode
            size = parameter.grad.flatten(1).norm(dim=1).clamp(min=1.0)
            parameter.grad /= size.view(-1, *[1] * (parameter.ndim - 1))
        optimizer.step()
        schedule.step()
    return model


@torch.no_grad()
def _samples(model: Denoise, seeds: Seeds) -> Tensor:
    return euler(model, _noise(seeds, seeds.few(2000, smoke=20), "test"), SIGMAS)


def _mode_error(seeds: Seeds, *, left: float = 0.5, **setting: object) -> list[float]:
    """Total variation, in percent, to the shares that were asked for; beyond three deviations is a fifth mode."""
    found = _samples(_trained(seeds, left=left, **setting), seeds)
    distance, nearest = torch.cdist(found, PLACES.expand(len(seeds), -1, -1)).min(-1)
    mode = torch.where(distance > 3 * SPREAD, 4, nearest)
    share = nn.functional.one_hot(mode, 5).double().mean(1)
    return (50 * (share - torch.tensor([left, left, 1 - left, 1 - left, 0.0]) / 2).abs().sum(-1)).tolist()


def _distance(seeds: Seeds, *, left: float = 0.5, **setting: object) -> list[float]:
    """Sliced W1 to the generator with the same modes and the shares that were asked for."""
    found = _samples(_trained(seeds, left=left, **setting), seeds)
    truth = torch.stack([_world(left).sample(found.shape[1], generator=g)[0] for g in seeds.torch("truth")])
    return sliced_wasserstein(found, truth).tolist()


def _grid(loss: str, adjusted: bool, keeps: tuple[float, float]) -> list[dict[str, object]]:
    return [{"loss": loss, "adjusted": adjusted, "lr": lr, "keep": k} for lr in (0.003, 0.01) for k in keeps]


ALIGNED, ALIGNED_FULL = (_grid("aligned", adjusted, (1.0, 8.0)) for adjusted in (True, False))
MEANS, MEANS_FULL = (_grid("means", adjusted, (0.1, 1.0)) for adjusted in (True, False))


def _compare(score, method: list[dict], baseline: list[dict], seeds: Seeds, **fixed: float) -> Arms:
    ours, theirs = (tune(score, [s | fixed for s in grid], seeds, better="lower") for grid in (method, baseline))
    details = {"evaluations": 2 * [len(SIGMAS) - 1], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="Tuning to assigned classes turns 10/90 into 50/50 better than KL on batch means through the whole sampler",
    kind="superiority",
    metric="mode error",
    scale="4 Gaussians in 2-D and the space between, MLP of 64 beside the truth, 150 steps of 32; 4 settings each",
)
def sets_equal_shares(seeds: Seeds) -> Arms:
    return _compare(_mode_error, ALIGNED, MEANS_FULL, seeds)


@claim(
    says="Tuned from 10/90 to 75/25 by assigned classes, samples lie nearer the modes than by KL on batch means",
    kind="ratio",
    metric="sample distance",
    margin=0.9,
    scale="sliced W1 to 4 Gaussians in 2-D, MLP of 64 beside the truth, 150 steps of 32; 4 settings each",
)
def sets_other_shares(seeds: Seeds) -> Arms:
    return _compare(_distance, ALIGNED, MEANS, seeds, left=0.75)


@claim(
    says="Adjusted gradients do better than gradients through the whole sampler, clipped, for the same loss",
    kind="superiority",
    metric="mode error",
    scale="10/90 to 50/50; 4 Gaussians in 2-D, MLP of 64 beside the truth, 150 steps of 32; 4 settings each",
)
def adjusted_gradients_do_better(seeds: Seeds) -> Arms:
    return _compare(_mode_error, ALIGNED, ALIGNED_FULL, seeds)


@claim(
    says="For two classes the binomial formula is optimal transport averaged over all label sets",
    kind="exact",
    metric="deviation",
    tolerance=1e-9,
    scale="uncertainty of 7 samples, all 128 label sets matched one by one, random shares",
)
def ranks_are_optimal_transport(seeds: Seeds) -> Arms:
    from scipy.optimize import linear_sum_assignment

    gaps, n = [], 7
    for g in seeds.torch("samples"):
        p = torch.rand(n, generator=g, dtype=torch.float64)
        p, r = torch.stack([1 - p, p], dim=1), 0.2 + 0.6 * torch.rand((), generator=g, dtype=torch.float64)
        second = torch.zeros(n, dtype=torch.float64)
        for labels in torch.cartesian_prod(*[torch.arange(2)] * n):
            cost = torch.cdist(p, torch.eye(2, dtype=torch.float64)[labels])
            _, place = linear_sum_assignment(cost.numpy())
            ones = int(labels.sum())
            second += labels[place] * r ** (n - ones) * (1 - r) ** ones
        target, uncertainty = optimal_target_assignment(p, torch.stack([r, 1 - r]))
        gaps.append((torch.where(target == 1, 1 - second, second) - uncertainty).abs().max().item())
    return Arms(gaps)


def draw(seeds: Seeds) -> list[Panel]:
    """Samples before, and after tuning to 50/50 in either way."""
    one = seeds.one(0)
    panels = [Panel("before: 10/90", points=_samples(BIASED.denoise, one)[0, :400].numpy())]
    for title, setting in (("KL on batch means", MEANS_FULL[0]), ("distributional alignment", ALIGNED[0])):
        panels.append(Panel(title, points=_samples(_trained(one, **setting), one)[0, :400].numpy()))
    return panels
