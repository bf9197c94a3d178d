"""Improvable gap balancing: three tasks of unlike difficulty and units share a network; which weights serve them best?

The tasks are a linear function, a small random network and a sine, of eight normal features, with noise of a tenth
of their spread; their squared errors are in units 10 : 1000 : 1. An arm's relative error is the mean over tasks of
its test error, noise left out, divided by that of a network trained on the task alone.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.tasks import Data, per_seed, stacked_mlp
from lossary.weighting import ImprovableGapBalancing, ImprovableGapBalancingRL

TASKS, ROWS, BATCH, STEPS = 3, 1024, 64, 800
AGENT_STEPS = 480  # an update of the agent takes longer than a step of the network
EPOCH = ROWS // BATCH
UNITS = torch.tensor([10.0, 1000.0, 1.0])
RATES = (0.001, 0.003, 0.01, 0.03)


class _Uncertainty(nn.Module):
    """Uncertainty weighting (Kendall et al., 2018): l / (2 v) + log(v) / 2, with v learned."""

    def __init__(self, stack: int) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(stack, TASKS))

    def forward(self, losses: Tensor) -> Tensor:
        return losses / (2 * self.log_variance.exp()) + self.log_variance / 2


class _DynamicAverage(nn.Module):
    """Dynamic weight average (Liu et al., 2019): K softmax(r / 2), r how the mean loss of 25 steps changed."""

    def __init__(self) -> None:
        super().__init__()
        self.past: list[Tensor] = []

    def forward(self, losses: Tensor) -> Tensor:
        self.past = [*self.past[-49:], losses.detach()]
        if len(self.past) < 50:
            return losses
        before, now = (torch.stack(half).mean(0) for half in (self.past[:25], self.past[25:]))
        return TASKS * (now / before / 2).softmax(-1) * losses


def _balance(arm: str, seeds: Seeds) -> Callable[[Tensor], Tensor]:
    """What turns losses (S, tasks) into objectives of the same shape."""
    if arm == "gaps":
        return per_seed(lambda _: ImprovableGapBalancing(TASKS, steps_per_epoch=EPOCH), seeds)
    if arm in ("agent", "random"):
        epochs = {} if arm == "agent" else {"learn_epoch": STEPS, "policy_epoch": STEPS}
        made = {"steps_per_epoch": EPOCH, "lr": 3e-3, **epochs}
        g = seeds.torch("agent")
        return per_seed(lambda s: ImprovableGapBalancingRL(TASKS, generator=g[s], **made), seeds)
    if arm == "uncertainty":
        return _Uncertainty(len(seeds))
    return {"sum": nn.Identity(), "average": _DynamicAverage(), "logs": torch.log}[arm]


def _regressions(seeds: Seeds) -> tuple[Data, Data]:
    """Training rows with noise and test rows without: x (S, n, 8), y (S, n, tasks), each task of unit variance."""
    parts = []
    for g in seeds.torch("rows"):
        x = torch.randn(ROWS + 1000, 8, generator=g)
        directions, inner = torch.randn(2, 8, generator=g) / 8**0.5, torch.randn(8, 8, generator=g) / 2
        y = torch.stack([x @ directions[0], (x @ inner).tanh().sum(1), (1.5 * x @ directions[1]).sin()], 1)
        y = (y - y.mean(0)) / y.std(0)
        noisy = y[:ROWS] + 0.1 * torch.randn(ROWS, TASKS, generator=g)
        parts.append((x[:ROWS], noisy, x[ROWS:], y[ROWS:]))
    x, y, new_x, new_y = (torch.stack(tensors) for tensors in zip(*parts))
    return Data(x, y, "regressions train", None), Data(new_x, new_y, "regressions test", None)


def _trained(
    seeds: Seeds, balance: Callable[[Tensor], Tensor], *, lr: float, steps: int = STEPS, units: Tensor = UNITS
) -> nn.Module:
    """Networks 8-64-3 under Adam, which minimises the sum of what `balance` makes of the task losses."""
    data, model = _regressions(seeds)[0], stacked_mlp((8, 64, TASKS), seeds)
    groups = [{"params": model.parameters()}]
    if isinstance(balance, _Uncertainty):
        groups.append({"params": balance.parameters(), "lr": 0.025})
    optimizer = torch.optim.Adam(groups, lr=lr)
    order, every = seeds.torch("order"), torch.arange(len(seeds)).unsqueeze(1)
    for step in range(seeds.few(steps)):
        if step % EPOCH == 0:
            epoch = torch.stack([torch.randperm(ROWS, generator=g) for g in order]).split(BATCH, dim=1)
        rows = epoch[step % EPOCH]
        losses = units * (model(data.x[every, rows]) - data.y[every, rows]).square().mean(1)
        optimizer.zero_grad()
        balance(losses).sum().backward()
        optimizer.step()
    return model


def _errors(seeds: Seeds, balance: Callable[[Tensor], Tensor], *, lr: float, steps: int = STEPS) -> Tensor:
    """Mean squared test error (S, tasks)."""
    model, test = _trained(seeds, balance, lr=lr, steps=steps), _regressions(seeds)[1]
    with torch.no_grad():
        return (model(test.x) - test.y).square().mean(1)


@cache
def _alone(seeds: Seeds) -> Tensor:
    """Mean squared test error (S, tasks) of networks that learn one task each."""
    each = [_errors(seeds, lambda losses, k=k: losses[:, k].log(), lr=0.01)[:, k] for k in range(TASKS)]
    return torch.stack(each, 1)


def _relative_error(seeds: Seeds, *, arm: str, lr: float, steps: int = STEPS) -> Tensor:
    """Mean over tasks of the error in units of that of a network for the task alone, per seed."""
    return (_errors(seeds, _balance(arm, seeds), lr=lr, steps=steps) / _alone(seeds)).mean(1)


def _compare(seeds: Seeds, method: str, baselines: tuple[str, ...]) -> Arms:
    """The method against the best of the baselines; each of them has the method's number of learning rates."""
    grids = ([{"arm": arm, "lr": lr} for arm in arms for lr in RATES] for arms in ((method,), baselines))
    chosen, other = (tune(_relative_error, grid, seeds, better="lower") for grid in grids)
    details = {"method": chosen, "baseline": other}
    return Arms(_relative_error(seeds, **chosen), _relative_error(seeds, **other), details)


