"""Classification helps regression: does the second head lower the error where targets are imbalanced, and only there?

The paper's one-dimensional functions, A sin(C x) + B sin(D x), drawn anew for each seed. Training targets are peaked
severely or spread evenly; test targets are always spread evenly and free of noise.
"""

import torch
from torch import Tensor

from lossary.claims import Arms, Seeds, claim, tune
from lossary.losses import RegressionWithClassificationLoss, imbalanced_regression_sampler, target_edges
from lossary.tasks import fit, stacked_mlp

SEVERE, EVEN = 0.03, None
CLASSES = 32
EDGES = target_edges(torch.tensor([-1.5, 1.5]), CLASSES)  # the range of every such function
PLAIN = [{"lam": None, "lr": lr} for lr in (0.003, 0.005, 0.01, 0.02, 0.03, 0.05)]
JOINT = [{"lam": lam, "lr": lr} for lam in (10.0, 100.0, 1000.0) for lr in (0.01, 0.03)]


def _functions(seeds: Seeds, stream: str, n: int, spread: float | None, noise: float) -> tuple[Tensor, Tensor]:
    """Points of every seed's function: x (S, n, 1) and y (S, n), the targets spread as asked before noise is added."""
    x, y = [], []
    for shape, generator in zip(seeds.numpy("function"), seeds.torch(stream)):
        a, c = shape.random(), shape.integers(9, 31)
        pool = 2 * torch.rand(20_000, generator=generator) - 1
        values = a * torch.sin(float(c) * pool) + (1.5 - a) * torch.sin(float(c // 3) * pool)
        rows = list(imbalanced_regression_sampler(values, spread=spread, num_draws=n, generator=generator))
        x.append(pool[rows].unsqueeze(1))
        y.append(values[rows] + noise * torch.randn(n, generator=generator))
    return torch.stack(x), torch.stack(y)


def _error(seeds: Seeds, *, lam: float | None, lr: float, spread: float | None, noise: float = 0.0) -> Tensor:
    """Mean squared test error per seed; lam None is regression alone, from the same initial weights."""
    x, y = _functions(seeds, "train", 2000, spread, noise)
    test_x, test_y = _functions(seeds, "test", 2000, EVEN, 0.0)
    model = stacked_mlp((1, 32, 32, 1 + CLASSES), seeds)
    joint = RegressionWithClassificationLoss(EDGES, lam=lam or 0.0)

    def loss(z: Tensor, target: Tensor) -> Tensor:
        if lam is None:
            return (z[..., 0] - target).square()
        return joint(z[..., 0], target, class_logits=z[..., 1:])

    fit(
        model,
        x,
        y,
        loss=loss,
        seeds=seeds,
        steps=seeds.few(1000),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=lr, fused=True),
    )
    with torch.no_grad():
        return (model(test_x)[..., 0] - test_y).square().mean(1)


def _errors(seeds: Seeds, spread: float | None, noise: float = 0.0) -> tuple[Tensor, Tensor, dict]:
    """With and without the second head, each at its best setting for this spread."""
    setting = {"spread": spread, "noise": noise}
    chosen, plain = (
        tune(_error, [{**one, **setting} for one in grid], seeds, better="lower") for grid in (JOINT, PLAIN)
    )
    return _error(seeds, **chosen), _error(seeds, **plain), {"method": chosen, "baseline": plain}


@claim(
    says="With severely imbalanced targets an added classification loss lowers the balanced test error by 5% or more",
    kind="ratio",
    metric="mean squared error",
    scale="1-D functions, 2000 points, 32 bins, MLP 1-32-32-1, 1000 Adam steps of 64; 6 settings each",
    margin=0.95,
)
def classification_helps_imbalanced_regression(seeds: Seeds) -> Arms:
    return Arms(*_errors(seeds, SEVERE))


@claim(
    says="With severely imbalanced and noisy targets an added classification loss lowers the balanced test error by 5%"
    " or more",
    kind="ratio",
    metric="mean squared error",
    scale="1-D functions, noise 0.1, 2000 points, 32 bins, MLP 1-32-32-1, 1000 Adam steps of 64; 6 settings each",
    margin=0.95,
)
def classification_helps_noisy_imbalanced_regression(seeds: Seeds) -> Arms:
    return Arms(*_errors(seeds, SEVERE, noise=0.1))


@claim(
    says="Classification helps more where targets are imbalanced: what it leaves of the test error is smaller by 5% or"
    " more than with evenly spread targets",
    kind="ratio",
    metric="relative error",
    scale="1-D functions, 2000 points, 32 bins, MLP 1-32-32-1, 1000 Adam steps of 64; 6 settings each",
    margin=0.95,
)
def classification_helps_imbalanced_more_than_even(seeds: Seeds) -> Arms:
    joint, plain, severe = _errors(seeds, SEVERE)
    even_joint, even_plain, even = _errors(seeds, EVEN)
    return Arms(joint / plain, even_joint / even_plain, {"severe": severe, "even": even})
