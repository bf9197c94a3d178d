"""Checkpoint diffusion: one sampled update against gradient descent, and does it follow the prompt?

The runs are 2-8-1 perceptrons on 64 points of two moons, other points for each seed; starts that are updated were
not among them. The diffusion's network is a perceptron, stacked over the seeds. All claims are registered anew after
their first results were seen: learning rates had not been bracketed, one was not tuned, the parameters' scale was
pooled over the seeds, and sampling began at time 1, not 0.999.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lossary.claims import Arms, Seeds, claim, tune
from lossary.claims.draw import Panel
from lossary.diffusion import CheckpointDiffusion, permute_hidden_units
from lossary.tasks import minimise, stacked_mlp

SIZES = (2, 8, 1)
COUNT = 33
STEPS = 50  # evaluations of an update
SAVED = (0, 1, 2, 4, 7, 11, 16, 23, 32, 44, 60, 80)  # steps of Adam
LEVELS = (0.1, 0.25, 0.4, 0.55)  # asked for below 0.65, in nats
RATES = (0.0003, 0.001)


def _moons(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Points (S, 64, 2) and classes (S, 64), 0 or 1."""
    y = (torch.arange(64) % 2).float()
    rows = []
    for g in seeds.torch("data"):
        angle = math.pi * torch.rand(64, generator=g)
        upper = torch.stack([angle.cos(), angle.sin()], dim=1)
        lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
        rows.append(torch.where(y[:, None] > 0, lower, upper) + 0.1 * torch.randn(64, 2, generator=g))
    return torch.stack(rows), y.expand(len(seeds), -1)


def _logits(theta: Tensor, x: Tensor) -> Tensor:
    """Of networks (S, N, 33) at points (S, M, 2): (S, N, M)."""
    w1, b1, w2, b2 = theta.split([16, 8, 8, 1], dim=-1)
    hidden = torch.einsum("snij,smj->snmi", w1.unflatten(-1, (8, 2)), x) + b1.unsqueeze(-2)
    return (hidden.tanh() @ w2.unsqueeze(-1)).squeeze(-1) + b2


def _losses(theta: Tensor, seeds: Seeds) -> Tensor:
    """Cross-entropy (S, N)."""
    x, y = _moons(seeds)
    logits = _logits(theta, x)
    return F.binary_cross_entropy_with_logits(logits, y.unsqueeze(1).expand_as(logits), reduction="none").mean(-1)


def _starts(seeds: Seeds, n: int, stream: str) -> Tensor:
    """(S, n, 33), drawn as torch's linear layers."""
    bound = torch.cat([torch.full((24,), 2**-0.5), torch.full((9,), 8**-0.5)])
    return torch.stack([bound * (2 * torch.rand(n, COUNT, generator=g) - 1) for g in seeds.torch(stream)])


@cache
def _runs(seeds: Seeds) -> tuple[Tensor, Tensor]:
    """Checkpoints (S, 100, 12, 33) and their losses (S, 100, 12)."""
    theta = _starts(seeds, seeds.few(100, smoke=4), "runs").requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    kept = []
    for step in range(SAVED[-1] + 1):
        optimizer.zero_grad()
        loss = _losses(theta, seeds)
        if step in SAVED:
            kept.append((theta.detach().clone(), loss.detach()))
        loss.sum().backward()
        optimizer.step()
    return tuple(torch.stack(parts, dim=2) for parts in zip(*kept))


class _Network(nn.Module):
    def __init__(self, seeds: Seeds) -> None:
        super().__init__()
        self.mlp = stacked_mlp((2 * COUNT + 8 + 3, 128, 128, COUNT), seeds, activation="silu")
        nn.init.zeros_(self.mlp[-1].weight)
        nn.init.zeros_(self.mlp[-1].bias)

    def forward(self, x: Tensor, t: Tensor, theta: Tensor, loss: Tensor, prompt: Tensor) -> Tensor:
        angle = t.unsqueeze(-1) * (math.pi / 2 * 2.0 ** torch.arange(4))
        scalars = torch.stack([loss, prompt, prompt - loss], dim=-1)
        return self.mlp(torch.cat([x, theta, angle.sin(), angle.cos(), 3 * scalars], dim=-1))


def _trained(seeds: Seeds, *, lr: float, permute: bool = True) -> CheckpointDiffusion:
    checkpoints, losses = _runs(seeds)
    model = CheckpointDiffusion(_Network(seeds), scale=0.538 / checkpoints.std((1, 2, 3)).view(-1, 1, 1))
    pairs, generators = seeds.torch("pairs"), seeds.torch("diffusion")
    rows = torch.arange(len(seeds)).unsqueeze(1)

    def objective() -> Tensor:
        u = torch.stack([torch.rand(3, 64, generator=g) for g in pairs])
        run = (u[:, 0] * checkpoints.shape[1]).long()
        gap = 1 + (u[:, 1] * (len(SAVED) - 1)).long()
        first = (u[:, 2] * (len(SAVED) - gap)).long()
        theta, target = checkpoints[rows, run, first], checkpoints[rows, run, first + gap]
        if permute:
            theta, target = permute_hidden_units(theta, target, sizes=SIZES, generator=pairs)
        given = losses[rows, run, first], losses[rows, run, first + gap]
        return model.loss(theta, target, *given, generator=generators).mean(-1).sum()

    minimise(objective, model.parameters(), steps=seeds.few(600, smoke=2), lr=lr)
    return model


