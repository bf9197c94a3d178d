"""What a weighting adds to cross-entropy, forward and backward, for 8192 samples in 1000 classes on one thread.

python -m benchmarks weighting
"""

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lossary.criterion import Criterion
from lossary.weighting import GroupDRO, InfoBatch

SAMPLES, CLASSES, GROUPS, ROUNDS = 8192, 1000, 100, 41


def measure() -> list[dict[str, str | float]]:
    """For each weighting, weighted over plain. They take turns, and the quickest decile counts: the rest is noise."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLES, CLASSES, generator=g, requires_grad=True)
    y = torch.randint(CLASSES, (SAMPLES,), generator=g)
    by_keyword = {
        "group": torch.randint(GROUPS, (SAMPLES,), generator=g),
        "index": torch.randperm(1_000_000, generator=g)[:SAMPLES],
    }
    plain = Criterion(_cross_entropy)
    results: list[dict[str, str | float]] = []
    for name, weighting in (
        (f"GroupDRO, {GROUPS} groups", GroupDRO(GROUPS)),
        ("InfoBatch, of a million samples", InfoBatch(1_000_000, epochs=1, generator=g)),
    ):
        weighted = Criterion(_cross_entropy, weighting=weighting)
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            times[0].append(_seconds(lambda: plain(z, y)))
            times[1].append(_seconds(lambda: weighted(z, y, **by_keyword)))  # noqa: B023
        before, after = (statistics.quantiles(arm, n=10)[0] for arm in times)
        ratio = after / before
        results.append({"name": name, "ratio": ratio, "target": 1.05, "unit": "times the loss alone"})
    torch.set_num_threads(threads)
    return results


def _cross_entropy(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(input, target, reduction="none")


def _seconds(objective: Callable[[], torch.Tensor]) -> float:
    start = time.process_time()  # without the time for which a busy machine puts us aside
    objective().backward()
    return time.process_time() - start