@claim(
    says="Improvable gap balancing errs less than the plain sum of log-losses, its objective without the weights",
    kind="ratio",
    metric="relative error",
    margin=0.95,
    scale="3 regressions of 1024 rows in units 10:1000:1, MLP 8-64-3, Adam, 800 steps of 64; 4 settings each",
)
def gaps_beat_plain_log_losses(seeds: Seeds) -> Arms:
    return _compare(seeds, "gaps", ("logs",))


@claim(
    says="Improvable gap balancing errs less than the better of uncertainty weighting and dynamic weight average",
    kind="ratio",
    metric="relative error",
    margin=0.95,
    scale="3 regressions of 1024 rows in units 10:1000:1, MLP 8-64-3, Adam, 800 steps of 64; 4 settings for each of 3",
)
def gaps_beat_other_loss_balancers(seeds: Seeds) -> Arms:
    return _compare(seeds, "gaps", ("uncertainty", "average"))


@claim(
    says="Weights that an actor-critic agent chooses err less than the random ones with which it begins",
    kind="ratio",
    metric="relative error",
    margin=0.95,
    scale="3 regressions of 1024 rows in units 10:1000:1, MLP 8-64-3, Adam, 480 steps of 64, some 230 updates of the"
    " agent; learning rates 0.01 and, of the agent, 0.003",
)
def agent_beats_random_weights(seeds: Seeds) -> Arms:
    agent, random = (_relative_error(seeds, arm=arm, lr=0.01, steps=AGENT_STEPS) for arm in ("agent", "random"))
    return Arms(agent, random)


@claim(
    says="Under improvable gap balancing networks do not depend on the units of the losses",
    kind="exact",
    metric="deviation",
    tolerance=1e-4,
    scale="3 regressions of unit variance, units 10:1000:1 against 1:1:1, MLP 8-64-3, Adam, 100 steps; predictions",
)
def gaps_ignore_units(seeds: Seeds) -> Arms:
    x = _regressions(seeds)[1].x

    def moved(arm: str) -> Tensor:
        """By how much, at most, predictions differ, per seed."""
        scaled, plain = (
            _trained(seeds, _balance(arm, seeds), lr=0.003, steps=100, units=units)(x)
            for units in (UNITS, torch.ones(TASKS))
        )
        return (scaled - plain).detach().abs().amax((1, 2))

    return Arms(moved("gaps"), details={"under a plain sum": moved("sum").mean().item()})