def _updated(model: CheckpointDiffusion, seeds: Seeds, prompt: float) -> Tensor:
    """Losses (S, n) of unseen starts after one update."""
    theta = _starts(seeds, seeds.few(64, smoke=4), "unseen")
    loss = _losses(theta, seeds)
    found = model.sample(theta, loss, torch.full_like(loss, prompt), steps=STEPS, generator=seeds.torch("update"))
    return _losses(found, seeds)


def _sampled(seeds: Seeds, *, prompt: float, **setting: object) -> list[float]:
    return _updated(_trained(seeds, **setting), seeds, prompt).mean(-1).tolist()


def _descended(seeds: Seeds, *, lr: float, steps: int) -> list[float]:
    theta = _starts(seeds, seeds.few(64, smoke=4), "unseen")
    for _ in range(steps):
        theta.requires_grad_()
        (slope,) = torch.autograd.grad(_losses(theta, seeds).sum(), theta)
        theta = theta.detach() - lr * slope
    return _losses(theta, seeds).mean(-1).tolist()


SAMPLED = [{"lr": lr, "prompt": prompt} for lr in RATES for prompt in (0.0, 0.05)]


@claim(
    says="One sampled update takes unseen starts to a lower loss than ten steps of gradient descent",
    kind="superiority",
    metric="log-loss",
    scale="2-8-1 on two moons, 100 runs of 12 checkpoints; diffusion MLP of 128, 600 steps, DDIM 50; 4 settings each",
)
def one_update_beats_ten_gradient_steps(seeds: Seeds) -> Arms:
    descent = [{"lr": lr, "steps": 10} for lr in (0.3, 1.0, 3.0, 10.0)]
    ours = tune(_sampled, SAMPLED, seeds, better="lower")
    theirs = tune(_descended, descent, seeds, better="lower")
    one = [tuple(_descended(seeds, lr=lr, steps=1)) for lr in (0.3, 1.0, 3.0, 10.0)]
    details = {"evaluations": [STEPS, 0], "gradients of the network that is trained": [0, 10]}
    details |= {"method": ours, "baseline": theirs, "one gradient step": min(sum(row) / len(row) for row in one)}
    return Arms(_sampled(seeds, **ours), _descended(seeds, **theirs), details)


@claim(
    says="Prompts are followed: the lower the loss that is asked for, the lower the loss",
    kind="trend",
    metric="log-loss",
    levels=(0.1, 0.25, 0.4, 0.55),
    scale="prompts 0.65 less the level; 2-8-1 on two moons, 100 runs; diffusion MLP of 128, 600 steps, DDIM 50; 2"
    " rates, tuned at prompt 0",
)
def prompts_are_followed(seeds: Seeds) -> Arms:
    best = tune(_sampled, [{"lr": lr, "prompt": 0.0} for lr in RATES], seeds, better="lower")
    model = _trained(seeds, lr=best["lr"])
    rows = torch.stack([_updated(model, seeds, 0.65 - level).mean(-1) for level in LEVELS], dim=1)
    return Arms(rows.tolist(), details={"evaluations": STEPS, "lr": best["lr"]})


@claim(
    says="Permuting hidden units in training makes the update better",
    kind="superiority",
    metric="log-loss",
    scale="prompt 0; 2-8-1 on two moons, 100 runs of 12 checkpoints; diffusion MLP of 128, 600 steps, DDIM 50; 2 rates",
)
def permuted_units_help(seeds: Seeds) -> Arms:
    grids = [[{"lr": lr, "prompt": 0.0, "permute": permute} for lr in RATES] for permute in (True, False)]
    ours, theirs = (tune(_sampled, grid, seeds, better="lower") for grid in grids)
    details = {"evaluations": [STEPS, STEPS], "method": ours, "baseline": theirs}
    return Arms(_sampled(seeds, **ours), _sampled(seeds, **theirs), details)


def draw(seeds: Seeds) -> list[Panel]:
    """What one network says before and after updates with two prompts."""
    one = seeds.one(0)
    model, theta = _trained(one, lr=RATES[-1]), _starts(one, 1, "unseen")
    x, _ = _moons(one)
    axis = torch.linspace(-1.5, 2.5, 60), torch.linspace(1.5, -1.0, 40)
    grid = torch.cartesian_prod(axis[1], axis[0]).flip(1).unsqueeze(0)
    points = torch.stack([(x[0, :, 0] + 1.5) * 15, (1.5 - x[0, :, 1]) * 16], dim=1).numpy()
    panels = []
    for name, prompt in (("before", None), ("asked for 0.4", 0.4), ("asked for 0.05", 0.05)):
        if prompt is not None:
            loss = _losses(theta, one)
            found = model.sample(theta, loss, torch.full_like(loss, prompt), generator=one.torch("update"))
        else:
            found = theta
        image = _logits(found, grid)[0, 0].sigmoid().view(40, 60).numpy()
        panels.append(Panel(f"{name}: loss {_losses(found, one).item():.2f}", image=image, points=points))
    return panels
