"""Decoding-based regression: digits against usual heads, in point error and in density, and its risk by theory."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import DecodingRegressionHead, digit_tokenize
from lossary.tasks import diabetes, fit, split, stacked_mlp

HIDDEN, FEATURES, MIXTURE = 64, 32, 5
RATES = (0.001, 0.003, 0.01, 0.03)


class _Spelled(nn.Module):
    """A stacked trunk with a digit decoder for each seed."""

    def __init__(self, inputs: int, seeds: Seeds, **hyper: Any) -> None:
        super().__init__()
        self.trunk = stacked_mlp((inputs, HIDDEN, FEATURES), seeds)
        heads = []
        for generator in seeds.torch("head"):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(generator.initial_seed())
                heads.append(DecodingRegressionHead(FEATURES, width=32, **hyper))
        weights, _ = stack_module_state(heads)
        self.names, self.weights = list(weights), nn.ParameterList(weights.values())
        self.head = [heads[0]]  # in a list: its own weights are not to be trained

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.trunk(x).relu()
        return features

    def loss(self, features: Tensor, y: Tensor) -> Tensor:
        values: Tensor = self.each(DecodingRegressionHead.loss, features, y)
        return values

    def each(self, method: Callable[..., Any], features: Tensor, *inputs: Tensor) -> Any:
        """`method(head, features, ...)` for every seed with its own weights."""
        return vmap(lambda weights, *tensors: functional_call(_Call(self.head[0], method), weights, tensors))(
            {f"head.{name}": weight for name, weight in zip(self.names, self.weights)}, features, *inputs
        )


class _Call(nn.Module):
    def __init__(self, head: DecodingRegressionHead, method: Callable[..., Any]) -> None:
        super().__init__()
        self.head, self.method = head, method

    def forward(self, *tensors: Tensor) -> Any:
        return self.method(self.head, *tensors)


def _train(
    model: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    train: Tensor | None,
    seeds: Seeds,
    lr: float,
    steps: int,
) -> None:
    fit(
        model,
        x,
        y,
        loss=loss,
        seeds=seeds,
        train=train,
        steps=seeds.few(steps),
        optimizer=lambda weights: torch.optim.Adam(weights, lr=lr, fused=True),
    )


def _diabetes_error(seeds: Seeds, *, lr: float, base: int = 0, digits: int = 0) -> Tensor:
    """Mean squared error on the test part, in units of the target's variance; base 0 is least squares."""
    data = diabetes()
    parts = split(data, seeds)
    low, high = (bound(data.y[parts.train], -1, keepdim=True) for bound in (torch.amin, torch.amax))
    y = (data.y - low) / (high - low)
    x, test_x = data.x.expand(len(seeds), -1, -1), data.x[parts.test]
    if not base:
        model = stacked_mlp((10, HIDDEN, FEATURES, 1), seeds)
        _train(model, lambda z, y: (z.squeeze(-1) - y) ** 2, x, y, parts.train, seeds, lr, 150)
        answer = model(test_x).squeeze(-1)
    else:
        spelled = _Spelled(10, seeds, base=base, digits=digits)
        _train(spelled, lambda z, y: spelled.each(DecodingRegressionHead.loss, z, y), x, y, parts.train, seeds, lr, 150)
        centre, log_p = spelled.each(DecodingRegressionHead.leaves, spelled(test_x))
        answer = (log_p.exp() * centre.unsqueeze(1)).sum(-1)
    error: Tensor = (((answer - y.gather(1, parts.test)) * (high - low)) ** 2).mean(-1).detach()
    return error


def _two_branches(rows: int, seeds: Seeds) -> tuple[Tensor, Tensor]:
    """x from 0 to 1 and y in [0, 1] on one of two branches that cross and spread, (S, rows, 1) and (S, rows)."""
    made = []
    for rng in seeds.numpy("branches"):
        x = rng.uniform(size=rows)
        side = rng.choice([-1.0, 1.0], size=rows)
        y = 0.5 + side * 0.3 * np.cos(3 * x) + (0.01 + 0.05 * x) * rng.normal(size=rows)
        made.append(np.stack([x, y.clip(0, 1)]))
    x, y = torch.from_numpy(np.stack(made, 1)).float()
    return x.unsqueeze(-1), y


