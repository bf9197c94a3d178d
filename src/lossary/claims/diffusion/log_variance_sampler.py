"""Log-variance: does it keep more modes than the reverse KL, and is its gradient quiet at the optimum?

Nine Gaussians on a grid, known by their density alone; a Brownian motion from the origin is steered to them by a
perceptron beside a learned share of the density's score, which the paper clips at 10, too. Training evaluates the
control equally often for both; the gradient of the KL runs back through all of a path.
"""

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import ControlledSDE, PathIntegralSampler, log_variance_loss
from lossary.diffusion._mixture import Mixture
from lossary.tasks import stacked_denoiser, stacked_mlp

SPOTS = torch.tensor([-3.0, 0.0, 3.0])
TARGET = Mixture(torch.cartesian_prod(SPOTS, SPOTS), 0.55)
SDE = ControlledSDE(scale=2.0, horizon=1.0, steps=20)
BATCH = 64


class _Control(nn.Module):
    """network(x, t) + gate(t) score(x), stacked; at first nothing but a hundredth of the network."""

    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.network = stacked_denoiser(2, seeds, hidden=(48, 48)).network
        self.gate = stacked_mlp((1, 16, 1), seeds, activation="silu")

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.expand(x.shape[:-1])
        steered = self.network(x / 3, time).clamp(-10, 10)
        return steered + self.gate(time.unsqueeze(-1)) * TARGET.score(x).clamp(-10, 10)


def _trained(seeds: Seeds, *, divergence: str, lr: float) -> PathIntegralSampler:
    sampler = PathIntegralSampler(_Control(seeds), TARGET.log_density, SDE)
    steps, generators = seeds.few(300, smoke=2), seeds.torch("paths")
    optimizer = torch.optim.Adam(sampler.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sampler.loss((len(seeds), BATCH, 2), divergence=divergence, generator=generators)
        loss.mean(-1).sum().backward()
        for parameter in sampler.parameters():  # the paper clips gradients as well; here by seed
            size = parameter.grad.flatten(1).norm(dim=1).clamp(min=1.0)
            parameter.grad /= size.view(-1, *[1] * (parameter.ndim - 1))
        optimizer.step()
        schedule.step()
    return sampler


def _mode_error(seeds: Seeds, **setting: object) -> list[float]:
    """Total variation between the shares of samples nearest to each mode and a ninth, in percent."""
    found = _trained(seeds, **setting)((len(seeds), seeds.few(2000, smoke=30), 2), generator=seeds.torch("test"))
    nearest = torch.cdist(found, TARGET.means.expand(len(seeds), -1, -1)).argmin(-1)
    share = nn.functional.one_hot(nearest, 9).double().mean(1)
    return (50 * (share - 1 / 9).abs().sum(-1)).tolist()


def _log_z_error(seeds: Seeds, **setting: object) -> list[float]:
    """|log Z| found by importance weights of 2000 paths; the target is normalised."""
    sampler = _trained(seeds, **setting)
    shape = (len(seeds), seeds.few(2000, smoke=30), 2)
    return sampler.log_normaliser(shape, generator=seeds.torch("test")).abs().tolist()


def _compare(score, seeds: Seeds) -> Arms:
    grids = [[{"divergence": d, "lr": lr} for lr in (0.003, 0.01)] for d in ("log_variance", "kl")]
    ours, theirs = (tune(score, grid, seeds, better="lower") for grid in grids)
    details = {"evaluations": [SDE.steps, SDE.steps], "method": ours, "baseline": theirs}
    return Arms(score(seeds, **ours), score(seeds, **theirs), details)


@claim(
    says="The log-variance loss loses fewer modes than the reverse KL divergence",
    kind="superiority",
    metric="mode error",
    scale="9 Gaussians on a 3x3 grid, 20 steps, MLP of 48 and the score, 300 steps of 64 paths; 2 learning rates each",
)
def log_variance_loses_fewer_modes(seeds: Seeds) -> Arms:
    return _compare(_mode_error, seeds)


@claim(
    says="It estimates the normalising constant better",
    kind="ratio",
    metric="relative error",
    margin=0.9,
    scale="|log Z| by 2000 paths; 9 Gaussians on a 3x3 grid, 20 steps, MLP of 48 and the score, 300 steps of 64 paths",
)
def log_variance_estimates_the_constant_better(seeds: Seeds) -> Arms:
    return _compare(_log_z_error, seeds)


def _best_control(x: Tensor, t: Tensor) -> Tensor:
    """Steers a Brownian motion of variance 4 at time 1 exactly to N(0, 1), by Doob's transform."""
    a = 1 - 1 / 4
    return -2 * a * x / (1 + 4 * a * (1 - t))


@claim(
    says="At the optimum, gradients of the log-variance loss vary at most a tenth as much as those of the KL",
    kind="ratio",
    metric="variance",
    margin=0.1,
    scale="of the derivative by a factor on the exact control to N(0, 1) in 2-D; 100 steps, 200 batches of 64 paths",
)
def log_variance_gradients_are_quiet_at_the_optimum(seeds: Seeds) -> Arms:
    sde, batches = ControlledSDE(scale=2.0, horizon=1.0, steps=seeds.few(100)), seeds.few(200)
    rows = []
    for through in (False, True):
        row = []
        for g in seeds.torch("paths"):
            factor = torch.ones(batches, 1, 1, dtype=torch.float64, requires_grad=True)

            def control(x: Tensor, t: Tensor, factor: Tensor = factor) -> Tensor:
                return factor * _best_control(x, t)

            def log_density(x: Tensor) -> Tensor:
                return -x.square().sum(-1) / 2

            follow = None if through else control
            paths = sde.paths(control, log_density, (batches, 64, 2), follow=follow, generator=g, like=factor)
            loss = paths.log_ratio - paths.ito if through else log_variance_loss(paths.log_ratio)
            (slope,) = torch.autograd.grad(loss.mean(-1).sum(), factor)
            row.append(slope.var().item())
        rows.append(row)
    return Arms(*rows)


def draw(seeds: Seeds) -> list[Panel]:
    """Samples after training with either divergence, beside the truth."""
    one = seeds.one(0)
    panels = [Panel("target", points=TARGET.sample(500, generator=one.torch("true")[0])[0].numpy())]
    for divergence in ("kl", "log_variance"):
        found = _trained(one, divergence=divergence, lr=0.003)((1, 500, 2), generator=one.torch("test"))
        panels.append(Panel(divergence.replace("_", "-"), points=found[0].numpy()))
    return panels
