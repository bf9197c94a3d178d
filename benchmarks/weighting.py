"""What a weighting adds to cross-entropy, forward and backward, for 8192 samples in 1000 classes on one thread.

Two runs of the loss differ by more than a weighting takes, so it is timed on losses that are there already, each time
after a run of the loss, which leaves nothing in the caches: a criterion with it less one without, forward and backward,
as a share of the loss's own time, medians over rounds. And how long the worst-case weights of a million log-normal
losses take, the median of five.

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
    """The share of the loss's time that each weighting adds, in per cent; seconds of the worst-case weights."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    z = torch.randn(SAMPLES, CLASSES, generator=g, requires_grad=True)
    y = torch.randint(CLASSES, (SAMPLES,), generator=g)
    values = F.cross_entropy(z, y, reduction="none").detach().requires_grad_()
    by_keyword = {
        "group": torch.randint(GROUPS, (SAMPLES,), generator=g),
        "index": torch.randperm(1_000_000, generator=g)[:SAMPLES],
    }
    whole, plain = Criterion(_cross_entropy), Criterion(_as_they_are)
    results: list[dict[str, str | float]] = []
    counts = y.bincount(minlength=CLASSES)
    for name, weighting in (
        (f"GroupDRO, {GROUPS} groups", GroupDRO(GROUPS)),
        ("InfoBatch, of a million samples", InfoBatch(1_000_000, epochs=1, generator=g)),
        ("DynamicLossGate, of a million samples", DynamicLossGate(1_000_000)),
        ("class_balanced_weights", partial(class_balanced_weights, class_counts=counts)),
        ("DeferredReweighting", DeferredReweighting(counts.tolist(), epochs=10)),
    ):
        weighted = Criterion(_as_they_are, weighting=weighting)
        times: list[list[float]] = [[], [], []]
        for _ in range(ROUNDS):
            times[0].append(_seconds(lambda: whole(z, y)))
            times[1].append(_seconds(lambda: plain(values, y)))
            times[0].append(_seconds(lambda: whole(z, y)))
            times[2].append(_seconds(lambda: weighted(values, y, **by_keyword)))  # noqa: B023
        loss, without, with_it = (statistics.median(arm) for arm in times)
        added = 100 * (with_it - without) / loss
        results.append({"name": name, "ratio": added, "target": "<= 5", "unit": "% of the loss's time"})
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


def _as_they_are(input: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return input


def _seconds(objective: Callable[[], torch.Tensor]) -> float:
    start = time.process_time()  # without the time for which a busy machine puts us aside
    objective().backward()
    return time.process_time() - start
