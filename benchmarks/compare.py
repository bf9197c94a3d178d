"""A cell of `compare`, its seeds as one stack, against the same seeds trained one after another, on one thread.

A cell is an MLP 64-64-10 on 1,347 rows, 400 steps of AdamW, then the prediction of 450 others. One after another it is
what one writes by hand: `nn.Sequential` and `torch.optim.AdamW`, by default and fused, on the same batches. The targets
hold for what such a loop uses by default. At batch 256 arithmetic outweighs the calls that a stack saves. The small
convolutional network does not stack: its seeds run one after another in `compare` too.

python -m benchmarks compare
"""

import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import AdamW

from benchmarks._timing import seconds
from lossary.compare.load import Problem, load
from lossary.compare.profile import profile
from lossary.compare.training import Fold, predict
from lossary.tasks import Seeds, small_cnn

ROWS, TEST, STEPS, CLASSES, ROUNDS = 1347, 450, 400, 10, 5
SETTING = {
    "family": "network", "class_weight": None, "model": "mlp", "hidden": [64], "activation": "relu", "steps": STEPS,
    "batch": 64, "optimizer": "AdamW", "lr": 3e-3, "weight_decay": 0.01,
}  # fmt: skip


def mlp(generator: torch.Generator) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))


def cnn(generator: torch.Generator) -> nn.Module:
    return small_cnn(CLASSES, generator=generator, colours=1)


def one_after_another(setting: dict, fold: Fold, seeds: Seeds, *, fused: bool) -> np.ndarray:
    """What one writes by hand."""
    x, y, test = (torch.from_numpy(values) for values in (fold.x, fold.y, fold.test))
    if fold.shape:
        x, test = x.unflatten(1, fold.shape), test.unflatten(1, fold.shape)
    found = []
    for seed in seeds.ids:
        generator = torch.Generator().manual_seed(seed)
        model = {"mlp": mlp, "cnn": cnn}[setting["model"]](generator)
        rates = {"lr": setting["lr"], "weight_decay": setting["weight_decay"]}
        optimizer = AdamW(model.parameters(), **rates, fused=fused or None)
        order = torch.empty(0, dtype=torch.int64)
        for _ in range(setting["steps"]):
            if len(order) < setting["batch"]:
                order = torch.cat([order, torch.randperm(len(x), generator=generator)])
            rows, order = order[: setting["batch"]], order[setting["batch"] :]
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            found.append(model(test).log_softmax(-1).numpy())
    return np.stack(found)


def ratio(slow: Callable[[], object], quick: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The median over rounds, in which they take turns, so that a busy machine slows both."""
    return statistics.median([seconds(slow) / seconds(quick) for _ in range(rounds + 1)][1:])  # the first warms up


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds of loop over stack), target and unit of each contest."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    centres, y = rng.normal(size=(CLASSES, 64)), rng.integers(CLASSES, size=ROWS + TEST)
    x = (centres[y] + 2 * rng.normal(size=(len(y), 64))).astype(np.float32)
    fold = Fold(x[:ROWS], y[:ROWS], x[ROWS:], CLASSES)
    image = Fold(x[:ROWS], y[:ROWS], x[ROWS:], CLASSES, shape=(1, 8, 8))
    contests = [("MLP", 64, n, fused) for n in (5, 20) for fused in (False, True)] + [("MLP", 256, 5, False)]
    results: list[dict[str, str | float]] = []
    for model, batch, number, fused in [*contests, ("small CNN, which does not stack", 64, 2, False)]:
        stacks, seeds = model == "MLP", Seeds(tuple(range(number)))
        setting = {**SETTING, "batch": batch} | ({} if stacks else {"model": "cnn", "steps": STEPS // 4})
        data = fold if stacks else image
        hand = partial(one_after_another, setting, data, seeds, fused=fused)
        stack = partial(predict, setting, data, seeds)
        right = [(said.argmax(-1) == y[ROWS:]).mean() for said in (hand(), stack()[0])]
        assert abs(right[0] - right[1]) < 0.05, right  # both learn the same
        results.append(
            {
                "name": f"{number} seeds of {'an ' if stacks else 'a '}{model}, batch {batch}, against a loop with "
                f"{'fused ' if fused else ''}AdamW",
                "ratio": ratio(hand, stack),
                "target": ">= 4" if stacks and batch == 64 and not fused else None,
                "unit": "times faster",
            }
        )
    table = problem(rng.normal(size=(5000, 30)), rng)
    results.append(
        {
            "name": "the profile of 5,000 rows of 30 columns and 8 classes",
            "ratio": statistics.median([seconds(lambda: profile(table, np.arange(5000))) for _ in range(3)]),
            "target": "<= 15",
            "unit": "s",
        }
    )
    torch.set_num_threads(threads)
    return results


def problem(x: np.ndarray, rng: np.random.Generator) -> Problem:
    """A table whose classes are steps of the sum of five columns, with a time."""
    frame = pd.DataFrame(x).add_prefix("c").assign(when=rng.random(len(x)))
    return load(frame.assign(y=np.digitize(x[:, :5].sum(1), (-4, -2, -1, 0, 1, 2, 4))), target="y", time="when")
