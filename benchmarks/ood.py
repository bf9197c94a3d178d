"""Scores of 10,000 rows of 512 features for 10 classes, on one thread.

Mahalanobis distances, whitened once, against the loop over classes that pytorch-ood and the official code run; and each
detector against a bare matrix product of the size that whitening needs, which is the floor.
"""

import statistics

import torch
from torch import Tensor

from benchmarks._timing import seconds
from lossary.ood import NECO, ConjNormDetector, MahalanobisDetector, WDiscOOD, class_conditional_gaussian

ROWS, FEATURES, CLASSES, ROUNDS = 10_000, 512, 10, 9


def class_by_class(x: Tensor, means: Tensor, precision: Tensor) -> Tensor:
    """What one writes by hand: a product with the precision matrix for every class."""
    residuals = (x - mean for mean in means)
    return torch.stack([((r @ precision) * r).sum(1) for r in residuals]).amin(0)


def measure() -> list[dict[str, str | float]]:
    """Name, ratio (median over rounds), target and unit of each comparison."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, FEATURES, generator=generator)
    labels = torch.arange(ROWS) % CLASSES
    detector = MahalanobisDetector().fit(x, labels)
    means, covariance = class_conditional_gaussian(x, labels)
    precision = torch.linalg.inv(covariance)
    torch.testing.assert_close(detector.anomaly_score(x), class_by_class(x, means, precision), rtol=1e-3, atol=0.0)

    loop, floor = [], []
    for _ in range(ROUNDS + 1):  # they take turns, so that a busy machine slows all
        ours = seconds(lambda: detector.anomaly_score(x))
        loop.append(seconds(lambda: class_by_class(x, means, precision)) / ours)
        floor.append(ours / seconds(lambda: x @ precision))
    others = {
        "NECO": NECO(components=100),
        "WDiscOOD": WDiscOOD(),
        "ConjNorm at p = 2": ConjNormDetector(p=2.0),
        "ConjNorm at p = 2.2": ConjNormDetector(p=2.2),
    }
    beside = []
    for name, other in others.items():
        other.fit(x, labels)
        times = [seconds(lambda d=other: d.anomaly_score(x)) / seconds(lambda: x @ precision) for _ in range(ROUNDS)]
        row = {"name": f"scores by {name}, against one bare product", "ratio": statistics.median(times[1:])}
        beside.append({**row, "target": None, "unit": "times its time"})
    torch.set_num_threads(threads)
    return [
        {
            "name": "scores of ten classes, against one product a class",
            "ratio": statistics.median(loop[1:]),  # the first round warms up
            "target": ">= 8",
            "unit": "times faster",
        },
        {
            "name": "scores of ten classes, against one bare product",
            "ratio": statistics.median(floor[1:]),
            "target": "<= 2",
            "unit": "times its time",
        },
        *beside,
    ]
