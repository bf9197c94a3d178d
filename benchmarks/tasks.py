"""Ten seeds trained as one stack against the same ten trained one after another, on one thread.

python -m benchmarks tasks
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._timing import seconds
from lossary.tasks import Seeds, cross_entropy, fit, stacked_mlp

SEEDS, ROWS, BATCH, STEPS, ROUNDS = Seeds(tuple(range(10))), 1347, 64, 210, 9


def one_after_another(x: Tensor, y: Tensor, hidden: int) -> None:
    """What one writes by hand: a plain model, SGD with momentum, shuffled epochs."""
    for s in range(len(SEEDS)):
        generator = torch.Generator().manual_seed(s)
        model = nn.Sequential(nn.Linear(64, hidden), nn.ReLU(), nn.Linear(hidden, 10))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps = 0
        while steps < STEPS:
            for rows in torch.randperm(len(x), generator=generator).split(BATCH)[: STEPS - steps]:
                optimizer.zero_grad()
                F.cross_entropy(model(x[rows]), y[rows]).backward()
                optimizer.step()
                steps += 1


def stacked(x: Tensor, y: Tensor, hidden: int) -> None:
    """The same through `lossary.tasks`."""
    model = stacked_mlp((64, hidden, 10), SEEDS)
    fit(model, x, y, loss=cross_entropy, seeds=SEEDS, steps=STEPS, batch=BATCH)


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds of loop over stack), target and unit for each width."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(ROWS, 64, generator=generator)
    y = torch.randint(10, (ROWS,), generator=generator)
    results: list[dict[str, str | float]] = []
    for hidden, target in ((64, 3.0), (128, 2.0)):
        ratios = []
        for _ in range(ROUNDS + 1):  # the two take turns, so that a busy machine slows both
            slow = seconds(lambda: one_after_another(x, y, hidden))  # noqa: B023
            ratios.append(slow / seconds(lambda: stacked(x, y, hidden)))  # noqa: B023
        name = f"ten seeds of an MLP 64-{hidden}-10, stacked against a loop"
        ratio = statistics.median(ratios[1:])  # the first round warms up
        results.append({"name": name, "ratio": ratio, "target": target, "unit": "times faster"})
    torch.set_num_threads(threads)
    return results