def _branches_loss(seeds: Seeds, *, lr: float, head: str, base: int = 2, digits: int = 7) -> Tensor:
    """Mean negative log-density of new points, in nats."""
    train, test = seeds.few(1000, smoke=64), seeds.few(1000, smoke=64)
    x, y = _two_branches(train + test, seeds)
    rows = torch.arange(train).expand(len(seeds), -1)
    if head == "digits":
        spelled = _Spelled(1, seeds, base=base, digits=digits)
        _train(spelled, spelled.loss, x, y, rows, seeds, lr, 400)
        with torch.no_grad():
            density: Tensor = spelled.each(DecodingRegressionHead.log_prob, spelled(x[:, train:]), y[:, train:])
        return -density.mean(-1)
    peaks = 1 if head == "normal" else MIXTURE
    model = stacked_mlp((1, HIDDEN, FEATURES, 3 * peaks), seeds)
    _train(model, _mixture_loss, x, y, rows, seeds, lr, 400)
    with torch.no_grad():
        return _mixture_loss(model(x[:, train:]), y[:, train:]).mean(-1)


def _mixture_loss(z: Tensor, y: Tensor) -> Tensor:
    """-log density of a mixture of normals with free means, spreads and shares."""
    mean, log_std, share = z.view(*z.shape[:-1], 3, -1).unbind(-2)
    log_std = log_std.clamp(-7, 3) - 1.5
    log_density = -0.5 * ((y.unsqueeze(-1) - mean) / log_std.exp()) ** 2 - log_std - 0.5 * np.log(2 * np.pi)
    density: Tensor = (share.log_softmax(-1) + log_density).logsumexp(-1)
    return -density


def _against(seeds: Seeds, head: str) -> Arms:
    ours = [{"head": "digits", "lr": lr, "digits": digits} for lr in (0.003, 0.01) for digits in (5, 7)]
    theirs = [{"head": head, "lr": lr} for lr in RATES]
    method, baseline = (tune(_branches_loss, grid, seeds, better="lower", n=2) for grid in (ours, theirs))
    details = {"method": method, "baseline": baseline}
    return Arms(_branches_loss(seeds, **method), _branches_loss(seeds, **baseline), details)


@claim(
    says="A digit decoder's point error is at most 5% above that of least squares",
    kind="ratio",
    metric="mean squared error",
    scale="diabetes, MLP 10-64-32, 150 steps of 64 by Adam, 64 leaves in base 4 or 8; 4 settings each",
    margin=1.05,
)
def digits_match_least_squares(seeds: Seeds) -> Arms:
    ours = [{"lr": lr, "base": base, "digits": digits} for lr in (0.003, 0.01) for base, digits in ((4, 3), (8, 2))]
    theirs = [{"lr": lr} for lr in RATES]
    method, baseline = (tune(_diabetes_error, grid, seeds, better="lower") for grid in (ours, theirs))
    details = {"method": method, "baseline": baseline}
    return Arms(_diabetes_error(seeds, **method), _diabetes_error(seeds, **baseline), details)


@claim(
    says="On a target with two branches a digit decoder finds a better density than a normal with free mean and spread",
    kind="superiority",
    metric="log-loss",
    scale="made-up two branches, 1000 points, MLP 1-64-32, 400 steps of 64 by Adam; 4 settings each",
)
def digits_beat_normal_density(seeds: Seeds) -> Arms:
    return _against(seeds, "normal")


@claim(
    says="Its density is as good as that of a mixture of five normals, which the branches are made of",
    kind="noninferiority",
    metric="log-loss",
    scale="as digits_beat_normal_density",
)
def digits_match_mixture_density(seeds: Seeds) -> Arms:
    return _against(seeds, "mixture")


@claim(
    says="K bits and N samples: the likeliest decoder's integrated squared error is 4^-K/12 int f'^2 + 2^K/N",
    kind="exact",
    metric="deviation",
    scale="f = 6 y (1 - y), N = 20000, K = 4 to 8; relative deviation of the mean over 20 samples a seed",
    tolerance=0.05,
)
def risk_is_as_the_theorem_says(seeds: Seeds) -> Arms:
    n, repeats, bits = 20_000, seeds.few(20, smoke=2), (4, 5, 6, 7, 8)
    measured = np.zeros(len(bits))
    for rng in seeds.numpy("beta"):
        for _ in range(repeats):
            y = torch.from_numpy(rng.beta(2, 2, size=n))
            for place, k in enumerate(bits):
                leaf = digit_tokenize(y, base=2, digits=k) @ 2 ** torch.arange(k - 1, -1, -1)
                height = torch.bincount(leaf, minlength=2**k).numpy() * 2**k / n
                edge = np.linspace(0, 1, 2**k + 1)
                mass = np.diff(3 * edge**2 - 2 * edge**3)
                # int (f - height)^2, with int f^2 = 6/5
                measured[place] += 1.2 - 2 * (height * mass).sum() + (height**2).mean()
    measured /= repeats * len(seeds)
    stated = np.array([4.0**-k / 12 * 12 + 2**k / n for k in bits])
    return Arms(measured / stated - 1, details={"measured": measured.tolist(), "stated": stated.tolist()})
