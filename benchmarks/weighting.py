"""What a weighting adds to cross-entropy, forward and backward, for 8192 samples in 1000 classes on one thread.

And how long the worst-case weights of a million log-normal losses take, the median of five.

python -m benchmarks weighting
"""

import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks._timing import seconds as clock
from lossary.criterion import Criterion
from lossary.weighting import DeferredReweighting, DynamicLossGate, GroupDRO, InfoBatch, class_balanced_weights
from lossary.weighting._worst_case import chi2_ball, chi2_penalty, cvar, kl_ball, kl_penalty, spectral, spectral_penalty

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
    counts = y.bincount(minlength=CLASSES)
    for name, weighting in (
        (f"GroupDRO, {GROUPS} groups", GroupDRO(GROUPS)),
        ("InfoBatch, of a million samples", InfoBatch(1_000_000, epochs=1, generator=g)),
        ("DynamicLossGate, of a million samples", DynamicLossGate(1_000_000)),
        ("class_balanced_weights", partial(class_balanced_weights, class_counts=counts)),
        ("DeferredReweighting", DeferredReweighting(counts.tolist(), epochs=10)),
    ):
        weighted = Criterion(_cross_entropy, weighting=weighting)
        times: list[list[float]] = [[], []]
        for _ in range(ROUNDS):
            times[0].append(_seconds(lambda: plain(z, y)))
            times[1].append(_seconds(lambda: weighted(z, y, **by_keyword)))  # noqa: B023
        before, after = (statistics.quantiles(arm, n=10)[0] for arm in times)
        ratio = after / before
        results.append({"name": name, "ratio": ratio, "target": 1.05, "unit": "times the loss alone"})
    results += _worst_cases(g)
    torch.set_num_threads(threads)
    return results


def _worst_cases(generator: torch.Generator) -> list[dict[str, str | float]]:
    losses = torch.randn(1_000_000, generator=generator).exp()
    rising = torch.arange(1.0, 1_000_001, dtype=torch.float64)
    spectrum = rising / rising.sum()
    return [
        {"name": f"worst-case weights, {name}", "ratio": seconds, "target": "<= 0.2", "unit": "s"}
        for name, weigh in {
            "KL penalty": lambda: kl_penalty(losses, 1.0),
            "KL ball": lambda: kl_ball(losses, 0.3),
            "chi2 penalty": lambda: chi2_penalty(losses, 1.0),
            "chi2 ball": lambda: chi2_ball(losses, 0.3),
            "CVaR": lambda: cvar(losses, 0.1),
            "spectrum": lambda: spectral(losses, spectrum),
            "spectrum with chi2 penalty": lambda: spectral_penalty(losses, spectrum, 1.0),
        }.items()
        for seconds in [statistics.median(clock(weigh) for _ in range(5))]
    ]


def _cross_entropy(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(input, target, reduction="none")


def _seconds(objective: Callable[[], torch.Tensor]) -> float:
    start = time.process_time()  # without the time for which a busy machine puts us aside
    objective().backward()
    return time.process_time() - start
